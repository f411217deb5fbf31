"""SML: learn how to join the weights before a span with those adapted to it, judged by the span after.

Symbols: W_{t-1} -> before, W^_t -> the weights of the adapted model, f_Theta -> transfer, S -> rounds, lambda_1 ->
weight_decay, lambda_2 -> transfer_weight_decay. A *stage* is one span's work: step 1 fits w on D_t with
f_Theta(W_{t-1}, w) as the weights of the loss; step 2 fits Theta on D_{t+1} with w standing still. D_{t+1} comes with
the next update, which therefore begins by closing the last stage. What is served was made in round 1, by the Theta of
the stage before: it cannot know the span that it is tested on.
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
    """What a span gives to learn from."""

    span: int
    targets: Targets
    interests: Interests | None  # as they were before the span


@dataclass(frozen=True)
class SMLMemory:
    """Between two updates: the transfer network, and the stage that waits for the next span."""

    theta: Weights
    moments: Weights  # of the network's optimiser
    adapted: Any = None  # a TrainedModel with the weights w^ and its optimiser's moments; None after the base block
    before: Weights = field(default_factory=dict)  # W_{t-1}
    span_data: SpanData | None = None  # where the closing needs it


@dataclass
class Stage:
    """A stage in work: all of it is changed in place, but `before`."""

    model: TrainedModel  # holds w
    before: Weights
    transfer: Transfer
    meter: CostMeter


@dataclass(frozen=True)
class SML:
    """Sequential meta-learning. The defaults have the budget of fine-tuning; the paper's are rounds=10, fit.epochs=1.

    Differs from the authors' code: the loss, the batches and lr_scale are the model's own; only the rows of a batch are
    stepped, and their moments decay only then; a row counts once in `weight_decay`, however often the batch has it;
    rows are made when users and items arrive; a dense weight is cut in rows as wide as the tables'.
    """

    transfer: LinearTransfer | MLPTransfer | CNNTransfer = CNNTransfer()
    fit: FitConfig = FitConfig()  # of the model, in each round
    rounds: Count = 1  # S; what is served is made in the first one
    transfer_epochs: Count = 1  # of the network, in each round
    transfer_lr: Positive = 1e-3
    weight_decay: Weight = 1e-6  # lambda_1, on the squares of the rows in a batch
    transfer_weight_decay: Weight = 1e-4  # lambda_2, on the squares of the network's weights
    restart: Literal["transferred", "adapted", "before"] = "transferred"  # where w begins in rounds after the first
    rows: Literal["all", "touched"] = "all"  # which are mapped at the end of a stage; "touched": those that w changed
    objective: Literal["next", "current"] = "next"  # the span that the network is fitted on; "current": SML-N
    train_through_transfer: bool = True  # step 1 sees the network; no: w is a fine-tuned model beside it, SML-FP
    last_trained_span: int | None = None  # the last span on which the network is fitted; 0: the base block only, SML-S
    base_parts: CountOrZero = 6  # parts of the base block, on which the network is fitted before its first use

    def __post_init__(self) -> None:
        check_options(self)
        if self.rounds > 1 and not self.train_through_transfer:
            raise OptionError("SML without the network in step 1 has nothing to do in a second round: keep rounds=1.")
        if self.fit.holdout and self.train_through_transfer:
            raise OptionError(
                "fit.holdout would stop SML by weights that nobody serves, those before the network; leave it out, or "
                "set train_through_transfer=False."
            )
        if self.base_parts in (1, 2):
            raise OptionError("SML needs at least 3 parts of the base block: set base_parts to 3 or more, or to 0.")

    def fits_network_on(self, span: int) -> bool:
        """Whether the network is fitted in the update on this span."""
        is_fixed = isinstance(self.transfer, LinearTransfer) and not self.transfer.learned
        return not is_fixed and (self.last_trained_span is None or span <= self.last_trained_span)

    def update(self, state: State, span: Span) -> State:
        """Close the last stage with the new events, then open one on them; its first weights are served."""
        if state.spans_seen == 0:
            return self._fit_base(state, span)
        transfer = Transfer.for_model(self.transfer, state.model, state.seed)
        transfer.load_state_dict(state.memory.theta)
        transfer.moments = state.memory.moments
        return self._open_stage(state, span, self._close_stage(state, span, transfer))

    def _fit_base(self, state: State, span: Span) -> State:
        """The base block trained plainly; the network fitted on a stream made of it."""
        after = fit_base_block(state, span, self.fit)
        transfer, started_at = Transfer.for_model(self.transfer, after.model, state.seed), time.process_time()
        if self.base_parts and self.fits_network_on(0):
            self._train_on_base_stream(state, after.base_epochs, transfer)
        costs = after.costs | {"transfer_cpu_s": time.process_time() - started_at}
        return replace(after, memory=_new_memory(transfer), costs=costs)

    def _train_on_base_stream(self, state: State, base_epochs: int, transfer: Transfer) -> None:
        """Fit the network on the base block as if it were a stream, and keep nothing else of that."""
        stream_state = State(state.model, state.seed)
        for recent, span in base_stream(state.histories, self.base_parts):
            stream_state = replace(stream_state, histories=recent)
            if stream_state.spans_seen == 0:
                base_state = fit_base_block(stream_state, span, replace(self.fit, base_epochs=max(base_epochs, 1)))
                stream_state = replace(base_state, memory=_new_memory(transfer))
                continue
            stage = self._close_stage(stream_state, span, transfer)
            if span.index < -1:  # after the last part there is none to close another stage
                stream_state = self._open_stage(stream_state, span, stage)

    def _close_stage(self, state: State, span: Span, transfer: Transfer) -> Stage:
        """W_t of the last stage, as the `before` of a new one: the rounds that its first step 1 left to do."""
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
                    if self.restart != "adapted":  # the moments of w's optimiser stay
                        load_weights(model, stage.before if self.restart == "before" else self._transfer_weights(stage))
                    self._adapt_model(stage, memory.span_data, (state.seed, memory.span_data.span, n))
                seed = stream_seed(state.seed, "transfer training")
                self._train_network(stage, network_data, (seed, network_data.span, n))
        after = self._transfer_weights(stage)
        if self.train_through_transfer:
            load_weights(model, after)
        return replace(stage, before=after)

    def _open_stage(self, state: State, span: Span, stage: Stage) -> State:
        """Step 1 of the first round. What it makes is served, and waits in `memory` for the next span."""
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
        """Step 1: w = argmin L(f_Theta(W_{t-1}, w) | D_t) + lambda_1 / 2 |w|^2; the network stands still."""
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
        """Step 2: Theta = argmin L(f_Theta(W_{t-1}, w^) | D_{t+1}) + lambda_2 / 2 |Theta|^2; the model stands still.

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
    """What a span gives, before the update on it."""
    return SpanData(span.index, due_targets(state.histories, history), state.interests)


def weight_decay_term(model: TrainedModel, weight: float) -> LossTerm:
    """lambda_1 / 2 |w|^2 over the rows of a batch, each once."""
    tables = list(embedding_tables(model).values())

    def term(batch: Batch, forward: Forward) -> torch.Tensor:
        squares = [table.leaf.square().sum() for table in tables if table.leaf is not None]
        return 0.5 * weight * torch.stack(squares).sum()

    return term


def transfer_decay_term(transfer: Transfer, weight: float) -> LossTerm:
    """lambda_2 / 2 |Theta|^2, which is what Adam's own weight decay adds to the gradient."""

    def term(batch: Batch, forward: Forward) -> torch.Tensor:
        return 0.5 * weight * torch.stack([theta.square().sum() for theta in transfer.parameters()]).sum()

    return term


def _new_memory(transfer: Transfer) -> SMLMemory:
    theta = {name: weight.detach().clone() for name, weight in transfer.state_dict().items()}
    return SMLMemory(theta, transfer.moments)


def _grow_weights(before: Weights, model: TrainedModel) -> Weights:
    """`before` with the rows that the model has more: what was not there before is as it begins."""
    tables = embedding_tables(model)
    return {
        name: torch.cat([before[name], now[len(before[name]) :]]) if name in tables else before[name]
        for name, now in copy_weights(model).items()
    }
