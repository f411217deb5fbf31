"""Open a table of interactions: a file by its ending, a frame, or a public data set by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from freshrec.data.folders import scan_parquet
from freshrec.data.json_lines import scan_json_lines
from freshrec.data.pandas_frames import from_pandas
from freshrec.data.reader_errors import as_log_error
from freshrec.data.text_rows import scan_text
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
        return SourceTable(from_pandas(source).lazy(), "the frame", has_types=True)
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
        return SourceTable(scan_parquet(files), path.name, has_types=True)
    endings = [e.lower() for e in path.suffixes[-2:]]
    match endings[:-1] if endings[-1:] == [".gz"] else endings[-1:]:
        case [".parquet" | ".pq"]:
            return SourceTable(scan_parquet([path]), path.name, has_types=True)
        case [".csv" | ".txt"]:
            return SourceTable(scan_text(path), path.name, has_types=False)
        case [".tsv"]:
            return SourceTable(scan_text(path, "\t"), path.name, has_types=False)
        case [".jsonl" | ".ndjson" | ".json"]:
            return SourceTable(scan_json_lines(path), path.name, has_types=False)
        case _:
            raise LogError(
                f"{path.name} has an unknown file ending. A log is {SUPPORTED_ENDINGS}. "
                f"For a public data set, pass --format ({', '.join(FORMATS)})."
            )


def _open_movielens(path: Path) -> pl.LazyFrame:
    names = ["user_id", "item_id", "weight", "timestamp"]
    if path.suffix == ".dat":  # 1::1193::5::978300760 has seven columns if split at ":"; every other one is empty
        with_gaps = ["user_id", "_1", "item_id", "_2", "weight", "_3", "timestamp"]
        return scan_text(path, ":", with_gaps).select(names)
    if path.suffix == ".data":
        return scan_text(path, "\t", names)
    return scan_text(path).select(user_id="userId", item_id="movieId", weight="rating", timestamp="timestamp")


def _open_diginetica(path: Path) -> pl.LazyFrame:
    day = pl.col("eventdate").str.to_datetime("%Y-%m-%d", strict=False)
    since = pl.duration(milliseconds=pl.col("timeframe").cast(pl.Int64, strict=False))
    return scan_text(path, ";").select(user_id="sessionId", item_id="itemId", timestamp=day + since)


def _open_recbole(path: Path) -> pl.LazyFrame:
    rows = scan_text(path, "\t")
    renamed = {"rating": "weight"}
    base_names = {name: name.split(":")[0] for name in rows.collect_schema().names()}
    return rows.rename({name: renamed.get(short, short) for name, short in base_names.items()})


FORMATS = {
    "amazon": LogFormat(
        "Amazon reviews, ratings only (ratings_Beauty.csv): user,item,rating,timestamp, without a header.",
        lambda path: scan_text(path, ",", ["user_id", "item_id", "weight", "timestamp"]),
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
        lambda path: scan_text(path, ",", ["user_id", "item_id", "category", "event", "timestamp"]),
    ),
    "yoochoose": LogFormat(
        "Yoochoose (yoochoose-clicks.dat): session,timestamp,item,category, without a header. A session is a user.",
        lambda path: scan_text(path, ",", ["user_id", "timestamp", "item_id", "category"]),
        allows_mixed_ids=True,
    ),
}
