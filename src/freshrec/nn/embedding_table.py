"""Embedding tables that can grow, and whose training steps touch only the rows that a batch uses.

A row holds its weights and both Adam moments side by side. So a step is one gather and one scatter, independent of the
size of the table. This is lazy Adam: the moments of a row that is not in the batch do not decay (as in
`torch.optim.SparseAdam`). Differs from it: each row counts its own steps, so that the first steps of late rows are as
small as those of early rows. With one count for the table, they would be 3 to 6 times as long.

A step on all rows (`lookup_all`) is dense Adam, with one count for the table. There, new items need the longer steps to
catch up, because all rows move.

`EmbeddingTable.parametrization` may replace the looked-up rows by a function of them. Strategies that learn how to
transform weights use it.

Items may have categories (`n_categories`). A vector is then the sum of the item's own row and a row that all items of
the category share. A late item starts at the vector of its category, not at a random one.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freshrec.device import normal, prefers_blocks
from freshrec.errors import OptionError
from freshrec.random_streams import stream, stream_seed
from freshrec.types import TrainedModel

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
BLOCK_ROWS = 1024  # rows that are initialised together, and that a step on all rows processes together


class EmbeddingTable(nn.Module):
    """Learnable vectors, shape (n_rows + 1, n_dims). Row 0 is padding and stays 0."""

    packed: Tensor  # (rows, 3 D): weight, first moment, second moment
    steps_R: Tensor  # (rows,) number of training steps of each row
    parametrization: Callable[[Tensor, Tensor], Tensor] | None = None  # (ids, rows) -> what `lookup` returns instead
    tied_to_R: Tensor | None = None  # row that is used instead of each row, where rows share one vector
    leaf: Tensor | None  # weights of the distinct rows of the last `lookup`, with gradients
    kinds_R: Tensor  # (rows,) row of `common` that is added to each; 0 = none; exists only with `common`

    def __init__(self, n_dims: int, std: float, seed: int, n_categories: int = 0) -> None:
        super().__init__()
        self.common: EmbeddingTable | None = None
        if n_categories:
            self.common = EmbeddingTable(n_dims, std, stream_seed(seed, "category rows"))
            self.common.grow(n_categories)
            self.register_buffer("kinds_R", torch.zeros(1, dtype=torch.int64))
        self.n_dims, self.std, self.seed = n_dims, std, seed
        self.register_buffer("packed", torch.zeros(1, 3 * n_dims))
        self.register_buffer("steps_R", torch.zeros(1))
        self._slot_of_row = torch.zeros(1, dtype=torch.int64)
        self._unique_ids = self._packed_rows = self.leaf = None
        self._earlier_lookups: list[tuple[Tensor, Tensor]] = []  # ids and weights of earlier lookups in the same step

    _continues_step: bool = False  # whether the next lookup belongs to the same step as the last one
    _is_full_lookup: bool = False  # whether the last lookup was of all rows
    _unique_ids: Tensor | None
    _packed_rows: Tensor | None

    def grow(self, n_rows: int) -> None:
        """Add rows up to n_rows. The initial values of a row depend on (seed, row) only, not on when the table grew."""
        n_old = len(self.packed)
        n_new = n_rows + 1 - n_old
        if n_new <= 0:
            return
        new_rows = torch.zeros(n_new, 3 * self.n_dims)
        new_rows[:, : self.n_dims] = _initial_rows(self.seed, n_old, n_rows + 1, self.n_dims) * self.std
        self.packed = torch.cat([self.packed, new_rows])
        self.steps_R = torch.cat([self.steps_R, torch.zeros(n_new)])
        self._slot_of_row = torch.zeros(len(self.packed), dtype=torch.int64)
        if self.common is not None:
            self.kinds_R = F.pad(self.kinds_R, (0, n_new))

    @property
    def weights(self) -> Tensor:
        """The rows themselves, without categories, as a view of shape (n_rows + 1, D)."""
        return self.packed[:, : self.n_dims]

    def lookup(self, ids: Tensor) -> Tensor:
        """Return the vectors of `ids`, shape (..., D), with gradients.

        Call it once per training step, followed by `step`. See `continue_step` for several lookups.
        """
        requested_ids = ids
        if self.tied_to_R is not None:
            ids = self.tied_to_R[ids]
        if self._continues_step and self._is_full_lookup:
            return _add_category_vectors(self, F.embedding(ids, self._visible_rows()), requested_ids)
        if self._continues_step and self._unique_ids is not None and self.leaf is not None:
            self._earlier_lookups.append((self._unique_ids, self.leaf))
        self._continues_step = self._is_full_lookup = False
        self._unique_ids, index_N = self._deduplicate(ids.reshape(-1))
        self._packed_rows = self.packed.index_select(0, self._unique_ids)
        self.leaf = self._packed_rows[:, : self.n_dims].contiguous().requires_grad_(True)
        return _add_category_vectors(self, F.embedding(index_N.view(ids.shape), self._visible_rows()), requested_ids)

    def lookup_all(self) -> Tensor:
        """Return all vectors, shape (n_rows + 1, D), with gradients. Call it once per training step, then `step`."""
        if self.tied_to_R is not None:
            return self.lookup(torch.arange(len(self.packed)))
        if not (self._continues_step and self._is_full_lookup):
            assert not self._continues_step, "lookup_all must be the first lookup of a step"
            self._is_full_lookup, self._unique_ids, self._packed_rows = True, torch.arange(len(self.packed)), None
            self.leaf = self.weights.clone().requires_grad_(True)
        self._continues_step = False
        return _add_category_vectors(self, self._visible_rows(), slice(None))

    def _visible_rows(self) -> Tensor:
        assert self._unique_ids is not None and self.leaf is not None
        return self.leaf if self.parametrization is None else self.parametrization(self._unique_ids, self.leaf)

    def _deduplicate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distinct `ids`, and the index (N,) of each id among them."""
        order = torch.arange(len(ids))
        self._slot_of_row[ids] = order
        unique = ids[self._slot_of_row.index_select(0, ids) == order]
        self._slot_of_row[unique] = torch.arange(len(unique))
        return unique, self._slot_of_row.index_select(0, ids)

    def continue_step(self) -> None:
        """Make the next `lookup` part of the same training step as the last one: `step` updates the rows of both."""
        self._continues_step = True

    def step_rows(self) -> tuple[Tensor, Tensor]:
        """Return the distinct rows (N,) of the last `lookup`, and their weights (N, D), with gradients."""
        assert self._unique_ids is not None and self.leaf is not None
        return self._unique_ids, self.leaf

    def full_matrix(self) -> Tensor:
        """Return all vectors, shape (n_rows + 1, D). Gradients reach the rows of the last `lookup` only."""
        rows = self.step_rows()[1] if self._is_full_lookup else self.weights.index_copy(0, *self.step_rows())
        if self.common is None:
            return rows
        return rows + self.common.full_matrix()[self.kinds_R] * (self.kinds_R > 0)[:, None]

    def step(self, lr: float) -> None:
        """Take one Adam step on the rows of the last `lookup`, or of all lookups since `continue_step`."""
        if self._earlier_lookups:
            self._merge_lookups()
        self._continues_step = False
        if self.leaf is None or self._unique_ids is None or self.leaf.grad is None:
            return
        if self._is_full_lookup:
            self.steps_R.fill_(float(self.steps_R.max()) + 1)
            step = BLOCK_ROWS if prefers_blocks(self.packed) else len(self.packed)
            for first in range(0, len(self.packed), step):
                rows = slice(first, first + step)
                _adam_step(self.packed[rows], self.steps_R[rows], self.leaf.grad[rows], lr)
        elif self._packed_rows is not None:
            steps_N = self.steps_R.index_select(0, self._unique_ids).add_(1)
            _adam_step(self._packed_rows, steps_N, self.leaf.grad, lr)
            self.packed.index_copy_(0, self._unique_ids, self._packed_rows)
            self.steps_R.index_copy_(0, self._unique_ids, steps_N)
        self._unique_ids = self._packed_rows = self.leaf = None

    def _merge_lookups(self) -> None:
        """Merge all lookups of the step into one. The gradients of a row are summed."""
        lookups = [
            (ids, leaf.grad) for ids, leaf in [*self._earlier_lookups, self.step_rows()] if leaf.grad is not None
        ]
        self._earlier_lookups = []
        if not lookups:
            return
        self._unique_ids, index_M = self._deduplicate(torch.cat([ids for ids, _ in lookups]))
        self._packed_rows = self.packed.index_select(0, self._unique_ids)
        self.leaf = self._packed_rows[:, : self.n_dims].contiguous()
        self.leaf.grad = torch.zeros_like(self.leaf).index_add_(0, index_M, torch.cat([grad for _, grad in lookups]))


def embedding_matrix(table: EmbeddingTable) -> Tensor:
    """Return all vectors as they are served, category rows included, shape (n_rows + 1, D)."""
    return table.weights if table.common is None else table.weights + table.common.weights[table.kinds_R]


def embed(table: EmbeddingTable, ids: Tensor) -> Tensor:
    """Return the vectors of `ids` as they are served, category rows included, shape (..., D)."""
    rows = table.weights[ids]
    return rows if table.common is None else rows + table.common.weights[table.kinds_R[ids]]


def _add_category_vectors(table: EmbeddingTable, rows: Tensor, ids: Tensor | slice) -> Tensor:
    if table.common is None:
        return rows
    categories = table.kinds_R[ids]
    # without the mask, items without a category would share row 0
    return rows + table.common.lookup(categories) * (categories > 0)[..., None]


def set_categories(table: EmbeddingTable, categories_I: Tensor | None) -> None:
    """Set the category of each item, shape (I,), starting at item 0; 0 = none.

    Surplus categories share the rows of others. An untrained item starts at the vector of its category. Raises
    OptionError if the table has categories and the log has none.
    """
    if table.common is None:
        return
    if categories_I is None:
        raise OptionError("The log has no item categories. Set the model's option categories=0.")
    categories_I, n_categories = categories_I[: len(table.packed)].to(table.kinds_R), len(table.common.packed) - 1
    table.kinds_R = torch.zeros_like(table.kinds_R)
    table.kinds_R[: len(categories_I)] = torch.where(categories_I > 0, (categories_I - 1) % n_categories + 1, 0)
    if bool((table.steps_R > 0).any()):
        table.weights[(table.steps_R == 0) & (table.kinds_R > 0)] = 0.0


def lookup_many(table: EmbeddingTable, *ids: Tensor) -> list[Tensor]:
    """Return the vectors (..., D) of each of several tensors of ids, with one `lookup`."""
    rows = table.lookup(torch.cat([part.reshape(-1) for part in ids])).split([part.numel() for part in ids])
    return [part_ND.view(*part.shape, part_ND.shape[1]) for part, part_ND in zip(ids, rows)]


def embedding_tables(model: TrainedModel) -> dict[str, EmbeddingTable]:
    """Return the tables of a model by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, EmbeddingTable)}


def grow_with_zeros(table: EmbeddingTable, n_rows: int) -> None:
    """Add rows up to n_rows, in place. Rows that are added after the first training start at 0.

    Without training, their inner products are 0, so every item with a score above 0 is ranked ahead of them.
    """
    n_old = len(table.weights)
    table.grow(n_rows)
    if bool((table.steps_R > 0).any()):
        table.weights[n_old:] = 0.0


def _adam_step(rows: Tensor, steps_N: Tensor, gradient: Tensor, lr: float) -> None:
    """Take an Adam step on packed rows, in place. `steps_N` includes this step."""
    w, m, v = rows.chunk(3, dim=1)
    m.mul_(BETA1).add_(gradient, alpha=1 - BETA1)
    v.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
    second_N = (1 - BETA2**steps_N).sqrt_()  # bias corrections of the moments
    size_N = second_N / (1 - BETA1**steps_N)
    w.addcdiv_(m * size_N[:, None], v.sqrt().add_(second_N[:, None], alpha=EPS), value=-lr)


def _initial_rows(seed: int, first: int, stop: int, n_dims: int) -> Tensor:
    """Draw standard normal rows (stop - first, D), in blocks of `BLOCK_ROWS` rows with one generator each."""
    blocks = []
    for block in range(first // BLOCK_ROWS, (stop - 1) // BLOCK_ROWS + 1):
        blocks.append(normal((BLOCK_ROWS, n_dims), stream(seed, "rows", block)))
    return torch.cat(blocks)[first % BLOCK_ROWS :][: stop - first]
