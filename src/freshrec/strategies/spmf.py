"""SPMF: train on what the model predicts badly, among new events and a reservoir of all earlier ones.

Symbols of the paper: R -> reservoir.kept, W -> the due targets, w_i = exp(rank_i / N) -> rank_weights.
"""

import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from freshrec.config import Positive, Weight, check_options
from freshrec.data.batches import Targets, due_targets, query_batches, random_source, without_secrets
from freshrec.data.carried import Carried, carried_by
from freshrec.device import uniform
from freshrec.errors import OptionError
from freshrec.learn.fit import Clock, Fit, adapt, finish, start, successor
from freshrec.learn.reservoir import Kept, filled, joined, keep, kept_length, stream, together
from freshrec.models.scoring import score_items
from freshrec.types import SEQUENCES, Span, State, TrainedModel

DRAWS, FILL = 1001, 1002  # tell the random numbers apart from each other and from those of the epochs


def rank_weights(scores_N: Tensor) -> Tensor:
    """p_i = exp(rank_i / N) / sum_j exp(rank_j / N), float64 (N,); rank 0 is the best score, so that the badly
    predicted are drawn more often, but less than e times as often."""
    rank_N = torch.empty(len(scores_N), dtype=torch.float64)
    rank_N[scores_N.argsort(descending=True, stable=True)] = torch.arange(len(scores_N), dtype=torch.float64)
    return torch.softmax(rank_N / max(len(scores_N), 1), 0)


def chances(scores_N: Tensor, labels_N: Tensor | None) -> Tensor:
    """The `rank_weights` of what was taken; what was shown and not taken is drawn as often as by chance (N,)."""
    if labels_N is None:
        return rank_weights(scores_N)
    taken_N, p_N = labels_N > 0, torch.full((len(scores_N),), 1 / max(len(scores_N), 1), dtype=torch.float64)
    p_N[taken_N] = rank_weights(scores_N[taken_N]) * p_N[taken_N].sum()
    return p_N


def draw(p_N: Tensor, n: int, source: torch.Generator) -> Tensor:
    """(n,) indices with replacement, i with probability p_i; none where there is nothing to draw from."""
    if not len(p_N):
        return torch.zeros(0, dtype=torch.int64)
    upto_N = p_N.cumsum(0)
    at_M = uniform((n,), source, torch.float64) * upto_N[-1]
    return torch.searchsorted(upto_N, at_M, right=True).clamp(max=len(p_N) - 1)


def draw_distinct(p_N: Tensor, n: int, source: torch.Generator) -> Tensor:
    """(n,) indices without replacement, one after the other in proportion to what is left of p; all if n is more."""
    clock_N = -uniform((len(p_N),), source, torch.float64).log() / p_N  # the first n to ring
    return clock_N.topk(min(n, len(p_N)), largest=False).indices


def scores_of(model: TrainedModel, targets: Targets, carried: Carried | None) -> Tensor:
    """(N,) the model's score of each target, from the history before it."""
    item_N = targets.items_N
    score_N = torch.zeros(len(targets))
    for which, batch in query_batches(without_secrets(targets), model.spec.length, carried):
        score_N[which] = score_items(model, batch, item_N[which][:, None])[:, 0]
    return score_N


@dataclass(frozen=True)
class SPMF:
    """Fine-tuning on a sample of new and remembered events, or on all new ones and some of those remembered.

    `take`: "sampled", as many events as there are new and remembered ones, drawn from both with replacement, anew for
    each epoch; "all": every new event, and remembered ones, `share` to a new one, drawn from the reservoir without
    replacement. Both draw by `rank_weights` of the scores that the last model gives. Differs from the paper: one
    reservoir rule for all, Algorithm R; negatives are those of the model's own loss; batches are shuffled.
    """

    take: Literal["sampled", "all"] = "sampled"
    share: Weight = 0.5
    reservoir: Positive = 0.3  # targets in it: up to 1, this share of the base block's; above 1, so many
    fit: Fit = Fit()

    def __post_init__(self) -> None:
        check_options(self)
        if self.fit.holdout and self.take == "sampled":
            raise OptionError(
                "SPMF draws anew for each epoch, so nothing can be held out; set take=all, or no holdout."
            )

    def size(self, n_base: int) -> int:
        """How many targets the reservoir holds, after a base block of `n_base`."""
        return max(1, round(self.reservoir * n_base)) if self.reservoir <= 1 else int(self.reservoir)

    def update(self, state: State, span: Span) -> State:
        """Score, draw, train; then the new events go by the reservoir."""
        due = due_targets(state.recent, self.fit.history)
        fill = random_source(state.seed, span.index, FILL)
        if state.spans_seen == 0:
            started = start(state, span, self.fit)
            return replace(started, memory=filled(due, self.size(len(due)), kept_length(started.model), fill))
        model = successor(state, span)
        carried = carried_by(model, state.users, span.index)
        key = (state.seed, span.index)
        clock = Clock()
        since = time.process_time()
        rounds = self._rounds(model, due, state.memory.kept, carried, key)
        fit = self.fit if self.take == "all" else replace(self.fit, epochs=1)
        clock.costs["rows_read"] = float(len(rounds[0]))
        clock.timed("choose_cpu_s", since)
        for nth, targets in enumerate(rounds):
            adapt(model, targets, fit, (*key, nth) if nth else key, clock, carried=carried)
        after = finish(state, model, carried, self.fit.history, clock)
        return replace(after, memory=stream(state.memory, due, fill))

    def _rounds(
        self, model: TrainedModel, due: Targets, kept: Kept, carried: Carried | None, key: tuple[int, int]
    ) -> list[Targets]:
        """What to train on: new draws for each epoch, or the same for all epochs."""
        source, apart = random_source(*key, DRAWS), model.unit in SEQUENCES
        none = due[torch.zeros(0, dtype=torch.int64)]
        if self.take == "sampled":
            kept = together(kept, keep(due, kept.histories_NT.shape[1]))
        candidates = joined(none, kept, torch.arange(len(kept)), apart=False)
        p_N = chances(scores_of(model, candidates, carried), kept.labels_N)
        if self.take == "sampled":
            draws = [draw(p_N, len(kept), source) for _ in range(max(1, self.fit.epochs))]
            return [joined(none, kept, drawn_M, apart) for drawn_M in draws]
        return [joined(due, kept, draw_distinct(p_N, int(self.share * len(due)), source), apart)]
