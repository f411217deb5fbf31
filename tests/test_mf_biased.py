"""Biased matrix factorisation: score, loss and initial values by hand."""

import pytest
import torch

from freshrec.models.mf_biased import BiasedMF, BiasedMFSpec
from freshrec.types import Batch, ClickModel, TrainedModel

near = pytest.approx


def built() -> BiasedMF:
    model = BiasedMFSpec(d=2).build(0)
    model.grow(2, 3)
    model.users.weights[1] = torch.tensor([1.0, 2.0, 0.5])
    model.items.weights[2] = torch.tensor([3.0, -1.0, 0.25])
    return model


def batch(users: list[int], targets: list[int], labels: list[float] | None = None) -> Batch:
    no_history = torch.zeros(len(users), 0, dtype=torch.int64)
    labels_B = None if labels is None else torch.tensor(labels)
    return Batch(
        torch.tensor(users), no_history, torch.tensor(targets)[:, None], torch.tensor([2, 3]), labels_B=labels_B
    )


def test_a_score_is_the_inner_product_plus_both_biases() -> None:
    model = built()
    assert isinstance(model, ClickModel) and isinstance(model, TrainedModel)
    # 1 x 3 + 2 x -1 + 0.5 + 0.25
    assert model.score(batch([1], [2]), torch.tensor([2])).item() == near(1.75)
    assert model.click_probabilities(batch([1], [2]), torch.tensor([[2]])).item() == near(0.851953, abs=1e-6)
    assert torch.equal(
        model.score(batch([1], [2]), torch.tensor([[2, 1]])), model.score(batch([1], [2]), torch.tensor([2, 1]))
    )


def test_the_loss_is_the_cross_entropy_of_the_labels() -> None:
    forward = built()(batch([1, 1], [2, 2], [1.0, 0.0]))
    assert forward.loss.item() == near((0.160225 + 1.910225) / 2, abs=1e-5)  # ln(1 + e^-1.75), and that + 1.75


def test_without_labels_each_target_has_one_random_negative_that_differs_from_it() -> None:
    logits = built()(batch([1, 1], [1, 3])).logits_BN  # negatives 2 and 3; 3 is the target, so 1 replaces it
    assert logits is not None and logits.shape == (2, 2)
    assert logits[0, 1].item() == near(1.75) and logits[1, 1].item() == near(logits[0, 0].item())


def test_an_unknown_user_or_item_adds_nothing_and_new_rows_have_no_bias() -> None:
    model = built()
    assert model.score(batch([7], [2]), torch.tensor([2])).item() == near(0.25)
    assert model.score(batch([1], [2]), torch.tensor([9])).item() == near(0.5)
    model.grow(5, 6)
    assert (model.users.weights[2:, -1] == 0).all() and (model.items.weights[4:, -1] == 0).all()
    assert model.users.weights[1, -1] == 0.5 and (model.users.weights[3:, :2] != 0).all()
