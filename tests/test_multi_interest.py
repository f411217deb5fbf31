"""Routing and self-attention by hand; independence of padding, of the future, and of other users in a batch."""

import inspect
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from freshrec.models import MODELS
from freshrec.models.multi_interest import DynamicRouting, InitialInterests, InterestNet, InterestSpec, SelfAttention
from freshrec.models.sasrec import SASRec, SASRecSpec
from freshrec.nn.layers import squash
from freshrec.nn.scoring import item_vectors, score_items
from freshrec.types import Batch, ClickModel, EncodingModel, InterestModel, TrainedModel, UserVectorModel, VectorModel

TRAINED = [name for name, spec in MODELS.items() if isinstance(spec.build(0), TrainedModel)]
VECTORS = [name for name in TRAINED if name not in ("embedding-mlp", "mf-biased")]  # their score is an inner product
READERS = [name for name in TRAINED if name not in ("mf", "mf-biased")]  # they read the history
N_ITEMS = 9


def at(vectors_BKD: Tensor) -> InitialInterests:
    """Start extraction from stored interests, all of them alive."""
    return InitialInterests(vectors_BKD, None, None)


def routing(d: int, iterations: int = 3, noise: float = 0.0, recency: bool = False) -> DynamicRouting:
    return DynamicRouting(d, iterations, noise, recency)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def real(*flags: int) -> Tensor:
    """Mask of shape (1, T, 1): 1 for an item, 0 for padding."""
    return torch.tensor(flags, dtype=torch.float32)[None, :, None]


def model_of(name: str, seed: int = 0) -> VectorModel:
    """A small model of 3 users and 9 items, whose item vectors are large enough to affect the scores."""
    model = replace(MODELS[name], d=8, std=1.0).build(seed)  # type: ignore[type-var]
    model.grow(3, N_ITEMS)
    model.eval()
    return model


def scores(model: VectorModel, *histories: list[int], **parts: Tensor) -> Tensor:
    """Scores of all items, (B, 9), for users 1, 2, ... with these histories."""
    batch = Batch(torch.arange(1, len(histories) + 1), torch.tensor(histories), **parts)
    return score_items(model, batch, torch.arange(1, N_ITEMS + 1))


def test_routing_by_hand_for_one_two_and_three_iterations() -> None:
    """[IMSR eq. 4]"""
    # W = 1, items e1 = (1, 0) and e2 = (0, 1), interests start at e1 and e2.
    # 1: item 1 votes (1, 0), its share in interest 1 is 1 / (1 + e^-1) = 0.731059; s_1 = (0.731059, 0.268941),
    #    |s_1|^2 = 0.606776, h_1 = s_1 |s_1| / (1 + |s_1|^2) = (0.354414, 0.130382), h_2 mirrored
    # 2: its votes become (1.354414, 0.130382), its share 1 / (1 + e^-1.224032) = 0.772772; 3: 0.816160
    expected = [(0.354414, 0.130382), (0.377520, 0.111007), (0.401671, 0.090476)]
    for iterations, (x, y) in enumerate(expected, 1):
        vectors_BKD = routing(2, iterations)(torch.eye(2)[None], real(1, 1), at(torch.eye(2)[None]))
        torch.testing.assert_close(vectors_BKD, torch.tensor([[[x, y], [y, x]]]), atol=1e-6, rtol=0)


def test_routing_equals_routing_with_each_item_transformed() -> None:
    """[IMSR eq. 3]"""
    route, items_TD, h_KD = routing(5), random(6, 5), random(3, 5, seed=1)
    route.transform_DD.data = random(5, 5, seed=2)
    sent_TD = torch.stack([route.transform_DD.data @ item_D for item_D in items_TD])  # as printed: W e_i
    votes_TK = torch.zeros(6, 3)
    for _ in range(3):
        votes_TK = votes_TK + sent_TD @ h_KD.t()
        h_KD = squash(torch.softmax(votes_TK, 1).t() @ sent_TD)
    found_BKD = route(items_TD[None], real(*[1] * 6), at(random(3, 5, seed=1)[None]))
    torch.testing.assert_close(found_BKD[0], h_KD)


def test_padding_does_not_change_routing() -> None:
    route, items_BTD, starts_BKD = routing(4), random(1, 3, 4), random(1, 2, 4, seed=1)
    padded_BTD = torch.cat([100 * random(1, 2, 4, seed=2), items_BTD], 1)
    alone = route(items_BTD, real(1, 1, 1), at(starts_BKD))
    torch.testing.assert_close(route(padded_BTD, real(0, 0, 1, 1, 1), at(starts_BKD)), alone)
    assert (route(items_BTD, real(0, 0, 0), at(starts_BKD)) == 0).all()


def test_interests_with_the_same_start_stay_the_same_and_others_do_not() -> None:
    # With one shared transform, only their start makes two interests differ.
    same_BKD = routing(4)(random(1, 5, 4), real(*[1] * 5), at(torch.zeros(1, 3, 4)))
    different_BKD = routing(4)(random(1, 5, 4), real(*[1] * 5), at(random(1, 3, 4, seed=1)))
    assert torch.equal(same_BKD[:, 0], same_BKD[:, 1])
    assert (different_BKD[:, 0] - different_BKD[:, 1]).norm() > 0.1


def test_routing_does_not_depend_on_the_order_of_interests_or_items() -> None:
    route, items_BTD, starts_BKD = routing(4), random(1, 5, 4), random(1, 3, 4, seed=1)
    found_BKD = route(items_BTD, real(*[1] * 5), at(starts_BKD))
    permuted_BKD = route(items_BTD.flip(1), real(*[1] * 5), at(starts_BKD[:, [2, 0, 1]]))
    torch.testing.assert_close(permuted_BKD, found_BKD[:, [2, 0, 1]])


def test_gradients_flow_through_the_last_routing_iteration_only() -> None:
    # The shares are constants, so the start gets no gradient. One iteration with fixed shares gives the same for W.
    starts_BKD = random(1, 2, 4, seed=1).requires_grad_()
    route, items_BTD = routing(4), random(1, 3, 4)
    route(items_BTD, real(1, 1, 1), at(starts_BKD)).sum().backward()
    assert starts_BKD.grad is None
    found_DD, W = route.transform_DD.grad, torch.eye(4, requires_grad=True)
    votes_TK = sum(items_BTD[0] @ h_KD.t() for h_KD in (starts_BKD[0], *_middle(items_BTD, starts_BKD)))
    squash(torch.softmax(votes_TK.detach(), 1).t() @ items_BTD[0] @ W.t()).sum().backward()
    torch.testing.assert_close(found_DD, W.grad)


def _middle(items_BTD: Tensor, starts_BKD: Tensor) -> list[Tensor]:
    """The interests after one and two iterations."""
    return [routing(4, n)(items_BTD, real(1, 1, 1), at(starts_BKD))[0] for n in (1, 2)]


def test_recency_reduces_the_weight_of_an_item_with_its_age() -> None:
    # One interest gets all items. With exp(log_fading) = ln 2, an item has half the weight of the next one.
    route = routing(2, recency=True)
    assert route.log_fading is not None
    route.log_fading.data = torch.tensor(math.log(math.log(2)))
    found_BKD = route(torch.eye(2)[None], real(1, 1), at(torch.ones(1, 1, 2)))
    torch.testing.assert_close(found_BKD, squash(torch.tensor([[[0.5, 1.0]]])))


def test_noise_in_the_routing_is_for_training_only() -> None:
    route, arguments = routing(4, noise=1.0), (random(1, 5, 4), real(*[1] * 5), at(random(1, 3, 4, seed=1)))
    assert not torch.equal(route(*arguments), route(*arguments))
    route.eval()
    assert torch.equal(route(*arguments), route(*arguments))
    torch.testing.assert_close(route(*arguments), routing(4)(*arguments))


def test_noise_in_the_routing_is_for_new_users_only() -> None:
    route, items_BTD, starts_BKD = routing(4, noise=1.0), random(2, 5, 4), random(2, 3, 4, seed=1)
    real_BT1 = torch.ones(2, 5, 1)
    found_BKD = route(items_BTD, real_BT1, InitialInterests(starts_BKD, None, torch.tensor([True, False])))
    quiet_BKD = routing(4)(items_BTD, real_BT1, at(starts_BKD))
    assert not torch.equal(found_BKD[0], quiet_BKD[0])
    torch.testing.assert_close(found_BKD[1], quiet_BKD[1])


def attention() -> SelfAttention:
    """No positions, W_1 = (1, 0), W_u = ln 3 / tanh 1 and 0: items (0, 1), (1, 0) have logits 0, ln 3, or 0, 0."""
    layer = SelfAttention(d=2, d_inner=1, k_max=2, length=4, rng=torch.Generator())
    layer.positions_TD.data.zero_()
    layer.inner_AD.data = torch.tensor([[1.0, 0.0]])
    layer.queries_KA.data = torch.tensor([[math.log(3) / math.tanh(1)], [0.0]])
    return layer


def test_self_attention_by_hand() -> None:
    """[IMSR eq. 8]"""
    # Interest 1: shares 1 : 3, so 0.25 (0, 1) + 0.75 (1, 0); interest 2 is the mean. The padding, (9, 9), is ignored.
    items_BTD = torch.tensor([[[9.0, 9.0], [0.0, 1.0], [1.0, 0.0]]])
    found_BKD = attention()(items_BTD, real(0, 1, 1), at(torch.zeros(1, 2, 2)))
    torch.testing.assert_close(found_BKD, torch.tensor([[[0.75, 0.25], [0.5, 0.5]]]))


def test_self_attention_over_nothing_but_padding_is_zero_with_finite_gradients() -> None:
    layer = attention()
    found_BKD = layer(torch.zeros(1, 3, 2), real(0, 0, 0), at(torch.zeros(1, 2, 2)))
    found_BKD.sum().backward()
    assert (found_BKD == 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("name", [name for name in READERS if name in VECTORS])
def test_padding_changes_nothing(name: str) -> None:
    model, short = model_of(name), scores(model_of(name), [4, 2, 7])
    torch.testing.assert_close(scores(model, [0, 0, 4, 2, 7]), short)
    item_vectors(model)[0] = 50.0  # the content of the padding row must not matter
    torch.testing.assert_close(scores(model, [0, 0, 4, 2, 7]), short)


@pytest.mark.parametrize("name", TRAINED)
def test_other_users_in_the_batch_change_nothing(name: str) -> None:
    model = model_of(name)
    together = scores(model, [4, 2, 7], [0, 1, 1], [0, 0, 0])
    torch.testing.assert_close(together[:1], scores(model, [4, 2, 7]))


@pytest.mark.parametrize("name", TRAINED)
def test_items_per_row_score_the_same_as_shared_items(name: str) -> None:
    model, items_N = model_of(name), torch.tensor([3, 1, 9])
    batch = Batch(torch.tensor([1, 2]), torch.tensor([[4, 2], [0, 8]]))
    torch.testing.assert_close(score_items(model, batch, items_N.expand(2, -1)), score_items(model, batch, items_N))


@pytest.mark.parametrize("name", VECTORS)
def test_growth_changes_no_score_of_known_users_and_items(name: str) -> None:
    model, before = model_of(name), scores(model_of(name), [4, 2, 7])
    model.grow(8, 30)
    assert torch.equal(scores(model, [4, 2, 7]), before)
    assert (model.n_users, model.n_items, len(item_vectors(model))) == (8, 30, 31)


def test_sasrec_does_not_see_the_future() -> None:
    # One training pass gives the output at each position. The last item must change only the last output.
    model = SASRec(SASRecSpec(d=8, std=1.0, dropout=0.0), seed=0)
    model.grow(1, N_ITEMS)
    outputs = []
    for last in (5, 6):
        history_BT, targets_BT = torch.tensor([[0, 4, 2, last]]), torch.tensor([[0, 2, 7, 8]])
        batch = Batch(torch.tensor([1]), history_BT, targets_BT, negatives_N=torch.tensor([1, 3]))
        outputs.append(model(batch).vectors_BKD[:, 0].detach())
    assert torch.equal(outputs[0][:2], outputs[1][:2])
    assert (outputs[0][2] - outputs[1][2]).abs().max() > 0.1


@pytest.mark.parametrize("loss", ["sampled", "bce", "full"])
def test_the_loss_of_sasrec_uses_the_scores_that_it_serves(loss: str) -> None:
    # The last position has target 8. The loss uses the served scores of 8, and of items 1 and 3 or of all items.
    model = SASRec(SASRecSpec(d=8, std=1.0, dropout=0.0, predict="last", loss=loss), seed=0)  # type: ignore[arg-type]
    model.grow(1, N_ITEMS)
    history_BT, negatives_N = torch.tensor([[4, 2]]), torch.tensor([1, 3])
    found = model(Batch(torch.tensor([1]), history_BT, torch.tensor([[8]]), negatives_N)).loss
    served_I = score_items(model, Batch(torch.tensor([1]), history_BT), torch.arange(1, N_ITEMS + 1))[0]
    others_N = served_I if loss == "full" else served_I[[7, 0, 2]]
    expected = torch.logsumexp(others_N, 0) - served_I[7]
    if loss == "bce":
        expected = torch.log1p(torch.exp(-served_I[7])) + torch.log1p(torch.exp(served_I[[0, 2]])).mean()
    torch.testing.assert_close(found, expected)


def test_mf_reads_users_and_not_histories() -> None:
    model = model_of("mf")
    assert torch.equal(scores(model, [4, 2]), scores(model, [9, 9]))
    unknown = Batch(torch.tensor([17]), torch.tensor([[4, 2]]))
    assert score_items(model, unknown, torch.tensor([1, 2])).tolist() == [[0, 0]]


@pytest.mark.parametrize("name", ["mind", "comirec-dr", "comirec-sa"])
def test_scores_of_a_user_with_few_interests_do_not_depend_on_a_user_with_many(name: str) -> None:
    model = model_of(name)
    assert isinstance(model, InterestModel)
    stored_BKD = random(2, 4, 8)
    alive_BK = torch.tensor([[True, True, False, False], [True] * 4])
    together = scores(model, [4, 2], [1, 3], interests_BKD=stored_BKD, alive_BK=alive_BK)
    alone = scores(model, [4, 2], interests_BKD=stored_BKD[:1, :2], alive_BK=alive_BK[:1, :2])
    torch.testing.assert_close(together[:1], alone)


@pytest.mark.parametrize("name", TRAINED)
def test_the_same_seed_builds_the_same_model_and_another_seed_another(name: str) -> None:
    first, again, other = (scores(model_of(name, seed), [4, 2, 7]) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_a_new_user_starts_with_distinct_directions_of_norm_below_one() -> None:
    # With norm sqrt(d) = 8, as in the paper's N(0, I), new interests would attract all items of the stored ones.
    model = InterestNet(InterestSpec(), seed=0)
    starts_KD = model.initial_interests(12)
    assert (starts_KD.norm(dim=1) < 1).all() and (starts_KD.norm(dim=1) > 0.9).all()
    cosines_KK = torch.nn.functional.normalize(starts_KD) @ torch.nn.functional.normalize(starts_KD).t()
    assert (cosines_KK - torch.eye(12)).abs().max() < 0.6  # 4.8 standard deviations of a cosine at d = 64


@pytest.mark.parametrize("name", MODELS)
def test_all_members_of_a_protocol_are_found_statically(name: str) -> None:
    # isinstance works like this from Python 3.12 on: it does not see the parts of a Module, which `__getattr__` returns
    model = MODELS[name].build(0)
    for protocol in (TrainedModel, ClickModel, EncodingModel, UserVectorModel, InterestModel):
        if isinstance(model, protocol):
            required = {x for kind in protocol.__mro__ if kind.__module__ == "freshrec.types" for x in members(kind)}
            for member in required:
                inspect.getattr_static(model, member)


def members(protocol: type) -> set[str]:
    """The names that a protocol itself declares."""
    return {x for x in (*vars(protocol), *inspect.get_annotations(protocol)) if not x.startswith("_")}
