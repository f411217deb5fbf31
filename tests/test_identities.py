"""Identities: the table of docs/decisions/018-identities-rows-moments.md, for every way in."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

from freshrec import Recommender
from freshrec.cli.app import main
from freshrec.data.id_warnings import warn_about_ids
from freshrec.data.identities import check_new_text, json_id, parse_id
from freshrec.data.log import Log, read_log
from freshrec.data.validate import validate
from freshrec.errors import LogError, OptionError

START = 1_700_000_000  # seconds
BIG = 2**53


def read_csv(folder: Path, ids: list[str], ending: str = "csv", **options: Any) -> Log:
    """Read a text file with these user ids, written as they are."""
    comma = "\t" if ending == "tsv" else ","
    rows = [f"{comma.join((user_id, str(item), str(START + item)))}\n" for item, user_id in enumerate(ids, 1)]
    (folder / f"log.{ending}").write_text(f"user_id{comma}item_id{comma}timestamp\n" + "".join(rows))
    return read_log(folder / f"log.{ending}", **options)


def read_json(folder: Path, ids: list[str], **options: Any) -> Log:
    """Read JSON lines with these user ids, written as they are."""
    rows = [f'{{"user_id":{user_id},"item_id":{n},"timestamp":{START + n}}}\n' for n, user_id in enumerate(ids, 1)]
    (folder / "log.jsonl").write_text("".join(rows))
    return read_log(folder / "log.jsonl", **options)


def typed(ids: list[Any], kind: Any = None) -> pl.DataFrame:
    """Return a frame with these user ids."""
    numbers = range(1, len(ids) + 1)
    return pl.DataFrame({"user_id": pl.Series(ids, dtype=kind), "item_id": numbers, "timestamp": [START] * len(ids)})


def users(log: Log) -> list[int | str]:
    """Return the user ids in the order of the file; all times ascend or are equal."""
    return log.frame["user_id"].to_list()


TEXT_FILES: list[tuple[list[str], list[Any] | str]] = [
    (["123.0", "5.0"], [123, 5]),  # pandas wrote a column with a gap
    (["123.0", "5"], [123, 5]),
    (["-0.0", "5.", "-7.000"], [0, 5, -7]),
    (["007", "7"], ["007", "7"]),
    (["-7", "0"], [-7, 0]),
    (["1234567890123456789", "1234567890123456788"], [1234567890123456789, 1234567890123456788]),
    (["1234567890123456789", "5"], [1234567890123456789, 5]),
    ([str(2**63), "5"], [str(2**63), "5"]),
    ([str(-(2**63)), str(2**63 - 1)], [-(2**63), 2**63 - 1]),
    (["+8", "7", "7"], "text, while most ids are whole numbers .*data row 1: '\\+8'"),
    (["1e5", "7", "7"], "data row 1: '1e5'"),
    (["1_000", "7", "7"], "data row 1: '1_000'"),
    (["5.5", "7.0", "7.0"], "text, while most ids are whole numbers .*data row 1: '5.5'"),
    (["5.0", "6.0", "unknown"], "data row 3: 'unknown'"),  # a float column whose gaps were filled
    (["5.0", "007"], "data row 1: '5.0'"),
    ([f"{BIG}.0", "5"], "float of at least 2\\^53, whose last digits may be lost .*data row 1"),
    ([f"{2**63}", "5.0"], "not a 64-bit whole number .*data row 1"),
    (["1.2345678901234568e+18", "x"], "float in exponent form.*data row 1"),  # numpy and pandas
    (["1.23457E+18", "1.23458E+18"], "float in exponent form.*2 rows"),  # a spreadsheet
    (["1.5", "x"], ["1.5", "x"]),
    (["u1 ", "u1", " U1"], ["u1 ", "u1", " U1"]),
    (["x", " "], "user_id is null or empty in 1 row \\(data row 2: ' '\\)"),
    (["x", "\u2003"], "null or empty"),
    (["x", "a\x01b"], "control character in 1 row \\(data row 2"),
    (["x", "a\x85b"], "control character"),
    (["nan", "NULL", "x"], ["nan", "NULL", "x"]),
    (["é" * 500, "x"], ["é" * 500, "x"]),  # 1,000 bytes
    (["é" * 501, "x"], "longer than 1,000 bytes"),
]


@pytest.mark.parametrize(("ids", "expected"), TEXT_FILES)
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_ids_of_text_files(tmp_path: Path, ids: list[str], expected: list[Any] | str, ending: str) -> None:
    if isinstance(expected, str):
        with pytest.raises(LogError, match=expected):
            read_csv(tmp_path, ids, ending)
    else:
        assert users(read_csv(tmp_path, ids, ending)) == expected


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (["1", '"1"'], [1, 1]),
        (["1", '"x"', "1"], "data row 2: 'x'"),
        (["1234567890123456789", "1234567890123456788", "5.0"], [1234567890123456789, 1234567890123456788, 5]),
        (["1e3", "5"], [1000, 5]),
        (["5.5", "5", "5"], "data row 1: '5.5'"),
        (["null", "5"], "user_id is null"),
        (["1", "true"], "cannot be read as a table"),
        (["true", "false"], "Column user_id has the type Boolean"),
        (["[1]", "[2]"], "Column user_id has the type List"),
        (['"007"', '"7"'], ["007", "7"]),
        ([f"{2**63}", "5"], [f"{2**63}", "5"]),
        # 2^53 + 1 as a float is 2^53. As an integer it keeps its last digit, even beside a float.
        ([f"{BIG + 1}.0", "5"], "float of at least 2\\^53.*data row 1"),
        (["1234567890123456789.0", "5"], "float of at least 2\\^53.*data row 1"),
        ([f"{BIG + 1}", "5.0"], [BIG + 1, 5]),
        (["1234567890123456789.0", '"7"'], "float of at least 2\\^53.*data row 1"),
        (["1234567890123456789", '"7"'], [1234567890123456789, 7]),
        (["-0.0", "5"], [0, 5]),
    ],
)
def test_ids_of_json_lines(tmp_path: Path, ids: list[str], expected: list[Any] | str) -> None:
    if isinstance(expected, str):
        with pytest.raises(LogError, match=expected):
            read_json(tmp_path, ids)
    else:
        assert users(read_json(tmp_path, ids)) == expected


@pytest.mark.parametrize(
    ("ids", "kind", "expected"),
    [
        ([5, 2**63 - 1], pl.UInt64, [5, 2**63 - 1]),
        ([5, 2**63], pl.UInt64, ["5", str(2**63)]),
        ([5, -7], pl.Int128, [5, -7]),
        (["1", "2"], pl.String, ["1", "2"]),
        (["a", "b"], pl.Categorical, ["a", "b"]),
        (["a", "b"], pl.Enum(["a", "b"]), ["a", "b"]),
        ([Decimal(BIG), Decimal(BIG + 1)], pl.Decimal(20, 0), [BIG, BIG + 1]),
        ([Decimal("7.00"), Decimal("8")], pl.Decimal(20, 2), [7, 8]),
        ([Decimal("5.50"), Decimal("8")], pl.Decimal(20, 2), "not a whole number .*data row 1"),
        ([Decimal(2**63), Decimal(8)], pl.Decimal(30, 0), [str(2**63), "8"]),
        ([float(BIG - 1), -7.0], pl.Float64, [BIG - 1, -7]),
        ([float(BIG), 7.0], pl.Float64, "float of at least 2\\^53, .*data row 1"),
        ([-float(BIG), 7.0], pl.Float64, "float of at least 2\\^53, .*data row 1"),
        ([2.0**24 - 1, 7.0], pl.Float32, [2**24 - 1, 7]),
        ([2.0**24, 7.0], pl.Float32, "float of at least 2\\^24, .*data row 1"),
        ([1.5, 7.0], pl.Float64, "not a whole number .*data row 1"),
        ([float("inf"), 7.0], pl.Float64, "not a whole number .*data row 1"),
        ([float("nan"), 7.0], pl.Float64, "user_id is null .*data row 1"),
        ([True, False], pl.Boolean, "has the type Boolean. Convert it to text or whole numbers"),
        ([b"5", b"6"], pl.Binary, "has the type Binary"),
        ([[5], [6]], pl.List(pl.Int64), "has the type List"),
        ([1, 2], pl.Date, "has the type Date"),
        ([1, 2], pl.Datetime("us"), "has the type Datetime"),
        ([1, 2], pl.Duration("us"), "has the type Duration"),
    ],
)
def test_ids_of_frames_and_parquet_files(tmp_path: Path, ids: list[Any], kind: Any, expected: list[Any] | str) -> None:
    typed(ids, kind).write_parquet(tmp_path / "log.parquet")
    for source in (typed(ids, kind), tmp_path / "log.parquet"):
        if isinstance(expected, str):
            with pytest.raises(LogError, match=expected):
                read_log(source)
        else:
            assert users(read_log(source)) == expected


def test_decimals_and_very_large_numbers_have_a_note(tmp_path: Path) -> None:
    assert any("decimals such as 7.0" in note for note in read_csv(tmp_path, ["123.0", "5"]).notes)
    assert any("more than 64 bits" in note for note in read_csv(tmp_path, [str(2**63), "5"]).notes)
    assert not read_csv(tmp_path, ["123", "5"]).id_notes
    assert len(read_csv(tmp_path, ["123.0", "5"], id_types={"user_id": pl.Int64}).id_notes) == 1


def test_a_column_declared_as_text_is_text_in_every_format(tmp_path: Path) -> None:
    as_text = {"columns": {"user_id": "user_id:text"}}
    assert users(read_csv(tmp_path, ["1", "007", "+8"], **as_text)) == ["1", "007", "+8"]
    assert users(read_json(tmp_path, ["1", "7"], **as_text)) == ["1", "7"]
    for ids, kind in (([1, 7], pl.Int64), ([1.0, 7.0], pl.Float64), ([Decimal(1), Decimal(7)], pl.Decimal(5, 0))):
        assert users(read_log(typed(ids, kind), **as_text)) == ["1", "7"]  # type: ignore[arg-type]
        typed(ids, kind).write_parquet(tmp_path / "log.parquet")
        assert users(read_log(tmp_path / "log.parquet", **as_text)) == ["1", "7"]  # type: ignore[arg-type]


def test_the_same_integers_are_the_same_ids_on_every_way_in(tmp_path: Path) -> None:
    rng = random.Random(0)
    ids = sorted({rng.randrange(-(2**63), 2**63) >> rng.randrange(60) for _ in range(200)})
    spelled = list(map(str, ids))
    typed(ids, pl.Int64).write_parquet(tmp_path / "log.parquet")
    decimals = pl.Series([Decimal(i) for i in ids], dtype=pl.Decimal(20, 0))
    ways = [
        read_csv(tmp_path, spelled),
        read_csv(tmp_path, spelled, "tsv"),
        read_json(tmp_path, spelled),
        read_json(tmp_path, [f'"{text}"' for text in spelled]),
        read_log(tmp_path / "log.parquet"),
        read_log(pd.DataFrame(typed(ids, pl.Int64).to_dict(as_series=False))),
        read_log(typed(ids, pl.Int64).with_columns(user_id=decimals)),
        read_log(typed(spelled), id_types={"user_id": pl.Int64}),
    ]
    for log in ways:
        assert users(log) == ids
    for log in (read_csv(tmp_path, spelled, id_types={"user_id": pl.String}), read_log(typed(spelled))):
        assert users(log) == spelled


def test_later_logs_have_the_users_of_the_first_one_or_are_refused(tmp_path: Path) -> None:
    """5 ways in times 3 spellings, as the first and as a later log: 225 pairs."""
    numbers = [17, 5, 123]

    def read(way: str, spelling: str, **options: Any) -> Log:
        values = {"5": numbers, "5.0": list(map(float, numbers)), '"5"': list(map(str, numbers))}[spelling]
        if way in ("csv", "tsv"):
            return read_csv(
                tmp_path, [f'"{value}"' if spelling == '"5"' else f"{value}" for value in values], way, **options
            )
        if way == "json":
            return read_json(tmp_path, [json.dumps(value) for value in values], **options)
        if way == "parquet":
            typed(values).write_parquet(tmp_path / "log.parquet")
            return read_log(tmp_path / "log.parquet", **options)
        return read_log(typed(values), **options)

    pairs = [(way, spelling) for way in ("csv", "tsv", "json", "parquet", "frame") for spelling in ("5", "5.0", '"5"')]
    n_refused = 0
    for first in pairs:
        log = read(*first)
        known = set(users(log))
        for later in pairs:
            try:
                found = set(users(read(*later, id_types={"user_id": log.frame.schema["user_id"]})))
            except LogError:
                n_refused += 1
                continue
            # Text is taken as it stands, so a text log takes the text "5.0" of a CSV file for another user.
            is_text = isinstance(next(iter(known)), str) and later[0] in ("csv", "tsv") and later[1] == "5.0"
            assert found == known or is_text, (first, later)
    assert n_refused == 0


@pytest.mark.parametrize(
    ("value", "integer", "text"),
    [
        (5, 5, "5"),
        ("5", 5, "5"),
        (5.0, 5, "5"),
        (np.int64(5), 5, "5"),
        (np.uint8(5), 5, "5"),
        (np.float32(5), 5, "5"),
        (Decimal("5.0"), 5, "5"),
        (BIG + 1, BIG + 1, str(BIG + 1)),
        (str(-(2**63)), -(2**63), str(-(2**63))),
    ],
)
def test_one_id_is_converted_exactly(value: Any, integer: int, text: str) -> None:
    found = [parse_id(value, kind) for kind in (pl.Int64, pl.String)]
    assert found == [integer, text] and list(map(type, found)) == [int, str]


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("007", 'user_id "007" is not an integer, but all ids of this log are. Did you mean 7'),
        ("+8", "Did you mean 8"),
        ("-0", "Did you mean 0"),
        (" 5", "Did you mean 5"),
        ("5.0", "Did you mean 5"),
        ("1_000", "Did you mean 1000"),
        ("5\n", "Did you mean 5"),
        ("nobody", "Pass an integer"),
        ("٣", "Pass an integer"),
        (str(2**63), "Pass an integer"),
        (2**63, "more than 64 bits"),
    ],
)
def test_what_is_no_integer_is_refused_by_a_log_of_integers_and_taken_by_one_of_text(
    value: int | str, error: str
) -> None:
    assert parse_id(value, pl.String) == str(value)
    with pytest.raises(LogError, match=error):
        parse_id(value, pl.Int64, "user_id")


@pytest.mark.parametrize(
    "value",
    [float(BIG), np.float32(2**24), 5.5, Decimal("5.5"), float("nan"), b"5", True, np.bool_(True), None, [5], "\udcff"],
)
def test_what_is_neither_text_nor_exactly_a_whole_number_is_no_id(value: Any) -> None:
    for kind in (pl.Int64, pl.String):
        with pytest.raises(LogError, match="whole number|not an integer|not valid text"):
            parse_id(value, kind)


def test_ids_beyond_2_53_leave_as_text_in_json() -> None:
    assert [json_id(n) for n in (7, BIG - 1, BIG, 1 - BIG, -BIG, "7")] == [
        7,
        BIG - 1,
        str(BIG),
        1 - BIG,
        str(-BIG),
        "7",
    ]


@pytest.mark.parametrize("text", ["", " ", "\u2003", "a\tb", "a\x00", "a\x85b", "é" * 501])
def test_a_text_that_no_log_may_hold_is_no_new_id(text: str) -> None:
    with pytest.raises(ValueError, match="An id must not"):
        check_new_text(text)


@pytest.mark.parametrize(
    ("ids", "warning"),
    [
        (["nan", "nan", "NULL", "a"], '75 % of the rows have the user_id "nan"'),
        (["\\N", "a", "b", "c"], "25 % of the rows have the user_id"),
        ([" none ", "a", "b", "c"], '25 % of the rows have the user_id "none"'),
        (["u1 ", "u1", "u2", "u3"], "25 % of the rows have a blank at an end of the user_id"),
        (["1.0", "2.0", "3.0", "a"], "75 % of the rows have a user_id with a decimal point"),
        (["nancy", "u 1", "1.0", "a"], None),
    ],
)
def test_suspicious_texts_are_ids_with_a_warning(ids: list[str], warning: str | None) -> None:
    log = read_log(typed(ids))
    found = list(warn_about_ids(log.frame).values())
    assert users(log) == ids and sum(warning is not None and warning in text for text in found) == bool(warning)
    assert set(found) <= set(validate(log).warnings)
    as_items = log.frame.rename({"user_id": "item_id", "item_id": "user_id"})
    assert bool(warn_about_ids(as_items)) == bool(warning)
    as_event_ids = log.frame.select(event_id="user_id")
    assert bool(warn_about_ids(as_event_ids)) == bool(warning)


def test_a_store_keeps_its_type_of_ids_and_notes_what_it_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [1 + n % 4 for n in range(40)]
    log = pl.DataFrame({"user_id": ids, "item_id": [n % 7 for n in range(40)], "timestamp": range(START, START + 40)})
    at = ["--store", str(tmp_path / "s")]

    def run(*words: str) -> Any:
        code = main([*words, *at, "--json"])
        said = capsys.readouterr().out
        return json.loads(said) if code in (0, 6) else code

    log.with_columns(pl.col("user_id").cast(pl.Float64)).write_csv(tmp_path / "log.csv")  # 1.0, 2.0, ...
    version = run("fit", str(tmp_path / "log.csv"), "--model", "item-knn")
    assert any("decimals such as 7.0" in note for note in version["notes"])
    later = log.with_columns(pl.col("timestamp") + 100)
    later.with_columns(pl.col("user_id", "item_id").cast(pl.String)).write_parquet(tmp_path / "text.parquet")
    later.with_columns(pl.col("timestamp") + 100).cast({"user_id": pl.Float64}).write_ndjson(tmp_path / "new.jsonl")
    for name in ("text.parquet", "new.jsonl"):
        [version] = run("update", str(tmp_path / name), "--force", "--reason", "a test")
        assert version["sizes"]["users"] == 4 and version["data"]["day"]["share_unknown_users"] == 0
    assert [row["user_id"] for row in run("recommend", "4", "-k", "1", "--no-exclude-seen")] == [4]
    for command in (["recommend", "04"], ["erase", "+4"], ["inspect", "user", "004"], ["similar", "1.0"]):
        assert main([*command, *at]) in (OptionError.exit_code, LogError.exit_code)
        assert "Did you mean " in capsys.readouterr().err
    (tmp_path / "bad.csv").write_text(f"user_id,item_id,timestamp\n5.0,1,{START + 900}\n005,1,{START + 901}\n")
    assert main(["update", str(tmp_path / "bad.csv"), *at]) == LogError.exit_code
    assert "user_id is not a whole number, but all ids of the log are in 1 row (data row 2" in capsys.readouterr().err


def test_python_calls_take_numbers_of_numpy_and_mixtures_and_update_takes_other_types() -> None:
    log = pl.DataFrame({"user_id": [5, 6, 5, 6], "item_id": [1, 2, 2, 1], "timestamp": [START + n for n in range(4)]})
    numbers = Recommender("item-knn").fit(log)
    as_text = log.with_columns(pl.col("user_id", "item_id").cast(pl.String))
    texts = Recommender("item-knn").fit(as_text)
    calls: list[Any] = [5, np.int64(5), 5.0, "5", [5, "6"], (np.int32(5), 6.0), np.array([5, 6]), np.array([5.0, 6.0])]
    for given in [*calls, pl.Series([5, 6]), pl.Series(["5", "6"]), [Decimal(5), 6]]:
        n = 2 if not isinstance(given, str) and np.ndim(given) else 1
        for recommender, expected in ((numbers, [5, 6]), (texts, ["5", "6"])):
            found = recommender.recommend(given, k=1, exclude_seen=False)
            assert found["user_id"].to_list() == expected[:n] and found["fallback"].null_count() == n
    assert numbers.recommend(5, exclude_seen=False, allow=np.int64(1))["item_id"].to_list() == [1]
    assert len(numbers.explain(np.int64(5), "1")) and len(numbers.similar_items([1, "2"], k=1)) == 2
    refused: list[Any] = [b"5", [b"5"], True, [5, True], [5.0, 2**53 + 0.0], "05", ["5", "+6"], pl.Series([5.5]), None]
    for given in refused:
        with pytest.raises(LogError, match="user_id"):
            numbers.recommend(given)
    later = log.with_columns(pl.col("timestamp") + 10)
    for kind in (pl.String, pl.Categorical, pl.Float64, pl.Decimal(10, 0), pl.UInt8):
        frame = later.with_columns(pl.col("user_id").cast(pl.String).cast(kind))
        for recommender in (numbers, texts):
            recommender.update(frame)
            assert recommender.served.users.ids(torch.tensor([1, 2])).to_list() in ([5, 6], ["5", "6"])
            assert len(recommender.served.users) == 2
        later = later.with_columns(pl.col("timestamp") + 10)
    with pytest.raises(LogError, match=r"user_id is not a whole number, but all ids of the log are in 1 row .*'x'"):
        numbers.update(later[:1].with_columns(user_id=pl.lit("x")))


def test_event_ids_categories_and_periods_that_went_through_floats_keep_their_values(tmp_path: Path) -> None:
    """The columns optional in a log: whole floats are integers, missing values stay missing."""
    text = "user_id,item_id,period,event_id,category\n1,1,0.0,7.0,\n2,2,1.0,,3.0\n"
    (tmp_path / "log.csv").write_text(text)
    log = read_log(tmp_path / "log.csv").frame
    assert log.select("period", "event_id", "category").rows() == [(0, 7, None), (1, None, 3)]
    big = {"user_id": [1, 1], "item_id": [1, 2], "period": [BIG, BIG + 1]}
    decimals = pl.DataFrame(big, schema_overrides={"period": pl.Decimal(20, 0)})
    pl.DataFrame(big).write_csv(tmp_path / "big.csv")
    for source in (tmp_path / "big.csv", decimals):
        assert read_log(source).frame["period"].to_list() == [BIG, BIG + 1]  # type: ignore[arg-type]
    with pytest.raises(LogError, match="period is not a whole number in 2 rows"):
        read_log(decimals.cast({"period": pl.Float64}))
    blank = pl.DataFrame({"user_id": [1], "item_id": [1], "timestamp": [START], "event_id": [" "], "category": [""]})
    assert read_log(blank).frame.select("event_id", "category").rows() == [(None, None)]
    lost = pl.DataFrame({"user_id": [1], "item_id": [1], "timestamp": [START], "event_id": [float(BIG)]})
    with pytest.raises(LogError, match="event_id is a float of at least 2\\^53"):
        read_log(lost)
