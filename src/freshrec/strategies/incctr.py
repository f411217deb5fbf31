"""IncCTR: fine-tuning that also learns from what the last model says, and gives a row to an id once it is met often.

Symbols of the paper: lambda -> weight, tau -> tau, THR -> threshold, z -> logits_BN, z_T -> teacher_BN.
"""

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.config import CountOrNone, Positive, Rate, check_options
from freshrec.data.batches import Targets, due_targets
from freshrec.data.carried import carried_by
from freshrec.data.lanes import HiddenStates
from freshrec.errors import IncompatibleError, OptionError
from freshrec.learn.fit import Clock, Fit, adapt, finish, start, successor
from freshrec.models.layers import best_inner_product
from freshrec.models.tables import Table, tables_of
from freshrec.types import Batch, ClickModel, Forward, Span, State, Term, TrainedModel


def soft_choice(logits_BN: Tensor, teacher_BN: Tensor, tau: float = 1.0) -> Tensor:
    """CE(softmax(z / tau), softmax(z_T / tau)) over the candidates, mean over the batch; the teacher is fixed."""
    return F.cross_entropy(logits_BN / tau, torch.softmax(teacher_BN.detach() / tau, 1))


def soft_clicks(logits_BN: Tensor, teacher_BN: Tensor, tau: float = 1.0) -> Tensor:
    """CE(sigma(z / tau), sigma(z_T / tau)), mean over all logits; the teacher is fixed."""
    return F.binary_cross_entropy_with_logits(logits_BN / tau, torch.sigmoid(teacher_BN.detach() / tau))


@dataclass(frozen=True)
class Distill:
    """The loss becomes (1 - weight) of itself and `weight` of what the last model says of the same candidates.

    Cross-entropy is linear in what it is compared with: this is the loss for the label (1 - weight) y + weight s, where
    s is the teacher's opinion. At the first step both models agree, and the gradient is 1 - weight of fine-tuning's.
    """

    weight: Rate = 0.2
    tau: Positive = 1.0

    def __post_init__(self) -> None:
        check_options(self)

    def term(self, teacher: TrainedModel) -> Term:
        """What to add to the loss, given the last model."""

        opinion, hidden = soft_clicks if isinstance(teacher, ClickModel) else soft_choice, HiddenStates()

        def distil(batch: Batch, forward: Forward) -> Tensor:
            with torch.no_grad():
                teacher_BN = logits_of(hidden.run(teacher, batch))
            return self.weight * (opinion(logits_of(forward), teacher_BN, self.tau) - forward.loss)

        return distil


def logits_of(forward: Forward) -> Tensor:
    """(B, N) of the candidates of each target, or of all items where these are the candidates."""
    if forward.logits_BN is not None:
        return forward.logits_BN
    if forward.vectors_BKD is None or forward.rows_RD is None:
        raise IncompatibleError("incctr distils logits, and this model's forward gives none; set logits_BN.")
    return best_inner_product(forward.vectors_BKD, forward.rows_RD[1:])


@dataclass(frozen=True)
class IncCTR:
    """Fine-tuning with distillation from the last model ("KD-self"), and admission of new ids.

    `threshold`: until an id that came after the base block has been trained on so often, it shares one row with all
    others like it, as user or as item; then it has its own, which starts as the shared one. 0: each has its own at
    once. Differs from the paper: one learning rate for old and new rows; its new rows start at random.
    """

    distill: Distill | None = Distill()
    threshold: CountOrNone = 0
    fit: Fit = Fit()

    def __post_init__(self) -> None:
        check_options(self)
        if self.fit.holdout and self.threshold:
            raise OptionError(
                "fit.holdout would judge rows that wait for the share of the common one; set threshold=0."
            )

    def update(self, state: State, span: Span) -> State:
        """Count who was met, let the rare share a row, train with the teacher."""
        if state.spans_seen == 0:
            started = start(state, span, self.fit)
            sizes = {"users": span.n_users, "items": span.n_items}
            return replace(started, memory={name: torch.full((n + 1,), self.threshold) for name, n in sizes.items()})
        model = successor(state, span)
        targets = due_targets(state.recent, self.fit.history)
        met = _met(state.memory, targets, model)
        self._share(model, met)
        carried = carried_by(model, state.users, span.index)
        terms = [self.distill.term(copy.deepcopy(model))] if self.distill else []
        clock = Clock({"rows_read": float(len(targets))})
        adapt(model, targets, self.fit, (state.seed, span.index), clock, carried=carried, terms=terms)
        for table in tables_of(model).values():
            part(table)
        return replace(finish(state, model, carried, self.fit.history, clock), memory=met)

    def _share(self, model: TrainedModel, met: dict[str, Tensor]) -> None:
        """From now on, the users that were met too rarely are one row, and so are the items."""
        for name, table in tables_of(model).items():
            rare_N = (met[name] < self.threshold).nonzero()[:, 0] if name in met else torch.zeros(0)
            if len(rare_N):
                share(table, rare_N)


def share(table: Table, rows_N: Tensor) -> None:
    """Train these rows as one, the first of them, until `part`. They start alike, and are alike in the end."""
    table.leader_R = torch.arange(len(table.packed)).index_fill(0, rows_N, int(rows_N[0]))
    table.weights.copy_(table.weights[table.leader_R])


def part(table: Table) -> None:
    """Each row is trained for itself again."""
    if table.leader_R is not None:
        table.weights.copy_(table.weights[table.leader_R])
    table.leader_R = None


def _met(before: dict[str, Tensor], targets: Targets, model: TrainedModel) -> dict[str, Tensor]:
    """How often each user and each item was trained on so far; those of the base block often enough."""
    now = {
        "users": torch.bincount(targets.users_N, minlength=model.n_users + 1),
        "items": torch.bincount(targets.items_N, minlength=model.n_items + 1),
    }
    return {
        name: torch.cat([old, torch.zeros(len(now[name]) - len(old)).long()]) + now[name]
        for name, old in before.items()
    }
