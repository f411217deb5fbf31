"""ASMG: fine-tune as usual, and serve a model that a generator makes of the last k fine-tuned ones.

Symbols of the paper: D_t -> the due targets of span t, Theta_i -> Window.models, M_w -> Generator, h_{t-k} ->
Window.hidden, lambda_i -> shares. The generator itself is in `learn.generators`.

When span t arrives: the generator learns to make, of models up to t - 1, one that is good on span t, which those models
have not seen; then the chain is fine-tuned on span t; then the generator makes the model to serve in span t + 1. What
is served never enters the chain.
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from freshrec.config import Count, CountOrNone, Positive, check_options
from freshrec.data.batches import due_targets, interests_where, owners, random_source, rows_where
from freshrec.data.carried import Carried, carried_by
from freshrec.data.lanes import HiddenStates
from freshrec.errors import OptionError
from freshrec.learn.fit import Clock, Fit, batches, finish, negatives, start, successor, train
from freshrec.learn.generators import GRU, Generator, Mix, Window, shares, untrained
from freshrec.learn.rehearsal import rehearsal
from freshrec.learn.weights import put, seen_through, weights_of
from freshrec.strategies.plain import FineTune
from freshrec.types import Batch, Forward, Histories, Interests, Span, State, Term, TrainedModel

GENERATOR = 31  # tells the generator's random numbers from the chain's


@dataclass(frozen=True)
class Block:
    """What training on a span again takes: its users' events as they were due, and what travelled with the batches."""

    histories: Histories
    carried: Carried | None
    n_items: int


@dataclass(frozen=True)
class Memory:
    """The chain and the generator. What a state serves is neither."""

    model: Any  # the chain: a TrainedModel, fine-tuned on the last span
    users: Interests | None  # its interests
    generator: Generator
    window: Window  # the last k models of the chain
    blocks: tuple[Block, ...]  # the last k - 1 spans, where the generator learns on several at once


@dataclass(frozen=True)
class ASMG:
    """The variants differ in what the generator is, starts from and learns on.

    Differs from the paper: a residual generator starts as plain fine-tuning, so that it may serve before it has learnt
    much; the first windows are shorter than k; it rehearses on parts of the base block, because logs here have far
    fewer spans; tables gain rows.
    """

    generator: Literal["gru", "linear"] = "gru"
    k: CountOrNone = 3  # models in the window; 0 = all since the base block, which is never in it
    carry: bool = True  # start from the state before the window; else from 0
    loss: Literal["linear", "uniform", "last", "exponential"] = "linear"  # on the last k spans: how much each counts
    h: Count = 4  # hidden units of each slot
    residual: bool = True  # the generator adds to the newest model; False is the paper's
    largest: Count = 10_000  # scalars of a dense tensor that get a network each; above, one for each of its last axis
    epochs: Count = 1  # of the generator
    lr: Positive = 0.01  # of the generator
    rehearsals: CountOrNone = 6  # parts of the base block, on which the generator learns before its first use
    fit: Fit = Fit()  # of the chain

    def __post_init__(self) -> None:
        check_options(self)
        if self.generator == "linear" and (self.k == 0 or self.loss != "last"):
            raise OptionError("the linear generator mixes k models and learns on one span: set k >= 1 and loss=last.")
        if self.rehearsals in (1, 2):
            raise OptionError("ASMG rehearses on 3 parts of the base block or more: raise rehearsals, or set it to 0.")

    def update(self, state: State, span: Span) -> State:
        """Train the generator, fine-tune the chain, generate what is served."""
        if state.spans_seen == 0:
            return self._begun(state, span)
        memory: Memory = state.memory
        model = successor(replace(state, model=memory.model), span)
        window = memory.window.grown(weights_of(model))
        blocks = (*memory.blocks, self._block(state, model, span))
        since = time.process_time()
        generator = self._trained(memory.generator, model, window, blocks, (state.seed, span.index, GENERATOR))
        seconds = time.process_time() - since
        chain = FineTune(self.fit).update(replace(state, model=memory.model, users=memory.users), span)
        clock = Clock(chain.costs | {"generator_cpu_s": seconds})
        since = time.process_time()
        window = self._pushed(generator, window, chain.model)
        served = copy.deepcopy(chain.model)
        put(served, generator.whole(window))
        clock.timed("generator_cpu_s", since)
        carried = carried_by(served, state.users, span.index)
        after = finish(state, served, carried, self.fit.history, clock)
        kept = blocks[-len(window.models) + 1 :] if self.loss != "last" and len(window.models) > 1 else ()
        return replace(after, memory=Memory(chain.model, chain.users, generator, window, kept))

    def _begun(self, state: State, span: Span) -> State:
        base = start(state, span, self.fit)
        generator = untrained(base.model, self._maker, self.largest, state.seed)
        if self.rehearsals:
            since = time.process_time()
            generator = replace(self, rehearsals=0)._rehearsed(state, base.base_epochs, self.rehearsals)
            base = replace(base, costs=base.costs | {"generator_cpu_s": time.process_time() - since})
        return replace(base, memory=Memory(base.model, base.users, generator, Window(), ()))

    def _maker(self, n_slots: int, source: torch.Generator) -> GRU | Mix:
        if self.generator == "linear":
            return Mix(torch.zeros(n_slots, self.k))
        return GRU.untrained(n_slots, self.h, self.residual, source)

    def _rehearsed(self, state: State, base_epochs: int, n: int) -> Generator:
        """The generator after a replay of parts of the base block. The models of that replay are thrown away."""
        strategy = replace(self, fit=replace(self.fit, base_epochs=max(base_epochs, 1)))
        past = State(state.model, state.seed)
        for recent, span in rehearsal(state.recent, n):
            past = strategy.update(replace(past, recent=recent), span)
        memory: Memory = past.memory
        return memory.generator

    def _block(self, state: State, model: TrainedModel, span: Span) -> Block:
        """The span, with the interests that were served in it."""
        carried = carried_by(model, state.users, span.index)
        users_N = due_targets(state.recent).users_N.unique()
        if carried is not None:
            theirs_S = torch.isin(owners(carried.users), users_N)
            carried = replace(carried, users=interests_where(carried.users, theirs_S))
        of_theirs_R = torch.isin(owners(state.recent), users_N)
        return Block(rows_where(state.recent, of_theirs_R), carried, span.n_items)

    def _trained(
        self, generator: Generator, model: TrainedModel, window: Window, blocks: tuple[Block, ...], key: tuple[int, ...]
    ) -> Generator:
        """The generator after learning: the model made of those up to i has to be good on span i + 1.

        Each step takes a batch of each of the last spans. Differs from the paper: all are of one size, so that an older
        span with more events is seen in part, and one with fewer starts over.
        """
        if not window.models:
            return generator
        learner = generator.learning()
        *older, newest = blocks
        targets = due_targets(newest.histories, self.fit.history)
        terms = [self._older(learner, model, window, older, key)] if older else []
        lr_scale = self.lr / model.spec.lr
        for _ in train(
            model, targets, self.epochs, key, lr_scale=lr_scale, carried=newest.carried, terms=terms,
            view=learner.view(window), learner=learner,
        ):  # fmt: skip
            pass
        return learner.learnt()

    def _older(
        self, generator: Generator, model: TrainedModel, window: Window, blocks: list[Block], key: tuple[int, ...]
    ) -> Term:
        """What makes the newest span's loss a weighted sum over all of them."""
        *weights, newest = shares(len(window.models), self.loss)
        streams = [self._stream(model, block, (*key, 0, j)) for j, block in enumerate(blocks)]
        hidden = [HiddenStates() for _ in blocks]

        def term(batch: Batch, forward: Forward) -> Tensor:
            loss = (newest - 1) * forward.loss
            for n, (weight, stream, states) in enumerate(zip(weights, streams, hidden, strict=True), 1):
                older = next(stream, None)
                if older is not None:
                    with seen_through(model, generator.view(window, n)) as forward_pass:
                        loss = loss + weight * states.run(forward_pass, older).loss
            return loss

        return term

    def _stream(self, model: TrainedModel, block: Block, key: tuple[int, ...]) -> Iterator[Batch]:
        """Batches of a past span without end, or none where there is none."""
        targets, source = due_targets(block.histories, self.fit.history), random_source(*key)
        among_N = torch.arange(1, block.n_items + 1)  # no item that came later
        empty = False
        while not empty:
            empty = True
            for batch in batches(model, targets, source, block.carried):
                empty = False
                yield replace(batch, negatives_N=negatives(model, source, among_N))

    def _pushed(self, generator: Generator, window: Window, model: TrainedModel) -> Window:
        """The window with one more model, and without its first one if it was full."""
        models, hidden = (*window.models, weights_of(model)), window.hidden
        if self.k and len(models) > self.k:
            hidden = generator.passed(window) if self.carry else None
            models = models[1:]
        return Window(models, hidden)
