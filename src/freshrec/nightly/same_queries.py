"""Compare two versions on the same queries: held-out events that neither of them has learned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.data.histories import row_users
from freshrec.nightly.full_retrain import GAIN_KEY
from freshrec.nightly.gate import GateLimits
from freshrec.nightly.holdout import newest_queries, user_values
from freshrec.recommender.bundle import Bundle
from freshrec.recommender.served_state import ServedState
from freshrec.replay.measure import Queries
from freshrec.replay.significance import bootstrap_interval
from freshrec.store.manifest import Manifest

EVENT = ["user", "item", "time"]


def compare_on_same_queries(first: Bundle, second: Bundle, manifests: tuple[Manifest, Manifest]) -> dict[str, Any]:
    """Quality of both versions on the same queries, or the reason why there is none.

    Keys: metric, queries (their number), users, values (of the first and the second version), difference (second minus
    first, mean over users), low and high (ends of its 95 % interval). Otherwise: reason, one sentence.
    """
    metric = manifests[1].metric or manifests[0].metric or GateLimits().metric
    queries = shared_queries(first, second, manifests)
    if not len(queries):
        numbers = f"{manifests[0].id} and {manifests[1].id}"
        return {"reason": f"Versions {numbers} cannot be compared: they have no held-out events in common."}
    n_items = max(len(bundle.served.items) for bundle in (first, second))
    values = [user_values(bundle.served.state, queries, metric, n_items) for bundle in (first, second)]
    low, high = (float(end[0]) for end in bootstrap_interval((values[1] - values[0])[:, None]))
    means = [float(values_U.mean()) for values_U in values]
    return {
        "metric": metric,
        "queries": len(queries),
        "users": len(values[0]),
        "values": means,
        "difference": float((values[1] - values[0]).mean()),
        "low": low,
        "high": high,
    }


def shared_queries(first: Bundle, second: Bundle, manifests: tuple[Manifest, Manifest]) -> Queries:
    """Queries for the held-out events of either version that the other has not learned.

    A descendant of a version knows all its users and items under the same rows. It is compared with the version as the
    gate does it, on its own held-out events. Versions that were updated from a common parent number their new users
    and items differently: their queries hold those of the parent only.
    """
    second_queries = _held_out_queries(second.served, first.served, manifests[1])
    first_queries = _held_out_queries(first.served, second.served, manifests[0])
    is_in_both_N = _is_among(_query_events(first_queries, first.served), _pending_events(second.served))
    first_queries = first_queries[~is_in_both_N]
    if not len(first_queries) and _is_prefix(first.served, second.served):
        return second_queries
    if not len(second_queries) and _is_prefix(second.served, first.served):
        return first_queries
    states = first.served.state, second.served.state
    n_users = _n_common_rows(first.served.users.frame["id"], second.served.users.frame["id"])
    n_items = _n_common_rows(first.served.items.frame["id"], second.served.items.frame["id"])
    n_items = min(n_items, *(state.model.n_items for state in states))
    return _join_queries([_common_queries(part, n_users, n_items) for part in (first_queries, second_queries)])


def _held_out_queries(owner: ServedState, other: ServedState, manifest: Manifest) -> Queries:
    """The queries of a version's held-out events, without those that the other version has learned."""
    queries = newest_queries(owner)
    if GAIN_KEY in manifest.numbers:  # the gate chose between update and full retrain by the users in even rows
        queries = queries[queries.users_N % 2 == 1]
    return queries[~_is_among(_query_events(queries, owner), _learned_events(other))]


def _query_events(queries: Queries, owner: ServedState) -> pl.DataFrame:
    times_N = owner.pending.times_E[queries.events_N]
    return _event_frame(queries.users_N, queries.items_N, times_N)


def _pending_events(served: ServedState) -> pl.DataFrame:
    return _event_frame(served.pending.users_E, served.pending.items_E, served.pending.times_E)


def _learned_events(served: ServedState) -> pl.DataFrame:
    """The events that a version knows, without those that it holds out."""
    histories = served.counts.histories
    known = _event_frame(row_users(histories), histories.items_R, histories.times_R).group_by(EVENT).len()
    pending = _pending_events(served).group_by(EVENT).agg(n_pending=pl.len())
    counted = known.join(pending, on=EVENT, how="left")
    return counted.filter(pl.col("len") > pl.col("n_pending").fill_null(0)).select(EVENT)


def _event_frame(users: Tensor, items: Tensor, times: Tensor) -> pl.DataFrame:
    columns = zip(EVENT, (users, items, times))
    return pl.DataFrame({name: column.long().cpu().numpy() for name, column in columns})


def _is_among(events: pl.DataFrame, others: pl.DataFrame) -> Tensor:
    """(N,) bool: whether each event is one of the others. Both versions must number its user and item the same."""
    places = events.with_row_index("place").join(others.unique(), on=EVENT, how="semi")["place"]
    found_N = torch.zeros(len(events), dtype=torch.bool)
    found_N[torch.from_numpy(places.cast(pl.Int64).to_numpy(writable=True))] = True
    return found_N


def _n_common_rows(first: pl.Series, second: pl.Series) -> int:
    """The number of rows, from the first one, that have the same id in both catalogs."""
    n = min(len(first), len(second))
    is_different = first[:n].ne_missing(second[:n]) if first.dtype == second.dtype else pl.Series([True])
    return int(is_different.arg_max() or 0) if is_different.any() else n


def _is_prefix(first: ServedState, second: ServedState) -> bool:
    """Whether every user and item of the first has the same row in the second."""
    catalogs = ((first.users, second.users), (first.items, second.items))
    return all(_n_common_rows(catalog.frame["id"], other.frame["id"]) == len(catalog) for catalog, other in catalogs)


def _common_queries(queries: Queries, n_users: int, n_items: int) -> Queries:
    """The queries whose user and target both versions know. Histories and candidates hold items that both know."""
    queries = queries[(queries.users_N <= n_users) & (queries.items_N <= n_items)]
    histories_NT = queries.histories_NT.where(queries.histories_NT <= n_items, 0)
    order_NT = (histories_NT > 0).byte().argsort(dim=1, stable=True)  # padding to the left
    histories_NT = histories_NT.gather(1, order_NT)
    queries = replace(queries, histories_NT=histories_NT, n_items=n_items)
    return queries[(histories_NT > 0).any(1)]


def _join_queries(parts: list[Queries]) -> Queries:
    """All queries; shorter histories are padded on the left."""
    length = max(part.histories_NT.shape[1] for part in parts)
    histories = [F.pad(part.histories_NT, (length - part.histories_NT.shape[1], 0)) for part in parts]
    users_N, items_N, events_N, heldout_N = (
        torch.cat(columns)
        for columns in zip(*((part.users_N, part.items_N, part.events_N, part.heldout_N) for part in parts))
    )
    return Queries(users_N, torch.cat(histories), items_N, events_N, heldout_N, parts[0].n_items)
