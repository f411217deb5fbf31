"""Facts about items and histories, which say when to trust which expert: counts, ages, how often items come again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from freshrec.data.batches import Targets, histories_before, in_parts
from freshrec.models.sparse import Doubles, Floats, Ints, Runs

OWN = ("taken", "times taken", "age of the last", "is the last")  # of a candidate in the history
ITEM = ("taken again", "events", "age")  # of a candidate
USER = ("takes again", "length")  # of the history, the same for all candidates
PRIOR = 5.0  # events of an average item, or of an average user, added to each
SEEN = 50  # a user's last events, in which "again" is looked for


@dataclass
class Facts:
    """What is counted of items; `clock` is the number of events so far."""

    events_I: Floats
    again_I: Floats
    first_I: Doubles  # the clock at the first event; infinite before it
    clock: int = 0

    @staticmethod
    def empty() -> Facts:
        """Of no items."""
        return Facts(np.zeros(1, np.float32), np.zeros(1, np.float32), np.full(1, np.inf))

    def grow(self, n_items: int) -> None:
        """New items start without events."""
        extra = n_items + 1 - len(self.events_I)
        self.events_I, self.again_I = np.pad(self.events_I, (0, extra)), np.pad(self.again_I, (0, extra))
        self.first_I = np.pad(self.first_I, (0, extra), constant_values=np.inf)

    def absorb(self, targets: Targets) -> None:
        """Count the events, in time order, and those whose user had the item among its last ones."""
        items_E, n = targets.items_N.numpy(), len(self.events_I)
        again_E = among_last(targets, SEEN).numpy()
        self.events_I = self.events_I + np.bincount(items_E, minlength=n).astype(np.float32)
        self.again_I = self.again_I + np.bincount(items_E, again_E, minlength=n).astype(np.float32)
        first_I = np.full(n, np.inf)
        np.minimum.at(first_I, items_E, self.clock + np.arange(len(items_E), dtype=np.float64))
        self.first_I, self.clock = np.minimum(self.first_I, first_I), self.clock + len(items_E)

    @property
    def mean(self) -> float:
        """The share of events whose item the user had among the last ones."""
        return float(self.again_I.sum() / max(self.events_I.sum(), 1.0))

    def of_items(self, window: int) -> Floats:
        """(I + 1, 3) of each of ITEM, 0 of the padding. Ages are measured in windows of so many events."""
        again_I = (self.again_I + PRIOR * self.mean) / (self.events_I + PRIOR)
        age_I = np.log1p(np.maximum(self.clock - self.first_I, 0) / window)
        x_I3 = np.stack([again_I, np.log1p(self.events_I), age_I], axis=1, dtype=np.float32)
        x_I3[0] = 0.0
        return x_I3

    def state_dict(self) -> dict[str, Tensor]:
        """Everything counted."""
        columns = {"events_I": self.events_I, "again_I": self.again_I, "first_I": self.first_I}
        return {name: torch.from_numpy(x) for name, x in columns.items()} | {"clock": torch.tensor(self.clock)}

    @staticmethod
    def load(tensors: dict[str, Tensor]) -> Facts:
        """The inverse of `state_dict`."""
        events_I, again_I, first_I = (tensors[name].numpy() for name in ("events_I", "again_I", "first_I"))
        return Facts(events_I, again_I, first_I, int(tensors["clock"]))


def among_last(targets: Targets, n: int) -> Tensor:
    """(N,) whether each target's item is among the last `n` before it; in parts, since all at once take much room."""
    found_N = torch.zeros(len(targets), dtype=torch.bool)
    for which in in_parts(torch.arange(len(targets)), 32_768):
        part = targets[which]
        found_N[which] = (histories_before(part, n) == part.items_N[:, None]).any(1)
    return found_N


def of_own(runs: Runs) -> Floats:
    """(W, 4) of each of OWN, of the items of histories."""
    n_W, age_W = runs.n_W.astype(np.float32), (runs.n_steps - 1 - runs.last_W).astype(np.float32)
    return np.stack([np.ones_like(n_W), np.log1p(n_W), np.log1p(age_W), age_W == 0], axis=1, dtype=np.float32)


def of_users(runs: Runs, n_B: Ints, mean: float) -> Floats:
    """(B, 2) of each of USER, of histories with so many events; `mean`: that of the facts."""
    again_B = (n_B - (runs.offsets_B[1:] - runs.offsets_B[:-1]) + PRIOR * mean) / (n_B + PRIOR)
    return np.stack([again_B, np.log1p(n_B)], axis=1, dtype=np.float32)
