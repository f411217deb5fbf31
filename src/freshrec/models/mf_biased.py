"""MF with biases: how likely a user takes an item, from one vector a user, one an item, and how each is inclined.

Differs from the MF of ASMG's study: where the log has no labels, each event gets one random item as its negative.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freshrec.config import Count, Positive, check_options
from freshrec.nn.embedding_table import EmbeddingTable
from freshrec.nn.layers import labelled_candidates
from freshrec.random_streams import stream_seed
from freshrec.types import Batch, Forward


@dataclass(frozen=True)
class BiasedMFSpec:
    """Options of MF with biases."""

    d: Count = 8  # of each vector, beside its bias
    length: Count = 30  # kept events a user; the model itself does not read them
    lr: Positive = 0.001
    batch: Count = 1024
    negatives: Count = 1024  # drawn for a batch, where the log has no labels: each row takes one of them
    std: Positive = 0.1  # of the vectors; biases start at 0

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> "BiasedMF":
        """A model without users and items."""
        return BiasedMF(self, seed)


class BiasedMF(nn.Module):
    """A `ClickModel`; the last number of each row is its bias, so that a strategy that maps rows maps it too."""

    batch_format = "click"

    def __init__(self, spec: BiasedMFSpec, seed: int) -> None:
        super().__init__()
        self.spec, self.seed, self.n_users, self.n_items = spec, seed, 0, 0
        self.moments: dict[str, Tensor] = {}
        self.users = EmbeddingTable(spec.d + 1, spec.std, stream_seed(seed, "users"))
        self.items = EmbeddingTable(spec.d + 1, spec.std, stream_seed(seed, "items"))

    def grow(self, n_users: int, n_items: int) -> None:
        """Make room for new users and items, without inclinations."""
        self.users.grow(n_users)
        self.items.grow(n_items)
        self.users.weights[self.n_users + 1 :, -1] = 0.0
        self.items.weights[self.n_items + 1 :, -1] = 0.0
        self.n_users, self.n_items = n_users, n_items

    def forward(self, batch: Batch) -> Forward:
        """Mean binary cross-entropy of the labels; without labels, of the target and of a random item beside it."""
        candidates_BN, label_BN = labelled_candidates(batch, self.n_items)
        user_BE = self.users.lookup(batch.users_B)
        items_BNE = self.items.lookup(candidates_BN)
        logits_BN = _logits(user_BE, items_BNE)
        return Forward(F.binary_cross_entropy_with_logits(logits_BN, label_BN), logits_BN=logits_BN)

    def score(self, batch: Batch, items: Tensor) -> Tensor:
        """The log-odds that the user takes each item: p_u q_i + b_u + b_i, without what is not known yet."""
        user_BE = self.users.weights[torch.where(batch.users_B <= self.n_users, batch.users_B, 0)]
        return _logits(user_BE, self.items.weights[torch.where(items <= self.n_items, items, 0)])

    def click_probabilities(self, batch: Batch, items: Tensor) -> Tensor:
        """(B, N) how likely the user takes each item."""
        return torch.sigmoid(self.score(batch, items))


def _logits(user_BE: Tensor, items: Tensor) -> Tensor:
    """(B, N) of items (N, E) shared or (B, N, E)."""
    items = items if items.ndim == 3 else items.expand(len(user_BE), -1, -1)
    products_BN = torch.bmm(items[..., :-1], user_BE[:, :-1, None])[..., 0]
    return products_BN + user_BE[:, -1:] + items[..., -1]
