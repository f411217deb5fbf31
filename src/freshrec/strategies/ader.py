"""ADER: fine-tuning with distillation on exemplars, which are a few past events of each item.

Symbols of the paper: E_{t-1} -> state.memory, D_t -> targets, m_{t,i} -> quota_I, N -> exemplars, phi -> features,
lambda_base -> weight. I_{t-1} -> the items that the previous model knows, I_t -> those that the new model knows.
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
    """-sum_{i <= |I_{t-1}|} p'_i ln p_i, mean over B. p, p' = softmax over the teacher's items [ADER eq. 2].

    The student's logits may have more columns, for new items. The sum and the softmax ignore them. No gradient reaches
    the teacher.
    """
    known_BI = student_BI[:, : teacher_BI.shape[1]]
    return F.cross_entropy(known_BI, torch.softmax(teacher_BI.detach(), 1))


def adaptive_weight(base: float, n_known: int, n_items: int, n_exemplars: int, n_targets: int) -> float:
    """lambda_t = lambda_base sqrt(|I_{t-1}| / |I_t| |E_{t-1}| / |D_t|), or 0 without new events [ADER eq. 4]."""
    return base * math.sqrt(n_known / n_items * n_exemplars / n_targets) if n_items and n_targets else 0.0


def exemplar_distillation_loss(
    model: EncodingModel, teacher: EncodingModel, exemplars: TrainingSamples, stored_interests: StoredInterests | None
) -> ExemplarLoss:
    """Return the loss that keeps the scores of `model` on exemplars close to those of `teacher`.

    Gradients reach the dense weights and the item rows that the training batch changes in the same step. With the full
    softmax, these are all rows. With a sampled loss, the other rows do not change, so nothing has to hold them.
    """
    n_known = teacher.n_items
    known_RD = item_vectors(teacher)[: n_known + 1]
    teacher_outputs = [
        (index, user_vectors(teacher, batch)) for index, batch in exemplar_batches(exemplars, teacher, stored_interests)
    ]
    max_vectors = max((vectors_BKD.shape[1] for _, vectors_BKD in teacher_outputs), default=1)
    teacher_MKD = torch.zeros(len(exemplars), max_vectors, known_RD.shape[1])
    for index, vectors_BKD in teacher_outputs:
        teacher_MKD[index] = vectors_BKD[:, :1]  # a repeated vector changes no score
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

    With `distil`, the second loss is the cross-entropy with the previous model's scores. Without it, this is experience
    replay (ER): the second loss is the model's own loss on the exemplars' true targets.

    Differs from the paper: a fixed number of epochs unless `fit.holdout` is set. The allocation is rounded, not drawn.
    Herding picks no sample twice.
    """

    exemplars: Count = 30_000  # Maximum number of exemplars of all items together.
    select: SelectionRule = "herding"  # Rule for choosing exemplars. "herding-code" follows the authors' code.
    allocate: AllocationRule = "largest-remainder"  # Rule for dividing exemplars among items: rounded or drawn.
    equal: bool = False  # Plan equally many exemplars for all items, not in proportion to their samples.
    distil: bool = True  # Distil the previous model's scores. false = train on the true targets (ER).
    adaptive: bool = True  # Scale the weight by the shares of old items and of exemplars (equation 4 of ADER).
    weight: Weight = 0.8  # Weight of the loss on exemplars. 0 = fine-tuning.
    fit: FitConfig = FitConfig()  # Training options of the model.

    def __post_init__(self) -> None:
        check_options(self)

    def update(self, state: State, span: Span) -> State:
        """Train on the new events and the exemplars, then choose new exemplars from both."""
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
        """Return `after` with exemplars chosen by its model from the new targets and the previous exemplars."""
        started_at, meter = time.process_time(), CostMeter(dict(after.costs))
        rng = stream(after.seed, "exemplar selection", span)
        pool = build_pool(targets, exemplars, sample_history_length(after.model))
        counts_I = torch.bincount(pool.items_N, minlength=after.model.n_items + 1)
        quota_I = allocate_exemplars(counts_I, self.exemplars, self.allocate, self.equal, rng)
        stored_interests = stored_interests_of(after.model, after.interests, after.spans_seen)
        exemplars_after = select_exemplars(self.select, after.model, pool, stored_interests, quota_I, rng)
        meter.add_time("remember_cpu_s", started_at)
        return replace(after, memory=exemplars_after, costs=dict(meter.costs))
