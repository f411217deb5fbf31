"""Exemplars: events kept for later, so many of each item; which ones, and how they are trained on beside new events.

Nothing here loops over users, items or events: herding takes as many rounds as the item with the most exemplars needs.
Letters: S samples to choose from, G groups of them (by item, or by user), M chosen ones.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.data.batches import Targets, in_parts, random_source, shuffled
from freshrec.data.carried import Carried
from freshrec.device import uniform
from freshrec.learn.fit import batches
from freshrec.learn.reservoir import Kept, keep, together
from freshrec.models.layers import attend, best_inner_product
from freshrec.models.scoring import item_vectors, user_vectors
from freshrec.models.tables import tables_of
from freshrec.types import SECRET, SEQUENCES, Batch, EncodingModel, Forward, TrainedModel

Select = Literal["herding", "herding-code", "random", "loss"]
Allocate = Literal["largest-remainder", "multinomial"]
ExemplarLoss = Callable[[Tensor, Batch], Tensor]  # (indices of the exemplars (M,), their batch) -> scalar
USERS = 64  # whose scores of all items are in memory at once


# how exemplars are kept


def learnable(targets: Targets, length: int) -> Targets:
    """Those with a history whose last event may be looked at; all of them where no history is looked at."""
    if not length:
        return targets
    before_N = targets.histories.due_R[(targets.rows_N - 1).clamp(min=0)]
    return targets[(targets.lengths(length) > 0) & (before_N != SECRET)]


def pool_of(targets: Targets, exemplars: Kept | None, length: int) -> Kept:
    """What exemplars are chosen from: new targets, and earlier exemplars."""
    new = keep(learnable(targets, length), length)
    return new if exemplars is None else together(new, exemplars)


def batch_of(kept: Kept, which_M: Tensor, model: TrainedModel, carried: Carried | None) -> Batch:
    """Exemplars as the model wants its batches, with no more padding than the longest history needs."""
    part = kept[which_M]
    seen_T = (part.histories_NT > 0).any(0)
    n_padding = int(seen_T.int().argmax()) if bool(seen_T.any()) else len(seen_T)
    history_BT, item_B1 = part.histories_NT[:, n_padding:].long(), part.items_N[:, None]
    targets_BT = F.pad(item_B1, (history_BT.shape[1] - 1, 0)) if model.unit in SEQUENCES else item_B1
    batch = Batch(part.users_N, history_BT, targets_BT)
    return batch if carried is None else carried.join(batch)


def queries(
    kept: Kept, model: TrainedModel, carried: Carried | None, size: int = 256
) -> Iterator[tuple[Tensor, Batch]]:
    """All of them in the order of their history length: (indices, batch)."""
    for which_M in in_parts(torch.argsort((kept.histories_NT > 0).sum(1), stable=True), size):
        yield which_M, batch_of(kept, which_M, model, carried)


# how many of each item


def largest_remainder(weights_G: Tensor, n: int) -> Tensor:
    """N w_g / sum w, rounded to whole numbers (G,) that sum to N: down, then up where most is lost; ties: lower g."""
    total = max(int(weights_G.sum()), 1)
    floor_G, lost_G = n * weights_G // total, n * weights_G % total
    n_missing = n - int(floor_G.sum()) if bool(weights_G.any()) else 0
    return floor_G.index_add(
        0, lost_G.argsort(descending=True, stable=True)[:n_missing], torch.ones(n_missing, dtype=torch.int64)
    )


def allocate(counts_I: Tensor, n: int, how: Allocate, equal: bool, source: torch.Generator) -> Tensor:
    """m_i = N |{(x, y) : y = i}| / |D_t and E_{t-1}|, at most what there is (I,) [ADER eq. 1].

    `counts_I`: the samples of each item, from item 0, the padding. `how`: rounded, or drawn N times with these
    probabilities, as in the authors' code. `equal`: the same for every known item, met or not.
    """
    weights_I = torch.ones_like(counts_I).index_fill(0, torch.tensor([0]), 0) if equal else counts_I
    if how == "largest-remainder":
        return torch.minimum(largest_remainder(weights_I, n), counts_I)
    if not bool(weights_I.any()):
        return counts_I
    drawn_N = torch.multinomial(weights_I.cpu().double(), n, replacement=True, generator=source)
    return torch.minimum(torch.bincount(drawn_N, minlength=len(counts_I)).to(counts_I.device), counts_I)


# which ones


def herd(features_SD: Tensor, group_S: Tensor, wanted_G: Tensor, repeat: bool = False) -> Tensor:
    """Samples (M,), in the order of choice, whose mean feature is close to that of their group: Algorithm 1 of ADER.

    Of unit vectors phi with mean mu, each group picks argmax w phi, then w <- w + mu - phi, starting from w = mu; ties:
    the first. Differs from the paper: what is picked is out. `repeat`: as in the authors' code, it is not, and counts
    once; a group stops after 1.1 m rounds, so that it may end with fewer than the m that it wants.
    """
    phi_SD = F.normalize(features_SD, dim=1)
    n_samples, ids_G = len(group_S), group_S.unique()
    group_S, wanted_G = torch.searchsorted(ids_G, group_S), wanted_G[ids_G]
    n_G = torch.bincount(group_S, minlength=len(ids_G))
    mean_GD = torch.zeros(len(ids_G), phi_SD.shape[1]).index_add_(0, group_S, phi_SD) / n_G[:, None]
    rounds_G = (11 * wanted_G + 9) // 10 if repeat else wanted_G
    w_GD, left_G, taken_S = mean_GD.clone(), wanted_G.clone(), torch.zeros(n_samples, dtype=torch.bool)
    member_S = torch.arange(n_samples)
    picked: list[Tensor] = [torch.zeros(0, dtype=torch.int64)]
    for n_rounds in itertools.count():
        member_S = member_S[((left_G > 0) & (rounds_G > n_rounds))[group_S[member_S]]]
        member_S = member_S if repeat else member_S[~taken_S[member_S]]
        if not len(member_S):
            break
        of_S = group_S[member_S]
        score_S = (phi_SD[member_S] * w_GD[of_S]).sum(1)
        best_G = torch.full((len(ids_G),), -torch.inf).scatter_reduce_(0, of_S, score_S, "amax")
        is_best_S = score_S == best_G[of_S]
        first_G = torch.full((len(ids_G),), n_samples)
        first_G.scatter_reduce_(0, of_S[is_best_S], member_S[is_best_S], "amin")
        pick_G = first_G[first_G < n_samples]
        w_GD[group_S[pick_G]] += mean_GD[group_S[pick_G]] - phi_SD[pick_G]
        new_G = pick_G[~taken_S[pick_G]]
        taken_S[new_G] = True
        left_G[group_S[new_G]] -= 1
        picked.append(new_G)
    return torch.cat(picked)


def smallest(key_S: Tensor, group_S: Tensor, wanted_G: Tensor) -> Tensor:
    """The wanted_G[g] samples of each group g with the smallest keys (M,); ties: the first."""
    by_key_S = torch.argsort(key_S, stable=True)
    order_S = by_key_S[torch.argsort(group_S[by_key_S], stable=True)]
    n_G = torch.bincount(group_S, minlength=len(wanted_G))
    place_S = torch.arange(len(order_S)) - (torch.cumsum(n_G, 0) - n_G)[group_S[order_S]]
    return order_S[place_S < wanted_G[group_S[order_S]]]


def features(model: EncodingModel, kept: Kept, carried: Carried | None) -> Tensor:
    """(S, D) the user's vector in each sample; of several, the one that the target is closest to."""
    features_SD = torch.zeros(len(kept), item_vectors(model).shape[1])
    for which, batch in queries(kept, model, carried):
        target_BD = item_vectors(model)[kept.items_N[which]]
        features_SD[which] = attend(user_vectors(model, batch), target_BD, None, "hard")
    return features_SD


def losses(model: EncodingModel, kept: Kept, carried: Carried | None) -> Tensor:
    """(S,) -ln p(target) by the softmax of the scores of all known items."""
    loss_S = torch.zeros(len(kept))
    for which, batch in queries(kept, model, carried, USERS):
        score_BI = best_inner_product(user_vectors(model, batch), item_vectors(model)[1 : model.n_items + 1])
        loss_S[which] = F.cross_entropy(score_BI, kept.items_N[which] - 1, reduction="none")
    return loss_S


def select(
    how: Select, model: EncodingModel, pool: Kept, carried: Carried | None, wanted_I: Tensor, source: torch.Generator
) -> Kept:
    """wanted_I[i] samples of each item i: closest to the mean feature, at random, or with the smallest loss."""
    wanted_S = wanted_I[pool.items_N]
    whole_S = wanted_S == torch.bincount(pool.items_N, minlength=len(wanted_I))[pool.items_N]
    open_S = ((wanted_S > 0) & ~whole_S).nonzero()[:, 0]  # where there is a choice
    part = pool[open_S]
    if how == "random":
        chosen_M = smallest(uniform((len(part),), source), part.items_N, wanted_I)
    elif how == "loss":
        chosen_M = smallest(losses(model, part, carried), part.items_N, wanted_I)
    else:
        chosen_M = herd(features(model, part, carried), part.items_N, wanted_I, repeat=how == "herding-code")
    return pool[torch.cat([whole_S.nonzero()[:, 0], open_S[chosen_M]]).sort().values]


# how they are trained on


@dataclass
class Replay:
    """A term of the loss: beside each training batch a batch of exemplars, all of them about once an epoch.

    Exemplars with histories of like length are side by side, so that little of a batch is padding.
    """

    model: TrainedModel
    exemplars: Kept
    carried: Carried | None
    weight: float
    loss: ExemplarLoss
    n_each: int
    source: torch.Generator
    queue: list[Tensor] = field(default_factory=list)

    def __call__(self, batch: Batch, forward: Forward) -> Tensor:
        """The scalar to add to the loss."""
        if not self.queue:
            self.queue = shuffled((self.exemplars.histories_NT > 0).sum(1), self.n_each, self.source)
        which_M = self.queue.pop()
        replayed = batch_of(self.exemplars, which_M, self.model, self.carried)
        for table in tables_of(self.model).values():
            table.again()
        return self.weight * self.loss(which_M, replace(replayed, negatives_N=batch.negatives_N))


def own_loss(model: TrainedModel) -> ExemplarLoss:
    """What the model trains with, on the true targets of exemplars."""
    return lambda which_M, batch: model(batch).loss


def replay(
    model: TrainedModel,
    targets: Targets,
    exemplars: Kept,
    carried: Carried | None,
    *,
    weight: float,
    loss: ExemplarLoss,
    source: torch.Generator,
) -> list[Replay]:
    """The term for `train(model, targets, ...)`; none where it would add nothing, so that training is fine-tuning."""
    n_steps = sum(1 for _ in batches(model, targets, random_source(0)))
    if not weight or not len(exemplars) or not n_steps:
        return []
    return [Replay(model, exemplars, carried, weight, loss, max(1, len(exemplars) // n_steps), source)]
