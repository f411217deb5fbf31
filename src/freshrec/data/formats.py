"""Open a table of interactions: a file by its ending, a frame, or a public data set by its name."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from freshrec.errors import LogError, unknown_name_error

if TYPE_CHECKING:
    import pandas as pd

SUPPORTED_ENDINGS = (
    "CSV (.csv, .tsv, also .gz), Parquet (.parquet, a file or a folder) or JSON lines (.jsonl, .ndjson, also .gz)"
)


@dataclass(frozen=True)
class SourceTable:
    """A table that is open but not yet read."""

    rows: pl.LazyFrame
    name: str  # name of the table in messages
    has_types: bool  # whether its columns have types; otherwise all values are text
    allows_mixed_ids: bool = False  # whether one id column may hold both numbers and other text


@dataclass(frozen=True)
class LogFormat:
    """A public format: its description, and a function that opens a file of it with our column names."""

    description: str
    open_file: Callable[[Path], pl.LazyFrame]
    allows_mixed_ids: bool = False


def open_table(source: str | Path | pl.DataFrame | pd.DataFrame, format: str | None = None) -> SourceTable:
    """Open `source`, a path or a frame. `format` is a key of FORMATS. Raises LogError if it cannot be opened."""
    if isinstance(source, pl.DataFrame):
        return SourceTable(source.lazy(), "the frame", has_types=True)
    if type(source).__module__.split(".")[0] == "pandas":
        return SourceTable(_from_pandas(source).lazy(), "the frame", has_types=True)
    if not isinstance(source, str | Path):
        raise LogError(f"A log must be a path, a polars frame or a pandas frame, not a {type(source).__name__}.")
    path = Path(source)
    with as_log_error(path.name):
        _check_not_empty(path)
        if format is None:
            return _open_by_ending(path)
        if format not in FORMATS:
            raise unknown_name_error("format", format, FORMATS)
        if path.is_dir():
            raise LogError(f'{path.name} is a folder, but format "{format}" is a single file. Pass that file.')
        return SourceTable(FORMATS[format].open_file(path), path.name, False, FORMATS[format].allows_mixed_ids)


@contextmanager
def as_log_error(name: str) -> Iterator[None]:
    """Turn every error that polars raises for a damaged or foreign file into a LogError."""
    try:
        with _mute_panics():
            yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, UnicodeError, ValueError) as problem:
        is_panic = isinstance(problem, pl.exceptions.PanicException)
        message = "its data is not where its index says" if is_panic else str(problem).split("\n")[0].split(". ")[0]
        reason = to_printable(message, 160).rstrip(".")
        raise LogError(
            f"{name} cannot be read as a table ({reason}). It may be truncated, damaged or in another format. "
            "Check the file, or pass --format NAME."
        ) from problem


@contextmanager
def _mute_panics() -> Iterator[None]:
    """Hide what the reader's threads print to standard error when they panic. Other output is passed on."""
    sys.stderr.flush()
    original_stderr = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        except pl.exceptions.PanicException:
            captured.truncate(0)
            raise
        finally:
            os.dup2(original_stderr, 2)
            os.close(original_stderr)
            captured.seek(0)
            os.write(2, captured.read())


def to_printable(text: str, length: int) -> str:
    """Return at most `length` characters of `text`; unprintable ones become "?"."""
    cleaned = "".join(letter if letter.isprintable() else "?" for letter in text[: length + 1])
    return cleaned if len(cleaned) <= length else cleaned[: length - 3] + "..."


def printable_id(value: str | int) -> str:
    """Return an id on one line: unchanged if it is printable, else as a Python literal with quotes and escapes."""
    text = str(value)
    return text if text.isprintable() else repr(text)


def _check_not_empty(path: Path) -> None:
    if not path.exists():
        raise LogError(f"There is no file {path}. Check the path.")
    if path.is_file() and path.stat().st_size == 0:
        raise LogError(f"{path.name} is an empty file. A log needs at least one row.")


def _open_by_ending(path: Path) -> SourceTable:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*.parquet") if p.stat().st_size)
        if not files:
            raise LogError(f"{path.name} is a folder without .parquet files. Pass a file, or a folder that has some.")
        return SourceTable(_scan_parquet(files), path.name, has_types=True)
    endings = [e.lower() for e in path.suffixes[-2:]]
    match endings[:-1] if endings[-1:] == [".gz"] else endings[-1:]:
        case [".parquet" | ".pq"]:
            return SourceTable(_scan_parquet([path]), path.name, has_types=True)
        case [".csv" | ".txt"]:
            return SourceTable(_scan_text(path), path.name, has_types=False)
        case [".tsv"]:
            return SourceTable(_scan_text(path, "\t"), path.name, has_types=False)
        case [".jsonl" | ".ndjson" | ".json"]:
            # The whole file decides the type of a column: later rows may hold text even if the first ones hold numbers.
            return SourceTable(pl.scan_ndjson(path, infer_schema_length=None), path.name, has_types=False)
        case _:
            raise LogError(
                f"{path.name} has an unknown file ending. A log is {SUPPORTED_ENDINGS}. "
                f"For a public data set, pass --format ({', '.join(FORMATS)})."
            )


def _scan_parquet(files: list[Path]) -> pl.LazyFrame:
    for part in files:
        with part.open("rb") as file:
            start = file.read(4)
            file.seek(max(part.stat().st_size - 4, 0))
            is_complete = start == file.read(4) == b"PAR1"
        if not is_complete:
            raise LogError(
                f"{part.name} is not a complete Parquet file: its first or last bytes are missing. Copy it again."
            )
    casts = pl.ScanCastOptions(integer_cast="upcast")
    return pl.scan_parquet(files, hive_partitioning=False, cast_options=casts, extra_columns="ignore")


def _scan_text(path: Path, separator: str = ",", names: Sequence[str] | None = None) -> pl.LazyFrame:
    """Scan a text file with all columns as text. `names` are the columns of a file without a header.

    Types that are inferred from the first rows may fail later, or turn the id 007 into 7.
    """
    return pl.scan_csv(
        path, separator=separator, has_header=names is None, new_columns=names, infer_schema=False, glob=False
    )


def _from_pandas(source: pd.DataFrame) -> pl.DataFrame:
    """Convert a pandas frame column by column, without pyarrow. Raises LogError for a column of mixed types."""
    columns = []
    for name in source.columns:
        column = source[name]
        try:
            if column.dtype.kind in "iuf" and column.dtype == column.to_numpy().dtype:
                columns.append(pl.Series(str(name), column.to_numpy(), nan_to_null=True))
            else:
                columns.append(pl.Series(str(name), column.astype(object).where(column.notna(), None).tolist()))
        except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError) as problem:
            raise LogError(
                f'Column "{name}" of the frame mixes types, such as numbers and text. Convert it or drop it.'
            ) from problem
    with as_log_error("the frame"):
        return pl.DataFrame(columns)


def _open_movielens(path: Path) -> pl.LazyFrame:
    names = ["user_id", "item_id", "weight", "timestamp"]
    if path.suffix == ".dat":  # 1::1193::5::978300760 has seven columns if split at ":"; every other one is empty
        with_gaps = ["user_id", "_1", "item_id", "_2", "weight", "_3", "timestamp"]
        return _scan_text(path, ":", with_gaps).select(names)
    if path.suffix == ".data":
        return _scan_text(path, "\t", names)
    return _scan_text(path).select(user_id="userId", item_id="movieId", weight="rating", timestamp="timestamp")


def _open_diginetica(path: Path) -> pl.LazyFrame:
    day = pl.col("eventdate").str.to_datetime("%Y-%m-%d", strict=False)
    since = pl.duration(milliseconds=pl.col("timeframe").cast(pl.Int64, strict=False))
    return _scan_text(path, ";").select(user_id="sessionId", item_id="itemId", timestamp=day + since)


def _open_recbole(path: Path) -> pl.LazyFrame:
    rows = _scan_text(path, "\t")
    renamed = {"rating": "weight"}
    base_names = {name: name.split(":")[0] for name in rows.collect_schema().names()}
    return rows.rename({name: renamed.get(short, short) for name, short in base_names.items()})


FORMATS = {
    "amazon": LogFormat(
        "Amazon reviews, ratings only (ratings_Beauty.csv): user,item,rating,timestamp, without a header.",
        lambda path: _scan_text(path, ",", ["user_id", "item_id", "weight", "timestamp"]),
        allows_mixed_ids=True,
    ),
    "diginetica": LogFormat(
        "Diginetica (train-item-views.csv): a session is a user, and a time is the date plus the timeframe.",
        _open_diginetica,
    ),
    "movielens": LogFormat("MovieLens (ratings.dat, ratings.csv, u.data): the rating is the weight.", _open_movielens),
    "recbole": LogFormat(
        "RecBole (.inter): tab-separated, with a header such as user_id:token.",
        _open_recbole,
        allows_mixed_ids=True,
    ),
    "taobao": LogFormat(
        "Taobao (UserBehavior.csv): user,item,category,event,timestamp, without a header. Clicks: --events pv.",
        lambda path: _scan_text(path, ",", ["user_id", "item_id", "category", "event", "timestamp"]),
    ),
    "yoochoose": LogFormat(
        "Yoochoose (yoochoose-clicks.dat): session,timestamp,item,category, without a header. A session is a user.",
        lambda path: _scan_text(path, ",", ["user_id", "timestamp", "item_id", "category"]),
        allows_mixed_ids=True,
    ),
}
