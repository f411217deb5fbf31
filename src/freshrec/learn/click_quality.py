"""Quality of click predictions: probabilities, AUC, log loss."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from freshrec.data.batches import Targets, query_batches
from freshrec.data.stored_interests import StoredInterests
from freshrec.errors import TrainingError
from freshrec.types import ClickModel

Float64Array = NDArray[np.float64]


def target_click_probabilities(
    model: ClickModel, targets: Targets, stored_interests: StoredInterests | None = None
) -> Tensor:
    """Click probability of each target, shape (N,). Raises TrainingError if one is not finite."""
    p_N = torch.zeros(len(targets))
    for index, batch in query_batches(targets, model.spec.length, stored_interests, size=4096):
        p_N[index] = model.click_probabilities(batch, targets.items_N[index][:, None])[:, 0]
    if not bool(torch.isfinite(p_N).all()):
        raise TrainingError("A click probability is not finite, so the model diverged. Lower its lr and train again.")
    return p_N


def auc(labels_N: NDArray[np.float32], p_N: NDArray[np.float32]) -> float:
    """AUC: share of (clicked, not clicked) pairs in which the clicked one has the higher probability.

    Ties count half. Returns nan if all or none were clicked.
    """
    is_positive_N = labels_N > 0
    n_positive, n_negative = int(is_positive_N.sum()), int((~is_positive_N).sum())
    if not n_positive or not n_negative:
        return float("nan")
    n_ordered_pairs = rankdata(p_N)[is_positive_N].sum() - n_positive * (n_positive + 1) / 2
    return float(n_ordered_pairs / (n_positive * n_negative))


def log_losses(labels_N: NDArray[np.float32], p_N: NDArray[np.float32]) -> Float64Array:
    """-ln p for clicks and -ln(1 - p) for the others, shape (N,). p is clipped to [1e-7, 1 - 1e-7]."""
    p = np.clip(p_N.astype(np.float64), 1e-7, 1 - 1e-7)
    losses: Float64Array = -np.where(labels_N > 0, np.log(p), np.log1p(-p))
    return losses
