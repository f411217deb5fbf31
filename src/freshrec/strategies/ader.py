"""ADER: fine-tuning that also keeps to the last model's scores of exemplars, a few past events of each item.

Symbols of the paper: E_{t-1} -> state.memory, D_t -> targets, I_{t-1} and I_t -> the items that the last model knew and
that this one knows, m_{t,i} -> quota_I, N -> exemplars, phi -> features, lambda_base -> weight.
"""

import math
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.config import Count, Weight, check_options
from freshrec.data.batches import Targets, due_targets
from freshrec.data.stored_interests import StoredInterests, stored_interests_of
from freshrec.learn.exemplars import (
    AllocationRule,
    ExemplarLoss,
    SelectionRule,
    allocate_exemplars,
    build_pool,
    exemplar_batches,
    experience_replay,
    model_loss,
    select_exemplars,
    trainable_targets,
)
from freshrec.learn.fit import CostMeter, FitConfig, finish_update, fit_base_block, fit_model, grown_copy, split_holdout
from freshrec.learn.reservoir import TrainingSamples, sample_history_length
from freshrec.nn.full_softmax import full_distillation_loss
from freshrec.nn.layers import max_inner_product
from freshrec.nn.scoring import item_table, item_vectors, user_vectors
from freshrec.random_streams import stream
from freshrec.types import Batch, EncodingModel, Span, State


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


def exemplar_distillation_loss(
    model: EncodingModel, teacher: EncodingModel, exemplars: TrainingSamples, stored_interests: StoredInterests | None
) -> ExemplarLoss:
    """The loss that keeps `model` to what `teacher` says of exemplars.

    Gradients reach the dense weights, and those item rows that the training batch moves in the same step: all of them
    where the model trains by the full softmax; else a row has no need of being held while nothing moves it.
    """
    n_known = teacher.n_items
    known_RD = item_vectors(teacher)[: n_known + 1]
    teacher_outputs = [
        (index, user_vectors(teacher, batch)) for index, batch in exemplar_batches(exemplars, teacher, stored_interests)
    ]
    max_vectors = max((vectors_BKD.shape[1] for _, vectors_BKD in teacher_outputs), default=1)
    teacher_MKD = torch.zeros(len(exemplars), max_vectors, known_RD.shape[1])
    for index, vectors_BKD in teacher_outputs:
        teacher_MKD[index] = vectors_BKD[:, :1]  # again where there are fewer: it changes no score
        teacher_MKD[index, : vectors_BKD.shape[1]] = vectors_BKD

    table = item_table(model)

    def loss(index_M: Tensor, batch: Batch) -> Tensor:
        rows_RD = table.full_matrix()
        vectors_BKD = model.encode(F.embedding(batch.history_BT, rows_RD), batch)
        if vectors_BKD.shape[1] == max_vectors == 1:
            return full_distillation_loss(vectors_BKD[:, 0], rows_RD, teacher_MKD[index_M, 0], known_RD)
        teacher_BI = max_inner_product(teacher_MKD[index_M], known_RD[1:])
        return distillation(max_inner_product(vectors_BKD, rows_RD[1 : n_known + 1]), teacher_BI)

    return loss


@dataclass(frozen=True)
class ADER:
    """Fine-tuning with a second loss on exemplars, which are chosen again after each update.

    `distil`: the second loss is the distance to what the last model says of them; else ("ER") it is the model's own
    loss on their true targets. `adaptive`: its weight follows the shares of old items and of exemplars. `equal`: as
    many exemplars for every item. Differs from the paper: a fixed number of epochs unless `fit.holdout` says otherwise;
    allocation is rounded, not drawn; herding picks nothing twice.
    """

    exemplars: Count = 30_000
    select: SelectionRule = "herding"
    allocate: AllocationRule = "largest-remainder"
    equal: bool = False
    distil: bool = True
    adaptive: bool = True
    weight: Weight = 0.8
    fit: FitConfig = FitConfig()

    def __post_init__(self) -> None:
        check_options(self)

    def update(self, state: State, span: Span) -> State:
        """Train on the new events and the exemplars, then choose exemplars from both."""
        targets = due_targets(state.histories, self.fit.history)
        if state.spans_seen == 0:
            return self._select_exemplars(fit_base_block(state, span, self.fit), targets, None, span.index)
        model, exemplars = grown_copy(state, span), state.memory
        assert isinstance(model, EncodingModel)
        stored_interests = stored_interests_of(model, state.interests, span.index)
        meter = CostMeter({"rows_read": float(len(targets) + len(exemplars))})
        started_at = time.process_time()
        key = state.seed, span.index
        train_targets, _ = split_holdout(targets, self.fit, key)
        n_targets = len(trainable_targets(train_targets, sample_history_length(model)))
        weight = self.weight
        if self.adaptive:
            weight = adaptive_weight(weight, state.model.n_items, span.n_items, len(exemplars), n_targets)
        loss = model_loss(model)
        if self.distil and weight:
            loss = exemplar_distillation_loss(model, state.model, exemplars, stored_interests)
        rng = stream(state.seed, "exemplar replay", span.index)
        terms = experience_replay(model, train_targets, exemplars, stored_interests, weight=weight, loss=loss, rng=rng)
        meter.add_time("train_cpu_s", started_at)
        fit_model(model, targets, self.fit, key, meter, stored_interests=stored_interests, terms=terms)
        after = finish_update(state, model, stored_interests, self.fit.history, meter)
        return self._select_exemplars(after, targets, exemplars, span.index)

    def _select_exemplars(self, after: State, targets: Targets, exemplars: TrainingSamples | None, span: int) -> State:
        """`after` with exemplars that its model chooses from the new targets and the exemplars so far."""
        started_at, meter = time.process_time(), CostMeter(dict(after.costs))
        rng = stream(after.seed, "exemplar selection", span)
        pool = build_pool(targets, exemplars, sample_history_length(after.model))
        counts_I = torch.bincount(pool.items_N, minlength=after.model.n_items + 1)
        quota_I = allocate_exemplars(counts_I, self.exemplars, self.allocate, self.equal, rng)
        stored_interests = stored_interests_of(after.model, after.interests, after.spans_seen)
        exemplars_after = select_exemplars(self.select, after.model, pool, stored_interests, quota_I, rng)
        meter.add_time("remember_cpu_s", started_at)
        return replace(after, memory=exemplars_after, costs=dict(meter.costs))
