"""Pooled: a user is the mean of the vectors of the history's items, with a learned decay by age.

Each position predicts the next item. There are no attention and no layers. The model learns one decay rate, and two
vectors per item: one as a history item, and one as a candidate.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freshrec.config import HISTORY_LENGTH, Count, CountOrZero, Positive, check_options
from freshrec.nn.embedding_table import EmbeddingTable, embed, lookup_many
from freshrec.nn.layers import sampled_logits, sampled_softmax_loss
from freshrec.random_streams import stream_seed
from freshrec.types import Batch, Forward


@dataclass(frozen=True)
class PooledSpec:
    """Options of the pooled model."""

    d: Count = 64  # Dimensions of the user and item vectors.
    length: Count = HISTORY_LENGTH  # Number of most recent events per user that the model reads.
    lr: Positive = 0.004  # Learning rate of Adam.
    batch: Count = 48  # Windows per training step, each with up to `length` targets.
    negatives: Count = 512  # Random negative items per training step, shared by the batch.
    std: Positive = 0.04  # Standard deviation of the random values that new vectors start with.
    categories: CountOrZero = 0  # Number of category embeddings added to the item embeddings; 0 = off.

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> "Pooled":
        """Return a new model without users and items."""
        return Pooled(self, seed)


class Pooled(nn.Module):
    """A `VectorModel` with K = 1: u = sum_t w_t e_t / sum_t w_t, with w_t = exp(-decay age(t)). Ages are in events."""

    batch_format = "window"

    def __init__(self, spec: PooledSpec, seed: int) -> None:
        super().__init__()
        self.spec, self.seed, self.n_users, self.n_items = spec, seed, 0, 0
        self.moments: dict[str, Tensor] = {}
        self.taken = EmbeddingTable(spec.d, spec.std, stream_seed(seed, "taken"), spec.categories)
        self.items = EmbeddingTable(spec.d, spec.std, stream_seed(seed, "items"), spec.categories)
        self.fading = nn.Parameter(torch.tensor(-0.5))  # before softplus

    def grow(self, n_users: int, n_items: int) -> None:
        """Add rows for new users and items."""
        self.n_users, self.n_items = n_users, n_items
        self.taken.grow(n_items)
        self.items.grow(n_items)

    def forward(self, batch: Batch) -> Forward:
        """Return the sampled softmax loss over all positions with a target."""
        assert batch.targets_BT is not None and batch.negatives_N is not None
        real_BT, negative_N = batch.history_BT > 0, batch.negatives_N
        is_target_BT = real_BT & (batch.targets_BT > 0)
        target_B = batch.targets_BT[is_target_BT]
        history_BTD = self.taken.lookup(batch.history_BT)
        user_BD = (self._history_weights(real_BT) @ history_BTD)[is_target_BT]
        target_BD, negative_ND = lookup_many(self.items, target_B, negative_N)
        logits_BN = sampled_logits(user_BD, target_BD, negative_ND, target_B, negative_N)
        return Forward(sampled_softmax_loss(logits_BN), user_BD[:, None], target_BD, logits_BN)

    def _history_weights(self, real_BT: Tensor) -> Tensor:
        """Return the weights of past events at each position, (B, T, T). A row sums to 1, or to 0 without events."""
        step_T = torch.arange(real_BT.shape[1])
        age_TT = step_T[:, None] - step_T
        weight_TT = self._decay_weights(age_TT.clamp(min=0)) * (age_TT >= 0)
        weight_BTT = weight_TT * real_BT[:, None]
        total_BT1: Tensor = weight_BTT.sum(2, keepdim=True)
        return weight_BTT / total_BT1.clamp(min=1e-9)

    def user_vectors(self, batch: Batch) -> Tensor:
        """Return the user vectors (B, 1, D); 0 without a history."""
        if batch.history_BT.shape[1] == 0:
            return torch.zeros(len(batch), 1, self.spec.d)
        with torch.no_grad():
            age_T = torch.arange(batch.history_BT.shape[1] - 1, -1, -1)
            weight_BT = self._decay_weights(age_T) * (batch.history_BT > 0)
            weight_BT /= weight_BT.sum(1, keepdim=True).clamp_(min=1e-9)
            return weight_BT[:, None] @ embed(self.taken, batch.history_BT)

    def _decay_weights(self, age: Tensor) -> Tensor:
        """Return w for any ages, which are in events."""
        return torch.exp(-F.softplus(self.fading) * age)
