"""Matrix factorisation: one vector a user, one an item, trained with a sampled softmax."""

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
    """Options of MF."""

    d: Count = 64
    length: Count = HISTORY_LENGTH  # kept events a user; the model itself does not read them
    lr: Positive = 0.005
    batch: Count = 1024
    negatives: Count = 512
    std: Positive = 0.1
    categories: CountOrZero = 0  # room for so many, of items; 0: they are not looked at

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> "MF":
        """A model without users and items."""
        return MF(self, seed)


class MF(nn.Module):
    """A `VectorModel` with K = 1; it knows users, not histories, so a click counts only after an update."""

    batch_format = "pair"

    def __init__(self, spec: MFSpec, seed: int) -> None:
        super().__init__()
        self.spec, self.seed, self.n_users, self.n_items = spec, seed, 0, 0
        self.moments: dict[str, Tensor] = {}
        self.users = EmbeddingTable(spec.d, spec.std, stream_seed(seed, "users"))
        self.items = EmbeddingTable(spec.d, spec.std, stream_seed(seed, "items"), spec.categories)

    def grow(self, n_users: int, n_items: int) -> None:
        """Make room for new users and items."""
        self.n_users, self.n_items = n_users, n_items
        self.users.grow(n_users)
        self.items.grow(n_items)

    def forward(self, batch: Batch) -> Forward:
        """Sampled softmax of the target."""
        assert batch.targets_BT is not None and batch.negatives_N is not None
        target_B, negative_N = batch.targets_BT[:, 0], batch.negatives_N
        user_BD = self.users.lookup(batch.users_B)
        target_BD, negative_ND = lookup_many(self.items, target_B, negative_N)
        logits_BN = sampled_logits(user_BD, target_BD, negative_ND, target_B, negative_N)
        return Forward(sampled_softmax_loss(logits_BN), user_BD[:, None], target_BD, logits_BN)

    def user_vectors(self, batch: Batch) -> Tensor:
        """(B, 1, D); zero for users that are not known yet."""
        return self.users.weights[torch.where(batch.users_B <= self.n_users, batch.users_B, 0)][:, None]

    def encode(self, items_BTD: Tensor, batch: Batch) -> Tensor:
        """The users' rows (B, 1, D), with gradients; what is in the history does not matter."""
        return self.users.lookup(batch.users_B)[:, None]
