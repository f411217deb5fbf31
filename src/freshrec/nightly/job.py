"""The nightly job: take a delivery, learn from it, test the result, and let it go live or not.

    delivery ──▶ log ──▶ batch ──▶ challenger ──▶ gate ──▶ version, live if it passes
                          │ its newest events are held back: on them challenger and live version are compared,
                          ▼ and the next update learns from them
                         statistics of the day, compared with those of the days before

Every delivery becomes a batch of the log, and every batch a version, in order: whatever moment the job dies, the next
run goes on where it was. A batch that was refused or rolled back is not learnt from again, unless asked for.
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
from freshrec.nightly.delivery_stats import DeliveryStats, compute_delivery_stats
from freshrec.nightly.full_retrain import GAIN_KEY, retrain_interval, start_from_scratch, updates_since_retrain
from freshrec.nightly.gate import GateLimits, HoldoutValues, Verdict, find_anomalies, judge_challenger
from freshrec.nightly.holdout import newest_queries, user_values
from freshrec.recommender.bundle import Bundle, learn_events, read_bundle, write_bundle
from freshrec.recommender.log_reading import EncodedEvents, encode_events, match_clock
from freshrec.recommender.served_state import ServedState
from freshrec.replay.measure import Queries
from freshrec.replay.significance import bootstrap_interval
from freshrec.store.event_log import AppendResult, EventLog
from freshrec.store.manifest import Manifest, MoveAction, VersionKind
from freshrec.store.versions import Store, version_chain
from freshrec.types import State

N_HOLDOUT_QUERIES, N_HOLDOUT_VERSIONS = 250, 5  # queries of a version that later ones rank; of how many versions
HOLDOUT_SHARE, FIRST_HOLDOUT_SHARE = 0.2, 0.05  # of a day, and of the first log, is held back to be tested on
MAX_HOLDOUT_EVENTS = 20_000  # events


class NightlyJob:
    """Work on a store that nobody else changes meanwhile."""

    def __init__(self, store: Store, limits: GateLimits = GateLimits(), full_every: str = "") -> None:  # noqa: B008
        self.store, self.limits, self.full_every = store, limits, full_every
        self.log = EventLog(store.folder / "log")  # every event that was ever delivered
        self._loaded: tuple[Manifest, Bundle] | None = None

    @property
    def bundle(self) -> Bundle:
        """What the live version holds."""
        manifest = self.store.manifest(self.store.live)
        if self._loaded is None or self._loaded[0] != manifest:
            self._loaded = manifest, read_bundle(self.store.verified_files(manifest.id))
        return self._loaded[1]

    def fit_first_version(self, log: Log, source: str, bundle: Bundle) -> Manifest:
        """The first version, live at once; `bundle` knows nothing yet, `source` is a hash of the delivery."""
        started_s = time.perf_counter()
        result = self.log.append(interaction_rows(keep_positives(log).frame), source, log.has_clock)
        assert result.batch is not None  # the store is new, and the log has rows
        frame = self.log.read([result.batch])
        bundle = replace(bundle, read_options=replace(bundle.read_options, has_clock=log.has_clock))
        new = encode_events(bundle.served, frame)
        learnt, numbers = _learn(bundle, new, FIRST_HOLDOUT_SHARE)
        metric, queries, notes = self.limits.metric, newest_queries(learnt.served), []
        if len(queries):
            states = {metric: learnt.served.state, f"{metric} popularity": _popularity_state(learnt, new)}
            for name, state in states.items():
                numbers[name] = float(user_values(state, queries, metric, len(learnt.served.items)).mean())
        else:
            notes.append("no user of the newest events has an event before, so nothing could be asked.")
        numbers |= {"asked": float(len(queries)), "wait_s": time.perf_counter() - started_s}
        day = compute_delivery_stats(
            frame, Catalog.empty(), Catalog.empty(), log.has_clock, None, result.n_duplicates, result.n_known
        )
        manifest = _new_manifest(self.store, learnt, "fit", numbers).model_copy(
            update={"batch": result.batch, "source": source, "data": {"day": asdict(day)}, "notes": notes}
        )
        return self._go_live(manifest, replace(learnt, holdout_queries=(_first_queries(queries),)), "fit")

    def append_delivery(self, log: Log, source: str) -> AppendResult:
        """Append what was taken in a delivery to the log, but for what is there already; `catch_up` then learns it.

        LogError where its ids or its clock are of another kind than those before.
        """
        log = match_clock(log, self.bundle.read_options)
        served, frame = self.bundle.served, interaction_rows(log.frame)
        for catalog, name in ((served.users, "user_id"), (served.items, "item_id")):
            catalog.normalize_ids(frame[name])
        times = [time for time in (self.log.newest_time, served.newest_time) if time is not None]
        if not log.has_clock and times:
            frame = frame.with_columns(pl.col("time") + max(times) + 1)
        return self.log.append(frame, source, log.has_clock, rejected_batches(self.store))

    def catch_up(self, force: str = "") -> Iterator[Manifest]:
        """A version of each batch that waits, as `learn_batch` makes them.

        First of all, a version that was to go live when its maker died does so.
        """
        live, pointed_to = self.store.live, {move.to for move in self.store.moves()}
        for manifest in self.store.manifests():
            if manifest.goes_live and manifest.parent == live and manifest.id not in pointed_to:
                self.store.move_pointer(manifest.id, "update", "its maker died before")
                live = manifest.id
        for batch in waiting_batches(self.store, self.log):
            yield self.learn_batch(batch, force)

    def relearn(self, number: int, force: str = "") -> Manifest:
        """A version that has learnt from the events of another, which was refused or left by a rollback."""
        batch = self.store.manifest(number).batch
        if batch is None or batch in batches_of(version_chain(self.store)):
            raise OptionError(f"the live version has learnt all that version {number} had; nothing is left to take.")
        return self.learn_batch(batch, force, is_late=True)

    def add_unchanged_version(self, batch: int | None, source: str) -> Manifest:
        """A version like the live one, of a day that brought nothing."""
        live, bundle = self.store.live, self.bundle
        note = "nothing was delivered that anybody took and that is new: the model is that of the version before."
        manifest = _new_manifest(self.store, bundle, "no rows", {}).model_copy(
            update={"parent": live, "batch": batch, "source": source, "notes": [note]}
        )
        return self._go_live(manifest, bundle, "update")

    def learn_batch(self, batch: int, force: str = "", is_late: bool = False) -> Manifest:
        """A version that has learnt from a batch, live if it passes the gate, or by `force`, which says why.

        Events that other batches have taught the live version since are left out. Where learning fails, a version like
        the live one is refused, with the reason. `is_late`: that the events are old is known.
        """
        started_s, delivered = time.perf_counter(), self.log.read([batch])
        frame = self.log.rows_not_in(delivered, batches_of(version_chain(self.store)))
        source, n_duplicates, n_known = self.log.delivery_counts(batch)
        n_known += len(delivered) - len(frame)
        if not len(frame):
            return self.add_unchanged_version(batch, source)
        try:
            manifest, challenger = self.make_challenger(frame, (n_duplicates, n_known), is_late)
        except (LogError, TrainingError) as problem:
            manifest = _new_manifest(self.store, self.bundle, "update", {}).model_copy(
                update={"parent": self.store.live, "promoted": False, "reasons": [str(problem)]}
            )
            challenger, force = self.bundle, ""
        notes = [*manifest.notes, *([f"let go live by force: {force}"] if force and not manifest.promoted else [])]
        numbers = manifest.numbers | {"wait_s": time.perf_counter() - started_s}
        goes_live = manifest.promoted or bool(force)
        update = {"batch": batch, "source": source, "notes": notes, "numbers": numbers, "goes_live": goes_live}
        manifest = manifest.model_copy(update=update)
        if goes_live:
            return self._go_live(manifest, challenger, "update", force)
        return self.store.write_version(manifest, lambda folder: write_bundle(challenger, folder))

    def make_challenger(
        self, frame: pl.DataFrame, left_out: tuple[int, int] = (0, 0), is_late: bool = False
    ) -> tuple[Manifest, Bundle]:
        """What becomes of the live version by learning these rows, and the gate's verdict on it; nothing is written."""
        champion, chain = self.bundle, version_chain(self.store)
        day, first = self.delivery_stats(frame, left_out, is_late), chain[0]
        challenger, numbers = _learn(champion, encode_events(champion.served, frame), HOLDOUT_SHARE)
        growth = challenger.sizes["events"] / max(1, first.sizes["events"])
        numbers["full_s"] = first.numbers.get("update_s", 0.0) * growth
        queries = newest_queries(challenger.served)
        is_due = self.full_every and updates_since_retrain(chain) + 1 >= retrain_interval(self.full_every, chain)
        if is_due and len(queries):
            is_even_N = queries.users_N % 2 == 0  # by these one of two is chosen, by the others it is judged
            challenger, more = _try_full_retrain(self, challenger, frame, chain, queries[is_even_N.nonzero()[:, 0]])
            numbers, queries = numbers | more, queries[(~is_even_N).nonzero()[:, 0]]
        verdict, new_queries = self._judge(day, champion, challenger, chain, queries)
        numbers |= verdict.numbers | _interest_changes(champion.served.state, challenger.served.state)
        manifest = _new_manifest(self.store, challenger, "update", numbers).model_copy(
            update={
                "parent": self.store.live,
                "data": {"day": asdict(day)},
                "notes": list(verdict.notes),
                "promoted": verdict.promoted,
                "reasons": list(verdict.reasons),
            }
        )
        holdout_queries = (*champion.holdout_queries, new_queries)[-N_HOLDOUT_VERSIONS:]
        return manifest, replace(challenger, holdout_queries=holdout_queries)

    def delivery_stats(
        self, frame: pl.DataFrame, left_out: tuple[int, int] = (0, 0), is_late: bool = False
    ) -> DeliveryStats:
        """The statistics of a day's rows, of which so many doubled and so many known ones were left out."""
        served = self.bundle.served
        newest_time = None if is_late else served.newest_time
        has_clock, head = self.bundle.read_options.has_clock, _head_item_ids(served)
        return compute_delivery_stats(frame, served.users, served.items, has_clock, newest_time, *left_out, head)

    def _judge(
        self, day: DeliveryStats, champion: Bundle, challenger: Bundle, chain: list[Manifest], queries: Queries
    ) -> tuple[Verdict, Queries]:
        """The gate's verdict, and the queries that later versions rank."""
        metric, n_items = self.limits.metric, len(challenger.served.items)
        states = (challenger.served.state, champion.served.state)
        challenger_U, champion_U = (user_values(state, queries, metric, n_items) for state in states)
        # without the last ones, from which the live version has not learnt either
        older = [past for past in champion.holdout_queries[:-1] if len(past)]
        challenger_O, champion_O = (
            np.concatenate([np.zeros(0), *(user_values(state, past, metric, n_items) for past in older)])
            for state in states
        )
        earlier = _earlier_stats(chain)
        earlier_values = [manifest.numbers[metric] for manifest in chain if metric in manifest.numbers]
        values = HoldoutValues(challenger_U, champion_U, challenger_O, champion_O, earlier_values)
        return judge_challenger(day, earlier, values, self.limits), _first_queries(queries)

    def _go_live(self, manifest: Manifest, bundle: Bundle, action: MoveAction, reason: str = "") -> Manifest:
        manifest = self.store.write_version(manifest, lambda folder: write_bundle(bundle, folder))
        self.store.move_pointer(manifest.id, action, reason)
        self._loaded = manifest, bundle
        return manifest


def rejected_batches(store: Store) -> list[int]:
    """Batches that versions have met and the live one has not learnt: refused, or left by a rollback."""
    return sorted(set(batches_of(store.manifests())) - set(batches_of(version_chain(store))))


def batches_of(chain: list[Manifest]) -> list[int]:
    """The batches of the log that these versions have met."""
    return [manifest.batch for manifest in chain if manifest.batch is not None]


def waiting_batches(store: Store, log: EventLog) -> list[int]:
    """Batches of the log that no version has met yet, in order.

    StateError where the log lacks one that a version has learnt, or where a damaged manifest may name one.
    """
    versions_by_batch = {manifest.batch: manifest.id for manifest in store.manifests() if manifest.batch is not None}
    last = max(versions_by_batch.values(), default=0)  # batches are met in order: earlier versions name no later ones
    for number in store.version_numbers():
        if number > last:
            store.manifest(number)
    batches = log.batches()["batch"].to_list()
    if missing := sorted(versions_by_batch.keys() - set(batches)):
        raise StateError(
            f"{log.folder} lacks batch {missing[0]}, which versions have learnt; restore it from a backup."
        )
    return [batch for batch in batches if batch > max(versions_by_batch, default=0)]


def _try_full_retrain(
    job: NightlyJob, challenger: Bundle, frame: pl.DataFrame, chain: list[Manifest], queries: Queries
) -> tuple[Bundle, dict[str, float]]:
    """A full retrain beside the update: the better one of the two, and what the retrain gained and cost."""
    started_s = time.perf_counter()
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


def preview_delivery(job: NightlyJob, log: Log | None) -> dict[str, Any]:
    """The statistics of a delivery, and what is odd about it; nothing is changed."""
    if log is None:
        return {"day": None, "odd": ["the delivery holds no rows."]}
    day, chain = job.delivery_stats(interaction_rows(log.frame)), version_chain(job.store)
    return {"day": asdict(day), "odd": find_anomalies(day, _earlier_stats(chain), job.limits)}


def _head_item_ids(served: ServedState) -> pl.Series:
    """The ids of the most popular items, which had half of the attention lately."""
    counts_I = served.counts.model.counts_I.double()
    rows_I = counts_I.argsort(descending=True, stable=True)
    ahead_I = counts_I[rows_I].cumsum(0) - counts_I[rows_I]
    return served.items.ids(rows_I[(ahead_I < counts_I.sum() / 2) & (rows_I > 0)])


def _earlier_stats(chain: list[Manifest]) -> list[DeliveryStats]:
    """The days that led to the live version, the oldest first."""
    try:
        return [DeliveryStats(**manifest.data["day"]) for manifest in chain[1:] if "day" in manifest.data]
    except TypeError as problem:
        raise StateError(f"a manifest of the live version's parents holds no facts of a day ({problem}).") from None


def _first_queries(queries: Queries) -> Queries:
    """The first ones: they are in random order."""
    return queries[torch.arange(min(N_HOLDOUT_QUERIES, len(queries)))]


def interaction_rows(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows that somebody took, as the log keeps them: exposures have label 0; categories and event ids are text."""
    frame = filter_positives(frame)
    return frame.with_columns(
        pl.col(name).cast(pl.String) for name in ("category", "event_id") if name in frame.columns
    )


def hash_source(path: Path) -> str:
    """A hash of the bytes of a file, or of all files of a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    checksums = [file_checksum(file) for file in files if file.is_file()]
    return checksums[0] if len(checksums) == 1 else hashlib.sha256("".join(checksums).encode()).hexdigest()


def _learn(bundle: Bundle, new: EncodedEvents, share: float) -> tuple[Bundle, dict[str, float]]:
    """What follows from learning all events but the newest `share` of those that are not late; what it cost."""
    started_s, started_cpu_s, newest_time = time.perf_counter(), time.process_time(), bundle.served.newest_time
    n_events = len(new.events)
    n_new = n_events if newest_time is None else int((new.events.times_E >= newest_time).sum())
    learnt = learn_events(bundle, new, n_events - min(MAX_HOLDOUT_EVENTS, round(share * n_new)))
    costs = {"update_s": time.perf_counter() - started_s, "update_cpu_s": time.process_time() - started_cpu_s}
    more = {f"new_{name}": float(n - bundle.sizes[name]) for name, n in learnt.sizes.items()}
    return learnt, learnt.served.state.costs | costs | more | {"late": float(n_events - n_new)}


def _popularity_state(bundle: Bundle, new: EncodedEvents) -> State:
    """Popularity, having counted what the first version has learnt from."""
    served = bundle.served
    learnt = new.events[: len(new.events) - len(served.pending)]
    return absorb_block(State(PopularitySpec().build(0)), learnt, len(served.users), served.state.model.n_items)


def _interest_changes(before: State, after: State) -> dict[str, float]:
    """How many users have more interests than before, and how many have fewer; nothing for models without."""
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
