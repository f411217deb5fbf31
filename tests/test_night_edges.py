"""Nights at the edge: a file of which a part is learned, times in the future, floods of clicks, and lost versions."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import polars as pl
import pytest
from serving import run, stored

from freshrec.cli.app import main
from freshrec.errors import StateError
from freshrec.nightly.job import NightlyJob
from freshrec.store.click_journal import Click, ClickJournal
from freshrec.store.event_log import EventLog
from freshrec.store.manifest import Manifest
from freshrec.store.versions import Store, open_store, version_chain

DAY = 86_400 * 10**6  # microseconds


def learned_rows(folder: Path) -> pl.DataFrame:
    """Return the events of all batches that the live version has learned."""
    store = open_store(folder / "s")
    return EventLog(store.folder / "log").read([b for version in version_chain(store) for b in version.batches])


def live(folder: Path) -> Manifest:
    store = open_store(folder / "s")
    return store.manifest(store.live)


def write_periods(path: Path, extra: str = "") -> Path:
    """Write a log without timestamps: 4 periods of 300 rows, with many equal rows."""
    rows = [f"{n % 40},{n % 7 + 10},{period}" for period in range(4) for n in range(300)]
    path.write_text("user_id,item_id,period\n" + "\n".join(rows) + "\n" + extra)
    return path


def test_update_learns_only_the_rows_that_fit_until_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = str(write_periods(tmp_path / "log.csv"))
    assert run("fit", tmp_path, log, "--until", "3", "--model", "popularity") == 0
    assert live(tmp_path).sizes["events"] == 900  # periods 0, 1 and 2
    capsys.readouterr()
    assert run("update", tmp_path, log, "--dry-run") == 0
    assert "log.csv: 300 rows" in capsys.readouterr().out
    assert run("update", tmp_path, log, "--force", "--reason", "equal rows") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "log.csv: the first 900 rows were learned by `fit --until 3`; the others are read." in said
    assert "log.csv: 300 rows: 300 new" in said
    assert learned_rows(tmp_path)["period"].value_counts(sort=True)["count"].to_list() == [300] * 4
    assert run("update", tmp_path, log) == 0
    assert "this file was learned before" in capsys.readouterr().out
    assert len(learned_rows(tmp_path)) == 1200


def test_update_reads_nothing_if_fit_until_left_nothing_out(tmp_path: Path) -> None:
    log = str(write_periods(tmp_path / "log.csv"))
    assert run("fit", tmp_path, log, "--until", "9", "--model", "popularity") == 0
    assert run("update", tmp_path, log) == 0
    assert len(learned_rows(tmp_path)) == 1200


def future_day(folder: Path) -> str:
    """Write a day of events two years ahead."""
    day = pl.read_parquet(folder / "day-1.parquet")
    shift = time.time_ns() // 1000 + 730 * DAY - int(day["timestamp"].to_numpy().min())
    day.with_columns(pl.col("timestamp") + shift).write_parquet(folder / "future.parquet")
    return str(folder / "future.parquet")


@contextmanager
def future_allowed() -> Iterator[None]:
    """Let a store learn the future, as version 0.1.0 did."""
    with (
        patch("freshrec.data.log.latest_plausible_time", return_value=2**60),
        patch("freshrec.nightly.delivery_checks.latest_plausible_time", return_value=2**60),
    ):
        yield


def test_a_store_that_has_learned_the_future_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(tmp_path)
    force = ["--force", "--reason", "as version 0.1.0 did"]
    with future_allowed():
        assert run("update", tmp_path, future_day(tmp_path), *force) == 0
    assert live(tmp_path).id == 2
    day = str(tmp_path / "day-1.parquet")
    capsys.readouterr()
    assert run("update", tmp_path, day) == StateError.exit_code
    said = capsys.readouterr().err
    command = f'freshrec rollback 1 --reason "times in the future" --store {tmp_path / "s"}'
    assert "Version 2 has learned an event of 20" in said and f"Run `{command}`, then update again." in said
    assert main(["rollback", "1", "--reason", "times in the future", "--store", str(tmp_path / "s")]) == 0
    assert run("update", tmp_path, day) == 0
    assert live(tmp_path).promoted and len(learned_rows(tmp_path)) == 1800


def test_a_day_that_was_refused_because_of_the_future_is_learned_after_a_rollback(tmp_path: Path) -> None:
    stored(tmp_path)
    force = ["--force", "--reason", "as version 0.1.0 did"]
    with future_allowed():
        assert run("update", tmp_path, future_day(tmp_path), *force) == 0
        assert run("update", tmp_path, str(tmp_path / "day-1.parquet")) == 8  # all of its rows are late
    assert main(["rollback", "1", "--reason", "future", "--store", str(tmp_path / "s")]) == 0
    assert run("update", tmp_path, "--retry", "3") == 0
    assert live(tmp_path).promoted and len(learned_rows(tmp_path)) == 1800


def send(folder: Path, clicks: list[Click]) -> None:
    """Write clicks to the journal as a server does."""
    journal = ClickJournal(folder / "s")
    journal.append(clicks)
    journal.close()


def flood(kind: str, start: int) -> list[Click]:
    """Return clicks that look unusual together with a day of 300 rows, all within its first seconds."""
    times = [start + n * 1000 for n in range(900)]
    clicks = {
        "one user": [Click("user-1", f"item-{n % 40}", when, f"e{n}") for n, when in enumerate(times[:400])],
        "one item": [Click(f"user-{n % 100}", "item-1", when, f"e{n}") for n, when in enumerate(times)],
        "new users": [Click(f"bot-{n}", f"item-{n % 40}", when) for n, when in enumerate(times)],
        "late": [Click(f"user-{n % 100}", f"item-{n % 40}", when - 20 * DAY) for n, when in enumerate(times)],
    }
    return clicks[kind]


@pytest.mark.parametrize("kind", ["one user", "one item", "new users", "late"])
def test_a_flood_of_clicks_does_not_keep_out_the_rows_of_the_file(kind: str, tmp_path: Path) -> None:
    stored(tmp_path)
    day = pl.read_parquet(tmp_path / "day-1.parquet")
    start, of_user = int(day["timestamp"].to_numpy().min()), day.filter(pl.col("user_id") == "user-1")
    clicks = flood(kind, start)
    send(tmp_path, clicks)
    assert run("update", tmp_path, str(tmp_path / "day-1.parquet")) == 8  # of the clicks
    learned, versions = learned_rows(tmp_path), open_store(tmp_path / "s").manifests()
    assert len(learned) == 1800 and len(learned.filter(pl.col("user_id") == "user-1")) >= len(of_user)
    assert [version.promoted for version in versions] == [True, True, False]  # fit, file, clicks
    assert "These are clicks of servers." in versions[-1].notes[0]
    # clicks are judged by what was known before the file, so that they are late only if they are old
    late = [reason for reason in versions[-1].reasons if "are older than the newest known event" in reason]
    assert len(late) == (kind == "late")


def test_honest_clicks_are_learned_beside_a_flood(tmp_path: Path) -> None:
    stored(tmp_path)
    day = pl.read_parquet(tmp_path / "day-1.parquet")
    start = int(day["timestamp"].to_numpy().min())
    honest = [
        Click(user, item, when + 7)  # 7 us later, so that these are other events
        for user, item, when in day.select("user_id", "item_id", "timestamp").head(100).iter_rows()
        if user != "user-1"
    ]
    send(tmp_path, [*flood("one user", start), *honest])
    assert run("update", tmp_path, str(tmp_path / "day-1.parquet")) == 8
    assert len(learned_rows(tmp_path)) == 1800 + len(honest)


def test_ordinary_clicks_are_learned_with_the_file_in_one_version(tmp_path: Path) -> None:
    stored(tmp_path)
    day = pl.read_parquet(tmp_path / "day-1.parquet")
    start = int(day["timestamp"].to_numpy().min())
    send(tmp_path, [Click(f"user-{n}", f"item-{n}", start + n * 10**6) for n in range(20)])
    assert run("update", tmp_path, str(tmp_path / "day-1.parquet")) == 0
    assert live(tmp_path).id == 2 and len(learned_rows(tmp_path)) == 1820


class _Killed(BaseException):
    """Stands for `kill -9`."""


def kill_before_promotion(folder: Path) -> None:
    """Run the nightly job up to the moment when a version is on disk and not live yet."""

    def die(store: Store, number: int, action: str, reason: str = "") -> None:
        raise _Killed

    store = open_store(folder / "s")
    with patch.object(Store, "move_pointer", die), store.locked(), pytest.raises(_Killed):
        list(NightlyJob(store).catch_up())


def test_no_number_of_a_lost_version_is_used_again(tmp_path: Path) -> None:
    """If it were, an update that is killed before the promotion would look as if it had been promoted before."""
    stored(tmp_path, n=2)
    shutil.rmtree(tmp_path / "s" / "versions" / "2")
    assert main(["rollback", "1", "--reason", "2 is lost", "--store", str(tmp_path / "s")]) == 0
    kill_before_promotion(tmp_path)
    assert open_store(tmp_path / "s").version_numbers() == [1, 3]
    assert run("update", tmp_path) == 0
    assert live(tmp_path).id == 3 and len(learned_rows(tmp_path)) == 1800


def test_a_batch_whose_version_was_lost_between_others_is_learned(tmp_path: Path) -> None:
    stored(tmp_path, n=2)
    assert run("update", tmp_path, str(tmp_path / "day-2.parquet"), "--force", "--reason", "a test") == 0
    shutil.rmtree(tmp_path / "s" / "versions" / "2")
    assert main(["rollback", "1", "--reason", "2 is lost", "--store", str(tmp_path / "s")]) == 0
    assert run("update", tmp_path) == 0  # learns day 1 again, of which no version exists
    assert live(tmp_path).id == 4 and len(learned_rows(tmp_path)) == 1800
    assert run("update", tmp_path, "--retry", "3", "--force", "--reason", "a test") == 0
    assert len(learned_rows(tmp_path)) == 2100
