"""EWC: the penalty by hand, the Fisher against gradients taken sample by sample, and old ways kept."""

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
    """A small model of 4 users and 9 items, in two categories or none."""
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


def test_leaving_the_anchor_costs_by_the_fisher() -> None:
    """[EWC eq. 3]"""
    # 10 / 2 x (2 x 0.1^2 + 0.5 x 0.2^2) = 0.2
    anchor, fisher = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.5])
    assert penalty(anchor + torch.tensor([0.1, -0.2]), anchor, fisher, 10.0).item() == near(0.2, abs=1e-6)
    assert penalty(anchor, anchor, fisher, 10.0).item() == 0


# the Fisher


def one_by_one(model: EncodingModel, users: Interests | None) -> dict[str, Tensor]:
    """The same, by automatic differentiation of one sample after the other, through a whole table of items."""
    total: dict[str, Tensor] = {}
    for n in range(len(SAMPLES)):
        carried = stored_interests_of(model, users, 1)
        own_ID = items_ID = model.items.weights.clone().requires_grad_()
        common = {} if model.items.common is None else {"items.common": model.items.common.weights.clone()}
        for common_CD in common.values():
            items_ID = own_ID + common_CD.requires_grad_()[model.items.kinds_R] * (model.items.kinds_R > 0)[:, None]
        batch = Batch(SAMPLES.users_N[n : n + 1], SAMPLES.histories_NT[n : n + 1].long())
        batch = batch if carried is None else carried.attach(batch)
        vectors_BKD = model.encode(F.embedding(batch.history_BT, items_ID), batch)
        loss = F.cross_entropy(max_inner_product(vectors_BKD, items_ID[1:]), SAMPLES.items_N[n : n + 1] - 1)
        weights = {"items": own_ID} | common | dict(model.named_parameters())
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True)))
        for name, gradient in gradients.items():
            assert gradient is not None
            total[name] = total.get(name, 0) + gradient.square() / len(SAMPLES)
    return total


@pytest.mark.parametrize("categories", [0, 2])
@pytest.mark.parametrize("name", ["sasrec", "mind", "comirec-dr", "comirec-sa"])
def test_the_fisher_is_the_mean_of_squared_gradients_of_single_samples(name: str, categories: int) -> None:
    # User 2 has three interests of its own, the others start from four slots; user 3's history repeats its target.
    model, none = model_of(name, categories), torch.zeros(3, dtype=torch.int16)
    stored_SD = torch.randn(3, 4, generator=stream(0, "test"))
    users = Interests(stored_SD, torch.tensor([0, 0, 0, 3, 3, 3]), none, none)
    found, expected = empirical_fisher(model, SAMPLES, stored_interests_of(model, users, 1)), one_by_one(model, users)
    assert found.keys() == expected.keys()
    for weights in found:
        torch.testing.assert_close(found[weights], expected[weights], rtol=1e-3, atol=1e-7)


def test_the_fisher_of_a_factorisation_by_hand() -> None:
    # d = 1, user 1 at 2, items at 0 and 1, target 1: p = (0.119203, 0.880797), p - y = (-0.880797, 0.880797).
    # Items: ((p - y) u)^2 = 0.775803 x 4 each; user: (sum_i (p_i - y_i) e_i)^2 = 0.775803. Half of it for two samples,
    # of which that of user 2, at 0, has p - y = (-1/2, 1/2): items 0, user 1/4.
    model = replace(MODELS["mf"], d=1).build(0)  # type: ignore[type-var]
    model.grow(3, 2)
    model.users.weights[1:], model.items.weights[1:] = torch.tensor([[2.0], [0], [5]]), torch.tensor([[0.0], [1]])
    samples = TrainingSamples(torch.tensor([1, 2]), torch.zeros(2, 0, dtype=torch.int32), torch.tensor([1, 1]))
    fisher = empirical_fisher(model, samples, None)
    assert fisher["items"][:, 0].tolist() == near([0, 1.551606, 1.551606], abs=1e-5)
    assert fisher["users"][:, 0].tolist() == near([0, 0.387902, 0.125, 0], abs=1e-5)


def test_items_outside_all_samples_have_a_fisher_too_because_they_are_in_the_softmax() -> None:
    fisher = empirical_fisher(model_of("sasrec"), SAMPLES, None)["items"]
    assert (fisher[8:] > 0).all() and (fisher >= 0).all() and (fisher[0] == 0).all()


# the term


def test_the_rows_that_a_step_moves_are_held_and_new_ones_are_free() -> None:
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


# the whole


@cache
def two_periods() -> tuple[State, Span]:
    """The circles after the base block, which is trained once for all tests."""
    return circles.two_periods(EWC(samples=200, fit=FitConfig(base_epochs=12)))


def known(after: State, step: int) -> float:
    """ndcg@20 of the next item where one goes forwards (1), or backwards (-1)."""
    histories = append_events(Histories.empty(), circles.circles(range(1, 61), step), 60)
    return mean_ndcg(after.model, targets_at(histories, histories.offsets_U[2:] - 1), None)


def moved(before: State, after: State) -> float:
    """How far the item vectors are from where they were."""
    return float((after.model.items.weights - before.model.items.weights).norm())


def test_old_ways_are_still_known_where_fine_tuning_has_forgotten_them() -> None:
    # Measured at weights 0, 100, 10,000: old 0.47, 0.48, 1.00; new 0.82, 0.60, 0.31; items moved by 1.5, 0.7, 0.05.
    before, span = two_periods()
    afters = [
        EWC(weight=weight, samples=200, fit=FitConfig(epochs=15)).update(before, span) for weight in (0, 100, 10_000)
    ]
    assert moved(before, afters[0]) > 1.5 * moved(before, afters[1]) > 3 * moved(before, afters[2])
    assert known(afters[2], 1) > known(afters[0], 1) + 0.3 and known(afters[0], -1) > known(afters[2], -1) + 0.3


def test_without_weight_ewc_is_fine_tuning_to_the_bit(bits: Callable[[State], bytes]) -> None:
    before, span = two_periods()
    plain = replace(FineTune().update(before, span), memory=None)
    assert bits(replace(EWC(weight=0.0).update(before, span), memory=None)) == bits(plain)
    assert bits(replace(EWC().update(before, span), memory=None)) != bits(plain)


def test_the_anchor_is_the_last_model_alone_and_stays_where_nothing_is_learnt() -> None:
    before, span = two_periods()
    after = EWC(samples=200).update(before, span)
    assert all((after.memory[name] != before.memory[name]).any() for name in after.memory)
    nothing = Span(1, span.events[:0], 100, 20)
    same = EWC(samples=200).update(
        replace(before, histories=append_events(Histories.empty(), nothing.events, 100)), nothing
    )
    assert all(torch.equal(same.memory[name], before.memory[name]) for name in before.memory)
    assert set(after.memory) == {*embedding_tables(after.model), *dict(after.model.named_parameters())}
