"""ADER-S: the method that the IMSR paper calls ADER in its comparison. ADER itself is another algorithm (ader.py).

It is fine-tuning that replays, for each active user, the past sequences most similar to the new one. It has no
exemplars per item, no herding and no distillation. The paper does not say how sequences are represented or how many are
replayed. Both are our reading.
"""

import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.config import Count, Rate, Weight, check_options
from freshrec.data.batches import Targets, due_targets, split_chunks
from freshrec.data.stored_interests import stored_interests_of
from freshrec.device import uniform
from freshrec.learn.exemplars import experience_replay, model_loss, smallest_per_group, trainable_targets
from freshrec.learn.fit import CostMeter, FitConfig, finish_update, fit_base_block, fit_model, grown_copy, split_holdout
from freshrec.learn.reservoir import TrainingSamples, concat_samples, copy_samples
from freshrec.nn.scoring import item_vectors
from freshrec.random_streams import stream
from freshrec.types import EncodingModel, Span, State

MIN_SEQUENCE_ITEMS = 3  # shorter sequences are left out


def truncate_sequences(targets: Targets, n_each: int, length: int, rng: torch.Generator) -> TrainingSamples:
    """Return `n_each` sequences per user: the due events up to a random end, with the last item as target.

    A user with fewer possible ends has fewer sequences. The histories of `targets` must hold the span's events only.
    """
    eligible = targets[targets.history_lengths(MIN_SEQUENCE_ITEMS) >= MIN_SEQUENCE_ITEMS - 1]
    quota_U = torch.full((targets.histories.n_users + 1,), n_each)
    ends_M = smallest_per_group(uniform((len(eligible),), rng), eligible.users_N, quota_U).sort().values
    return copy_samples(trainable_targets(eligible[ends_M], length), length)


def select_similar(pool: TrainingSamples, targets: Targets, items_ID: Tensor, share: float) -> Tensor:
    """Indices (M,) of each active user's past sequences that are most similar to the new events.

    A `share` of the user's past sequences is selected, rounded up. Similarity is the cosine of mean item vectors.
    """
    users_N, item_N = targets.users_N, targets.items_N
    n_users = targets.histories.n_users
    new_UD = torch.zeros(n_users + 1, items_ID.shape[1]).index_add_(0, users_N, items_ID[item_N])
    dissimilarity_S = torch.zeros(len(pool))
    for part in split_chunks(torch.arange(len(pool)), 4096):
        sequence_ST = torch.cat([pool.histories_NT[part].long(), pool.items_N[part, None]], 1)
        old_SD = items_ID[sequence_ST].sum(1)  # padding is 0, and the sum points in the direction of the mean
        dissimilarity_S[part] = -F.cosine_similarity(old_SD, new_UD[pool.users_N[part]], dim=1)
    is_active_U = torch.bincount(users_N, minlength=n_users + 1) > 0
    quota_U = (share * torch.bincount(pool.users_N, minlength=n_users + 1)).ceil().long() * is_active_U
    return smallest_per_group(dissimilarity_S, pool.users_N, quota_U).sort().values


@dataclass(frozen=True)
class ADERS:
    """Fine-tuning that also replays past sequences of active users. The pool of past sequences only grows."""

    sequences_per_user: Count = 5  # Maximum number of sequences per user and span that enter the pool.
    share: Rate = 0.5  # Share of a user's past sequences that is replayed.
    weight: Weight = 1.0  # Weight of the loss on past sequences. 0 = fine-tuning.
    fit: FitConfig = FitConfig()  # Training options of the model.

    def __post_init__(self) -> None:
        check_options(self)

    def update(self, state: State, span: Span) -> State:
        """Train on the new events and on similar past sequences, then add the new sequences to the pool."""
        length = int(state.model.spec.length)
        truncation_rng = stream(state.seed, "sequence truncation", span.index)
        new = truncate_sequences(due_targets(state.histories, "span"), self.sequences_per_user, length, truncation_rng)
        if state.spans_seen == 0:
            return replace(fit_base_block(state, span, self.fit), memory=new)
        model, pool = grown_copy(state, span), state.memory
        assert isinstance(model, EncodingModel)
        targets = due_targets(state.histories, self.fit.history)
        stored_interests = stored_interests_of(model, state.interests, span.index)
        meter = CostMeter()
        started_at = time.process_time()
        exemplars = pool[select_similar(pool, targets, item_vectors(model), self.share)]
        meter.add_time("choose_cpu_s", started_at)
        meter.costs["rows_read"] = float(len(targets) + len(exemplars))
        started_at = time.process_time()
        rng, key = stream(state.seed, "sequence replay", span.index), (state.seed, span.index)
        terms = experience_replay(
            model,
            split_holdout(targets, self.fit, key)[0],
            exemplars,
            stored_interests,
            weight=self.weight,
            loss=model_loss(model),
            rng=rng,
        )
        meter.add_time("train_cpu_s", started_at)
        fit_model(model, targets, self.fit, key, meter, stored_interests=stored_interests, terms=terms)
        after = finish_update(state, model, stored_interests, self.fit.history, meter)
        return replace(after, memory=concat_samples(pool, new))
