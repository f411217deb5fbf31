"""Self-tuned: fine-tuning with the settings that were best when the base block was replayed as a stream.

This strategy comes from no paper. It combines parts of several. How much should an update change a model? Each paper
gives one answer for all logs: retain (IMSR), replay (SPMF, ADER), merge with the previous weights (SML, ASMG), or draw
negatives from new items (SML). News and shops need opposite answers. Here each answer is a setting, and it is chosen
per log, before the first update, from the base block alone.

It is an experiment, not a recommendation. On a sample that it was not developed on, it was worse than fine-tuning
(docs/results.md).
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
    """One way of updating. The default is fine-tuning."""

    lr_scale: float = 1.0  # factor of the model's learning rate
    current_negatives: bool = False  # draw half of the negatives from the items of the new events
    replay_share: float = 0.0  # remembered targets per new target
    average_epochs: bool = False  # average the weights after each epoch except the first


SEARCH_SPACE: dict[str, tuple[Any, ...]] = {
    "lr_scale": (0.3, 2.0),
    "current_negatives": (True,),
    "replay_share": (0.5,),
    "average_epochs": (True,),
}


@dataclass(frozen=True)
class SelfTunedMemory:
    """The memory of the strategy between two updates."""

    settings: UpdateSettings
    reservoir: Reservoir


@dataclass(frozen=True)
class SelfTuned:
    """Fine-tuning with settings that are chosen one after the other in a simulation on the base block.

    The simulation trains a model on the first third of the base block and updates it part by part. It tests on all
    later parts but the first, and trains on all but the last. A value that improves the mean quality is kept. A setting
    without effect keeps its default, such as the negatives of a model that uses none. An update costs as much as
    fine-tuning, or half as much again if it replays.
    """

    base_parts: CountOrZero = 6  # Number of parts of the base block in the simulation. 0 = plain fine-tuning.
    max_queries: Count = 3000  # Maximum number of targets tested per part.
    reservoir: Positive = 0.3  # Size of the reservoir as a share of the base block's targets.
    fit: FitConfig = FitConfig()  # Training options of the model.

    def __post_init__(self) -> None:
        check_options(self)
        if self.base_parts in (1, 2, 3):
            raise OptionError(
                f"self-tuned cannot use {self.base_parts} parts of the base block. Set base_parts to 0 or at least 4."
            )
        if self.fit.holdout:
            raise OptionError("self-tuned trains for a fixed number of epochs. Leave out fit.holdout.")

    def update(self, state: State, span: Span) -> State:
        """Train on the base block and simulate. Later updates use the settings that were best in the simulation."""
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
        """Return the settings whose updates on parts of the base block were best on the following parts."""
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
        """Return the mean ndcg@20 (AUC for labelled targets) of all parts but the first, which precedes any update."""
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
        meter.costs["epochs"] = float(self.fit.epochs)
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
    """Return a pool of negatives, in which the current items together are as frequent as all items together."""
    return torch.cat([torch.arange(1, n_items + 1), current_N.repeat(n_items // len(current_N) + 1)[:n_items]])


def average_epoch_weights(model: TrainedModel, epochs: Iterable[float]) -> None:
    """Train, then set the weights to their mean after each epoch but the first. Optimisers keep their last state."""
    total, n = copy_weights(model), 0
    for n, _ in enumerate(epochs):
        current = copy_weights(model)
        total = {name: total[name] + weights for name, weights in current.items()} if n > 1 else current
    load_weights(model, {name: weights / max(n, 1) for name, weights in total.items()})
