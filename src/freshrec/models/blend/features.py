"""Facts about items and histories, which say when to trust which expert: counts, ages, how often items come again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from freshrec.data.batches import Targets, history_items, split_chunks
from freshrec.nn.sparse import Float32Array, Float64Array, Int64Array, ItemOccurrences

OWN_FEATURES = ("taken", "times taken", "age of the last", "is the last")  # of a candidate in the history
ITEM_FEATURES = ("taken again", "events", "age")  # of a candidate
USER_FEATURES = ("takes again", "length")  # of the history, the same for all candidates
PRIOR_EVENTS = 5.0  # events of an average item, or of an average user, added to each
REPEAT_WINDOW = 50  # a user's last events, in which "again" is looked for


@dataclass
class ItemStatistics:
    """What is counted of items; `clock` is the number of events so far."""

    event_counts_I: Float32Array
    repeat_counts_I: Float32Array
    first_event_I: Float64Array  # the clock at the first event; infinite before it
    n_events: int = 0

    @staticmethod
    def empty() -> ItemStatistics:
        """Of no items."""
        return ItemStatistics(np.zeros(1, np.float32), np.zeros(1, np.float32), np.full(1, np.inf))

    def grow(self, n_items: int) -> None:
        """New items start without events."""
        extra = n_items + 1 - len(self.event_counts_I)
        self.event_counts_I, self.repeat_counts_I = (
            np.pad(self.event_counts_I, (0, extra)),
            np.pad(self.repeat_counts_I, (0, extra)),
        )
        self.first_event_I = np.pad(self.first_event_I, (0, extra), constant_values=np.inf)

    def absorb(self, targets: Targets) -> None:
        """Count the events, in time order, and those whose user had the item among its last ones."""
        items_E, n = targets.items_N.numpy(), len(self.event_counts_I)
        is_repeat_E = is_repeat(targets, REPEAT_WINDOW).numpy()
        self.event_counts_I = self.event_counts_I + np.bincount(items_E, minlength=n).astype(np.float32)
        self.repeat_counts_I = self.repeat_counts_I + np.bincount(items_E, is_repeat_E, minlength=n).astype(np.float32)
        first_I = np.full(n, np.inf)
        np.minimum.at(first_I, items_E, self.n_events + np.arange(len(items_E), dtype=np.float64))
        self.first_event_I, self.n_events = np.minimum(self.first_event_I, first_I), self.n_events + len(items_E)

    @property
    def repeat_rate(self) -> float:
        """The share of events whose item the user had among the last ones."""
        return float(self.repeat_counts_I.sum() / max(self.event_counts_I.sum(), 1.0))

    def item_features(self, window: int) -> Float32Array:
        """(I + 1, 3) of each of ITEM_FEATURES, 0 of the padding. Ages are measured in windows of so many events."""
        repeat_rate_I = (self.repeat_counts_I + PRIOR_EVENTS * self.repeat_rate) / (self.event_counts_I + PRIOR_EVENTS)
        age_I = np.log1p(np.maximum(self.n_events - self.first_event_I, 0) / window)
        x_I3 = np.stack([repeat_rate_I, np.log1p(self.event_counts_I), age_I], axis=1, dtype=np.float32)
        x_I3[0] = 0.0
        return x_I3

    def state_dict(self) -> dict[str, Tensor]:
        """Everything counted."""
        columns = {"events_I": self.event_counts_I, "again_I": self.repeat_counts_I, "first_I": self.first_event_I}
        return {name: torch.from_numpy(x) for name, x in columns.items()} | {"clock": torch.tensor(self.n_events)}

    @staticmethod
    def from_state_dict(tensors: dict[str, Tensor]) -> ItemStatistics:
        """The inverse of `state_dict`."""
        events_I, again_I, first_I = (tensors[name].numpy() for name in ("events_I", "again_I", "first_I"))
        return ItemStatistics(events_I, again_I, first_I, int(tensors["clock"]))


def is_repeat(targets: Targets, n: int) -> Tensor:
    """(N,) whether each target's item is among the last `n` before it; in parts, since all at once take much room."""
    is_repeat_N = torch.zeros(len(targets), dtype=torch.bool)
    for index in split_chunks(torch.arange(len(targets)), 32_768):
        part = targets[index]
        is_repeat_N[index] = (history_items(part, n) == part.items_N[:, None]).any(1)
    return is_repeat_N


def own_history_features(occurrences: ItemOccurrences) -> Float32Array:
    """(W, 4) of each of OWN_FEATURES, of the items of histories."""
    n_W, age_W = (
        occurrences.counts_W.astype(np.float32),
        (occurrences.n_steps - 1 - occurrences.last_step_W).astype(np.float32),
    )
    return np.stack([np.ones_like(n_W), np.log1p(n_W), np.log1p(age_W), age_W == 0], axis=1, dtype=np.float32)


def user_features(occurrences: ItemOccurrences, n_B: Int64Array, repeat_rate: float) -> Float32Array:
    """(B, 2) of each of USER_FEATURES, of histories with so many events; `repeat_rate`: that of all users."""
    repeat_rate_B = (n_B - (occurrences.offsets_B[1:] - occurrences.offsets_B[:-1]) + PRIOR_EVENTS * repeat_rate) / (
        n_B + PRIOR_EVENTS
    )
    return np.stack([repeat_rate_B, np.log1p(n_B)], axis=1, dtype=np.float32)
