"""Metrics of one ranked list with one relevant item, from the rank of that item.

A query is one target with the history before it. Its rank is 1 for the best item, the middle of the tied places where
scores tie (1.5, 2.0, ...), and infinity where the target cannot be found: an item that was never seen before, or that
got no score. Every query counts in the denominator, misses too; users without a query do not count. A user with several
targets has several queries: metrics are averaged within the user first (`mean_per_user`), then over users.

With one target a query, recall@k is hr@k, and the ideal list has its only hit at rank 1, so that
mrr@k <= ndcg@k <= hr@k for each query.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from freshrec.errors import OptionError, TrainingError, unknown_name_error

Float64Array = NDArray[np.float64]


def hr(ranks_Q: Float64Array, k: int) -> Float64Array:
    """hr@k = 1[rank <= k]."""
    return (ranks_Q <= k).astype(np.float64)


def ndcg(ranks_Q: Float64Array, k: int) -> Float64Array:
    """ndcg@k = 1[rank <= k] / log2(1 + rank)."""
    return hr(ranks_Q, k) / np.log2(1 + ranks_Q)


def mrr(ranks_Q: Float64Array, k: int) -> Float64Array:
    """mrr@k = 1[rank <= k] / rank."""
    return hr(ranks_Q, k) / ranks_Q


@dataclass(frozen=True)
class Metric:
    """A function of ranks (Q,) and k with values (Q,) from 0 to 1, and what it says in words."""

    function: Callable[[Float64Array, int], Float64Array]
    description: str


METRICS = {
    "hr": Metric(hr, "share of queries whose target is among the first k (hit rate)"),
    "recall": Metric(hr, "share of the targets found among the first k; with one target a query the same as hr"),
    "ndcg": Metric(ndcg, "hr with a discount of 1 / log2(1 + rank)"),
    "mrr": Metric(mrr, "hr with a discount of 1 / rank (mean reciprocal rank)"),
}


SAMPLED_SUFFIX = re.compile(r" among (\d+) sampled$")


def n_sampled_items(names: Sequence[str]) -> int:
    """999 for names such as "recall@20 among 999 sampled", 0 where all items are ranked. OptionError for a mixture."""
    numbers = {int(found[1]) if (found := SAMPLED_SUFFIX.search(name)) else 0 for name in names}
    if len(numbers) > 1:
        raise OptionError("a replay ranks among all items or among one number of sampled ones; do not mix metrics.")
    return numbers.pop() if numbers else 0


def parse_metric(name: str) -> tuple[Metric, int]:
    """The metric and the k of a name such as "ndcg@20" or "ndcg@20 among 999 sampled". Raises OptionError."""
    metric, at, k = SAMPLED_SUFFIX.sub("", name).partition("@")
    if metric not in METRICS:
        raise unknown_name_error("metric", metric, METRICS)
    if not (at and k.isdecimal() and int(k) > 0):
        raise OptionError(f'metric "{name[:60]}" needs a number of items, from 1 up: write "{metric}@20".')
    return METRICS[metric], int(k)


def compute_metrics(ranks_Q: NDArray[Any], names: Sequence[str]) -> Float64Array:
    """(Q, M): the value of each metric for each query. Raises OptionError; TrainingError where a rank is not one."""
    ranks_Q = np.asarray(ranks_Q, dtype=np.float64)
    if not np.all(ranks_Q >= 1):  # NaN is not >= 1 either
        raise TrainingError("a target has no rank because a score is not a number; train with a lower learning rate.")
    values = [metric.function(ranks_Q, k) for metric, k in map(parse_metric, names)]
    return np.stack(values, axis=1)


def mean_per_user(users_Q: NDArray[Any], values_QM: Float64Array) -> tuple[NDArray[Any], Float64Array]:
    """The users (U,), each once and sorted, and the mean (U, M) of the values over each user's queries."""
    users_U, index_Q, n_U = np.unique(users_Q, return_inverse=True, return_counts=True)
    sums = [np.bincount(index_Q, column, minlength=len(users_U)) for column in values_QM.T]
    return users_U, np.stack(sums, axis=1) / n_U[:, None]
