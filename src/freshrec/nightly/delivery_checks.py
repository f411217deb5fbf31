"""Checks of deliveries: times in the future, rows that `fit --until` has learned, and batches without a version."""

from __future__ import annotations

from dataclasses import replace

import polars as pl

from freshrec.data.log import Log, events_from
from freshrec.data.moments import format_time, latest_plausible_time
from freshrec.errors import StateError
from freshrec.nightly.deferral import batches_of
from freshrec.recommender.bundle import Bundle
from freshrec.recommender.log_reading import refuse_future
from freshrec.store.event_log import EventLog
from freshrec.store.versions import Store, store_option, version_chain

UNTIL = " until "  # in the source of a first log, between the hash of its file and the moment of `fit --until`


def check_times(log: Log, bundle: Bundle, store: Store, event_log: EventLog) -> None:
    """Refuse a delivery whose events all lie in the future, and any delivery if the live version has learned such ones.

    After them, every real event is late. Raises LogError or StateError.
    """
    refuse_future(log)
    newest, latest = bundle.served.newest_time, latest_plausible_time()
    if not log.has_clock or newest is None or newest <= latest:
        return
    *earlier, live = version_chain(store)
    newest_times = dict(event_log.batches().select("batch", "last").iter_rows())
    chains = [earlier[: n + 1] for n in range(len(earlier))]
    good = [chain[-1].id for chain in chains if max(newest_times[batch] or 0 for batch in batches_of(chain)) <= latest]
    advice = "Fit a new store on a log with correct times."
    if good:
        command = f'freshrec rollback {good[-1]} --reason "times in the future" {store_option(store.folder)}'
        advice = f"Run `{command}`, then update again."
    raise StateError(
        f"Version {live.id} has learned an event of {format_time(newest)}, which is in the future. "
        f"So every real event would be late. {advice}"
    )


def unread_rows(log: Log, file_hash: str, event_log: EventLog) -> tuple[Log, str]:
    """Return the rows that `fit --until` left out, if this is the file of `fit`, and a sentence; else all rows and "".

    Only for logs without timestamps: there, nothing shows that two rows are the same event.
    """
    sources = event_log.batches()["source"]
    until = [source.removeprefix(file_hash + UNTIL) for source in sources if source.startswith(file_hash + UNTIL)]
    if not until or log.has_clock:
        return log, ""
    rest = events_from(log, until[0])
    n_known = len(log.frame) - len(rest)
    rest_log = replace(log, frame=rest.with_columns(time=pl.int_range(pl.len(), dtype=pl.Int64)))
    return rest_log, f"the first {n_known:,} rows were learned by `fit --until {until[0]}`; the others are read."


def waiting_batches(store: Store, log: EventLog) -> list[int]:
    """Return the batches of the log from which no version was made yet, in order.

    Raises StateError if the log lacks the batch of a version or has another delivery in its place, or if a manifest
    that may name a batch is damaged.
    """
    manifests, numbers = store.manifests(), store.version_numbers()
    learned = [(manifest.batch, manifest) for manifest in manifests if manifest.batch is not None]
    versions_by_batch = {batch: manifest.id for batch, manifest in learned}
    last = max(versions_by_batch.values(), default=0)  # versions follow the order of batches
    for number in numbers:
        if number > last:
            store.manifest(number)
    batches, sources = (log.batches()[name].to_list() for name in ("batch", "source"))
    if missing := sorted(versions_by_batch.keys() - set(batches)):
        raise StateError(
            f"{log.folder} lacks batch {missing[0]}, which a version has learned. Restore it from a backup."
        )
    source_of = dict(zip(batches, sources))
    for batch, manifest in learned:
        if manifest.source != source_of[batch]:
            raise StateError(
                f"Batch {batch} of {log.folder} is not the delivery that version {manifest.id} learned. "
                "Restore the log and the versions from the same backup."
            )
    if len(manifests) == len(numbers):  # a batch before others lacks a version if its folder was lost
        return [batch for batch in batches if batch not in versions_by_batch]
    return [batch for batch in batches if batch > max(versions_by_batch, default=0)]
