"""Which differences are larger than chance: bootstrap intervals, and paired tests corrected for their number.

The unit is always the user: queries of one user are not independent. What is covered is the chance of having met these
users and not others. Differences weigh queries as the table of results does (`contributions`): they are differences of
its numbers. Training seeds are averaged before anything is compared; a few seeds are too few to resample, so look at
them one by one before believing a small difference.
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

from freshrec.replay.metrics import Floats
from freshrec.replay.recipe_schema import Equal, ReplayRecipe

Index = NDArray[np.int64]
Mask = NDArray[np.bool_]
METHOD, QUERY = ("model", "strategy"), ("span", "user", "target")
FIRST, SECOND = ({name: f"{name}_{end}" for name in METHOD} for end in "ab")
LEVEL = 0.95
RESAMPLES = 500  # of users, for an interval
GROUPS = 2_000  # of users, at most, whose signs are flipped
FLIPS = 9999  # of signs, for a test: the smallest p is 2 / 10,000
DRAWN, FLIPPED = 100_000, 2_000_000  # resamples x users in memory at once: the fastest, and still small
COLUMNS = {
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


def contributions(
    spans_Q: NDArray[Any],
    users_Q: NDArray[Any],
    values_QM: Floats,
    equal: Equal = ReplayRecipe.mean,
    centred: bool = False,
) -> Floats:
    """(U, M): what each user adds to the value of each metric, times U: the mean over users is the value.

    The value is the mean over spans of the mean over the span's users of the mean over the user's queries in it; where
    `equal` = "targets", of the mean over the span's queries; "pooled", the mean over all queries. `centred`: what each
    adds to the difference from the span's own mean, which is then added to all alike; to resample users, because a user
    who is drawn twice counts twice above and below the line.
    """
    if equal == "pooled":
        spans_Q, equal = np.zeros_like(spans_Q), "targets"
    spans_S, span_Q = np.unique(spans_Q, return_inverse=True)
    users_U, user_Q = np.unique(users_Q, return_inverse=True)
    n_spans, n_users = len(spans_S), len(users_U)
    own_Q = span_Q * n_users + user_Q
    n_SU = np.bincount(own_Q, minlength=n_spans * n_users)
    met_S = (n_SU.reshape(n_spans, n_users) > 0).sum(1)
    among_Q = met_S[span_Q] * n_SU[own_Q] if equal == "users" else np.bincount(span_Q)[span_Q]
    share_Q = n_users / (n_spans * among_Q)
    if not centred:
        return np.stack([np.bincount(user_Q, share_Q * value_Q, n_users) for value_Q in values_QM.T], axis=1)
    columns = []
    for value_Q in values_QM.T:
        mean_S = np.bincount(span_Q, share_Q * value_Q, n_spans) * n_spans / n_users
        columns.append(np.bincount(user_Q, share_Q * (value_Q - mean_S[span_Q]), n_users) + mean_S.mean())
    return np.stack(columns, axis=1)


def interval(values_UM: Floats, seed: int = 0) -> tuple[Floats, Floats]:
    """The ends (M,) and (M,) of 95 % bootstrap intervals of the mean over users, from one value per user and metric.

    Percentile bootstrap. All metrics share the drawn users. Needs at least one user; with one, or with equal values,
    both ends are that value.
    """
    n_users = len(values_UM)
    first_M = values_UM[0]
    if n_users == 1:
        return first_M, first_M
    above_UM = values_UM - first_M  # exactly zero where all values are equal

    def means(drawn_RU: Index, axis: int) -> Floats:
        n_draws = len(drawn_RU)
        cells = drawn_RU + n_users * np.arange(n_draws)[:, None]
        times_RU = np.bincount(cells.ravel(), minlength=n_draws * n_users).reshape(n_draws, n_users)
        means_MR: Floats = (times_RU.astype(np.float64) @ above_UM).T / n_users
        return means_MR

    found = stats.bootstrap(
        (np.arange(n_users),),
        means,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, DRAWN // n_users),
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return found.low + first_M, found.high + first_M


def paired_p(differences_UP: Floats, seed: int = 0) -> Floats:
    """(P,): two-sided p-values of "the mean difference is zero", one column of per-user differences per comparison.

    Sign-flip permutation test: if two methods are alike, each user's difference could as well have the other sign. It
    tests the mean, which is what is printed, and assumes no shape; users with a difference of zero neither help nor
    harm. With six equal wins, no losses and zeros elsewhere it says 2 / 2^6 = 0.03, where a t-test says 0.014;
    Wilcoxon's test is about ranks, and can contradict the sign of the mean. All comparisons share the flips. More than
    2,000 users are flipped in that many groups: what holds for each of them holds for their sums.
    """
    n_users = len(differences_UP)
    if n_users == 1:
        return np.ones(differences_UP.shape[1])  # either sign is as likely: nothing is shown
    if n_users > GROUPS:
        per_group = -(-n_users // GROUPS)
        padded_UP = np.pad(differences_UP, ((0, per_group * GROUPS - n_users), (0, 0)))
        differences_UP = padded_UP.reshape(per_group, GROUPS, -1).sum(0)

    def means(signs_RU: Floats, axis: int) -> Floats:
        return np.round(signs_RU @ differences_UP / n_users, 12)  # equal sums must stay equal for ties to count

    test = stats.permutation_test(
        (np.ones(len(differences_UP)),),
        means,
        permutation_type="samples",
        vectorized=True,
        n_resamples=FLIPS,
        batch=max(1, FLIPPED // len(differences_UP)),
        rng=np.random.default_rng(seed),
    )
    p_P: Floats = test.pvalue
    return p_P


@dataclass(frozen=True, eq=False)
class Answers:
    """What A methods gave on Q queries, in M metrics; NaN where a method did not answer."""

    methods: pl.DataFrame  # A rows
    queries: pl.DataFrame  # Q rows: span, user, target
    values_AQM: Floats
    equal: Equal = ReplayRecipe.mean

    @property
    def answered_AQ(self) -> Mask:
        return ~np.isnan(self.values_AQM[:, :, 0])

    def by_user(self, which_A: Index, which_Q: Mask, centred: bool = False) -> Floats:
        """(U, A, M): the `contributions` of the users of some queries; NaN for methods that did not answer them all."""
        values_AQM = self.values_AQM[which_A][:, which_Q]
        n_methods, n_queries, n_metrics = values_AQM.shape
        values_QN = values_AQM.transpose(1, 0, 2).reshape(n_queries, n_methods * n_metrics)
        spans_Q, users_Q = (self.queries[name].to_numpy()[which_Q] for name in ("span", "user"))
        return contributions(spans_Q, users_Q, values_QN, self.equal, centred).reshape(-1, n_methods, n_metrics)


def arrange(
    table: pl.DataFrame,
    metrics: Sequence[str],
    method: Sequence[str] = METHOD,
    equal: Equal = ReplayRecipe.mean,
) -> Answers:
    """The rows of `table` as arrays; what `method` does not tell apart, such as seeds, is averaged query by query."""
    mean = table.group_by(*method, *QUERY).agg(pl.col(metrics).mean())
    methods, queries = mean.select(method).unique().sort(method), mean.select(QUERY).unique().sort(QUERY)
    mean = mean.join(methods.with_row_index("method"), on=method).join(queries.with_row_index("query"), on=QUERY)
    values_AQM = np.full((len(methods), len(queries), len(metrics)), np.nan)
    values_AQM[mean["method"].to_numpy(), mean["query"].to_numpy()] = mean.select(metrics).to_numpy()
    return Answers(methods, queries, values_AQM, equal)


def compare(
    table: pl.DataFrame, metrics: Sequence[str], seed: int = 0, equal: Equal = ReplayRecipe.mean
) -> pl.DataFrame:
    """Every pair of methods on the queries that both answered: difference (a - b), its interval, p, and p adjusted.

    `table` has a row per query with columns model, strategy, seed, span, user, target, and the metrics. Values are
    averaged over seeds, then weighed by `contributions`; `n` counts users. p_adjusted controls the false discovery
    rate (Benjamini-Hochberg) over the pairs of one metric: another metric, or the same one by another name, changes
    nothing. Two methods without a common query are not compared.
    """
    answers = arrange(table, metrics, equal=equal)
    found: list[pl.DataFrame] = []
    for pairs_P2, common_Q in _pairs(answers.answered_AQ):
        first_P, second_P = pairs_P2.T
        everybody = np.arange(len(answers.methods))
        by_user_UAM, centred_UAM = (answers.by_user(everybody, common_Q, centred) for centred in (False, True))
        differences_UN, centred_UN = (
            (table_UAM[:, first_P] - table_UAM[:, second_P]).reshape(len(table_UAM), -1)  # NaN: methods of no pair here
            for table_UAM in (by_user_UAM, centred_UAM)
        )
        low_N, high_N = interval(centred_UN, seed)
        numbers = pl.DataFrame(
            {
                "metric": list(metrics) * len(pairs_P2),
                "difference": differences_UN.mean(0),
                "low": low_N,
                "high": high_N,
                "p": paired_p(differences_UN, seed),
            }
        )
        first_N, second_N = np.repeat(first_P, len(metrics)), np.repeat(second_P, len(metrics))
        names = answers.methods[first_N].rename(FIRST), answers.methods[second_N].rename(SECOND)
        n_users = pl.lit(len(differences_UN), pl.Int64).alias("n")
        found.append(pl.concat([*names, numbers], how="horizontal").with_columns(n_users))
    if not found:
        return pl.DataFrame(schema=COLUMNS)
    by_metric = pl.concat(found).group_by("metric", maintain_order=True)
    return pl.concat(_adjusted(tests) for _, tests in by_metric).select(COLUMNS.keys())


def _adjusted(tests: pl.DataFrame) -> pl.DataFrame:
    """The tests of one metric, with p_adjusted."""
    return tests.with_columns(pl.Series("p_adjusted", stats.false_discovery_control(tests["p"].to_numpy())))


def _pairs(answered_AQ: Mask) -> Iterator[tuple[Index, Mask]]:
    """The pairs of methods (P, 2), those with the same common queries together, and which queries (Q,) these are."""
    together: dict[bytes, list[tuple[int, int]]] = {}
    for a, b in combinations(range(len(answered_AQ)), 2):
        together.setdefault((answered_AQ[a] & answered_AQ[b]).tobytes(), []).append((a, b))
    for key, pairs in together.items():
        common_Q = np.frombuffer(key, dtype=bool)
        if common_Q.any():
            yield np.array(pairs), common_Q
