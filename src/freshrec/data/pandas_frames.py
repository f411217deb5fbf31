"""Rows of pandas frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from freshrec.data.reader_errors import as_log_error
from freshrec.errors import LogError

if TYPE_CHECKING:
    import pandas as pd


def from_pandas(source: pd.DataFrame) -> pl.DataFrame:
    """Convert a pandas frame column by column, without pyarrow. Raises LogError for a column of mixed types."""
    columns = []
    for name in source.columns:
        column = source[name]
        try:
            if column.dtype.kind in "iuf" and column.dtype == column.to_numpy().dtype:
                columns.append(pl.Series(str(name), column.to_numpy(), nan_to_null=True))
            else:
                columns.append(pl.Series(str(name), column.astype(object).where(column.notna(), None).tolist()))
        except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError) as problem:
            raise LogError(
                f'Column "{name}" of the frame mixes types, such as numbers and text. Convert it or drop it.'
            ) from problem
    with as_log_error("the frame"):
        return pl.DataFrame(columns)
