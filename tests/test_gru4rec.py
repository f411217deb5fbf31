"""GRU4Rec by hand: losses, negatives and steps; independence of padding and the future; a world to learn."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.config import find_instance
from freshrec.data.batches import history_ends, query_batches
from freshrec.data.split import LogSplit, split_log
from freshrec.data.synthetic import make_world
from freshrec.errors import OptionError
from freshrec.learn.exemplars import exemplar_batch
from freshrec.learn.fit import FitConfig
from freshrec.learn.reservoir import TrainingSamples
from freshrec.models.absorb import absorb_block
from freshrec.models.gru4rec import (
    GRU4Rec,
    GRU4RecSpec,
    Loss,
    bpr,
    bpr_max,
    popularity_distribution,
    sample_by_quantile,
    top1,
    top1_max,
)
from freshrec.nn.full_softmax import full_softmax_loss
from freshrec.nn.layers import MASKED, max_inner_product, sampled_softmax_loss
from freshrec.nn.scoring import item_vectors, score_items, user_vectors
from freshrec.strategies import STRATEGIES
from freshrec.strategies.ewc import EWC, empirical_fisher
from freshrec.types import Batch, EncodingModel, Forward, State

near = pytest.approx
N_ITEMS = 9
QUIET = GRU4RecSpec(d=4, std=0.7, drop_in=0.0, drop_out=0.0, alpha=0.0, batch_negatives=0, loss="xe")
VARIANTS = [QUIET, replace(QUIET, hidden=6), replace(QUIET, layers=2), replace(QUIET, embeddings="separate")]
each_variant = pytest.mark.parametrize("spec", VARIANTS, ids=["plain", "hidden", "layers", "separate"])


def model_of(spec: GRU4RecSpec = QUIET, n_items: int = N_ITEMS) -> GRU4Rec:
    model = spec.build(0)
    model.grow(3, n_items)
    return model


def training_pass(model: GRU4Rec, history: list[int], targets: list[int], negatives: list[int]) -> Forward:
    """Run one training pass over the window of one user."""
    history_BT, targets_BT = torch.tensor([history]), torch.tensor([targets])
    return model(Batch(torch.tensor([1]), history_BT, targets_BT, torch.tensor(negatives)))  # type: ignore[no-any-return]


# Losses. The target scores 1 and the negatives 0 and 2, by default.

TARGET_B, NEGATIVE_BN, BOTH_BN = torch.tensor([1.0]), torch.tensor([[0.0, 2.0]]), torch.tensor([[True, True]])


def test_cross_entropy_by_hand() -> None:
    # the log of e^1 + e^0 + e^2, minus 1
    assert sampled_softmax_loss(torch.cat([TARGET_B[:, None], NEGATIVE_BN], 1)).item() == near(1.407606, abs=1e-6)


def test_bpr_by_hand() -> None:
    # (-ln sigma(1) - ln sigma(-1)) / 2 = (0.313262 + 1.313262) / 2
    assert bpr(TARGET_B, NEGATIVE_BN, BOTH_BN).item() == near(0.813262, abs=1e-6)
    # 0 and 2 have the same distance from 1, so a wrong sign would not show. With 3 for 2: (0.313262 + 2.126928) / 2
    assert bpr(TARGET_B, torch.tensor([[0.0, 3.0]]), BOTH_BN).item() == near(1.220095, abs=1e-6)


def test_top1_by_hand() -> None:
    # (sigma(-1) + sigma(0) + sigma(1) + sigma(4)) / 2 = (0.268941 + 0.5 + 0.731059 + 0.982014) / 2
    assert top1(TARGET_B, NEGATIVE_BN, BOTH_BN).item() == near(1.241007, abs=1e-6)


def test_bpr_max_by_hand() -> None:
    # w = softmax(0, 2) = (0.119203, 0.880797), without the target. Loss: -ln(w_1 sigma(1) + w_2 sigma(-1)), plus
    # 0.9 times w_2 x 2^2 = 3.523188.
    assert bpr_max(TARGET_B, NEGATIVE_BN, BOTH_BN, 0.0).item() == near(1.126928, abs=1e-6)
    regularised = bpr_max(TARGET_B, NEGATIVE_BN, BOTH_BN, 0.9).item()
    assert regularised == near(1.126928 + 0.9 * 3.523188, abs=1e-6)


def test_top1_max_by_hand() -> None:
    # The same w: 0.119203 (0.268941 + 0.5) + 0.880797 (0.731059 + 0.982014).
    assert top1_max(TARGET_B, NEGATIVE_BN, BOTH_BN).item() == near(1.600529, abs=1e-6)


def test_the_elu_is_applied_to_the_scores_first() -> None:
    # With alpha = 0.5, the score -ln 2 becomes 0.5 (1 / 2 - 1) = -0.25, and 1 stays 1.
    low_BN = torch.tensor([[1.0, -0.6931472]])
    after_elu_BN = torch.tensor([[1.0, -0.25]])
    found = bpr_max(low_BN[:, 1], low_BN, BOTH_BN, 0.9, elu=0.5)
    torch.testing.assert_close(found, bpr_max(after_elu_BN[:, 1], after_elu_BN, BOTH_BN, 0.9))
    assert abs(found.item() - bpr_max(low_BN[:, 1], low_BN, BOTH_BN, 0.9).item()) > 0.1


@pytest.mark.parametrize("loss", [bpr, top1, top1_max, *(partial(bpr_max, bpreg=0.9, elu=elu) for elu in (0.0, 1.0))])
def test_a_negative_that_is_the_target_is_ignored(loss: Callable[..., Tensor]) -> None:
    with_it_BN = torch.tensor([[0.0, MASKED, 2.0]]).requires_grad_()
    found = loss(TARGET_B, with_it_BN, torch.tensor([[True, False, True]]))
    torch.testing.assert_close(found, loss(TARGET_B, NEGATIVE_BN, BOTH_BN))
    found.backward()
    assert with_it_BN.grad is not None and with_it_BN.grad[0, 1] == 0 and with_it_BN.grad[0, 2] != 0
    assert loss(TARGET_B, torch.tensor([[MASKED, MASKED]]), ~BOTH_BN).abs() < 1


@pytest.mark.parametrize(
    ("loss", "expected"),
    [("xe", 1.407606), ("bpr", 0.813262), ("top1", 1.241007), ("bpr-max", 4.297797), ("top1-max", 1.600529)],
)
def test_the_model_trains_with_the_loss_of_its_name(loss: Loss, expected: float) -> None:
    # d = 1 and the user's vector is h = 0.204824 (see below). The target's vector is 1 / h, the negatives' 0 and 2 / h.
    model = by_hand(loss=loss)
    model.items.weights[2:5, 0] = torch.tensor([1.0, 0.0, 2.0]) / 0.20482421
    assert training_pass(model, [1], [2], [3, 2, 4]).loss.item() == near(expected, abs=1e-4)


# Negatives.


def test_popularity_to_the_power_of_alpha() -> None:
    counts_I = torch.tensor([8, 1, 1])
    assert popularity_distribution(counts_I, 0.5).tolist() == near([0.585786, 0.207107, 0.207107], abs=1e-6)
    assert popularity_distribution(counts_I, 0.75).tolist() == near([0.704003, 0.147998, 0.147998], abs=1e-6)
    assert popularity_distribution(counts_I, 0.0).tolist() == near([1 / 3] * 3)


def test_an_item_is_drawn_for_a_range_of_quantiles_as_long_as_its_probability() -> None:
    at_N = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 0.999999999])
    assert sample_by_quantile(torch.tensor([0.5, 0.0, 0.25, 0.25]), at_N).tolist() == [0, 0, 2, 2, 3, 3]


def training_batch(history: list[int], targets: list[int], uniform_N: Tensor) -> Batch:
    return Batch(torch.tensor([1]), torch.tensor([history]), torch.tensor([targets]), uniform_N)


def test_negatives_are_drawn_by_their_counts_as_targets() -> None:
    # Targets: item 2 seven times, item 3 once. With 1 added to each count: 1, 8, 2, 1 of 12. Each of 1,200 quantile
    # ranges of equal length gives one item.
    model = model_of(replace(QUIET, alpha=1.0), n_items=4)
    first_1200 = model.draw_negatives(training_batch([1] * 8, [2] * 7 + [3], torch.ones(1200)))
    assert model.counts_I.tolist() == [0, 0, 7, 1, 0]
    assert torch.bincount(first_1200)[1:].tolist() == [100, 800, 200, 100]
    without_targets = training_batch([1], [0], torch.ones(10))
    drawn_RN = torch.stack([model.draw_negatives(without_targets) for _ in range(300)])
    assert torch.bincount(drawn_RN.flatten())[1:].tolist() == near([250, 2000, 500, 250], abs=60)
    assert len(drawn_RN.unique(dim=0)) > 1  # the draws are random


def test_with_alpha_zero_negatives_are_those_of_the_batch() -> None:
    assert model_of().draw_negatives(training_batch([1], [2], torch.tensor([4, 4, 1]))).tolist() == [4, 4, 1]


def test_the_forward_pass_draws_nothing_and_counts_nothing() -> None:
    # So a teacher that reads the batch of its student scores the same items.
    model = model_of(replace(QUIET, alpha=1.0))
    for is_training in (True, False):
        model.train(is_training)
        logits_BN = training_pass(model, [1, 2], [2, 3], [4, 7]).logits_BN
        vectors_BKD = training_pass(model, [1, 2], [2, 3], [4, 7]).vectors_BKD
        assert logits_BN is not None and vectors_BKD is not None
        torch.testing.assert_close(logits_BN[:, 1:], vectors_BKD[:, 0] @ model.items.weights[[4, 7]].t())
        assert model.counts_I.sum() == 0


def test_some_targets_of_the_batch_are_negatives_of_the_others() -> None:
    # The negatives from targets 5, 6, 7 are the first and the last. Each is masked where it is the target itself.
    model = model_of(replace(QUIET, batch_negatives=2))
    forward = training_pass(model, [1, 2, 3], [5, 6, 7], [4])
    assert forward.logits_BN is not None and forward.vectors_BKD is not None
    torch.testing.assert_close(forward.logits_BN[1, 1:], model.items.weights[[4, 5, 7]] @ forward.vectors_BKD[1, 0])
    assert (forward.logits_BN == MASKED).nonzero().tolist() == [[0, 2], [2, 3]]
    assert training_pass(model_of(replace(QUIET, batch_negatives=50)), [1, 2], [5, 6], [4]).logits_BN.shape == (2, 4)  # type: ignore[union-attr]


def test_logq_subtracts_the_log_probability_from_each_score() -> None:
    # P of targets: 1, 8, 2, 1 of 12. P of sampled negatives (alpha = 0.5): roots 1, 2.828, 1.414, 1 of 6.243.
    model = model_of(replace(QUIET, alpha=0.5, batch_negatives=1, logq=0.7), n_items=4)
    model.counts_I += torch.tensor([0, 0, 7, 1, 0])
    found = training_pass(model, [1], [3], [2])  # sampled: item 2; from the batch: item 3, the target
    assert found.logits_BN is not None
    less_BN = 0.7 * torch.log(torch.tensor([[2 / 12, 2.828427 / 6.242641, 2 / 12]]))
    assert found.loss.item() == near(sampled_softmax_loss(found.logits_BN - less_BN).item(), rel=1e-5)
    assert found.loss.item() != near(sampled_softmax_loss(found.logits_BN).item(), rel=1e-3)


# The network.


def by_hand(loss: Loss = "xe") -> GRU4Rec:
    """One unit: the item's vector is the input of all gates, and the state enters the candidate only."""
    model = model_of(replace(QUIET, d=1, loss=loss))
    layer = model.layers[0]
    assert isinstance(layer, torch.nn.GRU)
    layer.weight_ih_l0.data = torch.ones(3, 1)
    layer.weight_hh_l0.data = torch.tensor([[0.0], [0.0], [1.0]])  # reset, update, candidate
    model.items.weights[1:3, 0] = torch.tensor([1.0, 0.0])
    return model


def test_two_steps_by_hand() -> None:
    # Item 1 is 1: both gates sigma(1) = 0.731059, candidate tanh(1) = 0.761594, h = 0.268941 x 0.761594 = 0.204824.
    # Item 2 is 0: both gates 0.5, candidate tanh(0.5 x 0.204824) = 0.102056, h = (0.102056 + 0.204824) / 2 = 0.153440.
    for history, h in [([1], 0.204824), ([1, 2], 0.153440)]:
        found = user_vectors(by_hand(), Batch(torch.tensor([1]), torch.tensor([history])))
        assert found.flatten().tolist() == near([h], abs=1e-6)


def outputs(model: GRU4Rec, history: list[int]) -> Tensor:
    """(T, D) the output at each real position, from one training pass."""
    vectors = training_pass(model, history, [9] * len(history), [1]).vectors_BKD
    assert vectors is not None
    return vectors[:, 0].detach()


@each_variant
def test_no_output_depends_on_padding_or_on_later_events(spec: GRU4RecSpec) -> None:
    whole_TD = outputs(model_of(spec), [4, 2, 7])
    for history in ([0, 0, 4, 2, 7], [4, 0, 2, 0, 7], [4, 2, 7, 0]):
        model = model_of(spec)
        model.layers[0].get_parameter("bias_ih_l0").data += 0.5
        full_TD = outputs(model, [4, 2, 7])
        model.items.weights[0] = 50.0
        torch.testing.assert_close(outputs(model, history), full_TD)
    torch.testing.assert_close(outputs(model_of(spec), [4, 2, 8])[:2], whole_TD[:2])
    assert (outputs(model_of(spec), [4, 2, 8])[2] - whole_TD[2]).abs().max() > 1e-2
    assert (outputs(model_of(spec), [2, 4, 7])[2] - whole_TD[2]).abs().max() > 1e-3  # the order matters


@each_variant
def test_the_served_vector_is_the_output_at_the_last_event(spec: GRU4RecSpec) -> None:
    model = model_of(spec)
    model.eval()
    model.layers[0].get_parameter("bias_ih_l0").data += 0.5  # so that every step changes the state
    histories_BT = torch.tensor([[0, 4, 2, 7], [0, 0, 0, 0], [4, 2, 7, 0]])
    batch = Batch(torch.tensor([1, 2, 3]), histories_BT)
    served_BD = user_vectors(model, batch)[:, 0]
    torch.testing.assert_close(served_BD[0], outputs(model, [4, 2, 7])[2])
    torch.testing.assert_close(served_BD[2], served_BD[0])
    assert (served_BD[1] == 0).all() and served_BD.shape == (3, spec.d)
    no_steps = Batch(torch.tensor([1]), torch.zeros(1, 0, dtype=torch.int64))
    assert torch.equal(user_vectors(model, no_steps), torch.zeros(1, 1, spec.d))
    items_N = torch.tensor([3, 1])
    torch.testing.assert_close(score_items(model, batch, items_N), served_BD @ model.items.weights[items_N].t())


def test_input_and_output_share_item_vectors_unless_they_are_separate() -> None:
    for spec, moved in [(QUIET, True), (replace(QUIET, embeddings="separate"), False)]:
        model = model_of(spec)
        before = outputs(model, [4, 2])
        model.items.weights[4] += 1.0
        assert (not torch.equal(outputs(model, [4, 2]), before)) is moved
        if model.taken is not None:
            model.taken.weights[4] += 1.0
            assert not torch.equal(outputs(model, [4, 2]), before)


@pytest.mark.parametrize("layers", [1, 2])
def test_with_bptt_one_the_gradient_goes_back_one_step(layers: int) -> None:
    # The outputs are the same. Only the last position has a target, so the earlier item 5 learns with "all" only.
    moved = {}
    for back in ("all", "one"):
        model = model_of(replace(QUIET, bptt=back, layers=layers))
        forward = training_pass(model, [5, 6], [0, 7], [8])
        forward.loss.backward()
        ids_N, rows_ND = model.items.step_rows()
        assert rows_ND.grad is not None and forward.vectors_BKD is not None
        moved[back] = set(ids_N[rows_ND.grad.any(1)].tolist())
        served_BKD = user_vectors(model, Batch(torch.tensor([1]), torch.tensor([[5, 6]])))
        torch.testing.assert_close(forward.vectors_BKD.detach(), served_BKD)
    assert moved == {"all": {5, 6, 7, 8}, "one": {6, 7, 8}}


def test_with_bptt_one_a_step_has_the_gradient_of_a_step_from_a_constant_state() -> None:
    model = model_of(replace(QUIET, bptt="one"))
    cell, (layer,) = torch.nn.GRUCell(4, 4), model.layers
    cell.load_state_dict({name.removesuffix("_l0"): weights for name, weights in layer.state_dict().items()})
    h_1D, loss, items_TD = torch.zeros(1, 4), torch.zeros(()), model.items.weights[[5, 6, 3]]
    for t, target in enumerate([6, 3, 7]):
        h_1D = cell(items_TD[t : t + 1], h_1D.detach())
        loss = loss + F.cross_entropy(h_1D @ model.items.weights[[target, 8]].t(), torch.tensor([0])) / 3
    loss.backward()
    training_pass(model, [5, 6, 3], [6, 3, 7], [8]).loss.backward()
    for name, weights in cell.named_parameters():
        torch.testing.assert_close(layer.get_parameter(f"{name}_l0").grad, weights.grad)


def test_each_gate_is_initialised_by_the_size_of_its_own_matrix() -> None:
    # +-sqrt(6 / (fan in + fan out)): 0.433 for 8 x 24 and 0.354 for 24 x 24. For all gates together it would be 0.25.
    model = GRU4RecSpec(d=8, hidden=24).build(0)
    layer = model.layers[0]
    assert model.last is not None
    assert layer.get_parameter("weight_ih_l0").abs().max().item() == near(0.433, abs=0.01)
    assert layer.get_parameter("weight_hh_l0").abs().max().item() == near(0.354, abs=0.01)
    assert model.last.weight.abs().max().item() == near(0.433, abs=0.01)
    assert not layer.get_parameter("bias_ih_l0").any() and not layer.get_parameter("bias_hh_l0").any()


@pytest.mark.parametrize("rate", ["drop_in", "drop_out"])
def test_dropout_is_for_training_only(rate: str) -> None:
    model = model_of(replace(QUIET, **{rate: 0.5}))  # type: ignore[arg-type]
    assert not torch.equal(outputs(model, [4, 2, 7]), outputs(model, [4, 2, 7]))
    model.eval()
    torch.testing.assert_close(outputs(model, [4, 2, 7]), outputs(model_of(), [4, 2, 7]))


def test_growth_changes_no_score_of_known_items() -> None:
    for spec in VARIANTS:
        model, batch = model_of(spec), Batch(torch.tensor([1]), torch.tensor([[4, 2]]))
        before = score_items(model, batch, torch.arange(1, 10))
        model.counts_I[3] = 5
        model.grow(8, 30)
        assert torch.equal(score_items(model, batch, torch.arange(1, 10)), before)
        assert (model.n_users, model.n_items, len(item_vectors(model)), len(model.counts_I)) == (8, 30, 31, 31)
        assert model.counts_I.tolist() == [0, 0, 0, 5] + [0] * 27


def test_invalid_options_are_refused() -> None:
    for wrong in ("loss=bprmax", "bptt=two", "embeddings=onehot", "alpha=-1", "drop_in=1"):
        with pytest.raises(OptionError, match=wrong.partition("=")[0]):
            find_instance("model", f"gru4rec:{wrong}", {"gru4rec": QUIET})
    with pytest.raises(OptionError, match="logq works with loss=xe only"):
        GRU4RecSpec(logq=1.0).build(0)


# Strategies that need gradients of the model.


@each_variant
def test_the_scores_of_all_items_have_gradients(spec: GRU4RecSpec) -> None:
    model = model_of(spec)
    assert isinstance(model, EncodingModel)
    forward = training_pass(model, [4, 2], [0, 7], [8])
    rows_RD, batch = model.items.full_matrix(), Batch(torch.tensor([1]), torch.tensor([[4, 2]]))
    user_BD = model.encode(F.embedding(batch.history_BT, rows_RD), batch)[:, 0]
    torch.testing.assert_close(user_BD, user_vectors(model, batch)[:, 0])
    full_softmax_loss(user_BD, rows_RD, torch.tensor([7])).backward()
    input_table = model.items if model.taken is None else model.taken
    ids_N, rows_ND = input_table.step_rows()
    assert rows_ND.grad is not None and rows_ND.grad[(ids_N == 4) | (ids_N == 2)].any(1).all()
    assert forward.loss.isfinite() and all(weights.grad is not None for weights in model.parameters())


@each_variant
def test_the_fisher_information_is_the_mean_of_squared_gradients_of_single_samples(spec: GRU4RecSpec) -> None:
    model, histories_NT = model_of(spec), torch.tensor([[0, 1, 2], [4, 5, 4], [0, 0, 6]], dtype=torch.int32)
    model.eval()
    kept = TrainingSamples(torch.tensor([1, 2, 3]), histories_NT, torch.tensor([3, 4, 7]))
    expected: dict[str, Tensor] = {}
    for n in range(3):
        batch, items_RD = (
            exemplar_batch(kept, torch.tensor([n]), model, None),
            model.items.weights.clone().requires_grad_(),
        )
        vectors_BKD = model.encode(F.embedding(batch.history_BT, items_RD), batch)
        loss = F.cross_entropy(max_inner_product(vectors_BKD, items_RD[1:]), kept.items_N[n : n + 1] - 1)
        weights = {"items": items_RD} | dict(model.named_parameters())
        for name, slope in zip(weights, torch.autograd.grad(loss, list(weights.values()))):
            expected[name] = expected.get(name, torch.zeros(())) + slope.square() / 3
    found = empirical_fisher(model, kept, None)
    for name, squares in expected.items():
        torch.testing.assert_close(found[name], squares, rtol=1e-3, atol=1e-7)


# A world to learn: even users take only even items, and odd users only odd items.


@cache
def checkerboard() -> LogSplit:
    return split_log(
        make_world("checkerboard", users=60, items=40, events=2500, spans=2).log, by="period", forget_users=0
    )


def replayed(spec: GRU4RecSpec, name: str, base_epochs: int, epochs: int) -> State:
    """The state after all spans."""
    strategy = STRATEGIES[name]
    fit: FitConfig = replace(strategy.fit, base_epochs=base_epochs, epochs=epochs)  # type: ignore[attr-defined]
    strategy = replace(strategy, fit=fit)  # type: ignore[type-var]
    strategy = replace(strategy, samples=20) if isinstance(strategy, EWC) else strategy
    state = State(replace(spec, d=16, negatives=32, batch=8).build(0))
    for span in checkerboard().spans:
        state = strategy.update(absorb_block(state, span.events, span.n_users, span.n_items), span)
    return state


def in_order(state: State) -> float:
    """The share of pairs, an own-colour item and another item, that are in the right order; 0.5 by chance."""
    spans = checkerboard()
    users_N = (state.histories.offsets_U.diff() > 0).nonzero()[:, 0]
    scores_NI = torch.empty(len(users_N), state.model.n_items)
    for which, batch in query_batches(history_ends(state.histories, users_N, "recent"), 50):
        scores_NI[which] = score_items(state.model, batch, torch.arange(1, state.model.n_items + 1))
    user_is_odd = torch.tensor(spans.user_catalog.frame["id"].to_list())[users_N - 1] % 2 == 1
    item_is_odd = torch.tensor(spans.item_catalog.frame["id"].to_list()) % 2 == 1
    is_own_NI = user_is_odd[:, None] == item_is_odd
    ahead_NII = scores_NI[:, :, None] > scores_NI[:, None]
    return float(ahead_NII[is_own_NI[:, :, None] & ~is_own_NI[:, None]].float().mean())


OPTION_SETS = {
    "xe": GRU4RecSpec(loss="xe"),
    "bpr": GRU4RecSpec(loss="bpr"),
    "top1": GRU4RecSpec(loss="top1"),
    "top1-max": GRU4RecSpec(loss="top1-max"),
    "linear": GRU4RecSpec(elu=0.0),
    "logq": GRU4RecSpec(loss="xe", logq=1.0),
    "separate": GRU4RecSpec(embeddings="separate"),
    "one": GRU4RecSpec(bptt="one"),
    "lanes": GRU4RecSpec(steps="session-parallel"),
    "deep": GRU4RecSpec(layers=2, hidden=24),
    "uniform": GRU4RecSpec(alpha=0.0, batch_negatives=0),
}


def test_the_default_learns_the_checkerboard() -> None:
    assert in_order(replayed(GRU4RecSpec(), "finetune", 20, 5)) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("spec", OPTION_SETS.values(), ids=OPTION_SETS)
def test_variants_learn_the_checkerboard(spec: GRU4RecSpec) -> None:
    # With the default lr, 20 epochs are too many for this small log: top1 reaches 0.86 (lr = 0.01, 8 epochs: 0.94).
    assert in_order(replayed(replace(spec, lr=0.003), "finetune", 12, 5)) > 0.9


@pytest.mark.parametrize(
    "spec", [GRU4RecSpec(), OPTION_SETS["separate"], OPTION_SETS["lanes"]], ids=["plain", "separate", "lanes"]
)
@pytest.mark.parametrize("strategy", ["finetune", "ader", "ewc"])
def test_the_same_seed_gives_the_same_bits(spec: GRU4RecSpec, strategy: str, bits: Callable[[State], bytes]) -> None:
    first = bits(replayed(spec, strategy, 1, 1))
    torch.manual_seed(99)  # the global random state does not matter
    assert bits(replayed(spec, strategy, 1, 1)) == first
