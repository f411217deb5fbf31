"""The softmax over all items in blocks, and its gradients, equal PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.nn import full_softmax
from freshrec.nn.full_softmax import full_distillation_loss, full_softmax_loss


@pytest.fixture(params=[3, 7, 100])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two block sizes that do not divide the 20 items, and one block for all items."""
    monkeypatch.setattr(full_softmax, "ITEM_BLOCK", request.param)


def tensors(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    user_BD, rows_RD = torch.randn(5, 4, generator=source), torch.randn(21, 4, generator=source) * scale
    return user_BD.requires_grad_(), rows_RD.requires_grad_(), torch.tensor([1, 20, 7, 7, 3])


def gradients(loss: Tensor, *of: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(3 * loss, of)]


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("scale", [1.0, 100.0])  # exp overflows at 89
def test_the_loss_and_its_gradients_are_those_of_cross_entropy(scale: float) -> None:
    user_BD, rows_RD, target_B = tensors(scale)
    expected = gradients(F.cross_entropy(user_BD @ rows_RD[1:].t(), target_B - 1), user_BD, rows_RD)
    torch.testing.assert_close(gradients(full_softmax_loss(user_BD, rows_RD, target_B), user_BD, rows_RD), expected)


@pytest.mark.usefixtures("block")
def test_a_teacher_with_fewer_items_gives_the_gradients_of_cross_entropy_on_these_items() -> None:
    user_BD, rows_RD, _ = tensors()
    teacher_BD, known_RD = torch.randn(5, 4), torch.randn(16, 4)
    teacher_BI = torch.softmax(teacher_BD @ known_RD[1:].t(), 1)
    expected = gradients(F.cross_entropy((user_BD @ rows_RD[1:].t())[:, :15], teacher_BI), user_BD, rows_RD)
    found = gradients(full_distillation_loss(user_BD, rows_RD, teacher_BD, known_RD), user_BD, rows_RD)
    torch.testing.assert_close(found, expected)
