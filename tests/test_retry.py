"""`update --retry` learns a refused or dropped delivery again, and the gate checks the delivery as it did at first."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from test_nightly import ANY, days, learn, new_job

from freshrec.cli.app import main
from freshrec.nightly.gate import GateLimits
from freshrec.nightly.job import NightlyJob
from freshrec.nightly.notes import number_ranges
from freshrec.store.collection import disk_bytes
from freshrec.store.versions import open_store

YEAR = 365 * 24 * 3_600_000_000  # microseconds


def gate_of_times() -> GateLimits:
    """The gate with its usual limits of late rows and of gaps, and no other ones."""
    usual = GateLimits()
    return GateLimits(**{**ANY.__dict__, "max_share_late": usual.max_share_late, "max_rise": usual.max_rise})


@pytest.fixture
def job(tmp_path: Path) -> NightlyJob:
    base, *_ = days()
    return new_job(tmp_path / "s", base, limits=gate_of_times())


def test_a_retry_of_a_day_that_is_a_year_too_late_is_refused_for_the_same_reason(job: NightlyJob) -> None:
    _, one, two, *_ = days()
    [refused] = learn(job, one.with_columns(time=pl.col("time") + YEAR), "shifted")
    assert refused.reasons and refused.reasons[0].startswith("There are no rows for ")
    again = job.relearn(refused.id)
    assert (again.promoted, again.goes_live, again.reasons, job.store.live) == (False, False, refused.reasons, 1)
    assert learn(job, two, "two")[0].goes_live
    # Newer days do not change the verdict, nor does a retry of the retry.
    assert [job.relearn(number).reasons for number in (refused.id, again.id)] == [refused.reasons] * 2
    forced = job.relearn(refused.id, "the clock was right")
    assert (forced.promoted, forced.goes_live, job.store.live) == (False, True, forced.id)


def test_a_retry_of_late_rows_is_refused_for_the_same_reason(job: NightlyJob) -> None:
    _, one, two, *_ = days()
    assert learn(job, two, "two")[0].goes_live
    [refused] = learn(job, one, "one")
    assert "of the rows are older than the newest known event" in refused.reasons[0]
    again = job.relearn(refused.id)
    assert (again.promoted, again.reasons, job.store.live) == (False, refused.reasons, 2)


def test_a_retry_of_a_good_day_is_not_late_although_newer_days_were_learned_since(job: NightlyJob) -> None:
    _, one, two, three, _ = days()
    for name, day in (("one", one), ("two", two)):
        assert learn(job, day, name)[0].goes_live
    job.store.move_pointer(2, "rollback", "a mistake")
    assert learn(job, three, "three")[0].goes_live
    again = job.relearn(3)
    assert again.goes_live and again.reasons == [] and again.data["day"]["share_late"] == 0
    assert again.retry_of == 3


def told(capsys: pytest.CaptureFixture[str], line: str, code: int = 0) -> str:
    """Run a command and return its stdout as one line."""
    capsys.readouterr()
    assert main(line.split()) == code
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The option of a store in the current folder; `late.parquet` was refused as version 2 and `two` is version 3."""
    base, one, two, three, _ = days()
    monkeypatch.chdir(tmp_path)
    for name, frame in (("base", base), ("two", two), ("three", three)):
        frame.write_parquet(f"{name}.parquet")
    one.with_columns(time=pl.col("time") - YEAR).write_parquet("late.parquet")
    told(capsys, "fit base.parquet --store s3 --model popularity")
    told(capsys, "update late.parquet --store s3", 8)
    told(capsys, "update two.parquet --store s3 --force --reason test")
    return "--store s3"


def test_a_refused_file_that_is_delivered_again_gives_the_reason_and_a_command_that_learns_it(
    shop: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = told(capsys, f"update late.parquet {shop}")
    assert text.startswith(
        "late.parquet: version 2 was made from this file and is not live, so nothing was read. "
        "It was refused: 100 % late rows. "
        'To learn it anyway, run `freshrec update --retry 2 --force --reason "..." --store s3`.'
    )
    assert "Version 4 is live because of --force" in told(capsys, f"update --retry 2 --force --reason test {shop}")


def test_a_rolled_back_file_that_is_delivered_again_needs_no_force(
    shop: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(Path("s3"))
    passed = store.manifest(3).promoted
    told(capsys, f"rollback 1 --reason mistake {shop}")
    force = "" if passed else ' --force --reason "..."'
    assert told(capsys, f"update two.parquet {shop}").startswith(
        "two.parquet: version 3 was made from this file and is not live, so nothing was read. "
        f"It was rolled back: mistake. To learn it anyway, run `freshrec update --retry 3{force} --store s3`."
    )


def test_update_and_history_say_of_which_version_a_version_is_a_retry(
    shop: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = told(capsys, f"update --retry 2 {shop}", 8)
    assert "Version 4 (retry of version 2) was refused; version 3 stays live." in text
    text = told(capsys, f"update --retry 2 --force --reason test {shop}")
    assert (
        "Version 5 is live because of --force, although the gate refused it (updated from version 3, retry of" in text
    )
    main(["history", *shop.split()])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if line.strip()[:1].isdigit()}
    assert rows["4"].endswith("retry of 2; 100 % late rows")
    assert rows["5"].endswith("retry of 2; by force: test")
    assert "updated from version 3, retry of version 2, with freshrec" in told(capsys, f"history --long {shop}")
    assert max(map(len, lines)) <= 100


def test_commands_in_messages_name_the_store(shop: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["promote", "99", *shop.split()]) == 7
    assert capsys.readouterr().err == ("error: There is no version 99 in s3. See `freshrec history --store s3`.\n")
    text = told(capsys, f"update three.parquet {shop} --force --reason test")
    assert "still apply; see `freshrec history --last 1 --long --store s3`." in text.replace("applies", "apply")


def test_a_day_without_events_has_a_note(shop: str, capsys: pytest.CaptureFixture[str]) -> None:
    pl.read_parquet("two.parquet")[:0].write_parquet("none.parquet")
    text = told(capsys, f"update none.parquet {shop}")
    assert text == (
        "none.parquet: no rows Version 4 is live. It is a copy of version 3, because there were no new events. "
        "Note The delivery had no new events, so the model is that of version 3."
    )
    assert "Blank: ndcg@20 could not be measured, for example without new events" in told(capsys, f"history {shop}")


@pytest.mark.parametrize(
    ("delivery", "reason"),
    [
        (lambda one: one.with_columns(time=pl.col("time") - YEAR), "all rows are late"),
        (lambda one: one[:1], "the delivery has too few rows to hold any out"),  # a fifth of 1 row is 0 rows
    ],
)
def test_a_note_says_why_no_events_are_held_out(
    delivery: Callable[[pl.DataFrame], pl.DataFrame], reason: str, job: NightlyJob
) -> None:
    [version] = learn(job, delivery(days()[1]), "delivery")
    assert f"The versions were not compared on the newest events, because {reason}." in version.notes
    assert version.data["metric"] == "ndcg@20"


def test_status_lists_refused_deliveries_until_they_are_learned(shop: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "refused deliveries 2 only `update --retry` learns their events" in told(capsys, f"status {shop}")
    told(capsys, f"update --retry 2 {shop}", 8)  # version 4 is another one of the same delivery
    assert json.loads(told(capsys, f"status --json {shop}"))["refused_not_learned"] == [4]
    told(capsys, f"update --retry 2 --force --reason test {shop}")
    assert "refused deliveries none only" in told(capsys, f"status {shop}")


def test_status_and_doctor_count_rows_and_different_events(shop: str, capsys: pytest.CaptureFixture[str]) -> None:
    # 1,500 rows of the first version and two days of 300. After a rollback, the rows of version 3 are stored again.
    assert "the event log holds 2,100 rows (2,100 different events) in 3 deliveries" in told(capsys, f"doctor {shop}")
    told(capsys, f"rollback 1 {shop}")
    pl.read_parquet("two.parquet").reverse().write_parquet("again.parquet")
    told(capsys, f"update again.parquet --force --reason test {shop}")
    assert "the event log holds 2,400 rows (2,100 different events) in 4 deliveries" in told(capsys, f"doctor {shop}")
    assert "rows of the event log 2,400 2,100 different events in 4 deliveries" in told(capsys, f"status {shop}")


def test_rollback_and_promote_say_which_events_are_no_longer_learned(
    shop: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = told(capsys, f"rollback 1 {shop}")
    force = "" if open_store(Path("s3")).manifest(3).promoted else ' --force --reason "..."'
    assert text == (
        "Version 1 is live instead of version 3. 300 events of version 3 are no longer learned. "
        f"`freshrec update --retry 3{force} --store s3` learns them again."
    )
    assert told(capsys, f"promote 3 --reason fixed {shop}") == "Version 3 is live."  # it has all events of version 1
    told(capsys, f"update three.parquet --force --reason test {shop}")
    assert told(capsys, f"rollback 1 {shop}") == (
        "Version 1 is live instead of version 4. 600 events of versions 3, 4 are no longer learned. "
        "`freshrec update --retry N --store s3` learns those of version N again. Retry the oldest version first."
    )
    told(capsys, f"promote 4 --reason fixed {shop}")
    assert told(capsys, f"promote 2 --reason late {shop}").startswith(
        "Version 2 is live. 600 events of versions 3, 4 are no longer learned."
    )


def test_gc_reports_the_freed_bytes_and_doctor_names_deleted_versions_in_one_line(
    shop: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        told(capsys, f"update --retry 2 {shop}", 8)  # versions 4, 5 and 6
    before = disk_bytes(Path("s3"))
    found = json.loads(told(capsys, f"gc --keep 1 --json {shop}"))
    assert found == {"gone": [2, 4, 5, 6], "bytes_freed": before - disk_bytes(Path("s3"))}
    assert found["bytes_freed"] > 0
    assert "versions 2, 4 to 6: their files were deleted by `freshrec gc`" in told(capsys, f"doctor {shop}")
    told(capsys, f"update three.parquet --force --reason test {shop}")
    text = told(capsys, f"gc --keep 1 {shop}")
    assert re.fullmatch(r"Deleted the files of version 1: [\d.]+ (bytes|kB|MB) freed\.", text)


def test_numbers_in_a_row_become_a_range() -> None:
    assert [number_ranges(numbers) for numbers in ([], [3], [1, 2], [1, 2, 3, 5, 7, 8])] == [
        "", "3", "1, 2", "1 to 3, 5, 7, 8",
    ]  # fmt: skip
