"""SPMF: train on events that the model ranks badly, drawn from the new events and a reservoir of all earlier ones.

Symbols of the paper: R -> reservoir.samples, W -> the due targets, w_i = exp(rank_i / N) -> rank_weights.
"""

import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from freshrec.config import Positive, Weight, check_options
from freshrec.data.batches import Targets, due_targets, mask_held_out, query_batches
from freshrec.data.stored_interests import StoredInterests, stored_interests_of
from freshrec.device import uniform
from freshrec.errors import OptionError
from freshrec.learn.fit import CostMeter, FitConfig, finish_update, fit_base_block, fit_model, grown_copy
from freshrec.learn.reservoir import (
    TrainingSamples,
    append_samples,
    concat_samples,
    copy_samples,
    fill_reservoir,
    sample_history_length,
    update_reservoir,
)
from freshrec.nn.scoring import score_items
from freshrec.random_streams import stream
from freshrec.types import SEQUENCE_FORMATS, Span, State, TrainedModel


def rank_weights(scores_N: Tensor) -> Tensor:
    """p_i = exp(rank_i / N) / sum_j exp(rank_j / N), float64 (N,). Rank 0 is the best score.

    Events with low scores are drawn more often, by a factor below e.
    """
    rank_N = torch.empty(len(scores_N), dtype=torch.float64)
    rank_N[scores_N.argsort(descending=True, stable=True)] = torch.arange(len(scores_N), dtype=torch.float64)
    return torch.softmax(rank_N / max(len(scores_N), 1), 0)


def sampling_probabilities(scores_N: Tensor, labels_N: Tensor | None) -> Tensor:
    """Drawing probabilities (N,): `rank_weights` for clicked events, 1 / N for exposures without a click."""
    if labels_N is None:
        return rank_weights(scores_N)
    is_positive_N, p_N = labels_N > 0, torch.full((len(scores_N),), 1 / max(len(scores_N), 1), dtype=torch.float64)
    p_N[is_positive_N] = rank_weights(scores_N[is_positive_N]) * p_N[is_positive_N].sum()
    return p_N


def sample_with_replacement(p_N: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """Draw (n,) indices with replacement, i with probability p_i. Returns none if `p_N` is empty."""
    if not len(p_N):
        return torch.zeros(0, dtype=torch.int64)
    cumulative_N = p_N.cumsum(0)
    at_M = uniform((n,), rng, torch.float64) * cumulative_N[-1]
    return torch.searchsorted(cumulative_N, at_M, right=True).clamp(max=len(p_N) - 1)


def sample_without_replacement(p_N: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """Draw (n,) indices without replacement, each in proportion to the remaining p. Returns all if n > N."""
    arrival_N = -uniform((len(p_N),), rng, torch.float64).log() / p_N  # exponential times; the first n are drawn
    return arrival_N.topk(min(n, len(p_N)), largest=False).indices


def target_scores(model: TrainedModel, targets: Targets, stored_interests: StoredInterests | None) -> Tensor:
    """Score of each target from the history before it, shape (N,)."""
    item_N = targets.items_N
    score_N = torch.zeros(len(targets))
    for index, batch in query_batches(mask_held_out(targets), model.spec.length, stored_interests):
        score_N[index] = score_items(model, batch, item_N[index][:, None])[:, 0]
    return score_N


@dataclass(frozen=True)
class SPMF:
    """Fine-tuning on new events and on a reservoir of past events, favouring events that the model ranks badly.

    take="sampled" draws from new and remembered events together, with replacement and again for each epoch. It draws as
    many as there are in both. take="all" uses every new event, and draws `share` remembered events per new one without
    replacement. The probabilities are `rank_weights` of the previous model's scores.

    Differs from the paper: the reservoir always follows Algorithm R. Negatives are those of the model's own loss.
    Batches are shuffled.
    """

    take: Literal["sampled", "all"] = "sampled"  # "sampled" = draw from both. "all" = all new events, and past ones.
    share: Weight = 0.5  # Remembered events per new event. For take = "all" only.
    reservoir: Positive = 0.3  # Size of the reservoir: up to 1 a share of the base block's targets, else a number.
    fit: FitConfig = FitConfig()  # Training options of the model.

    def __post_init__(self) -> None:
        check_options(self)
        if self.fit.holdout and self.take == "sampled":
            raise OptionError(
                "spmf draws new samples in each epoch and cannot hold any out. Set take=all or leave out fit.holdout."
            )

    def reservoir_size(self, n_base: int) -> int:
        """Return the maximum number of targets in the reservoir, given `n_base` targets in the base block."""
        return max(1, round(self.reservoir * n_base)) if self.reservoir <= 1 else int(self.reservoir)

    def update(self, state: State, span: Span) -> State:
        """Score and draw events, train on them, then offer the new events to the reservoir."""
        due = due_targets(state.histories, self.fit.history)
        fill_rng = stream(state.seed, "spmf reservoir", span.index)
        if state.spans_seen == 0:
            base_state = fit_base_block(state, span, self.fit)
            length = sample_history_length(base_state.model)
            return replace(base_state, memory=fill_reservoir(due, self.reservoir_size(len(due)), length, fill_rng))
        model = grown_copy(state, span)
        stored_interests = stored_interests_of(model, state.interests, span.index)
        key = (state.seed, span.index)
        meter = CostMeter()
        started_at = time.process_time()
        targets_by_epoch = self._epoch_targets(model, due, state.memory.samples, stored_interests, key)
        fit = self.fit if self.take == "all" else replace(self.fit, epochs=1)
        meter.costs["rows_read"] = float(len(targets_by_epoch[0]))
        meter.costs["epochs"] = float(len(targets_by_epoch) * fit.epochs)
        meter.add_time("choose_cpu_s", started_at)
        for nth, targets in enumerate(targets_by_epoch):
            fit_model(model, targets, fit, (*key, nth) if nth else key, meter, stored_interests=stored_interests)
        after = finish_update(state, model, stored_interests, self.fit.history, meter)
        return replace(after, memory=update_reservoir(state.memory, due, fill_rng))

    def _epoch_targets(
        self,
        model: TrainedModel,
        due: Targets,
        samples: TrainingSamples,
        stored_interests: StoredInterests | None,
        key: tuple[int, int],
    ) -> list[Targets]:
        """Return the targets of each epoch, or a single entry if all epochs share them."""
        rng, separate_users = stream(key[0], "spmf draws", key[1]), model.batch_format in SEQUENCE_FORMATS
        no_targets = due[torch.zeros(0, dtype=torch.int64)]
        if self.take == "sampled":
            samples = concat_samples(samples, copy_samples(due, samples.histories_NT.shape[1]))
        candidates = append_samples(no_targets, samples, torch.arange(len(samples)), separate_users=False)
        p_N = sampling_probabilities(target_scores(model, candidates, stored_interests), samples.labels_N)
        if self.take == "sampled":
            draws = [sample_with_replacement(p_N, len(samples), rng) for _ in range(max(1, self.fit.epochs))]
            return [append_samples(no_targets, samples, drawn_M, separate_users) for drawn_M in draws]
        drawn_M = sample_without_replacement(p_N, int(self.share * len(due)), rng)
        return [append_samples(due, samples, drawn_M, separate_users)]
