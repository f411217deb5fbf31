"""The event log: what a delivery adds, the order of events, and erasing a user without a trace."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import crashing
import polars as pl
import pytest
from deltalake import DeltaTable
from hypothesis import given, settings
from hypothesis import strategies as st

from freshrec.errors import LogError, OptionError, StateError
from freshrec.store.event_log import AppendResult, EventLog

Event = tuple[object, ...]
WHO = 7_340_033_557  # an id that is not equal to a size, time or checksum by chance


def frame(*events: Event, extra: str = "event_id") -> pl.DataFrame:
    names = ["user_id", "item_id", "time", extra][: len(events[0])]
    return pl.DataFrame(events, dict.fromkeys(names), orient="row", infer_schema_length=None)


def log_of(folder: Path, *deliveries: pl.DataFrame) -> EventLog:
    """A log with the deliveries s1, s2, ..."""
    log = EventLog(folder)
    for n, delivery in enumerate(deliveries, 1):
        log.append(delivery, f"s{n}", True)
    return log


def n_rows(log: EventLog) -> int:
    return int(log.batches()["rows"].sum())


def test_duplicates_known_rows_and_late_rows_are_counted(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "log")
    first = log.append(frame(("a", "x", 30), ("b", "x", 10), ("a", "x", 30)), "s1", True)
    assert first == AppendResult(1, None, n_rows=3, n_duplicates=1, n_appended=2, first_time=10, last_time=30)
    # (b, x, 10) is known. (a, x, 20) is older than 30, so it is late; (a, y, 30) is not. (a, x, 40) is a duplicate.
    second = frame(("b", "x", 10), ("a", "x", 40), ("a", "y", 30), ("a", "x", 20), ("a", "x", 40))
    assert log.append(second, "s2", True) == AppendResult(
        2, None, 5, n_duplicates=1, n_known=1, n_late=1, n_appended=3, first_time=20, last_time=40
    )
    assert (n_rows(log), log.newest_time, log.has_clock) == (5, 40, True)
    assert (log.delivery_counts(1), log.delivery_counts(2)) == (
        ("s1", 1, 0),
        ("s2", 1, 1),
    )  # the same numbers can be read again after a crash
    assert log.batches().rows() == [(1, "s1", 2, 10, 30), (2, "s2", 3, 20, 40)]


def test_an_empty_known_or_repeated_delivery_appends_nothing(tmp_path: Path) -> None:
    day = frame(("a", "x", 1), ("a", "y", 2), ("a", "x", 1))
    log = log_of(tmp_path, day)
    assert log.append(day.clear(), "s2", True) == AppendResult(None, None, 0)
    assert log.append(day, "s3", True) == AppendResult(
        None, None, 3, n_duplicates=1, n_known=2
    )  # another file with the same rows
    assert log.append(day, "s1", True) == AppendResult(None, 1, 3, n_duplicates=1, n_known=2)
    assert (len(log.batches()), log.delivery_counts(1)[0]) == (1, "s1")


def test_events_with_the_same_event_id_are_the_same_event(tmp_path: Path) -> None:
    log = log_of(tmp_path, frame(("a", "x", 1), ("a", "y", 2)), frame(("a", "x", 3, 7), ("b", "x", 3, None)))
    # 7 is known although everything else differs; 8 is new although everything else is as in event 7; 8 again is a
    # duplicate; b's is known
    third = frame(("c", "z", 9, 7), ("a", "x", 3, 8), ("a", "x", 4, 8), ("b", "x", 3, None), ("c", "z", 8, None))
    assert log.append(third, "s3", True) == AppendResult(
        3, None, 5, n_duplicates=1, n_known=2, n_appended=2, first_time=3, last_time=8, n_reused_ids=2
    )
    assert log.read([3]).rows() == [("a", "x", 3, 8), ("c", "z", 8, None)]


def test_without_timestamps_only_sources_and_event_ids_are_recognized(tmp_path: Path) -> None:
    day = frame(("a", "x", 0), ("a", "x", 1))
    log = EventLog(tmp_path)
    assert log.append(day, "s1", False) == AppendResult(1, None, 2, n_appended=2, first_time=0, last_time=1)
    assert log.append(day, "s1", False) == AppendResult(None, 1, 2, n_known=2)
    assert log.append(day, "s2", False) == AppendResult(2, None, 2, n_appended=2, first_time=0, last_time=1)
    assert log.append(frame(("a", "x", 0, 5)), "s3", False).n_appended == 1
    assert log.append(frame(("a", "x", 0, 5), ("a", "x", 1, None)), "s4", False).n_known == 1
    with pytest.raises(LogError, match="delivery has timestamps, but the event log in .* has none"):
        log.append(day, "s5", True)


def test_columns_may_appear_and_disappear_and_missing_values_are_null(tmp_path: Path) -> None:
    nulls = frame(("b", "y", 2, 0.5), extra="weight").with_columns(category=pl.lit(None, pl.String))
    log = log_of(tmp_path, frame(("a", "x", 1)), nulls, frame(("c", "z", 3, "buy"), extra="event"))
    everything = log.read()
    assert everything.columns == ["user_id", "item_id", "time", "event", "weight"]
    assert everything.rows() == [("a", "x", 1, None, None), ("b", "y", 2, None, 0.5), ("c", "z", 3, "buy", None)]
    assert log.read([2, 1]).columns == ["user_id", "item_id", "time", "weight"]
    assert (log.read([1]).rows(), log.delivery_counts(1)[0]) == ([("a", "x", 1)], "s1")


def test_rows_are_ordered_by_batch_then_time_then_place_in_the_delivery(tmp_path: Path) -> None:
    log = log_of(tmp_path, frame(("a", "z", 5), ("a", "y", 4), ("a", "x", 5)), frame(("a", "w", 1), ("b", "v", 1)))
    assert log.read()["item_id"].to_list() == ["y", "z", "x", "w", "v"]
    assert log.erase_user("b") == 1  # the order stays when files are rewritten
    assert log.read()["item_id"].to_list() == ["y", "z", "x", "w"]


@pytest.mark.parametrize(
    ("delivery", "sentence"),
    [
        (frame(("b", "x", 2, "e"), extra="category"), 'category "e" is not an integer, but all ids of this log are'),
        (frame(("b", "x", 2, 1), extra="colour"), "no column colour of type Int64"),
        (frame(("b", "x", 2.5)), "no column time of type Float64"),
        (frame(("b", None, 2), ("b", "x", 2)), "rows without user_id, item_id or time"),
    ],
)
def test_a_delivery_with_other_types_is_an_error(tmp_path: Path, delivery: pl.DataFrame, sentence: str) -> None:
    log = log_of(tmp_path, frame(("a", "x", 1, 3), extra="category"))
    with pytest.raises(LogError, match=sentence):
        log.append(delivery, "s2", True)
    assert n_rows(log) == 1


def test_ids_are_converted_to_the_types_of_the_log_if_that_is_exact(tmp_path: Path) -> None:
    log = log_of(tmp_path, frame(("a", 1, 1, 3), extra="category"))
    log.append(frame((7, "2", 2, "4"), (8, "-5", 3, None), extra="category"), "numbers", has_clock=True)
    assert log.read().rows() == [("a", 1, 1, 3), ("7", 2, 2, 4), ("8", -5, 3, None)]
    with pytest.raises(LogError, match='item_id "007" is not an integer, .* Did you mean 7'):
        log.append(frame((7, "007", 2)), "zeros", has_clock=True)


# Half of the events have an event_id. Events share users, items and times.
POOL = [(f"u{n % 3}", n // 3, 100 + n % 4, n if n % 2 else None) for n in range(12)]


def events_of(rows: pl.DataFrame) -> list[Event]:
    found = [(row["user_id"], row["item_id"], row["time"], row.get("event_id")) for row in rows.iter_rows(named=True)]
    return sorted(found, key=repr)


@settings(max_examples=15)
@given(st.lists(st.lists(st.sampled_from(POOL), max_size=8), max_size=5))
def test_the_log_holds_each_event_once_for_random_deliveries(
    tmp_path_factory: pytest.TempPathFactory, deliveries: list[list[Event]]
) -> None:
    log = EventLog(tmp_path_factory.mktemp("log"))
    schema = {"user_id": pl.String, "item_id": pl.Int64, "time": pl.Int64, "event_id": pl.Int64}
    seen: set[Event] = set()
    for n, events in enumerate(deliveries):
        result = log.append(pl.DataFrame(events, schema, orient="row"), f"s{n}", True)
        new = set(events) - seen
        assert (result.n_rows, result.n_duplicates, result.n_appended) == (
            len(events),
            len(events) - len(set(events)),
            len(new),
        )
        assert result.n_known == len(set(events) & seen)
        assert result.batch is None or events_of(log.read([result.batch])) == sorted(new, key=repr)
        seen |= new
    assert not seen or events_of(log.read()) == sorted(seen, key=repr)


def holds(folder: Path, user_id: int | str) -> list[str]:
    """The files below the folder that hold an id of a user: as a value, in statistics, or as text."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        values = pl.read_parquet(path).write_ndjson() if ".parquet" in path.name else ""
        raw = [str(user_id).encode(), *([user_id.to_bytes(8, "little")] if isinstance(user_id, int) else [])]
        if str(user_id) in values or any(encoded in path.read_bytes() for encoded in raw):
            found.append(path.name)
    return found


@pytest.mark.parametrize("who", [WHO, "it's {a} 'user'"])
def test_no_file_holds_the_id_of_an_erased_user(tmp_path: Path, who: int | str) -> None:
    other = 5 if isinstance(who, int) else "b"
    days = [frame((who, 1, 10), (other, 2, 11)), frame((other, 3, 20)), frame((who, 4, 30)), frame((other, 5, 40))]
    log = log_of(tmp_path, *days)
    DeltaTable(tmp_path).create_checkpoint()  # every hundredth commit does this
    begun = tmp_path / "batch=5" / "part-0.zstd.parquet#1"  # left by a process that is killed while it writes
    begun.parent.mkdir()
    shutil.copy(next(tmp_path.glob("batch=1/*")), begun)
    assert len(holds(tmp_path, who)) == 3
    before = log.read().filter(pl.col("user_id") != who)
    assert log.erase_user(who) == 2
    assert holds(tmp_path, who) == []
    assert log.read().equals(before)
    assert log.batches()["rows"].to_list() == [1, 1, 0, 1]
    assert (len(log.read([3])), log.delivery_counts(3)[0], log.newest_time) == (0, "s3", 40)
    assert log.append(days[2], "s3", True).repeated_batch == 3  # the user does not come back with the same file
    assert log.erase_user(who) == 0


def test_batch_numbers_continue_when_all_rows_are_erased(tmp_path: Path) -> None:
    log = log_of(tmp_path, frame(("a", "x", 1)), frame(("a", "x", 2)))
    assert log.erase_user("a") == 2
    assert (n_rows(log), log.newest_time, len(log.read())) == (0, None, 0)
    assert log.append(frame(("b", "x", 1, 0.5), extra="weight"), "s3", True) == AppendResult(
        3, None, 1, n_appended=1, first_time=1, last_time=1
    )
    assert log.read([1, 2, 3]).rows() == [("b", "x", 1, 0.5)]


def test_reading_what_does_not_exist_is_an_error(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "log")
    assert (n_rows(log), log.newest_time, log.erase_user("a"), log.batches().columns[:2]) == (
        0,
        None,
        0,
        ["batch", "source"],
    )
    with pytest.raises(LogError, match=r"is empty\. Append a delivery"):
        log.read()
    log.append(frame((1, "x", 1)), "s1", True)
    with pytest.raises(OptionError, match=r"has no batch 2\. The last one is 1"):
        log.read([1, 2])
    with pytest.raises(OptionError, match="are whole numbers, but 'a' is not"):
        log.erase_user("a")


def write(folder: Path, told: Connection) -> None:
    """Append batches of 50 rows. All rows of a batch belong to a user whose id is the number of the batch."""
    log = EventLog(folder)
    for n in range(len(log.batches()), 10_000):
        log.append(frame(*((n, item, n + item) for item in range(50))), f"s{n}", True)
        told.send(n)


def test_a_killed_process_leaves_complete_batches(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(crashing.PRELOADED)
    for seed in range(4):
        told, tells = processes.Pipe(duplex=False)
        writer = processes.Process(target=write, args=(tmp_path, tells))
        writer.start()
        done = max(told.recv() for _ in range(3)) + 1
        writer.join(random.Random(seed).random() / 20)  # killed at a random time during its next batches
        writer.kill()
        writer.join()
        while told.poll():
            done = told.recv() + 1
        rows = EventLog(tmp_path).batches()["rows"].to_list()
        assert rows in ([50] * done, [50] * (done + 1))  # the last batch may be complete although it was not reported
        assert EventLog(tmp_path).read()["user_id"].to_list() == [n for n in range(len(rows)) for _ in range(50)]


def test_a_changed_file_is_detected(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    log = log_of(whole, frame(("a", "x", 1), ("b", "x", 1)), frame(("a", "x", 2, "e")), frame(("a", "x", 3)))
    log.erase_user("b")
    expected, batches = log.read(), log.batches()
    for path in sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file()):
        good = (whole / path).read_bytes()
        places = random.Random(str(path)).sample(range(len(good)), 6)
        bad = [good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :] for at in places]
        for content in [*bad, b"", good[: len(good) // 2], good[:-1]]:
            (whole / path).write_bytes(content)
            with pytest.raises(StateError, match=r"\. (Restore|Check that)"):
                log.read()
            with pytest.raises(StateError):
                log.append(frame(("c", "x", 1), ("c", "y", 3)), "s9", True)
        (whole / path).unlink()
        with pytest.raises(StateError):
            log.read()
        (whole / path).write_bytes(good)
    assert log.read().equals(expected) and log.batches().equals(batches)


def test_a_commit_without_checksums_is_read_unchecked_until_the_next_commit(tmp_path: Path) -> None:
    log = log_of(tmp_path, frame(("a", "x", 1)))
    before = (tmp_path / "checksums.json").read_bytes()
    log.append(frame(("a", "x", 2)), "s2", True)
    (tmp_path / "checksums.json").write_bytes(before)  # as if a process were killed right after its commit
    assert len(log.read()) == 2
    log.append(frame(("a", "x", 3)), "s3", True)
    os.truncate(next(tmp_path.glob("batch=2/*")), 10)
    with pytest.raises(StateError, match="is damaged: batch=2"):
        log.read()


def test_a_folder_of_another_program_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(StateError, match=r"holds photos and no event log\. Choose another folder"):
        log_of(tmp_path, frame(("a", "x", 1)))
    frame(("a", "x", 1)).write_delta(tmp_path / "table")
    with pytest.raises(StateError, match="has a Delta table but no checksums.json"):
        log_of(tmp_path / "table", frame(("a", "x", 1)))
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "log", tmp_path / "a%20log"):
        with pytest.raises(StateError, match="(cannot be written|the event log does not support)"):
            log_of(folder, frame(("a", "x", 1)))


def test_a_full_disk_does_not_change_the_log(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    log = log_of(tmp_path / "a log", frame(("a", "x", 1)))
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
        with pytest.raises(StateError, match=r"cannot be written .*\. Check free disk space"):
            log.append(frame(("a", "x", 2)), "s2", True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert log.append(frame(("a", "x", 2)), "s2", True).batch == 2


def test_a_second_writer_at_the_same_time_gets_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_of(tmp_path, frame(("a", "x", 1)))
    stale = DeltaTable(tmp_path)
    log.append(frame(("a", "x", 2)), "s2", True)
    monkeypatch.setattr("freshrec.store.event_log.DeltaTable", lambda folder: stale)
    with pytest.raises(StateError, match="Another process changed the event log"):
        log.append(frame(("a", "x", 3)), "s3", True)


def test_only_files_that_overlap_a_delivery_in_time_are_read(tmp_path: Path) -> None:
    log = log_of(tmp_path, frame(("a", "x", 1)), frame(("a", "x", 100)))
    os.truncate(next(tmp_path.glob("batch=1/*")), 10)  # reading it would be an error
    assert log.append(frame(("a", "x", 90), ("a", "x", 100)), "s3", True).n_known == 1
    with pytest.raises(StateError, match=r"damaged: batch=1/.* is missing or has changed"):
        log.append(frame(("a", "x", 1)), "s4", True)
