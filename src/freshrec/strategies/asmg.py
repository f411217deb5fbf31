"""ASMG: fine-tune a chain of models, and serve a model that a generator makes from the last k of them.

Symbols of the paper: D_t -> the due targets of span t, Theta_i -> ModelWindow.models, M_w ->
ModelGenerator, h_{t-k} -> ModelWindow.hidden, lambda_i -> loss_weights. The generators are in `learn.generators`.

The update on span t has three steps:

1. Train the generator. From the models up to t - 1, which have not seen span t, it generates one for span t.
2. Fine-tune the chain on span t.
3. Generate the model to serve in span t + 1. The served model never enters the chain.
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from freshrec.config import Count, CountOrZero, Positive, check_options
from freshrec.data.batches import due_targets
from freshrec.data.histories import filter_interests, filter_rows, row_users
from freshrec.data.session_parallel import HiddenStates
from freshrec.data.stored_interests import StoredInterests, stored_interests_of
from freshrec.errors import OptionError
from freshrec.learn.base_stream import base_stream
from freshrec.learn.fit import (
    CostMeter,
    FitConfig,
    attach_negatives,
    finish_update,
    fit_base_block,
    grown_copy,
    sample_negatives,
    train,
    training_batches,
)
from freshrec.learn.generators import (
    GRUGenerator,
    MeanGenerator,
    ModelGenerator,
    ModelWindow,
    loss_weights,
    new_generator,
)
from freshrec.learn.weights import apply_parametrization, copy_weights, load_weights
from freshrec.random_streams import stream, stream_seed
from freshrec.strategies.baselines import FineTune
from freshrec.types import Batch, Forward, Histories, Interests, LossTerm, Span, State, TrainedModel


@dataclass(frozen=True)
class PastSpan:
    """Data for training on a span again: the histories of its users, their interests, and the number of items."""

    histories: Histories
    stored_interests: StoredInterests | None
    n_items: int


@dataclass(frozen=True)
class ASMGMemory:
    """The chain and the generator. The served model is in the state, not here."""

    model: Any  # the newest model of the chain: a TrainedModel
    interests: Interests | None  # interests of that model
    generator: ModelGenerator
    window: ModelWindow  # the last k models of the chain
    past_spans: tuple[PastSpan, ...]  # the last k - 1 spans, if the generator trains on several


@dataclass(frozen=True)
class ASMG:
    """Fine-tuning of a chain of models, from which a trained generator makes the model to serve.

    Differs from the paper: a residual generator starts as plain fine-tuning, so it can serve before it is trained much.
    The first windows are shorter than k. The generator is first trained on parts of the base block, because logs here
    have far fewer spans. Tables gain rows.
    """

    generator: Literal["gru", "linear"] = "gru"  # Recurrent network, or weighted mean of the models.
    k: CountOrZero = 3  # Number of models in the window. 0 = all since the base block. The base model is never in it.
    carry: bool = True  # Start from the hidden state before the window. false = start from 0.
    loss: Literal["linear", "uniform", "last", "exponential"] = "linear"  # Weights of the last k spans in the loss.
    h: Count = 4  # Number of hidden units per network.
    residual: bool = True  # Add the generator's output to the newest model. The paper has false.
    largest: Count = 10_000  # Dense tensors with more scalars share networks along their last axis.
    epochs: Count = 1  # Epochs of the generator per update.
    lr: Positive = 0.01  # Learning rate of the generator.
    base_parts: CountOrZero = 6  # Parts of the base block that the generator is first trained on. 0 = none.
    fit: FitConfig = FitConfig()  # Training options of the chain.

    def __post_init__(self) -> None:
        check_options(self)
        if self.generator == "linear" and (self.k == 0 or self.loss != "last"):
            raise OptionError("asmg:generator=linear mixes k models and trains on one span. Set k >= 1 and loss=last.")
        if self.base_parts in (1, 2):
            raise OptionError(
                f"asmg cannot use {self.base_parts} parts of the base block. Set base_parts to 0 or at least 3."
            )

    def update(self, state: State, span: Span) -> State:
        """Train the generator, fine-tune the chain, and generate the model to serve."""
        if state.spans_seen == 0:
            return self._fit_base(state, span)
        memory: ASMGMemory = state.memory
        model = grown_copy(replace(state, model=memory.model), span)
        window = memory.window.grow(copy_weights(model))
        past_spans = (*memory.past_spans, self._past_span(state, model, span))
        started_at = time.process_time()
        key = (stream_seed(state.seed, "generator"), span.index)
        generator = self._train_generator(memory.generator, model, window, past_spans, key)
        seconds = time.process_time() - started_at
        chain = FineTune(self.fit).update(replace(state, model=memory.model, interests=memory.interests), span)
        meter = CostMeter(chain.costs | {"generator_cpu_s": seconds})
        started_at = time.process_time()
        window = self._push_model(generator, window, chain.model)
        served = copy.deepcopy(chain.model)
        load_weights(served, generator.generate(window))
        meter.add_time("generator_cpu_s", started_at)
        stored_interests = stored_interests_of(served, state.interests, span.index)
        after = finish_update(state, served, stored_interests, self.fit.history, meter)
        has_past_spans = self.loss != "last" and len(window.models) > 1
        past_spans = past_spans[-len(window.models) + 1 :] if has_past_spans else ()
        return replace(after, memory=ASMGMemory(chain.model, chain.interests, generator, window, past_spans))

    def _fit_base(self, state: State, span: Span) -> State:
        base = fit_base_block(state, span, self.fit)
        generator = new_generator(base.model, self._new_network, self.largest, state.seed)
        if self.base_parts:
            started_at = time.process_time()
            generator = replace(self, base_parts=0)._train_on_base_stream(state, base.base_epochs, self.base_parts)
            base = replace(base, costs=base.costs | {"generator_cpu_s": time.process_time() - started_at})
        return replace(base, memory=ASMGMemory(base.model, base.interests, generator, ModelWindow(), ()))

    def _new_network(self, n_slots: int, rng: torch.Generator) -> GRUGenerator | MeanGenerator:
        if self.generator == "linear":
            return MeanGenerator(torch.zeros(n_slots, self.k))
        return GRUGenerator.initial(n_slots, self.h, self.residual, rng)

    def _train_on_base_stream(self, state: State, base_epochs: int, n: int) -> ModelGenerator:
        """Return the generator after a replay of parts of the base block. The models of that replay are discarded."""
        strategy = replace(self, fit=replace(self.fit, base_epochs=max(base_epochs, 1)))
        stream_state = State(state.model, state.seed)
        for recent, span in base_stream(state.histories, n):
            stream_state = strategy.update(replace(stream_state, histories=recent), span)
        memory: ASMGMemory = stream_state.memory
        return memory.generator

    def _past_span(self, state: State, model: TrainedModel, span: Span) -> PastSpan:
        """Return the span, with the interests that were served during it."""
        stored_interests = stored_interests_of(model, state.interests, span.index)
        users_N = due_targets(state.histories).users_N.unique()
        if stored_interests is not None:
            is_active_S = torch.isin(row_users(stored_interests.interests), users_N)
            interests = filter_interests(stored_interests.interests, is_active_S)
            stored_interests = replace(stored_interests, interests=interests)
        is_active_R = torch.isin(row_users(state.histories), users_N)
        return PastSpan(filter_rows(state.histories, is_active_R), stored_interests, span.n_items)

    def _train_generator(
        self,
        generator: ModelGenerator,
        model: TrainedModel,
        window: ModelWindow,
        past_spans: tuple[PastSpan, ...],
        key: tuple[int, ...],
    ) -> ModelGenerator:
        """Return the trained generator. The model made from those up to i should be good on span i + 1.

        Each step takes one batch from each of the last spans. Differs from the paper: all batches have the same size.
        So only a part of a larger older span is used, and a smaller one is repeated.
        """
        if not window.models:
            return generator
        trainable = generator.trainable_copy()
        *older, newest = past_spans
        targets = due_targets(newest.histories, self.fit.history)
        terms = [self._past_spans_term(trainable, model, window, older, key)] if older else []
        lr_scale = self.lr / model.spec.lr
        for _ in train(
            model,
            targets,
            self.epochs,
            key,
            lr_scale=lr_scale,
            stored_interests=newest.stored_interests,
            terms=terms,
            parametrization=trainable.parametrization(window),
            trainable=trainable,
        ):
            pass
        return trainable.detached_copy()

    def _past_spans_term(
        self,
        generator: ModelGenerator,
        model: TrainedModel,
        window: ModelWindow,
        past_spans: list[PastSpan],
        key: tuple[int, ...],
    ) -> LossTerm:
        """Return the term that turns the newest span's loss into a weighted sum over all spans."""
        *weights, newest = loss_weights(len(window.models), self.loss)
        seed, *path = key
        rngs = [stream(seed, "past spans", *path, j) for j in range(len(past_spans))]
        past_batches = [self._endless_batches(model, past_span, rng) for past_span, rng in zip(past_spans, rngs)]
        hidden = [HiddenStates() for _ in past_spans]

        def term(batch: Batch, forward: Forward) -> Tensor:
            loss = (newest - 1) * forward.loss
            for n, (weight, batches, states) in enumerate(zip(weights, past_batches, hidden, strict=True), 1):
                older = next(batches, None)
                if older is not None:
                    with apply_parametrization(model, generator.parametrization(window, n)) as forward_pass:
                        loss = loss + weight * states.run(forward_pass, older).loss
            return loss

        return term

    def _endless_batches(self, model: TrainedModel, past_span: PastSpan, rng: torch.Generator) -> Iterator[Batch]:
        """Yield batches of a past span in an endless loop. Yield nothing if the span has no batch."""
        targets = due_targets(past_span.histories, self.fit.history)
        negative_pool_N = torch.arange(1, past_span.n_items + 1)  # without items that came later
        is_empty = False
        while not is_empty:
            is_empty = True
            for batch in training_batches(model, targets, rng, past_span.stored_interests):
                is_empty = False
                yield attach_negatives(model, batch, sample_negatives(model, rng, negative_pool_N))

    def _push_model(self, generator: ModelGenerator, window: ModelWindow, model: TrainedModel) -> ModelWindow:
        """Return the window with one more model. If it was full, its first model is dropped."""
        models, hidden = (*window.models, copy_weights(model)), window.hidden
        if self.k and len(models) > self.k:
            hidden = generator.hidden_after_first(window) if self.carry else None
            models = models[1:]
        return ModelWindow(models, hidden)
