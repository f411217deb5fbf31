"""What becomes of a refused delivery: the next updates learn it too, or it waits for `update --retry`.

The causes of a refusal decide:

    quality     The version was worse than the live one. The next update learns the delivery together with its own.
    amount      The delivery has unusually few or many rows. The next update learns it, so that it can be looked at.
    error       Training failed. As for quality.
    floor       The quality was far below that of earlier versions. It is learned once such a quality is usual.
    ids         Unusually many users or items are unknown. It is learned once the same ids came again, in deliveries
                that were learned, or in three refused ones in a row. A new catalogue stays, and a mistake does not.
    gap         The log stopped for long. It is learned if three refused deliveries in a row follow one another without
                a long gap, and end before the present. A log that comes back stays, and a wrong time does not.
    head        Clicks ignore the popular items. Only `update --retry` learns them.
    content     The events look wrong. Only `update --retry` learns them.

Nothing else is stored: the manifests of all versions say which deliveries are deferred (`find_deferral`). If three
updates pass only without a deferred delivery, it is set aside too.

A live version that was better than usual by chance must not refuse all later ones. So a loss of quality that three
deliveries in a row show is accepted: the events of different days are not all to blame.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from freshrec.nightly.gate import GateLimits, quality_floor
from freshrec.nightly.notes import number_ranges
from freshrec.store.manifest import BLAMED_KEY, CAUSES_KEY, Manifest
from freshrec.store.versions import Store, version_chain

DEFERRED_CAUSES = {"quality", "amount", "error"}
LASTING_CAUSES = {"ids", "gap"}  # accepted if they last
CHANGE_CAUSES = {*LASTING_CAUSES, "head", "floor", "quality", "amount", "error"}  # they may occur together


@dataclass(frozen=True)
class Deferral:
    """The deferred deliveries, and what the refusals since the last promotion mean for the next one."""

    versions: tuple[Manifest, ...] = ()  # refused versions of the deferred deliveries, oldest first
    tried: tuple[Manifest, ...] = ()  # those whose deliveries the next update learns with its own
    n_refused: int = 0  # refusals for quality alone since the last promotion
    pending: tuple[Manifest, ...] = ()  # refused for unknown ids or after a gap, and learned if later ones confirm them
    changed: tuple[Manifest, ...] = ()  # those of them that were refused since the last promotion
    is_amount_confirmed: bool = False  # the previous delivery was refused for its amount too


def versions_text(versions: Sequence[Manifest]) -> str:
    """Return the numbers of versions in words: "version 7", "versions 7, 8"."""
    return f"version{'s' if len(versions) > 1 else ''} {number_ranges([manifest.id for manifest in versions])}"


def find_deferral(store: Store, limits: GateLimits) -> Deferral:
    """Return which refused deliveries are deferred, from the manifests of the store."""
    manifests, chain = store.manifests(), version_chain(store)
    once_live = _once_live(store, manifests)  # if they were rolled back, that was somebody's decision
    left_out = {*batches_of(chain), *batches_of(once_live)}
    refused = {manifest.batch: manifest for manifest in manifests if manifest.batch not in {None, *left_out}}
    spoiled = Counter(batch for manifest in manifests for batch in manifest.data.get(BLAMED_KEY, []))
    floor = quality_floor(judged_values(manifests, chain, limits.metric), limits)
    deferred = [
        manifest
        for batch, manifest in refused.items()
        if spoiled[batch] < limits.max_spoiled_updates and _is_deferred(manifest, floor, limits.metric)
    ]
    tried = [manifest for manifest in deferred if not spoiled[manifest.batch]]
    if not tried and deferred:  # one at a time, so that a bad delivery does not hold up the others
        tried = [min(deferred, key=lambda manifest: spoiled[manifest.batch])]
    last = max((manifest.id for manifest in once_live if manifest.kind != "no rows"), default=0)
    since = [m for m in manifests if m.id > last and m.retry_of is None and not m.is_separate]
    n_refused = sum(causes_of(manifest) == {"quality"} for manifest in since)
    is_amount_confirmed = bool(since) and "amount" in causes_of(since[-1]) and since[-1] in deferred
    changes = [m for batch, m in refused.items() if is_change(causes_of(m)) and not spoiled[batch]]
    pending = [m for m in changes if m not in deferred and ("gap" not in causes_of(m) or m in since)]
    changed = [manifest for manifest in since if manifest in pending]
    return Deferral(tuple(deferred), tuple(tried), n_refused, tuple(pending), tuple(changed), is_amount_confirmed)


def is_change(causes: Collection[str]) -> bool:
    """Whether a refusal may show that the log has changed: its users or items, or its times after a long gap.

    New items explain why clicks ignore the popular ones. A gap does not.
    """
    is_explained = "ids" in causes or "head" not in causes
    return is_explained and bool(LASTING_CAUSES.intersection(causes)) and CHANGE_CAUSES.issuperset(causes)


def causes_of(manifest: Manifest) -> set[str]:
    """Return the causes of a refusal; none for versions of 0.1.0, whose events wait for `update --retry`."""
    return set(manifest.data.get(CAUSES_KEY, []))


def batches_of(versions: Iterable[Manifest]) -> list[int]:
    """Return the batches of the log that these versions were made from, ascending."""
    return sorted({batch for manifest in versions for batch in manifest.batches})


def judged_values(manifests: Sequence[Manifest], chain: Collection[Manifest], metric: str) -> list[float]:
    """Return the metric of each live version on its newest events, and of those that only the floor refused.

    With the latter, a lower quality becomes usual if it lasts.
    """
    known = {manifest.id for manifest in chain}
    known |= {m.id for m in manifests if causes_of(m) == {"floor"} and m.retry_of is None}
    return [m.numbers[metric] for m in manifests if m.id in known and metric in m.numbers]


def _once_live(store: Store, manifests: Sequence[Manifest]) -> list[Manifest]:
    """Return the versions that went live."""
    pointed_to = {move.to for move in store.moves()}
    return [m for m in manifests if m.goes_live or m.id in pointed_to]


def _is_deferred(manifest: Manifest, floor: float | None, metric: str) -> bool:
    causes = causes_of(manifest)
    if floor is None or manifest.numbers.get(metric, 0.0) >= floor:
        causes -= {"floor"}
    return bool(causes_of(manifest)) and causes <= DEFERRED_CAUSES
