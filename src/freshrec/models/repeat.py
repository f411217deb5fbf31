"""Repeat: every user is offered their own past items. A control: what is below it repeats, badly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from freshrec.config import HISTORY_LENGTH, Count, check_options
from freshrec.nn.sparse import ItemOccurrences, build_csr, select_scores
from freshrec.types import Batch, Events, Histories

FREQ_HALF_LIFE = 32  # events of the user's history


@dataclass(frozen=True)
class RepeatSpec:
    """How own items are ordered: "last" by their last event, "freq" by the number of their events, fading with age."""

    order: Literal["last", "freq"] = "last"
    length: Count = HISTORY_LENGTH  # history items looked at

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> Repeat:
        """A model without users and items; it has no randomness."""
        return Repeat(self)


class Repeat:
    """score(item) = 1 / (1 + age of its last event), or the sum over its events of 0.5^(age / 32); 0 for other items.

    The age of an event is the number of later events in the history.
    """

    def __init__(self, spec: RepeatSpec) -> None:
        self.spec = spec
        self.n_users = 0
        self.n_items = 0

    def grow(self, n_users: int, n_items: int) -> None:
        """Only the sizes change."""
        self.n_users, self.n_items = n_users, n_items

    def absorb(self, events: Events, histories: Histories) -> None:
        """Nothing to learn: all that counts travels in the batch."""

    def sparse_scores(self, batch: Batch) -> Any:
        """(B, I + 1) scores as a sparse matrix."""
        return self.scores_of_occurrences(ItemOccurrences.from_items(batch.history_BT.numpy()))

    def scores_of_occurrences(self, occurrences: ItemOccurrences) -> Any:
        """`sparse_scores`, of histories that were looked through before."""
        age_T = np.arange(occurrences.n_steps - 1, -1, -1, dtype=np.float32)
        if self.spec.order == "last":
            weights_W = (1 / (1 + age_T))[occurrences.last_step_W]
        else:
            weights_E = (np.float32(0.5) ** (age_T / FREQ_HALF_LIFE))[occurrences.steps_E]
            weights_W = np.add.reduceat(weights_E, occurrences.first_step_W[:-1]) if len(weights_E) else weights_E
        return build_csr(weights_W, occurrences.items_W, occurrences.offsets_B, self.n_items + 1)

    def score(self, batch: Batch, items: Tensor) -> Tensor:
        """(B, N): from each row's own history alone."""
        return select_scores(torch.from_numpy(self.sparse_scores(batch).toarray()), items)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the model knows."""
        return {"sizes": torch.tensor([self.n_users, self.n_items])}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self.n_users, self.n_items = tensors["sizes"].tolist()
