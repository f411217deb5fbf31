"""The generators of ASMG: each equation by hand, the number of weights, and how rows and windows behave."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freshrec.learn.generators import (
    GRUGenerator,
    MeanGenerator,
    ModelGenerator,
    ModelWindow,
    gru_step,
    loss_weights,
    new_generator,
    readout,
    weighted_mean,
)
from freshrec.nn.embedding_table import EmbeddingTable
from freshrec.random_streams import stream

near = pytest.approx


class Net(nn.Module):
    """A model with tables of 8 dimensions and a multilayer perceptron."""

    def __init__(self, n_tables: int, *widths: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(EmbeddingTable(8, 0.1, seed) for seed in range(n_tables))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))


def gru(n_slots: int, h: int = 4, *, residual: bool = False, seed: int = 0) -> GRUGenerator:
    return GRUGenerator.initial(n_slots, h, residual, stream(seed, "test"))


def make(n_slots: int, source: torch.Generator) -> GRUGenerator:
    return GRUGenerator.initial(n_slots, 4, False, source)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def steps(theta: list[float], recurrent: float) -> list[float]:
    """Return the states of a slot with one hidden unit and input weights of 1."""
    h_PHN, states = torch.zeros(1, 1, 1), []
    for x in theta:
        h_PHN = gru_step(torch.tensor([[x]]), h_PHN, torch.ones(1, 3), torch.full((1, 3, 1), recurrent))
        states.append(h_PHN.item())
    return states


def test_the_recurrent_cell_by_hand() -> None:
    """[ASMG eq. gru] T23"""
    # theta = 1, h = 0: z = sigma(1) = 0.731059, g = tanh(1) = 0.761594, h' = z g = 0.556770. Then
    # h'' = (1 - z) h' + z g = 0.268941 * 0.556770 + 0.556770 = 0.706508
    assert steps([1.0, 1.0], recurrent=0.0) == near([0.556770, 0.706508], abs=1e-6)
    # With recurrent weights of 1, the second step: z = r = sigma(-0.5 + 0.556770) = 0.514189,
    # g = tanh(-0.5 + 0.514189 * 0.556770) = -0.210531, h'' = 0.485811 * 0.556770 - 0.514189 * 0.210531 = 0.162238
    assert steps([1.0, -0.5, 0.25], recurrent=1.0) == near([0.556770, 0.162238, 0.265725], abs=1e-6)


def test_the_recurrent_cell_differs_from_the_one_of_torch() -> None:
    """T25: torch applies the reset gate after the product, and its z weighs the old state."""
    cell = gru(1)
    torch_cell = nn.GRUCell(1, 4, bias=False)
    order = torch.cat([torch.arange(4, 8), torch.arange(4), torch.arange(8, 12)])  # here z, r, g; in torch r, z, n
    with torch.no_grad():
        torch_cell.weight_ih.copy_(cell.u_PG[0][order, None])
        torch_cell.weight_hh.copy_(cell.W_PGH[0][order])
    h, theta = noise(1, 4), noise(1, 1)
    found = gru_step(theta, h[..., None], cell.u_PG, cell.W_PGH)[0, :, 0]
    assert (found - torch_cell(theta, h)[0]).abs().max() > 0.01


def test_the_readout_by_hand() -> None:
    """[ASMG eq. output] Two slots of two hidden units, one row each: 2 * 3 - 1 * 4 + 0.5 and 0 * 5 + 1 * 6 - 1."""
    h_PHN = torch.tensor([[[3.0], [4.0]], [[5.0], [6.0]]])
    v_PH, b_P = torch.tensor([[2.0, -1.0], [0.0, 1.0]]), torch.tensor([0.5, -1.0])
    assert readout(h_PHN, v_PH, b_P).tolist() == [[2.5], [5.0]]


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ((0, 0, 0), 7 / 3),  # the mean of 1, 2, 4
        ((0, 0, math.log(2)), 2.75),  # (1 + 2 + 2 * 4) / 4
        ((0, 0, 60), 4),  # the last model
    ],
)
def test_the_linear_generator_by_hand(logits: tuple[float, ...], expected: float) -> None:
    """[ASMG eq. linear] T30"""
    models = [torch.tensor([[x]]) for x in (1.0, 2.0, 4.0)]
    assert weighted_mean(models, torch.tensor([logits], dtype=torch.float32)).item() == near(expected, abs=1e-6)


def test_a_weighted_mean_lies_between_its_models_and_a_short_window_uses_the_last_logits() -> None:
    """T30"""
    models, logits_PM = [noise(7, 5, seed=i) for i in range(3)], 3 * noise(5, 3)
    mean, all_models = weighted_mean(models, logits_PM), torch.stack(models)
    assert (mean >= all_models.amin(0) - 1e-6).all() and (mean <= all_models.amax(0) + 1e-6).all()
    torch.testing.assert_close(weighted_mean(models[:2], logits_PM), weighted_mean(models[:2], logits_PM[:, 1:]))


def test_the_weights_of_the_spans_in_the_loss_by_hand() -> None:
    """[ASMG eq. lambda] T27"""
    assert loss_weights(3, "linear") == near([1 / 6, 1 / 3, 1 / 2])
    assert loss_weights(5, "linear") == near([1 / 15, 2 / 15, 3 / 15, 4 / 15, 5 / 15])
    losses = (0.6, 0.3, 0.1)
    totals = {"linear": 0.25, "uniform": 1 / 3, "last": 0.1}
    for form, total in totals.items():
        assert sum(weight * loss for weight, loss in zip(loss_weights(3, form), losses)) == near(total)
        assert loss_weights(1, form) == [1.0]
    assert loss_weights(2, "exponential") == near([1 / (1 + math.e), math.e / (1 + math.e)])


@pytest.mark.parametrize(("h", "expected"), [(1, 8), (4, 65), (8, 225), (12, 481), (16, 833)])
def test_the_number_of_weights_per_slot(h: int, expected: int) -> None:
    """T22: 3 h + 3 h^2 + h + 1"""
    one = gru(1, h)
    assert sum(weight.numel() for weight in (one.u_PG, one.W_PGH, one.v_PH, one.b_P)) == expected


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (Net(3, 40, 20, 10, 1), 69_225),  # 3 tables of 8 slots and 1,041 scalars: 1,065 x 65
        (Net(2, 24, 12, 6, 1), 26_065),  # 2 x 8 + 385 = 401 slots
    ],
)
def test_the_number_of_weights_of_a_whole_generator(net: Net, expected: int) -> None:
    """T22, for the base models of the papers"""
    generator = new_generator(net, make, largest=10_000, seed=0).trainable_copy()  # type: ignore[arg-type]
    assert sum(weight.numel() for _, weight in generator.named_parameters()) == expected


def test_the_rows_of_a_large_tensor_share_networks_along_its_last_axis() -> None:
    net = Net(0, 6, 5)  # a weight of (5, 6) and a bias of 5
    slots = {name: network.n_slots for name, network in new_generator(net, make, largest=29, seed=0).networks.items()}  # type: ignore[arg-type]
    assert slots == {"layers.0.weight": 6, "layers.0.bias": 5}
    slots = {name: network.n_slots for name, network in new_generator(net, make, largest=30, seed=0).networks.items()}  # type: ignore[arg-type]
    assert slots == {"layers.0.weight": 30, "layers.0.bias": 5}


@pytest.mark.parametrize(("n_slots", "u", "W", "b"), [(8, 0.387, 0.306, 0.612), (800, 0.0387, 0.0306, 0.0612)])
def test_an_untrained_network_starts_within_the_authors_limits(n_slots: int, u: float, W: float, b: float) -> None:
    """The largest of many draws is just below the limit, sqrt(6 / (P (fan_in + fan_out)))."""
    draws = [gru(n_slots, seed=seed) for seed in range(100)]
    for part, limit in (("u_PG", u), ("W_PGH", W), ("v_PH", u), ("b_P", b)):
        largest = max(float(vars(draw)[part].abs().max()) for draw in draws)
        assert 0.97 * limit < largest < 1.002 * limit  # limits are given to three digits


def test_an_untrained_residual_network_returns_the_newest_model_and_an_untrained_mean_weighs_all_equally() -> None:
    models = [noise(9, 5, seed=i) for i in range(3)]
    assert torch.equal(gru(5, residual=True)(models, None), models[-1])
    torch.testing.assert_close(MeanGenerator(torch.zeros(5, 3))(models, None), sum(models) / 3)


def test_rows_that_were_always_zero_all_become_the_same_trained_row() -> None:
    # The gates have no bias, so theta = 0 and h = 0 give h' = 0, and v h' + b = b.
    generator = gru(5)
    generated_NP = generator([torch.zeros(3, 5)] * 4, None)
    assert torch.equal(generated_NP, generator.b_P.expand(3, 5))


def generator_of(window: ModelWindow, seed: int = 0) -> ModelGenerator:
    """Return a generator for tables (N, P), with random weights and no residual."""
    return ModelGenerator({name: gru(x_NP.shape[1], seed=seed) for name, x_NP in window.models[0].items()}, {})


def window_of(n: int, n_rows: int = 20) -> ModelWindow:
    return ModelWindow(tuple({"items": noise(n_rows, 5, seed=i)} for i in range(n)))


def test_generating_some_rows_equals_looking_them_up_in_the_generated_table() -> None:
    """T24"""
    window, ids_N = window_of(3), torch.tensor([4, 19, 4, 1])
    window = ModelWindow(window.models, {"items": noise(20, 5, 4)})
    generator = generator_of(window)
    table = generator.generate(window)["items"]
    torch.testing.assert_close(generator(window, "items", ids_N), table[ids_N], rtol=0, atol=1e-6)
    assert (table[4] - table[19]).abs().max() > 0.01


def test_the_parametrization_leaves_padding_at_zero() -> None:
    window = window_of(2)
    generated_NP = generator_of(window).parametrization(window)("items", torch.tensor([0, 3]), torch.zeros(2, 5))
    assert (generated_NP[0] == 0).all() and (generated_NP[1] != 0).all()


def test_a_window_continues_from_the_hidden_state_before_it() -> None:
    """T26: unrolling models 3..5 from the state after model 2 equals the end of unrolling 1..5 from 0."""
    window = window_of(5)
    generator = generator_of(window)
    last_three = ModelWindow(window.models[1:], generator.hidden_after_first(window))
    last_three = ModelWindow(last_three.models[1:], generator.hidden_after_first(last_three))
    for n in (1, 2, 3):
        torch.testing.assert_close(generator(last_three, "items", n=n), generator(window, "items", n=n + 2))
    # With a generator of other weights they differ, because older weights made the hidden state.
    other = generator_of(window, seed=1)
    assert (other(last_three, "items") - other(window, "items")).abs().max() > 1e-3


def test_a_dense_tensor_keeps_its_shape() -> None:
    models = tuple({"w": noise(3, 4, seed=i), "fading": torch.tensor(float(i))} for i in range(2))
    generator = ModelGenerator({"w": gru(12), "fading": gru(1)}, {})
    generated = generator.generate(ModelWindow(models))
    assert {name: tuple(weight.shape) for name, weight in generated.items()} == {"w": (3, 4), "fading": ()}
    # Each scalar has its own network, so the same inputs give different outputs.
    constant = ModelWindow(tuple({"w": torch.ones(3, 4), "fading": torch.tensor(1.0)} for _ in range(2)))
    assert len(generator.generate(constant)["w"].unique()) == 12


def test_new_rows_enter_older_models_with_their_initial_values_and_a_hidden_state_of_0() -> None:
    window = ModelWindow(window_of(2, n_rows=3).models, {"items": noise(3, 5, 4)})
    start = noise(5, 5, seed=9)
    grown = window.grow({"items": start})
    for model, old in zip(grown.models, window.models, strict=True):
        assert torch.equal(model["items"], torch.cat([old["items"], start[3:]]))
    assert grown.hidden is not None and window.hidden is not None
    assert torch.equal(grown.hidden["items"], F.pad(window.hidden["items"], (0, 0, 0, 0, 0, 2)))


def test_training_changes_a_copy_only() -> None:
    generator = generator_of(window_of(1))
    before = generator.networks["items"].map_tensors(torch.clone)
    copy = generator.trainable_copy()
    for _, weight in copy.named_parameters():
        weight.data.add_(1)
    assert all(torch.equal(vars(before)[k], v) for k, v in vars(generator.networks["items"]).items() if k != "residual")
    assert not any(isinstance(weight, nn.Parameter) for weight in vars(copy.detached_copy().networks["items"]).values())
