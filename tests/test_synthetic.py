"""Each generated log has the properties that its docstring describes.

Bounds are five standard deviations of the count in question, so a correct world fails one seed in a million.
"""

from math import sqrt

import numpy as np
import polars as pl
import pytest
from scipy.stats import chi2_contingency, norm

from freshrec.data.split import split_log
from freshrec.data.synthetic import GAINED_TOPIC_SHARE, N_TASTES, REPEAT_SHARE, WORLDS, make_world
from freshrec.errors import OptionError


def near(found: pl.Series, share: float) -> bool:
    """Whether the share of true values in `found` is `share`, within five standard deviations."""
    return abs(float(found.mean()) - share) < 5 * sqrt(share * (1 - share) / len(found))


def share_of_base_topics(name: str) -> float:
    """Return the share of last-period events in a base topic of the user, for users with at least 30 base events."""
    frame = make_world(name, users=500, items=400, events=60_000).log.frame
    base = (
        frame.filter(period=0).filter(pl.len().over("user_id") >= 30).select("user_id", "category", known=True).unique()
    )
    last = frame.filter(pl.col("period") == 6, pl.col("user_id").is_in(base["user_id"].implode()))
    return float(last.join(base, on=["user_id", "category"], how="left")["known"].fill_null(False).mean())


@pytest.mark.parametrize("name", WORLDS)
def test_the_same_seed_gives_the_same_world_and_another_seed_another(name: str) -> None:
    first, again, other = (make_world(name, events=5000, seed=seed) for seed in (3, 3, 4))
    assert first.log.frame.equals(again.log.frame)
    assert not first.log.frame.equals(other.log.frame)


@pytest.mark.parametrize("name", WORLDS)
def test_a_world_has_the_requested_size_and_its_periods_equal_spans_by_count(name: str) -> None:
    world = make_world(name, users=300, items=200, events=5001, spans=4)
    frame = world.log.frame
    assert len(frame) == 5001 and frame["time"].is_sorted() and frame["time"].is_unique().all()
    assert frame["user_id"].is_between(0, 299).all() and frame["item_id"].is_between(0, 199).all()
    assert (frame["item_id"] % world.n_topics).equals(frame["category"], check_names=False)
    by_count, by_period = (split_log(world.log, by=by, spans=4) for by in ("count", "period"))
    assert [len(span.events) for span in by_count.spans] == [len(span.events) for span in by_period.spans]


@pytest.mark.parametrize("name", WORLDS)
def test_every_span_brings_new_users_and_new_items(name: str) -> None:
    spans = split_log(make_world(name, users=4000, items=1000, events=60_000).log, by="count").spans
    assert all(b.n_users > a.n_users and b.n_items > a.n_items for a, b in zip(spans, spans[1:]))


@pytest.mark.parametrize("name", [name for name in WORLDS if name != "repeat"])  # its users click replaced items again
def test_items_disappear(name: str) -> None:
    last_seen = split_log(make_world(name, users=4000, items=1000, events=60_000).log, by="count").item_catalog.frame[
        "last_span"
    ]
    # 400 of 1000 items replace another, half of them in the base block. So 0.2 have disappeared by then, with standard
    # deviation sqrt(400 * .5 * .5) / 1000 = 0.01. A few unpopular items also disappear by chance.
    assert 0.15 < (last_seen == 0).mean() < 0.3


def test_the_most_active_tenth_of_the_users_has_the_share_of_events_of_a_lognormal() -> None:
    frame = make_world("popularity", users=2000, events=200_000).log.frame
    here = frame.filter(pl.col("user_id") < 1300)  # 70 % of 2000 are active from the start, with standard deviation 20
    counts = here["user_id"].value_counts()["count"].sort(descending=True)
    # Of a lognormal with sigma 1, the top tenth holds Phi(1 - 1.2816) = 0.389.
    assert abs(counts.head(130).sum() / counts.sum() - norm.cdf(1 - norm.ppf(0.9))) < 0.06


def test_popularity_follows_zipfs_law() -> None:
    # 100 items hold 60 ranks. The first rank has 1 / (1 + 1/2 + ... + 1/60) = 1 / 4.680 = 0.2137. In the first
    # hundredth of the log, hardly any item is replaced.
    early = make_world("popularity", items=100, events=500_000).log.frame.head(5000)
    top = early["item_id"].mode()[0]
    assert near(early["item_id"] == top, 0.2137)


def test_in_the_checkerboard_even_users_click_even_items() -> None:
    frame = make_world("checkerboard", events=20_000).log.frame
    assert (frame["user_id"] % 2).equals(frame["item_id"] % 2, check_names=False)
    assert set(frame["item_id"] % 2) == {0, 1}


def test_in_popularity_all_users_have_the_same_taste() -> None:
    frame = make_world("popularity", items=100, events=50_000).log.frame.filter(pl.col("period") == 6)
    table = np.zeros((2, 100))
    np.add.at(table, (frame["user_id"] % 2, frame["item_id"]), 1)
    assert chi2_contingency(table[:, table.sum(0) >= 10]).pvalue > 1e-6


def test_in_frozen_each_user_keeps_three_topics_and_likes_them_equally() -> None:
    frame = make_world("frozen").log.frame
    topics = (
        frame.select("user_id", "category")
        .unique()
        .with_columns(nth=pl.col("category").rank("ordinal").over("user_id"), n=pl.len().over("user_id"))
    )
    assert topics["n"].max() == N_TASTES
    three = frame.join(topics.filter(n=N_TASTES), on=["user_id", "category"])
    for period in (0, 6):
        assert near(three.filter(period=period)["nth"] == 1, 1 / 3)


def test_in_drift_tastes_move_and_in_frozen_they_do_not() -> None:
    # Frozen: with 30 events or more, a topic of three is missed with probability 3 * (2/3)^30 < 2e-5.
    assert share_of_base_topics("frozen") > 0.999
    # Drift: in the base block (moments 0 to 0.5) each interest shows its steps 0 and 1. In the last period (moments
    # 11/12 to 1) it is at step 2, unless its phase is below 2 - 2 * moment: 1/12 on average. Otherwise, the two
    # topics of each of the other two interests match by chance: 1 - (1 - 2/19)^2 = 0.2. Together, that is about
    # 1/12 + 11/12 * 0.2 = 0.27.
    assert 0.2 < share_of_base_topics("drift") < 0.34


def test_newborn_interests_appear_in_the_span_given_by_the_truth_and_stay() -> None:
    world = make_world("newborn", users=1000, events=200_000)
    assert world.truth is not None
    frame = world.log.frame.join(world.truth, on=["user_id", "category"], how="left")
    gained = frame.filter(pl.col("span").is_not_null())
    # A gained topic has no event before the span in the truth. In that span it has as many as the truth gives.
    assert (gained["period"] >= gained["span"]).all()
    first = gained.filter(pl.col("period") == pl.col("span")).group_by("user_id", "category").agg(pl.len().alias("n"))
    assert world.truth.join(first, on=["user_id", "category"]).select((pl.col("n") == pl.col("events")).all()).item()
    # After the span in which both topics have appeared, 70 % of the events are drawn from them.
    born = world.truth.group_by("user_id").agg(pl.col("span").max().alias("since"), pl.len().alias("n")).filter(n=2)
    after = frame.join(born, on="user_id").filter(pl.col("period") > pl.col("since"))
    assert near(after["span"].is_not_null(), GAINED_TOPIC_SHARE)


def test_in_newborn_half_of_the_early_users_gain_topics_and_no_other_taste_changes() -> None:
    world = make_world("newborn", users=1000, events=200_000)
    assert world.truth is not None
    # 700 of 1000 users are early, and half of them gain: 350, with standard deviation sqrt(1000 * .35 * .65) = 15.
    # A few have too few events for it to show.
    n_gaining = world.truth["user_id"].n_unique()
    assert 350 - 6 * 15 < n_gaining < 350 + 5 * 15
    old = world.log.frame.join(world.truth, on=["user_id", "category"], how="anti")
    assert old.group_by("user_id").agg(pl.col("category").n_unique())["category"].max() == N_TASTES
    assert set(world.truth["span"]) == {1, 2, 3, 4, 5, 6}


def test_in_repeat_seven_in_ten_later_events_repeat_an_item_of_the_user() -> None:
    frame = make_world("repeat", items=100_000, users=500, events=20_000).log.frame
    again = frame.select(
        (pl.int_range(pl.len()).over("user_id", "item_id") > 0).alias("again"),
        (pl.int_range(pl.len()).over("user_id") > 0).alias("later"),
    )
    found = float(again.filter("later")["again"].mean())
    # 0.7 are copies. Other draws also hit an item of the user by chance: at most 0.3 times the chance of the same
    # popular items.
    assert REPEAT_SHARE - 0.02 < found < REPEAT_SHARE + 0.1


def test_an_unknown_world_and_an_impossible_size_are_refused() -> None:
    with pytest.raises(OptionError, match='Did you mean "newborn"?'):
        make_world("newborm")
    with pytest.raises(OptionError, match="at least 1 user, 20 items"):
        make_world("frozen", items=19)
