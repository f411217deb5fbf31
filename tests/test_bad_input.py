"""Bad input: a message that says what is wrong, where, and what to do; a non-zero exit code; no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freshrec.cli import app
from freshrec.data.log import Log, read_log
from freshrec.data.reader_errors import as_log_error
from freshrec.errors import LogError, OptionError

HEADER = "user_id,item_id,timestamp\n"
GOOD = "1,2,1600000000\n"
BAD_FILES = {
    "empty.csv": ("", "empty.csv is an empty file"),
    "header.csv": (HEADER, "header.csv has no rows"),
    "missing.csv": ("uid,item_id,timestamp\n" + GOOD, "has no column user_id. Its columns are uid, item_id, timestamp"),
    "twice.csv": ("user_id,user_id,item_id,timestamp\n1,1,2,1600000000\n", 'has several columns "user_id"'),
    "mixed.csv": (HEADER + GOOD + GOOD + "abc,2,1600000000\n", "user_id is text, while most ids are whole numbers"),
    "null.csv": (HEADER + GOOD + ",2,1600000000\n", "user_id is null or empty in 1 row (data row 2: null)"),
    "blank.csv": (HEADER + '1,"",1600000000\n' + GOOD, "item_id is null or empty in 1 row (data row 1: '')"),
    "long.csv": (
        HEADER + "x" * 10_000 + ",2,1600000000\n",
        "user_id is longer than 1,000 bytes in 1 row (data row 1: 'xxx",
    ),
    "timeless.csv": (HEADER + GOOD + "1,2,\n", "timestamp is null in 1 row (data row 2: null)"),
    "unread.csv": (
        HEADER + GOOD + "1,2,yesterday\n",
        "timestamp cannot be read as a time in 1 row (data row 2: 'yesterday')",
    ),
    "early.csv": (HEADER + GOOD + GOOD + "1,2,-5\n", "timestamp is before 1980 in 1 row (data row 3: '-5')"),
    "future.csv": (HEADER + GOOD + GOOD + "1,2,4000000000\n", "timestamp is in the future in 1 row (data row 3"),
    "huge.csv": (HEADER + GOOD + GOOD + "1,2,9" + "0" * 30 + "\n", "timestamp is in the future in 1 row (data row 3"),
    "counter.csv": (HEADER + "1,2,1\n1,3,2\n", "The timestamps are around 2, which is before 1980"),
    "ragged.csv": (HEADER + "1,2,3,4,5\n", "ragged.csv: line 2 has 5 fields, but the header has 3"),
    "cut.jsonl": ('{"user_id": 1, "ite', "cut.jsonl cannot be read in line 1"),
    "list.jsonl": ('{"user_id":[1],"item_id":2,"timestamp":1600000000}\n', "Column user_id has the type List"),
    "cut.parquet": ("PAR1 and then nothing", "cut.parquet is not a complete Parquet file"),
    "photo.png": ("\x89PNG", "photo.png has an unknown file ending"),
    "period.csv": (
        "user_id,item_id,period\n1,2,0\n1,2,late\n",
        "period is not a whole number in 1 row (data row 2: 'late')",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    content, complaint = BAD_FILES[name]
    (tmp_path / name).write_text(content)
    assert app.main(["validate", str(tmp_path / name)]) == LogError.exit_code
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {name}")
    assert complaint in said.err
    assert (said.err.count("\n"), said.err[-2:], said.out) == (1, ".\n", "")


def test_a_path_to_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="There is no file .*nowhere.csv. Check the path"):
        read_log(tmp_path / "nowhere.csv")
    with pytest.raises(LogError, match="is a folder without .parquet files"):
        read_log(tmp_path)


def test_a_parquet_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user_id": [1, 2], "item_id": [1, 2], "timestamp": [1_600_000_000] * 2}).write_parquet(path)
    whole = path.read_bytes()
    for length in range(1, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(LogError, match="log.parquet is not a complete Parquet file"):
            read_log(path)


def test_a_folder_whose_parts_disagree_is_refused(tmp_path: Path) -> None:
    for name, user in (("a", 1), ("b", "one")):
        pl.DataFrame({"user_id": [user], "item_id": [1], "timestamp": [1_600_000_000]}).write_parquet(
            tmp_path / f"{name}.parquet"
        )
    with pytest.raises(LogError, match='Column "user_id" has the type Int64 in a.parquet and String in b.parquet'):
        read_log(tmp_path)


def test_mixed_ids_can_be_declared_as_text(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(HEADER + "1,71053,1600000000\n1,85123A,1600000001\n")
    with pytest.raises(LogError, match="--columns item_id=NAME:text"):
        read_log(tmp_path / "log.csv")
    log = read_log(tmp_path / "log.csv", columns={"item_id": "item_id:text"})
    assert log.frame["item_id"].to_list() == ["71053", "85123A"]


@pytest.mark.parametrize("aside", ["bad.csv", "bad.parquet"])
def test_quarantine_takes_the_bad_rows_with_their_reasons(tmp_path: Path, aside: str) -> None:
    source = tmp_path / "log.csv"
    source.write_text("user_id,item_id,timestamp,note\n1,2,1600000000,a\n,2,1600000001,b\n1,3,soon,c\n")
    log = read_log(source, quarantine=tmp_path / aside)
    assert (len(log.frame), log.n_quarantined) == (1, 2)
    bad = (pl.read_csv if aside.endswith("csv") else pl.read_parquet)(tmp_path / aside)
    # Complete rows of the source, including a column that we do not know.
    assert bad["note"].to_list() == ["b", "c"]
    assert bad["reason"].to_list() == ["user_id is null or empty", "timestamp cannot be read as a time"]


def test_one_unreadable_time_does_not_discard_the_other_timestamps(tmp_path: Path) -> None:
    times, items = ["1600000000", "soon", "1600000001"], [1, 2, 3]
    frame = pl.DataFrame({"user_id": [1, 1, 1], "item_id": items, "timestamp": times, "period": [0, 0, 1]})
    log = read_log(frame, quarantine=tmp_path / "bad.csv")
    assert (log.has_clock, log.frame["item_id"].to_list()) == (True, [1, 3])


def test_a_log_of_bad_rows_only_is_refused_even_with_quarantine(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(HEADER + ",,1600000000\n")
    with pytest.raises(LogError, match="has no valid rows"):
        read_log(tmp_path / "log.csv", quarantine=tmp_path / "bad.csv")


def test_quarantine_never_replaces_the_log(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(HEADER + GOOD)
    for name in ("log.csv", "bad.txt"):
        with pytest.raises(OptionError):
            read_log(tmp_path / "log.csv", quarantine=tmp_path / name)
    assert (tmp_path / "log.csv").read_text() == HEADER + GOOD


def test_an_unknown_option_gets_the_nearest_valid_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.csv").write_text(HEADER + GOOD)
    log = str(tmp_path / "log.csv")
    for options, said in (
        (["--format", "movielns"], 'Did you mean "movielens"?'),
        (["--columns", "usr_id=user_id"], 'Did you mean "user_id"?'),
        (["--columns", "user_id"], "is not a pair of column names"),
        (["--colums", "user_id=a"], "--columns"),
    ):
        assert app.main(["validate", log, *options]) == 2
        assert said in capsys.readouterr().err


def test_a_pandas_column_of_numbers_and_text_is_refused() -> None:
    import pandas as pd

    with pytest.raises(LogError, match='Column "user_id" of the frame mixes types'):
        read_log(pd.DataFrame({"user_id": [1, "a"], "item_id": [1, 1], "timestamp": [1_600_000_000] * 2}))


def test_the_process_exits_with_the_code_and_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("a,b\n1,2\n")
    command = [sys.executable, "-m", "freshrec", "validate", str(tmp_path / "log.csv")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 3
    assert ended.stderr.startswith("error: log.csv has no column user_id")


def test_ctrl_c_ends_with_one_line_and_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> Log:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "read_log", interrupted)
    assert app.main(["validate", "log.csv"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=300), ending=st.sampled_from([".csv", ".csv.gz", ".tsv", ".jsonl", ".parquet"]))
def test_random_bytes_are_a_log_or_a_log_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, ending: str
) -> None:
    path = tmp_path_factory.mktemp("noise") / f"log{ending}"
    path.write_bytes(content)
    with pytest.raises(LogError):  # no 300 random bytes have the three columns
        read_log(path)


CELLS = {
    "numbers": st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1), st.just(1_600_000_000)),
    "floats": st.one_of(st.none(), st.floats(), st.just(1.6e9)),
    "text": st.one_of(st.none(), st.text(max_size=8), st.sampled_from(["7", "007", "2020-01-01", "1.6e9"])),
    "dates": st.one_of(st.none(), st.datetimes()),
    "flags": st.one_of(st.none(), st.booleans()),
    "lists": st.lists(st.integers(0, 3), max_size=2),
}


@st.composite
def small_frames(draw: st.DrawFn) -> pl.DataFrame:
    optional = draw(
        st.sets(st.sampled_from(["timestamp", "period", "order", "label", "weight", "category", "event_id"]))
    )
    n_rows = draw(st.integers(0, 5))
    columns = {}
    for name in ("user_id", "item_id", *sorted(optional)):
        cells = CELLS[draw(st.sampled_from(sorted(CELLS)))]
        columns[name] = draw(st.lists(cells, min_size=n_rows, max_size=n_rows))
    return pl.DataFrame(columns, strict=False)


@settings(max_examples=200, deadline=None)
@given(frame=small_frames(), as_csv=st.booleans())
def test_a_random_frame_is_a_log_or_a_log_error(
    tmp_path_factory: pytest.TempPathFactory, frame: pl.DataFrame, as_csv: bool
) -> None:
    source: Path | pl.DataFrame = frame
    if as_csv:
        source = tmp_path_factory.mktemp("frame") / "log.csv"
        frame.cast(pl.String, strict=False).write_csv(source) if not _nested(frame) else source.write_text("user_id\n")
    outcome = read_or_refuse(source)
    if isinstance(outcome, LogError):
        assert str(outcome).endswith(".")
        return
    assert len(outcome.frame) == len(frame)  # nothing is dropped silently
    assert outcome.frame.select("user_id", "item_id", "time").null_count().sum_horizontal().item() == 0
    assert outcome.frame["time"].is_sorted()


def read_or_refuse(source: Path | pl.DataFrame) -> Log | LogError:
    try:
        return read_log(source)
    except LogError as refusal:
        return refusal


def _nested(frame: pl.DataFrame) -> bool:
    return any(dtype.is_nested() for dtype in frame.dtypes)


def test_only_the_output_of_a_panicking_reader_is_hidden(capfd: pytest.CaptureFixture[str]) -> None:
    def panic() -> None:
        with as_log_error("log.parquet"):
            os.write(2, b"thread 'async-executor-0' panicked at src/parquet.rs\n")
            raise pl.exceptions.PanicException("range end out of bounds")

    with pytest.raises(LogError, match="its data is not where its index says"):
        panic()
    with as_log_error("log.parquet"):
        os.write(2, b"a warning\n")
    assert capfd.readouterr().err == "a warning\n"
