"""Squash, label-aware attention, losses and the largest inner product, by hand."""

import math

import pytest
import torch
from torch import Tensor

from freshrec.nn.layers import (
    MASKED,
    attend,
    bce_loss,
    max_inner_product,
    sampled_logits,
    sampled_softmax_loss,
    squash,
)

near = pytest.approx


@pytest.mark.parametrize(("before", "after"), [(0.5, 0.2), (1.0, 0.5), (3.0, 0.9)])  # r -> r^2 / (1 + r^2)
def test_squash_keeps_the_direction_and_shortens_to_below_one(before: float, after: float) -> None:
    vector = torch.tensor([0.6, 0.0, -0.8])  # of norm 1
    torch.testing.assert_close(squash(before * vector), after * vector)


def test_squash_of_zero_is_zero_with_a_finite_gradient() -> None:
    zero = torch.zeros(2, 3, requires_grad=True)
    squash(zero).sum().backward()
    assert (squash(zero) == 0).all()
    assert zero.grad is not None and zero.grad.isfinite().all()


def shares(logits: tuple[float, float], power: float, how: str = "soft") -> list[float]:
    """beta of two interests with these logits for the target (1, 0, 0): coordinates 1 and 2 of the mix."""
    vectors_BKD = torch.tensor([[[logits[0], 1.0, 0.0], [logits[1], 0.0, 1.0]]])
    mix_BD: Tensor = attend(vectors_BKD, torch.tensor([[1.0, 0.0, 0.0]]), None, how, power)
    return mix_BD[0, 1:].tolist()


def test_label_attention_weights_the_interests_by_the_softmax_of_their_logits_for_the_target() -> None:
    """[IMSR eq. 5]"""
    # e^2 / (e^2 + e^1) = 1 / (1 + e^-1) = 0.731059
    assert shares((2, 1), power=1) == near([0.731059, 0.268941], abs=1e-6)


def test_a_larger_power_moves_label_attention_from_the_mean_to_the_closest_interest() -> None:
    assert shares((2, 1), power=0) == near([0.5, 0.5])
    assert shares((2, 1), power=2) == near([0.952574, 0.047426], abs=1e-6)  # 1 / (1 + e^-(4 - 1))
    assert shares((2, 1), power=50) == near([1, 0])
    # 1 / (1 + e^-(1 + 4)): without the sign, a power of 2 would prefer the wrong interest: 1 / (1 + e^-(1 - 4)) = 0.05
    assert shares((1, -2), power=2) == near([0.993307, 0.006693], abs=1e-6)


def test_hard_label_attention_is_the_closest_interest_only() -> None:
    assert shares((1, 2), power=1, how="hard") == [0, 1]


@pytest.mark.parametrize("how", ["soft", "hard"])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_an_interest_that_a_user_does_not_have_gets_no_weight(how: str, power: float) -> None:
    vectors_BKD, target_BD = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0)), torch.ones(5, 3)
    alive_BK = torch.tensor([True, True, False, False]).expand(5, -1)
    masked_BD = attend(vectors_BKD, target_BD, alive_BK, how, power)
    torch.testing.assert_close(masked_BD, attend(vectors_BKD[:, :2], target_BD, None, how, power))


@pytest.mark.parametrize(("logits", "score"), [((1, 0), 0.731059), ((2, 2), 2.0), ((3, -1), 2.928055)])
def test_a_score_with_label_attention_is_between_the_mean_and_the_best_interest(
    logits: tuple[float, float], score: float
) -> None:
    # (1, 0): 0.731059 x 1 + 0.268941 x 0; (3, -1): p = 1 / (1 + e^-4) = 0.982014, 3 p - (1 - p) = 2.928055
    p, q = shares(logits, power=1)
    found = p * logits[0] + q * logits[1]
    assert found == near(score, abs=1e-6)
    assert sum(logits) / 2 <= found <= max(logits)


def test_the_sampled_softmax_loss_by_hand() -> None:
    """[IMSR eq. 6]"""
    # v = (1, 0): the target's logit is 2, the negatives' 0 and 1: ln(1 + e^-2 + e^-1) = 0.407606
    user_BD, target_BD = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    negatives_ND = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    logits_BN = sampled_logits(user_BD, target_BD, negatives_ND, torch.tensor([7]), torch.tensor([8, 9]))
    assert logits_BN.tolist() == [[2.0, 0.0, 1.0]]
    assert sampled_softmax_loss(logits_BN).item() == near(0.407606, abs=1e-6)


def test_a_negative_that_is_the_target_is_ignored() -> None:
    user_BD, target_BD = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    negatives_ND = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    logits_BN = sampled_logits(user_BD, target_BD, negatives_ND, torch.tensor([7]), torch.tensor([8, 7]))
    assert sampled_softmax_loss(logits_BN).item() == near(
        math.log(1 + math.exp(-2))
    )  # only item 8, of logit 0, is left


def test_binary_cross_entropy_by_hand() -> None:
    # ln(1 + e^-1) + (ln(1 + e^0) + ln(1 + e^2)) / 2 = 0.313262 + (0.693147 + 2.126928) / 2; MASKED logits are left out
    assert bce_loss(torch.tensor([[1.0, 0.0, 2.0]])).item() == near(1.723299, abs=1e-6)
    assert bce_loss(torch.tensor([[1.0, 0.0, MASKED, 2.0]])).item() == near(1.723299, abs=1e-6)
    assert bce_loss(torch.tensor([[1.0, MASKED]])).item() == near(0.313262, abs=1e-6)
    assert bce_loss(torch.tensor([[1.0, -1.0]])).item() == near(0.626523, abs=1e-6)  # as in SASRec, with one negative


def test_the_largest_inner_product_is_that_of_the_closest_interest() -> None:
    vectors_BKD = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[-1.0, 0.0], [-3.0, 0.0]]])
    items_ND = torch.tensor([[1.0, 1.0], [3.0, 1.0], [1.0, 0.0]])
    # user 1: max(1, 2), max(3, 2), max(1, 0); user 2: max(-1, -3), max(-3, -9), max(-1, -3)
    expected = [[2.0, 3.0, 1.0], [-1.0, -3.0, -1.0]]
    assert max_inner_product(vectors_BKD, items_ND).tolist() == expected
    assert max_inner_product(vectors_BKD, items_ND.expand(2, -1, -1)).tolist() == expected
