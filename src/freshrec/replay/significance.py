"""Differences beyond chance: bootstrap intervals, and paired tests corrected for the number of comparisons.

The unit is the user, because the queries of one user are not independent. Intervals and tests cover the chance of
having these users and not others. They weight queries like the table of results (`user_contributions`), so each
difference is the difference of two numbers in it. Seeds are averaged before anything is compared. A few seeds are too
few to resample: look at them one by one before you trust a small difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import stats

from freshrec.replay.metrics import Float64Array
from freshrec.replay.recipe_schema import Averaging, ReplayRecipe

Int64Array = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
METHOD_COLUMNS, QUERY_COLUMNS = ("model", "strategy"), ("span", "user", "target")
FIRST_METHOD_COLUMNS, SECOND_METHOD_COLUMNS = ({name: f"{name}_{end}" for name in METHOD_COLUMNS} for end in "ab")
CONFIDENCE_LEVEL = 0.95
N_RESAMPLES = 500  # resamples of the users for an interval
MAX_FLIP_GROUPS = 2_000  # maximum number of groups of users whose signs are flipped together
N_PERMUTATIONS = 9999  # sign flips for a test; the smallest p is 2 / 10,000
BOOTSTRAP_BATCH, PERMUTATION_BATCH = 100_000, 2_000_000  # resamples x users in memory at once; measured as the fastest
TEST_SCHEMA = {
    "metric": pl.String,
    "model_a": pl.String,
    "strategy_a": pl.String,
    "model_b": pl.String,
    "strategy_b": pl.String,
    "difference": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "p": pl.Float64,
    "p_adjusted": pl.Float64,
    "n": pl.Int64,
}


def user_contributions(
    spans_Q: NDArray[Any],
    users_Q: NDArray[Any],
    values_QM: Float64Array,
    averaging: Averaging = ReplayRecipe.averaging,
    centred: bool = False,
) -> Float64Array:
    """Contribution of each user to the value of each metric, times U, shape (U, M); the mean over users is the value.

    With `averaging` = "users", queries are averaged by user, users by span, then spans. With "targets", queries are
    averaged by span, then spans. "pooled" is the mean over all queries. `centred` is for resampling users: a user who
    is drawn twice counts twice in numerator and denominator. Contributions are then relative to the mean of the span,
    and the mean over spans is added to each.
    """
    if averaging == "pooled":
        spans_Q, averaging = np.zeros_like(spans_Q), "targets"
    spans_S, span_Q = np.unique(spans_Q, return_inverse=True)
    users_U, user_Q = np.unique(users_Q, return_inverse=True)
    n_spans, n_users = len(spans_S), len(users_U)
    own_Q = span_Q * n_users + user_Q
    n_SU = np.bincount(own_Q, minlength=n_spans * n_users)
    n_users_S = (n_SU.reshape(n_spans, n_users) > 0).sum(1)
    n_equal_Q = n_users_S[span_Q] * n_SU[own_Q] if averaging == "users" else np.bincount(span_Q)[span_Q]
    share_Q = n_users / (n_spans * n_equal_Q)
    if not centred:
        return np.stack([np.bincount(user_Q, share_Q * value_Q, n_users) for value_Q in values_QM.T], axis=1)
    columns = []
    for value_Q in values_QM.T:
        mean_S = np.bincount(span_Q, share_Q * value_Q, n_spans) * n_spans / n_users
        columns.append(np.bincount(user_Q, share_Q * (value_Q - mean_S[span_Q]), n_users) + mean_S.mean())
    return np.stack(columns, axis=1)


def bootstrap_interval(values_UM: Float64Array, seed: int = 0) -> tuple[Float64Array, Float64Array]:
    """Lower and upper ends of 95 % bootstrap intervals of the mean over users, (M,) each, from values (U, M).

    This is the percentile bootstrap. All metrics share the drawn users. It needs at least one user. With one user, or
    with equal values, both ends are that value.
    """
    n_users = len(values_UM)
    first_M = values_UM[0]
    if n_users == 1:
        return first_M, first_M
    above_UM = values_UM - first_M  # exactly zero where all values are equal

    def means(drawn_RU: Int64Array, axis: int) -> Float64Array:
        n_draws = len(drawn_RU)
        cells = drawn_RU + n_users * np.arange(n_draws)[:, None]
        times_RU = np.bincount(cells.ravel(), minlength=n_draws * n_users).reshape(n_draws, n_users)
        means_MR: Float64Array = (times_RU.astype(np.float64) @ above_UM).T / n_users
        return means_MR

    found = stats.bootstrap(
        (np.arange(n_users),),
        means,
        vectorized=True,
        n_resamples=N_RESAMPLES,
        batch=max(1, BOOTSTRAP_BATCH // n_users),
        confidence_level=CONFIDENCE_LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),  # no named stream: published intervals and p-values use these draws
    ).confidence_interval
    return found.low + first_M, found.high + first_M


def paired_p_values(differences_UP: Float64Array, seed: int = 0) -> Float64Array:
    """Two-sided p-values of "the mean difference is zero", shape (P,), from differences (U, P) per user and comparison.

    This is the sign-flip permutation test: if two methods are equally good, each user's difference could have the other
    sign as well. It tests the mean, which is the number in the table, and assumes no distribution. Users with a
    difference of zero have no effect. Six equal wins, no losses and zeros elsewhere give 2 / 2^6 = 0.03, where a
    t-test gives 0.014. Wilcoxon's test compares ranks and can contradict the sign of the mean. All comparisons share
    the flips. More than 2,000 users are flipped in 2,000 groups, because the argument also holds for sums of users.
    """
    n_users = len(differences_UP)
    if n_users == 1:
        return np.ones(differences_UP.shape[1])  # both signs are equally likely, so one user shows nothing
    if n_users > MAX_FLIP_GROUPS:
        per_group = -(-n_users // MAX_FLIP_GROUPS)
        padded_UP = np.pad(differences_UP, ((0, per_group * MAX_FLIP_GROUPS - n_users), (0, 0)))
        differences_UP = padded_UP.reshape(per_group, MAX_FLIP_GROUPS, -1).sum(0)

    def means(signs_RU: Float64Array, axis: int) -> Float64Array:
        return np.round(signs_RU @ differences_UP / n_users, 12)  # equal sums must stay equal, so that ties are counted

    test = stats.permutation_test(
        (np.ones(len(differences_UP)),),
        means,
        permutation_type="samples",
        vectorized=True,
        n_resamples=N_PERMUTATIONS,
        batch=max(1, PERMUTATION_BATCH // len(differences_UP)),
        rng=np.random.default_rng(seed),  # no named stream: published intervals and p-values use these draws
    )
    p_P: Float64Array = test.pvalue
    return p_P


@dataclass(frozen=True, eq=False)
class QueryMetrics:
    """Values of M metrics for A methods on Q queries; NaN where a method did not answer."""

    methods: pl.DataFrame  # A rows
    queries: pl.DataFrame  # Q rows: span, user, target
    values_AQM: Float64Array
    averaging: Averaging = ReplayRecipe.averaging

    @property
    def answered_AQ(self) -> BoolArray:
        return ~np.isnan(self.values_AQM[:, :, 0])

    def by_user(self, methods_A: Int64Array, is_included_Q: BoolArray, centred: bool = False) -> Float64Array:
        """`user_contributions` of some methods on some queries, (U, A, M); NaN where a method did not answer all."""
        values_AQM = self.values_AQM[methods_A][:, is_included_Q]
        n_methods, n_queries, n_metrics = values_AQM.shape
        values_QN = values_AQM.transpose(1, 0, 2).reshape(n_queries, n_methods * n_metrics)
        spans_Q, users_Q = (self.queries[name].to_numpy()[is_included_Q] for name in ("span", "user"))
        by_user_UN = user_contributions(spans_Q, users_Q, values_QN, self.averaging, centred)
        return by_user_UN.reshape(-1, n_methods, n_metrics)


def arrange_metrics(
    table: pl.DataFrame,
    metrics: Sequence[str],
    method_columns: Sequence[str] = METHOD_COLUMNS,
    averaging: Averaging = ReplayRecipe.averaging,
) -> QueryMetrics:
    """The rows of `table` as arrays. Each query is averaged over all other columns, such as the seed."""
    mean = table.group_by(*method_columns, *QUERY_COLUMNS).agg(pl.col(metrics).mean())
    methods = mean.select(method_columns).unique().sort(method_columns)
    queries = mean.select(QUERY_COLUMNS).unique().sort(QUERY_COLUMNS)
    mean = mean.join(methods.with_row_index("method"), on=method_columns)
    mean = mean.join(queries.with_row_index("query"), on=QUERY_COLUMNS)
    values_AQM = np.full((len(methods), len(queries), len(metrics)), np.nan)
    values_AQM[mean["method"].to_numpy(), mean["query"].to_numpy()] = mean.select(metrics).to_numpy()
    return QueryMetrics(methods, queries, values_AQM, averaging)


def compare_methods(
    table: pl.DataFrame, metrics: Sequence[str], seed: int = 0, averaging: Averaging = ReplayRecipe.averaging
) -> pl.DataFrame:
    """Compare every pair of methods on their common queries: difference (a - b), its interval, p and adjusted p.

    `table` has a row per query with columns model, strategy, seed, span, user, target and the metrics. Values are
    averaged over seeds, then weighted by `user_contributions`; `n` is the number of users. p_adjusted controls the
    false discovery rate (Benjamini-Hochberg) over all pairs in one metric, so other metrics do not change it. Two
    methods without a common query are not compared.
    """
    answers = arrange_metrics(table, metrics, averaging=averaging)
    found: list[pl.DataFrame] = []
    for pairs_P2, common_Q in _pairs_by_queries(answers.answered_AQ):
        first_P, second_P = pairs_P2.T
        all_methods_A = np.arange(len(answers.methods))
        by_user_UAM, centred_UAM = (answers.by_user(all_methods_A, common_Q, centred) for centred in (False, True))
        differences_UN, centred_UN = (
            (table_UAM[:, first_P] - table_UAM[:, second_P]).reshape(
                len(table_UAM), -1
            )  # NaN for methods that are in no pair here
            for table_UAM in (by_user_UAM, centred_UAM)
        )
        low_N, high_N = bootstrap_interval(centred_UN, seed)
        numbers = pl.DataFrame(
            {
                "metric": list(metrics) * len(pairs_P2),
                "difference": differences_UN.mean(0),
                "low": low_N,
                "high": high_N,
                "p": paired_p_values(differences_UN, seed),
            }
        )
        first_N, second_N = np.repeat(first_P, len(metrics)), np.repeat(second_P, len(metrics))
        first_methods = answers.methods[first_N].rename(FIRST_METHOD_COLUMNS)
        second_methods = answers.methods[second_N].rename(SECOND_METHOD_COLUMNS)
        n_users = pl.lit(len(differences_UN), pl.Int64).alias("n")
        found.append(pl.concat([first_methods, second_methods, numbers], how="horizontal").with_columns(n_users))
    if not found:
        return pl.DataFrame(schema=TEST_SCHEMA)
    by_metric = pl.concat(found).group_by("metric", maintain_order=True)
    return pl.concat(_adjust_p_values(tests) for _, tests in by_metric).select(TEST_SCHEMA.keys())


def _adjust_p_values(tests: pl.DataFrame) -> pl.DataFrame:
    """Add p_adjusted to the tests of one metric."""
    return tests.with_columns(pl.Series("p_adjusted", stats.false_discovery_control(tests["p"].to_numpy())))


def _pairs_by_queries(answered_AQ: BoolArray) -> Iterator[tuple[Int64Array, BoolArray]]:
    """Yield pairs of methods (P, 2) that have the same common queries, with the mask (Q,) of these queries."""
    groups: dict[bytes, list[tuple[int, int]]] = {}
    for a, b in combinations(range(len(answered_AQ)), 2):
        groups.setdefault((answered_AQ[a] & answered_AQ[b]).tobytes(), []).append((a, b))
    for key, pairs in groups.items():
        common_Q = np.frombuffer(key, dtype=bool)
        if common_Q.any():
            yield np.array(pairs), common_Q
