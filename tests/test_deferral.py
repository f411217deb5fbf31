"""Refused deliveries are learned later, unless their events look wrong. The gate recovers by itself."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from test_nightly import ANY, SIZE, days, learn, n_learned, new_job

from freshrec.cli.app import main
from freshrec.data.log import read_log
from freshrec.data.synthetic import make_world
from freshrec.nightly import challenger as challenger_module
from freshrec.nightly.anomalies import unknown_id_anomalies
from freshrec.nightly.deferral import causes_of, find_deferral, is_change
from freshrec.nightly.gate import GateLimits
from freshrec.nightly.job import NightlyJob, refused_batches
from freshrec.replay.metrics import Float64Array
from freshrec.store.manifest import Manifest
from freshrec.store.versions import open_store, version_chain
from freshrec.types import State

QUALITY = replace(ANY, tolerance=0.05, forgetting=0.1)  # a gate that compares versions and checks nothing else
Measure = Callable[[State], float]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[Measure], None]:
    """Replace the measurement of a version: 200 users, whose mean metric is a function of its state."""

    def install(measure: Measure) -> None:
        def user_values(state: State, *_: object) -> Float64Array:
            return measure(state) * np.linspace(0.5, 1.5, 200)

        monkeypatch.setattr(challenger_module, "user_values", user_values)

    return install


def n_events(state: State) -> int:
    """The number of events that a popularity model has counted."""
    return round(float(state.model.counts_I.sum()))


def learned_days(job: NightlyJob) -> float:
    """The number of days of 300 events that the live version has learned after the first log."""
    return (n_learned(job.bundle) - 1500) / SIZE


def promoted(versions: list[Manifest]) -> list[bool]:
    return [version.promoted for version in versions]


def lucky_on_day_one(state: State) -> float:
    # The first log has 1,425 counted events, and day 1 brings 75 + 240 more: 1,740. That version is 25 % better than
    # all others, older and newer.
    return 0.5 if n_events(state) == 1740 else 0.4


def test_one_lucky_version_does_not_refuse_all_later_ones(tmp_path: Path, measured: Callable[[Measure], None]) -> None:
    base, *later = days(6)
    measured(lucky_on_day_one)
    job = new_job(tmp_path / "s", base, limits=QUALITY)
    versions = [learn(job, day, f"day {i}")[0] for i, day in enumerate(later)]
    # Days 2 and 3 are refused, because each version is worse than that of day 1. Day 4 is the third one in a row.
    assert promoted(versions) == [True, False, False, True, True, True]
    assert [causes_of(version) for version in versions[1:3]] == [{"quality"}] * 2
    assert versions[3].batches == [3, 4, 5] and versions[3].parent == 2
    assert "This is accepted, because 3 deliveries in a row showed it." in " ".join(versions[3].notes)
    assert learned_days(job) == 6  # nothing is lost

    # The gate of 0.1.0 refuses all of them for ever.
    job = new_job(tmp_path / "old", base, limits=replace(QUALITY, max_refused_in_a_row=10**9, max_spoiled_updates=0))
    assert promoted([learn(job, day, f"day {i}")[0] for i, day in enumerate(later)]) == [True] + [False] * 5
    assert learned_days(job) == 1


def test_a_delivery_that_was_refused_once_is_learned_with_the_next_one(
    tmp_path: Path, measured: Callable[[Measure], None]
) -> None:
    base, one, two, *_ = days()
    measured(lambda state: 0.3 if n_events(state) == 1740 else 0.4)  # the version of day 1 alone is worse
    job = new_job(tmp_path / "s", base, limits=QUALITY)
    [refused] = learn(job, one, "one")
    assert not refused.promoted and find_deferral(job.store, job.limits).versions == (refused,)
    [version] = learn(job, two, "two")
    assert version.promoted and version.batches == [2, 3] and learned_days(job) == 2
    assert any(note.endswith("were refused before (version 2).") for note in version.notes)
    assert refused_batches(job.store) == [] and find_deferral(job.store, job.limits).versions == ()


def test_a_delivery_that_spoils_three_updates_is_set_aside_and_no_other_one_is_lost(
    tmp_path: Path, measured: Callable[[Measure], None]
) -> None:
    base, *later = days(6)
    later[0] = later[0].with_columns(item_id=pl.lit(999, pl.Int64))  # 300 clicks on a new item spoil every version
    later[1:] = [day.with_columns(item_id=base["item_id"][:SIZE]) for day in later[1:]]  # no other new items
    n_items = int(base["item_id"].n_unique())
    measured(lambda state: 0.3 if float(state.model.counts_I[n_items + 1 :].sum()) > 230 else 0.4)
    job = new_job(tmp_path / "s", base, limits=QUALITY)
    assert not learn(job, later[0], "bad")[0].promoted
    for i, day in enumerate(later[1:4]):
        assert find_deferral(job.store, job.limits).versions[0].id == 2
        [version] = learn(job, day, f"good {i}")
        assert version.promoted and "it would be refused too" in " ".join(version.notes)
    assert find_deferral(job.store, job.limits).versions == ()
    [version] = learn(job, later[4], "good again")
    assert version.promoted and version.batches == [6] and learned_days(job) == 4
    assert refused_batches(job.store) == [2]  # `update --retry 2` can still learn it
    assert job.relearn(2, "on purpose").goes_live and learned_days(job) == 5


def test_a_delivery_of_unusual_size_is_learned_one_delivery_later(tmp_path: Path) -> None:
    base, *later = days(6)
    limits = replace(ANY, max_drop_factor=1.75, min_earlier_days=2)
    job = new_job(tmp_path / "s", base, limits=limits)
    sizes = [300, 300, 100, 300]  # fewer than 300 / 1.75 = 171 rows are unusual
    versions = [learn(job, day[:n], f"day {i}")[0] for i, (day, n) in enumerate(zip(later, sizes))]
    assert promoted(versions) == [True, True, False, True] and causes_of(versions[2]) == {"amount"}
    assert versions[3].batches == [4, 5] and n_learned(job.bundle) == 1500 + 1000
    # The size of the late delivery counts as usual now, as one of the last 28.
    assert len(challenger_module.earlier_stats(version_chain(job.store))) == 4
    # A second unusual delivery in a row confirms the first one.
    job = new_job(tmp_path / "t", base, limits=limits)
    versions = [learn(job, day[:n], f"day {i}")[0] for i, (day, n) in enumerate(zip(later, [300, 300, 100, 100, 100]))]
    assert promoted(versions) == [True, True, False, True, True] and n_learned(job.bundle) == 1500 + 900


POPULATION = replace(ANY, max_share_unknown=0.9, max_rise=0.25)


def renamed(day: pl.DataFrame) -> pl.DataFrame:
    return day.with_columns(pl.col("item_id") + 1_000_000, pl.col("user_id") + 1_000_000)


def test_a_new_catalogue_is_accepted_after_three_deliveries_and_a_single_mistake_never(tmp_path: Path) -> None:
    base, *later = days(6)
    job = new_job(tmp_path / "s", base, limits=POPULATION)
    versions = [learn(job, renamed(day), f"day {i}")[0] for i, day in enumerate(later[:4])]
    assert promoted(versions) == [False, False, True, True]
    assert causes_of(versions[0]) == {"ids"} and versions[2].batches == [2, 3, 4] and learned_days(job) == 4
    # Renamed once, then as before: the events wait for `update --retry`.
    job = new_job(tmp_path / "t", base, limits=POPULATION)
    versions = [learn(job, renamed(day) if i == 0 else day, f"day {i}")[0] for i, day in enumerate(later)]
    assert promoted(versions) == [False] + [True] * 5 and learned_days(job) == 5
    assert refused_batches(job.store) == [2] and find_deferral(job.store, job.limits).versions == ()
    # Other ids each night are no new catalogue.
    job = new_job(tmp_path / "u", base, limits=POPULATION)
    shifted = [day.with_columns(pl.col("item_id") + 1_000_000 * (i + 1)) for i, day in enumerate(later[:5])]
    assert not any(promoted([learn(job, day, f"day {i}")[0] for i, day in enumerate(shifted)]))


@pytest.mark.parametrize("column", ["user_id", "item_id"])
def test_ids_in_another_spelling_are_refused_on_the_first_night(column: str, tmp_path: Path) -> None:
    base, one, *_ = [day.with_columns(pl.col("user_id", "item_id").cast(pl.String) + ".0") for day in days()]
    job = new_job(tmp_path / "s", base, limits=GateLimits())
    [version] = learn(job, one.with_columns(pl.col(column).str.strip_suffix(".0")), "one")
    assert not version.promoted and "% of the rows have an unknown" in version.reasons[0]
    job = new_job(tmp_path / "t", base, limits=GateLimits())
    assert learn(job, one, "one")[0].promoted


def test_ids_of_sessions_never_return_so_unknown_ones_are_no_surprise(tmp_path: Path) -> None:
    base, one, *_ = days()
    frame = pl.concat([base, one]).with_columns(user_id=pl.int_range(pl.len()) // 3)  # three events a session
    job = new_job(tmp_path / "s", frame[:1500], limits=GateLimits())
    assert learn(job, frame[1500:], "one")[0].promoted
    # The store of a log with returning users knows that they return: 20 of 120 users are new in its newest 75 rows.
    assert new_job(tmp_path / "t", base).store.manifest(1).data["share_new_users"] < 0.9


def test_a_store_of_0_1_0_has_no_share_of_new_users_and_accepts_the_first_night(tmp_path: Path) -> None:
    base, one, *_ = days()
    job = new_job(tmp_path / "s", base, limits=GateLimits())
    champion = job.champion()
    first = champion.chain[0]
    former = first.model_copy(update={"data": {k: v for k, v in first.data.items() if k != "share_new_users"}})
    frame = one.with_columns(pl.col("user_id") + 1_000_000)
    nights = [replace(champion, chain=[manifest]).delivery_stats(frame) for manifest in (former, first)]
    assert nights[0].share_new_users_first is None and nights[1].share_new_users_first is not None
    accepted = [not unknown_id_anomalies(night, [], GateLimits()) for night in nights]
    assert accepted == [True, False]


def test_a_lower_quality_becomes_usual_if_it_lasts(tmp_path: Path, measured: Callable[[Measure], None]) -> None:
    base, *later = days(10)
    level = [0.4]
    measured(lambda state: level[0])
    job = new_job(tmp_path / "s", base, limits=replace(QUALITY, min_floor_versions=3))
    versions = [learn(job, day, f"day {i}")[0] for i, day in enumerate(later[:5])]
    level[0] = 0.1  # below the floor of 0.2, for both versions
    versions += [learn(job, day, f"later {i}")[0] for i, day in enumerate(later[5:])]
    # Values so far: five of 0.4. With one of 0.1, the lower quartile of six values is 0.4. With two of 0.1, it is 0.25,
    # so the floor is 0.125. With three, it is 0.1, and the floor 0.05.
    assert promoted(versions) == [True] * 5 + [False] * 3 + [True] * 2
    assert causes_of(versions[5]) == {"floor"} and versions[8].batches == [7, 8, 9, 10] and learned_days(job) == 10


FIVE = pl.lit(5, pl.Int64)


def with_user(day: pl.DataFrame, user_id: int, items: pl.Expr, share: int = 2) -> pl.DataFrame:
    """The day with every `share`-th row given to one user and to some items."""
    is_theirs = pl.int_range(pl.len()) % share == 0
    return day.with_columns(
        user_id=pl.when(is_theirs).then(pl.lit(user_id, pl.Int64)).otherwise("user_id"),
        item_id=pl.when(is_theirs).then(items).otherwise("item_id"),
    )


def test_the_rows_of_a_bot_are_refused_and_the_rest_of_the_day_is_learned(tmp_path: Path) -> None:
    base, one, two, *_ = days()
    job = new_job(tmp_path / "s", base, limits=GateLimits())
    bot = with_user(one, 9_999, FIVE)
    result = job.append_delivery(read_log(bot), "one")
    assert (result.n_appended, result.n_separate) == (150, 150)
    of_bot, rest = job.catch_up()
    assert (of_bot.promoted, rest.promoted) == (False, True) and causes_of(of_bot) >= {"content"}
    assert learned_days(job) == 0.5 and refused_batches(job.store) == [2]
    # The same file again brings nothing. The corrected file brings exactly the rows of the bot.
    assert job.append_delivery(read_log(bot), "one").batch is None
    result = job.append_delivery(read_log(one), "one, corrected")
    assert (result.n_appended, result.n_known) == (150, 150)
    list(job.catch_up())
    assert learned_days(job) == 1 and learn(job, two, "two")[0].promoted
    # The rows can still be learned on request.
    assert job.relearn(2, "it was a real customer").goes_live and learned_days(job) == 2.5


def test_a_large_customer_is_no_bot(tmp_path: Path) -> None:
    frame = make_world("drift", users=120, items=400, events=1800).log.frame.select("user_id", "item_id", "time")
    base, one = frame[:1500], frame[1500:]
    # A known user with 60 earlier events buys 100 of 300 rows, of the same items as the others.
    base = with_user(base, 9_999, pl.col("item_id"), share=25)
    day = with_user(one, 9_999, pl.col("item_id"), share=3)
    job = new_job(tmp_path / "s", base, limits=GateLimits())
    assert job.champion().delivery_stats(day).share_top_user > 0.25
    assert promoted(learn(job, day, "one")) == [True] and learned_days(job) == 1
    # Without earlier events, or with one item, it is refused.
    unknown, one_item = day.with_columns(pl.col("user_id").replace(9_999, 8_888)), with_user(one, 9_999, FIVE, share=3)
    for i, other in enumerate((unknown, one_item)):
        job = new_job(tmp_path / f"other {i}", base, limits=GateLimits())
        assert promoted(learn(job, other, "one")) == [False, True]


def test_rolled_back_deliveries_are_not_deferred(tmp_path: Path) -> None:
    base, one, two, *_ = days()
    job = new_job(tmp_path / "s", base)
    learn(job, one, "one")
    job.store.move_pointer(1, "rollback", "a mistake")
    job = NightlyJob(open_store(tmp_path / "s"), ANY)
    assert find_deferral(job.store, ANY).versions == ()
    assert learn(job, two, "two")[0].batches == [3]


def test_a_delivery_of_new_users_is_learned_once_they_came_again(tmp_path: Path) -> None:
    base, *later = days(4)
    job = new_job(tmp_path / "s", base, limits=POPULATION)
    newcomers = later[0].with_columns(user_id=pl.int_range(pl.len()) % 60 + 10_000)  # all rows are of unknown users
    mistake = later[1].with_columns(pl.col("user_id") + 1_000_000)
    assert promoted(learn(job, newcomers, "newcomers") + learn(job, mistake, "mistake")) == [False, False]
    # On the third day, 9 of the 60 newcomers come again, who have 15 % of the first day's rows; the limit is 10 %. The
    # gate sees them in the live version from then on.
    some = later[2].with_columns(
        user_id=pl.when(pl.int_range(pl.len()) % 10 == 0)
        .then(pl.int_range(pl.len()) // 10 % 9 + 10_000)
        .otherwise("user_id")
    )
    [third] = learn(job, some, "some came again")
    assert third.promoted and third.batches == [4]
    [fourth] = learn(job, later[3], "fourth")
    assert fourth.promoted and fourth.batches == [2, 5] and refused_batches(job.store) == [3]


def test_a_log_that_stops_for_a_month_goes_on_and_a_wrong_clock_never_does(tmp_path: Path) -> None:
    base, *later = days(6)
    month, year = 30 * 24 * 3_600_000_000, 365 * 24 * 3_600_000_000
    limits = replace(ANY, max_hole_hours=24 * 14, max_usual_hole_hours=24 * 14)
    job = new_job(tmp_path / "s", base, limits=limits)
    versions = [learn(job, day.with_columns(pl.col("time") + month), f"day {i}")[0] for i, day in enumerate(later)]
    # The world's days follow each other within hours. The third one after the gap brings all three.
    assert promoted(versions) == [False, False, True, True, True, True]
    assert causes_of(versions[0]) == {"gap"} and learned_days(job) == 6
    # So does a log in which half of the users never return: a gap does not need the same ids.
    job = new_job(tmp_path / "u", base, limits=replace(limits, max_rise=0.25))
    is_new = pl.int_range(pl.len()) % 2 == 0
    moved = [
        day.with_columns(
            pl.col("time") + month,
            user_id=pl.when(is_new).then(pl.col("user_id") + 10_000 * (i + 1)).otherwise("user_id"),
        )
        for i, day in enumerate(later)
    ]
    assert promoted([learn(job, day, f"day {i}")[0] for i, day in enumerate(moved)]) == [False, False] + [True] * 4
    assert learned_days(job) == 6
    # One day is a year too late. It is left out, also when a real gap follows.
    job = new_job(tmp_path / "t", base, limits=limits)
    moved = [day.with_columns(pl.col("time") + n) for day, n in zip(later, [year, 0, month, month, month])]
    versions = [learn(job, day, f"day {i}")[0] for i, day in enumerate(moved)]
    assert promoted(versions) == [False, True, False, False, True] and learned_days(job) == 4
    assert refused_batches(job.store) == [2]


def test_several_bots_are_separated_and_the_rest_of_the_day_is_learned(tmp_path: Path) -> None:
    base, one, *_ = days()
    # The first bot has a half of 300 rows, and the second one a third of the other 150.
    bots = with_user(with_user(one, 9_998, FIVE, share=3), 9_999, FIVE, share=2)
    counts = bots["user_id"].value_counts()
    assert counts.filter(pl.col("user_id").is_in([9_998, 9_999]))["count"].sort().to_list() == [50, 150]
    job = new_job(tmp_path / "s", base, limits=GateLimits())
    result = job.append_delivery(read_log(bots), "one")
    assert (result.n_rows, result.n_appended, result.n_separate) == (300, 100, 200)
    assert promoted(list(job.catch_up())) == [False, False, True]
    assert refused_batches(job.store) == [2, 3] and n_learned(job.bundle) == 1500 + 100


def test_update_says_that_a_refused_delivery_is_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, one, two, *_ = days()
    for name, frame in {"base": base, "one": one, "few": two[:100]}.items():
        frame.write_parquet(tmp_path / f"{name}.parquet")
    at, gate = ["--store", str(tmp_path / "s")], ["--gate", "min_earlier_days=1"]
    assert main(["fit", str(tmp_path / "base.parquet"), "--model", "popularity", *at]) == 0
    assert main(["update", str(tmp_path / "one.parquet"), *at, *gate]) == 0
    capsys.readouterr()
    assert main(["update", str(tmp_path / "few.parquet"), *at, *gate]) == 8
    out, err = capsys.readouterr()
    assert "Version 3 was refused; version 2 stays live. The next update tries its events again." in " ".join(
        out.split()
    )
    assert "The next update tries the events again. To learn them at once, run `freshrec update --retry 3" in err
    assert main(["status", *at]) == 0
    assert "the next update learns their events" in capsys.readouterr().out


def test_random_clicks_after_a_gap_are_no_lasting_change() -> None:
    assert is_change({"gap"}) and is_change({"ids", "head", "floor"}) and is_change({"gap", "ids", "head"})
    assert not is_change({"gap", "head"}) and not is_change({"head"}) and not is_change({"gap", "content"})
