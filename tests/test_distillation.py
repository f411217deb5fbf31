"""A teacher that equals its student teaches nothing: for all models, distillation then has no gradient."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from freshrec.data.batches import Targets
from freshrec.data.histories import append_events
from freshrec.data.stored_interests import StoredInterests
from freshrec.errors import IncompatibleError
from freshrec.learn.fit import CostMeter, FitConfig, train
from freshrec.models import MODELS, find_model
from freshrec.nn.embedding_table import embedding_tables
from freshrec.strategies import ader, ewc, find_strategy, imsr, incctr
from freshrec.strategies.compatible import check_compatible
from freshrec.types import Batch, Events, Forward, LossTerm, Span, State, TrainedModel

VARIANTS = (
    "gru4rec:alpha=0",
    "gru4rec:loss=xe:logq=1:embeddings=separate",
    "gru4rec:steps=session-parallel:layers=2",
    "gru4rec:bptt=one",
    "sasrec:loss=bce",
    "sasrec:predict=last:loss=full",
    "stamp:loss=sampled",
    "caser:loss=full",
)
TRAINED = [
    name for name, spec in MODELS.items() if isinstance(spec.build(0), TrainedModel) and not name.endswith("-k1")
]
MODULES = (incctr, ader, imsr, ewc)
DISTILLING = ("incctr", "ader", "imsr", "imsr-dir", "imsr-kd1", "imsr-kd2", "imsr-kd3", "ewc")  # ewc: a penalty
SMALL = {"d": 4, "negatives": 16, "batch": 16, "length": 6, "std": 0.2, "k": 2, "k_max": 4}
DETERMINISTIC = {"dropout": 0.0, "drop_in": 0.0, "drop_out": 0.0, "noise": 0.0}
UNMOVED = 1e-35  # with this learning rate, no weight changes: the student stays equal to the teacher


def is_compatible(model: str, strategy: str) -> bool:
    try:
        check_compatible(find_model(model), model, find_strategy(strategy), strategy)
    except IncompatibleError:
        return False
    return True


PAIRS = [(m, s) for m in (*TRAINED, *VARIANTS) for s in DISTILLING if is_compatible(m, s)]


def quiet_spec(name: str) -> Any:
    """Return a small model whose training pass is not random, so that it can equal the teacher's pass."""
    spec: Any = find_model(name)
    changes = {n: v for n, v in (SMALL | DETERMINISTIC).items() if n in {field.name for field in fields(spec)}}
    if name == "mind-original":
        changes["transform"] = "interest"  # with noise = 0, its shared transform is refused
    return replace(spec, **changes)


def events(n: int, n_users: int, n_items: int, seed: int) -> Events:
    source = torch.Generator().manual_seed(seed)
    return Events.trainable(*(torch.randint(1, high + 1, (n,), generator=source) for high in (n_users, n_items)))


SPANS = (Span(0, events(500, 30, 20, 0), 30, 20), Span(1, events(200, 33, 23, 1), 33, 23))  # 3 new users and items


def largest_gradient(loss: Tensor, model: TrainedModel) -> float:
    """Return the largest partial derivative, by any dense weight and by any row of the step."""
    leaves = [weight for _, weight in model.named_parameters()]
    leaves += [table.leaf for table in embedding_tables(model).values() if table.leaf is not None]
    gradients = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    return max([float(gradient.abs().max()) for gradient in gradients if gradient is not None], default=0.0)


def measuring_term(model: TrainedModel, term: LossTerm, found: list[float], has_equal_teacher: bool) -> LossTerm:
    """Return `term` without its multiple of the model's own loss. It adds its largest gradients to `found`."""

    def measure(batch: Batch, forward: Forward) -> Tensor:
        if isinstance(term, imsr.Retainer) and has_equal_teacher:  # the teacher of a retainer are stored interests
            assert forward.vectors_BKD is not None
            batch = replace(batch, interests_BKD=forward.vectors_BKD.detach())
        loss = term(batch, replace(forward, loss=torch.zeros(())))
        found.append(largest_gradient(loss, model))
        return loss

    return measure


def gradients_of_update(model: str, strategy: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], list[float]]:
    """Return the largest gradient of the extra terms at each step of an update on new events.

    First come the steps of an epoch in which student and teacher are equal, then those of an epoch of training.
    """
    epochs: tuple[list[float], list[float]] = ([], [])

    def measuring_fit(
        model: TrainedModel,
        targets: Targets,
        fit: FitConfig,
        key: tuple[int, ...],
        meter: CostMeter,
        *,
        stored_interests: StoredInterests | None = None,
        terms: Sequence[LossTerm] = (),
        project: Any = None,
    ) -> None:
        for lr_scale, found in zip((UNMOVED / model.spec.lr, 1.0), epochs):
            measure = measuring_term(model, *terms, found, has_equal_teacher=found is epochs[0])
            options = {"lr_scale": lr_scale, "stored_interests": stored_interests, "project": project}
            assert len(list(train(model, targets, 1, key, terms=[measure], **options))) == 1

    chosen: Any = find_strategy(strategy)
    chosen = replace(chosen, fit=FitConfig(base_epochs=1))
    state = State(quiet_spec(model).build(0))
    for span in SPANS:
        histories = append_events(state.histories, span.events, span.n_users)
        state = chosen.update(replace(state, histories=histories), span)
        for module in MODULES:
            monkeypatch.setattr(module, "fit_model", measuring_fit)
    return epochs


@pytest.mark.parametrize(("model", "strategy"), PAIRS)
def test_a_teacher_that_equals_the_student_gives_no_gradient(
    model: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With the student's logits z and the teacher's z_T of the same items, the gradients by z are softmax(z) -
    # softmax(z_T) and sigma(z) - sigma(z_T). That of a squared distance is 2 (z - z_T), and that of EWC's penalty is
    # F (theta - theta*). All are 0 for z = z_T and theta = theta*, and then so are the gradients by all weights. If
    # the teacher scored other items, z would differ from z_T although the weights are equal. What is left is rounding.
    equal, moved = (max(found) for found in gradients_of_update(model, strategy, monkeypatch))
    assert equal < 1e-7
    assert moved > 100 * equal and moved > 1e-7  # once the student has moved, the term pulls it back


def test_the_teacher_has_no_dropout() -> None:
    # Two readings of one batch give the same loss, although the teacher comes in training mode with dropout.
    spec: Any = find_model("sasrec:d=8:dropout=0.5")
    student, teacher = spec.build(0), spec.build(1)
    for model in (student, teacher):
        model.grow(3, 9)
    teacher.train()
    batch = Batch(torch.tensor([1]), torch.tensor([[4, 2]]), torch.tensor([[2, 7]]), torch.tensor([5, 6, 3]))
    forward, term = student(batch), incctr.Distill().distillation_term(teacher)
    assert torch.equal(term(batch, forward), term(batch, forward))
