"""A challenger: the live version, updated with new rows, and the gate's verdict on it. Nothing is written."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import torch

from freshrec.errors import StateError
from freshrec.models.absorb import absorb_block
from freshrec.models.popularity import PopularitySpec
from freshrec.nightly.anomalies import top_user_anomalies
from freshrec.nightly.deferral import judged_values
from freshrec.nightly.delivery_stats import DeliveryStats, compute_delivery_stats, most_active_user
from freshrec.nightly.full_retrain import GAIN_KEY, retrain_interval, start_from_scratch, updates_since_retrain
from freshrec.nightly.gate import GateLimits, HoldoutValues, Verdict, judge_challenger
from freshrec.nightly.holdout import newest_queries, user_values
from freshrec.nightly.notes import count_of
from freshrec.progress import report_progress
from freshrec.recommender.bundle import Bundle, learn_events
from freshrec.recommender.log_reading import EncodedEvents, encode_events
from freshrec.recommender.served_state import ServedState
from freshrec.replay.measure import Queries
from freshrec.replay.significance import bootstrap_interval
from freshrec.store.event_log import EventLog
from freshrec.store.manifest import CAUSES_KEY, DEFERRED_DAYS_KEY, METRIC_KEY, Manifest
from freshrec.store.versions import Store, version_chain
from freshrec.types import State

N_HOLDOUT_QUERIES = 250  # queries of a version that are kept to measure later versions
N_HOLDOUT_VERSIONS = 5  # number of latest versions whose queries are kept
HOLDOUT_SHARE, FIRST_HOLDOUT_SHARE = 0.2, 0.05  # held-out share of a delivery, and of the first log
MAX_HOLDOUT_EVENTS = 20_000  # held-out events at most
COMPARED_KEY = "compared_users"  # in a manifest's "data": users measured on the newest events, and on older ones
DAY_KEY = "day"  # in a manifest's "data": statistics of its delivery
NEW_USERS_KEY = "share_new_users"  # in the first manifest's "data": see `share_of_new_users`


@dataclass(frozen=True, eq=False)
class Delivery:
    """A batch of the event log that no version has learned yet."""

    batch: int
    frame: pl.DataFrame  # its rows, without those that the live version has learned from other batches
    stats: DeliveryStats


@dataclass(frozen=True, eq=False)
class Challenger:
    """An updated live version, and the gate's verdict on it."""

    bundle: Bundle
    verdict: Verdict
    numbers: dict[str, float]
    data: dict[str, Any]  # for the manifest


@dataclass(frozen=True, eq=False)
class Champion:
    """The live version, its ancestors, and what its challengers are judged by."""

    bundle: Bundle
    chain: list[Manifest]  # the live version is the last one
    judged_values: list[float]  # metric of earlier versions on their newest events
    limits: GateLimits
    full_every: str  # interval between full retrains, as for `retrain_interval`; "" = never
    log: EventLog

    @staticmethod
    def of(store: Store, bundle: Bundle, limits: GateLimits, full_every: str, log: EventLog) -> Champion:
        """The live version of a store, whose content is `bundle`."""
        chain = version_chain(store)
        return Champion(bundle, chain, judged_values(store.manifests(), chain, limits.metric), limits, full_every, log)

    def challenge(self, frame: pl.DataFrame, day: DeliveryStats, is_amount_usual: bool = False) -> Challenger:
        """Update with the rows of `frame` and judge the result.

        `day`: statistics of the newest delivery in `frame`, which may hold deferred ones too. `is_amount_usual`: its
        numbers of rows, users and items are accepted.
        """
        first = self.chain[0]
        learned, numbers = learn_with_holdout(self.bundle, encode_events(self.bundle.served, frame), HOLDOUT_SHARE)
        growth = learned.sizes["events"] / max(1, first.sizes["events"])
        numbers["full_s"] = first.numbers.get("update_s", 0.0) * growth
        queries = newest_queries(learned.served)
        n_since = updates_since_retrain(self.chain) + 1
        if self.full_every and n_since >= retrain_interval(self.full_every, self.chain) and len(queries):
            is_even_N = queries.users_N % 2 == 0  # these users decide between the two; the gate uses the others
            learned, more = self._try_full_retrain(learned, frame, queries[is_even_N.nonzero()[:, 0]])
            numbers, queries = numbers | more, queries[(~is_even_N).nonzero()[:, 0]]
        report_progress("comparing", detail=f"with version {self.chain[-1].id}")
        values = self._measure(learned, queries, day)
        verdict = judge_challenger(day, earlier_stats(self.chain), values, self.limits, is_amount_usual)
        numbers |= verdict.numbers | _interest_changes(self.bundle.served.state, learned.served.state)
        holdout_queries = (*self.bundle.holdout_queries, first_queries(queries))[-N_HOLDOUT_VERSIONS:]
        data = {DAY_KEY: asdict(day), METRIC_KEY: self.limits.metric, COMPARED_KEY: values.n_users}
        data |= {} if verdict.promoted else {CAUSES_KEY: sorted(verdict.causes)}
        return Challenger(replace(learned, holdout_queries=holdout_queries), verdict, numbers, data)

    @property
    def recent_stats(self) -> list[DeliveryStats]:
        """Statistics of the last deliveries that the live version has learned."""
        return earlier_stats(self.chain)[-self.limits.n_recent_days :]

    def suspicious_user(self, frame: pl.DataFrame) -> Any | None:
        """Return the id of a user with too many of these rows; None if there is none."""
        if not len(frame) or not top_user_anomalies(self.delivery_stats(frame), self.recent_stats, self.limits):
            return None
        return most_active_user(frame)

    def delivery_stats(
        self, frame: pl.DataFrame, left_out: tuple[int, int] = (0, 0), known_until: int | None = None
    ) -> DeliveryStats:
        """Return the statistics of new rows.

        `left_out`: the numbers of duplicates and of known rows that are not in `frame`. `known_until`: time of the
        newest known event that the rows are compared with; None = that of the live version.
        """
        served = self.bundle.served
        newest_time = served.newest_time if known_until is None else known_until
        has_clock, head = self.bundle.read_options.has_clock, _head_item_ids(served)
        first = self.chain[0].data.get(NEW_USERS_KEY)
        n_events_U = served.counts.histories.offsets_U.diff()

        def past_events(user_id: Any) -> int:
            row = int(served.users.rows(pl.Series([user_id]))[0])
            return int(n_events_U[row]) if 0 < row < len(n_events_U) else 0

        return compute_delivery_stats(
            frame, served.users, served.items, has_clock, newest_time, *left_out, head, past_events, first
        )

    def _measure(self, learned: Bundle, queries: Queries, day: DeliveryStats) -> HoldoutValues:
        """Measure the updated version and the live one on the same queries: the newest events, and older ones."""
        metric, n_items = self.limits.metric, len(learned.served.items)
        states = (learned.served.state, self.bundle.served.state)
        challenger_U, champion_U = (user_values(state, queries, metric, n_items) for state in states)
        # without the last queries: the live version has not learned their events either
        older = [past for past in self.bundle.holdout_queries[:-1] if len(past)]
        challenger_O, champion_O = (
            np.concatenate([np.zeros(0), *(user_values(state, past, metric, n_items) for past in older)])
            for state in states
        )
        no_newest_reason = "" if len(learned.served.pending) else _no_holdout_reason(day)
        return HoldoutValues(challenger_U, champion_U, challenger_O, champion_O, self.judged_values, no_newest_reason)

    def _try_full_retrain(
        self, learned: Bundle, frame: pl.DataFrame, queries: Queries
    ) -> tuple[Bundle, dict[str, float]]:
        """Also do a full retrain. Return the better of the two results, and the gain and cost of the retrain."""
        started_s = time.perf_counter()
        report_progress("full retrain")
        empty, all_rows = start_from_scratch(self.bundle, self.log, self.chain, frame)
        new = encode_events(empty.served, all_rows)
        full = learn_events(empty, new, len(new.events) - len(learned.served.pending))
        seconds, metric = time.perf_counter() - started_s, self.limits.metric
        if not len(queries):
            return learned, {"full_s": seconds, GAIN_KEY: 0.0, "full_low": 0.0, "full_high": 0.0}
        values = [user_values(bundle.served.state, queries, metric, len(new.items)) for bundle in (full, learned)]
        gain_U = values[0] - values[1]
        low, high = (float(end[0]) for end in bootstrap_interval(gain_U[:, None]))
        more = {GAIN_KEY: float(gain_U.mean()), "full_low": low, "full_high": high, "full_s": seconds}
        return (full if gain_U.mean() >= 0 else learned), more


def learn_with_holdout(bundle: Bundle, new: EncodedEvents, share: float) -> tuple[Bundle, dict[str, float]]:
    """Learn all events but the newest `share` of those that are not late. Return the result and its costs."""
    started_s, started_cpu_s, newest_time = time.perf_counter(), time.process_time(), bundle.served.newest_time
    n_events = len(new.events)
    n_new = n_events if newest_time is None else int((new.events.times_E >= newest_time).sum())
    n_holdout = min(MAX_HOLDOUT_EVENTS, round(share * n_new))
    report_progress("splitting", detail=f"the newest {count_of(n_holdout, 'event')} held out")
    report_progress("counting", detail=count_of(n_events - n_holdout, "event"))
    learned = learn_events(bundle, new, n_events - n_holdout)
    costs = {"update_s": time.perf_counter() - started_s, "update_cpu_s": time.process_time() - started_cpu_s}
    more = {f"new_{name}": float(n - bundle.sizes[name]) for name, n in learned.sizes.items()}
    return learned, learned.served.state.costs | costs | more | {"late": float(n_events - n_new)}


def popularity_state(bundle: Bundle, new: EncodedEvents) -> State:
    """Return a popularity model that has counted the events of the first version."""
    served = bundle.served
    counted = new.events[: len(new.events) - len(served.pending)]
    return absorb_block(State(PopularitySpec().build(0)), counted, len(served.users), served.state.model.n_items)


def _interest_changes(before: State, after: State) -> dict[str, float]:
    """Count users who have more interests than before, and users who have fewer. Empty for models without interests."""
    if before.interests is None or after.interests is None:
        return {}
    n = min(before.interests.n_users, after.interests.n_users) + 1
    had_U, have_U = before.interests.offsets_U.diff()[:n], after.interests.offsets_U.diff()[:n]
    known_U = had_U > 0
    return {
        "gained_interests": float((known_U & (have_U > had_U)).sum()),
        "lost_interests": float((known_U & (have_U < had_U)).sum()),
    }


def _head_item_ids(served: ServedState) -> pl.Series:
    """Return the ids of the most popular items, which together had half of the recent events."""
    counts_I = served.counts.model.counts_I.double()
    rows_I = counts_I.argsort(descending=True, stable=True)
    ahead_I = counts_I[rows_I].cumsum(0) - counts_I[rows_I]
    return served.items.ids(rows_I[(ahead_I < counts_I.sum() / 2) & (rows_I > 0)])


def earlier_stats(chain: list[Manifest]) -> list[DeliveryStats]:
    """Return the statistics of the deliveries that led to the live version, oldest first.

    The rows of a suspicious user that somebody promoted are left out. They do not show what is usual.
    """
    learned = [m for m in chain[1:] if DAY_KEY in m.data and not m.is_separate]
    try:
        days = [[*m.data.get(DEFERRED_DAYS_KEY, []), m.data[DAY_KEY]] for m in learned]
        return [DeliveryStats(**day) for of_version in days for day in of_version]
    except TypeError as error:
        raise StateError(
            f"A manifest of an earlier version has invalid delivery statistics ({error}). Restore it from a backup."
        ) from None


def _no_holdout_reason(day: DeliveryStats) -> str:
    return "all rows are late" if day.share_late == 1 else "the delivery has too few rows to hold any out"


def first_queries(queries: Queries) -> Queries:
    """Return the first queries, a random sample because the queries are in random order."""
    return queries[torch.arange(min(N_HOLDOUT_QUERIES, len(queries)))]
