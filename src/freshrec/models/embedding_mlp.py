"""Embedding&MLP: predicts clicks with a small network over the user, the mean of the history, and the item.

Differs from the paper: biases start at 0, embeddings start as in our other models, and an item has one category. If the
log has no labels, each event gets one random negative item, which is drawn again at every step.
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

    d: Count = 8  # Dimensions of each embedding.
    hidden: Count = 20  # Units of the first layer; the second layer has half as many.
    categories: CountOrZero = 0  # Number of item categories, at least as many as the log has; 0 = off.
    length: Count = 30  # Number of most recent events per user whose items are averaged.
    lr: Positive = 0.001  # Learning rate of Adam.
    batch: Count = 1024  # Events per training step.
    negatives: Count = 1024  # Random items per training step if the log has no labels; each event uses one of them.
    std: Positive = 0.1  # Standard deviation of the random values that new vectors start with.

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> "EmbeddingMLP":
        """Return a new model without users and items."""
        return EmbeddingMLP(self, seed)


class EmbeddingMLP(nn.Module):
    """A `ClickModel`. An item is represented by its own vector and that of its category, concatenated."""

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
        """Add rows for new users and items."""
        self.n_users, self.n_items = n_users, n_items
        self.users.grow(n_users)
        self.items.grow(n_items)

    def forward(self, batch: Batch) -> Forward:
        """Return the mean binary cross-entropy. Without labels, the target counts as 1 and a random item as 0."""
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
        """Return the category of each item; 0 = none."""
        if batch.categories_I is None:
            raise OptionError("The log has no item categories. Set categories=0 for embedding-mlp.")
        categories = batch.categories_I[items].long()
        if int(categories.max()) > self.spec.categories:
            n = int(batch.categories_I.max())
            raise OptionError(
                f"The log has {n} item categories, and embedding-mlp has {self.spec.categories}. Set categories={n}."
            )
        return categories

    def _item_vectors(self, batch: Batch, items: Tensor) -> Tensor:
        """Return the vectors of `items` for scoring, any shape. An unknown item has only the vector of its category."""
        vectors = self.items.weights[torch.where(items <= self.n_items, items, 0)]
        if self.categories is None:
            return vectors
        return torch.cat([vectors, self.categories.weights[self._item_categories(batch, items)]], -1)

    def _user_features(self, user_BD: Tensor, history_BTD: Tensor, history_BT: Tensor) -> Tensor:
        """Return the user vector and the mean of the history, concatenated, (B, E). An empty history has mean 0."""
        real_BT = (history_BT > 0).float()
        mean_BD = torch.bmm(real_BT[:, None], history_BTD)[:, 0] / (real_BT.sum(1, keepdim=True) + 1e-8)
        return torch.cat([user_BD, mean_BD], 1)

    def _candidate_logits(self, user_BE: Tensor, items: Tensor) -> Tensor:
        """Return the logits (B, N) of items (N, D), shared by all rows, or (B, N, D).

        The user's part of the first layer is computed once per user.
        """
        n = user_BE.shape[1]
        user_part_B1H = F.linear(user_BE, self.first.weight[:, :n])[:, None]
        hidden_BNH = F.relu(user_part_B1H + F.linear(items, self.first.weight[:, n:], self.first.bias))
        logits: Tensor = self.last(F.relu(self.second(hidden_BNH)))[..., 0]
        return logits

    def score(self, batch: Batch, items: Tensor) -> Tensor:
        """Return the log-odds that the user clicks each item, shape (B, N)."""
        with torch.no_grad():
            user_BD = self.users.weights[torch.where(batch.users_B <= self.n_users, batch.users_B, 0)]
            user_BE = self._user_features(user_BD, self._item_vectors(batch, batch.history_BT), batch.history_BT)
            return self._candidate_logits(user_BE, self._item_vectors(batch, items))

    def click_probabilities(self, batch: Batch, items: Tensor) -> Tensor:
        """Return the probability that the user clicks each item, shape (B, N)."""
        return torch.sigmoid(self.score(batch, items))
