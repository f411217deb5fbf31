"""Self-tuned: fine-tuning with the settings that would have been best on the base block, replayed as a stream.

None of the four papers has it; it joins what their parts are good for. How much an update should change a model is the
question that all of them answer once for all logs, and differently: retain (IMSR), replay (SPMF, ADER), join with the
weights before (SML, ASMG), draw negatives from what is new (SML). News want the opposite of what a shop wants. Here
each answer is a setting, and each log chooses them itself, before its first update and on nothing but its base block.
On another sample than it was developed on it was worse than fine-tuning (docs/results.md): an experiment, no advice.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from freshrec.config import Count, CountOrZero, Positive, check_options
from freshrec.data.batches import due_targets
from freshrec.data.stored_interests import stored_interests_of
from freshrec.device import permutation
from freshrec.errors import OptionError
from freshrec.learn.base_stream import base_stream
from freshrec.learn.fit import CostMeter, FitConfig, finish_update, fit_base_block, grown_copy, train
from freshrec.learn.reservoir import Reservoir, append_samples, fill_reservoir, sample_history_length, update_reservoir
from freshrec.learn.validation import mean_ndcg
from freshrec.learn.weights import copy_weights, load_weights
from freshrec.random_streams import stream
from freshrec.types import SEQUENCE_FORMATS, Histories, Span, State, TrainedModel


@dataclass(frozen=True)
class UpdateSettings:
    """One way of updating; the default is fine-tuning."""

    lr_scale: float = 1.0  # against the model's learning rate
    current_negatives: bool = False  # half of the negatives are items of the new events
    replay_share: float = 0.0  # remembered targets to a new one
    average_epochs: bool = False  # the model is the mean of those after each epoch but the first


SEARCH_SPACE: dict[str, tuple[Any, ...]] = {
    "lr_scale": (0.3, 2.0),
    "current_negatives": (True,),
    "replay_share": (0.5,),
    "average_epochs": (True,),
}


@dataclass(frozen=True)
class SelfTunedMemory:
    """Between two updates."""

    settings: UpdateSettings
    reservoir: Reservoir


@dataclass(frozen=True)
class SelfTuned:
    """Settings are chosen one after the other: a value that was better in the simulation stays.

    The simulation trains a model on the first third of the base block and goes through the parts after that: all but
    the first are tested, all but the last are trained on. An update costs what fine-tuning costs, and half as much
    again where it replays. Settings that do nothing stay as they are: negatives of a model without them, a mean of two
    epochs.
    """

    base_parts: CountOrZero = 6  # parts of the base block; 0: plain fine-tuning
    max_queries: Count = 3000  # targets of each part, at most
    reservoir: Positive = 0.3  # share of the base block's targets that are remembered
    fit: FitConfig = FitConfig()

    def __post_init__(self) -> None:
        check_options(self)
        if self.base_parts in (1, 2, 3):
            raise OptionError(
                "self-tuned needs at least 4 parts of the base block: set base_parts to 4 or more, or to 0."
            )
        if self.fit.holdout:
            raise OptionError("self-tuned chooses how to update before it updates; it has no use for fit.holdout.")

    def update(self, state: State, span: Span) -> State:
        """The base block plainly, then the simulation; later, updates with the settings that were best in it."""
        if state.spans_seen == 0:
            after = fit_base_block(state, span, self.fit)
            meter, started_at = CostMeter(dict(after.costs)), time.process_time()
            settings = self._tune(state, after.base_epochs)
            meter.add_time("rehearsal_cpu_s", started_at)
            meter.costs |= {name: float(getattr(settings, name)) for name in SEARCH_SPACE}
            return replace(
                after, memory=SelfTunedMemory(settings, self._fill_reservoir(state)), costs=dict(meter.costs)
            )
        return self._apply_update(state, span)

    def _fill_reservoir(self, state: State) -> Reservoir:
        due = due_targets(state.histories)
        size = max(1, round(self.reservoir * len(due)))
        rng = stream(state.seed, "self-tuned base reservoir")
        return fill_reservoir(due, size, sample_history_length(state.model), rng)

    def _tune(self, state: State, base_epochs: int) -> UpdateSettings:
        """The settings whose chain of updates on parts of the base block was best on the parts that came next."""
        if not self.base_parts:
            return UpdateSettings()
        (recent, span), *parts = base_stream(state.histories, self.base_parts)
        initial = State(state.model, state.seed, histories=recent)
        fit = replace(self.fit, base_epochs=max(base_epochs, 1))
        base_state = fit_base_block(initial, span, fit)
        reservoir = self._fill_reservoir(initial)
        best = UpdateSettings()
        quality = self._simulate_updates(base_state, parts, SelfTunedMemory(best, reservoir))
        for name, values in SEARCH_SPACE.items():
            candidates = [replace(best, **{name: value}) for value in values]
            qualities = [
                self._simulate_updates(base_state, parts, SelfTunedMemory(settings, reservoir))
                for settings in candidates
            ]
            if max(qualities) > quality:
                quality = max(qualities)
                best = candidates[qualities.index(quality)]
        return best

    def _simulate_updates(self, state: State, parts: list[tuple[Histories, Span]], memory: SelfTunedMemory) -> float:
        """Mean ndcg@20 (AUC of labelled targets) on all parts but the first, which comes before any update."""
        qualities = []
        state = replace(state, memory=memory)
        for n, (recent, span) in enumerate(parts, 1):
            state = replace(state, histories=recent)
            if n > 1:
                qualities.append(self._mean_quality(state, span))
            if n < len(parts):
                state = self._apply_update(state, span)
        return sum(qualities) / max(len(qualities), 1)

    def _mean_quality(self, state: State, span: Span) -> float:
        due = due_targets(state.histories)
        index_N = permutation(len(due), stream(state.seed, "self-tuned queries", span.index))[: self.max_queries]
        return mean_ndcg(state.model, due[index_N], stored_interests_of(state.model, state.interests, span.index))

    def _apply_update(self, state: State, span: Span) -> State:
        memory: SelfTunedMemory = state.memory
        model, due = grown_copy(state, span), due_targets(state.histories, self.fit.history)
        targets, samples = due, memory.reservoir.samples
        if memory.settings.replay_share:
            order_M = permutation(len(samples), stream(state.seed, "self-tuned replay", span.index))
            index_M = order_M[: int(memory.settings.replay_share * len(due))]
            targets = append_samples(due, samples, index_M, separate_users=model.batch_format in SEQUENCE_FORMATS)
        stored_interests = stored_interests_of(model, state.interests, span.index)
        meter, started_at = CostMeter({"rows_read": float(len(targets))}), time.process_time()
        negative_pool_N = None
        if memory.settings.current_negatives and len(due):
            negative_pool_N = mix_negative_pool(due.items_N.unique(), model.n_items)
        key, lr_scale = (state.seed, span.index), memory.settings.lr_scale * self.fit.lr_scale
        epochs = train(
            model,
            targets,
            self.fit.epochs,
            key,
            lr_scale=lr_scale,
            stored_interests=stored_interests,
            negative_pool_N=negative_pool_N,
        )
        if memory.settings.average_epochs:
            average_epoch_weights(model, epochs)
        else:
            for _ in epochs:
                pass
        meter.add_time("train_cpu_s", started_at)
        after = finish_update(state, model, stored_interests, self.fit.history, meter)
        fill_rng = stream(state.seed, "self-tuned reservoir", span.index)
        return replace(after, memory=replace(memory, reservoir=update_reservoir(memory.reservoir, due, fill_rng)))


def mix_negative_pool(current_N: Tensor, n_items: int) -> Tensor:
    """Items to draw negatives from: all of them, and as many of the current ones."""
    return torch.cat([torch.arange(1, n_items + 1), current_N.repeat(n_items // len(current_N) + 1)[:n_items]])


def average_epoch_weights(model: TrainedModel, epochs: Iterable[float]) -> None:
    """Train, and leave the mean of the weights after each epoch but the first; the optimisers go on from the last."""
    total, n = copy_weights(model), 0
    for n, _ in enumerate(epochs):
        current = copy_weights(model)
        total = {name: total[name] + weights for name, weights in current.items()} if n > 1 else current
    load_weights(model, {name: weights / max(n, 1) for name, weights in total.items()})
