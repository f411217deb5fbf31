"""Splitting a log: where spans start, which events are tested, and when they are trained on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from freshrec.data.log import Log, read_log
from freshrec.data.split import LogSplit, describe_spans, split_log
from freshrec.data.split_config import SplitConfig
from freshrec.errors import OptionError, SpanError
from freshrec.replay.measure import QueryOptions, SpanBlock, make_queries
from freshrec.types import NEVER, NEXT, NOW, TEST, TRAIN, VALID, Histories

DAY = 86_400_000_000  # microseconds


def log_of(times: list[int], users: list[int] | None = None, has_clock: bool = True, **more: list[Any]) -> Log:
    users = users or [1] * len(times)
    items = [100 + i for i in range(len(times))]
    frame = pl.DataFrame(
        {"user_id": users, "item_id": items, "time": times, **more}, schema_overrides={"time": pl.Int64}
    )
    return Log(frame, has_clock, "us", ())


def sizes(cut: LogSplit) -> list[int]:
    return [len(span.events) for span in cut.spans]


def roles(cut: LogSplit, span: int) -> list[int]:
    return cut.spans[span].events.role_E.tolist()


def joins(cut: LogSplit, span: int) -> list[int]:
    return cut.spans[span].events.train_at_E.tolist()


# Ten events at times 0 1 2 3 4 5 6 7 8 40, in a base and two spans.
@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("count", [5, 2, 3]),  # edges at events 5 (half of 10) and 7.5, which becomes 7, the earlier of two as near
        ("time", [9, 0, 1]),  # [0, 41) in three parts: edges at 13 and 27
        ("count-alpha", [5, 4, 1]),  # base ends at time 5; [5, 41) in two parts: edge at 23
        ("clock-alpha", [9, 0, 1]),  # base ends at 20.5, half of [0, 41); edges at 21 and 31
    ],
)
def test_each_rule_cuts_where_its_definition_says(by: str, expected: list[int]) -> None:
    assert sizes(split_log(log_of([0, 1, 2, 3, 4, 5, 6, 7, 8, 40]), by=by, spans=2)) == expected


def test_events_of_one_time_are_not_separated() -> None:
    # Half of 8 events is 4, inside the run of fives (positions 2..6); 2 is as near as 6.
    assert sizes(split_log(log_of([0, 1, 5, 5, 5, 5, 8, 9]), by="count", spans=1)) == [2, 6]


def test_a_cut_by_count_leaves_no_span_empty_even_where_one_time_holds_most_events() -> None:
    # Times start at positions 0, 1, 9, 10; the only cut into four is at all of them.
    assert sizes(split_log(log_of([0, *[5] * 8, 8, 9]), by="count", spans=3)) == [1, 8, 1, 1]


def test_spans_start_at_given_dates_and_are_named_by_their_days() -> None:
    days = split_log(log_of([0, DAY, 2 * DAY, 3 * DAY]), by="dates", dates=["1970-01-02", "1970-01-04T00:00+01:00"])
    # The second date is 23:00 UTC on January 3rd, after the event of that midnight.
    assert [span.name for span in days.spans] == [
        "1970-01-01 00:00 to 00:00",
        "1970-01-02 to 1970-01-03",
        "1970-01-04 00:00 to 00:00",
    ]


def test_each_period_is_a_span_and_later_periods_merge_when_fewer_spans_are_asked_for() -> None:
    log = log_of([0, 1, 2, 3, 4, 5], has_clock=False, period=[0, 0, 1, 2, 5, 5])
    assert [span.name for span in split_log(log, by="period", spans=3).spans] == [
        "period 0",
        "period 1",
        "period 2",
        "period 5",
    ]
    # Three later periods in two groups: two, then one.
    assert [span.name for span in split_log(log, by="period", spans=2).spans] == [
        "period 0",
        "periods 1 to 2",
        "period 5",
    ]


def test_the_base_may_have_several_periods() -> None:
    log = log_of([0, 1, 2, 3, 4, 5], has_clock=False, period=[0, 0, 1, 2, 5, 5])
    names = [span.name for span in split_log(log, by="period", spans=3, base_periods=2).spans]
    assert names == ["periods 0 to 1", "period 2", "period 5"]
    with pytest.raises(SpanError, match="no more than 4 periods, so there is nothing after the base block"):
        split_log(log, by="period", spans=3, base_periods=4)


def test_labels_and_categories_travel_with_the_events() -> None:
    log = log_of([0, 1, 2, 3], label=[1.0, 0.0, None, 2.0], category=["b", "a", None, "b"])
    base, span = split_log(log, by="count", spans=1).spans
    labels_E = torch.cat([part.events.labels_E for part in (base, span)])  # type: ignore[misc]
    assert labels_E[[0, 1, 3]].tolist() == [1, 0, 1] and bool(labels_E[2].isnan())
    kinds_E = torch.cat([part.events.categories_E for part in (base, span)])  # type: ignore[misc]
    assert kinds_E.tolist() == [1, 2, 0, 1]  # in order of appearance; 0 for none
    assert split_log(log_of([0, 1], label=[1.0, 2.0]), by="count", spans=1).spans[0].events.labels_E is None


def test_a_period_decides_where_it_disagrees_with_the_time() -> None:
    overlap = split_log(log_of([0, 1, 2, 3], period=[0, 1, 0, 1]), by="period", spans=1)
    assert [span.events.times_E.tolist() for span in overlap.spans] == [[0, 2], [1, 3]]
    assert overlap.notes[0] == "Some periods overlap in time. The period decides."


def test_a_log_without_timestamps_names_spans_by_event_numbers() -> None:
    assert [s.name for s in split_log(log_of([0, 1, 2, 3], has_clock=False), by="count", spans=1).spans] == [
        "events 1 to 2",
        "events 3 to 4",
    ]


def test_an_empty_span_is_kept_and_noted() -> None:
    quiet = split_log(log_of([0, 1, 2, 3, 100]), by="time", spans=2, forget_users=0)
    # [0, 101) in three parts: edges at 33 and 67, and nothing happens in between.
    assert sizes(quiet) == [4, 0, 1]
    assert quiet.notes == ("Span 1 has no events.", "The log has a single user.")
    assert (quiet.spans[1].name, quiet.spans[1].n_items) == ("no events", 4)


def test_the_last_event_of_each_user_in_a_span_is_tested_and_the_one_before_it_validates() -> None:
    # After a base of 2: user 1 has three events, user 2 one, user 3 two.
    log = log_of([0, 1, 2, 3, 4, 5, 6, 7], users=[1, 2, 1, 3, 1, 2, 3, 1])
    one = split_log(log, by="count", alpha=0.25, spans=1, forget_users=0)
    assert roles(one, 0) == [TRAIN, TRAIN]
    assert roles(one, 1) == [TRAIN, VALID, VALID, TEST, TEST, TEST]
    assert joins(one, 0) == [NOW, NOW]
    assert joins(one, 1) == [NOW, NEXT, NEXT, NEXT, NEXT, NEXT]


def test_under_never_held_out_events_are_never_trained_on() -> None:
    paper = split_log(log_of(list(range(8))), by="count", spans=1, heldout="never", forget_users=0)
    assert joins(paper, 1) == [NOW, NOW, NEVER, NEVER]


def test_under_now_held_out_events_are_tested_and_trained_on_in_the_same_update() -> None:
    at_once = split_log(log_of(list(range(8))), by="count", spans=1, heldout="now", forget_users=0)
    assert (roles(at_once, 1), joins(at_once, 1)) == ([TRAIN, TRAIN, VALID, TEST], [NOW] * 4)


def test_with_all_targets_every_later_event_is_tested_and_then_trained_on() -> None:
    test_then_train = split_log(log_of(list(range(8))), by="count", spans=1, targets="all", forget_users=0)
    assert roles(test_then_train, 0) == [TRAIN] * 4
    assert roles(test_then_train, 1) == [TEST] * 4
    assert joins(test_then_train, 1) == [NOW] * 4


def many(n: int = 3000, users: int = 90) -> Log:
    who = np.random.default_rng(0).integers(0, users, n)
    return log_of(list(range(n)), who.tolist())


def test_three_targets_a_user_are_the_last_event_and_two_others_that_had_one_before() -> None:
    parts = split_log(many(), by="count", spans=3, alpha=0.01, targets="three", heldout="now", forget_users=0)
    seen: set[int] = set(parts.spans[0].events.users_E.tolist())
    for span in parts.spans[1:]:
        events = span.events
        for user in set(events.users_E.tolist()):
            at = (events.users_E == user).nonzero()[:, 0]
            tested = at[events.role_E[at] == TEST]
            able = at if user in seen else at[1:]
            assert at[-1] in tested and len(tested) == min(3, max(1, len(able)))
            assert user in seen or len(at) == 1 or at[0] not in tested
            seen.add(user)
        assert bool((events.train_at_E == NOW).all()) and not bool((events.role_E == VALID).any())
    again = split_log(many(), by="count", spans=3, alpha=0.01, targets="three", heldout="now", forget_users=0)
    other = split_log(many(), by="count", spans=3, alpha=0.01, targets="three", heldout="now", forget_users=0, seed=1)
    assert again.fingerprint() == parts.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("targets", ["last", "three", "all"])
def test_with_fewer_targets_whole_users_are_tested_and_nothing_else_changes(targets: str) -> None:
    whole = split_log(many(), by="count", spans=3, targets=targets, heldout="now", forget_users=0.2)
    part = split_log(many(), by="count", spans=3, targets=targets, heldout="now", forget_users=0.2, n_targets=40)
    for every, some in zip(whole.spans[1:], part.spans[1:]):
        assert torch.equal(every.events.train_at_E, some.events.train_at_E)
        assert torch.equal(every.events.users_E, some.events.users_E)
        asked, all_of = (set((e.users_E[e.role_E == TEST]).tolist()) for e in (some.events, every.events))
        n = int((some.events.role_E == TEST).sum())
        assert asked < all_of and 40 <= n < 40 + 20
        of_asked = torch.isin(every.events.users_E, torch.tensor(sorted(asked)))
        assert n == int((every.events.role_E == TEST)[of_asked].sum())
    one = split_log(many(), by="count", spans=3, targets=targets, heldout="now", forget_users=0.2, n_targets=1)
    assert all(len(set(s.events.users_E[s.events.role_E == TEST].tolist())) == 1 for s in one.spans[1:])
    a_heavy_one = log_of(list(range(1000)), [1, *range(2, 501)] + [1] * 500)
    heavy = [
        split_log(a_heavy_one, by="count", spans=1, targets="all", n_targets=9, seed=seed) for seed in range(-1, 40)
    ]
    assert {int((c.spans[1].events.role_E == TEST).sum()) for c in heavy} == {500}  # the only user is tested
    beside = log_of(list(range(1000)), [1, *range(2, 501)] + [u for i in range(250) for u in (1, 600 + i)])
    asked_of = [split_log(beside, by="count", spans=1, targets="all", n_targets=200, seed=seed) for seed in range(40)]
    n_asked = {int((c.spans[1].events.role_E == TEST).sum()) for c in asked_of}
    assert min(n_asked) == 200 and 250 < max(n_asked) < 450  # with the heavy user among them, or without
    all_at_once = split_log(
        many(), by="count", spans=3, targets=targets, heldout="now", forget_users=0.2, n_targets=10**6
    )
    assert all_at_once.fingerprint() == whole.fingerprint()


def test_the_split_column_of_a_log_is_kept() -> None:
    log = log_of([0, 1, 2, 3], split=["train", "test", "valid", "train"])
    own = split_log(log, by="count", spans=1, targets="split", forget_users=0)
    assert (roles(own, 0), joins(own, 0)) == ([TRAIN, TEST], [NOW, NEXT])
    assert (roles(own, 1), joins(own, 1)) == ([VALID, TRAIN], [NEXT, NOW])


def test_held_out_events_of_the_users_kept_for_forgetting_never_join() -> None:
    last = split_log(log_of(list(range(8))), by="count", spans=1, forget_users=1)
    assert (roles(last, 1), joins(last, 1)) == ([TRAIN, TRAIN, VALID, TEST], [NOW, NOW, NEVER, NEVER])
    every = split_log(log_of(list(range(8))), by="count", spans=1, targets="all", forget_users=1)
    assert (roles(every, 1), joins(every, 1)) == ([TEST] * 4, [NOW, NOW, NEVER, NEVER])


def held_out_users(n_users: int, seed: int) -> set[int]:
    """The users kept for forgetting in a log where each user has one event in the base and one after it."""
    log = log_of(list(range(2 * n_users)), users=[*range(n_users), *range(n_users)])
    events = split_log(log, by="count", spans=1, seed=seed).spans[1].events
    return set(events.users_E[events.train_at_E == NEVER].tolist())


def test_users_kept_for_forgetting_are_a_twentieth_and_depend_on_the_seed_not_on_other_users() -> None:
    chosen = held_out_users(20_000, seed=0)
    # 20,000 draws at 0.05 have mean 1,000 and standard deviation 31; five of them are 155.
    assert abs(len(chosen) - 1000) < 155
    assert held_out_users(10_000, seed=0) == {user for user in chosen if user <= 10_000}
    # Two independent choices share 0.05 * 1,000 = 50 users, with standard deviation 7.
    assert len(chosen & held_out_users(20_000, seed=1)) < 100


def test_users_with_few_events_are_left_out_with_a_note() -> None:
    log = log_of([0, 1, 2, 3, 4], users=[1, 2, 1, 2, 3])
    kept = split_log(log, by="count", spans=1, min_events=2)
    assert kept.user_catalog.frame["id"].to_list() == [1, 2]
    assert kept.notes[0].startswith("Left out 1 user with fewer than 2 events in the whole log (1 event).")


def test_catalogs_grow_with_the_spans() -> None:
    grown = split_log(log_of([0, 1, 2, 3], users=[7, 7, 9, 7]), by="count", spans=1)
    assert [(span.n_users, span.n_items) for span in grown.spans] == [(1, 2), (2, 4)]
    assert grown.user_catalog.frame.rows() == [(7, 0, 1), (9, 1, 1)]


def test_the_plan_counts_what_is_new_and_what_a_model_can_reach() -> None:
    # Base: users 1, 2 on items a, b. Then user 1 on a (TEST, seen before) and user 3 on c (TEST, never seen): half.
    frame = pl.DataFrame({"user_id": [1, 2, 1, 3], "item_id": ["a", "b", "a", "c"], "time": [0, 1, 2, 3]})
    rows = describe_spans(split_log(Log(frame, False, "order", ()), by="count", spans=1)).drop("name").rows()
    assert rows == [(0, 2, 2, 2, 2, 2, 0, None), (1, 2, 2, 2, 1, 1, 2, 0.5)]


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 30)), min_size=2, max_size=60),
    st.sampled_from(["count", "time", "count-alpha", "clock-alpha"]),
    st.integers(1, 4),
    st.floats(0.05, 0.95),
)
def test_every_event_is_in_exactly_one_span(pairs: list[tuple[int, int]], by: str, spans: int, alpha: float) -> None:
    pairs = sorted(pairs, key=lambda pair: pair[1])
    log = log_of([time for _, time in pairs], users=[user for user, _ in pairs])
    if len({time for _, time in pairs}) <= spans:
        with pytest.raises(SpanError, match="distinct times|the same time"):
            split_log(log, by=by, spans=spans, alpha=alpha)
        return
    parts = split_log(log, by=by, spans=spans, alpha=alpha)
    assert len(parts.spans) == spans + 1 and sizes(parts)[0] > 0
    back = [
        (user, item, time)
        for span in parts.spans
        for user, item, time in zip(
            parts.user_catalog.ids(span.events.users_E),
            parts.item_catalog.ids(span.events.items_E),
            span.events.times_E.tolist(),
        )
    ]
    assert back == log.frame.rows()
    moments = [set(span.events.times_E.tolist()) for span in parts.spans]
    assert sum(len(moment) for moment in moments) == len(set.union(*moments))  # no time is in two spans


@given(st.lists(st.integers(1, 5), min_size=8, max_size=60))
def test_a_user_with_n_events_in_a_span_trains_on_n_minus_2(users: list[int]) -> None:
    for span in split_log(log_of(list(range(len(users))), users=users), by="count", spans=3).spans[1:]:
        for user in set(span.events.users_E.tolist()):
            found = span.events.role_E[span.events.users_E == user].tolist()
            assert found == [*[TRAIN] * (len(found) - 2), VALID, TEST][-len(found) :]


def test_split_log_takes_a_config_keywords_or_both_and_splits_by_count_by_default() -> None:
    # Ten events in a base block and two spans. By count with alpha = 0.5: 5, 2, 3 (see above). With alpha = 0.2 the
    # base block has 2 events, and the other 8 are split into 4 and 4.
    log = log_of([0, 1, 2, 3, 4, 5, 6, 7, 8, 40])
    assert sizes(split_log(log, spans=2)) == sizes(split_log(log, SplitConfig(spans=2))) == [5, 2, 3]
    assert sizes(split_log(log, SplitConfig(spans=2, alpha=0.2))) == [2, 4, 4]
    assert sizes(split_log(log, SplitConfig(spans=3, alpha=0.2), spans=2)) == [2, 4, 4]
    assert sizes(split_log(log, SplitConfig(by="count-alpha"), spans=2)) == [5, 4, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "counts"}, 'Did you mean "count"?'),
        ({"targets": "first"}, 'Option targets is "first". Use one of last, three, all, split.'),
        ({"n_targets": -1}, "Option n_targets is -1. It must be at least 0"),
        ({"heldout": "later"}, "heldout"),
        ({"spans": 0}, "Option spans is 0. It must be at least 1"),
        ({"alpha": 1.0}, "Option alpha is 1.0. It must be above 0 and below 1"),
        ({"forget_users": 1.5}, "Option forget_users is 1.5. It must be at least 0 and at most 1"),
        ({"by": "dates"}, "--by dates needs --dates"),
        ({"dates": ["1970-01-02"]}, "--dates is set, but --by is count"),
        ({"by": "dates", "dates": ["yesterday"]}, "yesterday"),
        ({"by": "dates", "dates": ["1970-01-03", "1970-01-02"]}, "are not in ascending order"),
        (
            {"targets": "all", "heldout": "never"},
            "--targets all trains on every event, which contradicts --heldout never",
        ),
    ],
)
def test_an_impossible_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        split_log(log_of([0, 1, 2, 3, 4, 5, 6, 7]), **options)


@pytest.mark.parametrize(
    ("log", "options", "message"),
    [
        (log_of([0, 1, 2]), {"by": "count", "spans": 3}, "3 distinct times, too few .* Use at most 2 spans"),
        (log_of([0, 0]), {"by": "count", "spans": 1}, "All events of the log have the same time"),
        (log_of([0, 1]), {"by": "dates", "dates": ["1970-01-01"]}, "base block would be empty"),
        (
            log_of([0, 1], has_clock=False),
            {"by": "time", "spans": 1},
            "--by time needs timestamps, and this log has none. Use --by count or --by period.",
        ),
        (log_of([0, 1]), {"by": "period"}, "needs a period"),
        (log_of([0, 1], period=[3, 3]), {"by": "period"}, "single period"),
        (log_of([0, 1]), {"by": "count", "spans": 1, "targets": "split"}, "needs a split column"),
        (
            log_of([0, 1], split=["train", "dev"]),
            {"by": "count", "spans": 1, "targets": "split"},
            "values other than train, valid, test in 1 row",
        ),
        (log_of([0, 1]), {"by": "count", "spans": 1, "min_events": 3}, "No events are left"),
    ],
)
def test_a_log_that_cannot_be_cut_as_asked_is_refused(log: Log, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpanError, match=message):
        split_log(log, **options)


def test_the_electronics_log_has_the_spans_that_were_counted_apart_from_this_code(
    real_log: Callable[[str], Path],
) -> None:
    parts = split_log(read_log(real_log("amazon_electronics_imsr_test")), by="count-alpha")
    # Counted to the hundred, with the day of a cut in the earlier span; here it is in the later one. Events of one day
    # have one time, and the largest such day holds 200: hence 200 + 50 for the rounding.
    counted = [82_000, 13_800, 12_500, 12_100, 16_400, 14_400, 12_500]
    assert all(abs(found - expected) <= 250 for found, expected in zip(sizes(parts), counted))


def test_the_gowalla_log_keeps_its_own_blocks_and_split(real_log: Callable[[str], Path]) -> None:
    log = read_log(real_log("ccd_gowalla_blocks"))
    parts = split_log(log, by="period", targets="split", forget_users=0)
    assert [span.name for span in parts.spans] == [f"period {t}" for t in range(6)]
    assert sum(describe_spans(parts)["targets"]) == log.frame.filter(split="test").height


def test_with_sessions_a_user_of_another_span_is_a_new_user() -> None:
    log = log_of([0, 1, 2, 3, 4, 5], users=[1, 2, 1, 1, 2, 3], period=[0, 0, 0, 1, 1, 1])
    parts = split_log(log, by="period", spans=1, targets="all", sessions=True)
    assert [span.events.users_E.tolist() for span in parts.spans] == [[1, 2, 1], [3, 4, 5]]
    assert parts.user_catalog.ids(torch.tensor([1, 3])).to_list() == ["1@0", "1@1"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # items known before, test sessions, test predictions of the first and of the last cycle, as in the specs
        ("ader_diginetica", {1: (18569, 6847, 23105), 16: (43105, 15965, 60878)}),
        ("ader_yoochoose", {1: (12885, 50317, 151770), 16: (25750, None, 78913)}),
    ],
)
def test_the_sessions_of_ader_are_those_that_its_authors_tested(
    name: str, expected: dict[int, tuple[int, int | None, int]], real_log: Callable[[str], Path]
) -> None:
    parts = split_log(read_log(real_log(name)), by="period", spans=16, targets="all", forget_users=0, sessions=True)
    for span, (n_items, n_sessions, n_predictions) in expected.items():
        assert parts.spans[span - 1].n_items == n_items
        now = parts.spans[span]
        block = SpanBlock(now.events, 0, now.n_users, n_items)
        queries = make_queries(Histories.empty(), block, 50, QueryOptions(unseen="drop"))  # no session has a past
        assert len(queries) == n_predictions
        assert n_sessions is None or len(queries.users_N.unique()) == n_sessions
