"""The parts of a store belong together: versions, moves, event log and clicks. What does not is named and not used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from serving import ANY, days, run, server, stored

from freshrec.errors import StateError
from freshrec.nightly.doctor import check_store
from freshrec.nightly.job import waiting_batches
from freshrec.store import click_journal, log_fingerprint, version_files
from freshrec.store.checksummed_json import read_checksummed, write_checksummed
from freshrec.store.click_journal import Click, ClickJournal, close_journal, mark_taken, read_journal
from freshrec.store.event_log import EventLog
from freshrec.store.log_fingerprint import require_same_log
from freshrec.store.store_file import store_id
from freshrec.store.versions import Store, open_store

CLICKS = [Click("user-1", "item-1", 1), Click("user-2", "item-2", 2), Click("user-3", "item-3", 3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with two versions in `s`, the same store one day earlier in `earlier/s`, and a third day to learn."""
    stored(tmp_path, n=2)
    stored(tmp_path / "earlier", n=1)
    return tmp_path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A store made from the same files with the same commands, except for its model."""
    stored(tmp_path / "other", "popularity", n=2)
    return tmp_path / "other" / "s"


def wrong(folder: Path) -> list[str]:
    """Return what `doctor` finds wrong."""
    return [sentence for ok, sentence in check_store(open_store(folder)) if not ok]


def remarks(folder: Path) -> str:
    """Return what `doctor` says and does not find wrong."""
    return "\n".join(sentence for ok, sentence in check_store(open_store(folder)) if ok)


def replace_folder(path: Path, source: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(source, path)


def without_new_fields(folder: Path) -> None:
    """Remove what stores of earlier versions lack: ids and fingerprints."""
    content = read_checksummed(folder / "store.json")
    write_checksummed({"format": content["format"], "made_at": content["made_at"]}, folder / "store.json")
    for path in (folder / "versions").glob("*/manifest.json"):
        kept = {key: value for key, value in read_checksummed(path).items() if key not in ("store", "log")}
        write_checksummed(kept, path)
    moves = [{key: move[key] for key in move if key != "store"} for move in read_checksummed(folder / "live.json")]
    write_checksummed(moves, folder / "live.json")


def delete_log(folder: Path) -> None:
    shutil.rmtree(folder / "s" / "log")


def empty_log(folder: Path) -> None:
    delete_log(folder)
    (folder / "s" / "log").mkdir()


def older_log(folder: Path) -> None:
    replace_folder(folder / "s" / "log", folder / "earlier" / "s" / "log")


def other_log(folder: Path) -> None:
    replace_folder(folder / "s" / "log", folder / "other" / "s" / "log")


LOGS = [
    (delete_log, r"log is missing, but version 2 knows 1,800 rows in 2 batches\. Restore"),
    (empty_log, r"log is missing, but version 2 knows 1,800 rows in 2 batches\. Restore"),
    (older_log, r"log is older than version 2: version 2 knows 1,800 rows in 2 batches\. Restore a newer backup"),
    (other_log, r"log does not belong to version 2: 0+1\.json differs\. Restore the log and the versions from"),
]


@pytest.mark.parametrize(("spoil", "sentence"), LOGS)
def test_a_log_that_contradicts_the_live_version_is_named_and_not_continued(
    spoil: Callable[[Path], None], sentence: str, folder: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wrong(folder / "s") == []
    spoil(folder)
    assert run("doctor", folder) == 7
    assert "WRONG" in (printed := capsys.readouterr().out)
    assert "Restore" in printed
    before = {path: path.stat().st_mtime_ns for path in (folder / "s").rglob("*") if path.name != "lock"}
    for words in (("update", str(folder / "day-2.parquet"), *ANY), ("erase", "user-1")):
        assert run(words[0], folder, *words[1:]) == 7
    assert {path: path.stat().st_mtime_ns for path in (folder / "s").rglob("*") if path.name != "lock"} == before
    with pytest.raises(StateError, match=sentence):
        require_same_log(open_store(folder / "s"))
    with pytest.raises(StateError, match=sentence), server(folder):
        pass


def test_the_check_of_every_update_reads_one_commit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the log has two commits, but the cost must not grow with their number
    read, checksum = list[Path](), log_fingerprint.file_checksum
    monkeypatch.setattr(log_fingerprint, "file_checksum", lambda path: read.append(path) or checksum(path))
    require_same_log(open_store(folder / "s"))
    assert [path.name for path in read] == [f"{1:020}.json"]


def test_a_log_may_be_longer_than_the_live_version_knows(folder: Path) -> None:
    assert run("rollback", folder, "1") == 0
    assert wrong(folder / "s") == []
    with server(folder) as (_, live):
        assert live.version is not None and live.version.number == 1


def test_after_an_erasure_a_log_from_before_it_contradicts_the_live_version(folder: Path) -> None:
    shutil.copytree(folder / "s" / "log", folder / "log before")
    assert run("erase", folder, "user-1") == 0
    assert wrong(folder / "s") == []
    replace_folder(folder / "s" / "log", folder / "log before")
    with pytest.raises(StateError, match="log is older than version 2"):
        require_same_log(open_store(folder / "s"))


def test_a_store_without_the_new_fields_has_nothing_wrong_and_gets_them_with_the_next_version(folder: Path) -> None:
    without_new_fields(folder / "s")
    assert store_id(folder / "s") == "" and open_store(folder / "s").manifest(2).log is None
    assert wrong(folder / "s") == [] and run("update", folder, str(folder / "day-2.parquet"), *ANY) == 0
    manifest = open_store(folder / "s").manifest(3)
    assert manifest.log is not None and (manifest.log.batch, manifest.log.rows) == (3, 1500 + 2 * 300)
    with server(folder) as (_, live):
        assert live.version is not None


def test_a_store_without_the_new_fields_recognizes_another_log_by_its_deliveries(folder: Path) -> None:
    without_new_fields(folder / "s")
    log = EventLog(folder / "new" / "log")
    shutil.rmtree(folder / "s" / "log")
    for nth, frame in enumerate(days()[:2]):
        rows = frame.rename({"timestamp": "time"})
        log.append(rows.drop("category"), f"another delivery {nth}", True)
    shutil.copytree(log.folder, folder / "s" / "log")
    store = open_store(folder / "s")
    with pytest.raises(StateError, match="Batch 1 of .*log is not the delivery that version 1 learned"):
        waiting_batches(store, EventLog(store.folder / "log"))
    assert any("is not the delivery" in sentence for sentence in wrong(folder / "s"))
    assert run("update", folder) == 7


def take_version(folder: Path) -> None:
    replace_folder(folder / "s" / "versions" / "2", folder / "other" / "s" / "versions" / "2")


def take_moves(folder: Path) -> None:
    shutil.copy(folder / "other" / "s" / "live.json", folder / "s")


def older_moves(folder: Path) -> None:
    assert run("update", folder, str(folder / "day-2.parquet"), *ANY) == 0
    shutil.copy(folder / "earlier" / "s" / "live.json", folder / "s")


def take_store_file(folder: Path) -> None:
    shutil.copy(folder / "other" / "s" / "store.json", folder / "s")


def take_number(folder: Path) -> None:
    replace_folder(folder / "s" / "versions" / "2", folder / "s" / "versions" / "1")


def delete_version(folder: Path) -> None:
    shutil.rmtree(folder / "s" / "versions" / "2")


def delete_versions(folder: Path) -> None:
    shutil.rmtree(folder / "s" / "versions")


def swap_commits(folder: Path) -> None:
    first, second = sorted((folder / "s" / "log" / "_delta_log").glob("*.json"))[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def forget_checksums(folder: Path) -> None:
    write_checksummed({}, folder / "s" / "log" / "checksums.json")


PARTS = [
    (take_version, "versions/2/manifest.json belongs to another store. Restore versions/2"),
    (take_moves, "live.json belongs to another store. Restore it"),
    (older_moves, "live.json is older than the versions: version 2 was live"),
    (take_store_file, "versions/1/manifest.json belongs to another store"),
    (take_number, "is the manifest of version 1"),
    (delete_version, "There is no version 2"),
    (delete_versions, "versions cannot be read"),
    (swap_commits, "is damaged: _delta_log/"),
    (forget_checksums, "has no checksum of 00000000000000000000.json"),
]


@pytest.mark.parametrize(("spoil", "sentence"), PARTS)
def test_a_part_of_another_store_or_day_is_named(
    spoil: Callable[[Path], None], sentence: str, folder: Path, other: Path
) -> None:
    spoil(folder)
    assert any(sentence in found for found in wrong(folder / "s"))
    assert run("doctor", folder) == 7


def test_promoting_replaces_the_moves_of_another_store(folder: Path, other: Path) -> None:
    take_moves(folder)
    assert run("promote", folder, "1") == 0
    assert wrong(folder / "s") == [] and open_store(folder / "s").live == 1


@pytest.mark.parametrize("name", ["12 (copy)", "notes.txt", "3.bak", "007", "0", "٣", "9" * 30, "-1", "1_0"])
def test_a_folder_that_is_no_version_is_ignored_and_named(name: str, folder: Path) -> None:
    (folder / "s" / "versions" / name).mkdir()
    store = open_store(folder / "s")
    assert store.version_numbers() == [1, 2] and store.next_number == 3
    assert wrong(folder / "s") == [] and f"versions/{name} is not part of the store" in remarks(folder / "s")


def test_links_in_a_store_from_elsewhere_delete_nothing_outside(folder: Path) -> None:
    private = folder / "private"
    (private / "3").mkdir(parents=True)
    for name in (".profile", "letter", "3/letter"):
        (private / name).write_text("private")
    versions = folder / "s" / "versions"
    (versions / "3").symlink_to(private)  # erasing deletes the files of versions that cannot be read
    (versions / "1" / "photos").symlink_to(private)  # unlisted files are deleted
    assert run("erase", folder, "user-1") == 0 and run("gc", folder, "--keep", "1") == 0
    assert open_store(folder / "s").version_numbers() == [1, 2]
    assert "versions/3 is not part of the store" in remarks(folder / "s")
    shutil.move(versions, folder / "moved versions")
    versions.symlink_to(private)  # hidden files in it are deleted, as those of killed processes
    (private / ".4").mkdir()
    run("gc", folder)
    assert sorted(path.name for path in private.rglob("*")) == [".profile", "3", "letter", "letter"]


def test_a_file_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(version_files, "file_checksum", refuse)
    assert "cannot be read: Permission denied" in wrong(folder / "s")[0]


def journal_of(folder: Path, clicks: list[Click] = CLICKS) -> Path:
    """Write clicks as a server does, and return the file."""
    journal = ClickJournal(folder)
    journal.append(clicks)
    journal.close()
    return click_journal.journal_paths(folder)[-1]


def test_a_line_without_its_end_was_never_acknowledged_and_every_other_damage_is_an_error(folder: Path) -> None:
    path = journal_of(folder / "s")
    whole = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == 10]
    for cut in (ends[1] + 1, ends[2] - 1):  # in the third line
        path.write_bytes(whole[:cut])
        assert read_journal(folder / "s")[0].clicks == CLICKS[:2]
        assert "ends with an incomplete line" in remarks(folder / "s") and wrong(folder / "s") == []
    for place in (ends[1] + 3, ends[1] + 12, ends[2] - 2):  # checksum, text, end of the text of the third line
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(StateError, match=r"Line 3 of .* is damaged\. Restore the file from a backup, or move"):
            read_journal(folder / "s")
        assert any("Line 3 of" in sentence for sentence in wrong(folder / "s"))
        assert run("update", folder, *ANY) == 7 and path.exists()
        with pytest.raises(StateError, match="Line 3 of"), server(folder):
            pass
    path.write_bytes(whole + b"\n")
    with pytest.raises(StateError, match="Line 4 of"):
        read_journal(folder / "s")


@pytest.mark.parametrize("content", ['{"a": 1}', "7", "null", "[]", '["u"]', '[["u"], "i", 1]', '["u", "i", "1"]'])
def test_a_line_with_a_right_checksum_that_is_no_click_is_an_error(content: str, folder: Path) -> None:
    path = journal_of(folder / "s")
    path.write_bytes(path.read_bytes() + click_journal._encode_line(json.loads(content)))
    with pytest.raises(StateError, match="Line 4 of .* is not a click"):
        read_journal(folder / "s")


def test_a_closed_file_that_was_shortened_is_an_error(folder: Path) -> None:
    journal_of(folder / "s")
    [file] = close_journal(folder / "s")
    assert file.clicks == CLICKS
    whole = file.path.read_bytes()
    for cut in range(len(whole)):
        file.path.write_bytes(whole[:cut])
        with pytest.raises(StateError):
            read_journal(folder / "s")
    file.path.write_bytes(whole)
    mark_taken([file], 2)  # renamed, with the same content
    assert [one.clicks for one in read_journal(folder / "s")] == [CLICKS]


def test_a_file_that_was_closed_twice_or_rewritten_is_complete(folder: Path) -> None:
    path = journal_of(folder / "s")
    with path.open("ab") as file:  # killed between the last line and the new name, after half a click
        file.write(click_journal._encode_line({"clicks": 3}) + click_journal._encode_line(CLICKS[0]) + b"12")
    [file] = close_journal(folder / "s")
    assert file.clicks == [*CLICKS, CLICKS[0]]
    assert click_journal.erase_user_clicks(folder / "s", "user-1") == 2
    assert [one.clicks for one in read_journal(folder / "s")] == [CLICKS[1:]]


def test_clicks_of_another_store_are_named_and_not_learned(folder: Path, other: Path) -> None:
    path = journal_of(other)
    shutil.copytree(path.parent, folder / "s" / "clicks")
    with pytest.raises(StateError, match="holds clicks of another store"):
        read_journal(folder / "s")
    assert any("holds clicks of another store" in sentence for sentence in wrong(folder / "s"))
    assert run("update", folder, *ANY) == 7 and open_store(folder / "s").live == 2


def test_clicks_of_a_batch_that_the_log_lacks_are_named(folder: Path) -> None:
    path = journal_of(folder / "s")
    mark_taken(close_journal(folder / "s"), 9)
    assert wrong(folder / "s") == [
        f"clicks/{path.stem}.taken-9 holds clicks of batch 9, which the event log lacks. Restore the log."
    ]


@pytest.mark.parametrize("name", ["notes.txt", "12 (copy)", "1-2 (copy).closed", "1-2.taken-", "x-1.open", ".git"])
def test_other_files_among_the_clicks_are_ignored_and_stay(name: str, folder: Path) -> None:
    journal_of(folder / "s")
    (folder / "s" / "clicks" / name).mkdir()
    assert [file.clicks for file in close_journal(folder / "s")] == [CLICKS]
    assert wrong(folder / "s") == [] and (folder / "s" / "clicks" / name).exists()
    assert (f"clicks/{name} is not part of the store" in remarks(folder / "s")) == (name != ".git")


def test_clicks_of_a_store_without_an_id_are_read_as_before(folder: Path) -> None:
    without_new_fields(folder / "s")
    path = journal_of(folder / "s")
    assert path.name.count("-") == 1
    [file] = close_journal(folder / "s")
    assert file.clicks == CLICKS and file.path.read_bytes().count(b"\n") == 3 and wrong(folder / "s") == []


def test_a_version_that_waits_for_its_promotion_is_not_wrong(folder: Path) -> None:
    # killed between writing version 2 and making it live: then live.json is that of the day before
    shutil.copy(folder / "earlier" / "s" / "live.json", folder / "s")
    store = Store(folder / "s")
    assert store.live == 1 and wrong(folder / "s") == []
