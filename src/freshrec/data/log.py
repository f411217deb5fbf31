"""Read a log: a table of interactions, under our column names, in time order, with nothing dropped silently.

A log with bad rows is refused, with counts and the first offenders, unless `quarantine` names a file that takes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from freshrec.data.columns import ColumnFault, has_value, read_ids, read_labels, read_numbers, read_times
from freshrec.data.formats import SourceTable, as_log_error, open_table, to_printable
from freshrec.deprecation import UNSET, Unset, value_of_renamed
from freshrec.errors import LogError, NoRowsError, OptionError, unknown_name_error

if TYPE_CHECKING:
    import pandas as pd

UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# Our columns, and what they may be called in a source, the most telling name first. `seq` counts through the log,
# `position` only within a session.
COLUMN_ALIASES = {
    "user_id": ("user_id", "session_id"),
    "item_id": ("item_id",),
    "timestamp": ("timestamp", "time"),
    "period": ("period",),
    "order": ("order", "seq", "position"),
    "event": ("event",),
    "category": ("category", "category_id"),
    "weight": ("weight",),
    "label": ("label",),
    "split": ("split",),
    "event_id": ("event_id",),
}


@dataclass(frozen=True)
class Log:
    """Interactions in time order.

    `frame` holds user_id and item_id (Int64 or String, as the source), time (Int64: microseconds UTC, or 0, 1, 2, ...
    where the log has no clock), and those of event, category, weight, label, period, split, event_id that the log has.
    """

    frame: pl.DataFrame
    has_clock: bool
    unit: str  # of the source: "s", "ms", "us", "ns", "ISO 8601" or "period + order"
    notes: tuple[str, ...] = ()  # what was detected, taken or left aside, for people
    n_out_of_order: int = 0  # rows that stood behind a later one in the source
    n_quarantined: int = 0  # bad rows that went to quarantine


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
    absent: bool | Unset = UNSET,
    text: Sequence[str] | Unset = UNSET,
) -> Log:
    """The log in `source`: CSV(.gz), Parquet (file or folder), JSON lines, or a frame of polars or pandas.

    `columns`: our name -> the source's, where the names differ; `item_id=sku:text` says that ids are text even where
    some are digits. `format`: a key of FORMATS. `events`: the event types to keep, all if empty. `users`: keep a random
    sample of so many whole users. `quarantine`: a .parquet or .csv file for bad rows. `allow_missing_events`: an event
    type may have no rows. `text_columns`: which of our columns hold text even where all ids are digits. LogError where
    the log is not one. `absent` and `text` are former names of the last two.
    """
    allow_missing_events = value_of_renamed("allow_missing_events", allow_missing_events, "absent", absent)
    text_columns = value_of_renamed("text_columns", text_columns, "text", text)
    if quarantine is not None and isinstance(source, str | Path) and quarantine.resolve() == Path(source).resolve():
        raise OptionError(f"the bad rows of {quarantine.name} cannot replace the log itself; name another file.")
    if quarantine is not None and quarantine.suffix not in (".parquet", ".csv"):
        raise OptionError(f"{quarantine.name} cannot take bad rows; name a file that ends in .parquet or .csv.")
    table = open_table(source, format)
    names, declared_text = _map_columns(table, columns or {})
    source_rows = _collect_columns(table, names, events, allow_missing_events)
    if not len(source_rows):
        raise NoRowsError(f"{table.name} holds no rows; a log needs at least one.")
    try:
        log, faults = _parse_columns(source_rows, names, declared_text | set(text_columns), table)
    except LogError as problem:
        raise LogError(f"{table.name}: {problem}") from None
    if faults:
        if quarantine is None:
            raise LogError(_fault_message(source_rows, names, faults, table.name))
        _write_quarantine(source_rows, faults, table, quarantine)
        is_good = ~pl.DataFrame([fault.rows.alias(str(i)) for i, fault in enumerate(faults)]).max_horizontal()
        log = replace(log, frame=log.frame.filter(is_good), n_quarantined=int((~is_good).sum()))
        log = _add_note(log, f"{log.n_quarantined:,} bad rows set aside in {quarantine.name}")
    if not len(log.frame):
        raise LogError(f"{table.name} holds no good rows; all {len(source_rows):,} went to {quarantine}.")
    log = _sort_by_time(log)
    return log if users is None else _sample_users(log, users, seed)


def keep_positives(log: Log) -> Log:
    """The log without its exposures: rows whose label is null or above 0. A log without labels is all positive."""
    if "label" not in log.frame.columns:
        return log
    frame = filter_positives(log.frame)
    if not len(frame):
        raise LogError("no row of the log has a label above 0, so there is nothing to learn from; check the labels.")
    return _add_note(replace(log, frame=frame), f"{len(log.frame) - len(frame):,} exposures (label 0) left out")


def filter_positives(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows of a log's frame whose label is null or above 0; all where there are no labels."""
    return frame.filter(pl.col("label").is_null() | (pl.col("label") > 0)) if "label" in frame.columns else frame


def events_before(log: Log, moment: str) -> Log:
    """The log without what happened at this moment (ISO 8601) or later, such as stragglers long after the rest.

    Of a log with periods and no clock, the moment is the first period that is left out.
    """
    if log.has_clock:
        is_before = pl.col("time") < parse_microseconds(moment)
    elif "period" in log.frame.columns and moment.isdecimal():
        is_before = pl.col("period") < int(moment)
    else:
        raise LogError(f'this log has no clock, so that until = "{moment}" is no moment of it; name a period of it.')
    frame = log.frame.filter(is_before)
    if not len(frame):
        raise LogError(f"no row of the log is before {moment}; choose a later moment.")
    return _add_note(replace(log, frame=frame), f"{len(log.frame) - len(frame):,} rows from {moment} on left out")


def parse_microseconds(moment: str) -> int:
    """Since 1970, of an ISO 8601 text; UTC where it names no zone. Raises OptionError."""
    try:
        parsed = datetime.fromisoformat(moment)
    except ValueError as error:
        raise OptionError(f"a date cannot be read ({error}); write it as 2025-06-01 or 2025-06-01T04:00.") from None
    return to_microseconds(parsed)


def to_microseconds(when: datetime) -> int:
    """Microseconds since 1970; a time without a zone is UTC."""
    return ((when if when.tzinfo else when.replace(tzinfo=UTC)) - UNIX_EPOCH) // timedelta(microseconds=1)


def format_time(time_us: int, timespec: str = "seconds") -> str:
    """ISO 8601 text, UTC, of microseconds since 1970: the one format of times in answers, reports and messages.

    `timespec` is that of `datetime.isoformat`: what is smaller is cut off, not rounded.
    """
    return (UNIX_EPOCH + timedelta(microseconds=time_us)).isoformat(timespec=timespec)


def _map_columns(table: SourceTable, columns: Mapping[str, str]) -> tuple[dict[str, str], set[str]]:
    """Our names -> the names in the source, and those of ours whose ids are declared to be text."""
    with as_log_error(table.name):
        found = table.rows.collect_schema().names()
    names: dict[str, str] = {}
    text_columns: set[str] = set()
    for name, source_name in columns.items():
        if name not in COLUMN_ALIASES:
            raise unknown_name_error("column", name, COLUMN_ALIASES)
        if source_name not in found and source_name.endswith(":text"):
            source_name = source_name.removesuffix(":text")
            text_columns.add(name)
        if source_name not in found:
            raise LogError(
                f'{table.name} has no column "{source_name}" for {name}; its columns are {_format_names(found)}.'
            )
        names[name] = source_name
    for name, aliases in COLUMN_ALIASES.items():
        present = [alias for alias in aliases if alias in found and alias not in names.values()]
        if name not in names and present:
            names[name] = present[0]
    duplicated = [source_name for source_name in names.values() if f"{source_name}_duplicated_0" in found]
    if duplicated:
        raise LogError(f'{table.name} has several columns called "{duplicated[0]}"; rename or remove all but one.')
    missing = [name for name in ("user_id", "item_id") if name not in names]
    missing += [] if names.keys() & {"timestamp", "period"} else ["timestamp"]
    if missing:
        raise LogError(
            f"{table.name} has no {' and no '.join(missing)} among its columns {_format_names(found)}; say which it "
            f"is, as in --columns {missing[0]}=NAME, or name a public format with --format."
        )
    if "period" not in names:
        names.pop("order", None)
    return names, text_columns


def _format_names(names: Sequence[str]) -> str:
    shown = ", ".join(to_printable(name, 40) for name in names[:20]) or "none"
    return shown + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _collect_columns(
    table: SourceTable, names: Mapping[str, str], events: Sequence[str], allow_missing_events: bool
) -> pl.DataFrame:
    """The columns we know under our names, as the source has them, with `row`, their place in the source from 0."""
    rows = table.rows.select(pl.col(source_name).alias(name) for name, source_name in names.items()).with_row_index(
        "row"
    )
    if events and "event" not in names:
        raise LogError(f"{table.name} has no event column, to choose --events from; say --columns event=NAME.")
    with as_log_error(table.name):
        if not events:
            return rows.collect()
        event_type = pl.col("event").cast(pl.String)
        raw = rows.filter(event_type.is_in(list(events))).collect()
        missing = set() if allow_missing_events else set(events) - set(raw["event"].cast(pl.String).unique())
        found = rows.select(event_type.unique()).collect()["event"].drop_nulls().to_list() if missing else []
    if missing:
        raise unknown_name_error("event type", min(missing), found)
    return raw


def _parse_columns(
    raw: pl.DataFrame, names: Mapping[str, str], text_columns: set[str], table: SourceTable
) -> tuple[Log, list[ColumnFault]]:
    """The log in the order of the source, with its bad rows, and its faults."""
    frame: dict[str, pl.Series] = {}
    faults: list[ColumnFault] = []
    unit = "period + order"
    for name in names:
        found: list[ColumnFault] = []
        if name in ("user_id", "item_id", "category", "event_id"):
            is_key = name in ("user_id", "item_id")
            frame[name], found = read_ids(
                raw[name],
                required=is_key,
                infer_integers=not table.has_types and name not in text_columns,
                allow_mixed=table.allows_mixed_ids or not is_key,
            )
        elif name == "timestamp":
            frame["time"], unit, found = read_times(raw[name])
        elif name in ("event", "split"):
            frame[name] = read_labels(raw[name])
        else:
            frame[name], found = read_numbers(raw[name], integers_only=name == "period")
        faults += found
    has_clock, found = _check_clock(frame, raw)
    faults = [fault for fault in faults + found if not (has_clock and fault.column == "order")]
    notes = [f'"{names[n]}" is taken as {n}' for n in names if names[n] != n and not (n == "order" and has_clock)]
    if has_clock:
        notes.append(f"times are in {unit}")
    else:
        notes.append("the log has no clock: time is its periods and the order within them")
        notes += [f"{frame['time'].null_count():,} timestamps are null"] if "time" in frame else []
        notes += [] if "order" in frame else ["no order column: within a period the rows keep the order of the source"]
        unit = "period + order"
    return Log(pl.DataFrame(frame), has_clock, unit, tuple(notes)), _first_faults(faults)


def _check_clock(frame: Mapping[str, pl.Series], raw: pl.DataFrame) -> tuple[bool, list[ColumnFault]]:
    """Whether the timestamps place every row; if not, the periods do. The faults are the rows that nothing places."""
    if "period" not in frame:
        return True, [ColumnFault("timestamp", "is null", frame["time"].is_null())]
    if "time" not in frame or (~has_value(raw["timestamp"]) & frame["period"].is_not_null()).any():
        return False, [ColumnFault("period", "is null", frame["period"].is_null())]
    return True, [ColumnFault("timestamp", "is null, and so is the period", frame["time"].is_null())]


def _first_faults(faults: Sequence[ColumnFault]) -> list[ColumnFault]:
    """The faults that occur, each bad row in the first that it has."""
    unique: list[ColumnFault] = []
    for fault in faults:
        rows = fault.rows.fill_null(False)
        for earlier in unique:
            rows = rows & ~earlier.rows
        unique += [replace(fault, rows=rows)] if rows.any() else []
    return unique


def _fault_message(raw: pl.DataFrame, names: Mapping[str, str], faults: Sequence[ColumnFault], name: str) -> str:
    """One sentence: how many rows are bad, why, and the first three of each kind."""
    messages = []
    for fault in faults:
        first = raw.filter(fault.rows).select("row", fault.column).head(3)
        shown = ", ".join(f"row {row + 1:,}: {_format_value(value)}" for row, value in first.iter_rows())
        messages.append(f"{names[fault.column]} {fault.problem} in {_format_rows(int(fault.rows.sum()))} ({shown})")
    n_bad = sum(fault.rows.sum() for fault in faults)
    return (
        f"{name}: of {_format_rows(len(raw))}, {n_bad:,} cannot be used: {'; '.join(messages)}; "
        "mend them, or set them aside with --quarantine FILE."
    )


def _format_rows(n: int) -> str:
    return f"{n:,} row{'' if n == 1 else 's'}"


def _format_value(value: object) -> str:
    return "null" if value is None else to_printable(repr(value), 40)


def _write_quarantine(raw: pl.DataFrame, faults: Sequence[ColumnFault], table: SourceTable, quarantine: Path) -> None:
    """Write the bad rows as the source has them, plus a column `reason`, to a .parquet or .csv file."""
    reasons = pl.concat(
        raw.filter(fault.rows).select("row", reason=pl.lit(f"{fault.column} {fault.problem}")) for fault in faults
    )
    numbered = table.rows.with_row_index("row in the source").filter(
        pl.col("row in the source").is_in(reasons["row"].implode())
    )
    with as_log_error(table.name):
        rows = numbered.collect().join(reasons, left_on="row in the source", right_on="row", maintain_order="left")
    rows = rows.drop("row in the source")
    try:
        if quarantine.suffix == ".parquet":
            rows.write_parquet(quarantine)
        else:
            rows.write_csv(quarantine)
    except (OSError, pl.exceptions.PolarsError) as problem:
        reason = str(problem)[:120]
        raise LogError(f"the bad rows cannot be written to {quarantine} ({reason}); name another file.") from problem


def _sort_by_time(log: Log) -> Log:
    """Sorted by time, or by period, timestamp where there is one, and order; rows that tie keep the order they had."""
    frame, n_rows = log.frame, len(log.frame)
    keys = ["time"] if log.has_clock else [k for k in ("period", "time", "order") if k in frame.columns]
    n_late = int((frame[keys[0]] < frame[keys[0]].cum_max()).sum())
    if n_late or len(keys) > 1:
        frame = frame.sort(keys, maintain_order=True)
    if not log.has_clock:
        frame = frame.with_columns(time=pl.int_range(n_rows, dtype=pl.Int64))
    key_columns = ["user_id", "item_id", "time"]
    other_columns = [name for name in frame.columns if name not in (*key_columns, "order")]
    return replace(log, frame=frame.select(*key_columns, *other_columns), n_out_of_order=n_late)


def _sample_users(log: Log, users: int, seed: int) -> Log:
    """The log of `users` random users, the same for the same seed and log."""
    if users < 1:
        raise OptionError(f"{users} users cannot be kept; give a number of at least 1.")
    ids = log.frame["user_id"].unique().sort()
    if users >= len(ids):
        return _add_note(log, f"all {len(ids):,} users kept, {users:,} were asked for")
    chosen = ids.sample(users, seed=seed)  # no named stream: published results are of these users
    frame = log.frame.filter(pl.col("user_id").is_in(chosen.implode()))
    return _add_note(replace(log, frame=frame), f"a sample of {users:,} of {len(ids):,} users, seed {seed}")


def _add_note(log: Log, note: str) -> Log:
    return replace(log, notes=(*log.notes, note))
