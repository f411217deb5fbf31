"""Softmax cross-entropy over all items, and its gradients, in blocks of items that stay in the processor's cache.

Half the time of the composition of PyTorch's own operations, which write and read the (B, I) logits six times; the
gradients are the same. Letters: R rows of a table, the first of them the padding, which is no item; I the items; J a
block of them.
"""

from typing import Any

import torch
from torch import Tensor

from freshrec.device import blocks_pay

BLOCK = 2048  # items; measured best


def full_softmax(user_BD: Tensor, rows_RD: Tensor, target_B: Tensor) -> Tensor:
    """-ln softmax(v e_i) of the target rows over all items; mean over B."""
    loss: Tensor = _CrossEntropy.apply(user_BD, rows_RD, target_B, None, None)  # type: ignore[no-untyped-call]
    return loss


def distilled_softmax(user_BD: Tensor, rows_RD: Tensor, teacher_BD: Tensor, known_RD: Tensor) -> Tensor:
    """-sum_i p'_i ln p_i with p = softmax(v e_i), p' = softmax(v' e'_i); mean over B.

    The sum and both softmaxes are over the items that the teacher (v', e') knows; no gradient reaches it.
    """
    loss: Tensor = _CrossEntropy.apply(user_BD, rows_RD, None, teacher_BD, known_RD)  # type: ignore[no-untyped-call]
    return loss


class _Softmax:
    """exp(z - m), block by block, with the sums that make it a softmax."""

    def __init__(self, user_BD: Tensor, n_items: int) -> None:
        self.user_DB = user_BD.t().contiguous()
        self.exp_IB = torch.empty(n_items, len(user_BD))
        self._most: list[Tensor] = []  # (B,) of each block
        self._sums: list[Tensor] = []

    def scores(self, items_JD: Tensor, rows: slice) -> Tensor:
        """(J, B) the next block's z, for `take`."""
        return torch.mm(items_JD, self.user_DB, out=self.exp_IB[rows])

    def take(self, z_JB: Tensor) -> Tensor:
        """exp(z - m), in place."""
        most_B = z_JB.amax(0)
        exp_JB = z_JB.sub_(most_B).exp_()
        self._most.append(most_B)
        self._sums.append(exp_JB.sum(0))
        return exp_JB

    def normalise(self) -> tuple[Tensor, Tensor]:
        """(B,) ln sum_i exp z_i, and (blocks, B) what each block's exp(z - m) is to be multiplied by."""
        most_NB = torch.stack(self._most)
        total_B = torch.logsumexp(most_NB + torch.stack(self._sums).log(), 0)
        return total_B, (most_NB - total_B).exp()


class _CrossEntropy(torch.autograd.Function):
    """Of a softmax over items with one true item a row, or with a teacher's softmax."""

    @staticmethod
    def forward(
        ctx: Any,
        user_BD: Tensor,
        rows_RD: Tensor,
        target_B: Tensor | None,
        teacher_BD: Tensor | None,
        known_RD: Tensor | None,
    ) -> Tensor:
        """The mean loss."""
        n_items = len(rows_RD if known_RD is None else known_RD) - 1
        mine = _Softmax(user_BD, n_items)
        theirs = None if teacher_BD is None else _Softmax(teacher_BD, n_items)
        products = []
        for items, rows in _blocks(n_items, user_BD):
            z_JB = mine.scores(rows_RD[rows], items)
            if theirs is not None and known_RD is not None:
                products.append((theirs.take(theirs.scores(known_RD[rows], items)) * z_JB).sum(0))
            mine.take(z_JB)
        total_B, scale_NB = mine.normalise()
        taught_NB = None if theirs is None else theirs.normalise()[1]
        if taught_NB is not None:
            meant_B = (torch.stack(products) * taught_NB).sum(0)  # sum_i p'_i z_i
        else:
            assert target_B is not None
            meant_B = (user_BD * rows_RD[target_B]).sum(1)
        ctx.save_for_backward(user_BD, rows_RD, target_B, scale_NB, taught_NB)
        ctx.exp_IB, ctx.taught_IB = mine.exp_IB, None if theirs is None else theirs.exp_IB
        return (total_B - meant_B).mean()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """d loss / d z = (p - p') / B."""
        user_BD, rows_RD, target_B, scale_NB, taught_NB = ctx.saved_tensors
        slope = slope / len(user_BD)
        n_items = len(ctx.exp_IB)
        d_user_BD, d_rows_RD = torch.zeros_like(user_BD), torch.empty_like(rows_RD)
        d_rows_RD[0] = 0.0
        d_rows_RD[n_items + 1 :] = 0.0
        for n, (items, rows) in enumerate(_blocks(n_items, user_BD)):
            p_JB, scale_B1 = ctx.exp_IB[items], (scale_NB[n] * slope)[:, None]
            if taught_NB is not None:
                p_JB = p_JB * scale_NB[n] - ctx.taught_IB[items] * taught_NB[n]
                scale_B1 = slope.expand(len(user_BD), 1)
            torch.mm(p_JB, user_BD * scale_B1, out=d_rows_RD[rows])
            d_user_BD += (p_JB.t() @ rows_RD[rows]).mul_(scale_B1)
        if target_B is not None:
            d_rows_RD.index_add_(0, target_B, user_BD * -slope)
            d_user_BD -= rows_RD[target_B] * slope
        return d_user_BD, d_rows_RD, None, None, None


def _blocks(n_items: int, on: Tensor) -> list[tuple[slice, slice]]:
    """Each block, as items counted from 0 and as rows of the table; a single one on another device than the CPU."""
    edges = [*range(0, n_items, BLOCK if blocks_pay(on) else max(n_items, 1)), n_items]
    return [(slice(a, b), slice(a + 1, b + 1)) for a, b in zip(edges, edges[1:])]
