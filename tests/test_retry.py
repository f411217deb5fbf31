"""`update --retry` learns a refused or dropped delivery again, and the gate checks the delivery as it did at first."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from test_nightly import ANY, days, learn, new_job

from freshrec.nightly.gate import GateLimits
from freshrec.nightly.job import RETRY_KEY, NightlyJob

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
    assert again.data[RETRY_KEY] == 3
