"""Metrics of a ranked list with one relevant item, computed from the rank of that item. They are fractions from 0 to 1.

A query is one target with the history before it. The best item has rank 1. If scores tie, the rank is the middle of
the tied places (1.5, 2.0, ...). It is infinite if the item was never seen before or got no score. Every query counts in
the denominator, misses included; users without a query do not count. A user with several targets has several queries.
Metrics are averaged within each user first (`mean_per_user`), then over users.

With one target per query, recall@k equals hr@k. The ideal list has its only hit at rank 1, so
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
    """A function of ranks (Q,) and k with values (Q,) from 0 to 1, and its description."""

    function: Callable[[Float64Array, int], Float64Array]
    description: str


RANGE = "; 0 to 1, higher is better"

METRICS = {
    "hr": Metric(hr, "share of queries whose target is among the first k (hit rate)" + RANGE),
    "recall": Metric(hr, "share of the targets among the first k; equals hr with one target per query" + RANGE),
    "ndcg": Metric(ndcg, "hr, discounted by 1 / log2(1 + rank)" + RANGE),
    "mrr": Metric(mrr, "hr, discounted by 1 / rank (mean reciprocal rank)" + RANGE),
}


SAMPLED_SUFFIX = re.compile(r" among (\d+) sampled$")


def n_sampled_items(names: Sequence[str]) -> int:
    """Number of sampled items in names such as "recall@20 among 999 sampled"; 0 = all. Raises OptionError if mixed."""
    numbers = {int(found[1]) if (found := SAMPLED_SUFFIX.search(name)) else 0 for name in names}
    if len(numbers) > 1:
        raise OptionError(
            'The metrics rank among different numbers of items. Use the same "among N sampled" for all, or for none.'
        )
    return numbers.pop() if numbers else 0


def parse_metric(name: str) -> tuple[Metric, int]:
    """Return the metric and k of "ndcg@20" or "ndcg@20 among 999 sampled". Raises OptionError for any other name."""
    metric, at, k = SAMPLED_SUFFIX.sub("", name).partition("@")
    if metric not in METRICS:
        raise unknown_name_error("metric", metric, METRICS)
    if not (at and k.isdecimal() and int(k) > 0):
        raise OptionError(f'Metric "{name[:60]}" needs the length of the list. Write "{metric}@20".')
    return METRICS[metric], int(k)


def compute_metrics(ranks_Q: NDArray[Any], names: Sequence[str]) -> Float64Array:
    """Value of each metric for each query, shape (Q, M).

    Raises OptionError for an unknown metric and TrainingError for a NaN.
    """
    ranks_Q = np.asarray(ranks_Q, dtype=np.float64)
    if not np.all(ranks_Q >= 1):  # NaN is not >= 1 either
        raise TrainingError("A target has no rank because a score is not a number. Train with a lower learning rate.")
    values = [metric.function(ranks_Q, k) for metric, k in map(parse_metric, names)]
    return np.stack(values, axis=1)


def mean_per_user(users_Q: NDArray[Any], values_QM: Float64Array) -> tuple[NDArray[Any], Float64Array]:
    """Sorted unique users (U,), and the mean of the values over each user's queries, shape (U, M)."""
    users_U, index_Q, n_U = np.unique(users_Q, return_inverse=True, return_counts=True)
    sums = [np.bincount(index_Q, column, minlength=len(users_U)) for column in values_QM.T]
    return users_U, np.stack(sums, axis=1) / n_U[:, None]
