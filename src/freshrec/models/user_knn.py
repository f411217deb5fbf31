"""User-kNN: recommends the recent items of the most similar users. New events update it at once."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freshrec.config import HISTORY_LENGTH, Count, check_options
from freshrec.models.model_text import model_text
from freshrec.nn.sparse import (
    Float32Array,
    build_csr,
    item_indicator,
    offsets_from_counts,
    row_sizes,
    select_scores,
    top_k_entries,
)
from freshrec.types import Batch, Events, Histories


@dataclass(frozen=True)
class UserKNNSpec:
    """Options of user-kNN."""

    neighbours: Count = 100  # Number of most similar users whose items are scored.
    length: Count = HISTORY_LENGTH  # Number of most recent events per user that are compared.
    users_per_item: Count = 1000  # Number of most recent users per item considered as neighbours.

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> UserKNN:
        """Return a new model without users and items. The seed is not used."""
        return UserKNN(self)


class UserKNN:
    """score(item) = sum of sim(v) over the nearest users v who have the item among their last `length` events.

    sim(v) = sum of idf over the shared items, and idf(item) = ln(1 + users with events / (1 + users with the item)).
    """

    __repr__ = model_text

    def __init__(self, spec: UserKNNSpec) -> None:
        self.spec = spec
        self.n_users = 0
        self.n_items = 0
        self.recent_UT = np.zeros((1, spec.length), dtype=np.int32)  # oldest first, padded with 0 on the left
        self.last_block_U = np.zeros(1, dtype=np.int64)  # number of the last block with an event of the user; 0 = none
        self._index: tuple[Any, Any, Float32Array] | None = None  # computed on first use

    def __deepcopy__(self, memo: dict[int, Any]) -> UserKNN:
        """Return a shallow copy: arrays are replaced, never changed in place."""
        return copy.copy(self)

    def grow(self, n_users: int, n_items: int) -> None:
        """Add rows for new users and items, without events."""
        self.recent_UT = np.pad(self.recent_UT, ((0, n_users - self.n_users), (0, 0)))
        self.last_block_U = np.pad(self.last_block_U, (0, n_users - self.n_users))
        self.n_users, self.n_items = n_users, n_items
        self._index = None

    def absorb(self, events: Events, histories: Histories) -> None:
        """Append the events to the last events of their users."""
        if len(events) == 0:
            return
        order = np.argsort(events.users_E.numpy(), kind="stable")
        users_E, items_E, length = events.users_E.numpy()[order], events.items_E.numpy()[order], self.spec.length
        starts_N = np.flatnonzero(np.diff(users_E, prepend=-1))
        users_N, n_N = users_E[starts_N], np.diff(starts_N, append=len(users_E))
        recent_UT, last_block_U = self.recent_UT.copy(), self.last_block_U.copy()  # copies of the model share these
        is_known_N = last_block_U[users_N] > 0
        from_OT = np.minimum(n_N[is_known_N], length)[:, None] + np.arange(length)  # older events move to the left
        recent_OT = np.take_along_axis(recent_UT[users_N[is_known_N]], np.minimum(from_OT, length - 1), 1)
        recent_UT[users_N[is_known_N]] = recent_OT  # the positions on the right are overwritten below
        step_E = length - (np.repeat(starts_N + n_N, n_N) - np.arange(len(users_E)))
        recent_UT[users_E[step_E >= 0], step_E[step_E >= 0]] = items_E[step_E >= 0]
        last_block_U[users_N] = last_block_U.max() + 1
        self.recent_UT, self.last_block_U, self._index = recent_UT, last_block_U, None

    def erase_user(self, user: int) -> None:
        """Delete all events of the user in this row."""
        self.recent_UT, self.last_block_U = self.recent_UT.copy(), self.last_block_U.copy()
        self.recent_UT[user], self.last_block_U[user], self._index = 0, 0, None

    def sparse_scores(self, batch: Batch) -> Any:
        """Return the scores as a sparse matrix (B, I + 1). A user is never its own neighbour."""
        user_items_UI, item_users_IU, idf_I = self._build_index()
        query_BI = item_indicator(batch.history_BT[:, -self.spec.length :].numpy(), self.n_items + 1)
        query_BI.data = idf_I[query_BI.indices]
        sims_BU = query_BI @ item_users_IU
        row_E = np.repeat(np.arange(len(batch)), row_sizes(sims_BU))
        sims_BU.data[sims_BU.indices == batch.users_B.numpy()[row_E]] = 0
        users_BK, sims_BK = top_k_entries(sims_BU, self.spec.neighbours)
        offsets = np.arange(len(batch) + 1) * users_BK.shape[1]
        return build_csr(sims_BK.ravel(), users_BK.ravel(), offsets, self.n_users + 1) @ user_items_UI

    def score(self, batch: Batch, items: Tensor) -> Tensor:
        """Return the scores (B, N) of `items`, from each row's history."""
        return select_scores(torch.from_numpy(self.sparse_scores(batch).toarray()), items)

    def _build_index(self) -> tuple[Any, Any, Float32Array]:
        """Return the recent items of each user (U, I), the most recent users of each item (I, U), and the idf (I,)."""
        if self._index is None:
            user_items_UI = item_indicator(self.recent_UT, self.n_items + 1)
            n_I = np.bincount(user_items_UI.indices, minlength=self.n_items + 1)
            idf_I = np.log1p(np.count_nonzero(self.recent_UT[:, -1]) / (1 + n_I)).astype(np.float32)
            latest_U = np.argsort(-self.last_block_U, kind="stable")
            columns = user_items_UI[latest_U].tocsc()  # each column has the most recent users first
            rank_E = np.arange(columns.nnz) - np.repeat(columns.indptr[:-1], n_I)
            is_kept_E, n_I = rank_E < self.spec.users_per_item, np.minimum(n_I, self.spec.users_per_item)
            users_E = latest_U[columns.indices[is_kept_E]]
            item_users_IU = build_csr(columns.data[is_kept_E], users_E, offsets_from_counts(n_I), self.n_users + 1)
            self._index = user_items_UI, item_users_IU, idf_I
        return self._index

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that the model has learned, as tensors by name."""
        sizes = np.array([self.n_users, self.n_items])
        arrays = {"sizes": sizes, "recent_UT": self.recent_UT, "turn_U": self.last_block_U}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        self.n_users, self.n_items = tensors["sizes"].tolist()
        self.recent_UT, self.last_block_U = tensors["recent_UT"].numpy(), tensors["turn_U"].numpy()
        self._index = None
