"""Read one column of a source: ids, numbers or times. Bad rows are reported, not dropped."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from freshrec.errors import LogError

TEXT_TYPES = (pl.String, pl.Categorical, pl.Enum, pl.Null)
FLOAT_LIMITS: dict[pl.DataType | type[pl.DataType], int] = {  # below it, every whole number is exact
    pl.Float16: 2**11,
    pl.Float32: 2**24,
    pl.Float64: 2**53,
}


@dataclass(frozen=True)
class ColumnFault:
    """A problem of a column, and the rows that have it."""

    column: str  # our name of the column
    problem: str  # continues a sentence after the name of the column: "is null"
    rows: pl.Series  # bool, True for a bad row
    advice: str = ""  # a sentence: what to do if all rows have the problem


def to_plain_type(column: pl.Series, expected: str) -> pl.Series:
    """Return the column as String, Int64 or Float64; null if a value does not fit. Raises LogError for other types."""
    dtype = column.dtype
    if dtype in TEXT_TYPES:
        return column.cast(pl.String)
    if dtype.is_float() or dtype.is_decimal():
        return column.cast(pl.Float64).fill_nan(None)
    if dtype.is_integer():
        return column.cast(pl.Int64, strict=False)
    raise LogError(f"Column {column.name} has the type {str(dtype)[:60]}. Convert it to {expected}.")


def to_whole_numbers(column: pl.Series, expected: str) -> pl.Series:
    """Return numbers as Int64 or Int128; null if a value is not exactly whole. Raises LogError for other types.

    A float is exact below `FLOAT_LIMITS`.
    """
    dtype = column.dtype
    if limit := FLOAT_LIMITS.get(dtype):
        return column.set(~((column == column.floor()) & (column.abs() < limit)), None).cast(pl.Int64)
    if dtype.is_decimal():
        return column.set(column != column.floor(), None).cast(pl.Int128, strict=False)
    if dtype in (pl.UInt64, pl.Int128, pl.UInt128):
        return column.cast(pl.Int128, strict=False)
    return to_plain_type(column, expected).cast(pl.Int64)


def to_integers(column: pl.Series, expected: str) -> pl.Series:
    """Return a column as Int64; null if a value is not exactly a whole number of 64 bits."""
    if column.dtype not in TEXT_TYPES:
        return to_whole_numbers(column, expected).cast(pl.Int64, strict=False)
    text = column.cast(pl.String)
    floats = to_whole_numbers(text.cast(pl.Float64, strict=False), expected)
    return text.cast(pl.Int64, strict=False).fill_null(floats)


def read_labels(column: pl.Series) -> pl.Series:
    """Read names such as event types, as String."""
    return to_plain_type(column, "text").cast(pl.String)


def read_numbers(column: pl.Series, *, integers_only: bool) -> tuple[pl.Series, list[ColumnFault]]:
    """Read numbers as Int64 or Float64. True is 1, False is 0."""
    column = column.cast(pl.Int64) if column.dtype == pl.Boolean else column
    if integers_only:
        numbers, problem = to_integers(column, "numbers"), "is not a whole number"
    else:
        numbers, problem = to_plain_type(column, "numbers").cast(pl.Float64, strict=False), "is not a finite number"
        numbers = numbers.set(~numbers.is_finite(), None)
    return numbers, [ColumnFault(column.name, problem, numbers.is_null() & has_value(column))]


def has_value(column: pl.Series) -> pl.Series:
    """Return True for each value that is not null, NaN or an empty text."""
    if column.dtype.is_float():
        return column.is_not_null() & column.is_not_nan()
    return column.is_not_null() & (column != "") if column.dtype == pl.String else column.is_not_null()
