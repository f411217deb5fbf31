"""How well a model says what users take of what they are shown: probabilities, AUC, log loss."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from freshrec.data.batches import Targets, query_batches
from freshrec.data.carried import Carried
from freshrec.errors import TrainingError
from freshrec.types import ClickModel

Floats = NDArray[np.float64]


def clicks_of(model: ClickModel, targets: Targets, carried: Carried | None = None) -> Tensor:
    """(N,) how likely each target is taken. TrainingError where one is not a number."""
    p_N = torch.zeros(len(targets))
    for which, batch in query_batches(targets, model.spec.length, carried, size=4096):
        p_N[which] = model.clicks(batch, targets.items_N[which][:, None])[:, 0]
    if not bool(torch.isfinite(p_N).all()):
        raise TrainingError("a probability is not a number: the model diverged; lower its lr and train again.")
    return p_N


def auc(labels_N: NDArray[np.float32], p_N: NDArray[np.float32]) -> float:
    """The share of pairs, of one taken and one not, in which the taken one is more likely; ties count half.

    nan where all were taken, or none.
    """
    taken_N = labels_N > 0
    n_taken, n_not = int(taken_N.sum()), int((~taken_N).sum())
    if not n_taken or not n_not:
        return float("nan")
    ahead = rankdata(p_N)[taken_N].sum() - n_taken * (n_taken + 1) / 2
    return float(ahead / (n_taken * n_not))


def log_losses(labels_N: NDArray[np.float32], p_N: NDArray[np.float32]) -> Floats:
    """(N,) -ln p where taken and -ln(1 - p) where not; p is kept 1e-7 away from 0 and 1."""
    p = np.clip(p_N.astype(np.float64), 1e-7, 1 - 1e-7)
    losses: Floats = -np.where(labels_N > 0, np.log(p), np.log1p(-p))
    return losses
