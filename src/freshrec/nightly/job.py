"""The nightly job: append a delivery to the log, update the live version, measure the result, promote or refuse it.

    delivery ──▶ log ──▶ batch ──▶ challenger ──▶ gate ──▶ version, live if it passes
                          │ The newest events are held out. Challenger and live version are compared on them,
                          ▼ and the next update learns them.
                         statistics of the delivery, compared with those of earlier deliveries

Every delivery becomes a batch of the log, and every batch becomes a version, in order. If the job is killed at any
moment, the next run continues from there. A batch that was refused or rolled back is learned again only on request.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from freshrec.data.catalog import Catalog
from freshrec.data.log import Log, filter_positives, keep_positives
from freshrec.errors import LogError, OptionError, StateError, TrainingError
from freshrec.files import file_checksum
from freshrec.models.absorb import absorb_block
from freshrec.models.popularity import PopularitySpec
from freshrec.nightly.delivery_stats import DeliveryStats, compute_delivery_stats, newest_time_before
from freshrec.nightly.full_retrain import GAIN_KEY, retrain_interval, start_from_scratch, updates_since_retrain
from freshrec.nightly.gate import GateLimits, HoldoutValues, Verdict, find_anomalies, judge_challenger
from freshrec.nightly.holdout import newest_queries, user_values
from freshrec.nightly.notes import Note, count_of, notes_of, with_notes
from freshrec.progress import report_progress
from freshrec.recommender.bundle import Bundle, learn_events, read_bundle, write_bundle
from freshrec.recommender.log_reading import EncodedEvents, encode_events, match_clock
from freshrec.recommender.served_state import ServedState
from freshrec.replay.measure import Queries
from freshrec.replay.significance import bootstrap_interval
from freshrec.store.event_log import AppendResult, EventLog
from freshrec.store.manifest import METRIC_KEY, RETRY_KEY, Manifest, MoveAction, VersionKind
from freshrec.store.versions import Store, version_chain
from freshrec.types import State

N_HOLDOUT_QUERIES = 250  # queries of a version that are kept to measure later versions
N_HOLDOUT_VERSIONS = 5  # number of latest versions whose queries are kept
HOLDOUT_SHARE, FIRST_HOLDOUT_SHARE = 0.2, 0.05  # held-out share of a delivery, and of the first log
MAX_HOLDOUT_EVENTS = 20_000  # held-out events at most
COMPARED_KEY = "compared_users"  # in a manifest's "data": users measured on the newest events, and on older ones


class NightlyJob:
    """Fit and update the versions of a store. The caller holds the store's lock."""

    def __init__(self, store: Store, limits: GateLimits = GateLimits(), full_every: str = "") -> None:  # noqa: B008
        self.store, self.limits, self.full_every = store, limits, full_every
        self.log = EventLog(store.folder / "log")  # all events that were ever delivered
        self._loaded: tuple[Manifest, Bundle] | None = None

    @property
    def bundle(self) -> Bundle:
        """The content of the live version, read once."""
        manifest = self.store.manifest(self.store.live)
        if self._loaded is None or self._loaded[0] != manifest:
            self._loaded = manifest, read_bundle(self.store.verified_files(manifest.id))
        return self._loaded[1]

    def fit_first_version(self, log: Log, source: str, bundle: Bundle) -> Manifest:
        """Fit the first version of an empty store and promote it.

        `source`: a hash of the log's bytes. `bundle`: an empty one, with model and strategy.
        """
        started_s = time.perf_counter()
        rows = interaction_rows(keep_positives(log).frame)
        report_progress(f"storing {count_of(len(rows), 'event')}")
        result = self.log.append(rows, source, log.has_clock)
        assert result.batch is not None  # the store is new, and the log has rows
        frame = self.log.read([result.batch])
        bundle = replace(bundle, read_options=replace(bundle.read_options, has_clock=log.has_clock))
        new = encode_events(bundle.served, frame)
        learned, numbers = _learn(bundle, new, FIRST_HOLDOUT_SHARE)
        metric, queries, notes = self.limits.metric, newest_queries(learned.served), []
        report_progress("measuring", detail=count_of(len(queries), "held-out query", "held-out queries"))
        if len(queries):
            states = {metric: learned.served.state, f"{metric} popularity": _popularity_state(learned, new)}
            for name, state in states.items():
                numbers[name] = float(user_values(state, queries, metric, len(learned.served.items)).mean())
        else:
            text = "The quality was not measured. No user of the newest events has an earlier event."
            notes.append(Note("not-measured", text))
        numbers |= {"asked": float(len(queries)), "wait_s": time.perf_counter() - started_s}
        day = compute_delivery_stats(
            frame, Catalog.empty(), Catalog.empty(), log.has_clock, None, result.n_duplicates, result.n_known
        )
        manifest = _new_manifest(self.store, learned, "fit", numbers).model_copy(
            update={"batch": result.batch, "source": source, "data": {"day": asdict(day)}}
        )
        learned = replace(learned, holdout_queries=(_first_queries(queries),))
        return self._go_live(with_notes(manifest, notes), learned, "fit")

    def append_delivery(self, log: Log, source: str) -> AppendResult:
        """Append the new events of a delivery to the log. `catch_up` then learns them.

        Raises LogError if the ids or timestamps have another type than those of the log.
        """
        log = match_types(log, self.bundle)
        frame, newest_times = interaction_rows(log.frame), (self.log.newest_time, self.bundle.served.newest_time)
        times = [time for time in newest_times if time is not None]
        if not log.has_clock and times:
            frame = frame.with_columns(pl.col("time") + max(times) + 1)
        return self.log.append(frame, source, log.has_clock, refused_batches(self.store))

    def catch_up(self, force: str = "") -> Iterator[Manifest]:
        """Make a version of each batch that has none yet, and yield it (see `learn_batch`).

        If an earlier run was killed before it promoted a version that had passed, that version is promoted first.
        """
        live, pointed_to = self.store.live, {move.to for move in self.store.moves()}
        for manifest in self.store.manifests():
            if manifest.goes_live and manifest.parent == live and manifest.id not in pointed_to:
                self.store.move_pointer(manifest.id, "update", "promotion completed after an interrupted run")
                live = manifest.id
        for batch in waiting_batches(self.store, self.log):
            yield self.learn_batch(batch, force)

    def relearn(self, number: int, force: str = "") -> Manifest:
        """Update the live version with the events of another version, which was refused or rolled back.

        The gate checks the delivery as it did at first. In particular, its times are compared with the newest event
        that was known then, so an event is not late because newer days were learned since.
        Raises OptionError if the live version has learned these events already.
        """
        batch = self.store.manifest(number).batch
        if batch is None or batch in batches_of(version_chain(self.store)):
            raise OptionError(f"--retry {number}: the live version has learned all events of version {number} already.")
        return self.learn_batch(batch, force, number)

    def add_unchanged_version(self, batch: int | None, source: str) -> Manifest:
        """Make a copy of the live version for a delivery without new events, and promote it."""
        live, bundle = self.store.live, self.bundle
        note = Note("unchanged", f"The delivery had no new events, so the model is that of version {live}.")
        manifest = _new_manifest(self.store, bundle, "no rows", {}).model_copy(
            update={"parent": live, "batch": batch, "source": source}
        )
        return self._go_live(with_notes(manifest, [note]), bundle, "update")

    def learn_batch(self, batch: int, force: str = "", retry_of: int | None = None) -> Manifest:
        """Make a version from a batch and promote it if it passes the gate, or if `force`, a reason, is given.

        Events that the live version has learned from other batches are left out. If training fails, the result is a
        refused copy of the live version, with the error as the reason. `retry_of`: the version whose events are learned
        again.
        """
        started_s, delivered = time.perf_counter(), self.log.read([batch])
        frame = self.log.rows_not_in(delivered, batches_of(version_chain(self.store)))
        source, n_duplicates, n_known = self.log.delivery_counts(batch)
        n_known += len(delivered) - len(frame)
        if not len(frame):
            return self.add_unchanged_version(batch, source)
        known_until = None if retry_of is None else newest_time_before(self.store, self.log, batch)
        try:
            manifest, challenger = self.make_challenger(frame, (n_duplicates, n_known), known_until)
        except (LogError, TrainingError) as error:
            manifest = _new_manifest(self.store, self.bundle, "update", {}).model_copy(
                update={"parent": self.store.live, "promoted": False, "reasons": [str(error)]}
            )
            challenger, force = self.bundle, ""
        notes = notes_of(manifest)
        if force and not manifest.promoted:
            notes.append(Note("forced", f"The gate refused this version. It was promoted by --force: {force}"))
        numbers = manifest.numbers | {"wait_s": time.perf_counter() - started_s}
        goes_live = manifest.promoted or bool(force)
        data = manifest.data | ({} if retry_of is None else {RETRY_KEY: retry_of})
        update = {"batch": batch, "source": source, "numbers": numbers, "goes_live": goes_live, "data": data}
        manifest = with_notes(manifest.model_copy(update=update), notes)
        if goes_live:
            return self._go_live(manifest, challenger, "update", force)
        return self.store.write_version(manifest, lambda folder: write_bundle(challenger, folder))

    def make_challenger(
        self, frame: pl.DataFrame, left_out: tuple[int, int] = (0, 0), known_until: int | None = None
    ) -> tuple[Manifest, Bundle]:
        """Update the live version with some rows and judge the result. Nothing is written.

        `left_out`: the numbers of duplicates and of known rows that are not in `frame`. `known_until`: time of the
        newest known event that the gate compares the rows with; None = that of the live version.
        """
        champion, chain = self.bundle, version_chain(self.store)
        day, first = self.delivery_stats(frame, left_out, known_until), chain[0]
        challenger, numbers = _learn(champion, encode_events(champion.served, frame), HOLDOUT_SHARE)
        growth = challenger.sizes["events"] / max(1, first.sizes["events"])
        numbers["full_s"] = first.numbers.get("update_s", 0.0) * growth
        queries = newest_queries(challenger.served)
        is_due = self.full_every and updates_since_retrain(chain) + 1 >= retrain_interval(self.full_every, chain)
        if is_due and len(queries):
            is_even_N = queries.users_N % 2 == 0  # these users decide between the two; the gate uses the others
            challenger, more = _try_full_retrain(self, challenger, frame, chain, queries[is_even_N.nonzero()[:, 0]])
            numbers, queries = numbers | more, queries[(~is_even_N).nonzero()[:, 0]]
        report_progress("comparing", detail=f"with version {self.store.live}")
        verdict, values = self._judge(day, champion, challenger, chain, queries)
        numbers |= verdict.numbers | _interest_changes(champion.served.state, challenger.served.state)
        manifest = _new_manifest(self.store, challenger, "update", numbers).model_copy(
            update={
                "parent": self.store.live,
                "data": {"day": asdict(day), METRIC_KEY: self.limits.metric, COMPARED_KEY: values.n_users},
                "promoted": verdict.promoted,
                "reasons": list(verdict.reasons),
            }
        )
        holdout_queries = (*champion.holdout_queries, _first_queries(queries))[-N_HOLDOUT_VERSIONS:]
        return with_notes(manifest, verdict.notes), replace(challenger, holdout_queries=holdout_queries)

    def delivery_stats(
        self, frame: pl.DataFrame, left_out: tuple[int, int] = (0, 0), known_until: int | None = None
    ) -> DeliveryStats:
        """Return the statistics of new rows. The arguments are those of `make_challenger`."""
        served = self.bundle.served
        newest_time = served.newest_time if known_until is None else known_until
        has_clock, head = self.bundle.read_options.has_clock, _head_item_ids(served)
        return compute_delivery_stats(frame, served.users, served.items, has_clock, newest_time, *left_out, head)

    def _judge(
        self, day: DeliveryStats, champion: Bundle, challenger: Bundle, chain: list[Manifest], queries: Queries
    ) -> tuple[Verdict, HoldoutValues]:
        """Return the gate's verdict and the values that it is based on."""
        metric, n_items = self.limits.metric, len(challenger.served.items)
        states = (challenger.served.state, champion.served.state)
        challenger_U, champion_U = (user_values(state, queries, metric, n_items) for state in states)
        # without the last queries: the live version has not learned their events either
        older = [past for past in champion.holdout_queries[:-1] if len(past)]
        challenger_O, champion_O = (
            np.concatenate([np.zeros(0), *(user_values(state, past, metric, n_items) for past in older)])
            for state in states
        )
        earlier = _earlier_stats(chain)
        earlier_values = [manifest.numbers[metric] for manifest in chain if metric in manifest.numbers]
        no_newest_reason = "" if len(challenger.served.pending) else _no_holdout_reason(day)
        values = HoldoutValues(challenger_U, champion_U, challenger_O, champion_O, earlier_values, no_newest_reason)
        return judge_challenger(day, earlier, values, self.limits), values

    def _go_live(self, manifest: Manifest, bundle: Bundle, action: MoveAction, reason: str = "") -> Manifest:
        manifest = self.store.write_version(manifest, lambda folder: write_bundle(bundle, folder))
        self.store.move_pointer(manifest.id, action, reason)
        self._loaded = manifest, bundle
        return manifest


def refused_batches(store: Store) -> list[int]:
    """Return the batches of refused versions and of those that were rolled back."""
    return sorted(set(batches_of(store.manifests())) - set(batches_of(version_chain(store))))


def batches_of(chain: list[Manifest]) -> list[int]:
    """Return the batches of the log that these versions were made from."""
    return [manifest.batch for manifest in chain if manifest.batch is not None]


def waiting_batches(store: Store, log: EventLog) -> list[int]:
    """Return the batches of the log from which no version was made yet, in order.

    Raises StateError if the log lacks the batch of a version, or if a manifest that may name a batch is damaged.
    """
    versions_by_batch = {manifest.batch: manifest.id for manifest in store.manifests() if manifest.batch is not None}
    last = max(versions_by_batch.values(), default=0)  # versions follow the order of batches
    for number in store.version_numbers():
        if number > last:
            store.manifest(number)
    batches = log.batches()["batch"].to_list()
    if missing := sorted(versions_by_batch.keys() - set(batches)):
        raise StateError(
            f"{log.folder} lacks batch {missing[0]}, which a version has learned. Restore it from a backup."
        )
    return [batch for batch in batches if batch > max(versions_by_batch, default=0)]


def _try_full_retrain(
    job: NightlyJob, challenger: Bundle, frame: pl.DataFrame, chain: list[Manifest], queries: Queries
) -> tuple[Bundle, dict[str, float]]:
    """Also do a full retrain. Return the better of the two results, and the gain and cost of the retrain."""
    started_s = time.perf_counter()
    report_progress("full retrain")
    empty, all_rows = start_from_scratch(job.bundle, job.log, chain, frame)
    new = encode_events(empty.served, all_rows)
    full = learn_events(empty, new, len(new.events) - len(challenger.served.pending))
    seconds, metric = time.perf_counter() - started_s, job.limits.metric
    if not len(queries):
        return challenger, {"full_s": seconds, GAIN_KEY: 0.0, "full_low": 0.0, "full_high": 0.0}
    values = [user_values(bundle.served.state, queries, metric, len(new.items)) for bundle in (full, challenger)]
    gain_U = values[0] - values[1]
    low, high = (float(end[0]) for end in bootstrap_interval(gain_U[:, None]))
    more = {GAIN_KEY: float(gain_U.mean()), "full_low": low, "full_high": high, "full_s": seconds}
    return (full if gain_U.mean() >= 0 else challenger), more


def match_types(log: Log, bundle: Bundle) -> Log:
    """Return a delivery without the timestamps that the store's log lacks. Raises LogError as `append_delivery`."""
    log = match_clock(log, bundle.read_options)
    for catalog, name in ((bundle.served.users, "user_id"), (bundle.served.items, "item_id")):
        catalog.normalize_ids(filter_positives(log.frame)[name])
    return log


def preview_delivery(job: NightlyJob, log: Log | None) -> dict[str, Any]:
    """Return the statistics of a delivery ("day") and its anomalies ("odd"). Raises LogError as `append_delivery`."""
    if log is None:
        return {"day": None, "odd": ["The delivery has no rows."]}
    day = job.delivery_stats(interaction_rows(match_types(log, job.bundle).frame))
    return {"day": asdict(day), "odd": find_anomalies(day, _earlier_stats(version_chain(job.store)), job.limits)}


def _head_item_ids(served: ServedState) -> pl.Series:
    """Return the ids of the most popular items, which together had half of the recent events."""
    counts_I = served.counts.model.counts_I.double()
    rows_I = counts_I.argsort(descending=True, stable=True)
    ahead_I = counts_I[rows_I].cumsum(0) - counts_I[rows_I]
    return served.items.ids(rows_I[(ahead_I < counts_I.sum() / 2) & (rows_I > 0)])


def _earlier_stats(chain: list[Manifest]) -> list[DeliveryStats]:
    """Return the statistics of the deliveries that led to the live version, oldest first."""
    try:
        return [DeliveryStats(**manifest.data["day"]) for manifest in chain[1:] if "day" in manifest.data]
    except TypeError as error:
        raise StateError(
            f"A manifest of an earlier version has invalid delivery statistics ({error}). Restore it from a backup."
        ) from None


def _no_holdout_reason(day: DeliveryStats) -> str:
    return "all rows are late" if day.share_late == 1 else "the delivery has too few rows to hold any out"


def _first_queries(queries: Queries) -> Queries:
    """Return the first queries, a random sample because the queries are in random order."""
    return queries[torch.arange(min(N_HOLDOUT_QUERIES, len(queries)))]


def interaction_rows(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the interactions of a log frame, without exposures (label 0). Categories and event ids become text."""
    frame = filter_positives(frame)
    return frame.with_columns(
        pl.col(name).cast(pl.String) for name in ("category", "event_id") if name in frame.columns
    )


def hash_source(path: Path) -> str:
    """Return a hash of the bytes of a file, or of all files of a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    checksums = [file_checksum(file) for file in files if file.is_file()]
    return checksums[0] if len(checksums) == 1 else hashlib.sha256("".join(checksums).encode()).hexdigest()


def _learn(bundle: Bundle, new: EncodedEvents, share: float) -> tuple[Bundle, dict[str, float]]:
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


def _popularity_state(bundle: Bundle, new: EncodedEvents) -> State:
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


def _new_manifest(store: Store, bundle: Bundle, kind: VersionKind, numbers: dict[str, float]) -> Manifest:
    return Manifest(
        id=store.next_number,
        kind=kind,
        recipe=bundle.recipe,
        spans_seen=bundle.served.state.spans_seen,
        sizes=bundle.sizes,
        held=len(bundle.served.pending),
        numbers=numbers,
    )
