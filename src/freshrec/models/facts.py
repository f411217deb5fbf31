"""Facts about items and histories, which say when to trust which expert: counts, ages, how often items come again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from freshrec.data.batches import Targets, histories_before
from freshrec.models.sparse import Board, Doubles, Floats, Ints, starts

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
        again_E = (histories_before(targets, SEEN).numpy() == items_E[:, None]).any(1)
        self.events_I = self.events_I + np.bincount(items_E, minlength=n).astype(np.float32)
        self.again_I = self.again_I + np.bincount(items_E, again_E, minlength=n).astype(np.float32)
        first_I = np.full(n, np.inf)
        np.minimum.at(first_I, items_E, self.clock + np.arange(len(items_E), dtype=np.float64))
        self.first_I, self.clock = np.minimum(self.first_I, first_I), self.clock + len(items_E)

    def describe(self, items_BC: Ints, history_BT: Ints, board: Board, window: int) -> list[Floats]:
        """(B, C) of each of OWN, ITEM and USER."""
        n_steps, n_B = history_BT.shape[1], (history_BT > 0).sum(1)
        sorted_BT = np.sort(history_BT, axis=1)
        starts_BT = starts(sorted_BT)
        step_T = np.arange(n_steps)
        run_BT = step_T - np.maximum.accumulate(np.where(starts_BT, step_T, 0), axis=1) + 1 if n_steps else sorted_BT
        times_BC = board.at(items_BC, sorted_BT, run_BT)  # the last of a run of equal items has their number
        place_BC = board.at(items_BC, history_BT, step_T + 1)
        taken_BC = times_BC > 0
        mean = float(self.again_I.sum() / max(self.events_I.sum(), 1.0))
        events_BC = self.events_I[items_BC]
        age_BC = np.log1p(np.maximum(self.clock - self.first_I[items_BC], 0) / window)
        again_B = (n_B - starts_BT.sum(1) + PRIOR * mean) / (n_B + PRIOR)
        columns = [
            taken_BC, np.log1p(times_BC), np.where(taken_BC, np.log1p(n_steps - place_BC), 0),
            taken_BC & (place_BC == n_steps),
            (self.again_I[items_BC] + PRIOR * mean) / (events_BC + PRIOR), np.log1p(events_BC), age_BC,
            np.broadcast_to(again_B[:, None], items_BC.shape), np.broadcast_to(np.log1p(n_B)[:, None], items_BC.shape),
        ]  # fmt: skip
        return [np.where(items_BC > 0, column, 0).astype(np.float32) for column in columns]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything counted."""
        columns = {"events_I": self.events_I, "again_I": self.again_I, "first_I": self.first_I}
        return {name: torch.from_numpy(x) for name, x in columns.items()} | {"clock": torch.tensor(self.clock)}

    @staticmethod
    def load(tensors: dict[str, Tensor]) -> Facts:
        """The inverse of `state_dict`."""
        events_I, again_I, first_I = (tensors[name].numpy() for name in ("events_I", "again_I", "first_I"))
        return Facts(events_I, again_I, first_I, int(tensors["clock"]))
