"""SML: learn how to join the weights before a span with those adapted to it, judged by the span after.

Symbols: W_{t-1} -> before, W^_t -> the weights of the adapted model, f_Theta -> transfer, S -> rounds, lambda_1 ->
shrink, lambda_2 -> decay. A *stage* is one span's work: step 1 fits w on D_t with f_Theta(W_{t-1}, w) as the weights of
the loss; step 2 fits Theta on D_{t+1} with w standing still. D_{t+1} comes with the next update, which therefore begins
by closing the last stage. What is served was made in round 1, by the Theta of the stage before: it cannot know the span
that it is tested on.
"""

import copy
import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from freshrec.config import Count, CountOrNone, Positive, Weight, check_options
from freshrec.data.batches import Targets, due_targets
from freshrec.data.carried import carried_by
from freshrec.errors import OptionError
from freshrec.learn.fit import Clock, Fit, adapt, finish, start, successor, train
from freshrec.learn.rehearsal import rehearsal
from freshrec.learn.transfer import CNNTransfer, LinearTransfer, MLPTransfer, Transfer, judged, moved, transferred
from freshrec.learn.weights import Weights, grow, put, weights_of
from freshrec.models.tables import tables_of
from freshrec.types import Batch, Forward, Interests, Span, State, Term, TrainedModel


@dataclass(frozen=True)
class Block:
    """What a span gives to learn from."""

    span: int
    targets: Targets
    users: Interests | None  # as they were before the span


@dataclass(frozen=True)
class Memory:
    """Between two updates: the transfer network, and the stage that waits for the next span."""

    theta: Weights
    moments: Weights  # of the network's optimiser
    adapted: Any = None  # a TrainedModel with the weights w^ and its optimiser's moments; None after the base block
    before: Weights = field(default_factory=dict)  # W_{t-1}
    block: Block | None = None  # where the closing needs it


@dataclass
class Stage:
    """A stage in work: all of it is changed in place, but `before`."""

    model: TrainedModel  # holds w
    before: Weights
    transfer: Transfer
    clock: Clock


@dataclass(frozen=True)
class SML:
    """Sequential meta-learning. The defaults have the budget of fine-tuning; the paper's are rounds=10, fit.epochs=1.

    Differs from the authors' code: the loss, the batches and lr_scale are the model's own; only the rows of a batch are
    stepped, and their moments decay only then; a row counts once in `shrink`, however often the batch has it; rows are
    made when users and items arrive; a dense weight is cut in rows as wide as the tables'.
    """

    transfer: LinearTransfer | MLPTransfer | CNNTransfer = CNNTransfer()
    fit: Fit = Fit()  # of the model, in each round
    rounds: Count = 1  # S; what is served is made in the first one
    transfer_epochs: Count = 1  # of the network, in each round
    transfer_lr: Positive = 1e-3
    shrink: Weight = 1e-6  # lambda_1, on the squares of the rows in a batch
    decay: Weight = 1e-4  # lambda_2, on the squares of the network's weights
    restart: Literal["transferred", "adapted", "before"] = "transferred"  # where w begins in rounds after the first
    rows: Literal["all", "touched"] = "all"  # which are mapped at the end of a stage; "touched": those that w changed
    objective: Literal["next", "current"] = "next"  # the span that the network is fitted on; "current": SML-N
    through: bool = True  # step 1 sees the network; no: w is a fine-tuned model beside it, SML-FP
    until: int | None = None  # the last span on which the network is fitted; 0: in the base block only, SML-S
    rehearsals: CountOrNone = 6  # parts of the base block, on which the network is fitted before its first use

    def __post_init__(self) -> None:
        check_options(self)
        if self.rounds > 1 and not self.through:
            raise OptionError("SML without the network in step 1 has nothing to do in a second round: keep rounds=1.")
        if self.fit.holdout and self.through:
            raise OptionError(
                "fit.holdout would stop SML by weights that nobody serves, those before the network; leave it out, or "
                "set through=False."
            )
        if self.rehearsals in (1, 2):
            raise OptionError("SML rehearses on 3 parts of the base block or more: raise rehearsals, or set it to 0.")

    def fits_network_on(self, span: int) -> bool:
        """Whether the network is fitted in the update on this span."""
        is_fixed = isinstance(self.transfer, LinearTransfer) and not self.transfer.learned
        return not is_fixed and (self.until is None or span <= self.until)

    def update(self, state: State, span: Span) -> State:
        """Close the last stage with the new events, then open one on them; its first weights are served."""
        if state.spans_seen == 0:
            return self._begin(state, span)
        transfer = Transfer.of(self.transfer, state.model, state.seed)
        transfer.load_state_dict(state.memory.theta)
        transfer.moments = state.memory.moments
        return self._opened(state, span, self._closed(state, span, transfer))

    def _begin(self, state: State, span: Span) -> State:
        """The base block trained plainly; the network fitted on a stream made of it."""
        after = start(state, span, self.fit)
        transfer, since = Transfer.of(self.transfer, after.model, state.seed), time.process_time()
        if self.rehearsals and self.fits_network_on(0):
            self._rehearse(state, after.base_epochs, transfer)
        costs = after.costs | {"transfer_cpu_s": time.process_time() - since}
        return replace(after, memory=_memory(transfer), costs=costs)

    def _rehearse(self, state: State, base_epochs: int, transfer: Transfer) -> None:
        """Fit the network on the base block as if it were a stream, and keep nothing else of that."""
        rehearsed = State(state.model, state.seed)
        for recent, span in rehearsal(state.recent, self.rehearsals):
            rehearsed = replace(rehearsed, recent=recent)
            if rehearsed.spans_seen == 0:
                scratch = start(rehearsed, span, replace(self.fit, base_epochs=max(base_epochs, 1)))
                rehearsed = replace(scratch, memory=_memory(transfer))
                continue
            stage = self._closed(rehearsed, span, transfer)
            if span.index < -1:  # after the last part there is none to close another stage
                rehearsed = self._opened(rehearsed, span, stage)

    def _closed(self, state: State, span: Span, transfer: Transfer) -> Stage:
        """W_t of the last stage, as the `before` of a new one: the rounds that its first step 1 left to do."""
        memory, clock = state.memory, Clock({"rows_read": 0.0})
        if memory.adapted is None:
            model = successor(state, span)
            return Stage(model, weights_of(model), transfer, clock)
        model = copy.deepcopy(memory.adapted)
        grow(model, span.n_users, span.n_items, state.recent.kinds_I)
        stage = Stage(model, _grown(memory.before, model), transfer, clock)
        if self.fits_network_on(span.index):
            judge = block_of(state, span, self.fit.history) if self.objective == "next" else memory.block
            for n in range(1, self.rounds + 1):
                if n > 1:
                    if self.restart != "adapted":  # the moments of w's optimiser stay
                        put(model, stage.before if self.restart == "before" else self._transferred(stage))
                    self._adapt(stage, memory.block, (state.seed, memory.block.span, n))
                self._learn(stage, judge, (state.seed, judge.span, n, 2))
        after = self._transferred(stage)
        if self.through:
            put(model, after)
        return replace(stage, before=after)

    def _opened(self, state: State, span: Span, stage: Stage) -> State:
        """Step 1 of the first round. What it makes is served, and waits in `memory` for the next span."""
        block = block_of(state, span, self.fit.history)
        self._adapt(stage, block, (state.seed, span.index))
        served = copy.deepcopy(stage.model)
        put(served, self._transferred(stage))
        carried = carried_by(served, state.users, span.index)
        after = finish(state, served, carried, self.fit.history, stage.clock)
        is_needed = self.fits_network_on(span.index + 1) and (self.rounds > 1 or self.objective == "current")
        memory = _memory(stage.transfer)
        memory = replace(memory, adapted=stage.model, before=stage.before, block=block if is_needed else None)
        return replace(after, memory=memory)

    def _transferred(self, stage: Stage) -> Weights:
        since = time.process_time()
        after = transferred(stage.transfer, stage.model, stage.before, self.rows)
        stage.clock.timed("transfer_cpu_s", since)
        return after

    def _adapt(self, stage: Stage, block: Block, key: tuple[int, ...]) -> None:
        """Step 1: w = argmin L(f_Theta(W_{t-1}, w) | D_t) + lambda_1 / 2 |w|^2; the network stands still."""
        stage.transfer.requires_grad_(False)
        adapt(
            stage.model,
            block.targets,
            self.fit,
            key,
            stage.clock,
            carried=carried_by(stage.model, block.users, block.span),
            terms=[shrinking(stage.model, self.shrink)] if self.shrink else [],
            view=moved(stage.transfer, stage.before) if self.through else None,
        )
        stage.clock.costs["rows_read"] += len(block.targets)

    def _learn(self, stage: Stage, block: Block, key: tuple[int, ...]) -> None:
        """Step 2: Theta = argmin L(f_Theta(W_{t-1}, w^) | D_{t+1}) + lambda_2 / 2 |Theta|^2; the model stands still.

        Negatives are drawn from the items of D_{t+1}.
        """
        since = time.process_time()
        stage.transfer.requires_grad_(True)
        for _ in train(
            stage.model,
            block.targets,
            self.transfer_epochs,
            key,
            lr_scale=self.transfer_lr / stage.model.spec.lr,
            carried=carried_by(stage.model, block.users, block.span),
            terms=[decaying(stage.transfer, self.decay)] if self.decay else [],
            view=judged(stage.transfer, stage.before, self.rows),
            learner=stage.transfer,
            among_N=block.targets.items_N.unique(),
        ):
            pass
        stage.clock.timed("transfer_cpu_s", since)
        stage.clock.costs["rows_read"] += len(block.targets)


def block_of(state: State, span: Span, history: str) -> Block:
    """What a span gives, before the update on it."""
    return Block(span.index, due_targets(state.recent, history), state.users)


def shrinking(model: TrainedModel, weight: float) -> Term:
    """lambda_1 / 2 |w|^2 over the rows of a batch, each once."""
    tables = list(tables_of(model).values())

    def term(batch: Batch, forward: Forward) -> torch.Tensor:
        squares = [table.leaf.square().sum() for table in tables if table.leaf is not None]
        return 0.5 * weight * torch.stack(squares).sum()

    return term


def decaying(transfer: Transfer, weight: float) -> Term:
    """lambda_2 / 2 |Theta|^2, which is what Adam's own weight decay adds to the gradient."""

    def term(batch: Batch, forward: Forward) -> torch.Tensor:
        return 0.5 * weight * torch.stack([theta.square().sum() for theta in transfer.parameters()]).sum()

    return term


def _memory(transfer: Transfer) -> Memory:
    theta = {name: weight.detach().clone() for name, weight in transfer.state_dict().items()}
    return Memory(theta, transfer.moments)


def _grown(before: Weights, model: TrainedModel) -> Weights:
    """`before` with the rows that the model has more: what was not there before is as it begins."""
    tables = tables_of(model)
    return {
        name: torch.cat([before[name], now[len(before[name]) :]]) if name in tables else before[name]
        for name, now in weights_of(model).items()
    }
