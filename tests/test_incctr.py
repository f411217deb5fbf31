"""IncCTR: distillation from the previous model by hand, and new ids that share a row until they are frequent."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.data.histories import append_events
from freshrec.errors import IncompatibleError
from freshrec.learn.fit import FitConfig
from freshrec.models.mf import MF, MFSpec
from freshrec.nn.embedding_table import EmbeddingTable
from freshrec.nn.layers import sampled_softmax_loss
from freshrec.strategies.baselines import FineTune
from freshrec.strategies.incctr import (
    Distill,
    IncCTR,
    candidate_logits,
    sigmoid_distillation,
    softmax_distillation,
    tie_rows,
    untie_rows,
)
from freshrec.types import Batch, Events, Forward, Span, State

near = pytest.approx
QUICK = FitConfig(base_epochs=2, epochs=2)


# distillation


def test_the_loss_is_the_cross_entropy_with_a_mixture_of_the_label_and_the_teachers_prediction() -> None:
    # The teacher's odds are 3 : 1, so s = (0.75, 0.25). With y = (1, 0) and weight 0.2, the target is (0.95, 0.05).
    # With the logits (1, 0), ln p = (-0.313262, -1.313262), so 0.95 x 0.313262 + 0.05 x 1.313262 = 0.363262.
    logits_BN, teacher_BN = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 1.0]]).log()
    mixed = 0.8 * sampled_softmax_loss(logits_BN) + 0.2 * softmax_distillation(logits_BN, teacher_BN)
    assert mixed.item() == near(0.363262, abs=1e-6)


def test_the_temperature_softens_both_sides() -> None:
    # z / 2 = (1, 0). z_T / 2 has the odds e^0.549306 = sqrt(3) : 1, so s_1 = 0.633975. 0.313262 + 0.366025 = 0.679287.
    logits_BN, teacher_BN = torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 1.0]]).log()
    assert softmax_distillation(logits_BN, teacher_BN, tau=2.0).item() == near(0.679287, abs=1e-6)


def test_for_clicks_the_loss_is_the_cross_entropy_with_the_same_mixture() -> None:
    # T20: logits (0.3, -1.2), labels (1, 0), the teacher's probabilities (0.6, 0.4), weight 0.2. The mixed labels
    # (0.92, 0.08) have the loss 0.468819. The plain labels have the loss 0.408819.
    logits_BN, teacher_BN = torch.tensor([[0.3], [-1.2]]), torch.tensor([[0.6], [0.4]]).logit()
    plain = F.binary_cross_entropy_with_logits(logits_BN, torch.tensor([[1.0], [0.0]]))
    assert plain.item() == near(0.408819, abs=1e-6)
    assert (0.8 * plain + 0.2 * sigmoid_distillation(logits_BN, teacher_BN)).item() == near(0.468819, abs=1e-6)


def test_the_distillation_has_no_gradient_if_student_and_teacher_agree() -> None:
    # T21: with lambda = 1, the gradient is sigma(z) - sigma(z_T), or softmax(z) - softmax(z_T). Both are 0.
    for distillation in (sigmoid_distillation, softmax_distillation):
        for tau in (1.0, 3.0):
            logits_BN = torch.tensor([[0.3, -1.2, 2.0]], dtype=torch.float64, requires_grad=True)
            distillation(logits_BN, logits_BN.detach().clone(), tau).backward()
            assert logits_BN.grad is not None and logits_BN.grad.abs().max() < 1e-15


def random_events(n: int, n_users: int, n_items: int) -> Events:
    """Return random events."""
    source = torch.Generator().manual_seed(0)
    return Events.trainable(*(torch.randint(1, high + 1, (n,), generator=source) for high in (n_users, n_items)))


def after_base(threshold: int = 0) -> State:
    """Return MF after a base block of 30 users and 20 items."""
    base, state = Span(0, random_events(600, 30, 20), 30, 20), State(MFSpec(d=4, negatives=16).build(0))
    return IncCTR(threshold=threshold, fit=QUICK).update(absorb(state, base), base)


def absorb(state: State, span: Span) -> State:
    return replace(state, histories=append_events(state.histories, span.events, span.n_users))


SPAN = Span(1, random_events(300, 35, 25), 35, 25)  # 5 new users and items


def gradient(model: MF, teacher: MF | None, weight: float) -> Tensor:
    """Return the gradient of the item vectors for one batch."""
    ids = torch.arange(1, 9)
    batch = Batch(ids, torch.zeros(8, 0, dtype=torch.int64), ids[:, None], torch.tensor([9, 10]))
    forward = model(batch)
    loss = forward.loss
    if teacher is not None:
        loss = loss + Distill(weight).distillation_term(teacher)(batch, forward)
    loss.backward()
    assert model.items.leaf is not None and model.items.leaf.grad is not None
    return model.items.leaf.grad


def test_while_both_models_agree_the_gradient_is_a_fixed_share_of_that_of_fine_tuning() -> None:
    # T21: at the teacher's weights, distillation has no gradient. So the gradient is 1 - 0.2 times fine-tuning's.
    model = after_base().model
    finetuned = gradient(copy.deepcopy(model), None, 0.2)
    assert finetuned.abs().max() > 1e-3
    torch.testing.assert_close(gradient(copy.deepcopy(model), copy.deepcopy(model), 0.2), 0.8 * finetuned)


def test_the_larger_the_weight_of_the_teacher_the_closer_the_model_stays_to_it() -> None:
    state = absorb(after_base(), SPAN)

    def moved(weight: float) -> float:
        after = IncCTR(Distill(weight), fit=replace(QUICK, epochs=10)).update(state, SPAN)
        return float((after.model.items.weights[:21] - state.model.items.weights).norm())

    # With new optimisers, the first step is the same for every weight (T21). Later steps differ.
    assert moved(0.9) < 0.9 * moved(0.5) < 0.9 * moved(0.0)


def test_without_the_teacher_incctr_equals_fine_tuning_bit_for_bit(bits: Callable[[State], bytes]) -> None:
    state = absorb(after_base(), SPAN)  # T21: lambda = 0
    finetuned = FineTune(fit=QUICK).update(replace(state, memory=None), SPAN)
    for strategy in (IncCTR(None, fit=QUICK), IncCTR(Distill(weight=0.0), fit=QUICK)):
        assert bits(replace(strategy.update(state, SPAN), memory=None)) == bits(finetuned)
    assert bits(replace(IncCTR(fit=QUICK).update(state, SPAN), memory=None)) != bits(finetuned)


def test_a_model_that_returns_no_logits_is_refused() -> None:
    ids = torch.tensor([1])
    batch = Batch(ids, torch.zeros(1, 0, dtype=torch.int64), ids[:, None], ids + 1)
    with pytest.raises(IncompatibleError, match="this model returns none"):
        Distill().distillation_term(after_base().model)(batch, Forward(torch.tensor(1.0)))


def test_with_the_full_softmax_the_distillation_covers_all_items() -> None:
    users_BD, rows_RD = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 0.0], [3.0, 1.0], [1.0, 4.0]])
    full = Forward(torch.tensor(1.0), users_BD[:, None], rows_RD=rows_RD)
    assert candidate_logits(full).tolist() == [[3.0, 1.0], [2.0, 8.0]]


# admission of new ids


def test_tied_rows_are_trained_as_one_row_and_end_equal() -> None:
    table = EmbeddingTable(2, 1.0, seed=0)
    table.grow(5)
    before = table.weights.clone()
    tie_rows(table, torch.tensor([2, 4, 5]))
    table.lookup(torch.tensor([1, 4, 5])).sum().backward()
    assert table.leaf is not None and table.leaf.tolist() == [before[1].tolist(), before[2].tolist()]
    # One Adam step has the length lr in each coordinate, whatever the gradient: 1 for row 1, 2 for the shared row.
    table.step(lr=0.1)
    untie_rows(table)
    torch.testing.assert_close(table.weights[[2, 4, 5]], (before[2] - 0.1).expand(3, 2))
    torch.testing.assert_close(table.weights[[1, 3]], torch.stack([before[1] - 0.1, before[3]]))
    assert table.steps_R.tolist() == [0, 1, 1, 0, 0, 0]  # an admitted row counts its own steps from 0


def test_new_ids_share_a_row_until_they_are_frequent() -> None:
    # Items 21, 22 and 23 are new. They occur once, twice and three times. Then the first two occur once more.
    strategy = IncCTR(threshold=3, fit=QUICK)
    first = Span(1, Events.trainable(torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([21, 22, 22, 23, 23, 23])), 30, 23)
    second = Span(2, Events.trainable(torch.tensor([1, 2]), torch.tensor([21, 22])), 30, 23)
    after_first = strategy.update(absorb(after_base(threshold=3), first), first)
    after_second = strategy.update(absorb(after_first, second), second)
    assert after_first.memory["items"][21:].tolist() == [1, 2, 3] and after_second.memory["items"][21:].tolist() == [
        2,
        3,
        3,
    ]
    items = after_first.model.items.weights
    assert torch.equal(items[21], items[22]) and not torch.equal(items[22], items[23])
    assert not torch.equal(
        after_second.model.items.weights[21], after_second.model.items.weights[22]
    )  # 22 has its own row
    assert torch.equal(items[21], items[22])  # and the old state has not changed


def test_ids_of_the_base_block_keep_their_rows_however_rare_they_are() -> None:
    after = IncCTR(threshold=10_000, fit=QUICK).update(absorb(after_base(threshold=10_000), SPAN), SPAN)
    users, items = after.model.users.weights, after.model.items.weights
    assert len(items[1:21].unique(dim=0)) == 20 and len(items[21:].unique(dim=0)) == 1
    assert len(users[1:31].unique(dim=0)) == 30 and len(users[31:].unique(dim=0)) == 1
