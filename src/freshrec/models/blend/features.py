"""Features of items and histories, such as counts, ages and repeat rates. They help to decide which expert to trust."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from freshrec.data.batches import Targets, history_items, split_chunks
from freshrec.nn.sparse import Float32Array, Float64Array, Int64Array, ItemOccurrences

# Of a candidate in the history, of a candidate, and of the history (the same for all candidates).
OWN_FEATURES = ("in history", "count in history", "events since", "is last item")
ITEM_FEATURES = ("item repeat rate", "events", "age")
USER_FEATURES = ("user repeat rate", "length")
PRIOR_EVENTS = 5.0  # events with the average repeat rate that are added to each item and to each user
REPEAT_WINDOW = 50  # An event is a repeat if its item is among the user's last 50 events.


@dataclass
class ItemStatistics:
    """Number of events and repeats of each item, and when it first occurred."""

    event_counts_I: Float32Array
    repeat_counts_I: Float32Array
    first_event_I: Float64Array  # events before the first one of the item; infinite without one
    n_events: int = 0

    @staticmethod
    def empty() -> ItemStatistics:
        """Statistics without items."""
        return ItemStatistics(np.zeros(1, np.float32), np.zeros(1, np.float32), np.full(1, np.inf))

    def grow(self, n_items: int) -> None:
        """Add rows for new items, without events."""
        extra = n_items + 1 - len(self.event_counts_I)
        self.event_counts_I, self.repeat_counts_I = (
            np.pad(self.event_counts_I, (0, extra)),
            np.pad(self.repeat_counts_I, (0, extra)),
        )
        self.first_event_I = np.pad(self.first_event_I, (0, extra), constant_values=np.inf)

    def absorb(self, targets: Targets) -> None:
        """Count the events, which are in time order, and the repeats among them."""
        items_E, n = targets.items_N.numpy(), len(self.event_counts_I)
        is_repeat_E = is_repeat(targets, REPEAT_WINDOW).numpy()
        self.event_counts_I = self.event_counts_I + np.bincount(items_E, minlength=n).astype(np.float32)
        self.repeat_counts_I = self.repeat_counts_I + np.bincount(items_E, is_repeat_E, minlength=n).astype(np.float32)
        first_I = np.full(n, np.inf)
        np.minimum.at(first_I, items_E, self.n_events + np.arange(len(items_E), dtype=np.float64))
        self.first_event_I, self.n_events = np.minimum(self.first_event_I, first_I), self.n_events + len(items_E)

    @property
    def repeat_rate(self) -> float:
        """Share of all events that are repeats."""
        return float(self.repeat_counts_I.sum() / max(self.event_counts_I.sum(), 1.0))

    def item_features(self, window: int) -> Float32Array:
        """Value of each of ITEM_FEATURES, shape (I + 1, 3); row 0 is 0. `window` is the unit of age, in events."""
        repeat_rate_I = (self.repeat_counts_I + PRIOR_EVENTS * self.repeat_rate) / (self.event_counts_I + PRIOR_EVENTS)
        age_I = np.log1p(np.maximum(self.n_events - self.first_event_I, 0) / window)
        x_I3 = np.stack([repeat_rate_I, np.log1p(self.event_counts_I), age_I], axis=1, dtype=np.float32)
        x_I3[0] = 0.0
        return x_I3

    def state_dict(self) -> dict[str, Tensor]:
        """All counts as tensors, by name."""
        columns = {"events_I": self.event_counts_I, "again_I": self.repeat_counts_I, "first_I": self.first_event_I}
        return {name: torch.from_numpy(x) for name, x in columns.items()} | {"clock": torch.tensor(self.n_events)}

    @staticmethod
    def from_state_dict(tensors: dict[str, Tensor]) -> ItemStatistics:
        """Restore what `state_dict` returned."""
        events_I, again_I, first_I = (tensors[name].numpy() for name in ("events_I", "again_I", "first_I"))
        return ItemStatistics(events_I, again_I, first_I, int(tensors["clock"]))


def is_repeat(targets: Targets, n: int) -> Tensor:
    """Whether the item of each target is among the `n` events before it, shape (N,); in chunks, to save memory."""
    is_repeat_N = torch.zeros(len(targets), dtype=torch.bool)
    for index in split_chunks(torch.arange(len(targets)), 32_768):
        part = targets[index]
        is_repeat_N[index] = (history_items(part, n) == part.items_N[:, None]).any(1)
    return is_repeat_N


def own_history_features(occurrences: ItemOccurrences) -> Float32Array:
    """Value of each of OWN_FEATURES for each item of each history, shape (W, 4)."""
    n_W, age_W = (
        occurrences.counts_W.astype(np.float32),
        (occurrences.n_steps - 1 - occurrences.last_step_W).astype(np.float32),
    )
    return np.stack([np.ones_like(n_W), np.log1p(n_W), np.log1p(age_W), age_W == 0], axis=1, dtype=np.float32)


def user_features(occurrences: ItemOccurrences, n_B: Int64Array, repeat_rate: float) -> Float32Array:
    """Value of each of USER_FEATURES, shape (B, 2), for histories of `n_B` events; `repeat_rate` is the overall one."""
    repeat_rate_B = (n_B - (occurrences.offsets_B[1:] - occurrences.offsets_B[:-1]) + PRIOR_EVENTS * repeat_rate) / (
        n_B + PRIOR_EVENTS
    )
    return np.stack([repeat_rate_B, np.log1p(n_B)], axis=1, dtype=np.float32)
