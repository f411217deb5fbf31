"""AUC and log loss as means over events, so that intervals and tests treat them as they treat every other metric."""

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.stats import rankdata

from freshrec.errors import unknown
from freshrec.learn.clicks import Floats, auc, log_losses

Column = NDArray[np.float32]


def auc_shares(labels_N: Column, p_N: Column) -> Floats:
    """(N,): each event's share in the AUC of all; their mean is the AUC. nan where all were taken, or none.

    The first-order part of what an event adds: how often it stands on the right side of the events of the other kind,
    its difference from the AUC weighed by how rare its kind is. Resampled by user, they give the interval for an AUC of
    clustered data (Obuchowski, Biometrics 53, 1997); without clusters, DeLong's.
    """
    taken_N = labels_N > 0
    ahead_N, whole = np.empty(len(p_N)), auc(labels_N, p_N)
    if np.isnan(whole):
        return np.full(len(p_N), np.nan)
    rank_N = rankdata(p_N)
    for mine_N in (taken_N, ~taken_N):
        others = len(p_N) - mine_N.sum()
        below_M = (rank_N[mine_N] - rankdata(p_N[mine_N])) / others  # share of the other kind that is less likely
        ahead_N[mine_N] = (below_M if mine_N is taken_N else 1 - below_M) - whole
        ahead_N[mine_N] *= len(p_N) / mine_N.sum()
    return whole + ahead_N


CLICK_METRICS: dict[str, Callable[[Column, Column], Floats]] = {"auc": auc_shares, "logloss": log_losses}
DOWN = {"logloss"}  # the lower the better


def click_metric(name: str) -> Callable[[Column, Column], Floats]:
    """The function (labels, probabilities) -> values, one an event, that `name` names. Raises OptionError."""
    if name not in CLICK_METRICS:
        raise unknown("metric of a log with exposures", name, CLICK_METRICS)
    return CLICK_METRICS[name]


def evaluate_clicks(asked: pl.DataFrame, metrics: Sequence[str]) -> Floats:
    """(N, M): the value of each metric for each row, from its span's `label` and `p`.

    A span without both kinds of labels has no AUC: where that is among the metrics, all of them are nan there.
    """
    values_NM = np.empty((len(asked), len(metrics)))
    for _, part in asked.with_row_index("row").group_by("asked"):
        columns = part["label"].to_numpy(), part["p"].to_numpy()
        values_NM[part["row"].to_numpy()] = np.stack([click_metric(name)(*columns) for name in metrics], axis=1)
    values_NM[np.isnan(values_NM).any(1)] = np.nan
    return values_NM
