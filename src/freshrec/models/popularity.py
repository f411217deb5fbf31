"""Popularity: every user is offered the items with the most events. A control: what is below it has learned nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from freshrec.config import HISTORY_LENGTH, Count, Positive, check_options
from freshrec.nn.forward_decay import WINDOW_SHARE, window_size
from freshrec.types import Batch, Events, Histories


@dataclass(frozen=True)
class PopularitySpec:
    """Which events count: all of them, only the last window, or all with a weight that halves with age.

    One window is as many events as `window` of the first events absorbed, the base block; a sixth is about one span
    where half of the log is the base and six spans follow. Within a blend it is a sixth of all of the base block, which
    comes in two parts. Age is counted in events, so that a quiet night forgets nothing.
    """

    weighting: Literal["all", "last", "decay"] = "all"
    half_life: Positive = 1.0  # in windows; "decay" only
    window: Positive = WINDOW_SHARE  # share of the base block; not for "all"
    length: Count = HISTORY_LENGTH  # kept events a user; the model itself does not read them

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> Popularity:
        """A model without users and items; it has no randomness."""
        return Popularity(self)


class Popularity:
    """score(item) = the (weighted) number of its events."""

    def __init__(self, spec: PopularitySpec) -> None:
        self.spec = spec
        self.n_users = 0
        self.n_items = 0
        self.window_events = 0  # 0 until the base block is known; set before, by whoever absorbs that in parts
        self.counts_I = torch.zeros(1, dtype=torch.float64)
        self.latest_E = torch.zeros(0, dtype=torch.int32)  # the items of the last window, for keep = "last"

    def grow(self, n_users: int, n_items: int) -> None:
        """New items start without events."""
        self.counts_I = torch.cat([self.counts_I, self.counts_I.new_zeros(n_items - self.n_items)])
        self.n_users, self.n_items = n_users, n_items

    def absorb(self, events: Events, histories: Histories) -> None:
        """Count the events; the first ones, the base block, also set the length of a window that nobody has set."""
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
        """(B, N): the counts, the same for everybody."""
        scores = self.counts_I[items].float()
        return scores if items.ndim == 2 else scores.repeat(len(batch), 1)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the model knows."""
        sizes = torch.tensor([self.n_users, self.n_items, self.window_events])
        return {"sizes": sizes, "counts_I": self.counts_I, "latest_E": self.latest_E}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self.n_users, self.n_items, self.window_events = tensors["sizes"].tolist()
        self.counts_I, self.latest_E = tensors["counts_I"], tensors["latest_E"]
