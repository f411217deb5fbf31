"""Embedding&MLP: how likely a user takes an item, by a small network over the user, the mean of its history, the item.

Differs from the paper: biases start at 0 and tables as ours do; an item has one category; where the log has no labels,
each event gets one random item as its negative, drawn at every step.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freshrec.config import Count, CountOrZero, Positive, check_options
from freshrec.errors import OptionError
from freshrec.nn.embedding_table import EmbeddingTable
from freshrec.nn.layers import labelled_candidates
from freshrec.random_streams import global_stream, stream_seed
from freshrec.types import Batch, Forward


@dataclass(frozen=True)
class EmbeddingMLPSpec:
    """Options of Embedding&MLP."""

    d: Count = 8  # of each table
    hidden: Count = 20  # units of the first layer; the second has half as many
    categories: CountOrZero = 0  # of items, at least as many as the log has; 0: they are not looked at
    length: Count = 30  # history items in the mean
    lr: Positive = 0.001
    batch: Count = 1024
    negatives: Count = 1024  # drawn for a batch, where the log has no labels: each row takes one of them
    std: Positive = 0.1

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> "EmbeddingMLP":
        """A model without users and items."""
        return EmbeddingMLP(self, seed)


class EmbeddingMLP(nn.Module):
    """A `ClickModel`; an item is its vector beside that of its category."""

    batch_format = "click"

    def __init__(self, spec: EmbeddingMLPSpec, seed: int) -> None:
        super().__init__()
        self.spec, self.seed, self.n_users, self.n_items = spec, seed, 0, 0
        self.moments: dict[str, Tensor] = {}
        self.users = EmbeddingTable(spec.d, spec.std, stream_seed(seed, "users"))
        self.items = EmbeddingTable(spec.d, spec.std, stream_seed(seed, "items"))
        self.categories = EmbeddingTable(spec.d, spec.std, stream_seed(seed, "categories")) if spec.categories else None
        if self.categories is not None:
            self.categories.grow(spec.categories)
        item_width = spec.d * (2 if spec.categories else 1)
        with global_stream(seed, "dense weights"):
            self.first = nn.Linear(spec.d + 2 * item_width, spec.hidden)
            self.second = nn.Linear(spec.hidden, max(1, spec.hidden // 2))
            self.last = nn.Linear(max(1, spec.hidden // 2), 1)
            for layer in (self.first, self.second, self.last):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def grow(self, n_users: int, n_items: int) -> None:
        """Make room for new users and items."""
        self.n_users, self.n_items = n_users, n_items
        self.users.grow(n_users)
        self.items.grow(n_items)

    def forward(self, batch: Batch) -> Forward:
        """Mean binary cross-entropy of the labels; without labels, of the target and of a random item beside it."""
        candidates_BN, label_BN = labelled_candidates(batch, self.n_items)
        ids_BM = torch.cat([batch.history_BT, candidates_BN], 1)
        vectors_BMD = self.items.lookup(ids_BM)
        if self.categories is not None:
            category_BMD = self.categories.lookup(self._item_categories(batch, ids_BM))
            vectors_BMD = torch.cat([vectors_BMD, category_BMD], 2)
        n_history = batch.history_BT.shape[1]
        user_BE = self._user_features(self.users.lookup(batch.users_B), vectors_BMD[:, :n_history], batch.history_BT)
        logits_BN = self._candidate_logits(user_BE, vectors_BMD[:, n_history:])
        loss = F.binary_cross_entropy_with_logits(logits_BN, label_BN)
        return Forward(loss, logits_BN=logits_BN)

    def _item_categories(self, batch: Batch, items: Tensor) -> Tensor:
        """The category of each item, 0 where it has none."""
        if batch.categories_I is None:
            raise OptionError("the log has no categories; set embedding-mlp's option categories to 0.")
        categories = batch.categories_I[items].long()
        if int(categories.max()) > self.spec.categories:
            n = int(batch.categories_I.max())
            raise OptionError(f"embedding-mlp has room for {self.spec.categories} categories: set categories={n}.")
        return categories

    def _item_vectors(self, batch: Batch, items: Tensor) -> Tensor:
        """The vectors of items of any shape, as they are served; of an item not known yet, its category's only."""
        vectors = self.items.weights[torch.where(items <= self.n_items, items, 0)]
        if self.categories is None:
            return vectors
        return torch.cat([vectors, self.categories.weights[self._item_categories(batch, items)]], -1)

    def _user_features(self, user_BD: Tensor, history_BTD: Tensor, history_BT: Tensor) -> Tensor:
        """(B, E): the user's vector beside the mean over its history, which is 0 where there is none."""
        real_BT = (history_BT > 0).float()
        mean_BD = torch.bmm(real_BT[:, None], history_BTD)[:, 0] / (real_BT.sum(1, keepdim=True) + 1e-8)
        return torch.cat([user_BD, mean_BD], 1)

    def _candidate_logits(self, user_BE: Tensor, items: Tensor) -> Tensor:
        """(B, N) of items (N, D) shared or (B, N, D); the user's part of the first layer is worked out once a user."""
        n = user_BE.shape[1]
        user_part_B1H = F.linear(user_BE, self.first.weight[:, :n])[:, None]
        hidden_BNH = F.relu(user_part_B1H + F.linear(items, self.first.weight[:, n:], self.first.bias))
        logits: Tensor = self.last(F.relu(self.second(hidden_BNH)))[..., 0]
        return logits

    def score(self, batch: Batch, items: Tensor) -> Tensor:
        """The log-odds that the user takes each item."""
        with torch.no_grad():
            user_BD = self.users.weights[torch.where(batch.users_B <= self.n_users, batch.users_B, 0)]
            user_BE = self._user_features(user_BD, self._item_vectors(batch, batch.history_BT), batch.history_BT)
            return self._candidate_logits(user_BE, self._item_vectors(batch, items))

    def click_probabilities(self, batch: Batch, items: Tensor) -> Tensor:
        """(B, N) how likely the user takes each item."""
        return torch.sigmoid(self.score(batch, items))
