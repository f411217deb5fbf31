"""ADER: fine-tuning that also keeps to what the last model said of exemplars, a few past events of each item.

Symbols of the paper: E_{t-1} -> state.memory, D_t -> targets, I_{t-1} and I_t -> the items that the last model knew and
that this one knows, m_{t,i} -> wanted_I, N -> exemplars, phi -> features, lambda_base -> weight.
"""

import math
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.config import Count, Weight, check_options
from freshrec.data.batches import Targets, due_targets, random_source
from freshrec.data.carried import Carried, carried_by
from freshrec.learn.exemplars import (
    Allocate,
    ExemplarLoss,
    Select,
    allocate,
    learnable,
    own_loss,
    pool_of,
    queries,
    replay,
    select,
)
from freshrec.learn.fit import Clock, Fit, adapt, finish, parted, start, successor
from freshrec.learn.reservoir import Kept, kept_length
from freshrec.models.layers import best_inner_product
from freshrec.models.scoring import item_table, item_vectors, user_vectors
from freshrec.models.softmax import distilled_softmax
from freshrec.types import Batch, EncodingModel, Span, State

PLAYED, CHOSEN = 1101, 1102  # tell the random numbers apart from each other and from those of the epochs


def distillation(student_BI: Tensor, teacher_BI: Tensor) -> Tensor:
    """-sum_{i <= |I_{t-1}|} p'_i ln p_i, p and p' softmax over the items the teacher knows; mean over B [ADER eq. 2].

    Logits of the student may have more columns, for new items: these are outside the sum and outside the softmax. No
    gradient reaches the teacher.
    """
    known_BI = student_BI[:, : teacher_BI.shape[1]]
    return F.cross_entropy(known_BI, torch.softmax(teacher_BI.detach(), 1))


def adaptive_weight(base: float, n_known: int, n_items: int, n_exemplars: int, n_targets: int) -> float:
    """lambda_t = lambda_base sqrt(|I_{t-1}| / |I_t| |E_{t-1}| / |D_t|) [ADER eq. 4]; 0 where there is nothing new."""
    return base * math.sqrt(n_known / n_items * n_exemplars / n_targets) if n_items and n_targets else 0.0


def distil(model: EncodingModel, teacher: EncodingModel, exemplars: Kept, carried: Carried | None) -> ExemplarLoss:
    """The loss that keeps `model` to what `teacher` says of exemplars.

    Gradients reach the dense weights, and those item rows that the training batch moves in the same step: all of them
    where the model trains by the full softmax; else a row has no need of being held while nothing moves it.
    """
    n_known = teacher.n_items
    known_RD = item_vectors(teacher)[: n_known + 1]
    said = [(which, user_vectors(teacher, batch)) for which, batch in queries(exemplars, teacher, carried)]
    n_most = max((vectors_BKD.shape[1] for _, vectors_BKD in said), default=1)
    teacher_MKD = torch.zeros(len(exemplars), n_most, known_RD.shape[1])
    for which, vectors_BKD in said:
        teacher_MKD[which] = vectors_BKD[:, :1]  # again where there are fewer: it changes no score
        teacher_MKD[which, : vectors_BKD.shape[1]] = vectors_BKD

    table = item_table(model)

    def loss(which_M: Tensor, batch: Batch) -> Tensor:
        rows_RD = table.whole()
        vectors_BKD = model.encode(F.embedding(batch.history_BT, rows_RD), batch)
        if vectors_BKD.shape[1] == n_most == 1:
            return distilled_softmax(vectors_BKD[:, 0], rows_RD, teacher_MKD[which_M, 0], known_RD)
        said_BI = best_inner_product(teacher_MKD[which_M], known_RD[1:])
        return distillation(best_inner_product(vectors_BKD, rows_RD[1 : n_known + 1]), said_BI)

    return loss


@dataclass(frozen=True)
class ADER:
    """Fine-tuning with a second loss on exemplars, which are chosen anew after each update.

    `distil`: the second loss is the distance to what the last model says of them; else ("ER") it is the model's own
    loss on their true targets. `adaptive`: its weight follows the shares of old items and of exemplars. `equal`: as
    many exemplars for every item. Differs from the paper: a fixed number of epochs unless `fit.holdout` says otherwise;
    allocation is rounded, not drawn; herding picks nothing twice.
    """

    exemplars: Count = 30_000
    select: Select = "herding"
    allocate: Allocate = "largest-remainder"
    equal: bool = False
    distil: bool = True
    adaptive: bool = True
    weight: Weight = 0.8
    fit: Fit = Fit()

    def __post_init__(self) -> None:
        check_options(self)

    def update(self, state: State, span: Span) -> State:
        """Train on the new events and the exemplars, then choose exemplars from both."""
        targets = due_targets(state.recent, self.fit.history)
        if state.spans_seen == 0:
            return self._remember(start(state, span, self.fit), targets, None, span.index)
        model, exemplars = successor(state, span), state.memory
        assert isinstance(model, EncodingModel)
        carried = carried_by(model, state.users, span.index)
        clock = Clock({"rows_read": float(len(targets) + len(exemplars))})
        since = time.process_time()
        key = state.seed, span.index
        learnt, _ = parted(targets, self.fit, key)
        n_targets = len(learnable(learnt, kept_length(model)))
        weight = self.weight
        if self.adaptive:
            weight = adaptive_weight(weight, state.model.n_items, span.n_items, len(exemplars), n_targets)
        loss = distil(model, state.model, exemplars, carried) if self.distil and weight else own_loss(model)
        source = random_source(state.seed, span.index, PLAYED)
        terms = replay(model, learnt, exemplars, carried, weight=weight, loss=loss, source=source)
        clock.timed("train_cpu_s", since)
        adapt(model, targets, self.fit, key, clock, carried=carried, terms=terms)
        return self._remember(finish(state, model, carried, self.fit.history, clock), targets, exemplars, span.index)

    def _remember(self, after: State, targets: Targets, exemplars: Kept | None, span: int) -> State:
        """`after` with exemplars that its model chooses from the new targets and the exemplars so far."""
        since, clock = time.process_time(), Clock(dict(after.costs))
        source = random_source(after.seed, span, CHOSEN)
        pool = pool_of(targets, exemplars, kept_length(after.model))
        counts_I = torch.bincount(pool.items_N, minlength=after.model.n_items + 1)
        wanted_I = allocate(counts_I, self.exemplars, self.allocate, self.equal, source)
        carried = carried_by(after.model, after.users, after.spans_seen)
        chosen = select(self.select, after.model, pool, carried, wanted_I, source)
        clock.timed("remember_cpu_s", since)
        return replace(after, memory=chosen, costs=dict(clock.costs))
