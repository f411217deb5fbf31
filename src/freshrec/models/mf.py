"""Matrix factorisation: one vector per user and one per item, trained with a sampled softmax."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from freshrec.config import HISTORY_LENGTH, Count, CountOrZero, Positive, check_options
from freshrec.nn.embedding_table import EmbeddingTable, lookup_many
from freshrec.nn.layers import sampled_logits, sampled_softmax_loss
from freshrec.random_streams import stream_seed
from freshrec.types import Batch, Forward


@dataclass(frozen=True)
class MFSpec:
    """Options of matrix factorisation."""

    d: Count = 64  # Dimensions of the user and item vectors.
    length: Count = HISTORY_LENGTH  # Number of most recent events kept per user; the model itself does not read them.
    lr: Positive = 0.005  # Learning rate of Adam.
    batch: Count = 1024  # Events per training step.
    negatives: Count = 512  # Random negative items per training step, shared by the batch.
    std: Positive = 0.1  # Standard deviation of the random values that new vectors start with.
    categories: CountOrZero = 0  # Number of category embeddings added to the item embeddings; 0 = off.

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> "MF":
        """Return a new model without users and items."""
        return MF(self, seed)


class MF(nn.Module):
    """A `VectorModel` with K = 1. It reads no histories, so a click has no effect until the next update."""

    batch_format = "pair"

    def __init__(self, spec: MFSpec, seed: int) -> None:
        super().__init__()
        self.spec, self.seed, self.n_users, self.n_items = spec, seed, 0, 0
        self.moments: dict[str, Tensor] = {}
        self.users = EmbeddingTable(spec.d, spec.std, stream_seed(seed, "users"))
        self.items = EmbeddingTable(spec.d, spec.std, stream_seed(seed, "items"), spec.categories)

    def grow(self, n_users: int, n_items: int) -> None:
        """Add rows for new users and items."""
        self.n_users, self.n_items = n_users, n_items
        self.users.grow(n_users)
        self.items.grow(n_items)

    def forward(self, batch: Batch) -> Forward:
        """Return the sampled softmax loss of the targets."""
        assert batch.targets_BT is not None and batch.negatives_N is not None
        target_B, negative_N = batch.targets_BT[:, 0], batch.negatives_N
        user_BD = self.users.lookup(batch.users_B)
        target_BD, negative_ND = lookup_many(self.items, target_B, negative_N)
        logits_BN = sampled_logits(user_BD, target_BD, negative_ND, target_B, negative_N)
        return Forward(sampled_softmax_loss(logits_BN), user_BD[:, None], target_BD, logits_BN)

    def user_vectors(self, batch: Batch) -> Tensor:
        """Return the user vectors (B, 1, D); 0 for unknown users."""
        return self.users.weights[torch.where(batch.users_B <= self.n_users, batch.users_B, 0)][:, None]

    def encode(self, items_BTD: Tensor, batch: Batch) -> Tensor:
        """Return the user vectors (B, 1, D), with gradients. The histories are not read."""
        return self.users.lookup(batch.users_B)[:, None]
