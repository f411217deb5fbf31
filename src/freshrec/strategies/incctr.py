"""IncCTR: fine-tuning with distillation from the previous model. New ids get their own row once they are frequent.

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
    """CE(softmax(z / tau), softmax(z_T / tau)) over the candidates, mean over the batch. No gradient to the teacher."""
    return F.cross_entropy(logits_BN / tau, torch.softmax(teacher_BN.detach() / tau, 1))


def sigmoid_distillation(logits_BN: Tensor, teacher_BN: Tensor, tau: float = 1.0) -> Tensor:
    """CE(sigma(z / tau), sigma(z_T / tau)), mean over all logits. No gradient to the teacher."""
    return F.binary_cross_entropy_with_logits(logits_BN / tau, torch.sigmoid(teacher_BN.detach() / tau))


@dataclass(frozen=True)
class Distill:
    """loss = (1 - weight) * model's loss + weight * cross-entropy with the previous model's logits.

    Cross-entropy is linear in the label. So this is the loss for the label (1 - weight) y + weight s, where s is the
    teacher's prediction. At the first step both models agree, and the gradient is (1 - weight) times fine-tuning's.
    """

    weight: Rate = 0.2  # Weight of the distillation in the loss. 0 = fine-tuning.
    tau: Positive = 1.0  # Temperature: logits are divided by it.

    def __post_init__(self) -> None:
        check_options(self)

    def distillation_term(self, teacher: TrainedModel) -> LossTerm:
        """Return the term to add to the loss, given the previous model. The term keeps and uses the teacher.

        Both models score the candidates of the same batch: its targets and its negatives. The teacher has no dropout.
        """
        teacher.eval()
        distillation_loss = sigmoid_distillation if isinstance(teacher, ClickModel) else softmax_distillation
        hidden = HiddenStates()

        def distil(batch: Batch, forward: Forward) -> Tensor:
            with torch.no_grad():
                teacher_BN = candidate_logits(hidden.run(teacher, batch))
            return self.weight * (distillation_loss(candidate_logits(forward), teacher_BN, self.tau) - forward.loss)

        return distil


def candidate_logits(forward: Forward) -> Tensor:
    """Logits (B, N) of each target's candidates, or of all items if the loss covers all items."""
    if forward.logits_BN is not None:
        return forward.logits_BN
    if forward.vectors_BKD is None or forward.rows_RD is None:
        raise IncompatibleError("incctr distils logits, but this model returns none. Set logits_BN in its forward.")
    return max_inner_product(forward.vectors_BKD, forward.rows_RD[1:])


@dataclass(frozen=True)
class IncCTR:
    """Fine-tuning with distillation from the previous model ("KD-self") and admission of new ids.

    Admission: all rare new users share one row, and so do all rare new items. An id is rare until it has been trained
    on `threshold` times. Then it gets its own row, which starts as a copy of the shared one.

    Differs from the paper: one learning rate for old and new rows. The paper's new rows start at random.
    """

    distill: Distill | None = Distill()  # Distillation from the previous model. none = fine-tuning.
    threshold: CountOrZero = 0  # Number of training events after which a new id gets its own row. 0 = at once.
    fit: FitConfig = FitConfig()  # Training options of the model.

    def __post_init__(self) -> None:
        check_options(self)
        if self.fit.holdout and self.threshold:
            raise OptionError(
                "incctr cannot use fit.holdout while rare ids share a row. Set threshold=0 or leave out fit.holdout."
            )

    def update(self, state: State, span: Span) -> State:
        """Count training events per id, tie the rows of rare ids, and train with the teacher."""
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
        """Tie the rows of all rare users to one row, and the rows of all rare items to another."""
        for name, table in embedding_tables(model).items():
            rare_N = (n_seen[name] < self.threshold).nonzero()[:, 0] if name in n_seen else torch.zeros(0)
            if len(rare_N):
                tie_rows(table, rare_N)


def tie_rows(table: EmbeddingTable, rows_N: Tensor) -> None:
    """Train these rows as one, until `untie_rows` is called. All take the values of the first row."""
    table.tied_to_R = torch.arange(len(table.packed)).index_fill(0, rows_N, int(rows_N[0]))
    table.weights.copy_(table.weights[table.tied_to_R])


def untie_rows(table: EmbeddingTable) -> None:
    """Train each row on its own again. Tied rows keep the values of their common row."""
    if table.tied_to_R is not None:
        table.weights.copy_(table.weights[table.tied_to_R])
    table.tied_to_R = None


def _count_seen(before: dict[str, Tensor], targets: Targets, model: TrainedModel) -> dict[str, Tensor]:
    """Count training events per user and per item so far. Ids of the base block start at the threshold."""
    now = {
        "users": torch.bincount(targets.users_N, minlength=model.n_users + 1),
        "items": torch.bincount(targets.items_N, minlength=model.n_items + 1),
    }
    return {
        name: torch.cat([old, torch.zeros(len(now[name]) - len(old)).long()]) + now[name]
        for name, old in before.items()
    }
