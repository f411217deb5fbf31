"""A store that is copied between machines may be signed: changes by somebody without the key are found."""

from __future__ import annotations

import hashlib
import hmac
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from serving import ANY, run, server, stored

from freshrec.cli.app import main
from freshrec.cli.options import SIGN_KEY_VARIABLE
from freshrec.cli.server import erase_in_subprocess
from freshrec.errors import OptionError, SignatureError, StateError
from freshrec.nightly.doctor import check_store
from freshrec.recommender.recommender import Recommender
from freshrec.store.checksummed_json import read_checksummed, read_signed, write_checksummed
from freshrec.store.event_log import log_of
from freshrec.store.log_files import verify_files
from freshrec.store.sign_store import sign_store, signed_files
from freshrec.store.signing import SigningKey, read_key
from freshrec.store.versions import create_store, open_store

SECRET, OTHER_SECRET = b"0123456789abcdef" * 4, b"fedcba9876543210" * 4


def write_key(path: Path, secret: bytes = SECRET, mode: int = 0o600) -> Path:
    path.write_bytes(secret + b"\n")
    path.chmod(mode)
    return path


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return write_key(tmp_path / "key")


@pytest.fixture
def other_key(tmp_path: Path) -> Path:
    return write_key(tmp_path / "other key", OTHER_SECRET)


@pytest.fixture
def folder(tmp_path: Path, key: Path) -> Path:
    """A signed store with two versions in `s`."""
    stored(tmp_path, n=2)
    assert run("sign", tmp_path, *with_key(key)) == 0
    return tmp_path


def with_key(key: Path) -> list[str]:
    return ["--sign-key-file", str(key)]


def signers(folder: Path) -> set[str]:
    """Return the ids of the keys that signed the files of a store; "" for a file without a signature."""
    return {read_signed(path)[1] for path in signed_files(open_store(folder))}


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    """Change the document in a file and correct its checksum, as somebody without the key can."""
    document = json.loads(path.read_text())
    change(document)
    text = json.dumps(document["content"], sort_keys=True)
    document["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(document))


def test_the_signature_is_the_hmac_of_the_name_and_the_content(tmp_path: Path, key: Path) -> None:
    write_checksummed({"b": 1, "a": [2]}, tmp_path / "x.json", read_key(key, tmp_path / "s"))
    document = json.loads((tmp_path / "x.json").read_text())
    # as docs/security.md describes it: format, name, and the content with sorted keys
    expected = hmac.new(SECRET, b'freshrec 1\nx.json\n{"a": [2], "b": 1}', "sha256").hexdigest()
    key_id = hmac.new(SECRET, b"freshrec key id", "sha256").hexdigest()[:16]
    assert document["signature"] == {"key": key_id, "hmac": expected}
    assert SECRET.decode() not in repr(read_key(key, tmp_path / "s"))


def test_every_command_signs_what_it_writes(tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored(tmp_path)
    shutil.rmtree(tmp_path / "s")
    days = [str(tmp_path / f"day-{n}.parquet") for n in range(3)]
    commands = [
        ("fit", days[0], "--model", "popularity"),
        ("update", days[1], *ANY),
        ("update", days[2], *ANY),
        ("rollback", "2"),
        ("promote", "3"),
        ("gc", "--keep", "1"),
        ("erase", "user-1"),
        ("recommend", "user-2"),
        ("similar", "item-2", "--version", "2"),
        ("inspect", "user", "user-2"),
        ("status",),
        ("history",),
        ("diff", "2", "3"),
        ("doctor",),
    ]
    for command, *words in commands:
        code = run(command, tmp_path, *words, *with_key(key))
        assert code == (5 if command == "similar" else 0), (command, capsys.readouterr().err)
        assert signers(tmp_path / "s") == {read_key(key, tmp_path / "s").id}, command
    assert "signatures of 6 files are valid" in capsys.readouterr().out


def test_the_key_may_be_named_by_the_environment(
    folder: Path, key: Path, other_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SIGN_KEY_VARIABLE, str(other_key))
    assert run("status", folder) == 7
    assert run("status", folder, *with_key(key)) == 0  # the option has precedence
    monkeypatch.setenv(SIGN_KEY_VARIABLE, str(key))
    assert run("rollback", folder, "1") == 0 and "" not in signers(folder / "s")


def change_number(document: dict) -> None:
    document["content"]["numbers"]["events"] = 1.0


def drop_signature(document: dict) -> None:
    del document["signature"]


def change_hmac(document: dict) -> None:
    document["signature"]["hmac"] = "0" * 64


def change_key(document: dict) -> None:
    document["signature"]["key"] = "0" * 16


def break_signature(document: dict) -> None:
    document["signature"] = ["é"]


def break_hmac(document: dict) -> None:
    document["signature"]["hmac"] = "é"


CHANGES = [
    (change_number, "was changed by somebody without the key"),
    (change_hmac, "was changed by somebody without the key"),
    (break_hmac, "was changed by somebody without the key"),
    (drop_signature, "is not signed"),
    (break_signature, "is not signed"),
    (change_key, "is signed with the key 0000000000000000, not"),
]


@pytest.mark.parametrize(("change", "sentence"), CHANGES)
def test_a_changed_manifest_is_refused_with_the_key_and_accepted_without(
    change: Callable[[dict], object], sentence: str, folder: Path, key: Path
) -> None:
    rewrite(folder / "s" / "versions" / "2" / "manifest.json", change)
    assert run("status", folder) == 0  # nobody can find it without the key
    store = open_store(folder / "s", key)
    with pytest.raises(SignatureError, match=sentence):
        store.verified_files(2)
    assert any(not ok and sentence in found for ok, found in check_store(store))
    for command, *words in (("status",), ("recommend", "user-1"), ("update",), ("rollback", "2"), ("erase", "user-1")):
        assert run(command, folder, *words, *with_key(key)) == 7, command
    with pytest.raises(SignatureError, match=sentence):
        Recommender.load(folder / "s", sign_key_file=key)


@pytest.mark.parametrize("name", ["store.json", "live.json", "log/checksums.json", "versions/1/manifest.json"])
@pytest.mark.parametrize("change", [drop_signature, change_hmac])
def test_every_signed_file_needs_its_signature(
    name: str, change: Callable[[dict], object], folder: Path, key: Path
) -> None:
    rewrite(folder / "s" / name, change)
    assert run("doctor", folder, *with_key(key)) == 7
    assert run("update", folder, str(folder / "day-2.parquet"), *ANY, *with_key(key)) == 7
    assert run("promote", folder, "1", *with_key(key)) == 7 or name == "log/checksums.json"


def test_a_signature_is_valid_only_in_its_place(folder: Path, key: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "s" / "versions" / "1" / "manifest.json", folder / "s" / "versions" / "2")
    with pytest.raises(StateError, match="is the manifest of version 1"):
        open_store(folder / "s", key).verified_files(2)
    shutil.copy(folder / "s" / "versions" / "2" / "manifest.json", folder / "s" / "live.json")
    with pytest.raises(SignatureError):
        open_store(folder / "s", key).moves()
    # another store with the same key: the content of signed files holds the id of the store
    stored(tmp_path / "b", "popularity", n=2)
    sign_store(tmp_path / "b" / "s", key)
    for name in ("versions/2/manifest.json", "live.json"):
        shutil.copy(tmp_path / "b" / "s" / name, folder / "s" / name)
    store = open_store(folder / "s", key)
    for read in (store.moves, lambda: store.manifest(2)):
        with pytest.raises(StateError, match="belongs to another store"):
            read()


def test_a_changed_log_is_refused_although_its_checksums_fit(folder: Path, key: Path) -> None:
    path = next((folder / "s" / "log").glob("batch=2/*.parquet"))
    pl.read_parquet(path).with_columns(item_id=pl.lit("item-1")).write_parquet(path)
    name, checksum = str(path.relative_to(folder / "s" / "log")), hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite(folder / "s" / "log" / "checksums.json", lambda document: document["content"].update({name: checksum}))
    verify_files(folder / "s" / "log", [name])  # without the key, nothing is wrong
    with pytest.raises(SignatureError, match=r"checksums\.json was changed by somebody without the key"):
        log_of(open_store(folder / "s", key)).read()


def test_a_batch_that_was_added_without_the_key_is_refused(folder: Path, key: Path) -> None:
    checksums = (folder / "s" / "log" / "checksums.json").read_bytes()
    log = log_of(open_store(folder / "s"))
    row = {"user_id": ["user-1"], "item_id": ["item-1"], "time": [10**16]}
    log.append(pl.DataFrame(row), "an attack", True)
    (folder / "s" / "log" / "checksums.json").write_bytes(checksums)
    for words in (("update",), ("sign",)):
        assert run(words[0], folder, *with_key(key)) == 7
    with pytest.raises(SignatureError, match=r"0002\.json is not signed"):
        log_of(open_store(folder / "s", key)).batches()


def test_without_a_key_a_signed_store_works_and_doctor_says_that_nothing_was_verified(
    folder: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("doctor", folder) == 0
    assert "the store is signed (key " in (printed := capsys.readouterr().out.replace("\n       ", " "))
    assert "which was not verified. Pass --sign-key-file" in printed
    assert run("update", folder, str(folder / "day-2.parquet"), *ANY) == 0
    assert run("doctor", folder) == 7
    assert "versions/3/manifest.json is not signed, but other files are" in capsys.readouterr().out.replace(
        "\n       ", " "
    )
    # with the key, the version is refused, until the owner of the key has checked and signed it
    assert run("status", folder, *with_key(key)) == 7
    assert run("sign", folder, *with_key(key)) == 7
    assert "Pass --old-sign-key-file, or --unverified" in capsys.readouterr().err
    assert run("sign", folder, *with_key(key), "--unverified") == 0
    assert run("doctor", folder, *with_key(key)) == 0


def test_a_store_without_signatures_is_refused_with_a_key_until_it_is_signed(tmp_path: Path, key: Path) -> None:
    stored(tmp_path)
    assert run("status", tmp_path, *with_key(key)) == 7
    assert signers(tmp_path / "s") == {""}
    assert run("sign", tmp_path, *with_key(key)) == 0
    assert run("update", tmp_path, str(tmp_path / "day-1.parquet"), *ANY, *with_key(key)) == 0


def test_a_store_of_an_earlier_version_gets_an_id_when_it_is_signed(tmp_path: Path, key: Path) -> None:
    stored(tmp_path)
    content = read_checksummed(tmp_path / "s" / "store.json")
    write_checksummed({"format": 1, "made_at": content["made_at"]}, tmp_path / "s" / "store.json")
    path = tmp_path / "s" / "versions" / "1" / "manifest.json"
    old = {name: value for name, value in read_checksummed(path).items() if name not in ("store", "log")}
    write_checksummed(old, path)
    write_checksummed([{"at": "", "action": "fit", "to": 1, "reason": ""}], tmp_path / "s" / "live.json")
    sign_store(tmp_path / "s", key)
    store = open_store(tmp_path / "s", key)
    assert store.manifest(1).store == store.moves()[0].store != ""


def test_another_key_signs_only_after_the_former_one_was_verified(folder: Path, key: Path, other_key: Path) -> None:
    assert run("sign", folder, *with_key(other_key)) == 7
    change = ["--old-sign-key-file", str(key)]
    assert run("sign", folder, *with_key(other_key), *change) == 0
    assert signers(folder / "s") == {SigningKey(OTHER_SECRET).id}
    assert run("status", folder, *with_key(key)) == 7 and run("status", folder, *with_key(other_key)) == 0
    # an interrupted change, which left some files with the old signature, is completed by the same command
    path = folder / "s" / "versions" / "1" / "manifest.json"
    write_checksummed(read_checksummed(path), path, SigningKey(SECRET))
    assert run("sign", folder, *with_key(other_key), *change) == 0
    rewrite(path, change_number)
    assert run("sign", folder, *with_key(other_key), *change) == 7


KEYS = [
    (b"short", 0o600, "has 5 bytes. It needs 32 to 4096"),
    (b" " * 40, 0o600, "has 0 bytes"),
    (b"a" * 64, 0o600, "repeats few characters"),
    (b"0123456789abcdef" * 257, 0o600, "It needs 32 to 4096"),
    (SECRET, 0o644, "Other users can read or change the key file"),
    (SECRET, 0o604, "Other users can read or change the key file"),
    (SECRET, 0o620, "Other users can read or change the key file"),
]


@pytest.mark.parametrize(("secret", "mode", "sentence"), KEYS)
def test_a_weak_or_open_key_file_is_refused(secret: bytes, mode: int, sentence: str, tmp_path: Path) -> None:
    path = write_key(tmp_path / "key", secret, mode)
    with pytest.raises(OptionError, match=sentence):
        read_key(path, tmp_path / "s")
    assert main(["status", "--store", str(tmp_path / "s"), *with_key(path)]) in (2, 7)


def test_a_key_file_that_is_missing_or_inside_the_store_is_refused(folder: Path) -> None:
    inside = write_key(folder / "s" / "key")
    for path, sentence in (
        (inside, "is inside the store"),
        (folder, "cannot be read"),
        (folder / "no", "cannot be read"),
    ):
        with pytest.raises(OptionError, match=sentence):
            open_store(folder / "s", path)
        assert run("status", folder, *with_key(path)) == 2
    with pytest.raises(OptionError), create_store(folder / "new", folder / "no"):
        pass
    assert not (folder / "new").exists()
    assert read_key(write_key(folder / "shared", SECRET, 0o640), folder / "s")  # a group may read it


def test_the_server_serves_only_signed_versions_and_signs_its_rollback(folder: Path, key: Path) -> None:
    with server(folder, sign_key_file=key) as (_, live):
        assert live.version is not None and live.version.number == 2
        assert run("rollback", folder, "1", *with_key(key)) == 0
        live.refresh()
        assert live.version.number == 1
        assert run("promote", folder, "2") == 0  # without the key
        live.refresh()
        assert live.version.number == 1 and "live.json is not signed" in live.problem


def test_the_server_passes_its_key_to_the_process_that_erases(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = list[list[str]]()

    def note(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "{}", "")

    monkeypatch.setattr(subprocess, "run", note)
    erase_in_subprocess(Path("s"), "user-1", sign_key_file=key)
    erase_in_subprocess(Path("s"), "user-1")
    words = ["--stdin", "--store", "s", "--wait", "1m", "--json"]
    assert [command[4:] for command in commands] == [
        ["erase", "--sign-key-file", str(key), *words],
        ["erase", *words],
    ]


def test_a_recommender_saves_and_loads_a_signed_store(tmp_path: Path, key: Path, other_key: Path) -> None:
    frame = pl.DataFrame(
        {"user_id": [1, 1, 2], "item_id": [1, 2, 1], "timestamp": [1_750_000_000 + n for n in range(3)]}
    )
    recommender = Recommender("popularity").fit(frame)
    for _ in range(2):
        recommender.save(tmp_path / "s", sign_key_file=key)
    assert signers(tmp_path / "s") == {read_key(key, tmp_path / "s").id}
    assert len(Recommender.load(tmp_path / "s", sign_key_file=key).recommend([2])) > 0
    assert len(Recommender.load(tmp_path / "s").recommend([2])) > 0
    for wrong in (
        lambda: Recommender.load(tmp_path / "s", other_key),
        lambda: recommender.save(tmp_path / "s", other_key),
    ):
        with pytest.raises(SignatureError, match="is signed with the key"):
            wrong()
