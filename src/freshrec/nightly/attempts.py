"""The attempts to learn a delivery: with refused ones that are deferred, or alone, or after a lasting change."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace

import polars as pl

from freshrec.data.duplicates import EVENT_KEYS
from freshrec.errors import LogError, TrainingError
from freshrec.nightly.anomalies import gap_anomalies, population_anomalies
from freshrec.nightly.challenger import DAY_KEY, Challenger, Champion, Delivery
from freshrec.nightly.deferral import LASTING_CAUSES, Deferral, batches_of, causes_of, is_change, versions_text
from freshrec.nightly.delivery_stats import HOUR, DeliveryStats, longest_gap, share_unknown
from freshrec.nightly.gate import Verdict, content_anomalies, judge_failure
from freshrec.nightly.notes import Note
from freshrec.store.manifest import BLAMED_KEY, CAUSES_KEY, DEFERRED_DAYS_KEY, DEFERRED_KEY, Manifest

MAX_CLOCK_ERROR_S = 24 * 3600  # times may be ahead of the computer's clock by so much, for example by a time zone


def challenge_with_deferred(champion: Champion, delivery: Delivery, deferral: Deferral) -> Challenger:
    """Update with a delivery and deferred ones. If that is refused, update with the delivery alone.

    Raises LogError or TrainingError if training on the delivery alone fails.
    """
    day, recent, limits = delivery.stats, champion.recent_stats, champion.limits
    is_odd = content_anomalies(day, recent, limits) or _lasting_anomalies(day, champion)
    new_ids = [manifest for manifest in deferral.pending if "gap" not in causes_of(manifest)]
    tried = () if is_odd else (*deferral.tried, *recurring(champion, new_ids))
    together = _challenge_together(champion, delivery, tried, deferral.is_amount_confirmed) if tried else None
    if together is not None and together.verdict.promoted:
        return together
    alone = champion.challenge(delivery.frame, day, deferral.is_amount_confirmed)
    if alone.verdict.promoted:
        return _blame(alone, tried, together) if tried else alone
    if deferral.n_refused + 1 >= limits.max_refused_in_a_row:
        for attempt in (together, alone):
            if attempt is not None and attempt.verdict.causes == {"quality"}:
                return _accept(attempt, deferral.n_refused + 1)
    if len(deferral.changed) + 1 >= limits.max_refused_in_a_row and is_change(alone.verdict.causes):
        return _accept_change(champion, delivery, deferral.changed, alone) or alone
    return alone


def _accept_change(
    champion: Champion, delivery: Delivery, changed: Sequence[Manifest], alone: Challenger
) -> Challenger | None:
    """Accept a change that several deliveries in a row showed. None if they do not show the same change."""
    newest = int(delivery.frame["time"].to_numpy().max())
    if "gap" in alone.verdict.causes and newest > (time.time() + MAX_CLOCK_ERROR_S) * 1e6:
        return None
    newest_times = dict(champion.log.batches().select("batch", "last").iter_rows())
    changed = [m for m in changed if (newest_times.get(m.batch) or 0) <= newest]  # others have a wrong clock
    if len(changed) + 1 < champion.limits.max_refused_in_a_row:
        return None
    day = _stats_after_change(champion, delivery, changed)
    if _lasting_anomalies(day, champion):
        return None
    confirmed = recurring(champion, changed, delivery.frame)
    together = _challenge_together(champion, delivery, confirmed) if confirmed else None
    for attempt in (together, alone):
        if attempt is not None and "error" not in attempt.verdict.causes:
            accepted = _accept(attempt, len(changed) + 1)
            return replace(accepted, data=accepted.data | {DAY_KEY: asdict(day)})
    return None


def _lasting_anomalies(day: DeliveryStats, champion: Champion) -> list[str]:
    """Return the anomalies that are accepted if they last, and too few rows on the popular items."""
    recent, limits = champion.recent_stats, champion.limits
    return [*population_anomalies(day, recent, limits), *gap_anomalies(day, recent, limits)]


def challenge_again(champion: Champion, delivery: Delivery, refused: Sequence[Manifest]) -> Challenger:
    """Update with the deliveries of an earlier version again: its own, and refused ones that it had learned.

    Raises LogError or TrainingError if training fails.
    """
    together = _challenge_together(champion, delivery, refused) if refused else None
    return champion.challenge(delivery.frame, delivery.stats) if together is None else together


def failed_challenger(champion: Champion, delivery: Delivery, error: Exception) -> Challenger:
    """Return a refused copy of the live version, because training failed. An unusual delivery is a cause too."""
    verdict = judge_failure(str(error), delivery.stats, champion.recent_stats, champion.limits)
    data = {DAY_KEY: asdict(delivery.stats), CAUSES_KEY: sorted(verdict.causes)}
    return Challenger(champion.bundle, verdict, {}, data)


def _challenge_together(
    champion: Champion, delivery: Delivery, refused: Sequence[Manifest], is_amount_usual: bool = False
) -> Challenger | None:
    """Update with a delivery and those of refused versions; None if training fails."""
    batches = [manifest.batch for manifest in refused if manifest.batch is not None]
    wrong = [_corrected_rows(champion, batch, delivery) for batch in batches]
    rows = champion.log.read([*batches, delivery.batch])
    rows = champion.log.rows_not_in(rows, batches_of(champion.chain))
    for of_batch in wrong:
        rows = rows.join(of_batch.select(EVENT_KEYS), on=EVENT_KEYS, how="anti", maintain_order="left")
    try:
        found = champion.challenge(rows.sort("time", maintain_order=True), delivery.stats, is_amount_usual)
    except (LogError, TrainingError):
        return None
    # shares of unknown ids, and gaps, do not become usual through a change that was accepted
    usual = [m for m in refused if DAY_KEY in m.data and not causes_of(m) & LASTING_CAUSES]
    days = [manifest.data[DAY_KEY] for manifest in usual]
    note = Note("deferred", f"It also learned the events that were refused before ({versions_text(refused)}).")
    verdict = replace(found.verdict, notes=(*found.verdict.notes, note))
    return replace(found, verdict=verdict, data=found.data | {DEFERRED_KEY: batches, DEFERRED_DAYS_KEY: days})


def _corrected_rows(champion: Champion, batch: int, delivery: Delivery) -> pl.DataFrame:
    """Return the rows of a refused batch that a corrected file has left out, so they are wrong.

    A later delivery corrects the batch if it repeats at least half of the rows in its time range.
    """
    rows, log = champion.log.read([batch]), champion.log
    wrong = rows.clear()
    if not champion.bundle.read_options.has_clock:
        return wrong  # the same event is not recognised
    later = {other for other in batches_of(champion.chain) if other > batch} | {delivery.batch}
    for other in log.batches().filter(pl.col("batch").is_in(later)).iter_rows(named=True):
        during = rows.filter(pl.col("time").is_between(other["first"], other["last"]))
        missing = log.rows_not_in(during, [other["batch"]])
        missing = missing.join(log.read([other["batch"]]), on=EVENT_KEYS, how="anti")  # another event_id, same event
        if 2 * len(missing) <= len(during):
            wrong = pl.concat([wrong, missing])
    return wrong


def _accept(challenger: Challenger, n_refused: int) -> Challenger:
    """Accept what `n_refused` deliveries in a row showed."""
    verdict = challenger.verdict
    why = f"This is accepted, because {n_refused} deliveries in a row showed it."
    notes = [Note("accepted-loss", f"{reason} {why}") for reason in verdict.reasons]
    data = {key: value for key, value in challenger.data.items() if key != CAUSES_KEY}
    accepted = Verdict(True, notes=(*verdict.notes, *notes), numbers=verdict.numbers)
    return replace(challenger, verdict=accepted, data=data)


def _blame(alone: Challenger, refused: Sequence[Manifest], together: Challenger | None) -> Challenger:
    """Note that an update passed only without the deliveries of refused versions."""
    reasons = " ".join(("Training failed.",) if together is None else together.verdict.reasons)
    events = f"the events that were refused before ({versions_text(refused)})"
    note = Note("blamed", f"With {events}, it would be refused too: {reasons}")
    verdict = replace(alone.verdict, notes=(*alone.verdict.notes, note))
    return replace(alone, verdict=verdict, data=alone.data | {BLAMED_KEY: [manifest.batch for manifest in refused]})


def recurring(champion: Champion, refused: Sequence[Manifest], new_rows: pl.DataFrame | None = None) -> list[Manifest]:
    """Return those refused versions whose unknown ids came again, so that they are no mistake, or that had a gap only.

    Ids came again if the live version knows them now. With `new_rows`, the newest delivery and the other refused
    versions count too.
    """
    refused = refused[-champion.limits.n_recent_days :]
    batches = [manifest.batch for manifest in refused if manifest.batch is not None]
    rows = {batch: champion.log.read([batch]).select("user_id", "item_id") for batch in batches}
    found = []
    for manifest in refused:
        if manifest.batch is None:
            continue
        others = [] if new_rows is None else [new_rows, *(rows[batch] for batch in batches if batch != manifest.batch)]
        # the times confirm a delivery that was refused for a gap alone
        if "ids" not in causes_of(manifest) or _came_again(champion, manifest, rows[manifest.batch], others):
            found.append(manifest)
    return found


def _came_again(champion: Champion, manifest: Manifest, rows: pl.DataFrame, others: Sequence[pl.DataFrame]) -> bool:
    """Whether a share of the rows with unknown users, and of those with unknown items, have ids that came again."""
    served, limits, day = champion.bundle.served, champion.limits, manifest.data[DAY_KEY]
    for name, known in (("user", served.users), ("item", served.items)):
        ids, n_unknown = rows[f"{name}_id"], day[f"share_unknown_{name}s"] * len(rows)
        if not n_unknown or n_unknown < limits.max_rise * len(rows):
            continue  # too few to be a reason for the refusal, or their users were erased
        is_unknown = pl.Series(known.rows(ids).numpy() == 0)
        for other in others:
            is_unknown &= ~ids.is_in(other[f"{name}_id"].unique().implode())
        if 1 - is_unknown.sum() / n_unknown < limits.min_recurrence:
            return False
    return True


def _stats_after_change(champion: Champion, delivery: Delivery, changed: Sequence[Manifest]) -> DeliveryStats:
    """Return the statistics of a delivery as if the users, items and times of the last refused ones were known."""
    past = champion.log.read([manifest.batch for manifest in changed if manifest.batch is not None])
    served = champion.bundle.served
    spans = served.state.spans_seen
    users, items = served.users.extend(past["user_id"], spans), served.items.extend(past["item_id"], spans)
    hole_hours, times = delivery.stats.hole_hours, delivery.frame["time"]
    before = past.filter(pl.col("time") <= int(times.to_numpy().min()))["time"]
    if hole_hours is not None and len(before):
        hole_hours = longest_gap(times, int(before.to_numpy().max())) / HOUR
    return replace(
        delivery.stats,
        share_unknown_users=share_unknown(delivery.frame["user_id"], users),
        share_unknown_items=share_unknown(delivery.frame["item_id"], items),
        share_head=None,
        hole_hours=hole_hours,
    )
