"""The catalog: an append-only table from ids to rows. The first id ever seen is row 1; row 0 is padding.

The row of an id never changes, so tables of earlier versions stay valid. An id that is first seen after span t has a
higher row than all ids of spans 0 to t.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from freshrec.data.identities import convert_ids
from freshrec.errors import LogError, StateError

TYPE_NAMES = {pl.Int64: "whole numbers", pl.String: "text", pl.Float64: "numbers"}  # names of the types in messages
SPAN_COLUMNS = {"first_span": pl.Int32, "last_span": pl.Int32}  # beside "id", which is Int64 or String
UInt32Array: TypeAlias = NDArray[np.uint32]
IdColumn: TypeAlias = NDArray[np.int64] | pl.Series  # numbers, or text


@dataclass(frozen=True, eq=False)
class Catalog:
    """Ids and their rows. `frame` has the columns id, first_span and last_span; the id at position i has row i + 1.

    An erased id is null. Its row is never used again.
    """

    frame: pl.DataFrame

    def __len__(self) -> int:
        return len(self.frame)

    @staticmethod
    def empty() -> Catalog:
        """Return a catalog without ids. The first `extend` decides whether ids are integers or strings."""
        return Catalog(pl.DataFrame(schema={"id": pl.Null, **SPAN_COLUMNS}))

    @staticmethod
    def load(frame: pl.DataFrame) -> Catalog:
        """Return the catalog of a saved `frame`. Raises StateError if its columns are wrong or ids repeat."""
        schema = dict(frame.schema)
        kind = schema.pop("id", None)
        if schema != SPAN_COLUMNS or kind not in (pl.Int64, pl.String, pl.Null):
            raise StateError(f"The catalog file has wrong columns: {frame.schema}. Restore it, or fit again.")
        if not frame["id"].drop_nulls().is_unique().all():
            raise StateError("The catalog file has repeated ids. Restore it, or fit again.")
        return Catalog(frame)

    def extend(self, ids: pl.Series, span: int) -> Catalog:
        """Return the catalog with the `ids` of a span. New ids get the next rows, in order of appearance."""
        ids = self.normalize_ids(ids)
        current = pl.DataFrame({"id": ids.unique(maintain_order=True)}).with_columns(
            pl.lit(span, pl.Int32).alias("first_span"), pl.lit(span, pl.Int32).alias("last_span")
        )
        old = self.frame.with_columns(pl.col("id").cast(ids.dtype))
        returning = old.join(current.select("id", today="last_span"), on="id", how="left", maintain_order="left")
        seen = returning.select("id", "first_span", pl.coalesce("today", "last_span").alias("last_span"))
        new = current.join(old, on="id", how="anti", maintain_order="left")
        return Catalog(pl.concat([seen, new]))

    def rows(self, ids: pl.Series) -> Tensor:
        """Return the rows of `ids` (int64); 0 for an unknown id."""
        ids = self.normalize_ids(ids)
        order_I, sorted_ids = self._sorted_ids
        if not len(order_I) or not len(ids):
            return torch.zeros(len(ids), dtype=torch.int64)
        at_N, is_known_N = _search_sorted(sorted_ids, ids)
        return torch.from_numpy((order_I[at_N].astype("int64") + 1) * is_known_N)

    def row(self, raw_id: int | str) -> int:
        """Return the row of one id of the catalog's type; 0 if unknown. Faster than `rows` for a single id."""
        order_I, sorted_ids = self._sorted_ids
        position = bisect_left(sorted_ids, raw_id)
        return int(order_I[position]) + 1 if position < len(order_I) and sorted_ids[position] == raw_id else 0

    def erase_row(self, row: int) -> Catalog:
        """Return the catalog without the id of a row."""
        return Catalog(self.frame.with_columns(id=pl.when(pl.int_range(pl.len()) != row - 1).then("id")))

    def reset_spans(self) -> Catalog:
        """Return the same rows with all ids in span 0, as after a base block."""
        return Catalog(self.frame.with_columns(pl.lit(0, kind).alias(name) for name, kind in SPAN_COLUMNS.items()))

    @cached_property
    def _sorted_ids(self) -> tuple[UInt32Array, IdColumn]:
        """The positions of the ids in ascending order of the ids, and the sorted ids; erased ids are left out."""
        order_I = self.frame["id"].arg_sort(nulls_last=True)[: len(self) - self.frame["id"].null_count()]
        return order_I.to_numpy(), _to_indexable(self.frame["id"].gather(order_I))

    def ids(self, rows: Tensor) -> pl.Series:
        """Return the ids of `rows`; null for row 0. Rows must be at most `len(self)`."""
        positions = pl.Series("row", rows.numpy() - 1, dtype=pl.Int64)
        return self.frame["id"].gather(positions.set(positions < 0, None) if bool((rows == 0).any()) else positions)

    @cached_property
    def id_column(self) -> IdColumn:
        """The ids of rows 1, 2, ...; `.item(row - 1)` is faster than `ids` for one id. Undefined for an erased id."""
        return _to_indexable(self.frame["id"])

    def normalize_ids(self, ids: pl.Series) -> pl.Series:
        """Return `ids` as the catalog's type. Raises LogError for nulls and for ids that are not exactly of it."""
        ids = convert_ids(ids, self.frame["id"].dtype)
        if ids.null_count():
            raise LogError(f"Rows without an id in column {ids.name!r}: {ids.null_count():,}. Remove them.")
        return ids


def _to_indexable(ids: pl.Series) -> IdColumn:
    """Return integer ids as an array, which is faster for single ids. An erased integer id is 0."""
    return ids.fill_null(0).to_numpy() if ids.dtype == pl.Int64 else ids


def _search_sorted(sorted_ids: IdColumn, ids: pl.Series) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the position of each of `ids` among the sorted ids, and whether it is one of them."""
    last = len(sorted_ids) - 1
    if isinstance(sorted_ids, pl.Series):
        at_N = sorted_ids.search_sorted(ids).clip(upper_bound=last)
        return at_N.to_numpy(), (sorted_ids.gather(at_N) == ids).to_numpy()
    ids_N = ids.to_numpy()
    positions_N = sorted_ids.searchsorted(ids_N).clip(max=last)
    return positions_N, sorted_ids[positions_N] == ids_N
