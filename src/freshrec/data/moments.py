"""Moments: microseconds since 1970 in UTC. Every way in and out reads and formats them here."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import polars as pl

from freshrec.data.columns import ColumnFault, has_value, to_plain_type
from freshrec.errors import LogError, OptionError

UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
SECOND = 1_000_000  # microseconds
DAY = 86_400 * SECOND
YEAR_1980, YEAR_2100 = 315_532_800 * SECOND, 4_102_444_800 * SECOND
NUMBER_PATTERN = r"^[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?$"
UNITS_PER_SECOND = {"s": 1, "ms": 1000, "us": 1_000_000, "ns": 1_000_000_000}


def parse_microseconds(moment: str, option: str = "The time") -> int:
    """Return the microseconds since 1970 of an ISO 8601 text; UTC if it names no time zone.

    Raises OptionError for another text. Its message names the `option` that holds the text.
    """
    try:
        parsed = datetime.fromisoformat(moment)
    except ValueError as error:
        reason = f" ({error})" if "must be" in str(error) else ""  # such as "month must be in 1..12"
        raise OptionError(
            f'{option} is "{moment[:60]}", which is not a date{reason}. Write it as 2025-06-01 or 2025-06-01T04:00.'
        ) from None
    return to_microseconds(parsed)


def to_microseconds(when: datetime) -> int:
    """Return the microseconds since 1970. A time without a time zone is UTC."""
    return ((when if when.tzinfo else when.replace(tzinfo=UTC)) - UNIX_EPOCH) // timedelta(microseconds=1)


def format_time(time_us: int, timespec: str = "seconds") -> str:
    """Format microseconds since 1970 as ISO 8601 text in UTC. All answers, reports and messages use this format.

    `timespec` is the argument of `datetime.isoformat`. Smaller units are cut off, not rounded.
    """
    return (UNIX_EPOCH + timedelta(microseconds=time_us)).isoformat(timespec=timespec)


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
    numbers = to_plain_type(column, "times")
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
