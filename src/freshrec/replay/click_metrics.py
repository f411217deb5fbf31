"""AUC and log loss as means over events, so that intervals and tests apply to them like to any other metric."""

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.stats import rankdata

from freshrec.errors import unknown_name_error
from freshrec.learn.click_quality import Float64Array, auc, log_losses

Float32Array = NDArray[np.float32]


def auc_contributions(labels_N: Float32Array, p_N: Float32Array) -> Float64Array:
    """Contribution of each event to the AUC, shape (N,); the mean is the AUC. NaN if all labels are equal.

    It is the first-order part of an event's effect. The share of events with the other label that are ranked correctly
    against it, minus the AUC, is weighted by the rarity of its label. Resampling users gives the interval for the AUC
    of clustered data (Obuchowski, Biometrics 53, 1997). Without clusters it is DeLong's interval.
    """
    is_positive_N = labels_N > 0
    share_N, total_auc = np.empty(len(p_N)), auc(labels_N, p_N)
    if np.isnan(total_auc):
        return np.full(len(p_N), np.nan)
    rank_N = rankdata(p_N)
    for class_N in (is_positive_N, ~is_positive_N):
        n_others = len(p_N) - class_N.sum()
        below_M = (rank_N[class_N] - rankdata(p_N[class_N])) / n_others  # share of the other label with a lower p
        share_N[class_N] = (below_M if class_N is is_positive_N else 1 - below_M) - total_auc
        share_N[class_N] *= len(p_N) / class_N.sum()
    return total_auc + share_N


CLICK_METRICS: dict[str, Callable[[Float32Array, Float32Array], Float64Array]] = {
    "auc": auc_contributions,
    "logloss": log_losses,
}
LOWER_IS_BETTER = {"logloss"}
_COVERAGE = {
    "auc": "auc compares every clicked exposure with every unclicked one",
    "logloss": "logloss is the mean over all exposures",
}


def find_click_metric(name: str) -> Callable[[Float32Array, Float32Array], Float64Array]:
    """Return the function (labels, probabilities) -> one value per event. Raises OptionError for an unknown name."""
    if name not in CLICK_METRICS:
        raise unknown_name_error("metric of a log with exposures", name, CLICK_METRICS)
    return CLICK_METRICS[name]


def describe_click_averaging(metrics: Sequence[str]) -> str:
    """Say what the value of each metric in a span is computed from: all exposures at once, whoever the user is."""
    return f"Within a span, {', and '.join(_COVERAGE[m] for m in metrics)}. Users with more exposures weigh more."


def compute_click_metrics(predictions: pl.DataFrame, metrics: Sequence[str]) -> Float64Array:
    """Value of each metric for each row, shape (N, M), from the columns `label` and `p` of the row's span.

    A span with only one kind of label has no AUC. If AUC is requested, all metrics are NaN in such a span.
    """
    values_NM = np.empty((len(predictions), len(metrics)))
    for _, part in predictions.with_row_index("row").group_by("asked"):
        columns = part["label"].to_numpy(), part["p"].to_numpy()
        values_NM[part["row"].to_numpy()] = np.stack([find_click_metric(name)(*columns) for name in metrics], axis=1)
    values_NM[np.isnan(values_NM).any(1)] = np.nan
    return values_NM
