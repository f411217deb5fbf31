"""Refused deliveries in rare situations: rollbacks, erased users, bots every night, gaps, damaged manifests."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from test_deferral import (
    FIVE,
    POPULATION,
    QUALITY,
    Measure,
    learned_days,
    measured,
    n_events,
    promoted,
    renamed,
    with_user,
)
from test_nightly import ANY, SIZE, days, learn, new_job

from freshrec.data.log import read_log
from freshrec.errors import LogError, OptionError, StateError, TrainingError
from freshrec.nightly import challenger as challenger_module
from freshrec.nightly.deferral import causes_of, find_deferral
from freshrec.nightly.erase import erase_user
from freshrec.nightly.gate import GateLimits
from freshrec.nightly.job import NightlyJob
from freshrec.store.checksummed_json import read_checksummed, write_checksummed
from freshrec.store.event_log import AppendResult, EventLog
from freshrec.store.versions import open_store, version_chain

__all__ = ["measured"]  # a fixture

DAY_US = 24 * 3_600_000_000


def test_a_refused_delivery_whose_users_were_all_erased_does_not_stop_updates(tmp_path: Path) -> None:
    base, one, two, *_ = days()
    job = new_job(tmp_path / "s", base, limits=POPULATION)
    # All users and items of the first day are unknown: 300 rows of three users
    newcomers = renamed(one).with_columns(user_id=pl.int_range(pl.len()) % 3 + 10_000)
    assert causes_of(learn(job, newcomers, "one")[0]) == {"ids"}
    for user in ("10000", "10001", "10002"):
        erase_user(job, user)
    job = NightlyJob(open_store(tmp_path / "s"), POPULATION)
    assert promoted(learn(job, two, "two")) == [True] and learned_days(job) == 1
    assert find_deferral(job.store, POPULATION).pending == ()


def test_a_bot_that_was_learned_on_purpose_does_not_open_the_gate_to_the_next_one(tmp_path: Path) -> None:
    base, one, two, *_ = days()
    job = new_job(tmp_path / "s", base, limits=GateLimits())
    assert promoted(learn(job, with_user(one, 9_999, FIVE), "one")) == [False, True]
    assert job.relearn(2, "it was a real customer").goes_live
    # All rows of that version belong to one user. This is not the usual share of one user in a delivery.
    assert promoted(learn(job, with_user(two, 8_888, FIVE), "two")) == [False, True]


def test_the_retry_of_a_version_also_learns_the_deferred_deliveries_that_it_had_learned(
    tmp_path: Path, measured: Callable[[Measure], None]
) -> None:
    base, one, two, *_ = days()
    measured(lambda state: 0.3 if n_events(state) == 1740 else 0.4)  # the version of day 1 alone is worse
    job = new_job(tmp_path / "s", base, limits=QUALITY)
    learn(job, one, "one")
    [version] = learn(job, two, "two")
    assert version.batches == [2, 3] and version.numbers["new_events"] == 600
    job.store.move_pointer(1, "rollback", "a mistake")
    job = NightlyJob(open_store(tmp_path / "s"), QUALITY)
    again = job.relearn(version.id)
    assert again.promoted and again.batches == [2, 3] and learned_days(job) == 2
    with pytest.raises(OptionError, match="learned all events of version 3 already"):
        job.relearn(version.id)
    # Also by force, if the gate refuses them now.
    measured(lambda state: 0.4 if n_events(state) == 1425 else 0.3)
    job.store.move_pointer(1, "rollback", "a mistake")
    job = NightlyJob(open_store(tmp_path / "s"), QUALITY)
    refused = job.relearn(version.id)
    assert not refused.goes_live and learned_days(job) == 0
    forced = job.relearn(version.id, "we need them")
    assert forced.goes_live and forced.batches == [2, 3] and learned_days(job) == 2


def test_a_rollback_ends_the_series_of_refusals(tmp_path: Path, measured: Callable[[Measure], None]) -> None:
    base, *later = days(6)
    measured(lambda state: 0.5 if n_events(state) == 1740 else 0.4)
    job = new_job(tmp_path / "s", base, limits=QUALITY)
    versions = [learn(job, day, f"day {i}")[0] for i, day in enumerate(later[:4])]
    assert promoted(versions) == [True, False, False, True]  # the loss is accepted on the third day
    job.store.move_pointer(2, "rollback", "we do not accept it")
    job = NightlyJob(open_store(tmp_path / "s"), QUALITY)
    assert find_deferral(job.store, QUALITY).n_refused == 0
    assert promoted(learn(job, later[4], "day 5")) == [False]


def test_fewer_rows_for_good_are_accepted_although_a_bot_comes_every_night(tmp_path: Path) -> None:
    base, *later = days(6)
    limits = replace(ANY, max_share_top_user=0.25, max_drop_factor=1.75, min_earlier_days=2)
    job = new_job(tmp_path / "s", base, limits=limits)
    for i, day in enumerate(later[:2]):
        learn(job, day, f"day {i}")
    # A bot has 60 of 120 rows
    nights = [with_user(day[:120], 9_999 + i, FIVE) for i, day in enumerate(later[2:])]
    verdicts = [promoted(learn(job, night, f"night {i}")) for i, night in enumerate(nights)]
    assert verdicts == [[False, False], [False, True], [False, True], [False, True]]
    assert learned_days(job) == 2 + 4 * 60 / 300


def test_rows_of_a_suspicious_user_excuse_no_late_rows_of_other_deliveries(tmp_path: Path) -> None:
    base, one, two, three, *_ = days()
    job = new_job(tmp_path / "s", base, limits=GateLimits())
    learn(job, with_user(one, 9_999, FIVE), "one")
    learn(job, two, "two")
    # The third day with the times of the first one: none of its rows was delivered before, so it corrects nothing.
    shifted = three.with_columns(time=one["time"])
    [version] = learn(job, shifted, "three")
    assert not version.promoted and "older than the newest known event" in " ".join(version.reasons)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("causes", "quality"),
        ("causes", 5),
        ("deferred", "2"),
        ("deferred", [[2]]),
        ("deferred", [2.5]),
        ("blamed", [None]),
        ("blamed", {"2": 1}),
        ("deferred_days", 7),
        ("deferred_days", [7]),
        ("retry_of", "2"),
    ],
)
def test_invalid_entries_about_refused_deliveries_are_reported(key: str, value: Any, tmp_path: Path) -> None:
    base, one, two, *_ = days()
    job = new_job(tmp_path / "s", base)
    learn(job, one, "one")
    path = tmp_path / "s/versions/2/manifest.json"
    content = read_checksummed(path)
    write_checksummed(content | {"data": content["data"] | {key: value}}, path)
    with pytest.raises(StateError, match=f"not a valid manifest.*{key}"):
        job.store.manifest(2)
    with pytest.raises(StateError, match="not a valid manifest"):
        version_chain(job.store)


def test_unknown_ids_of_an_accepted_catalogue_do_not_become_usual(tmp_path: Path) -> None:
    base, *later = days(6)
    job = new_job(tmp_path / "s", base, limits=POPULATION)
    verdicts = [promoted(learn(job, renamed(day), f"day {i}")) for i, day in enumerate(later[:4])]
    assert verdicts == [[False], [False], [True], [True]]
    mistake = later[4].with_columns(pl.col("item_id") + 5_000_000)
    [version] = learn(job, mistake, "mistake")
    assert causes_of(version) == {"ids"} and not version.promoted


def test_an_unusual_delivery_on_which_training_failed_is_not_deferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, one, two, *_ = days()
    limits = replace(GateLimits(), separate=False)
    job = new_job(tmp_path / "s", base, limits=limits)

    def fail(*_: object) -> None:
        raise TrainingError("Training diverged.")

    with monkeypatch.context() as patched:
        patched.setattr(challenger_module, "learn_with_holdout", fail)
        [version] = learn(job, with_user(one, 9_999, FIVE), "one")
    assert causes_of(version) == {"content", "error"} and version.reasons[0] == "Training diverged."
    assert find_deferral(job.store, limits).versions == ()
    [version] = learn(job, two, "two")
    assert version.promoted and version.batches == [3]


def test_a_log_that_comes_back_is_accepted_and_times_in_the_future_are_not(tmp_path: Path) -> None:
    base, *later = days(6)
    limits = replace(ANY, max_usual_hole_hours=14 * 24, max_hole_factor=0, min_earlier_days=2)
    job = new_job(tmp_path / "s", base, limits=limits)
    nights = [*later[:2], *(day.with_columns(pl.col("time") + 30 * DAY_US) for day in later[2:])]
    with pytest.raises(LogError, match="All timestamps are in the future"):
        learn(job, later[0].with_columns(pl.col("time") + 20_000 * DAY_US), "future")
    versions = [learn(job, night, f"night {i}")[0] for i, night in enumerate(nights)]
    assert promoted(versions) == [True, True, False, False, True, True] and causes_of(versions[2]) == {"gap"}
    assert learned_days(job) == 6


def test_a_single_wrong_time_is_not_learned(tmp_path: Path) -> None:
    base, *later = days(6)
    limits = replace(ANY, max_usual_hole_hours=14 * 24, max_hole_factor=0, min_earlier_days=2)
    job = new_job(tmp_path / "s", base, limits=limits)
    # The third day is 30 days too late, and the fourth one 90 days.
    n_days = [0, 0, 30, 90, 0, 0]
    nights = [day.with_columns(pl.col("time") + n * DAY_US) for day, n in zip(later, n_days)]
    versions = [learn(job, night, f"night {i}")[0] for i, night in enumerate(nights)]
    assert promoted(versions) == [True, True, False, False, True, True] and learned_days(job) == 4
    assert find_deferral(job.store, limits).pending == ()


def test_an_accepted_change_must_give_a_version_that_can_be_measured(
    tmp_path: Path, measured: Callable[[Measure], None]
) -> None:
    base, *later = days(4)
    job = new_job(tmp_path / "s", base, limits=POPULATION)
    for i, day in enumerate(later[:2]):
        assert causes_of(learn(job, renamed(day), f"day {i}")[0]) == {"ids"}
    measured(lambda state: float("nan"))
    [version] = learn(job, renamed(later[2]), "day 3")
    assert not version.promoted and "error" in causes_of(version)


def test_a_corrected_file_replaces_a_deferred_delivery(tmp_path: Path, measured: Callable[[Measure], None]) -> None:
    base, one, two, *_ = days()
    measured(lambda state: 0.3 if n_events(state) == 1740 else 0.4)
    job = new_job(tmp_path / "s", base, limits=QUALITY)
    is_wrong = pl.int_range(pl.len()) % 5 == 0  # 60 of 300 rows have a wrong item
    wrong = one.with_columns(item_id=pl.when(is_wrong).then(FIVE).otherwise("item_id"))
    n_wrong = len(wrong.join(one, on=["user_id", "item_id", "time"], how="anti"))
    assert 50 < n_wrong <= 60
    [refused] = learn(job, wrong, "one")
    assert find_deferral(job.store, QUALITY).versions == (refused,)
    # Other numbers of events than those of day 1 alone: the corrected file brings day 1 and a part of day 2.
    [version] = learn(job, pl.concat([one, two[:100]]), "one, corrected")
    assert version.promoted and version.batches == [2, 3] and learned_days(job) == pytest.approx(400 / 300)
    # The wrong rows are not learned later either.
    assert promoted(learn(job, two[100:], "two")) == [True] and learned_days(job) == 2


def test_a_part_of_a_day_is_completed_by_a_later_file(tmp_path: Path) -> None:
    base, *later = days(4)
    limits = replace(ANY, max_drop_factor=1.75, min_earlier_days=2)
    job = new_job(tmp_path / "s", base, limits=limits)
    for i, day in enumerate([*later[:2], later[2][:100]]):
        learn(job, day, f"day {i}")
    assert learned_days(job) == 2
    [version] = learn(job, later[2], "the whole third day")
    assert version.promoted and version.batches == [4, 5] and learned_days(job) == 3
    assert promoted(learn(job, later[3], "day 4")) == [True] and learned_days(job) == 4


def test_the_reasons_against_the_rows_of_one_user_are_about_these_rows(tmp_path: Path) -> None:
    base, *later = days(4)
    limits = replace(GateLimits(), min_earlier_days=2)
    job = new_job(tmp_path / "s", base, limits=limits)
    for i, day in enumerate(later[:3]):
        learn(job, day, f"day {i}")
    [of_bot, _] = learn(job, with_user(later[3], 9_999, FIVE, share=3), "bot")
    assert "amount" not in causes_of(of_bot) and of_bot.reasons[0].startswith("100 % of the rows belong to one user.")
    assert of_bot.notes[0].startswith("These are the rows of one user")


def test_a_bot_is_found_among_the_new_rows_of_a_file_that_repeats_the_whole_log(tmp_path: Path) -> None:
    base, one, *_ = days()
    job = new_job(tmp_path / "s", base, limits=GateLimits())
    result = job.append_delivery(read_log(pl.concat([base, with_user(one, 9_999, FIVE)])), "base and one")
    assert (result.n_rows, result.n_known, result.n_appended, result.n_separate) == (1800, 1500, 150, 150)
    assert promoted(list(job.catch_up())) == [False, True] and learned_days(job) == 0.5


def test_rows_of_two_bots_are_appended_once_if_the_job_is_killed_and_the_first_bot_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, one, *_ = days()
    job = new_job(tmp_path / "s", base, limits=GateLimits())
    bots = with_user(with_user(one, 9_999, FIVE, share=2), 8_888, FIVE, share=3)  # 8,888 has 100 rows, 9,999 has 100
    append, n_appends = EventLog.append, 0

    def killed_before_the_second_append(log: EventLog, *arguments: Any) -> AppendResult:
        nonlocal n_appends
        n_appends += 1
        if n_appends == 2:
            raise KeyboardInterrupt
        return append(log, *arguments)

    delivered = read_log(bots)
    with monkeypatch.context() as patched:
        patched.setattr(EventLog, "append", killed_before_the_second_append)
        with pytest.raises(KeyboardInterrupt):
            job.append_delivery(delivered, "one")
    list(job.catch_up("the first bot is a customer"))
    job.append_delivery(delivered, "one")
    list(job.catch_up())
    assert len(job.log.read()) == 1500 + SIZE and learned_days(job) == pytest.approx(2 / 3)
