"""Exemplars, a few past events of each item: allocation, selection, and replay together with new events.

Nothing here loops over users, items or events. Herding takes as many rounds as the item with the most exemplars needs.
Letters: S samples to choose from, G groups of them (by item or by user), M chosen ones.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.data.batches import Targets, shuffle_by_length, split_chunks
from freshrec.data.stored_interests import StoredInterests
from freshrec.device import uniform
from freshrec.learn.fit import attach_negatives, training_batches
from freshrec.learn.reservoir import TrainingSamples, concat_samples, copy_samples
from freshrec.nn.embedding_table import embedding_tables
from freshrec.nn.layers import attend, max_inner_product
from freshrec.nn.scoring import item_vectors, user_vectors
from freshrec.random_streams import stream
from freshrec.types import HELD_OUT, SEQUENCE_FORMATS, Batch, EncodingModel, Forward, TrainedModel

SelectionRule = Literal["herding", "herding-code", "random", "loss"]
AllocationRule = Literal["largest-remainder", "multinomial"]
ExemplarLoss = Callable[[Tensor, Batch], Tensor]  # (indices of the exemplars (M,), their batch) -> scalar
USER_BLOCK = 64  # users whose scores of all items are in memory at the same time


# how exemplars are stored and batched


def trainable_targets(targets: Targets, length: int) -> Targets:
    """Return targets whose history ends with an event that is not held out. Without histories, return all."""
    if not length:
        return targets
    before_N = targets.histories.due_R[(targets.rows_N - 1).clamp(min=0)]
    return targets[(targets.history_lengths(length) > 0) & (before_N != HELD_OUT)]


def build_pool(targets: Targets, exemplars: TrainingSamples | None, length: int) -> TrainingSamples:
    """Return the samples to choose from: the new targets and the previous exemplars."""
    new = copy_samples(trainable_targets(targets, length), length)
    return new if exemplars is None else concat_samples(new, exemplars)


def exemplar_batch(
    samples: TrainingSamples, index_M: Tensor, model: TrainedModel, stored_interests: StoredInterests | None
) -> Batch:
    """Return exemplars in the model's batch format, padded to their longest history."""
    selected = samples[index_M]
    seen_T = (selected.histories_NT > 0).any(0)
    n_padding = int(seen_T.int().argmax()) if bool(seen_T.any()) else len(seen_T)
    history_BT, item_B1 = selected.histories_NT[:, n_padding:].long(), selected.items_N[:, None]
    targets_BT = F.pad(item_B1, (history_BT.shape[1] - 1, 0)) if model.batch_format in SEQUENCE_FORMATS else item_B1
    batch = Batch(selected.users_N, history_BT, targets_BT)
    return batch if stored_interests is None else stored_interests.attach(batch)


def exemplar_batches(
    samples: TrainingSamples, model: TrainedModel, stored_interests: StoredInterests | None, size: int = 256
) -> Iterator[tuple[Tensor, Batch]]:
    """Yield all samples in the order of their history length, as (indices, batch)."""
    for index_M in split_chunks(torch.argsort((samples.histories_NT > 0).sum(1), stable=True), size):
        yield index_M, exemplar_batch(samples, index_M, model, stored_interests)


# how many exemplars each item gets


def largest_remainder(weights_G: Tensor, n: int) -> Tensor:
    """N w_g / sum w, rounded to integers (G,) that sum to N. The largest remainders are rounded up, ties by lower g."""
    total = max(int(weights_G.sum()), 1)
    floor_G, remainder_G = n * weights_G // total, n * weights_G % total
    n_missing = n - int(floor_G.sum()) if bool(weights_G.any()) else 0
    return floor_G.index_add(
        0, remainder_G.argsort(descending=True, stable=True)[:n_missing], torch.ones(n_missing, dtype=torch.int64)
    )


def allocate_exemplars(counts_I: Tensor, n: int, rule: AllocationRule, is_equal: bool, rng: torch.Generator) -> Tensor:
    """m_i = N |{(x, y) : y = i}| / |D_t and E_{t-1}|, at most the item's samples, shape (I,) [ADER eq. 1].

    `counts_I` holds the number of samples of each item, starting with item 0, the padding. `rule` either rounds, or
    draws N times with these probabilities, as the authors' code does. `is_equal` gives all known items the same weight,
    even those without samples.
    """
    weights_I = torch.ones_like(counts_I).index_fill(0, torch.tensor([0]), 0) if is_equal else counts_I
    if rule == "largest-remainder":
        return torch.minimum(largest_remainder(weights_I, n), counts_I)
    if not bool(weights_I.any()):
        return counts_I
    drawn_N = torch.multinomial(weights_I.cpu().double(), n, replacement=True, generator=rng)
    return torch.minimum(torch.bincount(drawn_N, minlength=len(counts_I)).to(counts_I.device), counts_I)


# which samples become exemplars


def herd(features_SD: Tensor, group_S: Tensor, quota_G: Tensor, may_repeat: bool = False) -> Tensor:
    """Samples (M,) whose mean feature is close to that of their group, in the order of choice: Algorithm 1 of ADER.

    Features are unit vectors phi with mean mu. Each group starts with w = mu, picks argmax w phi (ties: the first), and
    sets w <- w + mu - phi.

    Differs from the paper: a sample is picked once. With `may_repeat`, it may be picked again but counts once, as in
    the authors' code. A group then stops after 1.1 m rounds, so it may end with fewer than m samples.
    """
    phi_SD = F.normalize(features_SD, dim=1)
    n_samples, ids_G = len(group_S), group_S.unique()
    group_S, quota_G = torch.searchsorted(ids_G, group_S), quota_G[ids_G]
    n_G = torch.bincount(group_S, minlength=len(ids_G))
    mean_GD = torch.zeros(len(ids_G), phi_SD.shape[1]).index_add_(0, group_S, phi_SD) / n_G[:, None]
    rounds_G = (11 * quota_G + 9) // 10 if may_repeat else quota_G
    w_GD, n_left_G, is_picked_S = mean_GD.clone(), quota_G.clone(), torch.zeros(n_samples, dtype=torch.bool)
    member_S = torch.arange(n_samples)
    picked: list[Tensor] = [torch.zeros(0, dtype=torch.int64)]
    for n_rounds in itertools.count():
        member_S = member_S[((n_left_G > 0) & (rounds_G > n_rounds))[group_S[member_S]]]
        member_S = member_S if may_repeat else member_S[~is_picked_S[member_S]]
        if not len(member_S):
            break
        member_group_S = group_S[member_S]
        score_S = (phi_SD[member_S] * w_GD[member_group_S]).sum(1)
        best_G = torch.full((len(ids_G),), -torch.inf).scatter_reduce_(0, member_group_S, score_S, "amax")
        is_best_S = score_S == best_G[member_group_S]
        first_G = torch.full((len(ids_G),), n_samples)
        first_G.scatter_reduce_(0, member_group_S[is_best_S], member_S[is_best_S], "amin")
        pick_G = first_G[first_G < n_samples]
        w_GD[group_S[pick_G]] += mean_GD[group_S[pick_G]] - phi_SD[pick_G]
        new_G = pick_G[~is_picked_S[pick_G]]
        is_picked_S[new_G] = True
        n_left_G[group_S[new_G]] -= 1
        picked.append(new_G)
    return torch.cat(picked)


def smallest_per_group(key_S: Tensor, group_S: Tensor, quota_G: Tensor) -> Tensor:
    """Return the quota_G[g] samples of each group g with the smallest keys (M,). Ties go to the first."""
    by_key_S = torch.argsort(key_S, stable=True)
    order_S = by_key_S[torch.argsort(group_S[by_key_S], stable=True)]
    n_G = torch.bincount(group_S, minlength=len(quota_G))
    place_S = torch.arange(len(order_S)) - (torch.cumsum(n_G, 0) - n_G)[group_S[order_S]]
    return order_S[place_S < quota_G[group_S[order_S]]]


def sample_features(model: EncodingModel, samples: TrainingSamples, stored_interests: StoredInterests | None) -> Tensor:
    """User vector of each sample, shape (S, D). Of several interests, the one closest to the target."""
    features_SD = torch.zeros(len(samples), item_vectors(model).shape[1])
    for index_B, batch in exemplar_batches(samples, model, stored_interests):
        target_BD = item_vectors(model)[samples.items_N[index_B]]
        features_SD[index_B] = attend(user_vectors(model, batch), target_BD, None, "hard")
    return features_SD


def sample_losses(model: EncodingModel, samples: TrainingSamples, stored_interests: StoredInterests | None) -> Tensor:
    """-ln p(target) of each sample, shape (S,). p is the softmax of the scores of all known items."""
    loss_S = torch.zeros(len(samples))
    for index_B, batch in exemplar_batches(samples, model, stored_interests, USER_BLOCK):
        score_BI = max_inner_product(user_vectors(model, batch), item_vectors(model)[1 : model.n_items + 1])
        loss_S[index_B] = F.cross_entropy(score_BI, samples.items_N[index_B] - 1, reduction="none")
    return loss_S


def select_exemplars(
    rule: SelectionRule,
    model: EncodingModel,
    pool: TrainingSamples,
    stored_interests: StoredInterests | None,
    quota_I: Tensor,
    rng: torch.Generator,
) -> TrainingSamples:
    """Choose quota_I[i] samples of each item i: by herding, at random, or with the smallest loss."""
    quota_S = quota_I[pool.items_N]
    is_unconditional_S = quota_S == torch.bincount(pool.items_N, minlength=len(quota_I))[pool.items_N]
    contested_S = ((quota_S > 0) & ~is_unconditional_S).nonzero()[:, 0]  # items with more samples than quota
    contested = pool[contested_S]
    if rule == "random":
        chosen_M = smallest_per_group(uniform((len(contested),), rng), contested.items_N, quota_I)
    elif rule == "loss":
        chosen_M = smallest_per_group(sample_losses(model, contested, stored_interests), contested.items_N, quota_I)
    else:
        features_SD = sample_features(model, contested, stored_interests)
        chosen_M = herd(features_SD, contested.items_N, quota_I, may_repeat=rule == "herding-code")
    return pool[torch.cat([is_unconditional_S.nonzero()[:, 0], contested_S[chosen_M]]).sort().values]


# how exemplars are trained on


@dataclass
class ExperienceReplay:
    """A loss term that adds a batch of exemplars to each training batch. Each exemplar comes about once per epoch.

    Batches hold exemplars with histories of similar length, so that little of a batch is padding.
    """

    model: TrainedModel
    exemplars: TrainingSamples
    stored_interests: StoredInterests | None
    weight: float
    loss: ExemplarLoss
    batch_size: int
    rng: torch.Generator
    queue: list[Tensor] = field(default_factory=list)

    def __call__(self, batch: Batch, forward: Forward) -> Tensor:
        """Return the scalar to add to the loss."""
        if not self.queue:
            self.queue = shuffle_by_length((self.exemplars.histories_NT > 0).sum(1), self.batch_size, self.rng)
        index_M = self.queue.pop()
        replay_batch = exemplar_batch(self.exemplars, index_M, self.model, self.stored_interests)
        for table in embedding_tables(self.model).values():
            table.continue_step()
        return self.weight * self.loss(index_M, replace(replay_batch, negatives_N=batch.negatives_N))


def model_loss(model: TrainedModel) -> ExemplarLoss:
    """Return the model's own training loss on the true targets of exemplars, against as many negatives as the batch."""

    def loss(index_M: Tensor, batch: Batch) -> Tensor:
        assert batch.negatives_N is not None
        return model(attach_negatives(model, batch, batch.negatives_N)).loss

    return loss


def experience_replay(
    model: TrainedModel,
    targets: Targets,
    exemplars: TrainingSamples,
    stored_interests: StoredInterests | None,
    *,
    weight: float,
    loss: ExemplarLoss,
    rng: torch.Generator,
) -> list[ExperienceReplay]:
    """Return the term for `train(model, targets, ...)`, or none if it adds nothing: training is then fine-tuning."""
    n_steps = sum(1 for _ in training_batches(model, targets, stream(0, "number of steps")))
    if not weight or not len(exemplars) or not n_steps:
        return []
    return [ExperienceReplay(model, exemplars, stored_interests, weight, loss, max(1, len(exemplars) // n_steps), rng)]
