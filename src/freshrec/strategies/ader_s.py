"""ADER-S: what the IMSR paper compares itself with under the name of ADER, which is another algorithm (see ader.py).

Fine-tuning that replays, of each user who is back, the past sequences most like the new one. No exemplars of items, no
herding, no distillation. The paper says neither how sequences are represented nor how many are replayed: our reading.
"""

import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.config import Count, Rate, Weight, check_options
from freshrec.data.batches import Targets, due_targets, in_parts, random_source
from freshrec.data.carried import carried_by
from freshrec.device import uniform
from freshrec.learn.exemplars import learnable, own_loss, replay, smallest
from freshrec.learn.fit import Clock, Fit, adapt, finish, parted, start, successor
from freshrec.learn.reservoir import Kept, keep, together
from freshrec.models.scoring import item_vectors
from freshrec.types import EncodingModel, Span, State

PLAYED, CUT = 1301, 1302  # tell the random numbers apart from each other and from those of the epochs
SHORTEST = 3  # items of a sequence


def truncated(targets: Targets, n_each: int, length: int, source: torch.Generator) -> Kept:
    """The sequences of due events, each user's cut off at `n_each` random ends, as a last item and what is before it.

    Fewer where a sequence has fewer ends; `targets` look back on the span's own events only.
    """
    long_enough = targets[targets.lengths(SHORTEST) >= SHORTEST - 1]
    wanted_U = torch.full((targets.histories.n_users + 1,), n_each)
    ends_M = smallest(uniform((len(long_enough),), source), long_enough.users_N, wanted_U).sort().values
    return keep(learnable(long_enough[ends_M], length), length)


def alike(pool: Kept, targets: Targets, items_ID: Tensor, share: float) -> Tensor:
    """Indices (M,) of past sequences of each user with new events: the `share` of its own most like the new ones.

    By the cosine of mean item vectors; rounded up.
    """
    users_N, item_N = targets.users_N, targets.items_N
    n_users = targets.histories.n_users
    new_UD = torch.zeros(n_users + 1, items_ID.shape[1]).index_add_(0, users_N, items_ID[item_N])
    unlike_S = torch.zeros(len(pool))
    for part in in_parts(torch.arange(len(pool)), 4096):
        sequence_ST = torch.cat([pool.histories_NT[part].long(), pool.items_N[part, None]], 1)
        old_SD = items_ID[sequence_ST].sum(1)  # padding is 0, and a sum has the direction of the mean
        unlike_S[part] = -F.cosine_similarity(old_SD, new_UD[pool.users_N[part]], dim=1)
    is_back_U = torch.bincount(users_N, minlength=n_users + 1) > 0
    wanted_U = (share * torch.bincount(pool.users_N, minlength=n_users + 1)).ceil().long() * is_back_U
    return smallest(unlike_S, pool.users_N, wanted_U).sort().values


@dataclass(frozen=True)
class ADERS:
    """Fine-tuning with the model's own loss on past sequences beside the new events; the pool of them only grows."""

    each: Count = 5  # sequences a user and span that enter the pool
    share: Rate = 0.5  # of a user's past sequences, replayed
    weight: Weight = 1.0
    fit: Fit = Fit()

    def __post_init__(self) -> None:
        check_options(self)

    def update(self, state: State, span: Span) -> State:
        """Train on the new events and on past sequences like them; then the new sequences enter the pool."""
        length = int(state.model.spec.length)
        cut = random_source(state.seed, span.index, CUT)
        new = truncated(due_targets(state.recent, "span"), self.each, length, cut)
        if state.spans_seen == 0:
            return replace(start(state, span, self.fit), memory=new)
        model, pool = successor(state, span), state.memory
        assert isinstance(model, EncodingModel)
        targets = due_targets(state.recent, self.fit.history)
        carried = carried_by(model, state.users, span.index)
        clock = Clock()
        since = time.process_time()
        exemplars = pool[alike(pool, targets, item_vectors(model), self.share)]
        clock.timed("choose_cpu_s", since)
        clock.costs["rows_read"] = float(len(targets) + len(exemplars))
        since = time.process_time()
        source, key = random_source(state.seed, span.index, PLAYED), (state.seed, span.index)
        terms = replay(
            model,
            parted(targets, self.fit, key)[0],
            exemplars,
            carried,
            weight=self.weight,
            loss=own_loss(model),
            source=source,
        )
        clock.timed("train_cpu_s", since)
        adapt(model, targets, self.fit, key, clock, carried=carried, terms=terms)
        return replace(finish(state, model, carried, self.fit.history, clock), memory=together(pool, new))
