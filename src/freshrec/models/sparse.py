"""Sparse scores: items as rows of a matrix, and the best entries of each row, without a loop over rows."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]


def rows_of(items_BT: NDArray[Any], n_columns: int) -> Any:
    """(B, n_columns) sparse, 1 where a row has the item, however often; 0, the padding, is no item."""
    items_BW = distinct(items_BT)
    offsets = np.append(0, np.cumsum((items_BW > 0).sum(1)))
    columns = items_BW[items_BW > 0].astype(np.int32)
    return sparse.csr_array((np.ones(len(columns), np.float32), columns, offsets), shape=(len(items_BW), n_columns))


def starts(sorted_BT: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a run of equal items begins, in rows that are sorted; 0, the padding, is no item."""
    starts_BT: NDArray[np.bool_] = sorted_BT > 0
    starts_BT[:, 1:] &= sorted_BT[:, 1:] != sorted_BT[:, :-1]
    return starts_BT


def distinct(items_BT: NDArray[Any]) -> Ints:
    """(B, W): the items of each row, each once and ascending, then 0; no wider than needed."""
    sorted_BT = np.sort(items_BT, axis=1).astype(np.int64)
    is_new_BT = starts(sorted_BT)
    n_B = is_new_BT.sum(1)
    items_BW = np.zeros((len(sorted_BT), int(n_B.max(initial=0))), np.int64)
    items_BW[np.arange(items_BW.shape[1]) < n_B[:, None]] = sorted_BT[is_new_BT]
    return items_BW


def last_of(values: NDArray[Any], counts_B: Ints, width: int) -> NDArray[Any]:
    """(B, width): the last of each row's values, which stand one row after the other; 0 on the left where fewer."""
    ends_B = np.cumsum(counts_B)
    at_BW = ends_B[:, None] + np.arange(-width, 0)
    return np.where(at_BW >= (ends_B - counts_B)[:, None], values[np.maximum(at_BW, 0)], 0)


def best(scores_BN: Any, k: int) -> tuple[Ints, Floats]:
    """Columns and values (B, K) of the largest entries of each row, the best first; 0 where there are fewer."""
    n_B = np.diff(scores_BN.indptr)
    width = int(n_B.max(initial=0))
    values_BW = np.zeros((len(n_B), width), np.float32)
    values_BW[np.arange(width) < n_B[:, None]] = scores_BN.data
    top = torch.from_numpy(values_BW).topk(min(k, width))
    values_BK = top.values.numpy()
    is_there_BK = values_BK > 0
    at_BK = np.where(is_there_BK, scores_BN.indptr[:-1, None] + top.indices.numpy(), 0)
    columns_BK = scores_BN.indices[at_BK] if scores_BN.nnz else at_BK
    return np.where(is_there_BK, columns_BK, 0).astype(np.int64), values_BK


def sums(scores_BN: Any) -> Floats:
    """(B,) of the entries of each row."""
    row_E = np.repeat(np.arange(scores_BN.shape[0]), np.diff(scores_BN.indptr))
    return np.bincount(row_E, scores_BN.data, minlength=scores_BN.shape[0]).astype(np.float32)


def picked(scores_BI: Tensor, items: Tensor) -> Tensor:
    """(B, N): the scores of `items`, shared by all rows (N,) or each row's own (B, N)."""
    return scores_BI.gather(1, items) if items.ndim == 2 else scores_BI[:, items]


class Board:
    """(B, I) numbers of which only those that were put on it are not 0; it is wiped, not made again."""

    def __init__(self, n_rows: int, n_columns: int) -> None:
        self.values_BI = np.zeros((n_rows, n_columns), np.float32)
        self.row_B1 = np.arange(n_rows)[:, None]

    def at(self, items_BC: Ints, put_BW: Ints, values_BW: NDArray[Any]) -> Floats:
        """(B, C): the value of each item, of which `put_BW` have those given (the last one wins) and all others 0."""
        self.values_BI[self.row_B1, put_BW] = values_BW
        found_BC: Floats = np.where(items_BC > 0, self.values_BI[self.row_B1, items_BC], 0)
        self.values_BI[self.row_B1, put_BW] = 0
        return found_BC

    def of(self, items_BC: Ints, scores_BI: Any) -> Floats:
        """(B, C): the entry of each item in a sparse matrix."""
        scores_BI.toarray(out=self.values_BI)
        found_BC: Floats = np.where(items_BC > 0, self.values_BI[self.row_B1, items_BC], 0)
        self.values_BI.fill(0)
        return found_BC
