"""Moments: microseconds since 1970 in UTC. Every way in and out reads and formats them here.

Two forms are read: ISO 8601 and numbers since 1970. Smaller units than a microsecond are cut off. Other forms need a
format, such as `%d.%m.%Y`, and occur in columns only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone

import polars as pl

from freshrec.data.columns import ColumnFault, has_value, to_plain_type
from freshrec.errors import LogError, OptionError
from freshrec.text_layout import to_printable

UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
SECOND = 1_000_000  # microseconds
DAY = 86_400 * SECOND
YEAR_1980, YEAR_2100 = 315_532_800 * SECOND, 4_102_444_800 * SECOND
MAX_AHEAD = 2 * DAY  # a source may be ahead of this computer by so much, for example by its time zone
NUMBER_PATTERN = r"^[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?$"
UNITS_PER_SECOND = {"s": 1, "ms": 1000, "us": 1_000_000, "ns": 1_000_000_000}
MAX_SIZES = {"s": 1e11, "ms": 1e14, "us": 1e17}  # a larger number has the next unit
ADVICE = "Write it as 2025-06-01 or 2025-06-01T04:00."

# Date, hours, minutes, seconds, fraction of a second, offset from UTC. PostgreSQL writes 2024-06-24 21:20:11.123+00,
# and BigQuery 2024-06-24 21:20:11 UTC.
ISO_8601_PATTERN = (
    r"^(\d{4}-\d{1,2}-\d{1,2})(?:[Tt ](\d{1,2})(?::(\d{1,2})(?::(\d{1,2})(?:[.,](\d+))?)?)?"
    r"(?: ?(Z|z|UTC|[+-]\d{2}(?::?[0-5]\d)?))?)?$"
)
MAX_OFFSET = 18 * 3600  # seconds; no time zone is further from UTC


def parse_microseconds(moment: str, option: str = "The time") -> int:
    """Return the microseconds since 1970 of an ISO 8601 text or a number; UTC if it names no time zone.

    Raises OptionError for another text. Its message names the `option` that holds the text.
    """
    (found,) = parse_moments([moment])
    if found is None:
        reason = _date_problem(moment)
        raise OptionError(f'{option} is "{to_printable(moment, 60)}", which is not a date{reason}. {ADVICE}')
    if found < YEAR_1980 and pl.Series([moment.strip()]).str.contains(NUMBER_PATTERN).all():
        raise OptionError(
            f"{option} is {to_printable(moment, 60)}, which is before 1980 in seconds since 1970. {ADVICE}"
        )
    return found


def _date_problem(moment: str) -> str:
    """Return what is wrong with a date, such as " (month must be in 1..12)"; "" if that is unknown."""
    try:
        datetime.fromisoformat(moment)
    except ValueError as error:
        return f" ({error})" if "must be" in str(error) else ""
    return ""


def parse_moments(values: Sequence[int | float | str]) -> list[int | None]:
    """Return the microseconds since 1970 of ISO 8601 texts and numbers, each by itself; None if it is neither.

    The size of a number tells its unit: seconds, milliseconds, microseconds or nanoseconds.
    """
    text = pl.Series("moment", [str(value) for value in values], dtype=pl.String).str.strip_chars()
    is_number = text.str.contains(NUMBER_PATTERN)
    times = _parse_iso_8601(text)
    if is_number.any():
        numbers = _split_numbers(text.set(~is_number, None))
        scaled = numbers.select(_scaled(pl.col("whole").cast(pl.Float64).abs())).to_series()
        times = scaled.zip_with(is_number, times)
    return times.to_list()


def to_microseconds(when: datetime) -> int:
    """Return the microseconds since 1970. A time without a time zone is UTC."""
    return ((when if when.tzinfo else when.replace(tzinfo=UTC)) - UNIX_EPOCH) // timedelta(microseconds=1)


def format_time(time_us: int, timespec: str = "seconds") -> str:
    """Format microseconds since 1970 as ISO 8601 text in UTC. All answers, reports and messages use this format.

    `timespec` is the argument of `datetime.isoformat`. Smaller units are cut off, not rounded.
    """
    return (UNIX_EPOCH + timedelta(microseconds=time_us)).isoformat(timespec=timespec)


def latest_plausible_time() -> int:
    """Return the latest time that an event can have now: two days from now, which covers wrong time zones."""
    return int(time.time()) * SECOND + MAX_AHEAD


def read_times(column: pl.Series, time_format: str | None = None) -> tuple[pl.Series, str, list[ColumnFault]]:
    """Read times. Returns microseconds since 1970 (UTC), the unit of the source, and the faults.

    `time_format`: the format of texts and integers in the directives of strptime; None = ISO 8601 or numbers.
    Raises LogError if no value can be a time. A log may lie in the future as a whole, because it may be artificial.
    """
    times, unit = _to_microseconds(column, time_format)
    latest = latest_plausible_time()
    is_future = not times.is_between(YEAR_1980, latest).any()
    unread, advice = "cannot be read as a time", "Times in another form than ISO 8601 need --time-format."
    if unit == time_format:
        unread, advice = f'does not have the form "{time_format}"', ""
    faults = [
        ColumnFault(column.name, unread, times.is_null() & has_value(column), advice),
        ColumnFault(column.name, "is before 1980", times < YEAR_1980),
        ColumnFault(
            column.name,
            "is after the year 2100" if is_future else "is in the future",
            times > (YEAR_2100 if is_future else latest),
        ),
    ]
    return times, unit, faults


def check_time_format(time_format: str | None) -> None:
    """Raise OptionError unless the format gives a date, in the directives of strptime, or is None.

    A sample is written by Python's strftime and read again. So both understand the format in the same way.
    """
    if time_format is None:
        return
    sample = datetime(2001, 2, 3, 16, 5, 6, 123456, timezone(timedelta(hours=-5, minutes=-30)))
    name = f'--time-format is "{to_printable(time_format, 60)}"'
    if "%Z" in time_format:
        raise OptionError(f"{name}, but names of time zones are ambiguous. Use offsets such as +0200, with %z.")
    try:
        written = sample.strftime(time_format)
    except ValueError:
        written = ""
    found = _parse_format(pl.Series([written]), time_format)[0]
    expected = sample if "%z" in time_format else sample.replace(tzinfo=UTC)
    midnight = expected.replace(hour=0, minute=0, second=0, microsecond=0)
    units = (timedelta(microseconds=1), timedelta(milliseconds=1), timedelta(seconds=1), timedelta(minutes=1))
    moments = [midnight, *(midnight + (expected - midnight) // unit * unit for unit in units)]
    if found not in map(to_microseconds, moments):
        raise OptionError(
            f"{name}, which does not give a day and a time. Use directives of strptime, such as %d.%m.%Y or "
            '"%d.%m.%Y %H:%M:%S".'
        )


def _to_microseconds(column: pl.Series, time_format: str | None) -> tuple[pl.Series, str]:
    """Return microseconds since 1970 (null if unreadable) and the unit.

    The unit of numbers is inferred from their median.
    """
    dtype = column.dtype
    if isinstance(dtype, pl.Datetime):
        return column.dt.timestamp("us"), dtype.time_unit
    if dtype == pl.Date:
        return column.cast(pl.Datetime("us")).dt.timestamp("us"), "ISO 8601"
    if dtype == pl.Float32:
        raise LogError(
            f"Column {column.name} has the type Float32, which stores times with an error of up to 64 seconds. "
            "Store them as Float64 or as integers."
        )
    plain = column.cast(pl.String) if dtype.is_decimal() else to_plain_type(column, "times")
    if time_format is not None and not plain.dtype.is_float():
        return _parse_format(plain.cast(pl.String).str.strip_chars(), time_format), time_format
    if plain.dtype == pl.String:
        plain = plain.str.strip_chars()
        first = plain.filter(plain != "").head(1000)  # one wrong value must not decide for all
        if not len(first) or 2 * first.str.contains(NUMBER_PATTERN).sum() < len(first):
            return _parse_iso_8601(plain), "ISO 8601"
    numbers = _split_numbers(plain)
    median = numbers["whole"].cast(pl.Float64).abs().median()
    size = median if isinstance(median, float) else 0.0
    unit = next((unit for unit, limit in MAX_SIZES.items() if size < limit), "ns")
    if size * SECOND / UNITS_PER_SECOND[unit] < YEAR_1980 and numbers["whole"].null_count() < len(numbers):
        raise LogError(
            f"The timestamps are around {size:.0f}, which is before 1980 in {UNIT_NAMES[unit]}. If they are dates, "
            "pass --time-format, such as %Y%m%d. If they count days or events, pass --columns period=NAME."
        )
    return numbers.select(_scaled(pl.lit(size))).to_series(), unit


def _split_numbers(plain: pl.Series) -> pl.DataFrame:
    """Split numbers, or texts of numbers, into whole (Int64) and fraction (Float64). No digit of a text is lost."""
    integers = plain.cast(pl.Int64, strict=False) if not plain.dtype.is_float() else plain.clear()
    if len(integers) and integers.null_count() == plain.null_count():
        return pl.DataFrame({"whole": integers, "fraction": pl.repeat(0.0, len(plain), eager=True)})
    numbers = plain.to_frame("number")
    number = pl.col("number")
    if plain.dtype == pl.String:
        whole = number.str.extract(r"^([-+]?\d+)(?:\.\d*)?$").cast(pl.Int64, strict=False)
        fraction = pl.concat_str(pl.lit("0"), number.str.extract(r"^[-+]?\d+(\.\d+)$")).cast(pl.Float64)
        in_digits = numbers.select(whole=whole, fraction=fraction.fill_null(0.0))
        if in_digits["whole"].null_count() == plain.null_count():
            return in_digits
        in_words = _split_numbers(plain.cast(pl.Float64, strict=False).fill_nan(None))  # 1.7e9
        return pl.DataFrame(
            [exact.zip_with(in_digits["whole"].is_not_null(), other) for exact, other in zip(in_digits, in_words)]
        )
    number = pl.when(number.is_finite()).then(number)
    floor = number.floor()
    return numbers.select(whole=floor.clip(-9e18, 9e18).cast(pl.Int64, strict=False), fraction=number - floor)


def _scaled(size: pl.Expr) -> pl.Expr:
    """Return `whole` and `fraction` as microseconds, in the unit that belongs to numbers of this size."""
    # Values beyond 5e9 s (the year 2128) are wrong anyway. Clipping them prevents an overflow.
    whole = {unit: pl.col("whole").clip(-5_000_000_000 * n, 5_000_000_000 * n) for unit, n in UNITS_PER_SECOND.items()}
    fraction = {
        unit: (pl.col("fraction") * (SECOND // n)).round().cast(pl.Int64, strict=False)
        for unit, n in UNITS_PER_SECOND.items()
        if n < SECOND
    }
    return (
        pl.when(size < MAX_SIZES["s"])
        .then(whole["s"] * SECOND + fraction["s"])
        .when(size < MAX_SIZES["ms"])
        .then(whole["ms"] * 1000 + fraction["ms"])
        .when(size < MAX_SIZES["us"])
        .then(whole["us"])
        .otherwise(whole["ns"] // 1000)
        .alias("time")
    )


def _parse_iso_8601(text: pl.Series) -> pl.Series:
    """Return the microseconds since 1970 of dates and times, null for other texts. Without an offset, they are UTC."""
    names = ["date", "hour", "minute", "second", "fraction", "offset"]
    column = pl.col(text.name)
    parts = (
        text.to_frame()
        .select(column.str.extract_groups(ISO_8601_PATTERN).struct.rename_fields(names))
        .unnest(text.name)
    )
    hour, minute, second = (pl.col(name).cast(pl.Int64).fill_null(0) for name in names[1:4])
    fraction = (pl.col("fraction") + "000000").str.head(6).cast(pl.Int64).fill_null(0)
    offset = pl.col("offset").str.replace(":", "", literal=True).str.extract_groups(r"^([+-])(\d{2})(\d{2})?$").struct
    ahead = offset.field("2").cast(pl.Int64).fill_null(0) * 3600 + offset.field("3").cast(pl.Int64).fill_null(0) * 60
    day = pl.col("date").str.to_date("%Y-%m-%d", strict=False).cast(pl.Int64) * 86_400
    clock = hour * 3600 + minute * 60 + second
    utc = day + clock - pl.when(offset.field("1") == "-").then(-ahead).otherwise(ahead)
    is_valid = (
        ((hour < 24) | ((clock == 86_400) & (fraction == 0)))  # 24:00 is the end of a day
        & (minute < 60)
        & ((second < 60) | (utc % 86_400 == 0))  # a leap second is the last one of a day in UTC
        & (ahead <= MAX_OFFSET)
    )
    times = parts.select(pl.when(is_valid).then(utc * SECOND + fraction).alias(text.name)).to_series()
    is_unread = times.is_null() & text.is_not_null()
    rewritten = _with_calendar_date(text.filter(is_unread)) if is_unread.any() else text.clear()
    if rewritten.null_count() == len(rewritten):
        return times
    return times.scatter(is_unread.arg_true(), _parse_iso_8601(rewritten))


def _with_calendar_date(text: pl.Series) -> pl.Series:
    """Rewrite the rarer forms of ISO 8601: 20240624T212011Z, 2024-W26-1 and 2024-176. Null for all other texts."""
    column = pl.col(text.name)
    basic = column.str.extract_groups(r"^(\d{4})(\d{2})(\d{2})T(\d{2})(\d{2})(\d{2})?(\D.*)?$").struct
    date = pl.concat_str(*(basic.field(str(n)) for n in (1, 2, 3)), separator="-")
    clock = pl.concat_str(basic.field("4"), basic.field("5"), basic.field("6").fill_null("00"), separator=":")
    found = [pl.concat_str(date, pl.lit("T"), clock, basic.field("7").fill_null(""))]
    for pattern, directives in ((r"^(\d{4}-W\d{2}-[1-7])(\D.*)?$", "%G-W%V-%u"), (r"^(\d{4}-\d{3})(\D.*)?$", "%Y-%j")):
        parts = column.str.extract_groups(pattern).struct
        day = parts.field("1").str.to_date(directives, strict=False).dt.strftime("%Y-%m-%d")
        found.append(pl.concat_str(day, parts.field("2").fill_null("")))
    return text.to_frame().select(pl.coalesce(found).alias(text.name)).to_series()


def _parse_format(text: pl.Series, time_format: str) -> pl.Series:
    """Return the microseconds since 1970 of texts in a format of strptime; null for other texts."""
    # The engine has its own directives for fractions of a second: "%.f" has any number of digits, "%3f" has three.
    chrono = time_format.replace(".%f", "%.f")
    formats = [chrono.replace("%f", f"%{digits}f") for digits in (3, 6, 9)] if "%f" in chrono else [chrono]
    zone = "UTC" if "%z" in time_format else None
    try:
        found = [text.str.to_datetime(form, strict=False, time_unit="us", time_zone=zone) for form in formats]
    except pl.exceptions.ComputeError:
        return pl.repeat(None, len(text), dtype=pl.Int64, eager=True)
    return pl.select(pl.coalesce(found).dt.timestamp("us").alias(text.name)).to_series()
