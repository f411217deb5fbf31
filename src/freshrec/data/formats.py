"""Open a table of interactions: a file by its ending, a frame, or a public data set by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from freshrec.data.folders import PARQUET_ENDINGS, Part, list_parts, scan_parts
from freshrec.data.json_rows import open_json_lines
from freshrec.data.pandas_frames import from_pandas, is_pandas_frame
from freshrec.data.reader_errors import as_log_error
from freshrec.data.text_rows import parse_separator, scan_text
from freshrec.errors import LogError, OptionError, unknown_name_error
from freshrec.memory_limits import has_memory_for_rows, require_memory_for_rows

if TYPE_CHECKING:
    import pandas as pd

SUPPORTED_ENDINGS = (
    "CSV (.csv, .tsv, also .gz), Parquet (.parquet, a file or a folder), a Delta table or JSON lines (.jsonl, .ndjson, "
    "also .gz)"
)


@dataclass(frozen=True)
class SourceTable:
    """A table that is open but not yet read."""

    rows: pl.LazyFrame
    name: str  # name of the table in messages
    has_types: bool  # whether its columns have types; otherwise all values are text
    allows_mixed_ids: bool = False  # whether one id column may hold both numbers and other text
    problems: Mapping[str, str] = field(default_factory=dict)  # columns that cannot be used -> a sentence that says why
    notes: tuple[str, ...] = ()  # sentences about what was left out
    file_states: Mapping[Path, tuple[int, int]] = field(default_factory=dict)  # size and time of change when opened

    def require_unchanged(self) -> None:
        """Raise LogError if a file has changed since the table was opened."""
        if _file_states(list(self.file_states)) != self.file_states:
            raise LogError(f"{self.name} changed while it was read. Read it again when nothing writes to it.")

    def require_memory(self) -> None:
        """Raise OutOfMemoryError if the rows certainly need more memory than there is. Only large files are counted."""
        n_bytes = sum(size for size, _ in self.file_states.values())
        if not has_memory_for_rows(n_bytes):  # a row has at least one byte
            with as_log_error(self.name):
                n_rows = int(self.rows.select(pl.len()).collect(engine="streaming").item())
            require_memory_for_rows(n_rows, self.name)


@dataclass(frozen=True)
class LogFormat:
    """A public format: its description, and a function that opens a file of it with our column names."""

    description: str
    open_file: Callable[[Path], pl.LazyFrame]
    allows_mixed_ids: bool = False


def open_table(
    source: str | Path | pl.DataFrame | pd.DataFrame, format: str | None = None, separator: str | None = None
) -> SourceTable:
    """Open `source`, a path or a frame. `format` is a key of FORMATS. Raises LogError if it cannot be opened.

    `separator` divides the fields of a text file: one character or a name such as tab. It has no effect on others.
    """
    if separator is not None:
        separator = parse_separator(separator)
        if format is not None:
            raise OptionError(f'--separator has no effect on format "{format}", which has its own. Leave one out.')
    if isinstance(source, pl.DataFrame):
        return SourceTable(source.lazy(), "the frame", has_types=True)
    if is_pandas_frame(source):
        frame, problems = from_pandas(source)
        return SourceTable(frame.lazy(), "the frame", has_types=True, problems=problems)
    if not isinstance(source, str | Path):
        raise LogError(f"A log must be a path, a polars frame or a pandas frame, not a {type(source).__name__}.")
    path = Path(source)
    with as_log_error(path.name):
        if format is not None and format not in FORMATS:
            raise unknown_name_error("format", format, FORMATS)
        if format is not None and path.is_dir():
            raise LogError(f'{path.name} is a folder, but format "{format}" is a single file. Pass that file.')
        parts, notes = list_parts(path)
        states = _file_states([part.path for part in parts])
        if format is None:
            table = _open_by_ending(path, parts, separator)
        else:
            rows = FORMATS[format].open_file(path)
            table = SourceTable(rows, path.name, False, FORMATS[format].allows_mixed_ids)
        return replace(table, notes=tuple(notes), file_states=states)


def _file_states(files: Sequence[Path]) -> dict[Path, tuple[int, int]]:
    found = {file: file.stat() for file in files if file.exists()}
    return {file: (state.st_size, state.st_mtime_ns) for file, state in found.items()}


def _open_by_ending(path: Path, parts: Sequence[Part], separator: str | None) -> SourceTable:
    if path.is_dir() or path.name.lower().endswith(PARQUET_ENDINGS):
        rows, problems = scan_parts(parts, path if path.is_dir() else path.parent)
        return SourceTable(rows, path.name, has_types=True, problems=problems)
    endings = [e.lower() for e in path.suffixes[-2:]]
    match endings[:-1] if endings[-1:] == [".gz"] else endings[-1:]:
        case [".csv" | ".txt"]:
            return SourceTable(scan_text(path, separator or ","), path.name, has_types=False)
        case [".tsv"]:
            return SourceTable(scan_text(path, separator or "\t"), path.name, has_types=False)
        case [".jsonl" | ".ndjson" | ".json"]:
            return SourceTable(open_json_lines(path), path.name, has_types=False)
        case _:
            raise LogError(
                f"{path.name} has an unknown file ending. A log is {SUPPORTED_ENDINGS}. "
                f"For a public data set, pass --format ({', '.join(FORMATS)})."
            )


def _open_movielens(path: Path) -> pl.LazyFrame:
    names = ["user_id", "item_id", "rating", "timestamp"]
    if path.suffix == ".dat":  # 1::1193::5::978300760 has seven columns if split at ":"; every other one is empty
        with_gaps = ["user_id", "_1", "item_id", "_2", "rating", "_3", "timestamp"]
        return scan_text(path, ":", with_gaps).select(names)
    if path.suffix == ".data":
        return scan_text(path, "\t", names)
    return scan_text(path).select(user_id="userId", item_id="movieId", rating="rating", timestamp="timestamp")


def _open_diginetica(path: Path) -> pl.LazyFrame:
    day = pl.col("eventdate").str.to_datetime("%Y-%m-%d", strict=False)
    since = pl.duration(milliseconds=pl.col("timeframe").cast(pl.Int64, strict=False))
    return scan_text(path, ";").select(user_id="sessionId", item_id="itemId", timestamp=day + since)


def _open_recbole(path: Path) -> pl.LazyFrame:
    rows = scan_text(path, "\t")
    return rows.rename({name: name.split(":")[0] for name in rows.collect_schema().names()})


FORMATS = {
    "amazon": LogFormat(
        "Amazon reviews, ratings only (ratings_Beauty.csv): user,item,rating,timestamp, without a header.",
        lambda path: scan_text(path, ",", ["user_id", "item_id", "rating", "timestamp"]),
        allows_mixed_ids=True,
    ),
    "diginetica": LogFormat(
        "Diginetica (train-item-views.csv): a session is a user, and a time is the date plus the timeframe.",
        _open_diginetica,
    ),
    "movielens": LogFormat(
        "MovieLens (ratings.dat, ratings.csv, u.data): user,item,rating,timestamp.", _open_movielens
    ),
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
