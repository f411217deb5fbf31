"""Recommends the items with the most events. Baseline: a model that scores below it has learned nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from freshrec.config import HISTORY_LENGTH, Count, Positive, check_options
from freshrec.models.model_text import model_text
from freshrec.nn.forward_decay import WINDOW_SHARE, window_size
from freshrec.types import Batch, Events, Histories


@dataclass(frozen=True)
class PopularitySpec:
    """Options of popularity.

    A window is a number of events: the share `window` of the base block, which is the first block absorbed. A sixth is
    about one span if the base block is half of the log and six spans follow. In a blend, a window is a sixth of the
    whole base block, which arrives in two parts. Age is counted in events, so that a quiet night changes no weight.
    """

    weighting: Annotated[
        Literal["all", "last", "decay"],
        Field(
            description='Events that are counted: "all", the "last" window only, '
            'or all with a weight that halves with age ("decay").'
        ),
    ] = "all"
    half_life: Positive = 1.0  # Events lose half their weight in this number of windows; weighting=decay only.
    window: Positive = WINDOW_SHARE  # Events per window, as a share of the base block; not used with weighting=all.
    length: Count = HISTORY_LENGTH  # Number of most recent events kept per user; the model itself does not read them.

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> Popularity:
        """Return a new model without users and items. The seed is not used."""
        return Popularity(self)


class Popularity:
    """score(item) = the (weighted) number of its events."""

    __repr__ = model_text

    def __init__(self, spec: PopularitySpec) -> None:
        self.spec = spec
        self.n_users = 0
        self.n_items = 0
        self.window_events = 0  # 0 until the base block is absorbed; a caller that absorbs it in parts sets this first
        self.counts_I = torch.zeros(1, dtype=torch.float64)
        self.latest_E = torch.zeros(0, dtype=torch.int32)  # items of the last window, for weighting = "last"

    def grow(self, n_users: int, n_items: int) -> None:
        """Add rows for new users and items, without events."""
        self.counts_I = torch.cat([self.counts_I, self.counts_I.new_zeros(n_items - self.n_items)])
        self.n_users, self.n_items = n_users, n_items

    def absorb(self, events: Events, histories: Histories) -> None:
        """Count the events. The first block, the base block, also sets the window, unless it is set already."""
        if len(events) == 0:
            return
        if self.window_events == 0:
            self.window_events = window_size(len(events), self.spec.window)
        if self.spec.weighting == "last":
            self.latest_E = torch.cat([self.latest_E, events.items_E.int()])[-self.window_events :]
            self.counts_I = self._weighted_counts(self.latest_E, torch.ones(len(self.latest_E), dtype=torch.float64))
            return
        half_life = self.spec.half_life * self.window_events if self.spec.weighting == "decay" else float("inf")
        age_E = torch.arange(len(events) - 1, -1, -1, dtype=torch.float64)
        decay = 0.5 ** (len(events) / half_life)
        self.counts_I = self.counts_I * decay + self._weighted_counts(events.items_E, 0.5 ** (age_E / half_life))

    def _weighted_counts(self, items_E: Tensor, weights_E: Tensor) -> Tensor:
        return torch.bincount(items_E, weights_E, minlength=self.n_items + 1)

    def score(self, batch: Batch, items: Tensor) -> Tensor:
        """Return the scores (B, N) of `items`: their counts, the same for all users."""
        scores = self.counts_I[items].float()
        return scores if items.ndim == 2 else scores.repeat(len(batch), 1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that the model has learned, as tensors by name."""
        sizes = torch.tensor([self.n_users, self.n_items, self.window_events])
        return {"sizes": sizes, "counts_I": self.counts_I, "latest_E": self.latest_E}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        self.n_users, self.n_items, self.window_events = tensors["sizes"].tolist()
        self.counts_I, self.latest_E = tensors["counts_I"], tensors["latest_E"]
