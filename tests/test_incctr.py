"""IncCTR: the mixture of labels and the last model's opinion by hand, and new ids that share a row until met often."""

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


def test_the_loss_is_that_of_a_label_mixed_with_the_teachers_opinion() -> None:
    # The teacher's odds are 3 : 1, so s = (0.75, 0.25); y = (1, 0), weight 0.2: the target is (0.95, 0.05). With the
    # logits (1, 0): ln p = (-0.313262, -1.313262), so 0.95 x 0.313262 + 0.05 x 1.313262 = 0.363262.
    logits_BN, teacher_BN = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 1.0]]).log()
    mixed = 0.8 * sampled_softmax_loss(logits_BN) + 0.2 * softmax_distillation(logits_BN, teacher_BN)
    assert mixed.item() == near(0.363262, abs=1e-6)


def test_the_temperature_softens_both_sides() -> None:
    # z / 2 = (1, 0); z_T / 2 has the odds e^0.549306 = sqrt(3) : 1, s_1 = 0.633975; 0.313262 + 0.366025 = 0.679287
    logits_BN, teacher_BN = torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 1.0]]).log()
    assert softmax_distillation(logits_BN, teacher_BN, tau=2.0).item() == near(0.679287, abs=1e-6)


def test_of_clicks_the_loss_is_that_of_a_label_mixed_with_the_teachers_opinion() -> None:
    # T20: logits (0.3, -1.2), labels (1, 0), the teacher's probabilities (0.6, 0.4), weight 0.2: the loss is that of
    # the labels (0.92, 0.08), 0.468819; of the plain labels it is 0.408819.
    logits_BN, teacher_BN = torch.tensor([[0.3], [-1.2]]), torch.tensor([[0.6], [0.4]]).logit()
    plain = F.binary_cross_entropy_with_logits(logits_BN, torch.tensor([[1.0], [0.0]]))
    assert plain.item() == near(0.408819, abs=1e-6)
    assert (0.8 * plain + 0.2 * sigmoid_distillation(logits_BN, teacher_BN)).item() == near(0.468819, abs=1e-6)


def test_nothing_but_the_teacher_leaves_a_model_that_agrees_with_it_where_it_is() -> None:
    # T21: lambda = 1, the gradient is sigma(z) - sigma(z_T), or softmax(z) - softmax(z_T), which is 0
    for opinion in (sigmoid_distillation, softmax_distillation):
        for tau in (1.0, 3.0):
            logits_BN = torch.tensor([[0.3, -1.2, 2.0]], dtype=torch.float64, requires_grad=True)
            opinion(logits_BN, logits_BN.detach().clone(), tau).backward()
            assert logits_BN.grad is not None and logits_BN.grad.abs().max() < 1e-15


def some(n: int, n_users: int, n_items: int) -> Events:
    """Events drawn at random."""
    source = torch.Generator().manual_seed(0)
    return Events.trainable(*(torch.randint(1, high + 1, (n,), generator=source) for high in (n_users, n_items)))


def after_base(threshold: int = 0) -> State:
    """MF after a base block of 30 users and 20 items."""
    base, state = Span(0, some(600, 30, 20), 30, 20), State(MFSpec(d=4, negatives=16).build(0))
    return IncCTR(threshold=threshold, fit=QUICK).update(seen(state, base), base)


def seen(state: State, span: Span) -> State:
    return replace(state, histories=append_events(state.histories, span.events, span.n_users))


TODAY = Span(1, some(300, 35, 25), 35, 25)  # 5 new users and items


def gradient(model: MF, teacher: MF | None, weight: float) -> Tensor:
    """Of the item vectors, for one batch."""
    ids = torch.arange(1, 9)
    batch = Batch(ids, torch.zeros(8, 0, dtype=torch.int64), ids[:, None], torch.tensor([9, 10]))
    forward = model(batch)
    loss = forward.loss
    if teacher is not None:
        loss = loss + Distill(weight).distillation_term(teacher)(batch, forward)
    loss.backward()
    assert model.items.leaf is not None and model.items.leaf.grad is not None
    return model.items.leaf.grad


def test_while_both_models_agree_the_gradient_is_that_of_fine_tuning_but_smaller() -> None:
    # T21: at the teacher's own weights its opinion pulls nowhere, so what is left is 1 - 0.2 of fine-tuning's.
    model = after_base().model
    plain = gradient(copy.deepcopy(model), None, 0.2)
    assert plain.abs().max() > 1e-3
    torch.testing.assert_close(gradient(copy.deepcopy(model), copy.deepcopy(model), 0.2), 0.8 * plain)


def test_the_more_the_teacher_counts_the_closer_the_model_stays_to_it() -> None:
    state = seen(after_base(), TODAY)

    def moved(weight: float) -> float:
        after = IncCTR(Distill(weight), fit=replace(QUICK, epochs=10)).update(state, TODAY)
        return float((after.model.items.weights[:21] - state.model.items.weights).norm())

    # with fresh optimisers the first step is the same whatever the weight (T21); later ones are not
    assert moved(0.9) < 0.9 * moved(0.5) < 0.9 * moved(0.0)


def test_without_the_teacher_it_is_fine_tuning_to_the_bit(bits: Callable[[State], bytes]) -> None:
    state = seen(after_base(), TODAY)  # T21: lambda = 0
    plain = FineTune(fit=QUICK).update(replace(state, memory=None), TODAY)
    for none in (IncCTR(None, fit=QUICK), IncCTR(Distill(weight=0.0), fit=QUICK)):
        assert bits(replace(none.update(state, TODAY), memory=None)) == bits(plain)
    assert bits(replace(IncCTR(fit=QUICK).update(state, TODAY), memory=None)) != bits(plain)


def test_a_model_that_shows_no_logits_is_refused_with_a_sentence() -> None:
    ids = torch.tensor([1])
    batch = Batch(ids, torch.zeros(1, 0, dtype=torch.int64), ids[:, None], ids + 1)
    with pytest.raises(IncompatibleError, match="this model returns none"):
        Distill().distillation_term(after_base().model)(batch, Forward(torch.tensor(1.0)))


def test_where_the_softmax_is_over_all_items_so_is_the_opinion() -> None:
    users_BD, rows_RD = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 0.0], [3.0, 1.0], [1.0, 4.0]])
    full = Forward(torch.tensor(1.0), users_BD[:, None], rows_RD=rows_RD)
    assert candidate_logits(full).tolist() == [[3.0, 1.0], [2.0, 8.0]]


# admission


def test_rows_that_share_learn_as_one_and_end_alike() -> None:
    table = EmbeddingTable(2, 1.0, seed=0)
    table.grow(5)
    before = table.weights.clone()
    tie_rows(table, torch.tensor([2, 4, 5]))
    table.lookup(torch.tensor([1, 4, 5])).sum().backward()
    assert table.leaf is not None and table.leaf.tolist() == [before[1].tolist(), before[2].tolist()]
    # one Adam step is lr long in each coordinate, however large the gradient: 1 for row 1, 2 for the shared row
    table.step(lr=0.1)
    untie_rows(table)
    torch.testing.assert_close(table.weights[[2, 4, 5]], (before[2] - 0.1).expand(3, 2))
    torch.testing.assert_close(table.weights[[1, 3]], torch.stack([before[1] - 0.1, before[3]]))
    assert table.steps_R.tolist() == [0, 1, 1, 0, 0, 0]  # an admitted row starts its own steps


def test_new_ids_share_a_row_until_they_have_been_met_often_enough() -> None:
    # Items 21, 22 and 23 are new. They come once, twice and three times; then the first two once more. Three is enough.
    strategy = IncCTR(threshold=3, fit=QUICK)
    first = Span(1, Events.trainable(torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([21, 22, 22, 23, 23, 23])), 30, 23)
    second = Span(2, Events.trainable(torch.tensor([1, 2]), torch.tensor([21, 22])), 30, 23)
    then = strategy.update(seen(after_base(threshold=3), first), first)
    now = strategy.update(seen(then, second), second)
    assert then.memory["items"][21:].tolist() == [1, 2, 3] and now.memory["items"][21:].tolist() == [2, 3, 3]
    items = then.model.items.weights
    assert torch.equal(items[21], items[22]) and not torch.equal(items[22], items[23])
    assert not torch.equal(now.model.items.weights[21], now.model.items.weights[22])  # 22 has a row of its own
    assert torch.equal(items[21], items[22])  # and the old state is as it was


def test_ids_of_the_base_block_keep_their_rows_however_rare_they_are() -> None:
    after = IncCTR(threshold=10_000, fit=QUICK).update(seen(after_base(threshold=10_000), TODAY), TODAY)
    users, items = after.model.users.weights, after.model.items.weights
    assert len(items[1:21].unique(dim=0)) == 20 and len(items[21:].unique(dim=0)) == 1
    assert len(users[1:31].unique(dim=0)) == 30 and len(users[31:].unique(dim=0)) == 1
