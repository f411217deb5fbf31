"""Embedding&MLP: size, forward pass and loss by hand."""

import pytest
import torch

from freshrec.errors import OptionError
from freshrec.models.embedding_mlp import EmbeddingMLP, EmbeddingMLPSpec
from freshrec.types import Batch, ClickModel, TrainedModel

near = pytest.approx
KINDS = torch.tensor([0, 1, 2, 1], dtype=torch.int32)  # of the padding and of items 1, 2, 3


def built(categories: int = 0, d: int = 2, hidden: int = 4) -> EmbeddingMLP:
    model = EmbeddingMLPSpec(d=d, hidden=hidden, categories=categories).build(0)
    model.grow(2, 3)
    return model


def batch(history: list[list[int]], users: list[int], targets: list[int], labels: list[float] | None = None) -> Batch:
    return Batch(
        torch.tensor(users),
        torch.tensor(history),
        torch.tensor(targets)[:, None],
        torch.tensor([2, 3]),
        labels_B=None if labels is None else torch.tensor(labels),
        categories_I=KINDS,
    )


def test_the_network_has_the_size_of_the_papers_network() -> None:
    # User 8, mean history 16, item 16: 40 -> 20 -> 10 -> 1 has 800 + 20 + 200 + 10 + 10 + 1 weights.
    # Without categories, 24 -> 12 -> 6 -> 1 has 288 + 12 + 72 + 6 + 6 + 1 weights.
    for categories, hidden, n in ((5, 20, 1041), (0, 12, 385)):
        model = EmbeddingMLPSpec(hidden=hidden, categories=categories).build(0)
        assert sum(weight.numel() for weight in model.parameters()) == n
        assert isinstance(model, ClickModel) and isinstance(model, TrainedModel)


def test_a_score_is_the_network_over_user_mean_history_and_item() -> None:
    model = built(categories=2)
    items, kinds = model.items.weights, model.categories.weights  # type: ignore[union-attr]
    mean = (torch.cat([items[1], kinds[1]]) + torch.cat([items[3], kinds[1]])) / 2
    x = torch.cat([model.users.weights[2], mean, items[2], kinds[2]])
    expected = model.last(torch.relu(model.second(torch.relu(model.first(x)))))
    query = batch([[0, 1, 3]], [2], [2])
    assert model.score(query, torch.tensor([2])).item() == near(expected.item(), abs=1e-6)
    # the score is the same for items per row, and in training
    assert torch.allclose(model.score(query, torch.tensor([[2, 1]])), model.score(query, torch.tensor([2, 1])))
    trained = model(batch([[0, 1, 3]], [2], [2], [1.0])).logits_BN
    assert trained is not None and trained.item() == near(expected.item(), abs=1e-6)
    assert model.click_probabilities(query, torch.tensor([2])).item() == near(torch.sigmoid(expected).item(), abs=1e-6)


def test_an_empty_history_has_mean_zero_and_padding_is_ignored() -> None:
    model = built()
    x = torch.cat([model.users.weights[1], torch.zeros(2), model.items.weights[3]])
    expected = model.last(torch.relu(model.second(torch.relu(model.first(x))))).item()
    histories: list[list[list[int]]] = [[[0, 0]], [[]]]
    for history in histories:
        ids = torch.tensor(history, dtype=torch.int64)
        assert model.score(Batch(torch.tensor([1]), ids), torch.tensor([3])).item() == near(expected, abs=1e-6)


def test_the_loss_is_the_cross_entropy_of_the_labels() -> None:
    # A network whose output is always 0 has the loss ln 2, for any labels.
    model = built()
    torch.nn.init.zeros_(model.last.weight)
    assert model(batch([[1], [2]], [1, 2], [2, 3], [1.0, 0.0])).loss.item() == near(0.693147, abs=1e-6)
    torch.nn.init.constant_(model.last.bias, 1.0)  # output 1: softplus(-1) = 0.313262 if taken, else 1.313262
    assert model(batch([[1], [2]], [1, 2], [2, 3], [1.0, 1.0])).loss.item() == near(0.313262, abs=1e-6)
    assert model(batch([[1], [2]], [1, 2], [2, 3], [1.0, 0.0])).loss.item() == near(0.813262, abs=1e-6)


def test_without_labels_each_target_has_one_random_negative_that_differs_from_it() -> None:
    # The negatives are items 2 and 3, one for each row. The second row's target is 3: its negative is the next item, 1.
    model = built()
    forward = model(batch([[1], [2]], [1, 2], [1, 3]))
    query = batch([[1], [2]], [1, 2], [1, 3])
    expected = model.score(query, torch.tensor([[1, 2], [3, 1]]))
    assert forward.logits_BN is not None and torch.allclose(forward.logits_BN, expected, atol=1e-6)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(expected, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert forward.loss.item() == near(loss.item(), abs=1e-6)


def test_too_many_categories_or_none_in_the_log_are_errors_that_name_the_option() -> None:
    with pytest.raises(OptionError, match="embedding-mlp has 1. Set categories=2"):
        built(categories=1).score(batch([[1]], [1], [2]), torch.tensor([2]))
    with pytest.raises(OptionError, match="The log has no item categories"):
        built(categories=1).score(Batch(torch.tensor([1]), torch.tensor([[1]])), torch.tensor([2]))


def test_users_and_items_that_came_after_the_last_update_are_scored_too() -> None:
    query = Batch(torch.tensor([7]), torch.tensor([[9, 1]]))  # user 7 and item 9 are not known
    model = built()
    x = torch.cat([torch.zeros(2), model.items.weights[1] / 2, torch.zeros(2)])
    expected = model.last(torch.relu(model.second(torch.relu(model.first(x))))).item()
    assert model.score(query, torch.tensor([9])).item() == near(expected, abs=1e-6)
