"""Read one column of a source: ids, numbers or times, as a whole, with its faults: which rows are bad, and why."""

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
    """What is wrong with a column, and in which rows."""

    column: str  # our name
    problem: str
    rows: pl.Series  # bool


def _to_plain_type(column: pl.Series, expected: str) -> pl.Series:
    """`column` as String, Int64 or Float64 without NaN, null where it does not fit. LogError for any other type."""
    dtype = column.dtype
    if dtype in (pl.String, pl.Categorical, pl.Enum, pl.Null):
        return column.cast(pl.String)
    if dtype.is_float() or dtype.is_decimal():
        return column.cast(pl.Float64).fill_nan(None)
    if dtype.is_integer():
        return column.cast(pl.Int64, strict=False)
    raise LogError(f"the column for {column.name} holds {str(dtype)[:60]}, not {expected}; convert it first.")


def _to_integers(column: pl.Series) -> pl.Series:
    """Int64, null where the value of a plain column is no whole number."""
    if column.dtype == pl.String:
        column = column.cast(pl.Float64, strict=False)
    if column.dtype == pl.Float64:
        column = column.set(column != column.floor(), None)
    return column.cast(pl.Int64, strict=False)


def read_ids(
    column: pl.Series, *, required: bool, infer_integers: bool, allow_mixed: bool
) -> tuple[pl.Series, list[ColumnFault]]:
    """Ids as Int64 or String. `infer_integers`: text that is whole numbers throughout becomes Int64; 007 stays text."""
    name, ids = column.name, _to_plain_type(column, "text or whole numbers")
    if ids.dtype != pl.String:
        ids = _to_integers(ids)
        not_integer = ColumnFault(name, "is no whole number of 64 bits", ids.is_null() & has_value(column))
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
            (~digits, "text among whole numbers") if 2 * n_digits >= n_ids else (digits, "a number among text")
        )
        faults.append(ColumnFault(name, f"is {description} (if meant so: --columns {name}=NAME:text)", rare))
    return ids, faults


def read_labels(column: pl.Series) -> pl.Series:
    """Names of few kinds, such as event types, as String."""
    return _to_plain_type(column, "text").cast(pl.String)


def read_numbers(column: pl.Series, *, integers_only: bool) -> tuple[pl.Series, list[ColumnFault]]:
    """Int64 or Float64; flags are 0 and 1."""
    plain = _to_plain_type(column.cast(pl.Int64) if column.dtype == pl.Boolean else column, "numbers")
    if integers_only:
        numbers, problem = _to_integers(plain), "is no whole number"
    else:
        numbers, problem = plain.cast(pl.Float64, strict=False), "is no finite number"
        numbers = numbers.set(~numbers.is_finite(), None)
    return numbers, [ColumnFault(column.name, problem, numbers.is_null() & has_value(column))]


def has_value(column: pl.Series) -> pl.Series:
    """Where the source says something: neither null nor NaN nor an empty text."""
    if column.dtype.is_float():
        return column.is_not_null() & column.is_not_nan()
    return column.is_not_null() & (column != "") if column.dtype == pl.String else column.is_not_null()


def read_times(column: pl.Series) -> tuple[pl.Series, str, list[ColumnFault]]:
    """Microseconds UTC, the unit of the source, and the rows with unreadable or absurd times."""
    times, unit = _to_microseconds(column)
    # A row cannot come from the future (two days of grace are for time zones), unless the log as a whole is invented.
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
    """Microseconds UTC, null where unreadable, and the unit: that of the type, or inferred from the median."""
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
            f"the timestamps are around {size:.0f}, which is before 1980 in seconds; if they count events or days, "
            "name them otherwise: --columns period=NAME."
        )
    # Beyond 5e9 s (the year 2128) everything is absurd alike, and must not overflow.
    numbers = numbers.clip(-5_000_000_000 * UNITS_PER_SECOND[unit], 5_000_000_000 * UNITS_PER_SECOND[unit])
    scaled = numbers // 1000 if unit == "ns" else numbers * (SECOND // UNITS_PER_SECOND[unit])
    return scaled.cast(pl.Int64, strict=False), unit


def _parse_iso_8601(column: pl.Series) -> pl.Series:
    """Dates, and times of day with or without a zone; without one they are UTC."""
    text = pl.col(column.name).str.replace(" ", "T", literal=True)
    zoned = text.str.to_datetime("%+", strict=False, time_unit="us", time_zone="UTC").dt.timestamp("us")
    plain = [
        text.str.to_datetime(format, strict=False, time_unit="us").dt.timestamp("us")
        for format in ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M")
    ]
    day = text.str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("us")).dt.timestamp("us")
    return column.to_frame().select(pl.coalesce(*plain, day, zoned)).to_series()
