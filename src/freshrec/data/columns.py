"""Read one column of a source: ids, numbers or times. Bad rows are reported, not dropped."""

from __future__ import annotations

import time
from dataclasses import dataclass

import polars as pl

from freshrec.errors import LogError

MAX_ID_BYTES = 1000
SECOND = 1_000_000  # microseconds
DAY = 86_400 * SECOND
YEAR_1980, YEAR_2100 = 315_532_800 * SECOND, 4_102_444_800 * SECOND
NUMBER_PATTERN = r"^[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?$"
UNITS_PER_SECOND = {"s": 1, "ms": 1000, "us": 1_000_000, "ns": 1_000_000_000}


@dataclass(frozen=True)
class ColumnFault:
    """A problem of a column, and the rows that have it."""

    column: str  # our name of the column
    problem: str  # continues a sentence after the name of the column: "is null"
    rows: pl.Series  # bool, True for a bad row


def _to_plain_type(column: pl.Series, expected: str) -> pl.Series:
    """Return the column as String, Int64 or Float64; null if a value does not fit. Raises LogError for other types."""
    dtype = column.dtype
    if dtype in (pl.String, pl.Categorical, pl.Enum, pl.Null):
        return column.cast(pl.String)
    if dtype.is_float() or dtype.is_decimal():
        return column.cast(pl.Float64).fill_nan(None)
    if dtype.is_integer():
        return column.cast(pl.Int64, strict=False)
    raise LogError(f"Column {column.name} has the type {str(dtype)[:60]}. Convert it to {expected}.")


def _to_integers(column: pl.Series) -> pl.Series:
    """Return a plain column as Int64; null if a value is not a whole number."""
    if column.dtype == pl.String:
        column = column.cast(pl.Float64, strict=False)
    if column.dtype == pl.Float64:
        column = column.set(column != column.floor(), None)
    return column.cast(pl.Int64, strict=False)


def read_ids(
    column: pl.Series, *, required: bool, infer_integers: bool, allow_mixed: bool
) -> tuple[pl.Series, list[ColumnFault]]:
    """Read ids as Int64 or String.

    - `required`: a missing id is a fault.
    - `infer_integers`: a text column becomes Int64 if all its values are whole numbers without leading zeros.
    - `allow_mixed`: a text column may hold both numbers and other text.
    """
    name, ids = column.name, _to_plain_type(column, "text or whole numbers")
    if ids.dtype != pl.String:
        ids = _to_integers(ids)
        not_integer = ColumnFault(name, "is not a 64-bit whole number", ids.is_null() & has_value(column))
        return ids, [not_integer] + ([ColumnFault(name, "is null", ids.is_null())] if required else [])
    size = ids.str.len_bytes()
    ids = ids.set(size == 0, None)
    faults = [ColumnFault(name, f"is longer than {MAX_ID_BYTES:,} bytes", size > MAX_ID_BYTES)]
    faults += [ColumnFault(name, "is null or empty", ids.is_null())] if required else []
    if not infer_integers:
        return ids, faults
    digits = ids.str.contains(r"^-?[0-9]{1,18}$")
    n_digits, n_ids = digits.sum(), len(ids) - ids.null_count()
    if n_digits == n_ids:
        padded = ids.str.contains(r"^-?0[0-9]|^-0").any()
        return ids if padded else ids.cast(pl.Int64), faults
    if n_digits and not allow_mixed:
        rare, description = (
            (~digits, "text, while most ids are whole numbers")
            if 2 * n_digits >= n_ids
            else (digits, "a number, while most ids are text")
        )
        faults.append(ColumnFault(name, f"is {description} (if intended, pass --columns {name}=NAME:text)", rare))
    return ids, faults


def read_labels(column: pl.Series) -> pl.Series:
    """Read names such as event types, as String."""
    return _to_plain_type(column, "text").cast(pl.String)


def read_numbers(column: pl.Series, *, integers_only: bool) -> tuple[pl.Series, list[ColumnFault]]:
    """Read numbers as Int64 or Float64. True is 1, False is 0."""
    plain = _to_plain_type(column.cast(pl.Int64) if column.dtype == pl.Boolean else column, "numbers")
    if integers_only:
        numbers, problem = _to_integers(plain), "is not a whole number"
    else:
        numbers, problem = plain.cast(pl.Float64, strict=False), "is not a finite number"
        numbers = numbers.set(~numbers.is_finite(), None)
    return numbers, [ColumnFault(column.name, problem, numbers.is_null() & has_value(column))]


def has_value(column: pl.Series) -> pl.Series:
    """Return True for each value that is not null, NaN or an empty text."""
    if column.dtype.is_float():
        return column.is_not_null() & column.is_not_nan()
    return column.is_not_null() & (column != "") if column.dtype == pl.String else column.is_not_null()


def read_times(column: pl.Series) -> tuple[pl.Series, str, list[ColumnFault]]:
    """Read times. Returns microseconds since 1970 (UTC), the unit of the source, and the faults."""
    times, unit = _to_microseconds(column)
    # No row comes from the future, except in a log whose times are all artificial. Two days of grace cover time zones.
    today = int(time.time()) * SECOND
    is_artificial = not times.is_between(YEAR_1980, today).any()
    latest = YEAR_2100 if is_artificial else today + 2 * DAY
    faults = [
        ColumnFault(column.name, "cannot be read as a time", times.is_null() & has_value(column)),
        ColumnFault(column.name, "is before 1980", times < YEAR_1980),
        ColumnFault(column.name, "is after the year 2100" if is_artificial else "is in the future", times > latest),
    ]
    return times, unit, faults


def _to_microseconds(column: pl.Series) -> tuple[pl.Series, str]:
    """Return microseconds since 1970 (null if unreadable) and the unit.

    The unit of numbers is inferred from their median.
    """
    dtype = column.dtype
    if isinstance(dtype, pl.Datetime):
        return column.dt.timestamp("us"), dtype.time_unit
    if dtype == pl.Date:
        return column.cast(pl.Datetime("us")).dt.timestamp("us"), "ISO 8601"
    numbers = _to_plain_type(column, "times")
    if numbers.dtype == pl.String:
        text = numbers.str.strip_chars()
        if not text.filter(text != "").head(1).str.contains(NUMBER_PATTERN).any():
            return _parse_iso_8601(text), "ISO 8601"
        numbers = text.cast(pl.Int64, strict=False)
        if (numbers.is_null() & has_value(text)).any():
            numbers = text.cast(pl.Float64, strict=False).fill_nan(None)
    median = numbers.cast(pl.Float64).abs().median()
    size = median if isinstance(median, float) else 0.0
    unit = "s" if size < 1e11 else "ms" if size < 1e14 else "us" if size < 1e17 else "ns"
    if size * SECOND / UNITS_PER_SECOND[unit] < YEAR_1980 and numbers.null_count() < len(numbers):
        raise LogError(
            f"The timestamps are around {size:.0f}, which is before 1980 in seconds. If they count days or events, "
            "pass --columns period=NAME."
        )
    # Values beyond 5e9 s (the year 2128) are wrong anyway. Clipping them prevents an overflow.
    numbers = numbers.clip(-5_000_000_000 * UNITS_PER_SECOND[unit], 5_000_000_000 * UNITS_PER_SECOND[unit])
    scaled = numbers // 1000 if unit == "ns" else numbers * (SECOND // UNITS_PER_SECOND[unit])
    return scaled.cast(pl.Int64, strict=False), unit


def _parse_iso_8601(column: pl.Series) -> pl.Series:
    """Parse dates, and times with or without a time zone (default: UTC)."""
    text = pl.col(column.name).str.replace(" ", "T", literal=True)
    zoned = text.str.to_datetime("%+", strict=False, time_unit="us", time_zone="UTC").dt.timestamp("us")
    plain = [
        text.str.to_datetime(format, strict=False, time_unit="us").dt.timestamp("us")
        for format in ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M")
    ]
    day = text.str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("us")).dt.timestamp("us")
    return column.to_frame().select(pl.coalesce(*plain, day, zoned)).to_series()
