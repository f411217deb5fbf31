"""Transfer networks: values by hand, the number of weights, and the effect on the forward pass of a model."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freshrec.data.batches import due_targets
from freshrec.data.histories import append_events
from freshrec.data.stored_interests import stored_interests_of
from freshrec.errors import OptionError
from freshrec.learn.fit import train, training_batches
from freshrec.learn.transfer import (
    CNNTower,
    CNNTransfer,
    LinearTransfer,
    MLPTransfer,
    Transfer,
    TransferSpec,
    adaptation_parametrization,
    stack_row_image,
    transfer_parametrization,
    transfer_weights,
)
from freshrec.learn.weights import apply_parametrization, copy_weights, load_weights
from freshrec.models import MODELS
from freshrec.types import Events, Histories, TrainedModel

near = pytest.approx
NO_RESIDUAL = CNNTransfer(residual=False)
FORMS = [
    LinearTransfer(0.3),
    MLPTransfer(residual=False),
    NO_RESIDUAL,
    replace(NO_RESIDUAL, filters=0),
    replace(NO_RESIDUAL, hidden=0),
]
FORMS += [CNNTransfer(filters=3, filters2=2, hidden=8, kernel="5x5", residual=False)]


def tower(spec: TransferSpec, width: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return spec.build_tower(width)


def rows(n: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def n_weights(spec: TransferSpec, width: int) -> int:
    return sum(weight.numel() for weight in tower(spec, width).parameters())


def test_a_linear_transfer_is_a_weighted_mean() -> None:
    """[SML eq. linear]"""
    # T2: W = 0.5 x 1 + 0.5 x 0.95 = 0.975. A chain from 0 over the models 1, 2, 3 gives 0.5, 1.25, 2.125.
    half = tower(LinearTransfer(0.5), 1)
    assert half(torch.tensor([[1.0]]), torch.tensor([[0.95]])).item() == near(0.975)
    before, chain = torch.zeros(1, 1), []
    for adapted in (1.0, 2.0, 3.0):
        before = half(before, torch.tensor([[adapted]]))
        chain.append(before.item())
    assert chain == [0.5, 1.25, 2.125]


def test_a_step_through_a_linear_transfer_is_shorter_by_alpha() -> None:
    # T2: the loss is W, with gradient 1. At w = 1, dL/dw = 1 - 0.5, so a step of 0.1 ends at 0.95.
    w = torch.ones(1, 1, requires_grad=True)
    tower(LinearTransfer(0.5), 1)(torch.ones(1, 1), w).sum().backward()
    assert w.grad is not None
    assert 1 - 0.1 * w.grad.item() == near(0.95)


def test_a_learned_alpha_starts_at_the_given_value_and_has_the_right_gradient() -> None:
    mix = tower(LinearTransfer(0.2, learned=True), 1)
    out = mix(torch.tensor([[3.0]]), torch.tensor([[1.0]]))
    assert out.item() == near(0.2 * 3 + 0.8 * 1)
    out.sum().backward()
    (rho,) = mix.parameters()
    assert rho.grad is not None
    assert rho.grad.item() == near(0.2 * 0.8 * (3 - 1))  # sigmoid' (w_{t-1} - w^)


@pytest.mark.parametrize(
    ("alpha", "learned", "bounds"),
    [
        (1.5, False, "at least 0 and at most 1"),
        (0.0, True, "above 0 and below 1 with learned=true"),
        (1.0, True, "above 0 and below 1 with learned=true"),
    ],
)
def test_an_alpha_out_of_range_is_refused(alpha: float, learned: bool, bounds: str) -> None:
    with pytest.raises(OptionError, match=f"It must be {bounds}."):
        LinearTransfer(alpha, learned)


@pytest.mark.parametrize(
    ("spec", "width", "n"),
    [  # T3
        (CNNTransfer(), 64, 197_279),  # 3 x 10 + 10, 10 x 5 + 5, 320 x 512 + 512, 512 x 64 + 64
        (CNNTransfer(hidden=20, bias=False), 8, 1_068),
        (CNNTransfer(hidden=20, bias=False), 9, 1_189),
        (CNNTransfer(filters=5, filters2=3, hidden=80, bias=False), 800, 256_910),
        (CNNTransfer(filters=2, filters2=2, hidden=10, kernel="5x5"), 64, 2_060),  # IMSR's grid, section 10.2
        (CNNTransfer(filters=5, filters2=5, hidden=20, kernel="5x5"), 64, 7_974),
        (CNNTransfer(filters=8, filters2=8, hidden=40, kernel="5x5"), 64, 23_552),
        (CNNTransfer(filters=10, filters2=10, hidden=80, kernel="5x5"), 64, 57_034),
        (CNNTransfer(filters=0), 64, 192 * 512 + 512 + 512 * 64 + 64),  # SML-CNN
        (CNNTransfer(hidden=0), 64, 40 + 55 + 6),  # SML-FC: a last 1x1 convolution of 5 channels
        (MLPTransfer(), 64, 128 * 128 + 128 + 128 * 64 + 64),
        (LinearTransfer(), 64, 0),
        (LinearTransfer(learned=True), 64, 1),
    ],
)
def test_a_tower_has_the_number_of_weights_of_its_paper(spec: TransferSpec, width: int, n: int) -> None:
    assert n_weights(spec, width) == n


def test_the_image_of_a_row_by_hand() -> None:
    """T4, [SML eq. picture]"""
    image_3D = stack_row_image(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 2.0]]))[0]
    assert image_3D[2].tolist() == near([0.6, 1.6])  # (3 x 1, 4 x 2) / 5
    for kernel, expected in [((-1, 1, 0), (-2, -2)), ((0, 0, 1), (0.6, 1.6)), ((1, 1, 1), (4.6, 7.6))]:
        assert (torch.tensor([kernel]).float() @ image_3D)[0].tolist() == near(expected)


def test_a_row_that_was_zero_has_a_finite_image() -> None:
    """T9"""
    zero, after = torch.zeros(1, 4), rows(1, 4).requires_grad_()
    image = stack_row_image(zero, after, detach=False)
    image.sum().backward()
    assert image.isfinite().all()
    assert after.grad is not None and after.grad.isfinite().all()


def test_the_small_dense_layers_equal_the_convolutions_of_the_paper() -> None:
    """T4, [SML eq. cnn]"""
    net = tower(NO_RESIDUAL, 16).double()
    assert isinstance(net, CNNTower)
    before, after = rows(7, 16, 1).double(), rows(7, 16, 2).double()
    images = stack_row_image(before, after)
    first = F.gelu(F.conv2d(images[:, None], net.first.weight[:, None, :, None], net.first.bias))  # (7, 10, 1, 16)
    second = F.gelu(F.conv2d(first, net.second.weight[:, :, None, None], net.second.bias))  # (7, 5, 1, 16)
    expected = net.last(F.gelu(net.third(second[:, :, 0].transpose(1, 2).flatten(1))))
    torch.testing.assert_close(net(before, after), expected, rtol=0, atol=1e-14)


def test_the_gelu_is_the_exact_one() -> None:
    """T6: GELU(1) = 0.841345. The quick approximation would give 0.845796."""
    net = tower(CNNTransfer(filters=1, filters2=1, hidden=0, bias=False, residual=False), 1)
    assert isinstance(net, CNNTower)
    with torch.no_grad():
        net.first.weight[:] = torch.tensor([[0.0, 1.0, 0.0]])  # reads w^ only
        net.second.weight[:], net.last.weight[:] = 1.0, 1.0

    def gelu(x: float) -> float:
        return x * 0.5 * (1 + math.erf(x / 2**0.5))

    assert gelu(1) == near(0.841345, abs=1e-6)
    assert net(torch.ones(1, 1), torch.ones(1, 1)).item() == near(gelu(gelu(1)), abs=1e-6)


def test_a_linear_map_can_return_either_input() -> None:
    """T7"""
    net, eye, zero = tower(MLPTransfer(hidden=0, residual=False), 4), torch.eye(4), torch.zeros(4, 4)
    before, after = rows(5, 4, 1), rows(5, 4, 2)
    (weight,) = net.parameters()
    for expected, blocks in [(after, [zero, eye]), (before, [eye, zero])]:
        with torch.no_grad():
            weight[:] = torch.cat(blocks, 1)
        assert torch.equal(net(before, after), expected)


@pytest.mark.parametrize("spec", [CNNTransfer(), CNNTransfer(hidden=0), CNNTransfer(kernel="5x5"), MLPTransfer()])
def test_an_untrained_residual_network_equals_fine_tuning(spec: TransferSpec) -> None:
    """T7"""
    before, after = rows(5, 8, 1), rows(5, 8, 2)
    assert torch.equal(tower(spec, 8)(before, after), after)


@pytest.mark.parametrize("spec", FORMS)
def test_looking_up_rows_and_mapping_them_commute(spec: TransferSpec) -> None:
    """T5"""
    net, before, after = tower(spec, 8), rows(9, 8, 1), rows(9, 8, 2)
    ids = torch.tensor([4, 0, 4, 8])
    mapped = net(before[ids], after[ids])
    torch.testing.assert_close(mapped, net(before, after)[ids])
    torch.testing.assert_close(mapped[0], mapped[2])


def test_an_untrained_network_without_residual_changes_even_unchanged_rows() -> None:
    """T8"""
    net, unchanged = tower(NO_RESIDUAL, 64), rows(20, 64)
    relative_change = (net(unchanged, unchanged) - unchanged).norm() / unchanged.norm()
    assert 0.5 < relative_change < 1.5


def test_detaching_the_product_changes_gradients_and_no_value() -> None:
    """T12: of w^ = (1, 2) with w_{t-1} = (3, 4), the product row's share of the gradient is w_{t-1} / 5."""
    values, gradients = [], []
    for detach in (True, False):
        after = torch.tensor([[1.0, 2.0]], requires_grad=True)
        image = stack_row_image(torch.tensor([[3.0, 4.0]]), after, detach)
        image.sum().backward()
        assert after.grad is not None
        values.append(image.detach())
        gradients.append(after.grad[0])
    assert torch.equal(*values)
    assert (gradients[1] - gradients[0]).tolist() == near([0.6, 0.8])


# the effect on a model

TRAINED = ["mf", "sasrec", "mind", "comirec-dr", "comirec-sa"]


def model_of(name: str, seed: int = 0) -> TrainedModel:
    spec = replace(MODELS[name], d=8, negatives=16, batch=32, std=0.7)  # type: ignore[type-var]
    model: TrainedModel = spec.build(seed)
    model.grow(6, 9)
    model.eval()
    return model


def histories() -> Histories:
    users, items = torch.arange(60) % 6 + 1, (torch.arange(60) * 5 + torch.arange(60) // 7) % 9 + 1
    return append_events(Histories.empty(), Events.trainable(users, items), 6)


@pytest.mark.parametrize("name", TRAINED)
def test_the_loss_through_a_network_is_that_of_a_model_with_the_mapped_weights(name: str) -> None:
    model, before = model_of(name), copy_weights(model_of(name, seed=1))
    transfer, targets = Transfer.for_model(NO_RESIDUAL, model, 0), due_targets(histories())
    source = torch.Generator().manual_seed(0)
    batch = next(iter(training_batches(model, targets, source, stored_interests_of(model, None, 0))))
    batch = replace(batch, negatives_N=torch.arange(1, 10))
    with apply_parametrization(model, adaptation_parametrization(transfer, before)) as forward_pass:
        through = forward_pass(batch).loss
    assert through.item() != near(
        model(batch).loss.item(), rel=1e-3
    )  # the parametrization is gone, and it had an effect
    load_weights(model, transfer_weights(transfer, model, before))
    assert through.item() == near(model(batch).loss.item(), rel=1e-5)


def theta_of(transfer: Transfer) -> dict[str, Tensor]:
    """Return the weights of the network of the items. Every loss depends on them."""
    return {n: theta.detach().clone() for n, theta in transfer.named_parameters() if "of/items" in n}


@pytest.mark.parametrize("name", TRAINED)
def test_training_changes_either_the_model_or_the_network_and_not_the_other(name: str) -> None:
    """T10"""
    model, before = model_of(name), copy_weights(model_of(name, seed=1))
    transfer, targets, stored = (
        Transfer.for_model(NO_RESIDUAL, model, 0),
        due_targets(histories()),
        stored_interests_of(model, None, 0),
    )
    model_before, theta_before = copy_weights(model), theta_of(transfer)
    list(
        train(
            model,
            targets,
            1,
            (0, 1),
            stored_interests=stored,
            parametrization=transfer_parametrization(transfer, before),
            trainable=transfer,
        )
    )
    assert all(torch.equal(w, model_before[n]) for n, w in copy_weights(model).items())
    assert model.moments == {}
    theta_now = theta_of(transfer)
    assert not any(torch.equal(theta_now[n], theta) for n, theta in theta_before.items())
    transfer.requires_grad_(False)
    list(
        train(
            model,
            targets,
            1,
            (0, 1),
            stored_interests=stored,
            parametrization=adaptation_parametrization(transfer, before),
        )
    )
    assert not torch.equal(copy_weights(model)["items"], model_before["items"])
    assert all(torch.equal(theta_now[n], theta) for n, theta in theta_of(transfer).items())


def test_with_rows_touched_only_changed_rows_are_mapped_and_padding_never_is() -> None:
    """T8"""
    model = model_of("mf")
    transfer, before = Transfer.for_model(NO_RESIDUAL, model, 0), copy_weights(model)
    list(train(model, due_targets(histories())[torch.tensor([0])], 1, (0, 1), negative_pool_N=torch.tensor([3])))
    is_touched = (copy_weights(model)["users"] != before["users"]).any(1)
    assert is_touched.sum() == 1
    touched, all_rows = (transfer_weights(transfer, model, before, rows)["users"] for rows in ("touched", "all"))
    assert torch.equal(touched[~is_touched], before["users"][~is_touched])
    assert torch.equal(touched[is_touched], all_rows[is_touched])
    assert (all_rows[1:] != before["users"][1:]).any(1).all()
    assert (all_rows[0] == 0).all()


def test_weights_that_are_not_whole_rows_are_not_mapped() -> None:
    model = model_of("comirec-dr")  # its routing has a scalar
    transfer, before = Transfer.for_model(NO_RESIDUAL, model, 0), copy_weights(model_of("comirec-dr", seed=1))
    mapped, adapted = transfer_weights(transfer, model, before), copy_weights(model)
    not_mapped = {name for name in adapted if torch.equal(mapped[name], adapted[name])}
    assert not_mapped == {"extract.log_fading"}


def test_negatives_are_drawn_from_the_given_pool() -> None:
    model = model_of("mf")
    before = copy_weights(model)["items"]
    list(train(model, due_targets(histories()), 3, (0, 1), negative_pool_N=torch.tensor([2, 4])))
    targets = histories().items_R.unique()
    changed = (copy_weights(model)["items"] != before).any(1).nonzero()[:, 0]
    assert set(changed.tolist()) <= {2, 4, *targets.tolist()}
