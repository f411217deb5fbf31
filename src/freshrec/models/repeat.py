"""Recommends the user's own past items. Baseline: a model that scores below it is worse than repeating the past."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from freshrec.config import HISTORY_LENGTH, Count, check_options
from freshrec.models.model_text import model_text
from freshrec.nn.sparse import ItemOccurrences, build_csr, select_scores
from freshrec.types import Batch, Events, Histories

FREQ_HALF_LIFE = 32  # events of the user's history


@dataclass(frozen=True)
class RepeatSpec:
    """Options of repeat."""

    order: Annotated[
        Literal["last", "freq"],
        Field(description='Order of own items: by "last" event, or by number of events with decay ("freq").'),
    ] = "last"
    length: Count = HISTORY_LENGTH  # Number of most recent events per user that the model reads.

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> Repeat:
        """Return a new model without users and items. The seed is not used."""
        return Repeat(self)


class Repeat:
    """score(item) = 1 / (1 + age of its last event), or the sum over its events of 0.5^(age / 32).

    The age of an event is the number of later events in the history. Items that are not in the history score 0.
    """

    __repr__ = model_text

    def __init__(self, spec: RepeatSpec) -> None:
        self.spec = spec
        self.n_users = 0
        self.n_items = 0

    def grow(self, n_users: int, n_items: int) -> None:
        """Set the new numbers of users and items."""
        self.n_users, self.n_items = n_users, n_items

    def absorb(self, events: Events, histories: Histories) -> None:
        """Do nothing: the history in the batch is all that the model needs."""

    def sparse_scores(self, batch: Batch) -> Any:
        """Return the scores as a sparse matrix (B, I + 1)."""
        return self.scores_of_occurrences(ItemOccurrences.from_items(batch.history_BT.numpy()))

    def scores_of_occurrences(self, occurrences: ItemOccurrences) -> Any:
        """Return `sparse_scores` of histories whose item occurrences are known."""
        age_T = np.arange(occurrences.n_steps - 1, -1, -1, dtype=np.float32)
        if self.spec.order == "last":
            weights_W = (1 / (1 + age_T))[occurrences.last_step_W]
        else:
            weights_E = (np.float32(0.5) ** (age_T / FREQ_HALF_LIFE))[occurrences.steps_E]
            weights_W = np.add.reduceat(weights_E, occurrences.first_step_W[:-1]) if len(weights_E) else weights_E
        return build_csr(weights_W, occurrences.items_W, occurrences.offsets_B, self.n_items + 1)

    def score(self, batch: Batch, items: Tensor) -> Tensor:
        """Return the scores (B, N) of `items`, from each row's history alone."""
        return select_scores(torch.from_numpy(self.sparse_scores(batch).toarray()), items)

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that the model has learned, as tensors by name."""
        return {"sizes": torch.tensor([self.n_users, self.n_items])}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        self.n_users, self.n_items = tensors["sizes"].tolist()
