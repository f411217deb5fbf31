"""Sparse matrices of scores: how to build them, and the best entries of each row, without a loop over rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


def build_csr(values_E: NDArray[Any], columns_E: NDArray[Any], offsets_B: NDArray[Any], n_columns: int) -> Any:
    """Build a sparse matrix (B, n_columns). Its indices have 32 bits if that is enough.

    In a product, scipy converts the indices of both sides to the wider type. A short query with 64-bit indices made
    every request convert the pairs of all items.
    """
    index_type = np.int32 if max(len(columns_E), n_columns) < 2**31 else np.int64
    parts = values_E, columns_E.astype(index_type, copy=False), offsets_B.astype(index_type, copy=False)
    return sparse.csr_array(parts, shape=(len(offsets_B) - 1, n_columns))


def item_indicator(items_BT: NDArray[Any], n_columns: int) -> Any:
    """Return a sparse matrix (B, n_columns) with 1 where a row has the item at least once. Item 0 is padding."""
    sorted_BT = np.sort(items_BT, axis=1)
    starts_BT = run_starts(sorted_BT)
    columns_E = sorted_BT[starts_BT]
    return build_csr(np.ones(len(columns_E), np.float32), columns_E, offsets_from_counts(starts_BT.sum(1)), n_columns)


def offsets_from_counts(n_B: NDArray[Any]) -> Int64Array:
    """Return the start of each row and the end of the last one, shape (B + 1,), from the sizes of the rows."""
    offsets_B = np.zeros(len(n_B) + 1, np.int64)
    np.cumsum(n_B, out=offsets_B[1:])
    return offsets_B


def run_starts(sorted_BT: NDArray[Any]) -> NDArray[np.bool_]:
    """Mark the starts of runs of equal items in sorted rows. Item 0 is padding and is not marked."""
    is_start_BT: NDArray[np.bool_] = sorted_BT > 0
    is_start_BT[:, 1:] &= sorted_BT[:, 1:] != sorted_BT[:, :-1]
    return is_start_BT


def distinct_items(items_BT: NDArray[Any]) -> Int64Array:
    """Return the distinct items of each row, ascending and padded with 0 on the right, shape (B, W)."""
    sorted_BT = np.sort(items_BT, axis=1).astype(np.int64)
    is_new_BT = run_starts(sorted_BT)
    n_B = is_new_BT.sum(1)
    items_BW = np.zeros((len(sorted_BT), int(n_B.max(initial=0))), np.int64)
    items_BW[np.arange(items_BW.shape[1]) < n_B[:, None]] = sorted_BT[is_new_BT]
    return items_BW


def row_sizes(scores_BN: Any) -> NDArray[Any]:
    """Return the number of entries per row of a sparse matrix, (B,). For few rows, np.diff takes 5 times as long."""
    n_B: NDArray[Any] = scores_BN.indptr[1:] - scores_BN.indptr[:-1]
    return n_B


def pack_keys(value_N: NDArray[Any], position_N: NDArray[Any]) -> Int64Array:
    """bits(value) 2^32 - position, one integer key per value, shape (N,).

    Values are at least 0 and are used in single precision; positions are below 2^32. The bits of positive floats, read
    as integers, are in the order of the floats. So the keys are in the order of the values. Of equal values, the
    smaller position has the larger key. A value of 0 has no positive key.
    """
    bits_N: Int64Array = value_N.astype(np.float32, copy=False).view(np.int32).astype(np.int64)
    key_N: Int64Array = (bits_N << 32) - position_N
    return key_N


def unpack_keys(key_N: NDArray[Any]) -> tuple[Int64Array, Float32Array]:
    """Return the positions and the values that `pack_keys` packed. A key of 0 is position 0 with value 0."""
    position_N: Int64Array = -key_N & 0xFFFFFFFF
    return position_N, ((key_N + position_N) >> 32).astype(np.int32).view(np.float32)


def top_k_entries(scores_BN: Any, k: int) -> tuple[Int64Array, Float32Array]:
    """Return the columns and values (B, K) of the largest entries of each row, best first, padded with 0.

    Of equal values, the first column is better, so that the result of a row does not depend on the other rows.
    """
    n_B = row_sizes(scores_BN)
    width = int(n_B.max(initial=0))
    keys_E = pack_keys(scores_BN.data, scores_BN.indices)
    if len(keys_E) == width * len(n_B):  # all rows are full, as with a single row
        keys_BW = keys_E.reshape(len(n_B), width)
    else:
        keys_BW = np.zeros((len(n_B), width), np.int64)
        keys_BW[np.arange(width) < n_B[:, None]] = keys_E
    keys_BK = torch.from_numpy(keys_BW).topk(min(k, width)).values.numpy()
    columns_BK, values_BK = unpack_keys(keys_BK)
    return np.where(values_BK > 0, columns_BK, 0), values_BK


def row_sums(scores_BN: Any) -> Float32Array:
    """Return the sum of each row, shape (B,)."""
    has_any_B = row_sizes(scores_BN) > 0
    sums_B = np.zeros(len(has_any_B))
    if len(scores_BN.data):
        sums_B[has_any_B] = np.add.reduceat(scores_BN.data, scores_BN.indptr[:-1][has_any_B], dtype=np.float64)
    return sums_B.astype(np.float32)


def select_scores(scores_BI: Tensor, items: Tensor) -> Tensor:
    """Return the scores (B, N) of `items`, which are shared by all rows (N,) or given per row (B, N)."""
    return scores_BI.gather(1, items) if items.ndim == 2 else scores_BI[:, items]


@dataclass(frozen=True)
class ItemOccurrences:
    """The distinct items W of all rows, sorted by row and item, and the steps E at which each occurs in its row."""

    n_steps: int
    offsets_B: Int64Array  # row b has the items offsets_B[b] : offsets_B[b + 1]
    row_W: Int64Array
    items_W: Int64Array
    steps_E: Int64Array  # item by item, oldest first
    first_step_W: Int64Array  # (W + 1,) start of the steps of each item, and end of the last one

    @staticmethod
    def from_items(items_BT: NDArray[Any]) -> ItemOccurrences:
        """Find the occurrences of all items. Item 0 is padding and is left out."""
        row_B1 = np.arange(len(items_BT))[:, None]
        order_BT = np.argsort(items_BT, axis=1, kind="stable")
        sorted_BT = items_BT[row_B1, order_BT]
        starts_BT, real_BT = run_starts(sorted_BT), sorted_BT > 0
        row_W, column_W = starts_BT.nonzero()
        offsets_B = offsets_from_counts(starts_BT.sum(1))
        items_W, steps_E = sorted_BT[row_W, column_W], order_BT[real_BT]
        at_W = np.append(starts_BT[real_BT].nonzero()[0], len(steps_E))
        return ItemOccurrences(items_BT.shape[1], offsets_B, row_W, items_W, steps_E, at_W)

    @property
    def counts_W(self) -> Int64Array:
        """Number of times each item occurs in its row, shape (W,)."""
        return self.first_step_W[1:] - self.first_step_W[:-1]

    @property
    def last_step_W(self) -> Int64Array:
        """Last step of each item in its row, shape (W,)."""
        last_W: Int64Array = self.steps_E[self.first_step_W[1:] - 1]
        return last_W


class CandidateCells:
    """Numbers of the candidates (B, C) of all rows, counted from 1, row by row; 0 = not a candidate."""

    def __init__(self, items_BC: Int64Array, n_columns: int) -> None:
        n_rows, self.width = items_BC.shape
        self.n_columns, self.row_B1 = n_columns, np.arange(n_rows)[:, None]
        self.cells_BI = np.zeros((n_rows, n_columns), np.int32)
        self.cells_BI[self.row_B1, items_BC] = np.arange(1, items_BC.size + 1).reshape(items_BC.shape)
        self.cells_BI[:, 0] = 0

    def cells_of(self, items_BK: Int64Array) -> NDArray[np.int32]:
        """Return the cells of some items of each row, shape (B, K)."""
        cells_BK: NDArray[np.int32] = self.cells_BI[self.row_B1, items_BK]
        return cells_BK

    def matching_cells(self, scores_BI: Any) -> tuple[NDArray[np.int32], Float32Array]:
        """Return the cells (H,) of the candidates among the entries of a sparse matrix, and their values (H,).

        Each value is divided by the sum of its row.
        """
        columns_E, n_B = scores_BI.indices, row_sizes(scores_BI)
        at_E = columns_E if len(n_B) == 1 else columns_E + np.repeat(np.arange(len(n_B)) * self.n_columns, n_B)
        cells_E = self.cells_BI.reshape(-1).take(at_E)
        hits_H = (cells_E > 0).nonzero()[0]
        cells_H = cells_E[hits_H]
        sums_H = np.maximum(row_sums(scores_BI), 1e-9)[(cells_H - 1) // max(1, self.width)]
        shares_H: Float32Array = scores_BI.data[hits_H] / sums_H
        return cells_H, shares_H
