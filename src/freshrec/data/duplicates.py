"""The rule for duplicates: which rows of a log are the same event. Replay, store and Python API share it."""

from collections.abc import Sequence
from dataclasses import replace

import polars as pl

from freshrec.data.log import Log
from freshrec.text_layout import format_count

EVENT_KEYS = ("user_id", "item_id", "time")


def split_by_event_id(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Split the rows into those with an event_id and those without."""
    given = pl.col("event_id").is_not_null() if "event_id" in rows.columns else pl.lit(False)
    return rows.filter(given), rows.filter(~given)


def drop_duplicate_rows(rows: pl.DataFrame, has_clock: bool, keys: Sequence[str] = EVENT_KEYS) -> pl.DataFrame:
    """Keep the first row of each event, in the order of the rows.

    Rows with an event_id are the same event if the id is the same. Other rows are the same event if user, item and time
    (`keys`) are the same. Without timestamps (`has_clock` is False), each of them is an event of its own.
    """
    identity = _identity(rows, has_clock, keys)
    return rows.filter(pl.struct(identity).is_first_distinct()) if identity else rows


def count_duplicates(log: Log) -> int:
    """Count the rows that `drop_duplicates` skips, without a copy of the log."""
    identity = _identity(log.frame, log.has_clock, _keys(log))
    if not identity:
        return 0
    distinct = log.frame.lazy().select(identity).unique().select(pl.len())
    return len(log.frame) - int(distinct.collect(engine="streaming").item())


def _identity(rows: pl.DataFrame, has_clock: bool, keys: Sequence[str]) -> list[pl.Expr]:
    """Return columns that are the same for rows of the same event; none if every row is an event of its own."""
    has_ids = "event_id" in rows.columns
    if not has_clock and not has_ids:
        return []
    columns = [pl.col(name) for name in keys] if has_clock else [pl.int_range(pl.len()).alias("row number")]
    if not has_ids:
        return columns
    return [pl.col("event_id"), *(pl.when(pl.col("event_id").is_null()).then(column) for column in columns)]


def _keys(log: Log) -> Sequence[str]:
    """Return the keys of events. With exposures (label 0), the label is a key too."""
    has_exposures = "label" in log.frame.columns and bool((log.frame["label"] == 0).any())
    return (*EVENT_KEYS, "label") if has_exposures else EVENT_KEYS


def drop_duplicates(log: Log) -> Log:
    """Return the log with the first row of each event only, and a note on the number of skipped rows.

    In a log with exposures (label 0), rows are the same event only if the label is the same too.
    """
    n_skipped = count_duplicates(log)
    if not n_skipped:
        return log
    frame = drop_duplicate_rows(log.frame, log.has_clock, _keys(log))
    note = f"Skipped {format_count(n_skipped, 'duplicate')} (same event_id, or same user, item and time)."
    return replace(log, frame=frame, notes=(*log.notes, note))
