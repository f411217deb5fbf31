"""Moments: one reader for every way in. Its number is microseconds since 1970, in UTC."""

from __future__ import annotations

import json
import time
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pytest
from serving import server, stored

from freshrec.cli.app import main
from freshrec.data.log import events_before, read_log
from freshrec.data.moments import parse_microseconds
from freshrec.data.validate import validate_log
from freshrec.errors import FreshrecError, LogError, OptionError
from freshrec.recommender.recommender import Recommender

# 2024-06-24 is 19,898 days after 1970-01-01, and 21:20:11 is 76,811 s after midnight: 19,898 * 86,400 + 76,811.
NOON = 1_719_264_011
MINUTE, HOUR, DAY = 60, 3600, 86_400
MIDNIGHT = 19_898 * DAY

MOMENTS: dict[int | float | str, float] = {  # value -> seconds since 1970
    "2024-06-24 21:20:11+00": NOON,  # PostgreSQL
    "2024-06-24 23:20:11+02": NOON,
    "2024-06-24 19:20:11-0200": NOON,
    "2024-06-25T02:50:11+05:30": NOON,
    "2024-06-24 21:20+00": NOON - 11,
    "2024-06-24T21:20:11": NOON,
    "2024-06-24t21:20:11z": NOON,
    "2024-06-24 21:20:11 UTC": NOON,  # BigQuery
    "2024-06-24 21:20:11 +0000": NOON,  # Snowflake
    " 2024-06-24 21:20:11 ": NOON,
    "2024-06-24T21:20:11,5": NOON + 0.5,
    "2024-06-24T21:20:11.123456": NOON + 0.123456,
    "2024-06-24T21:20:11.123456789": NOON + 0.123456,  # cut to microseconds
    "2024-06-24": MIDNIGHT,
    "2024-6-4 1:2:3": MIDNIGHT - 20 * DAY + HOUR + 2 * MINUTE + 3,
    "2024-06-24T24:00": MIDNIGHT + DAY,  # the end of a day
    "2016-12-31T23:59:60Z": 17_167 * DAY,  # a leap second has no number of its own: it is the next midnight
    "20240624T212011Z": NOON,
    "2024-W26-1": MIDNIGHT,  # Monday of week 26
    "2024-176": MIDNIGHT,  # 31 + 29 + 31 + 30 + 31 + 24 = 176
    NOON: NOON,
    NOON + 0.5: NOON + 0.5,
    f"{NOON}.123457": NOON + 0.123457,
    f"{NOON}123": NOON + 0.123,
    NOON * 10**6 + 123_456: NOON + 0.123456,
    NOON * 10**9 + 123_456_789: NOON + 0.123456,
    "1.719264011e9": NOON,
}
REFUSED = (
    *("31.12.2024", "01/02/2024", "24 Jun 2024", "12024-06-24", "2024-02-30", "2024-06-24T24:00:01", "2024-W54-1"),
    *("2024-06-24T21:60", "2024-06-24T21:20:60Z", "2024-06-24 21:20:11 CET", "2024-06-24T21:20:11+02:00[Europe/Paris]"),
    *("2024-06-24T21:20:11+19:00", "NULL", "NaT", "infinity", "nan", "yesterday", 20_240_624, 0, -1, "1e400"),
)


def microseconds(seconds: float) -> int:
    return round(seconds * 10**6)


def times_of(path: Path, values: list[Any]) -> list[int]:
    """Write values as the timestamps of a .csv, .tsv, .jsonl or .parquet file, and read the file."""
    rows = [{"user_id": 1, "item_id": place, "timestamp": value} for place, value in enumerate(values)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pl.DataFrame(rows).write_parquet(path)
    else:
        pl.DataFrame(rows).write_csv(path, separator="\t" if path.suffix == ".tsv" else ",")
    return read_log(path).frame["time"].to_list()


def test_a_value_is_the_same_moment_in_every_file_and_in_options(tmp_path: Path) -> None:
    for value, seconds in MOMENTS.items():
        expected = microseconds(seconds)
        for suffix in (".csv", ".tsv", ".jsonl", ".parquet"):
            assert times_of(tmp_path / f"log{suffix}", [value, value]) == [expected, expected], (value, suffix)
        assert parse_microseconds(str(value)) == expected, value


def test_texts_of_different_zones_and_precisions_share_a_column(tmp_path: Path) -> None:
    texts = {text: seconds for text, seconds in MOMENTS.items() if isinstance(text, str) and "-" in text}
    assert times_of(tmp_path / "log.csv", list(texts)) == sorted(map(microseconds, texts.values()))


def test_a_value_is_the_same_moment_in_a_click(tmp_path: Path) -> None:
    stored(tmp_path)
    with server(tmp_path) as (client, _):
        clicks = [
            {"user_id": "user-1", "item_id": f"item-{place}", "timestamp": value} for place, value in enumerate(MOMENTS)
        ]
        answer = client.post("/events", json={"events": [*clicks, {"user_id": "user-1", "item_id": "item-1"}]})
        assert answer.status_code == 200, answer.text
        *found, now = (event["timestamp"] for event in answer.json()["events"])
        assert found == [microseconds(seconds) for seconds in MOMENTS.values()]
        assert abs(now / 10**6 - time.time()) < 600
        for value in (*REFUSED, "", True, 1e300, int(time.time()) + HOUR, "9999-12-31"):
            click = {"user_id": "user-1", "item_id": "item-1", "timestamp": value}
            answer = client.post("/events", json={"events": [click]})
            assert answer.status_code == 422, (value, answer.text)


def test_other_values_are_refused_in_every_file_and_in_options(tmp_path: Path) -> None:
    for value in REFUSED:
        for suffix in (".csv", ".jsonl", ".parquet"):
            with pytest.raises(LogError):
                times_of(tmp_path / f"log{suffix}", [value, value])
        with pytest.raises(OptionError, match="--until is"):
            parse_microseconds(str(value), "--until")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (["2024-06-24", "31.12.2024"], "timestamp cannot be read as a time in 1 row (data row 2: '31.12.2024')"),
        ([str(NOON)] * 3 + ["2024-06-24"], "cannot be read as a time in 1 row (data row 4: '2024-06-24')"),
        (["2024-06-24"] + [str(NOON)] * 3, "cannot be read as a time in 1 row (data row 1: '2024-06-24')"),
        ([str(NOON), str(NOON), f"{NOON}000"], "is in the future in 1 row (data row 3: '1719264011000')"),
        ([str(NOON), str(NOON), "0"], "is before 1980 in 1 row (data row 3: '0')"),
        ([str(NOON), str(NOON), "9999999999"], "is in the future in 1 row (data row 3: '9999999999')"),
        (["2024-06-24", " "], "cannot be read as a time in 1 row (data row 2: ' ')"),
        (["20240624", "20240625"], "If they are dates, pass --time-format, such as %Y%m%d."),
    ],
)
def test_a_column_of_two_kinds_is_refused_and_the_odd_row_is_named(
    values: list[str], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(LogError) as failure:
        times_of(tmp_path / "log.csv", values)
    assert problem in str(failure.value)
    assert ("--time-format" in str(failure.value)) == ("read as a time" in problem or "dates" in problem)


EAST = timezone(timedelta(hours=2))
# In Berlin, 2024-10-27 02:30 occurs twice: at 00:30 and at 01:30 UTC, 20,023 days after 1970.
TWICE = [20_023 * DAY + 1800, 20_023 * DAY + 1800 + HOUR]


def series(values: list[Any], dtype: Any = None) -> pl.Series:
    return pl.Series("timestamp", values, dtype)


COLUMNS: list[tuple[Any, list[float]]] = [  # a column of a frame, seconds since 1970
    (series([Decimal(f"{NOON}.123456"), Decimal(NOON + 1)]), [NOON + 0.123456, NOON + 1]),
    (series([Decimal(NOON * 10**9 + 123_456_789)] * 2), [NOON + 0.123456] * 2),  # no digit is lost
    (series([NOON + 0.123457, NOON + 0.5]), [NOON + 0.123457, NOON + 0.5]),
    (series([NOON, NOON], pl.Int32), [NOON, NOON]),
    (series([NOON * 10**9] * 2, pl.UInt64), [NOON, NOON]),
    (series([1000 * second for second in TWICE]).cast(pl.Datetime("ms", "Europe/Berlin")), TWICE),  # type: ignore[list-item]
    (series([NOON * 10**9 + 999] * 2).cast(pl.Datetime("ns")), [NOON, NOON]),
    (series(["2024-06-24", "2024-06-24 21:20:11+00"], pl.Categorical), [MIDNIGHT, NOON]),
    (pd.Series(pd.to_datetime(["2024-06-24 23:20:11"] * 2).tz_localize("Europe/Berlin")), [NOON, NOON]),
    (pd.Series([datetime.fromtimestamp(NOON, EAST), datetime.fromtimestamp(NOON, UTC)], dtype=object), [NOON, NOON]),
    (pd.Series([date(2024, 6, 24)] * 2, dtype=object), [MIDNIGHT, MIDNIGHT]),
]


def frame_of(column: Any) -> Any:
    names = {"user_id": [1, 1], "item_id": [1, 2]}
    return (
        pl.DataFrame(names | {"timestamp": column})
        if isinstance(column, pl.Series)
        else pd.DataFrame(names | {"timestamp": column})
    )


def test_columns_of_frames_keep_their_moments() -> None:
    for column, seconds in COLUMNS:
        assert read_log(frame_of(column)).frame["time"].to_list() == sorted(map(microseconds, seconds)), column


@pytest.mark.parametrize(
    ("column", "problem"),
    [
        (series([NOON, NOON], pl.Float32), "Float32, which stores times with an error of up to 64 seconds"),
        (series([float(NOON), float("inf")]), "cannot be read as a time in 1 row"),
        (series([2**62, NOON * 10**6]).cast(pl.Datetime("us")), "is in the future in 1 row (data row 1: '+148108-"),
        (series([time.time() + 40 * 365 * DAY, time.time() + DAY]), "is in the future in 1 row"),
    ],
)
def test_columns_that_cannot_hold_moments_are_refused(column: pl.Series, problem: str) -> None:
    with pytest.raises(LogError) as failure:
        read_log(frame_of(column))
    assert problem in str(failure.value)


def write_days(path: Path, days: list[str], n: int = 40) -> str:
    """Write a log of `n` users with one row a day."""
    rows = [f"{user},{(user + place) % 7},{day}" for place, day in enumerate(days) for user in range(n)]
    path.write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    return str(path)


def test_a_store_keeps_the_time_format_of_its_first_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ["--store", str(tmp_path / "s")]
    log = write_days(tmp_path / "log.csv", ["29.02.2024 23:00", "01.03.2024 07:30"])
    given = ["--time-format", "%d.%m.%Y %H:%M"]
    assert main(["validate", log, *given]) == 0
    assert "2024-02-29T23:00:00+00:00 to 2024-03-01T07:30:00+00:00" in capsys.readouterr().out
    assert main(["replay", log, *given, "--plan", "--models", "popularity", "--spans", "1"]) == 0
    assert main(["fit", log, *given, *store, "--model", "popularity"]) == 0
    assert main(["update", write_days(tmp_path / "new.csv", ["02.03.2024 09:00"]), *store]) in (0, 8)
    assert main(["update", write_days(tmp_path / "iso.csv", ["2024-03-03"]), *store]) == LogError.exit_code
    assert 'timestamp does not have the form "%d.%m.%Y %H:%M" in 40 rows' in capsys.readouterr().err
    other = write_days(tmp_path / "other.csv", ["04/03/2024"])
    assert main(["update", other, "--time-format", "%d/%m/%Y", *store]) in (0, 8)


def test_a_recommender_reads_updates_with_the_time_format_of_fit(tmp_path: Path) -> None:
    log = write_days(tmp_path / "log.csv", ["20240229", "20240301"])
    found = Recommender("popularity").fit(log, time_format="%Y%m%d")
    found.save(tmp_path / "saved")
    found = Recommender.load(tmp_path / "saved").update(write_days(tmp_path / "new.csv", ["20240302"]))
    assert found.served.newest_time == 19_784 * DAY * 10**6  # 114 days before 2024-06-24


@pytest.mark.parametrize(
    ("time_format", "text", "seconds"),
    [
        ("%d.%m.%Y", "24.06.2024", MIDNIGHT),
        ("%d/%m/%y %I:%M:%S %p", "24/06/24 09:20:11 PM", NOON),
        ("%d.%m.%Y %H:%M:%S.%f", "24.06.2024 21:20:11.5", NOON + 0.5),  # as in strptime, %f is a fraction
        ("%d.%m.%Y %H:%M:%S,%f", "24.06.2024 21:20:11,123", NOON + 0.123),
        ("%Y-%m-%d %H:%M:%S %z", "2024-06-24 23:20:11 +0200", NOON),
        ("%a, %d %b %Y %H:%M:%S GMT", "Mon, 24 Jun 2024 21:20:11 GMT", NOON),
        ("%Y%m%d%H%M%S", 20_240_624_212_011, NOON),
    ],
)
def test_other_forms_are_read_with_a_time_format(time_format: str, text: Any, seconds: float) -> None:
    log = read_log(frame_of(series([text, text])), time_format=time_format)
    assert log.frame["time"].to_list() == [microseconds(seconds)] * 2
    assert log.unit == time_format


@pytest.mark.parametrize(
    "time_format", ["", "d.m.Y", "%d.%m", "%m/%Y", "%H:%M", "%d.%m.%Y %I:%M", "%d.%m.%Y %H", "%Q", "%", "%Y-%m-%d %Z"]
)
def test_a_time_format_that_gives_no_moment_is_refused(time_format: str) -> None:
    with pytest.raises(OptionError, match="--time-format is"):
        read_log(frame_of(series(["24.06.2024"] * 2)), time_format=time_format)


def test_until_takes_numbers_and_offsets() -> None:
    log = read_log(frame_of(series([NOON, NOON + 10])))
    for moment in (str(NOON + 1), f"{NOON + 1}000", "2024-06-24 23:20:12+02"):
        assert events_before(log, moment).frame["time"].to_list() == [NOON * 10**6]
    with pytest.raises(LogError, match="no rows before"):
        events_before(log, "2024-06-24T21:20:10,999999+00")


def test_a_log_of_the_future_is_read_but_not_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    future = [(datetime.now(UTC) + timedelta(days=400 + n)).date().isoformat() for n in range(3)]
    past, log = write_days(tmp_path / "past.csv", ["2024-06-24"]), write_days(tmp_path / "log.csv", future)
    warnings = validate_log(read_log(Path(log))).warnings
    assert any(text.startswith("All timestamps are in the future; the first is 20") for text in warnings)
    assert main(["replay", log, "--plan", "--models", "popularity", "--by", "count", "--spans", "1"]) == 0
    assert "All timestamps are in the future" in " ".join(capsys.readouterr().out.split())
    store = ["--store", str(tmp_path / "s")]
    for command in ("fit", "update"):
        assert main([command, log, *store]) == LogError.exit_code
        assert "All timestamps are in the future; the first is" in capsys.readouterr().err
        if command == "fit":
            assert main(["fit", past, *store, "--model", "popularity"]) == 0
    found = Recommender("popularity").fit(past)
    for learn in (Recommender("popularity").fit, found.update):
        with pytest.raises(FreshrecError, match="in the future"):
            learn(log)
