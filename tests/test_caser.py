"""Caser: the network by hand and as a convolution, the losses, short histories, and a world where order matters."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from circles import circles
from torch import Tensor

from freshrec.data.batches import due_targets
from freshrec.data.histories import append_events
from freshrec.errors import OptionError
from freshrec.learn.fit import train
from freshrec.learn.validation import hit_rate
from freshrec.learn.weights import apply_parametrization, copy_weights
from freshrec.models.caser import Caser, CaserSpec
from freshrec.nn.scoring import item_vectors, score_items, user_vectors
from freshrec.types import Batch, Histories, VectorModel

N_ITEMS = 9
NEGATIVES = torch.tensor([1, 3, 8, 3])
SHAPES: dict[str, dict[str, Any]] = {
    "all": {},
    "impersonal": {"personal": False},
    "no rows": {"horizontal": 0},
    "no columns": {"vertical": 0},
}
near = pytest.approx
each_shape = pytest.mark.parametrize("shape", SHAPES)


def built(**options: Any) -> Caser:
    model = CaserSpec(**{"d": 6, "std": 1.0, "dropout": 0.0, "weight_decay": 0.0} | options).build(0)
    model.grow(3, N_ITEMS)
    model.items.weights[1:, -1] = torch.arange(N_ITEMS) / 4  # biases
    return model


def query_batch(*histories: list[int], targets: list[int] | None = None, users: list[int] | None = None) -> Batch:
    users = list(range(1, len(histories) + 1)) if users is None else users
    targets_BT = None if targets is None else torch.tensor(targets)[:, None]
    return Batch(torch.tensor(users), torch.tensor(histories, dtype=torch.int64), targets_BT, NEGATIVES)


def scores(model: Caser, *histories: list[int], users: list[int] | None = None) -> Tensor:
    return score_items(model, query_batch(*histories, users=users), torch.arange(1, N_ITEMS + 1))


def test_the_network_by_hand() -> None:
    model = built(d=1, length=2, vertical=1, horizontal=1)
    one, two = model.horizontal
    assert model.vertical is not None and model.users is not None
    for layer, weights, bias in [
        (one, [-1.0], 4.0),  # the items 2 and 3 give 2 and 1: the maximum is 2
        (two, [1.0, -1.0], 0.0),  # 2 - 3 is below 0: 0
        (model.vertical, [0.5, 1.0], 0.0),  # 0.5 x 2 + 3 = 4
        (model.join, [1.0, 1.0, 0.25], -1.0),  # 2 + 0 + 0.25 x 4 - 1 = 2
    ]:
        layer.weight.data, layer.bias.data = torch.tensor([weights]), torch.tensor([bias])
    model.taken.weights[4:6] = torch.tensor([[2.0], [3.0]])
    model.users.weights[1] = 0.5
    model.items.weights[7] = torch.tensor([3.0, 2.0, 0.1])
    # 3 x 2 + 2 x 0.5 + 0.1
    assert scores(model, [4, 5])[0, 6].item() == near(7.1, abs=1e-6)


def test_the_filters_are_those_of_a_convolution_over_the_image() -> None:
    model, history = built(length=4, vertical=3, horizontal=2), [4, 2, 9, 7]
    assert model.vertical is not None and model.users is not None
    image_11TD = model.taken.weights[history][None, None]
    found = []
    for n, filters in enumerate(model.horizontal, 1):  # n items high, as wide as their vectors
        map_1HT = F.conv2d(image_11TD, filters.weight.view(2, 1, n, 6), filters.bias)[..., 0]
        found.append(F.max_pool1d(F.relu(map_1HT), map_1HT.shape[2])[0, :, 0])
    map_1VD = F.conv2d(image_11TD, model.vertical.weight.view(3, 1, 4, 1), model.vertical.bias)[:, :, 0]
    found.append(map_1VD[0].t().flatten())  # the order of these columns is only an order of weights
    z_D = F.relu(model.join(torch.cat(found)))
    user_E = torch.cat([z_D, model.users.weights[1], torch.ones(1)])
    torch.testing.assert_close(user_vectors(model, query_batch(history))[0, 0], user_E.detach())
    torch.testing.assert_close(scores(model, history)[0], (model.items.weights[1:] @ user_E).detach())


@each_shape
def test_short_histories_are_padded_with_zeros_on_the_left_and_long_ones_cut(shape: str) -> None:
    model = built(**SHAPES[shape])
    torch.nn.init.constant_(model.join.bias, 9.0)  # so that all units are active
    short = scores(model, [2, 7])
    model.taken.weights[0] = 50.0  # the content of the padding row must not matter
    for history in ([0, 0, 0, 2, 7], [0, 2, 7], [0, 0, 0, 0, 0, 0, 2, 7]):
        torch.testing.assert_close(scores(model, history), short)
    torch.testing.assert_close(scores(model, [9, 9, 1, 2, 3, 4, 5]), scores(model, [1, 2, 3, 4, 5]))
    assert (scores(model, [1, 2, 3, 5, 4]) - scores(model, [1, 2, 3, 4, 5])).abs().max() > 1e-3
    torch.testing.assert_close(scores(model, [0, 0, 0]), scores(model, []))


@pytest.mark.parametrize("loss", ["sampled", "full", "bce"])
def test_the_training_loss_does_not_depend_on_padding(loss: str) -> None:
    results = []
    for padding in ([], [0], [0, 0, 0, 0]):
        model = built(loss=loss)
        forward = model(query_batch([*padding, 4, 2], [*padding, 1, 5], targets=[2, 6]))
        forward.loss.backward()
        results.append([forward.loss, *(weight.grad for weight in model.parameters())])
        ids_N, rows_ND = model.taken.step_rows()
        assert rows_ND.grad is not None and (rows_ND.grad[ids_N == 0] == 0).all()
    for padded in results[1:]:
        torch.testing.assert_close(padded, results[0])


def test_an_unknown_user_has_no_vector_and_without_user_vectors_all_users_are_the_same() -> None:
    model = built()
    assert model.users is not None
    stranger = scores(model, [4, 2], users=[17])
    assert (scores(model, [4, 2], users=[1]) - stranger).abs().max() > 0.1
    model.users.weights[1] = 0.0
    torch.testing.assert_close(scores(model, [4, 2], users=[1]), stranger)
    impersonal = built(personal=False)
    assert impersonal.users is None
    assert torch.equal(scores(impersonal, [4, 2], users=[17]), scores(impersonal, [4, 2], users=[1]))


def test_growth_changes_no_score_and_a_new_item_has_no_bias() -> None:
    model, before = built(), scores(built(), [4, 2])
    model.grow(8, 30)
    assert torch.equal(scores(model, [4, 2]), before)
    assert len(item_vectors(model)) == 31 and (item_vectors(model)[10:, -1] == 0).all()
    assert (item_vectors(model)[10:, :-1] != 0).all() and (model.taken.weights[10:] != 0).all()
    assert scores(model, [25, 4], users=[8]).isfinite().all()


def test_the_losses_are_computed_from_the_scores_that_are_served() -> None:
    batch = query_batch([4, 2, 7], [0, 1, 5], targets=[2, 3])
    score_BI = scores(built(), [4, 2, 7], [0, 1, 5])
    full = built(loss="full")(batch)
    assert full.loss.item() == near(F.cross_entropy(score_BI, torch.tensor([1, 2])).item(), abs=1e-5)
    # the second target, 3, is twice among the negatives 1, 3, 8, 3, where it is ignored
    first, second = score_BI[0, [1, 0, 2, 7, 2]], score_BI[1, [2, 0, 7]]
    losses_B = torch.stack([first.logsumexp(0) - first[0], second.logsumexp(0) - second[0]])
    assert built(loss="sampled")(batch).loss.item() == near(losses_B.mean().item(), abs=1e-5)
    negative_loss = F.softplus(torch.cat([first[1:], second[1:]])).mean()
    positive_loss = F.softplus(-torch.stack([first[0], second[0]])).mean()
    assert built(loss="bce")(batch).loss.item() == near((positive_loss + negative_loss).item(), abs=1e-5)


@pytest.mark.parametrize("loss", ["sampled", "full", "bce"])
def test_the_gradient_of_weight_decay_is_proportional_to_each_weight(loss: str) -> None:
    batch = query_batch([4, 2, 7], [0, 1, 5], targets=[2, 6])
    with_it, without = built(loss=loss, weight_decay=0.1), built(loss=loss)
    with_it(batch).loss.backward()
    without(batch).loss.backward()
    for pulled, free in zip(with_it.parameters(), without.parameters()):
        torch.testing.assert_close(pulled.grad, free.grad + 0.1 * free.detach())
    for table, other in ((with_it.taken, without.taken), (with_it.users, without.users)):
        assert table is not None and other is not None
        (ids_N, rows_ND), (_, free_ND) = table.step_rows(), other.step_rows()
        assert rows_ND.grad is not None and free_ND.grad is not None
        torch.testing.assert_close(rows_ND.grad, free_ND.grad + 0.1 * table.weights[ids_N])


def test_weight_decay_uses_the_weights_of_the_forward_pass() -> None:
    model, batch = built(weight_decay=1.0), query_batch([4, 2, 7], targets=[2])
    with apply_parametrization(model, lambda name, ids, weight: weight * 0) as forward_pass:
        # all scores are 0, and the target is one of 5 items: ln 5
        assert forward_pass(batch).loss.item() == near(1.609438, abs=1e-6)


def test_dropout_is_for_training_only() -> None:
    model, batch = built(dropout=0.5), query_batch([4, 2, 7], targets=[2])
    assert model(batch).loss.item() != model(batch).loss.item()
    model.eval()
    assert model(batch).loss.item() == model(batch).loss.item() == near(built()(batch).loss.item(), abs=1e-6)


@each_shape
@pytest.mark.parametrize("loss", ["sampled", "full", "bce"])
def test_every_weight_learns(shape: str, loss: str) -> None:
    model = built(loss=loss, **SHAPES[shape])
    assert isinstance(model, VectorModel) and model.batch_format == "target"
    for layer in model.horizontal:
        torch.nn.init.constant_(layer.bias, 9.0)  # so that all filters are active
    torch.nn.init.constant_(model.join.bias, 99.0)  # and all units of the layer above them
    model(query_batch([4, 2, 7, 3, 8], [9, 1, 6, 1, 5], targets=[2, 6])).loss.backward()
    assert all(weight.grad is not None and (weight.grad != 0).any() for weight in model.parameters())


def test_a_model_without_filters_is_refused() -> None:
    with pytest.raises(OptionError, match="cannot read a history. Set vertical or horizontal above 0"):
        CaserSpec(vertical=0, horizontal=0)


def trained(n_epochs: int, **options: Any) -> tuple[Caser, float]:
    """Train on users who go round circles, half of them backwards. Return the model and its hit rate at 1.

    The last item has two neighbours, so a model that reads only this item is right half of the time. Only the order of
    the items gives the direction.
    """
    forwards, backwards = circles(range(1, 31), 1), circles(range(31, 61), -1)
    targets = due_targets(append_events(append_events(Histories.empty(), forwards, 60), backwards, 60))
    model = CaserSpec(d=16, negatives=16, lr=0.01, std=0.1, dropout=0.0, personal=False, **options).build(0)
    model.grow(60, 20)
    for _ in train(model, targets, n_epochs, (0,)):
        pass
    return model, hit_rate(model, targets[targets.history_lengths(5) == 5], None, k=1)


@pytest.mark.parametrize("options", [{}, {"horizontal": 0}, {"vertical": 0}, {"loss": "full"}, {"loss": "bce"}])
def test_the_next_item_is_predicted_from_the_order_of_the_last_items(options: dict[str, Any]) -> None:
    assert trained(12, **options)[1] > 0.9


def test_the_same_seed_gives_the_same_bits() -> None:
    first, again = (copy_weights(trained(1)[0]) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
