"""Which differences are larger than chance: bootstrap intervals, and paired tests corrected for their number.

The unit is always the user: queries of one user are not independent. What is covered is the chance of having met these
users and not others. Training seeds are averaged before anything is compared; a few seeds are too few to resample, so
look at them one by one before believing a small difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import stats

from freshrec.replay.metrics import Floats, per_user

Index = NDArray[np.int64]
METHOD, QUERY = ("model", "strategy"), ("span", "user", "target")
FIRST, SECOND = ({name: f"{name}_{end}" for name in METHOD} for end in "ab")
LEVEL = 0.95
RESAMPLES = 500  # of users, for an interval
FLIPS = 9999  # of signs, for a test: the smallest p is 2 / 10,000
DRAWN, FLIPPED = 100_000, 2_000_000  # resamples x users in memory at once: the fastest, and still small
COLUMNS = {
    "metric": pl.String, "model_a": pl.String, "strategy_a": pl.String, "model_b": pl.String, "strategy_b": pl.String,
    "difference": pl.Float64, "low": pl.Float64, "high": pl.Float64, "p": pl.Float64, "p_adjusted": pl.Float64,
    "n": pl.Int64,
}  # fmt: skip


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
        (np.arange(n_users),), means, vectorized=True, n_resamples=RESAMPLES, batch=max(1, DRAWN // n_users),
        confidence_level=LEVEL, method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return found.low + first_M, found.high + first_M


def paired_p(differences_UP: Floats, seed: int = 0) -> Floats:
    """(P,): two-sided p-values of "the mean difference is zero", one column of per-user differences per comparison.

    Sign-flip permutation test: if two methods are alike, each user's difference could as well have the other sign. It
    tests the mean, which is what is printed, and assumes no shape; users with a difference of zero neither help nor
    harm. With six equal wins, no losses and zeros elsewhere it says 2 / 2^6 = 0.03, where a t-test says 0.014;
    Wilcoxon's test is about ranks, and can contradict the sign of the mean. All comparisons share the flips.
    """
    n_users = len(differences_UP)
    if n_users == 1:
        return np.ones(differences_UP.shape[1])  # either sign is as likely: nothing is shown

    def means(signs_RU: Floats, axis: int) -> Floats:
        return np.round(signs_RU @ differences_UP / n_users, 12)  # equal sums must stay equal for ties to count

    test = stats.permutation_test(
        (np.ones(n_users),), means, permutation_type="samples", vectorized=True, n_resamples=FLIPS,
        batch=max(1, FLIPPED // n_users), rng=np.random.default_rng(seed),
    )  # fmt: skip
    p_P: Floats = test.pvalue
    return p_P


def compare(table: pl.DataFrame, seed: int = 0) -> pl.DataFrame:
    """Every pair of methods on the queries that both answered: difference (a - b), its interval, p, and p adjusted.

    `table` has a row per query with columns model, strategy, seed, span, user, target; all other columns are metrics.
    Values are averaged over seeds, then over each user's queries in all spans, then over users; `n` counts users.
    p_adjusted controls the false discovery rate (Benjamini-Hochberg) over all rows returned. Two methods without a
    common query are not compared.
    """
    metrics = [column for column in table.columns if column not in (*METHOD, "seed", *QUERY)]
    methods, users_Q, values_AQM = _arrange(table, metrics)
    found: list[pl.DataFrame] = []
    for m, metric in enumerate(metrics):
        for pairs_P2, common_Q in _pairs(~np.isnan(values_AQM[:, :, m])):
            _, means_UA = per_user(users_Q[common_Q], values_AQM[:, common_Q, m].T)
            first_P, second_P = pairs_P2.T
            differences_UP = means_UA[:, first_P] - means_UA[:, second_P]
            low_P, high_P = interval(differences_UP, seed)
            p_P = paired_p(differences_UP, seed)
            numbers = pl.DataFrame({"difference": differences_UP.mean(0), "low": low_P, "high": high_P, "p": p_P})
            names = methods[first_P].rename(FIRST), methods[second_P].rename(SECOND)
            part = pl.concat([*names, numbers], how="horizontal")
            found.append(part.with_columns(metric=pl.lit(metric), n=pl.lit(len(means_UA), pl.Int64)))
    if not found:
        return pl.DataFrame(schema=COLUMNS)
    result = pl.concat(found)
    adjusted = pl.Series("p_adjusted", stats.false_discovery_control(result["p"].to_numpy()))
    return result.with_columns(adjusted).select(COLUMNS.keys())


def _arrange(table: pl.DataFrame, metrics: list[str]) -> tuple[pl.DataFrame, NDArray[Any], Floats]:
    """The methods (A rows), each query's user (Q,), and the values (A, Q, M), averaged over seeds; NaN = no answer."""
    mean = table.group_by(*METHOD, *QUERY).agg(pl.col(metrics).mean())
    methods, queries = mean.select(METHOD).unique().sort(METHOD), mean.select(QUERY).unique().sort(QUERY)
    mean = mean.join(methods.with_row_index("method"), on=METHOD).join(queries.with_row_index("query"), on=QUERY)
    values_AQM = np.full((len(methods), len(queries), len(metrics)), np.nan)
    values_AQM[mean["method"].to_numpy(), mean["query"].to_numpy()] = mean.select(metrics).to_numpy()
    return methods, queries["user"].to_numpy(), values_AQM


def _pairs(answered_AQ: NDArray[np.bool_]) -> Iterator[tuple[Index, NDArray[np.bool_]]]:
    """The pairs of methods (P, 2), those with the same common queries together, and which queries (Q,) these are."""
    together: dict[bytes, list[tuple[int, int]]] = {}
    for a, b in combinations(range(len(answered_AQ)), 2):
        together.setdefault((answered_AQ[a] & answered_AQ[b]).tobytes(), []).append((a, b))
    for key, pairs in together.items():
        common_Q = np.frombuffer(key, dtype=bool)
        if common_Q.any():
            yield np.array(pairs), common_Q
