"""The rule for duplicates: which rows of a log are the same event. Replay, store and Python API share it."""

from dataclasses import replace

import polars as pl

from freshrec.data.log import Log, format_count

EVENT_KEYS = ("user_id", "item_id", "time")


def split_by_event_id(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Split the rows into those with an event_id and those without."""
    given = pl.col("event_id").is_not_null() if "event_id" in rows.columns else pl.lit(False)
    return rows.filter(given), rows.filter(~given)


def drop_duplicate_rows(rows: pl.DataFrame, has_clock: bool, keys: tuple[str, ...] = EVENT_KEYS) -> pl.DataFrame:
    """Keep the first row of each event, in the order of the rows.

    Rows with an event_id are the same event if the id is the same. Other rows are the same event if user, item and time
    (`keys`) are the same. Without timestamps (`has_clock` is False), each of them is an event of its own.
    """
    with_id, without_id = split_by_event_id(rows.with_row_index("row number"))
    with_id = with_id.unique("event_id", keep="first") if len(with_id) else with_id
    without_id = without_id.unique(keys, keep="first") if has_clock else without_id
    return pl.concat([with_id, without_id]).sort("row number").drop("row number")


def drop_duplicates(log: Log) -> Log:
    """Return the log with the first row of each event only, and a note on the number of skipped rows.

    In a log with exposures (label 0), rows are the same event only if the label is the same too.
    """
    has_exposures = "label" in log.frame.columns and bool((log.frame["label"] == 0).any())
    keys = (*EVENT_KEYS, "label") if has_exposures else EVENT_KEYS
    frame = drop_duplicate_rows(log.frame, log.has_clock, keys)
    n_skipped = len(log.frame) - len(frame)
    note = f"Skipped {format_count(n_skipped, 'duplicate')} (same event_id, or same user, item and time)."
    return replace(log, frame=frame, notes=(*log.notes, note)) if n_skipped else log
