"""Embedding tables that gain rows, and touch only the rows a batch uses.

A row holds its weight and both Adam moments side by side, so a step is one gather and one scatter, whatever the table's
size. This is lazy Adam: the moments of a row that is not in the batch do not decay (as in `torch.optim.SparseAdam`).
Differs from it: each row counts its own steps, so that a row first met late starts as gently as one met early; with one
count for the table its first steps would be 3 to 6 times too long.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
BLOCK = 1024  # rows whose starts are drawn together


class Table(nn.Module):
    """(n_rows + 1, n_dims) learnable vectors; row 0 is padding and stays 0."""

    packed: Tensor  # (rows, 3 D): weight, first moment, second moment
    steps_R: Tensor  # (rows,) how often each was trained

    def __init__(self, n_dims: int, std: float, seed: int) -> None:
        super().__init__()
        self.n_dims, self.std, self.seed = n_dims, std, seed
        self.register_buffer("packed", torch.zeros(1, 3 * n_dims))
        self.register_buffer("steps_R", torch.zeros(1))
        self._slot = torch.zeros(1, dtype=torch.int64)
        self._unique = self._rows = self._leaf = None

    _unique: Tensor | None
    _rows: Tensor | None
    _leaf: Tensor | None

    def grow(self, n_rows: int) -> None:
        """Make room for rows 1..n_rows. A row's start depends on (seed, row) alone, not on when the table grew."""
        n_old = len(self.packed)
        extra = n_rows + 1 - n_old
        if extra <= 0:
            return
        fresh = torch.zeros(extra, 3 * self.n_dims)
        fresh[:, : self.n_dims] = _starts(self.seed, n_old, n_rows + 1, self.n_dims) * self.std
        self.packed = torch.cat([self.packed, fresh])
        self.steps_R = torch.cat([self.steps_R, torch.zeros(extra)])
        self._slot = torch.zeros(len(self.packed), dtype=torch.int64)

    @property
    def weights(self) -> Tensor:
        """(n_rows + 1, D), a view."""
        return self.packed[:, : self.n_dims]

    def pull(self, ids: Tensor) -> Tensor:
        """(N, D) rows of `ids` (N,), with gradients; once a step, then `push`."""
        order = torch.arange(len(ids))
        self._slot[ids] = order
        self._unique = ids[self._slot.index_select(0, ids) == order]
        self._slot[self._unique] = torch.arange(len(self._unique))
        self._rows = self.packed.index_select(0, self._unique)
        self._leaf = self._rows[:, : self.n_dims].contiguous().requires_grad_(True)
        return F.embedding(self._slot.index_select(0, ids), self._leaf)

    def push(self, lr: float) -> None:
        """One Adam step on the rows of the last `pull`."""
        if self._rows is None or self._leaf is None or self._unique is None or self._leaf.grad is None:
            return
        d, g = self.n_dims, self._leaf.grad
        steps_N = self.steps_R.index_select(0, self._unique).add_(1)
        w, m, v = self._rows[:, :d], self._rows[:, d : 2 * d], self._rows[:, 2 * d :]
        m.mul_(BETA1).add_(g, alpha=1 - BETA1)
        v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        second_N = (1 - BETA2**steps_N).sqrt_()  # corrections of the moments' bias towards 0
        size_N = second_N / (1 - BETA1**steps_N)
        w.addcdiv_(m * size_N[:, None], v.sqrt().add_(second_N[:, None], alpha=EPS), value=-lr)
        self.packed.index_copy_(0, self._unique, self._rows)
        self.steps_R.index_copy_(0, self._unique, steps_N)
        self._unique = self._rows = self._leaf = None


def _starts(seed: int, first: int, end: int, n_dims: int) -> Tensor:
    """(end - first, D) standard normal rows, drawn in blocks of `BLOCK` rows with a generator each."""
    blocks = []
    for block in range(first // BLOCK, (end - 1) // BLOCK + 1):
        source = torch.Generator().manual_seed(seed * 1_000_003 + block)
        blocks.append(torch.randn(BLOCK, n_dims, generator=source))
    return torch.cat(blocks)[first % BLOCK :][: end - first]
