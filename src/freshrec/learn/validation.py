"""Quality of a model on held-out targets, for choosing epochs and options."""

import numpy as np
import torch
from torch import Tensor

from freshrec.data.batches import Targets, mask_held_out, query_batches
from freshrec.data.stored_interests import StoredInterests
from freshrec.learn.click_quality import auc, target_click_probabilities
from freshrec.nn.ranking import target_ranks
from freshrec.types import ClickModel, TrainedModel

LIST_LENGTH = 20  # k of the ndcg and hit rate that the number of epochs is chosen by


def mean_ndcg(
    model: TrainedModel, targets: Targets, stored_interests: StoredInterests | None, k: int = LIST_LENGTH
) -> float:
    """Mean ndcg@k of some targets, or their AUC if they have labels."""
    if targets.labels_N is not None:
        return _target_auc(model, targets)
    return float(target_ndcg(model, targets, stored_interests, k).sum()) / max(len(targets), 1)


def target_ndcg(
    model: TrainedModel, targets: Targets, stored_interests: StoredInterests | None, k: int = LIST_LENGTH
) -> Tensor:
    """ndcg@k of each target, shape (N,). The same targets always come in the same order."""
    rank_N = _target_ranks(model, targets, stored_interests)
    return ((rank_N <= k) / torch.log2(1 + rank_N)).nan_to_num(0.0)


def hit_rate(
    model: TrainedModel, targets: Targets, stored_interests: StoredInterests | None, k: int = LIST_LENGTH
) -> float:
    """hr@k of some targets (ADER's recall@k), or their AUC if they have labels."""
    if targets.labels_N is not None:
        return _target_auc(model, targets)
    return float((_target_ranks(model, targets, stored_interests) <= k).sum()) / max(len(targets), 1)


def _target_auc(model: TrainedModel, targets: Targets) -> float:
    """AUC of targets with labels, or 0 if all labels are equal."""
    assert isinstance(model, ClickModel) and targets.labels_N is not None
    return float(
        np.nan_to_num(auc(targets.labels_N.cpu().numpy(), target_click_probabilities(model, targets).cpu().numpy()))
    )


def _target_ranks(model: TrainedModel, targets: Targets, stored_interests: StoredInterests | None) -> Tensor:
    """Rank of each target among all items, shape (N,). The order of the targets is arbitrary."""
    batches = query_batches(mask_held_out(targets), model.spec.length, stored_interests)
    return torch.cat(
        [torch.zeros(0), *(target_ranks(model, batch, targets.items_N[index]) for index, batch in batches)]
    )
