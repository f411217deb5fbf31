"""Rows of pandas frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from freshrec.data.reader_errors import as_log_error

if TYPE_CHECKING:
    import pandas as pd


def is_pandas_frame(source: object) -> bool:
    return any(
        kind.__module__.split(".")[0] == "pandas" and kind.__name__ == "DataFrame" for kind in type(source).__mro__
    )


def from_pandas(source: pd.DataFrame) -> tuple[pl.DataFrame, dict[str, str]]:
    """Convert a pandas frame column by column, without pyarrow.

    Also returns the columns that no log can use, with a sentence for each: those that mix types. They become text. The
    second column of a name gets the suffix _duplicated_0, as in a CSV file.
    """
    columns: dict[str, pl.Series] = {}
    problems: dict[str, str] = {}
    for place, label in enumerate(source.columns):
        column, name = source.iloc[:, place], str(label)
        copies = sum(1 for earlier in source.columns[:place] if str(earlier) == name)
        name += f"_duplicated_{copies - 1}" if copies else ""
        try:
            if column.dtype.kind in "iuf" and column.dtype == column.to_numpy().dtype:
                columns[name] = pl.Series(name, column.to_numpy(), nan_to_null=True)
            else:
                columns[name] = pl.Series(name, column.astype(object).where(column.notna(), None).tolist())
        except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError):
            problems[name] = (
                f'Column "{name}" of the frame mixes types, such as numbers and text. Convert it or drop it.'
            )
            columns[name] = pl.Series(name, [str(value) for value in column.tolist()])
    with as_log_error("the frame"):
        return pl.DataFrame(list(columns.values())), problems
