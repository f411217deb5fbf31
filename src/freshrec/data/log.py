"""Read a log: a table of interactions with our column names, sorted by time. No row is dropped silently.

A log with bad rows is an error, which gives counts and the first examples. With `quarantine`, bad rows are written to a
file instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from freshrec.data.bad_rows import fault_message, first_faults, write_quarantine
from freshrec.data.columns import ColumnFault, has_value, read_labels, read_numbers
from freshrec.data.formats import SourceTable, open_table
from freshrec.data.identities import IdType, read_id_column
from freshrec.data.moments import (
    UNIT_NAMES,
    check_time_format,
    format_time,
    latest_plausible_time,
    parse_microseconds,
    read_times,
)
from freshrec.data.ratings import choose_rating, keep_ratings
from freshrec.data.source_columns import collect_columns, map_columns
from freshrec.deprecation import UNSET, Unset, value_of_renamed
from freshrec.errors import LogError, NoRowsError, OptionError
from freshrec.forks import require_threads
from freshrec.memory_limits import naming_memory_shortage
from freshrec.text_layout import format_count

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Log:
    """Interactions, sorted by time.

    `frame` has the columns user_id and item_id (Int64 or String, as in the source) and time (Int64). Times are
    microseconds since 1970, UTC; without timestamps they are 0, 1, 2, ... Further columns are event, category, label,
    period, split and event_id, if the source has them.
    """

    frame: pl.DataFrame
    has_clock: bool  # whether the log has timestamps
    unit: str  # of times in the source: "s", "ms", "us", "ns", "ISO 8601", a time format, or "period + order"
    notes: tuple[str, ...] = ()  # sentences about what was detected, renamed or left out
    n_out_of_order: int = 0  # rows that come after a later row in the source
    id_notes: tuple[str, ...] = ()  # those of `notes` that are about ids
    rating_note: str = ""  # the one of `notes` that counts the rows below the lowest rating to keep
    n_quarantined: int = 0  # bad rows that were written to the quarantine file
    n_missing_timestamps: int = 0  # rows without a timestamp, in a source with timestamps in other rows

    @property
    def future_text(self) -> str:
        """A sentence that all events lie in the future; "" if they do not. Two days ahead are not the future."""
        if not self.has_clock or not len(self.frame) or self.frame["time"][0] <= latest_plausible_time():
            return ""
        return f"All timestamps are in the future; the first is {format_time(self.frame['time'][0])}."


@naming_memory_shortage()
def read_log(
    source: str | Path | pl.DataFrame | pd.DataFrame,
    *,
    columns: Mapping[str, str] | None = None,
    format: str | None = None,
    events: Sequence[str] = (),
    users: int | None = None,
    seed: int = 0,
    quarantine: Path | None = None,
    allow_missing_events: bool = False,
    text_columns: Sequence[str] = (),
    id_types: Mapping[str, IdType] | None = None,
    separator: str | None = None,
    min_rating: float | None = None,
    drop_weight: bool = False,
    time_format: str | None = None,
    absent: bool | Unset = UNSET,
    text: Sequence[str] | Unset = UNSET,
) -> Log:
    """Read a log from a file, a folder or a frame, and sort it by time.

    `source` is a CSV file (also .gz), a Parquet file or folder, a Delta table, a JSON lines file, or a frame of polars
    or pandas.

    - `columns`: our column name -> the name in the source, if they differ. `{"item_id": "sku:text"}` reads the ids
      as text, even if some of them look like numbers.
    - `format`: the name of a public format, a key of FORMATS.
    - `events`: event types to keep; empty = all.
    - `users`: number of random users to keep, with all their rows; None = all. `seed` is the seed of this sample.
    - `quarantine`: a .parquet or .csv file for bad rows. If it exists, the rows go to name-1, name-2, ..., and a note
      of the log says so. Without `quarantine`, a bad row is an error.
    - `allow_missing_events`: whether a type in `events` may have no rows.
    - `text_columns`: our columns whose ids are text, even if all of them are numbers.
    - `id_types`: our column -> Int64 or String, the type of the ids in an earlier log. Ids are converted to it if that
      is exact; other rows are bad. It overrides `text_columns`.
    - `separator`: what divides the fields of a text file: one character, or comma, tab, semicolon, pipe or space. By
      default, it is a tab in .tsv files and a comma in others.
    - `min_rating`: the lowest rating to keep. Rows below it are left out before anything else is checked or counted. A
      row without a rating is bad. The rating is the column `rating`, or else `weight`.
    - `drop_weight`: whether to ignore a column `weight`. By default, it is an error without `min_rating`.
    - `time_format`: directives of strptime, such as "%d.%m.%Y"; None = timestamps are ISO 8601, or numbers since 1970.
    - `absent`, `text`: former names of `allow_missing_events` and `text_columns`.

    Raises LogError if the log cannot be read, NoRowsError if it is empty, OptionError, or OutOfMemoryError.
    """
    require_threads()
    allow_missing_events = value_of_renamed("allow_missing_events", allow_missing_events, "absent", absent)
    text_columns = value_of_renamed("text_columns", text_columns, "text", text)
    _check_options(source, quarantine, time_format)
    table = open_table(source, format, separator)
    names, declared_text = map_columns(table, columns or {})
    names, notes = choose_rating(names, min_rating, drop_weight, table.name)
    source_rows, rating_faults = _collect_rows(table, names, events, allow_missing_events, min_rating, notes)
    known_types = dict.fromkeys(declared_text | set(text_columns), pl.String) | dict(id_types or {})
    with _table_name_in_errors(table):
        log, faults = _parse_columns(source_rows, names, known_types, table, time_format)
    log = replace(log, notes=(*table.notes, *log.notes, *notes), rating_note="" if min_rating is None else notes[-1])
    if faults := first_faults([*rating_faults, *faults]):
        log = _quarantine_bad_rows(log, faults, source_rows, names, table, quarantine)
    return _sample_users(_sort_by_time(log), users, seed)


@contextmanager
def _table_name_in_errors(table: SourceTable) -> Iterator[None]:
    """Put the name of the table before the message of a LogError."""
    try:
        yield
    except LogError as problem:
        raise LogError(f"{table.name}: {problem}") from None


def _collect_rows(
    table: SourceTable,
    names: Mapping[str, str],
    events: Sequence[str],
    allow_missing_events: bool,
    min_rating: float | None,
    notes: list[str],
) -> tuple[pl.DataFrame, list[ColumnFault]]:
    """Return the rows with the events and ratings to keep, and the rows without a rating. Extends `notes`."""
    table.require_memory()
    rows = collect_columns(table, names, events, allow_missing_events)
    table.require_unchanged()
    if not len(rows):
        raise NoRowsError(f"{table.name} has no rows. A log needs at least one.")
    if min_rating is None:
        return rows, []
    rows, faults, note = keep_ratings(rows, min_rating, table.name)
    notes.append(note)
    return rows, faults


def _check_options(
    source: str | Path | pl.DataFrame | pd.DataFrame, quarantine: Path | None, time_format: str | None
) -> None:
    check_time_format(time_format)
    if quarantine is not None and isinstance(source, str | Path) and quarantine.resolve() == Path(source).resolve():
        raise OptionError(f"Quarantine file {quarantine.name} is the log itself. Choose another file for the bad rows.")
    if quarantine is not None and quarantine.suffix not in (".parquet", ".csv"):
        raise OptionError(f"Quarantine file {quarantine.name} must end in .parquet or .csv. Rename it.")


def _quarantine_bad_rows(
    log: Log,
    faults: Sequence[ColumnFault],
    source_rows: pl.DataFrame,
    names: Mapping[str, str],
    table: SourceTable,
    quarantine: Path | None,
) -> Log:
    """Return the log without its bad rows, and write them to `quarantine`. Raises LogError without such a file."""
    if quarantine is None:
        raise LogError(fault_message(source_rows, names, faults, table.name))
    quarantine = write_quarantine(source_rows, faults, table, quarantine)
    is_good = ~pl.DataFrame([fault.rows.alias(str(i)) for i, fault in enumerate(faults)]).max_horizontal()
    log = replace(log, frame=log.frame.filter(is_good), n_quarantined=int((~is_good).sum()))
    if not len(log.frame):
        raise LogError(f"{table.name} has no valid rows. {quarantine} gives the reason for each row.")
    return _add_note(log, f"Wrote {format_count(log.n_quarantined, 'bad row')} to {quarantine.name}.")


def keep_positives(log: Log) -> Log:
    """Return the log without exposures: the rows whose label is null or above 0.

    A log without labels stays as it is. Raises LogError if no row is left.
    """
    if "label" not in log.frame.columns:
        return log
    frame = filter_positives(log.frame)
    if not len(frame):
        raise LogError("No row of the log has a label above 0, so there is nothing to learn from. Check the labels.")
    n_left_out = len(log.frame) - len(frame)
    return _add_note(replace(log, frame=frame), f"Left out {format_count(n_left_out, 'exposure')} (label 0).")


def filter_positives(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the rows whose label is null or above 0; all rows of a frame without labels."""
    return frame.filter(pl.col("label").is_null() | (pl.col("label") > 0)) if "label" in frame.columns else frame


def events_before(log: Log, moment: str) -> Log:
    """Return the events before a moment, for example to leave out stragglers at the end of a log.

    `moment` is an ISO 8601 time or a number since 1970. In a log with periods and without timestamps, it is the first
    period to leave out. Raises LogError if no event is left or if the log has no such moments.
    """
    frame = log.frame.filter(_is_before(log, moment))
    if not len(frame):
        raise LogError(f"The log has no rows before {moment}. Choose a later moment.")
    n_left_out = len(log.frame) - len(frame)
    return _add_note(replace(log, frame=frame), f"Left out {format_count(n_left_out, 'row')} from {moment} on.")


def events_from(log: Log, moment: str) -> pl.DataFrame:
    """Return the rows that `events_before` leaves out."""
    return log.frame.filter(~_is_before(log, moment))


def _is_before(log: Log, moment: str) -> pl.Expr:
    if log.has_clock:
        return pl.col("time") < parse_microseconds(moment, "--until")
    if "period" in log.frame.columns and moment.isdecimal():
        return pl.col("period") < int(moment)
    raise LogError(f'This log has no timestamps, so --until "{moment}" does not apply. Use the number of a period.')


def _parse_columns(
    raw: pl.DataFrame,
    names: Mapping[str, str],
    id_types: Mapping[str, IdType],
    table: SourceTable,
    time_format: str | None,
) -> tuple[Log, list[ColumnFault]]:
    """Return the log in the order of the source, including bad rows, and its faults."""
    frame: dict[str, pl.Series] = {}
    faults: list[ColumnFault] = []
    id_notes: list[str] = []
    unit = "period + order"
    for name in names:
        found: list[ColumnFault] = []
        if name == "rating":
            continue
        if name in ("user_id", "item_id", "category", "event_id"):
            is_key = name in ("user_id", "item_id")
            frame[name], found, found_notes = read_id_column(
                raw[name],
                id_types.get(name),
                required=is_key,
                infer_integers=not table.has_types,
                allow_mixed=table.allows_mixed_ids or not is_key,
            )
            id_notes += found_notes
        elif name == "timestamp":
            frame["time"], unit, found = read_times(raw[name], time_format)
        elif name in ("event", "split"):
            frame[name] = read_labels(raw[name])
        else:
            frame[name], found = read_numbers(raw[name], integers_only=name == "period")
        faults += found
    has_clock, found = _check_clock(frame, raw)
    faults = [fault for fault in faults + found if not (has_clock and fault.column == "order")]
    unnamed = ("rating", "order") if has_clock else ("rating",)  # no note for these
    renamed = [name for name in names if names[name] != name and name not in unnamed]
    notes = [f'Column "{names[name]}" is used as {name}.' for name in renamed] + id_notes
    if has_clock:
        notes.append(f"Timestamps are in {UNIT_NAMES.get(unit, unit)}.")
    else:
        within = "column order decides" if "order" in frame else "rows keep the order of the source"
        notes.append(f"Rows without timestamps are sorted by period; within a period, {within}.")
        if "time" in frame:
            notes.append(f"Timestamps are missing in {format_count(frame['time'].null_count(), 'row')}.")
        unit = "period + order"
    log = Log(pl.DataFrame(frame), has_clock, unit, tuple(notes), id_notes=tuple(id_notes))
    return log, first_faults(faults)


def _check_clock(frame: Mapping[str, pl.Series], raw: pl.DataFrame) -> tuple[bool, list[ColumnFault]]:
    """Return whether timestamps order the log, or else periods, and the faults: rows that have neither."""
    if "period" not in frame:
        return True, [ColumnFault("timestamp", "is null", frame["time"].is_null())]
    if "time" not in frame or (~has_value(raw["timestamp"]) & frame["period"].is_not_null()).any():
        return False, [ColumnFault("period", "is null", frame["period"].is_null())]
    return True, [ColumnFault("timestamp", "is null, and so is the period", frame["time"].is_null())]


def _sort_by_time(log: Log) -> Log:
    """Sort by time; without timestamps for all rows, by period, timestamp and order.

    Rows with the same keys keep their order.
    """
    frame, n_rows = log.frame, len(log.frame)
    keys = ["time"] if log.has_clock else [k for k in ("period", "time", "order") if k in frame.columns]
    n_late = int((frame[keys[0]] < frame[keys[0]].cum_max()).sum())
    if n_late or len(keys) > 1:
        frame = frame.sort(keys, maintain_order=True)
    n_missing = frame["time"].null_count() if "time" in frame.columns else 0
    if not log.has_clock:
        frame = frame.with_columns(time=pl.int_range(n_rows, dtype=pl.Int64))
    key_columns = ["user_id", "item_id", "time"]
    other_columns = [name for name in frame.columns if name not in (*key_columns, "order")]
    sorted_frame = frame.select(*key_columns, *other_columns)
    return replace(log, frame=sorted_frame, n_out_of_order=n_late, n_missing_timestamps=n_missing)


def _sample_users(log: Log, users: int | None, seed: int) -> Log:
    """Return the log of `users` random users; None = all. The same seed and log give the same users."""
    if users is None:
        return log
    if users < 1:
        raise OptionError(f"A sample of {users} users is impossible. Use a number of at least 1.")
    ids = log.frame["user_id"].unique().sort()
    if users >= len(ids):
        return _add_note(log, f"Kept all {len(ids):,} users; a sample of {users:,} was requested.")
    chosen = ids.sample(users, seed=seed)  # no named stream: published results use this sample
    frame = log.frame.filter(pl.col("user_id").is_in(chosen.implode()))
    return _add_note(replace(log, frame=frame), f"Kept {users:,} random users of {len(ids):,} (seed {seed}).")


def _add_note(log: Log, note: str) -> Log:
    return replace(log, notes=(*log.notes, note))
