"""EWC: the penalty by hand, the Fisher against gradients of single samples, and less forgetting than fine-tuning."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import circles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.data.batches import targets_at
from freshrec.data.histories import append_events
from freshrec.data.stored_interests import stored_interests_of
from freshrec.learn.fit import FitConfig
from freshrec.learn.reservoir import TrainingSamples
from freshrec.learn.validation import mean_ndcg
from freshrec.learn.weights import grow_model
from freshrec.models import MODELS
from freshrec.nn.embedding_table import embedding_tables
from freshrec.nn.layers import max_inner_product
from freshrec.random_streams import stream
from freshrec.strategies.baselines import FineTune
from freshrec.strategies.ewc import EWC, empirical_fisher, penalty, penalty_term
from freshrec.types import Batch, EncodingModel, Forward, Histories, Interests, Span, State

near = pytest.approx


def model_of(name: str, categories: int = 0) -> EncodingModel:
    """Return a small model of 4 users and 9 items, which are in two categories or none."""
    model = replace(MODELS[name], d=4, std=0.7, length=3, categories=categories).build(0)  # type: ignore[type-var]
    grow_model(model, 4, 9, torch.tensor([0, 1, 2, 2, 1, 2, 0, 1, 1, 2]))  # type: ignore[arg-type]
    model.eval()
    return model  # type: ignore[no-any-return]


SAMPLES = TrainingSamples(
    torch.tensor([1, 2, 3, 2]),
    torch.tensor([[0, 1, 2], [0, 0, 3], [4, 5, 4], [2, 1, 6]], dtype=torch.int32),
    torch.tensor([3, 3, 4, 7]),
)


# the equation


def test_the_penalty_of_leaving_the_anchor_is_weighted_by_the_fisher() -> None:
    """[EWC eq. 3]"""
    # 10 / 2 x (2 x 0.1^2 + 0.5 x 0.2^2) = 0.2
    anchor, fisher = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.5])
    assert penalty(anchor + torch.tensor([0.1, -0.2]), anchor, fisher, 10.0).item() == near(0.2, abs=1e-6)
    assert penalty(anchor, anchor, fisher, 10.0).item() == 0


# the Fisher


def expected_fisher(model: EncodingModel, users: Interests | None) -> dict[str, Tensor]:
    """Return the Fisher by automatic differentiation of one sample at a time, through the whole table of items."""
    fisher: dict[str, Tensor] = {}
    for n in range(len(SAMPLES)):
        stored = stored_interests_of(model, users, 1)
        own_ID = items_ID = model.items.weights.clone().requires_grad_()
        common = {} if model.items.common is None else {"items.common": model.items.common.weights.clone()}
        for common_CD in common.values():
            items_ID = own_ID + common_CD.requires_grad_()[model.items.kinds_R] * (model.items.kinds_R > 0)[:, None]
        batch = Batch(SAMPLES.users_N[n : n + 1], SAMPLES.histories_NT[n : n + 1].long())
        batch = batch if stored is None else stored.attach(batch)
        vectors_BKD = model.encode(F.embedding(batch.history_BT, items_ID), batch)
        loss = F.cross_entropy(max_inner_product(vectors_BKD, items_ID[1:]), SAMPLES.items_N[n : n + 1] - 1)
        weights = {"items": own_ID} | common | dict(model.named_parameters())
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True)))
        for name, gradient in gradients.items():
            assert gradient is not None
            fisher[name] = fisher.get(name, 0) + gradient.square() / len(SAMPLES)
    return fisher


@pytest.mark.parametrize("categories", [0, 2])
@pytest.mark.parametrize("name", ["sasrec", "mind", "comirec-dr", "comirec-sa"])
def test_the_fisher_is_the_mean_of_squared_gradients_of_single_samples(name: str, categories: int) -> None:
    # User 2 has three stored interests. The others start from four slots. User 3's history repeats its target.
    model, none = model_of(name, categories), torch.zeros(3, dtype=torch.int32)
    stored_SD = torch.randn(3, 4, generator=stream(0, "test"))
    users = Interests(stored_SD, torch.tensor([0, 0, 0, 3, 3, 3]), none, none)
    found, expected = (
        empirical_fisher(model, SAMPLES, stored_interests_of(model, users, 1)),
        expected_fisher(model, users),
    )
    assert found.keys() == expected.keys()
    for weights in found:
        torch.testing.assert_close(found[weights], expected[weights], rtol=1e-3, atol=1e-7)


def test_the_fisher_of_a_matrix_factorisation_by_hand() -> None:
    # d = 1, user 1 at 2, items at 0 and 1, target 1: p = (0.119203, 0.880797), p - y = (-0.880797, 0.880797).
    # Items: ((p - y) u)^2 = 0.775803 x 4 each. User: (sum_i (p_i - y_i) e_i)^2 = 0.775803.
    # The sample of user 2, who is at 0, has p - y = (-1/2, 1/2): items 0, user 1/4. The mean halves all values.
    model = replace(MODELS["mf"], d=1).build(0)  # type: ignore[type-var]
    model.grow(3, 2)
    model.users.weights[1:], model.items.weights[1:] = torch.tensor([[2.0], [0], [5]]), torch.tensor([[0.0], [1]])
    samples = TrainingSamples(torch.tensor([1, 2]), torch.zeros(2, 0, dtype=torch.int32), torch.tensor([1, 1]))
    fisher = empirical_fisher(model, samples, None)
    assert fisher["items"][:, 0].tolist() == near([0, 1.551606, 1.551606], abs=1e-5)
    assert fisher["users"][:, 0].tolist() == near([0, 0.387902, 0.125, 0], abs=1e-5)


def test_items_in_no_sample_have_a_fisher_too_because_they_are_in_the_softmax() -> None:
    fisher = empirical_fisher(model_of("sasrec"), SAMPLES, None)["items"]
    assert (fisher[8:] > 0).all() and (fisher >= 0).all() and (fisher[0] == 0).all()


# the term


def test_a_step_penalises_the_rows_that_it_moves_but_not_new_rows() -> None:
    anchor, model = model_of("sasrec"), model_of("sasrec")
    model.grow(4, 12)
    fisher = empirical_fisher(anchor, SAMPLES, None)
    model.items.weights[5:] += 0.5
    model.last.bias.data += 0.1
    model.items.lookup(torch.tensor([5, 5, 1, 11]))
    loss = penalty_term(model, anchor, fisher, 3.0)(
        Batch(SAMPLES.users_N, SAMPLES.histories_NT), Forward(torch.zeros(()))
    )
    dense = 1.5 * 0.01 * fisher["last.bias"].sum()
    assert loss.item() == near(float(dense + 1.5 * 0.25 * fisher["items"][5].sum()), rel=1e-4)
    loss.backward()
    gradient = model.items.step_rows()[1].grad
    assert gradient is not None and [bool(row.any()) for row in gradient] == [True, False, False]  # 5, 1, 11


# a whole update


@cache
def two_periods() -> tuple[State, Span]:
    """Return the world of circles after its base block. It is trained once for all tests."""
    return circles.two_periods(EWC(samples=200, fit=FitConfig(base_epochs=12)))


def quality(after: State, step: int) -> float:
    """Return ndcg@20 of the next item for users who go forwards (1) or backwards (-1)."""
    histories = append_events(Histories.empty(), circles.circles(range(1, 61), step), 60)
    return mean_ndcg(after.model, targets_at(histories, histories.offsets_U[2:] - 1), None)


def item_movement(before: State, after: State) -> float:
    """Return how far the update has item_movement the item vectors."""
    return float((after.model.items.weights - before.model.items.weights).norm())


def test_ewc_remembers_the_old_direction_that_fine_tuning_forgets() -> None:
    # Measured at weights 0, 100 and 10,000: ndcg@20 forwards (old) 0.47, 0.48, 1.00 and backwards (new) 0.82, 0.60,
    # 0.31. The items item_movement by 1.5, 0.7 and 0.05.
    before, span = two_periods()
    after = [
        EWC(weight=weight, samples=200, fit=FitConfig(epochs=15)).update(before, span) for weight in (0, 100, 10_000)
    ]
    assert item_movement(before, after[0]) > 1.5 * item_movement(before, after[1]) > 3 * item_movement(before, after[2])
    assert quality(after[2], 1) > quality(after[0], 1) + 0.3 and quality(after[0], -1) > quality(after[2], -1) + 0.3


def test_with_weight_0_ewc_equals_fine_tuning_bit_for_bit(bits: Callable[[State], bytes]) -> None:
    before, span = two_periods()
    plain = replace(FineTune().update(before, span), memory=None)
    assert bits(replace(EWC(weight=0.0).update(before, span), memory=None)) == bits(plain)
    assert bits(replace(EWC().update(before, span), memory=None)) != bits(plain)


def test_only_the_newest_model_is_the_anchor_and_an_update_without_events_keeps_it() -> None:
    before, span = two_periods()
    after = EWC(samples=200).update(before, span)
    assert all((after.memory[name] != before.memory[name]).any() for name in after.memory)
    empty_span = Span(1, span.events[:0], 100, 20)
    unchanged = EWC(samples=200).update(
        replace(before, histories=append_events(Histories.empty(), empty_span.events, 100)), empty_span
    )
    assert all(torch.equal(unchanged.memory[name], before.memory[name]) for name in before.memory)
    assert set(after.memory) == {*embedding_tables(after.model), *dict(after.model.named_parameters())}
