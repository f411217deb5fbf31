"""IncCTR: fine-tuning that also learns from the last model's predictions, and gives frequent ids rows of their own.

Symbols of the paper: lambda -> weight, tau -> tau, THR -> threshold, z -> logits_BN, z_T -> teacher_BN.
"""

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.config import CountOrZero, Positive, Rate, check_options
from freshrec.data.batches import Targets, due_targets
from freshrec.data.session_parallel import HiddenStates
from freshrec.data.stored_interests import stored_interests_of
from freshrec.errors import IncompatibleError, OptionError
from freshrec.learn.fit import CostMeter, FitConfig, finish_update, fit_base_block, fit_model, grown_copy
from freshrec.nn.embedding_table import EmbeddingTable, embedding_tables
from freshrec.nn.layers import max_inner_product
from freshrec.types import Batch, ClickModel, Forward, LossTerm, Span, State, TrainedModel


def softmax_distillation(logits_BN: Tensor, teacher_BN: Tensor, tau: float = 1.0) -> Tensor:
    """CE(softmax(z / tau), softmax(z_T / tau)) over the candidates, mean over the batch; the teacher is fixed."""
    return F.cross_entropy(logits_BN / tau, torch.softmax(teacher_BN.detach() / tau, 1))


def sigmoid_distillation(logits_BN: Tensor, teacher_BN: Tensor, tau: float = 1.0) -> Tensor:
    """CE(sigma(z / tau), sigma(z_T / tau)), mean over all logits; the teacher is fixed."""
    return F.binary_cross_entropy_with_logits(logits_BN / tau, torch.sigmoid(teacher_BN.detach() / tau))


@dataclass(frozen=True)
class Distill:
    """The loss becomes (1 - weight) of itself and `weight` of the distance to the last model's logits.

    Cross-entropy is linear in what it is compared with: this is the loss for the label (1 - weight) y + weight s, where
    s is the teacher's opinion. At the first step both models agree, and the gradient is 1 - weight of fine-tuning's.
    """

    weight: Rate = 0.2
    tau: Positive = 1.0

    def __post_init__(self) -> None:
        check_options(self)

    def distillation_term(self, teacher: TrainedModel) -> LossTerm:
        """What to add to the loss, given the last model."""
        distillation_loss = sigmoid_distillation if isinstance(teacher, ClickModel) else softmax_distillation
        hidden = HiddenStates()

        def distil(batch: Batch, forward: Forward) -> Tensor:
            with torch.no_grad():
                teacher_BN = candidate_logits(hidden.run(teacher, batch))
            return self.weight * (distillation_loss(candidate_logits(forward), teacher_BN, self.tau) - forward.loss)

        return distil


def candidate_logits(forward: Forward) -> Tensor:
    """(B, N) of the candidates of each target, or of all items where these are the candidates."""
    if forward.logits_BN is not None:
        return forward.logits_BN
    if forward.vectors_BKD is None or forward.rows_RD is None:
        raise IncompatibleError("incctr distils logits, and this model's forward gives none; set logits_BN.")
    return max_inner_product(forward.vectors_BKD, forward.rows_RD[1:])


@dataclass(frozen=True)
class IncCTR:
    """Fine-tuning with distillation from the last model ("KD-self"), and admission of new ids.

    `threshold`: until an id that came after the base block has been trained on so often, it shares one row with all
    others like it, as user or as item; then it has its own, which starts as the shared one. 0: each has its own at
    once. Differs from the paper: one learning rate for old and new rows; its new rows start at random.
    """

    distill: Distill | None = Distill()
    threshold: CountOrZero = 0
    fit: FitConfig = FitConfig()

    def __post_init__(self) -> None:
        check_options(self)
        if self.fit.holdout and self.threshold:
            raise OptionError(
                "fit.holdout would judge rows that wait for the share of the common one; set threshold=0."
            )

    def update(self, state: State, span: Span) -> State:
        """Count who was met, let the rare share a row, train with the teacher."""
        if state.spans_seen == 0:
            base_state = fit_base_block(state, span, self.fit)
            sizes = {"users": span.n_users, "items": span.n_items}
            return replace(base_state, memory={name: torch.full((n + 1,), self.threshold) for name, n in sizes.items()})
        model = grown_copy(state, span)
        targets = due_targets(state.histories, self.fit.history)
        n_seen = _count_seen(state.memory, targets, model)
        self._tie_rare_rows(model, n_seen)
        stored_interests = stored_interests_of(model, state.interests, span.index)
        terms = [self.distill.distillation_term(copy.deepcopy(model))] if self.distill else []
        meter = CostMeter({"rows_read": float(len(targets))})
        fit_model(
            model, targets, self.fit, (state.seed, span.index), meter, stored_interests=stored_interests, terms=terms
        )
        for table in embedding_tables(model).values():
            untie_rows(table)
        return replace(finish_update(state, model, stored_interests, self.fit.history, meter), memory=n_seen)

    def _tie_rare_rows(self, model: TrainedModel, n_seen: dict[str, Tensor]) -> None:
        """From now on, the users that were met too rarely are one row, and so are the items."""
        for name, table in embedding_tables(model).items():
            rare_N = (n_seen[name] < self.threshold).nonzero()[:, 0] if name in n_seen else torch.zeros(0)
            if len(rare_N):
                tie_rows(table, rare_N)


def tie_rows(table: EmbeddingTable, rows_N: Tensor) -> None:
    """Train these rows as one, the first of them, until `untie_rows`. They start equal, and end equal."""
    table.tied_to_R = torch.arange(len(table.packed)).index_fill(0, rows_N, int(rows_N[0]))
    table.weights.copy_(table.weights[table.tied_to_R])


def untie_rows(table: EmbeddingTable) -> None:
    """Each row is trained for itself again."""
    if table.tied_to_R is not None:
        table.weights.copy_(table.weights[table.tied_to_R])
    table.tied_to_R = None


def _count_seen(before: dict[str, Tensor], targets: Targets, model: TrainedModel) -> dict[str, Tensor]:
    """How often each user and each item was trained on so far; those of the base block often enough."""
    now = {
        "users": torch.bincount(targets.users_N, minlength=model.n_users + 1),
        "items": torch.bincount(targets.items_N, minlength=model.n_items + 1),
    }
    return {
        name: torch.cat([old, torch.zeros(len(now[name]) - len(old)).long()]) + now[name]
        for name, old in before.items()
    }
