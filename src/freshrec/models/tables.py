"""Embedding tables that gain rows, and touch only the rows a batch uses.

A row holds its weight and both Adam moments side by side, so a step is one gather and one scatter, whatever the table's
size. This is lazy Adam: the moments of a row that is not in the batch do not decay (as in `torch.optim.SparseAdam`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class Table(nn.Module):
    """(n_rows + 1, n_dims) learnable vectors; row 0 is padding and stays 0."""

    packed: Tensor  # (rows, 3 D): weight, first moment, second moment
    steps: Tensor

    def __init__(self, n_dims: int, std: float, seed: int) -> None:
        super().__init__()
        self.n_dims, self.std, self.seed = n_dims, std, seed
        self.register_buffer("packed", torch.zeros(1, 3 * n_dims))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._slot = torch.zeros(1, dtype=torch.int64)
        self._unique = self._rows = self._leaf = None

    _unique: Tensor | None
    _rows: Tensor | None
    _leaf: Tensor | None

    def grow(self, n_rows: int) -> None:
        """Make room for rows 1..n_rows; a new row's start depends on (seed, size before) alone."""
        extra = n_rows + 1 - len(self.packed)
        if extra <= 0:
            return
        source = torch.Generator().manual_seed(self.seed * 1_000_003 + len(self.packed))
        fresh = torch.zeros(extra, 3 * self.n_dims)
        fresh[:, : self.n_dims] = torch.randn(extra, self.n_dims, generator=source) * self.std
        self.packed = torch.cat([self.packed, fresh])
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
        self.steps += 1
        n, d, g = int(self.steps), self.n_dims, self._leaf.grad
        w, m, v = self._rows[:, :d], self._rows[:, d : 2 * d], self._rows[:, 2 * d :]
        m.mul_(BETA1).add_(g, alpha=1 - BETA1)
        v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        w.addcdiv_(m, (v / (1 - BETA2**n)).sqrt_().add_(EPS), value=-lr / (1 - BETA1**n))
        self.packed.index_copy_(0, self._unique, self._rows)
        self._unique = self._rows = self._leaf = None
