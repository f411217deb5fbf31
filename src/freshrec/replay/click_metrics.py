"""AUC and log loss as means over events, so that intervals and tests treat them as they treat every other metric."""

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.stats import rankdata

from freshrec.errors import unknown_name_error
from freshrec.learn.click_quality import Float64Array, auc, log_losses

Float32Array = NDArray[np.float32]


def auc_contributions(labels_N: Float32Array, p_N: Float32Array) -> Float64Array:
    """(N,): each event's share in the AUC of all; their mean is the AUC. nan where all were taken, or none.

    The first-order part of what an event adds: how often it stands on the right side of the events of the other kind,
    its difference from the AUC weighed by how rare its kind is. Resampled by user, they give the interval for an AUC of
    clustered data (Obuchowski, Biometrics 53, 1997); without clusters, DeLong's.
    """
    is_positive_N = labels_N > 0
    share_N, total_auc = np.empty(len(p_N)), auc(labels_N, p_N)
    if np.isnan(total_auc):
        return np.full(len(p_N), np.nan)
    rank_N = rankdata(p_N)
    for class_N in (is_positive_N, ~is_positive_N):
        n_others = len(p_N) - class_N.sum()
        below_M = (rank_N[class_N] - rankdata(p_N[class_N])) / n_others  # share of the other kind that is less likely
        share_N[class_N] = (below_M if class_N is is_positive_N else 1 - below_M) - total_auc
        share_N[class_N] *= len(p_N) / class_N.sum()
    return total_auc + share_N


CLICK_METRICS: dict[str, Callable[[Float32Array, Float32Array], Float64Array]] = {
    "auc": auc_contributions,
    "logloss": log_losses,
}
LOWER_IS_BETTER = {"logloss"}  # the lower the better


def find_click_metric(name: str) -> Callable[[Float32Array, Float32Array], Float64Array]:
    """The function (labels, probabilities) -> values, one an event, that `name` names. Raises OptionError."""
    if name not in CLICK_METRICS:
        raise unknown_name_error("metric of a log with exposures", name, CLICK_METRICS)
    return CLICK_METRICS[name]


def compute_click_metrics(predictions: pl.DataFrame, metrics: Sequence[str]) -> Float64Array:
    """(N, M): the value of each metric for each row, from its span's `label` and `p`.

    A span without both kinds of labels has no AUC: where that is among the metrics, all of them are nan there.
    """
    values_NM = np.empty((len(predictions), len(metrics)))
    for _, part in predictions.with_row_index("row").group_by("asked"):
        columns = part["label"].to_numpy(), part["p"].to_numpy()
        values_NM[part["row"].to_numpy()] = np.stack([find_click_metric(name)(*columns) for name in metrics], axis=1)
    values_NM[np.isnan(values_NM).any(1)] = np.nan
    return values_NM
