"""Reading a log: valid sources, and the log that is read from them."""

from __future__ import annotations

import gzip
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pandas as pd
import polars as pl
import pytest

from freshrec.data.formats import FORMATS
from freshrec.data.log import Log, events_before, keep_positives, read_log
from freshrec.data.moments import format_time, parse_microseconds, to_microseconds
from freshrec.errors import LogError, OptionError

DATA = Path(__file__).parents[2] / "shared" / "data"
NOON = 1_600_000_000  # 2020-09-13 12:26:40 UTC, in seconds
ROWS = {"user_id": [7, 8, 7], "item_id": ["b", "a", "b"], "timestamp": [NOON, NOON + 2, NOON + 1]}
# By time: 7 b at NOON, 7 b a second later, 8 a two seconds later.
IN_ORDER = [(7, "b", NOON * 10**6), (7, "b", (NOON + 1) * 10**6), (8, "a", (NOON + 2) * 10**6)]


def rows_of(log: Log) -> list[tuple[object, ...]]:
    return log.frame.select("user_id", "item_id", "time").rows()


def frame_of(**changes: object) -> pl.DataFrame:
    return pl.DataFrame({**ROWS, **changes})


def kuairand() -> Path:
    path = DATA / "kuairand_pure_base50_plus_14days.parquet"
    if not path.exists():
        pytest.skip("the real logs (../shared/data) are not on this machine")
    return path


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "log.tsv", "log.parquet", "log.jsonl", "folder"])
def test_the_same_rows_come_out_of_every_kind_of_file(tmp_path: Path, name: str) -> None:
    path, frame = tmp_path / name, pl.DataFrame(ROWS)
    if name == "folder":
        (path / "deep").mkdir(parents=True)
        frame[:1].write_parquet(path / "a.parquet")
        frame[1:].write_parquet(path / "deep" / "b.parquet")
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(frame.write_csv().encode()))
    elif name.endswith("sv"):
        frame.write_csv(path, separator="\t" if name == "log.tsv" else ",")
    elif name.endswith(".parquet"):
        frame.write_parquet(path)
    else:
        frame.write_ndjson(path)
    assert rows_of(read_log(path)) == IN_ORDER


def test_frames_of_polars_and_pandas_are_logs() -> None:
    assert rows_of(read_log(pl.DataFrame(ROWS))) == IN_ORDER
    assert rows_of(read_log(pd.DataFrame(ROWS))) == IN_ORDER


def test_pandas_frames_may_hold_dates_categories_and_nullable_numbers() -> None:
    frame = pd.DataFrame(
        {
            "user_id": pd.Series([7, 8, 7], dtype="Int64"),
            "item_id": pd.Series(["b", "a", "b"], dtype="category"),
            "timestamp": pd.to_datetime(ROWS["timestamp"], unit="s", utc=True),
            "label": [1.0, None, 2.0],
        }
    )
    log = read_log(frame)
    assert rows_of(log) == IN_ORDER
    assert log.frame["label"].to_list() == [1.0, 2.0, None]  # the second row of the source is the last in time


@pytest.mark.parametrize(("unit", "factor"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
def test_the_unit_of_time_is_inferred_from_its_size(unit: str, factor: int) -> None:
    log = read_log(frame_of(timestamp=[t * factor for t in ROWS["timestamp"]]))
    assert (log.unit, rows_of(log)) == (unit, IN_ORDER)


def test_seconds_with_a_fraction_keep_it() -> None:
    log = read_log(frame_of(timestamp=[NOON + 0.25, NOON + 2.0, NOON + 1.0]))
    assert log.frame["time"][0] == NOON * 10**6 + 250_000


@pytest.mark.parametrize(
    "text", ["2020-09-13T12:26:40Z", "2020-09-13 12:26:40", "2020-09-13T14:26:40.000+02:00", "1600000000", "1.6e9"]
)
def test_times_as_text_are_utc_unless_they_have_a_zone(text: str) -> None:
    log = read_log(pl.DataFrame({"user_id": [1], "item_id": [1], "timestamp": [text]}))
    assert log.frame["time"].to_list() == [NOON * 10**6]


def test_a_date_is_its_midnight() -> None:
    log = read_log(pl.DataFrame({"user_id": [1], "item_id": [1], "timestamp": ["2020-09-13"]}))
    assert log.frame["time"].to_list() == [(NOON - (12 * 3600 + 26 * 60 + 40)) * 10**6]
    assert log.unit == "ISO 8601"


def test_integer_ids_stay_integers_and_text_stays_text(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(f"user_id,item_id,timestamp\n12,007,{NOON}\n-3,7,{NOON}\n")
    log = read_log(tmp_path / "log.csv")
    assert log.frame["user_id"].to_list() == [12, -3]
    assert log.frame["item_id"].to_list() == ["007", "7"]  # as numbers they would be one item


def test_columns_are_found_by_their_usual_names_or_named_by_the_caller() -> None:
    frame = frame_of(session=[1, 2, 3]).rename({"timestamp": "time", "user_id": "session_id"})
    assert rows_of(read_log(frame)) == IN_ORDER
    log = read_log(frame, columns={"user_id": "session"})
    assert log.frame["user_id"].to_list() == [1, 3, 2]
    assert 'Column "session" is used as user_id.' in log.notes


def test_rows_at_one_time_keep_the_order_of_the_source() -> None:
    log = read_log(
        pl.DataFrame({"user_id": [1] * 4, "item_id": [5, 3, 4, 9], "timestamp": [NOON, NOON, NOON, NOON - 1]})
    )
    assert log.frame["item_id"].to_list() == [9, 5, 3, 4]
    assert log.n_out_of_order == 1  # only the last row comes after a later one


def test_a_log_without_timestamps_is_in_the_order_of_its_periods() -> None:
    frame = pl.DataFrame(
        {"user_id": [1, 1, 1, 1], "item_id": [1, 2, 3, 4], "period": [1, 0, 1, 0], "seq": [3, 2, 1, 9]}
    )
    log = read_log(frame)
    assert log.frame.rows() == [(1, 2, 0, 0), (1, 4, 1, 0), (1, 3, 2, 1), (1, 1, 3, 1)]  # user, item, time, period
    assert (log.has_clock, log.unit) == (False, "period + order")
    # Without an order column, the rows of a period keep their order.
    assert read_log(frame.drop("seq")).frame["item_id"].to_list() == [2, 4, 1, 3]


def test_timestamps_may_be_null_in_a_log_with_periods() -> None:
    times = [NOON + 5, None, NOON, None]
    frame = pl.DataFrame({"user_id": [1] * 4, "item_id": [1, 2, 3, 4], "timestamp": times, "period": [1, 0, 1, 0]})
    log = read_log(frame.with_columns(position=pl.Series([0, 1, 0, 0])))
    # Period 0 by position: 4, 2. Period 1 by timestamp: 3, 1.
    assert log.frame["item_id"].to_list() == [4, 2, 3, 1]
    assert (log.has_clock, log.frame["time"].to_list()) == (False, [0, 1, 2, 3])


def test_complete_timestamps_order_the_log_and_the_period_is_kept() -> None:
    log = read_log(frame_of(period=[0, 2, 1], order=[3, 2, 1]))
    assert (log.has_clock, rows_of(log)) == (True, IN_ORDER)
    assert log.frame["period"].to_list() == [0, 1, 2]
    assert "order" not in log.frame.columns


def test_only_the_requested_event_types_are_kept() -> None:
    frame = frame_of(event=["pv", "buy", "cart"])
    assert read_log(frame, events=("pv", "cart")).frame["event"].to_list() == ["pv", "cart"]
    with pytest.raises(OptionError, match='There is no event type "by" in .* Did you mean "buy"\\? Its types: .*buy'):
        read_log(frame, events=("by",))
    with pytest.raises(LogError, match="has no column event, which --events needs"):
        read_log(frame_of(), events=("pv",))


def test_exposures_are_kept_until_keep_positives_removes_them() -> None:
    log = read_log(frame_of(click=[None, 0, 1]), columns={"label": "click"})
    assert len(log.frame) == 3
    assert rows_of(keep_positives(log)) == IN_ORDER[:2]  # the last row in time is the one that was only shown


def test_a_sample_keeps_whole_users_and_repeats_with_its_seed() -> None:
    frame = pl.DataFrame({"user_id": list(range(50)) * 3, "item_id": [1] * 150, "timestamp": [NOON] * 150})
    once, again = (read_log(frame, users=10, seed=4).frame for _ in range(2))
    assert once.equals(again)
    assert once["user_id"].value_counts()["count"].to_list() == [3] * 10
    assert not once.equals(read_log(frame, users=10, seed=5).frame)


PUBLIC = {
    "movielens": ("ratings.dat", "7::31::5::1600000000\n", [7, 31, NOON]),
    "amazon": ("ratings.csv", "A1,0132793040,5.0,1600000000\n", ["A1", "0132793040", NOON]),
    "taobao": ("UserBehavior.csv", "7,31,4,pv,1600000000\n", [7, 31, NOON, "pv", 4]),
    "yoochoose": ("yoochoose-clicks.dat", "7,2020-09-13T12:26:40.000Z,31,0\n", [7, 31, NOON, 0]),
    "diginetica": (
        "train-item-views.csv",
        "sessionId;userId;itemId;timeframe;eventdate\n7;NA;31;44800000;2020-09-13\n",  # 44,800,000 ms are 12:26:40
        [7, 31, NOON],
    ),
    "recbole": ("log.inter", "user_id:token\titem_id:token\ttimestamp:float\n7\tx\t1600000000.0\n", [7, "x", NOON]),
}


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_public_formats_are_read_by_name(tmp_path: Path, format: str) -> None:
    name, text, (user, item, seconds, *rest) = PUBLIC[format]
    (tmp_path / name).write_text(text)
    log = read_log(tmp_path / name, format=format)
    assert log.frame.row(0) == (user, item, seconds * 10**6, *rest)


def test_movielens_comes_with_three_endings(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n7,31,4.5,1600000000\n")
    (tmp_path / "u.data").write_text("7\t31\t4.5\t1600000000\n")
    for name in ("ratings.csv", "u.data"):
        log = read_log(tmp_path / name, format="movielens")
        assert rows_of(log) == [(7, 31, NOON * 10**6)]
        assert 'Column "rating" is not used.' in log.notes[-1]


def test_kuairand_has_its_history_and_its_clicks() -> None:
    log = read_log(kuairand(), columns={"label": "click"})
    assert (log.has_clock, len(log.frame)) == (False, 1_045_516)
    kept = keep_positives(log).frame
    # 817,187 rows of period 0 have no label and count. 100,900 later rows are clicks (README of the data).
    assert (kept["period"] == 0).sum() == 817_187
    assert (kept["period"] > 0).sum() == 100_900
    assert kept["period"].is_sorted()


def test_rows_after_a_moment_are_left_out_and_counted() -> None:
    log = read_log(
        pl.DataFrame(
            {"user_id": [1, 1, 2], "item_id": [5, 6, 7], "timestamp": ["2025-01-01", "2025-01-02", "2025-03-01"]}
        )
    )
    kept = events_before(log, "2025-01-02T00:01")
    assert kept.frame["item_id"].to_list() == [5, 6] and "Left out 1 row from 2025-01-02T00:01 on." in kept.notes[-1]
    with pytest.raises(LogError, match="The log has no rows before 2024-01-01"):
        events_before(log, "2024-01-01")
    with pytest.raises(OptionError, match='--until is "yesterday", which is not a date. Write it as 2025-06-01'):
        events_before(log, "yesterday")
    with pytest.raises(OptionError, match=r'--until is "2017-13-01", which is not a date \(month must be in 1..12'):
        events_before(log, "2017-13-01")


def test_a_log_of_periods_without_timestamps_can_end_before_a_period() -> None:
    log = read_log(pl.DataFrame({"user_id": [1, 1, 2], "item_id": [5, 6, 7], "period": [0, 1, 2]}))
    kept = events_before(log, "2")
    assert kept.frame["item_id"].to_list() == [5, 6] and "Left out 1 row from 2 on." in kept.notes[-1]
    with pytest.raises(LogError, match="The log has no rows before 0"):
        events_before(log, "0")
    with pytest.raises(LogError, match='--until "2025-01-01" does not apply. Use the number of a period'):
        events_before(log, "2025-01-01")


def test_times_are_formatted_in_utc_without_rounding_and_can_be_read_back() -> None:
    # NOON is 2020-09-13 12:26:40 UTC
    time_us = NOON * 10**6 + 999_999
    assert format_time(time_us) == "2020-09-13T12:26:40+00:00"
    assert format_time(time_us, "minutes") == "2020-09-13T12:26+00:00"
    assert format_time(time_us, "auto") == "2020-09-13T12:26:40.999999+00:00"
    assert format_time(NOON * 10**6, "auto") == "2020-09-13T12:26:40+00:00"
    assert parse_microseconds(format_time(time_us, "auto")) == time_us
    assert to_microseconds(datetime(2020, 9, 13, 12, 26, 40)) == NOON * 10**6  # without a zone: UTC
    east = timezone(timedelta(hours=2))
    assert to_microseconds(datetime(2020, 9, 13, 14, 26, 40, tzinfo=east)) == NOON * 10**6
