"""Biased matrix factorisation: predicts clicks from a vector and a bias per user and per item.

Differs from the MF of ASMG's study: if the log has no labels, each event gets one random negative item.
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
    """Options of biased matrix factorisation."""

    d: Count = 8  # Dimensions of the user and item vectors, without the bias.
    length: Count = 30  # Number of most recent events kept per user; the model itself does not read them.
    lr: Positive = 0.001  # Learning rate of Adam.
    batch: Count = 1024  # Events per training step.
    negatives: Count = 1024  # Random items per training step if the log has no labels; each event uses one of them.
    std: Positive = 0.1  # Standard deviation of the random values that new vectors start with; biases start at 0.

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> "BiasedMF":
        """Return a new model without users and items."""
        return BiasedMF(self, seed)


class BiasedMF(nn.Module):
    """A `ClickModel`. The last number of each row is its bias, so strategies that transform rows transform it too."""

    batch_format = "click"

    def __init__(self, spec: BiasedMFSpec, seed: int) -> None:
        super().__init__()
        self.spec, self.seed, self.n_users, self.n_items = spec, seed, 0, 0
        self.moments: dict[str, Tensor] = {}
        self.users = EmbeddingTable(spec.d + 1, spec.std, stream_seed(seed, "users"))
        self.items = EmbeddingTable(spec.d + 1, spec.std, stream_seed(seed, "items"))

    def grow(self, n_users: int, n_items: int) -> None:
        """Add rows for new users and items. Their biases start at 0."""
        self.users.grow(n_users)
        self.items.grow(n_items)
        self.users.weights[self.n_users + 1 :, -1] = 0.0
        self.items.weights[self.n_items + 1 :, -1] = 0.0
        self.n_users, self.n_items = n_users, n_items

    def forward(self, batch: Batch) -> Forward:
        """Return the mean binary cross-entropy. Without labels, the target counts as 1 and a random item as 0."""
        candidates_BN, label_BN = labelled_candidates(batch, self.n_items)
        user_BE = self.users.lookup(batch.users_B)
        items_BNE = self.items.lookup(candidates_BN)
        logits_BN = _logits(user_BE, items_BNE)
        return Forward(F.binary_cross_entropy_with_logits(logits_BN, label_BN), logits_BN=logits_BN)

    def score(self, batch: Batch, items: Tensor) -> Tensor:
        """p_u q_i + b_u + b_i, the log-odds that the user clicks each item, shape (B, N).

        The vector and the bias of an unknown user or item are 0.
        """
        user_BE = self.users.weights[torch.where(batch.users_B <= self.n_users, batch.users_B, 0)]
        return _logits(user_BE, self.items.weights[torch.where(items <= self.n_items, items, 0)])

    def click_probabilities(self, batch: Batch, items: Tensor) -> Tensor:
        """Return the probability that the user clicks each item, shape (B, N)."""
        return torch.sigmoid(self.score(batch, items))


def _logits(user_BE: Tensor, items: Tensor) -> Tensor:
    """Return the logits (B, N) of items (N, E), shared by all rows, or (B, N, E)."""
    items = items if items.ndim == 3 else items.expand(len(user_BE), -1, -1)
    products_BN = torch.bmm(items[..., :-1], user_BE[:, :-1, None])[..., 0]
    return products_BN + user_BE[:, -1:] + items[..., -1]
