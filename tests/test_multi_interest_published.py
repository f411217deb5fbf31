"""MIND and ComiRec as published, by hand: routing, attention, label attention, and the number of interests."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from freshrec.data.batches import history_ends, query_batches
from freshrec.data.split import split_log
from freshrec.data.synthetic import make_world
from freshrec.errors import OptionError
from freshrec.learn.fit import FitConfig
from freshrec.models.absorb import absorb_block
from freshrec.models.multi_interest_published import (
    COMIREC_DR_PUBLISHED,
    COMIREC_SA_PUBLISHED,
    MIND_PUBLISHED,
    CapsuleRouting,
    PublishedInterestNet,
    PublishedInterestSpec,
    PublishedSelfAttention,
    interest_mask,
    route_capsules,
)
from freshrec.nn.layers import squash
from freshrec.nn.scoring import item_vectors, score_items, user_vectors
from freshrec.strategies.baselines import FineTune
from freshrec.types import Batch, EncodingModel, InterestModel, State

ORIGINALS = {"mind": MIND_PUBLISHED, "dr": COMIREC_DR_PUBLISHED, "sa": COMIREC_SA_PUBLISHED}
VARIANTS = ORIGINALS | {
    "mind-adaptive": replace(MIND_PUBLISHED, k_log2="n"),
    "mind-relu": replace(MIND_PUBLISHED, relu=True),
    "dr-by-interest": replace(COMIREC_DR_PUBLISHED, transform="interest"),
    "sa-adaptive": replace(COMIREC_SA_PUBLISHED, k_log2="n+1"),
}
each_original = pytest.mark.parametrize("name", ORIGINALS)
each_variant = pytest.mark.parametrize("name", VARIANTS)
N_ITEMS = 9
near = pytest.approx


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def built(spec: PublishedInterestSpec, seed: int = 0) -> PublishedInterestNet:
    model = replace(spec, d=8, std=1.0).build(seed)
    model.grow(3, N_ITEMS)
    model.eval()
    return model


def query_batch(*histories: list[int]) -> Batch:
    return Batch(torch.arange(1, len(histories) + 1), torch.tensor(histories))


def vectors(model: PublishedInterestNet, *histories: list[int]) -> Tensor:
    return user_vectors(model, query_batch(*histories))


@pytest.mark.parametrize(("before", "after"), [(0.5, 0.2), (1.0, 0.5), (3.0, 0.9)])  # r -> r^2 / (1 + r^2)
def test_one_interest_of_one_item_is_the_squashed_item(before: float, after: float) -> None:
    direction_D = torch.tensor([0.6, -0.8])
    found_BKD = route_capsules(before * direction_D[None, None, None], torch.zeros(1, 1, 1), torch.ones(1, 1), 3)
    torch.testing.assert_close(found_BKD[0, 0], after * direction_D)


def test_routing_items_that_are_zero_gives_zero_with_a_finite_gradient() -> None:
    zeros_BGTD = torch.zeros(1, 1, 2, 3, requires_grad=True)
    found_BKD = route_capsules(zeros_BGTD, torch.zeros(1, 2, 2), torch.ones(1, 2), 3)
    found_BKD.sum().backward()
    assert (found_BKD == 0).all() and zeros_BGTD.grad is not None and zeros_BGTD.grad.isfinite().all()


def test_routing_by_hand_for_one_two_and_three_iterations() -> None:
    # Items (1, 0) and (0, 1); initial votes are 1 for one's own interest and 0 for the other.
    # 1: item 1's share in interest 1 is 1 / (1 + e^-1) = 0.731059; s_1 = (0.731059, 0.268941), |s_1|^2 = 0.606776,
    #    h_1 = s_1 |s_1| / (1 + |s_1|^2) = (0.354414, 0.130382), h_2 mirrored
    # 2: its votes are (1.354414, 0.130382), its share 1 / (1 + e^-1.224032) = 0.772772; 3: 0.816160
    expected = [(0.354414, 0.130382), (0.377520, 0.111007), (0.401671, 0.090476)]
    for iterations, (x, y) in enumerate(expected, 1):
        found_BKD = route_capsules(torch.eye(2)[None, None], torch.eye(2)[None], torch.ones(1, 2), iterations)
        torch.testing.assert_close(found_BKD, torch.tensor([[[x, y], [y, x]]]), atol=1e-6, rtol=0)


def test_with_one_transform_and_equal_votes_all_interests_stay_the_same() -> None:
    sent_BGTD, votes_BKT, real_BT = random(1, 1, 5, 4), torch.zeros(1, 3, 5), torch.ones(1, 5)
    same_BKD = route_capsules(sent_BGTD, votes_BKT, real_BT, 3)
    assert torch.equal(same_BKD[:, 0], same_BKD[:, 1])
    random_BKD = route_capsules(sent_BGTD, random(1, 3, 5, seed=1), real_BT, 3)  # MIND: random votes
    own_BKD = route_capsules(random(1, 3, 5, 4, seed=2), votes_BKT, real_BT, 3)  # ComiRec: a transform per interest
    assert all((found[:, 0] - found[:, 1]).norm() > 0.1 for found in (random_BKD, own_BKD))
    for spec in (replace(MIND_PUBLISHED, noise=0.0), replace(COMIREC_DR_PUBLISHED, transform="shared")):
        with pytest.raises(OptionError, match="all interests stay the same"):
            spec.build(0)
    replace(MIND_PUBLISHED, noise=0.0, k=1).build(0)


def test_gradients_flow_through_the_last_routing_iteration_only() -> None:
    # The shares are constants. As fixed weights, the shares of the third iteration give the same gradient.
    sent_BTD, votes_BKT = random(1, 4, 3).requires_grad_(), random(1, 2, 4, seed=1)
    route_capsules(sent_BTD[:, None], votes_BKT, torch.ones(1, 4), 3).sum().backward()
    found_BTD, sent_BTD.grad = sent_BTD.grad, None
    fixed_BTD = sent_BTD.detach()
    for _ in range(2):
        votes_BKT = votes_BKT + squash(torch.softmax(votes_BKT, 1) @ fixed_BTD) @ fixed_BTD.mT
    squash(torch.softmax(votes_BKT, 1) @ sent_BTD).sum().backward()
    torch.testing.assert_close(found_BTD, sent_BTD.grad)


def reference_routing(W_TKDD: Tensor, items_TD: Tensor, votes_KT: Tensor) -> Tensor:
    """The interests (K, D), computed item by item and interest by interest."""
    ks, ns = range(votes_KT.shape[0]), range(votes_KT.shape[1])
    sent = [torch.stack([W_TKDD[n, k] @ items_TD[n] for n in ns]) for k in ks]
    for _ in range(3):
        share_KT = torch.softmax(votes_KT, 0)
        h_KD = torch.stack([squash((share_KT[k, :, None] * sent[k]).sum(0)) for k in ks])
        votes_KT = votes_KT + torch.stack([sent[k] @ h_KD[k] for k in ks])
    return h_KD


@pytest.mark.parametrize("name", ["mind", "dr", "dr-by-interest"])
def test_each_item_is_transformed_by_its_position_and_interest(name: str) -> None:
    # Three items of at most five: they have the last three positions.
    layer, items_TD = CapsuleRouting(replace(VARIANTS[name], d=4, k=2, length=5)), random(3, 4)
    W_TKDD = layer.transform_TKDD.detach()
    assert W_TKDD.shape == {"mind": (1, 1, 4, 4), "dr": (5, 2, 4, 4), "dr-by-interest": (1, 2, 4, 4)}[name]
    votes_KT = layer.logits_KT[:, 2:] if name == "mind" else torch.zeros(2, 3)
    expected_KD = reference_routing(W_TKDD.expand(5, 2, 4, 4)[2:], items_TD, votes_KT)
    found_BKD = layer(items_TD[None], torch.ones(1, 3), None, is_noisy=False)
    torch.testing.assert_close(found_BKD[0], expected_KD)


def test_the_initial_transforms_keep_the_length_of_items_or_are_the_authors() -> None:
    own = CapsuleRouting(COMIREC_DR_PUBLISHED).transform_TKDD.std().item()
    authors = CapsuleRouting(replace(COMIREC_DR_PUBLISHED, gain=8.0)).transform_TKDD.std().item()  # the root of d = 64
    assert [own, authors] == near([1 / 8, 1.0], rel=0.01)


def test_the_layer_after_the_routing_is_linear_with_a_relu() -> None:
    plain, layer = (CapsuleRouting(replace(MIND_PUBLISHED, d=4, relu=relu)) for relu in (False, True))
    assert layer.above is not None
    layer.load_state_dict(plain.state_dict() | {f"above.{k}": v for k, v in layer.above.state_dict().items()})
    below_BKD = plain(random(1, 5, 4), torch.ones(1, 5), None, False)
    expected_BKD = (below_BKD @ layer.above.weight.t() + layer.above.bias).clamp(min=0)
    found_BKD = layer(random(1, 5, 4), torch.ones(1, 5), None, False)
    torch.testing.assert_close(found_BKD, expected_BKD)
    assert (found_BKD == 0).any() and (found_BKD > 0).any()


def test_mind_draws_new_noise_in_training_and_fixed_noise_for_serving() -> None:
    model, batch = built(MIND_PUBLISHED), query_batch([4, 2, 7, 5])
    batch = replace(batch, targets_BT=torch.tensor([[3]]), negatives_N=torch.tensor([1, 6]))
    model.train()
    drawn = [model(batch).vectors_BKD for _ in range(2)]
    assert drawn[0] is not None and drawn[1] is not None and not torch.equal(drawn[0], drawn[1])
    assert torch.equal(vectors(model, [4, 2, 7, 5]), vectors(model, [4, 2, 7, 5]))  # also in training mode
    model.eval()
    assert torch.equal(model(batch).vectors_BKD, vectors(model, [4, 2, 7, 5]))
    torch.manual_seed(99)  # the global random state does not matter
    assert torch.equal(vectors(built(MIND_PUBLISHED), [4, 2, 7, 5]), vectors(model, [4, 2, 7, 5]))
    logits_KT = CapsuleRouting(replace(MIND_PUBLISHED, k=50, length=200)).logits_KT
    # 0.88 is the standard deviation of N(0, 1) truncated at +-2
    assert logits_KT.abs().max() <= 2 and logits_KT.std().item() == near(0.88, abs=0.02)


@pytest.mark.parametrize(
    ("n", "of_n", "of_more"), [(1, 1, 1), (2, 1, 1), (3, 1, 2), (8, 3, 3), (16, 4, 4), (100, 4, 4)]
)
def test_a_history_of_n_items_has_log2_n_interests(n: int, of_n: int, of_more: int) -> None:
    real_BT = torch.arange(100)[None] >= 100 - n
    assert interest_mask(real_BT, 4, "n").sum() == of_n
    assert interest_mask(real_BT, 4, "n+1").sum() == of_more
    assert interest_mask(real_BT, 4, "n")[0].tolist() == [k < of_n for k in range(4)]  # the first ones


def test_an_interest_beyond_the_limit_gets_no_items_and_no_score() -> None:
    adaptive, narrow = built(replace(MIND_PUBLISHED, k_log2="n")), built(replace(MIND_PUBLISHED, k=2))
    narrow.load_state_dict({k: v for k, v in adaptive.state_dict().items() if k != "extract.logits_KT"}, strict=False)
    assert isinstance(adaptive.extract, CapsuleRouting) and isinstance(narrow.extract, CapsuleRouting)
    narrow.extract.logits_KT.copy_(adaptive.extract.logits_KT[:2])
    found_BKD = vectors(adaptive, [4, 2, 7, 5])  # log2 4 = 2
    torch.testing.assert_close(found_BKD[:, :2], vectors(narrow, [4, 2, 7, 5]))
    assert torch.equal(found_BKD[:, 2], found_BKD[:, 0]) and torch.equal(found_BKD[:, 3], found_BKD[:, 0])
    batch = replace(query_batch([4, 2, 7, 5]), targets_BT=torch.tensor([[3]]), negatives_N=torch.tensor([1, 6]))
    torch.testing.assert_close(adaptive(batch).loss, narrow(batch).loss)  # no weight in the label attention either


def attention() -> PublishedSelfAttention:
    """d = d_a = 2, no positions: hidden units are tanh of the item, and the item (1, 0) has the logit ln 3."""
    layer = PublishedSelfAttention(replace(COMIREC_SA_PUBLISHED, d=2, inner=1, k=1, length=4))
    with torch.no_grad():
        layer.positions_TD.zero_()
        layer.inner.weight.copy_(torch.eye(2))
        layer.queries.weight.copy_(torch.tensor([[math.log(3) / math.tanh(1), 0.0]]))
    return layer


def test_self_attention_by_hand() -> None:
    # logits 0 and ln 3: weights 1 / 4 and 3 / 4, so 0.25 (0, 1) + 0.75 (1, 0); the padding, (9, 9), is ignored
    items_BTD, real_BT = torch.tensor([[[9.0, 9.0], [0.0, 1.0], [1.0, 0.0]]]), torch.tensor([[0.0, 1.0, 1.0]])
    found_BKD = attention()(items_BTD, real_BT, None, False)
    torch.testing.assert_close(found_BKD, torch.tensor([[[0.75, 0.25]]]))


def test_positions_enter_the_weights_and_not_the_values() -> None:
    # With the position vector (1, 0) for the first item, both logits are equal. The result is the mean of the items.
    layer, items_BTD = attention(), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    layer.positions_TD.data[2] = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(layer(items_BTD, torch.ones(1, 2), None, False), torch.tensor([[[0.5, 0.5]]]))


def test_self_attention_has_four_times_the_width_and_biases_where_they_matter() -> None:
    shapes = {
        name: tuple(weight.shape) for name, weight in PublishedSelfAttention(COMIREC_SA_PUBLISHED).named_parameters()
    }
    assert shapes == {
        "positions_TD": (50, 64),
        "inner.weight": (256, 64),
        "inner.bias": (256,),
        "queries.weight": (4, 256),
    }


def test_attention_over_nothing_but_padding_is_zero_with_finite_gradients() -> None:
    layer = attention()
    found_BKD = layer(random(1, 3, 2), torch.zeros(1, 3), None, False)
    found_BKD.sum().backward()
    assert (found_BKD == 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


class Given(nn.Module):
    """Fixed interests."""

    def __init__(self, vectors_BKD: Tensor) -> None:
        super().__init__()
        self.vectors_BKD = vectors_BKD

    def forward(self, items_BTD: Tensor, real_BT: Tensor, alive_BK: Tensor | None, is_noisy: bool) -> Tensor:
        return self.vectors_BKD


def read_out(power: float, interests: list[list[float]], target: list[float], *negatives: list[float]) -> list[float]:
    """The logits of the target and the negatives, and the loss."""
    model = PublishedInterestSpec(d=len(target), k=len(interests), power=power).build(0)
    model.extract = Given(torch.tensor([interests], dtype=torch.float32))
    model.grow(1, 1 + len(negatives))
    model.items.weights[1:] = torch.tensor([target, *negatives], dtype=torch.float32)
    negatives_N = torch.arange(2, 2 + len(negatives))
    found = model(replace(query_batch([1]), targets_BT=torch.tensor([[1]]), negatives_N=negatives_N))
    assert found.logits_BN is not None
    return [*found.logits_BN[0].tolist(), found.loss.item()]


def test_a_larger_power_moves_label_attention_from_a_mix_to_the_closest_interest() -> None:
    # Interests (2, 1, 0) and (1, 0, 1), target (1, 0, 0): logits 2 and 1. The scores of the negatives are the shares.
    for power, first in ((1.0, 0.731059), (2.0, 0.952574), (100.0, 1.0)):  # 1 / (1 + e^-(2^p - 1))
        found = read_out(power, [[2, 1, 0], [1, 0, 1]], [1, 0, 0], [0, 1, 0], [0, 0, 1])
        assert found[1:3] == near([first, 1 - first], abs=1e-6)
    # logits 0.5 and 0.4: to the power of 100 both would be about 0, with equal shares
    assert read_out(100.0, [[0.5, 1, 0], [0.4, 0, 1]], [1, 0, 0], [0, 1, 0], [0, 0, 1])[1:3] == [1, 0]
    # logits 1 and -2: without the sign, a power of 2 would prefer the wrong interest; 1 / (1 + e^-(1 + 4)) = 0.993307
    assert read_out(2.0, [[1, 1, 0], [-2, 0, 1]], [1, 0, 0], [0, 1, 0], [0, 0, 1])[1] == near(0.993307, abs=1e-6)


def test_the_loss_is_the_cross_entropy_of_the_target_among_the_negatives() -> None:
    # v = (1, 0): logits 2, and 0 and 1 of the negatives: ln(1 + e^-2 + e^-1) = 0.407606
    assert read_out(1.0, [[1, 0]], [2, 0], [0, 1], [1, 1]) == near([2, 0, 1, 0.407606], abs=1e-6)


@each_variant
def test_padding_and_other_users_change_nothing(name: str) -> None:
    model = built(VARIANTS[name])
    alone_BKD = vectors(model, [4, 2, 7])
    torch.testing.assert_close(vectors(model, [0, 0, 4, 2, 7]), alone_BKD)
    model.items.weights[0] = 50.0  # the content of the padding row must not matter
    together_BKD = vectors(model, [9, 8, 4, 3, 1], [0, 0, 4, 2, 7])
    torch.testing.assert_close(together_BKD[1:], alone_BKD)


@each_variant
@pytest.mark.parametrize("history", [[], [0, 0]])
def test_a_user_without_history_has_finite_scores(name: str, history: list[int]) -> None:
    model = built(VARIANTS[name])
    batch = Batch(torch.tensor([1]), torch.tensor([history], dtype=torch.int64))
    assert score_items(model, batch, torch.arange(1, 10)).isfinite().all()
    assert user_vectors(model, batch).shape == (1, 4, 8)


def test_the_order_of_items_matters_only_for_models_with_positions() -> None:
    for name, matters in (("mind", True), ("dr", True), ("sa", True), ("dr-by-interest", False)):
        model = built(VARIANTS[name])
        apart = (vectors(model, [4, 2, 7]) - vectors(model, [7, 2, 4])).abs().max()
        assert (apart > 1e-3) == matters, name


@each_variant
def test_gradients_of_a_score_reach_the_items_of_the_history(name: str) -> None:
    model, batch = built(VARIANTS[name]), query_batch([4, 2, 7, 5])
    assert isinstance(model, EncodingModel) and not isinstance(model, InterestModel)
    items_BTD = item_vectors(model)[batch.history_BT].clone().requires_grad_()
    found_BKD = model.encode(items_BTD, batch)
    assert torch.equal(found_BKD, user_vectors(model, batch))
    found_BKD.square().sum().backward()
    assert items_BTD.grad is not None and (items_BTD.grad.abs().sum(2) > 0).all()


@each_original
def test_the_same_seed_builds_the_same_model_and_another_seed_another(name: str) -> None:
    first, again, other = (vectors(built(ORIGINALS[name], seed), [4, 2, 7]) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other)


@each_original
def test_the_checkerboard_is_learned(name: str) -> None:
    """Of all pairs of an own-colour item and another item, more than 90 % are in the right order; 50 % by chance."""
    world = make_world("checkerboard", users=40, items=20, events=1500, spans=1)
    spans = split_log(world.log, by="period", forget_users=0)
    span = spans.spans[0]
    spec = replace(ORIGINALS[name], d=16, negatives=16, batch=64, length=10)
    state = absorb_block(State(spec.build(0)), span.events, span.n_users, span.n_items)
    state = FineTune(FitConfig(base_epochs=12)).update(state, span)
    users_N, items_I = torch.arange(1, span.n_users + 1), torch.arange(1, span.n_items + 1)
    [(which, batch)] = query_batches(history_ends(state.histories, users_N, "recent"), 10)
    scores_NI = score_items(state.model, batch, items_I)
    user_is_odd = torch.tensor(spans.user_catalog.frame["id"].to_list())[users_N[which] - 1] % 2 == 1
    item_is_odd = torch.tensor(spans.item_catalog.frame["id"].to_list()[: span.n_items]) % 2 == 1
    is_own_NI = user_is_odd[:, None] == item_is_odd
    ahead_NII, pairs_NII = scores_NI[:, :, None] > scores_NI[:, None], is_own_NI[:, :, None] & ~is_own_NI[:, None]
    assert ahead_NII[pairs_NII].float().mean() > 0.9
