"""The nightly job: append a delivery to the log, update the live version, measure the result, promote or refuse it.

    delivery ──▶ log ──▶ batch ──▶ challenger ──▶ gate ──▶ version, live if it passes
                          │ The newest events are held out. Challenger and live version are compared on them,
                          ▼ and the next update learns them.
                         statistics of the delivery, compared with those of earlier deliveries

Every delivery becomes a batch of the log, and every batch becomes a version, in order. If the job is killed at any
moment, the next run continues from there. What becomes of a refused batch is written in `nightly/deferral.py`. A batch
that was rolled back is learned again only on request.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from math import inf
from pathlib import Path
from typing import Any

import polars as pl

from freshrec.data.catalog import Catalog
from freshrec.data.folders import list_parts
from freshrec.data.log import Log, filter_positives, keep_positives
from freshrec.errors import LogError, OptionError, TrainingError
from freshrec.files import file_checksum
from freshrec.nightly.attempts import challenge_again, challenge_with_deferred, failed_challenger
from freshrec.nightly.challenger import (
    DAY_KEY,
    FIRST_HOLDOUT_SHARE,
    NEW_USERS_KEY,
    Champion,
    Delivery,
    earlier_stats,
    first_queries,
    learn_with_holdout,
    popularity_state,
)
from freshrec.nightly.deferral import batches_of, find_deferral
from freshrec.nightly.delivery_checks import check_times, waiting_batches
from freshrec.nightly.delivery_stats import compute_delivery_stats, newest_time_before, share_of_new_users
from freshrec.nightly.gate import GateLimits, find_anomalies
from freshrec.nightly.holdout import newest_queries, user_values
from freshrec.nightly.notes import Note, count_of, notes_about_ids, with_notes
from freshrec.progress import report_progress
from freshrec.recommender.bundle import Bundle, read_bundle, write_bundle
from freshrec.recommender.log_reading import encode_events, match_clock, refuse_future
from freshrec.store.event_log import AppendResult, EventLog, log_of
from freshrec.store.log_fingerprint import require_same_log
from freshrec.store.manifest import (
    CLICKS_SUFFIX,
    RETRY_KEY,
    SEPARATE_SUFFIX,
    Manifest,
    MoveAction,
    VersionKind,
)
from freshrec.store.versions import Store, version_chain

# The numbers of a part of a delivery are not those of a delivery. Rows of one user are suspicious however few they are.
CLICK_LIMITS: dict[str, Any] = {"max_drop_factor": inf, "max_shortening_factor": inf}
SEPARATE_LIMITS: dict[str, Any] = CLICK_LIMITS | {"min_rows": 1}

MAX_SEPARATE_USERS = 5  # of a delivery; if more users have too many rows, the whole rest is refused


class NightlyJob:
    """Fit and update the versions of a store. The caller holds the store's lock."""

    def __init__(self, store: Store, limits: GateLimits = GateLimits(), full_every: str = "") -> None:  # noqa: B008
        self.store, self.limits, self.full_every = store, limits, full_every
        self.log = log_of(store)  # all events that were ever delivered
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
        refuse_future(log)
        rows = interaction_rows(keep_positives(log).frame)
        report_progress(f"storing {count_of(len(rows), 'event')}")
        result = self.log.append(rows, source, log.has_clock)
        assert result.batch is not None  # the store is new, and the log has rows
        frame = self.log.read([result.batch])
        bundle = replace(bundle, read_options=replace(bundle.read_options, has_clock=log.has_clock))
        new = encode_events(bundle.served, frame)
        learned, numbers = learn_with_holdout(bundle, new, FIRST_HOLDOUT_SHARE)
        metric, queries, notes = self.limits.metric, newest_queries(learned.served), notes_about_ids(rows)
        notes += [Note("converted-ids", " ".join(log.id_notes))] if log.id_notes else []
        report_progress("measuring", detail=count_of(len(queries), "held-out query", "held-out queries"))
        if len(queries):
            states = {metric: learned.served.state, f"{metric} popularity": popularity_state(learned, new)}
            for name, state in states.items():
                numbers[name] = float(user_values(state, queries, metric, len(learned.served.items)).mean())
        else:
            text = "The quality was not measured. No user of the newest events has an earlier event."
            notes.append(Note("not-measured", text))
        numbers |= {"asked": float(len(queries)), "wait_s": time.perf_counter() - started_s}
        day = compute_delivery_stats(
            frame, Catalog.empty(), Catalog.empty(), log.has_clock, None, result.n_duplicates, result.n_known
        )
        new_users = share_of_new_users(frame, FIRST_HOLDOUT_SHARE, self.limits.min_rows)
        manifest = _new_manifest(self.store, learned, "fit", numbers, result.batch).model_copy(
            update={"source": source, "data": {DAY_KEY: asdict(day), NEW_USERS_KEY: new_users}}
        )
        learned = replace(learned, holdout_queries=(first_queries(queries),))
        return self._go_live(with_notes(manifest, notes), learned, "fit")

    def append_delivery(self, log: Log, source: str) -> AppendResult:
        """Append the new events of a delivery to the log. `catch_up` then learns them.

        If one user has suspiciously many rows, they become a batch of their own. The gate refuses that batch, and the
        rest of the delivery is not lost.

        Raises LogError if the ids or timestamps have another type than those of the log, or lie in the future. Raises
        StateError if the log contradicts the live version, or if that version has learned events of the future.
        """
        require_same_log(self.store)
        log = match_types(log, self.bundle)
        check_times(log, self.bundle, self.store, self.log)
        frame, newest_times = interaction_rows(log.frame), (self.log.newest_time, self.bundle.served.newest_time)
        times = [time for time in newest_times if time is not None]
        if not log.has_clock and times:
            frame = frame.with_columns(pl.col("time") + max(times) + 1)
        ignored, parts = refused_batches(self.store), {-1: frame}
        if not (self.log.batches()["source"] == source).any():
            parts = self._separate_suspicious_users(frame, ignored)
        results = list[AppendResult]()
        for place, part in parts.items():
            part_source = source if place < 0 else f"{source} {place}{SEPARATE_SUFFIX}"
            result = self.log.append(part, part_source, log.has_clock, ignored)
            ignored += [batch for batch in (result.batch, result.repeated_batch) if batch is not None]
            results.append(result)
        rest = results.pop()
        return replace(
            rest,
            n_rows=rest.n_rows + sum(result.n_rows for result in results),
            n_duplicates=rest.n_duplicates + sum(result.n_duplicates for result in results),
            n_known=rest.n_known + sum(result.n_known for result in results),
            n_separate=sum(result.n_appended for result in results),
        )

    def _separate_suspicious_users(self, frame: pl.DataFrame, ignored: list[int]) -> dict[int, pl.DataFrame]:
        """Return the rows of each user who has too many of the new ones, and as the last part all other rows.

        The key of a part is the place of its first row in `frame`, -1 for the last part. So a part has the same key if
        the delivery is appended again. `ignored`: batches whose events are new too.
        """
        if not self.limits.separate:
            return {-1: frame}
        champion, rest, parts = self.champion(), frame, dict[int, pl.DataFrame]()
        new = self.log.rows_not_in(frame, set(self.log.batches()["batch"]) - set(ignored))
        while len(parts) < MAX_SEPARATE_USERS:
            user_id = champion.suspicious_user(new)
            is_separate = rest["user_id"].eq_missing(user_id)
            if not is_separate.any() or is_separate.all():
                break
            parts[(frame["user_id"] == user_id).arg_max() or 0] = rest.filter(is_separate)
            rest, new = rest.filter(~is_separate), new.filter(pl.col("user_id") != user_id)
        return parts | {-1: rest}

    def catch_up(self, force: str = "") -> Iterator[Manifest]:
        """Make a version of each batch that has none yet, and yield it (see `learn_batch`).

        If an earlier run was killed before it promoted a version that had passed, that version is promoted first.
        """
        require_same_log(self.store)
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
        manifest = _new_manifest(self.store, bundle, "no rows", {}, batch).model_copy(
            update={"parent": live, "source": source}
        )
        return self._go_live(with_notes(manifest, [note]), bundle, "update")

    def learn_batch(self, batch: int, force: str = "", retry_of: int | None = None) -> Manifest:
        """Make a version from a batch and promote it if it passes the gate, or if `force`, a reason, is given.

        Deferred batches are learned too (`nightly/deferral.py`). Events that the live version has learned from other
        batches are left out. If training fails, the result is a refused copy of the live version, with the error as
        the reason. `retry_of`: the version whose events are learned again, and no others.
        """
        started_s, delivered = time.perf_counter(), self.log.read([batch])
        frame = self.log.rows_not_in(delivered, batches_of(version_chain(self.store)))
        source, n_duplicates, n_known = self.log.delivery_counts(batch)
        if not len(frame):
            return self.add_unchanged_version(batch, source)
        champion, is_retry = self.champion(), retry_of is not None
        limits, notes = _limits_of_part(source)
        champion = replace(champion, limits=replace(self.limits, **limits))
        first = batch if is_retry else _corrected_batch(self.store, self.log, batch)
        known_until = None if first is None else _newest_time_before(self, first)
        left_out = n_duplicates, n_known + len(delivered) - len(frame)
        delivery = Delivery(batch, frame, champion.delivery_stats(frame, left_out, known_until))
        try:
            if retry_of is not None:
                found = challenge_again(champion, delivery, self._learned_with(retry_of))
            else:
                found = challenge_with_deferred(champion, delivery, find_deferral(self.store, self.limits))
        except (LogError, TrainingError) as error:
            found, force = failed_challenger(champion, delivery, error), ""
        verdict, notes = found.verdict, [*notes, *found.verdict.notes, *notes_about_ids(frame)]
        if force and not verdict.promoted:
            notes.append(Note("forced", f"The gate refused this version. It was promoted by --force: {force}"))
        goes_live = verdict.promoted or bool(force)
        numbers = found.numbers | {"wait_s": time.perf_counter() - started_s}
        manifest = _new_manifest(self.store, found.bundle, "update", numbers, batch).model_copy(
            update={
                "parent": self.store.live,
                "source": source,
                "data": found.data | ({RETRY_KEY: retry_of} if is_retry else {}),
                "promoted": verdict.promoted,
                "goes_live": goes_live,
                "reasons": list(verdict.reasons),
            }
        )
        manifest = with_notes(manifest, notes)
        if goes_live:
            return self._go_live(manifest, found.bundle, "update", force)
        return self.store.write_version(manifest, lambda folder: write_bundle(found.bundle, folder))

    def _learned_with(self, number: int) -> list[Manifest]:
        """Return the refused versions whose batches a version had learned besides its own, and the live one has not."""
        manifest, learned = self.store.manifest(number), batches_of(version_chain(self.store))
        by_batch = {other.batch: other for other in self.store.manifests() if other.batch != manifest.batch}
        return [by_batch[batch] for batch in manifest.batches if batch in by_batch and batch not in learned]

    def champion(self) -> Champion:
        """Return the live version as what challengers are made from and judged by."""
        return Champion.of(self.store, self.bundle, self.limits, self.full_every, self.log)

    def _go_live(self, manifest: Manifest, bundle: Bundle, action: MoveAction, reason: str = "") -> Manifest:
        manifest = self.store.write_version(manifest, lambda folder: write_bundle(bundle, folder))
        self.store.move_pointer(manifest.id, action, reason)
        self._loaded = manifest, bundle
        return manifest


def _limits_of_part(source: str) -> tuple[dict[str, Any], list[Note]]:
    """Return the limits and a note for a batch that was separated from its delivery; none for other batches."""
    if source.endswith(SEPARATE_SUFFIX):
        text = "These are the rows of one user, who has unusually many. The rest of the delivery is judged apart."
        return SEPARATE_LIMITS, [Note("separate", text)]
    if source.endswith(CLICKS_SUFFIX):
        text = "These are clicks of servers. Together with the file, they would look unusual, so each is judged apart."
        return CLICK_LIMITS, [Note("clicks", text)]
    return {}, []


def _newest_time_before(job: NightlyJob, batch: int) -> int | None:
    """Return the time of the newest event that was known before a batch, unless its version was rolled back since."""
    then, now = newest_time_before(job.store, job.log, batch), job.bundle.served.newest_time
    return then if then is None or now is None else min(then, now)


def refused_batches(store: Store) -> list[int]:
    """Return the batches of refused versions and of those that were rolled back."""
    return sorted(set(batches_of(store.manifests())) - set(batches_of(version_chain(store))))


def _corrected_batch(store: Store, log: EventLog, batch: int) -> int | None:
    """Return the first earlier batch of the same delivery, or one that the delivery may correct.

    A corrected batch is not learned, and its times overlap. The correction repeats known events, because the rest of
    the corrected delivery was learned.
    """
    batches, refused = log.batches(), refused_batches(store)
    source, _, n_known = log.delivery_counts(batch)
    file_source, is_clicks, _ = source.partition(CLICKS_SUFFIX)
    of_source = pl.col("source").str.starts_with(f"{file_source} ") & pl.col("source").str.ends_with(SEPARATE_SUFFIX)
    if is_clicks:  # they come after the batch of their file
        of_source |= pl.col("source") == file_source
    of_delivery = batches.filter(of_source)["batch"]
    if len(of_delivery) or not n_known:
        return of_delivery.min()  # type: ignore[return-value]
    new = batches.row(by_predicate=pl.col("batch") == batch, named=True)
    separate = batches.filter(
        pl.col("source").str.ends_with(SEPARATE_SUFFIX)
        & pl.col("batch").is_in(refused)
        & (pl.col("batch") < batch - 1),
        pl.col("first") <= new["last"],
        pl.col("last") >= new["first"],
    )
    return separate["batch"].min() if len(separate) else None  # type: ignore[return-value]


def match_types(log: Log, bundle: Bundle) -> Log:
    """Return a delivery with the ids of the store's types, and without timestamps if the store's log has none.

    Raises LogError as `append_delivery`.
    """
    log = match_clock(log, bundle.read_options)
    catalogs = {"user_id": bundle.served.users, "item_id": bundle.served.items}
    frame = log.frame.with_columns(catalog.normalize_ids(log.frame[name]) for name, catalog in catalogs.items())
    return replace(log, frame=frame)


def preview_delivery(job: NightlyJob, log: Log | None) -> dict[str, Any]:
    """Return the statistics of a delivery ("day") and its anomalies ("odd"). Raises LogError as `append_delivery`."""
    if log is None:
        return {"day": None, "odd": ["The delivery has no rows."]}
    day = job.champion().delivery_stats(interaction_rows(match_types(log, job.bundle).frame))
    return {"day": asdict(day), "odd": find_anomalies(day, earlier_stats(version_chain(job.store)), job.limits)}


def interaction_rows(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the interactions of a log frame, without exposures (label 0). Categories and event ids become text."""
    frame = filter_positives(frame)
    return frame.with_columns(
        pl.col(name).cast(pl.String) for name in ("category", "event_id") if name in frame.columns
    )


def hash_source(path: Path) -> str:
    """Return a hash of the bytes of a log: of its file, or of all its parts and the columns that their folders hold.

    Raises LogError if there is no log at `path`.
    """
    parts, _ = list_parts(path)
    checksums = [
        file_checksum(part.path) + (repr(sorted(part.values.items())) if part.values else "") for part in parts
    ]
    return checksums[0] if len(checksums) == 1 else hashlib.sha256("".join(checksums).encode()).hexdigest()


def _new_manifest(
    store: Store, bundle: Bundle, kind: VersionKind, numbers: dict[str, float], batch: int | None
) -> Manifest:
    return Manifest(
        id=max(store.next_number, batch or 0),  # no number is used twice, even if folders of versions were lost
        kind=kind,
        batch=batch,
        recipe=bundle.recipe,
        spans_seen=bundle.served.state.spans_seen,
        sizes=bundle.sizes,
        held=len(bundle.served.pending),
        numbers=numbers,
        log=log_of(store).fingerprint(),
    )
