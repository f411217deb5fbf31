"""Rehearsed: fine-tuning in the manner that would have been best on the base block, replayed as if it were a stream.

None of the four papers has it; it joins what their parts are good for. How much an update should change a model is the
question that all of them answer once for all logs, and differently: retain (IMSR), replay (SPMF, ADER), join with the
weights before (SML, ASMG), draw negatives from what is new (SML). News want the opposite of what a shop wants. Here
each answer is a knob, and each log turns them itself, before its first update and on nothing but its base block. On
another sample than it was developed on it was worse than fine-tuning (docs/results.md): an experiment, no advice.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from freshrec.config import Count, CountOrNone, Positive, check_options
from freshrec.data.batches import due_targets, random_source
from freshrec.data.carried import carried_by
from freshrec.device import permutation
from freshrec.errors import OptionError
from freshrec.learn.fit import Clock, Fit, finish, ndcg, start, successor, train
from freshrec.learn.rehearsal import rehearsal
from freshrec.learn.reservoir import Reservoir, filled, joined, kept_length, stream
from freshrec.learn.weights import put, weights_of
from freshrec.types import SEQUENCES, Histories, Span, State, TrainedModel

FILL, DRAW, ASK = 1301, 1302, 1303  # tell the random numbers apart from each other and from those of the epochs


@dataclass(frozen=True)
class Manner:
    """One way of updating; the default is fine-tuning."""

    lr_scale: float = 1.0  # against the model's learning rate
    current: bool = False  # half of the negatives are items of the new events
    replayed: float = 0.0  # remembered targets to a new one
    averaged: bool = False  # the model is the mean of those after each epoch but the first


KNOBS: dict[str, tuple[Any, ...]] = {
    "lr_scale": (0.3, 2.0),
    "current": (True,),
    "replayed": (0.5,),
    "averaged": (True,),
}


@dataclass(frozen=True)
class Memory:
    """Between two updates."""

    manner: Manner
    reservoir: Reservoir


@dataclass(frozen=True)
class Rehearsed:
    """The knobs are turned one after the other: what was better in the rehearsal stays.

    A rehearsal trains a model on the first third of the base block and goes through the parts after that: all but the
    first are asked for, all but the last are learnt. An update costs what fine-tuning costs, and half as much again
    where it replays. Knobs that do nothing stay as they are: negatives of a model without them, a mean of two epochs.
    """

    rehearsals: CountOrNone = 6  # parts of the base block; 0: plain fine-tuning
    asked: Count = 3000  # targets of each part, at most
    reservoir: Positive = 0.3  # share of the base block's targets that are remembered
    fit: Fit = Fit()

    def __post_init__(self) -> None:
        check_options(self)
        if self.rehearsals in (1, 2, 3):
            raise OptionError("a rehearsal takes 4 parts of the base block or more: raise rehearsals, or set it to 0.")
        if self.fit.holdout:
            raise OptionError("rehearsed chooses how to update before it updates; it has no use for fit.holdout.")

    def update(self, state: State, span: Span) -> State:
        """The base block plainly, then the rehearsal; later, an update in the manner that it has found."""
        if state.spans_seen == 0:
            after = start(state, span, self.fit)
            clock, since = Clock(dict(after.costs)), time.process_time()
            manner = self._rehearsed(state, after.base_epochs)
            clock.timed("rehearsal_cpu_s", since)
            clock.costs |= {name: float(getattr(manner, name)) for name in KNOBS}
            return replace(after, memory=Memory(manner, self._filled(state)), costs=dict(clock.costs))
        return self._updated(state, span)

    def _filled(self, state: State) -> Reservoir:
        due = due_targets(state.recent)
        size = max(1, round(self.reservoir * len(due)))
        return filled(due, size, kept_length(state.model), random_source(state.seed, state.spans_seen, FILL))

    def _rehearsed(self, state: State, base_epochs: int) -> Manner:
        """The manner whose chain of updates on parts of the base block was best on the parts that came next."""
        if not self.rehearsals:
            return Manner()
        (recent, span), *parts = rehearsal(state.recent, self.rehearsals)
        before = State(state.model, state.seed, recent=recent)
        fit = replace(self.fit, base_epochs=max(base_epochs, 1))
        begun = start(before, span, fit)
        reservoir = self._filled(before)
        best = Manner()
        quality = self._chain(begun, parts, Memory(best, reservoir))
        for name, values in KNOBS.items():
            tried = [replace(best, **{name: value}) for value in values]
            qualities = [self._chain(begun, parts, Memory(manner, reservoir)) for manner in tried]
            if max(qualities) > quality:
                quality = max(qualities)
                best = tried[qualities.index(quality)]
        return best

    def _chain(self, state: State, parts: list[tuple[Histories, Span]], memory: Memory) -> float:
        """Mean ndcg@20 (AUC of labelled targets) on all parts but the first, which meets all manners alike."""
        qualities = []
        state = replace(state, memory=memory)
        for n, (recent, span) in enumerate(parts, 1):
            state = replace(state, recent=recent)
            if n > 1:
                qualities.append(self._quality(state, span))
            if n < len(parts):
                state = self._updated(state, span)
        return sum(qualities) / max(len(qualities), 1)

    def _quality(self, state: State, span: Span) -> float:
        due = due_targets(state.recent)
        which_N = permutation(len(due), random_source(state.seed, span.index, ASK))[: self.asked]
        return ndcg(state.model, due[which_N], carried_by(state.model, state.users, span.index))

    def _updated(self, state: State, span: Span) -> State:
        memory: Memory = state.memory
        model, due = successor(state, span), due_targets(state.recent, self.fit.history)
        targets, kept = due, memory.reservoir.kept
        if memory.manner.replayed:
            order_M = permutation(len(kept), random_source(state.seed, span.index, DRAW))
            which_M = order_M[: int(memory.manner.replayed * len(due))]
            targets = joined(due, kept, which_M, apart=model.unit in SEQUENCES)
        carried = carried_by(model, state.users, span.index)
        clock, since = Clock({"rows_read": float(len(targets))}), time.process_time()
        among_N = mixed(due.items_N.unique(), model.n_items) if memory.manner.current and len(due) else None
        key, lr_scale = (state.seed, span.index), memory.manner.lr_scale * self.fit.lr_scale
        epochs = train(model, targets, self.fit.epochs, key, lr_scale=lr_scale, carried=carried, among_N=among_N)
        if memory.manner.averaged:
            average(model, epochs)
        else:
            for _ in epochs:
                pass
        clock.timed("train_cpu_s", since)
        after = finish(state, model, carried, self.fit.history, clock)
        fill = random_source(state.seed, span.index, FILL)
        return replace(after, memory=replace(memory, reservoir=stream(memory.reservoir, due, fill)))


def mixed(current_N: Tensor, n_items: int) -> Tensor:
    """Items to draw negatives from: all of them, and as many of the current ones."""
    return torch.cat([torch.arange(1, n_items + 1), current_N.repeat(n_items // len(current_N) + 1)[:n_items]])


def average(model: TrainedModel, epochs: Iterable[float]) -> None:
    """Train, and leave the mean of the weights after each epoch but the first; the optimisers go on from the last."""
    total, n = weights_of(model), 0
    for n, _ in enumerate(epochs):
        now = weights_of(model)
        total = {name: total[name] + weights for name, weights in now.items()} if n > 1 else now
    put(model, {name: weights / max(n, 1) for name, weights in total.items()})
