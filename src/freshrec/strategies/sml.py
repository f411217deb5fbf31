"""SML: learn to merge the weights before a span with the weights adapted to it, so that they fit the next span.

Symbols: W_{t-1} -> before, W^_t -> the weights of the adapted model, f_Theta -> transfer, S -> rounds, lambda_1 ->
weight_decay, lambda_2 -> transfer_weight_decay.

A *stage* is the work on one span. Step 1 fits w on D_t, with f_Theta(W_{t-1}, w) as the weights in the loss. Step 2
fits Theta on D_{t+1} with w fixed. D_{t+1} arrives with the next update, so each update starts by closing the last
stage. The served weights are made in round 1, with the Theta of the previous stage. So they cannot depend on the span
that they are tested on.
"""

import copy
import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from freshrec.config import Count, CountOrZero, Positive, Weight, check_options
from freshrec.data.batches import Targets, due_targets
from freshrec.data.stored_interests import stored_interests_of
from freshrec.errors import OptionError
from freshrec.learn.base_stream import base_stream
from freshrec.learn.fit import CostMeter, FitConfig, finish_update, fit_base_block, fit_model, grown_copy, train
from freshrec.learn.transfer import (
    CNNTransfer,
    LinearTransfer,
    MLPTransfer,
    Transfer,
    adaptation_parametrization,
    transfer_parametrization,
    transfer_weights,
)
from freshrec.learn.weights import Weights, copy_weights, grow_model, load_weights
from freshrec.nn.embedding_table import embedding_tables
from freshrec.random_streams import stream_seed
from freshrec.types import Batch, Forward, Interests, LossTerm, Span, State, TrainedModel


@dataclass(frozen=True)
class SpanData:
    """The training data of a span."""

    span: int
    targets: Targets
    interests: Interests | None  # as stored before the span


@dataclass(frozen=True)
class SMLMemory:
    """The memory between two updates: the transfer network, and the stage that waits for the next span."""

    theta: Weights
    moments: Weights  # state of the network's optimiser
    adapted: Any = None  # a TrainedModel with weights w^ and optimiser state; None after the base block
    before: Weights = field(default_factory=dict)  # W_{t-1}
    span_data: SpanData | None = None  # None if closing the stage does not need it


@dataclass
class Stage:
    """An open stage. Everything but `before` changes in place."""

    model: TrainedModel  # holds w
    before: Weights
    transfer: Transfer
    meter: CostMeter


@dataclass(frozen=True)
class SML:
    """Sequential meta-learning: a trained transfer network merges the previous and the adapted weights.

    The defaults have the training budget of fine-tuning. The paper's are rounds=10 and fit.epochs=1.

    Differs from the authors' code: the loss, the batches and lr_scale are the model's own. Only the rows of a batch are
    updated, and only then do their moments decay. A row counts once in `weight_decay`, however often the batch holds
    it. Rows are added when users and items arrive. A dense weight is cut into rows as wide as those of the tables.
    """

    transfer: LinearTransfer | MLPTransfer | CNNTransfer = CNNTransfer()  # The transfer network.
    fit: FitConfig = FitConfig()  # Training options of the model, for each round.
    rounds: Count = 1  # Rounds per stage (S). The served weights are made in the first one.
    transfer_epochs: Count = 1  # Epochs of the transfer network per round.
    transfer_lr: Positive = 1e-3  # Learning rate of the transfer network.
    weight_decay: Weight = 1e-6  # L2 penalty on the rows of a batch (lambda_1).
    transfer_weight_decay: Weight = 1e-4  # L2 penalty on the weights of the transfer network (lambda_2).
    restart: Literal["transferred", "adapted", "before"] = "transferred"  # Weights that later rounds start from.
    rows: Literal["all", "touched"] = "all"  # Table rows that the network maps. "touched" = rows that training changed.
    objective: Literal["next", "current"] = "next"  # Span that the network is trained on. "current" = SML-N.
    train_through_transfer: bool = True  # Train the model through the network. false = plain fine-tuning (SML-FP).
    last_trained_span: int | None = None  # Last span that trains the network. none = no last, 0 = base block (SML-S).
    base_parts: CountOrZero = 6  # Parts of the base block that the network is first trained on. 0 = none.

    def __post_init__(self) -> None:
        check_options(self)
        if self.rounds > 1 and not self.train_through_transfer:
            raise OptionError("sml with train_through_transfer=false uses one round only. Set rounds=1.")
        if self.fit.holdout and self.train_through_transfer:
            raise OptionError(
                "sml cannot use fit.holdout, which would measure weights that are not served. Leave it out, or "
                "set train_through_transfer=false."
            )
        if self.base_parts in (1, 2):
            raise OptionError(
                f"sml cannot use {self.base_parts} parts of the base block. Set base_parts to 0 or at least 3."
            )

    def fits_network_on(self, span: int) -> bool:
        """Whether the network is trained in the update on this span."""
        is_fixed = isinstance(self.transfer, LinearTransfer) and not self.transfer.learned
        return not is_fixed and (self.last_trained_span is None or span <= self.last_trained_span)

    def update(self, state: State, span: Span) -> State:
        """Close the last stage with the new events, then open the next stage. Serve the weights of its first step."""
        if state.spans_seen == 0:
            return self._fit_base(state, span)
        transfer = Transfer.for_model(self.transfer, state.model, state.seed)
        transfer.load_state_dict(state.memory.theta)
        transfer.moments = state.memory.moments
        return self._open_stage(state, span, self._close_stage(state, span, transfer))

    def _fit_base(self, state: State, span: Span) -> State:
        """Train the model on the base block, and the network on the base block as a stream."""
        after = fit_base_block(state, span, self.fit)
        transfer, started_at = Transfer.for_model(self.transfer, after.model, state.seed), time.process_time()
        if self.base_parts and self.fits_network_on(0):
            self._train_on_base_stream(state, after.base_epochs, transfer)
        costs = after.costs | {"transfer_cpu_s": time.process_time() - started_at}
        return replace(after, memory=_new_memory(transfer), costs=costs)

    def _train_on_base_stream(self, state: State, base_epochs: int, transfer: Transfer) -> None:
        """Train the network on the base block, replayed as a stream. Only the network is kept."""
        stream_state = State(state.model, state.seed)
        for recent, span in base_stream(state.histories, self.base_parts):
            stream_state = replace(stream_state, histories=recent)
            if stream_state.spans_seen == 0:
                base_state = fit_base_block(stream_state, span, replace(self.fit, base_epochs=max(base_epochs, 1)))
                stream_state = replace(base_state, memory=_new_memory(transfer))
                continue
            stage = self._close_stage(stream_state, span, transfer)
            if span.index < -1:  # no part follows the last one, so its stage could not be closed
                stream_state = self._open_stage(stream_state, span, stage)

    def _close_stage(self, state: State, span: Span, transfer: Transfer) -> Stage:
        """Do the remaining rounds of the last stage, and return a new stage whose `before` is their result, W_t."""
        memory, meter = state.memory, CostMeter({"rows_read": 0.0})
        if memory.adapted is None:
            model = grown_copy(state, span)
            return Stage(model, copy_weights(model), transfer, meter)
        model = copy.deepcopy(memory.adapted)
        grow_model(model, span.n_users, span.n_items, state.histories.categories_I)
        stage = Stage(model, _grow_weights(memory.before, model), transfer, meter)
        if self.fits_network_on(span.index):
            network_data = memory.span_data
            if self.objective == "next":
                network_data = collect_span_data(state, span, self.fit.history)
            for n in range(1, self.rounds + 1):
                if n > 1:
                    if self.restart != "adapted":  # w's optimiser keeps its state
                        load_weights(model, stage.before if self.restart == "before" else self._transfer_weights(stage))
                    self._adapt_model(stage, memory.span_data, (state.seed, memory.span_data.span, n))
                seed = stream_seed(state.seed, "transfer training")
                self._train_network(stage, network_data, (seed, network_data.span, n))
        after = self._transfer_weights(stage)
        if self.train_through_transfer:
            load_weights(model, after)
        return replace(stage, before=after)

    def _open_stage(self, state: State, span: Span, stage: Stage) -> State:
        """Do step 1 of the first round. Its result is served, and kept in `memory` until the next span."""
        span_data = collect_span_data(state, span, self.fit.history)
        self._adapt_model(stage, span_data, (state.seed, span.index))
        served = copy.deepcopy(stage.model)
        load_weights(served, self._transfer_weights(stage))
        stored_interests = stored_interests_of(served, state.interests, span.index)
        after = finish_update(state, served, stored_interests, self.fit.history, stage.meter)
        is_needed = self.fits_network_on(span.index + 1) and (self.rounds > 1 or self.objective == "current")
        memory = _new_memory(stage.transfer)
        memory = replace(memory, adapted=stage.model, before=stage.before, span_data=span_data if is_needed else None)
        return replace(after, memory=memory)

    def _transfer_weights(self, stage: Stage) -> Weights:
        started_at = time.process_time()
        after = transfer_weights(stage.transfer, stage.model, stage.before, self.rows)
        stage.meter.add_time("transfer_cpu_s", started_at)
        return after

    def _adapt_model(self, stage: Stage, span_data: SpanData, key: tuple[int, ...]) -> None:
        """Step 1: w = argmin L(f_Theta(W_{t-1}, w) | D_t) + lambda_1 / 2 |w|^2, with the network fixed."""
        stage.transfer.requires_grad_(False)
        parametrization = None
        if self.train_through_transfer:
            parametrization = adaptation_parametrization(stage.transfer, stage.before)
        fit_model(
            stage.model,
            span_data.targets,
            self.fit,
            key,
            stage.meter,
            stored_interests=stored_interests_of(stage.model, span_data.interests, span_data.span),
            terms=[weight_decay_term(stage.model, self.weight_decay)] if self.weight_decay else [],
            parametrization=parametrization,
        )
        stage.meter.costs["rows_read"] += len(span_data.targets)

    def _train_network(self, stage: Stage, span_data: SpanData, key: tuple[int, ...]) -> None:
        """Step 2: Theta = argmin L(f_Theta(W_{t-1}, w^) | D_{t+1}) + lambda_2 / 2 |Theta|^2, with the model fixed.

        Negatives are drawn from the items of D_{t+1}.
        """
        started_at = time.process_time()
        stage.transfer.requires_grad_(True)
        weight_decay = self.transfer_weight_decay
        for _ in train(
            stage.model,
            span_data.targets,
            self.transfer_epochs,
            key,
            lr_scale=self.transfer_lr / stage.model.spec.lr,
            stored_interests=stored_interests_of(stage.model, span_data.interests, span_data.span),
            terms=[transfer_decay_term(stage.transfer, weight_decay)] if weight_decay else [],
            parametrization=transfer_parametrization(stage.transfer, stage.before, self.rows),
            trainable=stage.transfer,
            negative_pool_N=span_data.targets.items_N.unique(),
        ):
            pass
        stage.meter.add_time("transfer_cpu_s", started_at)
        stage.meter.costs["rows_read"] += len(span_data.targets)


def collect_span_data(state: State, span: Span, history: str) -> SpanData:
    """Return the training data of a span, before the update on it."""
    return SpanData(span.index, due_targets(state.histories, history), state.interests)


def weight_decay_term(model: TrainedModel, weight: float) -> LossTerm:
    """lambda_1 / 2 |w|^2 over the distinct rows of a batch."""
    tables = list(embedding_tables(model).values())

    def term(batch: Batch, forward: Forward) -> torch.Tensor:
        squares = [table.leaf.square().sum() for table in tables if table.leaf is not None]
        return 0.5 * weight * torch.stack(squares).sum()

    return term


def transfer_decay_term(transfer: Transfer, weight: float) -> LossTerm:
    """lambda_2 / 2 |Theta|^2. Its gradient is what Adam's own weight decay adds."""

    def term(batch: Batch, forward: Forward) -> torch.Tensor:
        return 0.5 * weight * torch.stack([theta.square().sum() for theta in transfer.parameters()]).sum()

    return term


def _new_memory(transfer: Transfer) -> SMLMemory:
    theta = {name: weight.detach().clone() for name, weight in transfer.state_dict().items()}
    return SMLMemory(theta, transfer.moments)


def _grow_weights(before: Weights, model: TrainedModel) -> Weights:
    """Return `before` with the rows that only the model has. Such rows keep their initial values."""
    tables = embedding_tables(model)
    return {
        name: torch.cat([before[name], now[len(before[name]) :]]) if name in tables else before[name]
        for name, now in copy_weights(model).items()
    }
