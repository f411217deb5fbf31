"""STMP and STAMP by hand; order, padding and losses; a world in which the next item follows from the last one."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from circles import circles
from torch import Tensor, nn

from freshrec.data.batches import due_targets
from freshrec.data.histories import append_events
from freshrec.errors import OptionError
from freshrec.learn.fit import train
from freshrec.learn.validation import hit_rate
from freshrec.learn.weights import copy_weights
from freshrec.models.stamp import STAMP, STAMPSpec
from freshrec.nn.scoring import score_items, user_vectors
from freshrec.types import Batch, EncodingModel, Histories

KINDS = ("stamp", "stmp")
N_ITEMS = 9
NEGATIVES = torch.tensor([1, 3, 8, 3])
near = pytest.approx
each_kind = pytest.mark.parametrize("kind", KINDS)
each_loss = pytest.mark.parametrize("loss", ["sampled", "full"])


def built(**options: Any) -> STAMP:
    model = STAMPSpec(**{"d": 6, "std": 1.0} | options).build(0)
    model.grow(3, N_ITEMS)
    return model


def plain(**options: Any) -> STAMP:
    """A model with d = 2, identity matrices, no biases and w = (1, 1). Items 1 to 3 are (1, 0), (0, 1) and (1, 1)."""
    model = built(d=2, **options)
    for name, weight in model.named_parameters():
        weight.data = torch.zeros(2) if name.endswith("bias") else torch.eye(2)
    if model.attention is not None:
        model.attention.weigh.weight.data = torch.ones(1, 2)
    model.items.weights[1:4] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    return model


def query_batch(*histories: list[int], targets: list[int] | None = None) -> Batch:
    users_B = torch.arange(1, len(histories) + 1)
    targets_BT = None if targets is None else torch.tensor(targets)[:, None]
    return Batch(users_B, torch.tensor(histories, dtype=torch.int64), targets_BT, NEGATIVES)


def scores(model: STAMP, *histories: list[int]) -> Tensor:
    return score_items(model, query_batch(*histories), torch.arange(1, N_ITEMS + 1))


def test_stmp_by_hand() -> None:
    # m = (0.5, 0.5), h_s = tanh m = (0.462117, 0.462117); h_t = tanh (0, 1) = (0, 0.761594)
    # the score of (1, 1) is 0.462117 x 0 + 0.462117 x 0.761594
    assert scores(plain(kind="stmp"), [1, 2])[0, 2].item() == near(0.351946, abs=1e-6)


def test_stamp_by_hand() -> None:
    # x_1 + x_2 + m = (1.5, 1.5) and x_2 + x_2 + m = (0.5, 2.5): 2 x 0.817574, and 0.622459 + 0.924142
    model = plain()
    assert model.attention is not None
    x_TD = torch.eye(2)
    weight_BT = model.attention(x_TD[None], x_TD[1:], torch.full((1, 2), 0.5))
    torch.testing.assert_close(weight_BT, torch.tensor([[1.635149, 1.546601]]), atol=1e-6, rtol=0)
    # m_a = (1.635149, 1.546601): tanh 1.546601 x tanh 1 = 0.913223 x 0.761594; with m added, tanh 2.046601 x tanh 1
    assert scores(plain(add_mean_back=False), [1, 2])[0, 2].item() == near(0.695505, abs=1e-6)
    assert scores(plain(), [1, 2])[0, 2].item() == near(0.736596, abs=1e-6)


@each_kind
def test_the_order_of_all_but_the_last_item_does_not_matter(kind: str) -> None:
    model = built(kind=kind)
    before, turned, other = scores(model, [4, 2, 9, 7], [9, 4, 2, 7], [4, 2, 7, 9])
    torch.testing.assert_close(turned, before)
    assert (other - before).abs().max() > 0.01


@each_kind
@each_loss
def test_padding_changes_nothing(kind: str, loss: str) -> None:
    results = []
    for padding in ([], [0], [0, 0, 0]):
        model = built(kind=kind, loss=loss)
        model.items.weights[0] = 50.0 * len(padding)  # the content of the padding row must not matter
        forward = model(query_batch([*padding, 4, 2, 7], [*padding, 1, 1, 5], targets=[2, 6]))
        forward.loss.backward()
        grads = [weight.grad for weight in model.parameters()]
        results.append([scores(model, [*padding, 4, 2, 7]), forward.loss, *grads])
    for padded in results[1:]:
        torch.testing.assert_close(padded, results[0])


@each_kind
def test_a_user_without_a_history_has_a_vector_of_zeros(kind: str) -> None:
    model = built(kind=kind)
    for layer in (model.whole, model.last):
        nn.init.ones_(layer.bias)  # without the mask, the result would not be 0
    assert (scores(model, [0, 0], [0, 3])[0] == 0).all() and (scores(model, [0, 0], [0, 3])[1] != 0).all()
    assert (scores(model, []) == 0).all()


@each_kind
def test_the_losses_are_the_cross_entropy_over_all_items_or_over_the_negatives(kind: str) -> None:
    batch = query_batch([4, 2, 7], [0, 1, 5], targets=[2, 3])
    score_BI = scores(built(kind=kind), [4, 2, 7], [0, 1, 5])
    full = built(kind=kind, loss="full")(batch)
    assert full.loss.item() == near(F.cross_entropy(score_BI, torch.tensor([1, 2])).item(), abs=1e-5)
    sampled = built(kind=kind, loss="sampled")(batch)
    # the second target, 3, is twice among the negatives 1, 3, 8, 3, where it is ignored
    first, second = score_BI[0, [1, 0, 2, 7, 2]], score_BI[1, [2, 0, 7]]
    losses_B = torch.stack([first.logsumexp(0) - first[0], second.logsumexp(0) - second[0]])
    assert sampled.loss.item() == near(losses_B.mean().item(), abs=1e-5)


@each_kind
@each_loss
def test_every_weight_learns(kind: str, loss: str) -> None:
    model = built(kind=kind, loss=loss)
    assert isinstance(model, EncodingModel) and model.batch_format == "target"
    model(query_batch([4, 2, 7], [0, 1, 5], targets=[2, 6])).loss.backward()
    assert all(weight.grad is not None and (weight.grad != 0).any() for weight in model.parameters())
    ids_N, rows_ND = model.items.step_rows()
    assert rows_ND.grad is not None
    moved = set(ids_N[(rows_ND.grad != 0).any(1)].tolist())
    assert moved == {1, 2, 3, 4, 5, 6, 7, 8} | ({9} if loss == "full" else set())


def test_gradients_of_the_user_vectors_reach_the_items_of_the_history() -> None:
    model, batch = built(), query_batch([4, 2, 7], [0, 1, 5])
    items_BTD = model.items.weights[batch.history_BT].clone().requires_grad_()
    vectors_BKD = model.encode(items_BTD, batch)
    torch.testing.assert_close(vectors_BKD.detach(), user_vectors(model, batch))
    vectors_BKD.sum().backward()
    assert items_BTD.grad is not None
    assert ((items_BTD.grad != 0).any(2) == (batch.history_BT > 0)).all()


def test_a_kind_that_does_not_exist_is_refused() -> None:
    with pytest.raises(OptionError, match='Option kind is "stmap". Use one of stamp, stmp.'):
        STAMPSpec(kind="stmap")  # type: ignore[arg-type]


def trained(n_epochs: int, **options: Any) -> tuple[STAMP, float]:
    """Train on users who go round one of four circles of 5 items. Return the model and its hit rate at 1.

    A history of 8 items contains the whole circle, so only the last item shows which one is next.
    """
    targets = due_targets(append_events(Histories.empty(), circles(range(1, 61), 1), 60))
    model = STAMPSpec(d=16, negatives=16, length=8, lr=0.01, **options).build(0)
    model.grow(60, 20)
    for _ in train(model, targets, n_epochs, (0,)):
        pass
    return model, hit_rate(model, targets[targets.history_lengths(8) == 8], None, k=1)


@each_kind
@each_loss
def test_the_item_that_follows_the_last_one_is_learned(kind: str, loss: str) -> None:
    assert trained(6, kind=kind, loss=loss)[1] == 1


@each_kind
def test_the_same_seed_gives_the_same_bits(kind: str) -> None:
    first, again = (copy_weights(trained(1, kind=kind)[0]) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
