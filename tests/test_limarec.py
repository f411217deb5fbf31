"""LimaRec-style: linear attention by hand, as a stream of events, and with items that were never trained."""

from dataclasses import replace

import circles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.data.histories import append_events
from freshrec.errors import OptionError
from freshrec.learn.fit import FitConfig
from freshrec.models.limarec import LimaRec, LimaRecSpec, linear_attention
from freshrec.nn.embedding_table import EmbeddingTable, grow_with_zeros
from freshrec.nn.scoring import item_vectors, score_items, user_vectors
from freshrec.strategies.baselines import Frozen
from freshrec.types import Batch, EncodingModel, Histories, InterestModel, Span, State

N_ITEMS = 9
SMALL = LimaRecSpec(k=3, d=8, std=1.0)


def model_of(spec: LimaRecSpec = SMALL, seed: int = 0) -> LimaRec:
    model = spec.build(seed)
    model.grow(3, N_ITEMS)
    return model


def query_batch(*histories: list[int]) -> Batch:
    return Batch(torch.arange(1, len(histories) + 1), torch.tensor(histories))


def training_interests(model: LimaRec, history: list[int], targets: list[int]) -> Tensor:
    """The interests at the positions with a target, shape (N, K, D)."""
    batch = replace(query_batch(history), targets_BT=torch.tensor([targets]), negatives_N=torch.tensor([1, 3]))
    vectors_NKD = model.forward(batch).vectors_BKD
    assert vectors_NKD is not None
    return vectors_NKD.detach()


def streamed(model: LimaRec, history: list[int]) -> Tensor:
    """The interests after each event, (T, K, D), from running sums S and z as in the paper on linear attention."""
    layer, keep = model.layer, 1 - model.spec.decay
    S_DD, z_D, interests = torch.zeros(8, 8), torch.zeros(8), []
    with torch.no_grad():
        for x_D in model.items.weights[history]:
            k_D = F.elu(layer.key(x_D)) + 1
            S_DD, z_D = keep * S_DD + torch.outer(k_D, layer.value(x_D)), keep * z_D + k_D
            q_KD = F.elu(layer.query(x_D).view(-1, 8)) + 1
            y_KD = layer.between(x_D + q_KD @ S_DD / (q_KD @ z_D)[:, None])
            interests.append(layer.last(y_KD + layer.outer(F.relu(layer.inner(y_KD)))))
    return torch.stack(interests)


def test_linear_attention_by_hand() -> None:
    # phi(0) = 1 and phi(1) = 2: with the query 0, keys 0 and 1 and values 1 and 4, (1 1 + 2 4) / (1 + 2) = 3.
    # With weight 1/2 for the first key: (1/2 + 8) / (1/2 + 2) = 3.4. The query -1 has phi = 1/e, which cancels.
    queries_BPKD = torch.tensor([0.0, -1.0]).view(1, 1, 2, 1).expand(1, 2, 2, 1)
    keys_BTD, values_BTD = torch.tensor([0.0, 1.0]).view(1, 2, 1), torch.tensor([1.0, 4.0]).view(1, 2, 1)
    found_BPKD = linear_attention(queries_BPKD, keys_BTD, values_BTD, torch.tensor([[[1.0, 1.0], [0.5, 1.0]]]))
    torch.testing.assert_close(found_BPKD.flatten(), torch.tensor([3.0, 3.0, 3.4, 3.4]), atol=1e-6, rtol=0)


def test_each_query_weights_the_keys_by_its_own_features() -> None:
    # Two dimensions: q = (0, 0) has phi (1, 1), q = (1, 0) has (2, 1); keys (0, 0) and (1, 0): (1, 1) and (2, 1).
    # Kernels: 2 and 3 of the first query, 3 and 5 of the second; values 1 and 4: (2 + 12) / 5 and (3 + 20) / 8.
    queries_BPKD = torch.tensor([[[[0.0, 0.0], [1.0, 0.0]]]])
    keys_BTD, values_BTD = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]), torch.tensor([[[1.0, 0.0], [4.0, 0.0]]])
    found_BPKD = linear_attention(queries_BPKD, keys_BTD, values_BTD, torch.ones(1, 1, 2))
    torch.testing.assert_close(found_BPKD[0, 0], torch.tensor([[14 / 5, 0.0], [23 / 8, 0.0]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_stream_of_events_gives_the_interests_of_each_prefix(decay: float) -> None:
    model, history = model_of(replace(SMALL, decay=decay)), [4, 2, 7, 2, 9, 1]
    stream_TKD = streamed(model, history)
    for n in range(1, len(history) + 1):
        vectors_BKD = user_vectors(model, query_batch(history[:n]))
        torch.testing.assert_close(vectors_BKD[0], stream_TKD[n - 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(training_interests(model, history, [2, 7, 2, 9, 1, 5]), stream_TKD, atol=1e-5, rtol=0)


def test_decay_reduces_the_effect_of_earlier_items() -> None:
    # With a decay near 1, items before the last one have no effect; without decay they have.
    for decay, is_same in ((0.9999, True), (0.0, False)):
        model = model_of(replace(SMALL, decay=decay))
        vectors_BKD = user_vectors(model, query_batch([4, 2, 7], [9, 1, 7]))
        assert torch.allclose(vectors_BKD[0], vectors_BKD[1], atol=1e-2) == is_same


def test_a_gap_in_a_window_changes_nothing_and_the_future_is_not_seen() -> None:
    model = model_of(replace(SMALL, decay=0.3))
    gapped_NKD = training_interests(model, [0, 4, 0, 2, 7], [0, 2, 0, 7, 8])
    torch.testing.assert_close(gapped_NKD, training_interests(model, [4, 2, 7], [2, 7, 8]))
    assert torch.equal(gapped_NKD[:2], training_interests(model, [0, 4, 0, 2, 5], [0, 2, 0, 7, 8])[:2])
    torch.testing.assert_close(
        user_vectors(model, query_batch([4, 0, 2, 0]))[0], user_vectors(model, query_batch([4, 2]))[0]
    )


def test_interests_differ_and_the_best_of_them_gives_the_score() -> None:
    model, batch = model_of(), query_batch([4, 2, 7])
    model.layer.query.weight.data *= 10  # untrained queries are short, so that interests are almost equal
    vectors_KD = user_vectors(model, batch)[0]
    assert vectors_KD.shape == (3, 8) and (vectors_KD[0] - vectors_KD[1]).norm() > 0.1
    items_N = torch.tensor([5, 3])
    torch.testing.assert_close(
        score_items(model, batch, items_N)[0], (item_vectors(model)[items_N] @ vectors_KD.t()).amax(1)
    )


def test_hard_attention_trains_the_closest_interest_and_soft_attention_all() -> None:
    # Target 8, negatives 1 and 3. The logits are v e, where v is the closest interest or the softmax mix.
    for attention in ("hard", "soft"):
        model = model_of(replace(SMALL, attention=attention))
        batch = replace(query_batch([4, 2]), targets_BT=torch.tensor([[0, 8]]), negatives_N=torch.tensor([1, 3]))
        vectors_KD = user_vectors(model, batch)[0]
        near_K = vectors_KD @ item_vectors(model)[8]
        share_K = torch.softmax(near_K, 0) if attention == "soft" else F.one_hot(near_K.argmax(), 3).float()
        logits_N = item_vectors(model)[[8, 1, 3]] @ (share_K @ vectors_KD)
        torch.testing.assert_close(model(batch).loss, -torch.log_softmax(logits_N, 0)[0])


def test_an_empty_history_gives_zeros_and_serving_uses_encode() -> None:
    model = model_of()
    assert isinstance(model, EncodingModel) and not isinstance(model, InterestModel)
    nobody = query_batch([0, 0], [0, 4])
    assert (user_vectors(model, nobody)[0] == 0).all() and user_vectors(model, nobody)[1].norm() > 1
    nothing = Batch(torch.tensor([1]), torch.zeros(1, 0, dtype=torch.int64))
    assert torch.equal(user_vectors(model, nothing), torch.zeros(1, 3, 8))
    assert torch.equal(model.encode(item_vectors(model)[nobody.history_BT], nobody), user_vectors(model, nobody))


def test_rows_that_come_after_training_start_at_zero_and_can_be_trained() -> None:
    table = EmbeddingTable(4, std=1.0, seed=0)
    grow_with_zeros(table, 2)
    grow_with_zeros(table, 3)  # no row is trained yet
    assert (table.weights[1:] != 0).all()
    table.lookup(torch.tensor([1])).sum().backward()
    table.step(0.1)
    old = table.weights.clone()
    grow_with_zeros(table, 5)
    assert torch.equal(table.weights[:4], old) and (table.weights[4:] == 0).all() and len(table.weights) == 6
    table.lookup(torch.tensor([5])).sum().backward()
    table.step(0.1)
    assert table.weights[5].tolist() == pytest.approx([-0.1] * 4, rel=1e-4) and (table.weights[4] == 0).all()


def test_a_frozen_model_follows_its_users_and_ignores_items_that_it_was_not_trained_on() -> None:
    # Users 1..60 go round circles of 5 items each. Then items 21..30 are added, and user 1 takes some of them.
    base = circles.circles(range(1, 61), 1)
    strategy = Frozen(fit=FitConfig(base_epochs=10))
    state = State(
        LimaRecSpec(d=16, negatives=16, lr=0.01).build(0), histories=append_events(Histories.empty(), base, 60)
    )
    state = strategy.update(state, Span(0, base, 60, 20))
    before = {name: weight.clone() for name, weight in state.model.named_parameters()}
    trained = item_vectors(state.model).clone()
    late = circles.circles(range(61, 62), 1)
    state = strategy.update(replace(state, histories=append_events(state.histories, late, 61)), Span(1, late, 61, 30))
    model = state.model
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert torch.equal(item_vectors(model)[:21], trained) and model.n_items == 30
    batch = query_batch([1, 2, 3], [6, 7, 8])
    best_B5 = score_items(model, batch, torch.arange(1, 31)).topk(5).indices + 1
    assert best_B5[:, 0].tolist() == [4, 9] and best_B5.max() <= 20
    with_KD, without_KD = user_vectors(model, query_batch([1, 22, 2, 3, 21], [0, 1, 0, 2, 3]))
    torch.testing.assert_close(with_KD, without_KD)


def test_the_same_seed_gives_the_same_bits_and_options_out_of_bounds_are_refused() -> None:
    first, again, other = (user_vectors(model_of(seed=seed), query_batch([4, 2, 7])) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    with pytest.raises(OptionError, match="Option decay is 1.0. It must be at least 0 and below 1."):
        LimaRecSpec(decay=1.0)
