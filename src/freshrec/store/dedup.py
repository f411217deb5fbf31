"""Columns of the event log, and removal of duplicates."""

import polars as pl

EVENT_KEYS = ("user_id", "item_id", "time")
COLUMN_TYPES = {
    "user_id": (pl.Int64, pl.String),
    "item_id": (pl.Int64, pl.String),
    "time": (pl.Int64,),
    "event": (pl.String,),
    "category": (pl.Int64, pl.String),
    "weight": (pl.Float64,),
    "label": (pl.Float64,),
    "period": (pl.Int64,),
    "split": (pl.String,),
    "event_id": (pl.Int64, pl.String),
}


def split_by_event_id(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Split the rows into those with an event_id and those without."""
    given = pl.col("event_id").is_not_null() if "event_id" in rows.columns else pl.lit(False)
    return rows.filter(given), rows.filter(~given)


def drop_duplicates(rows: pl.DataFrame, has_clock: bool) -> pl.DataFrame:
    """Keep the first row of each event.

    Rows with an event_id are the same event if the id is the same. Other rows are the same event if user, item and time
    are the same; without timestamps (`has_clock` is False) each of them is a separate event.
    """
    with_id, without_id = split_by_event_id(rows)
    with_id = with_id.unique("event_id", keep="first") if len(with_id) else with_id
    return pl.concat([with_id, without_id.unique(EVENT_KEYS, keep="first") if has_clock else without_id])


def time_range(rows: pl.DataFrame) -> tuple[int | None, int | None]:
    """Return the smallest and the largest time, or None for both if there are no rows."""
    return as_time(rows["time"].min()), as_time(rows["time"].max())


def as_time(found: object) -> int | None:
    """Return the result of a minimum or maximum as a time, None if there were no values."""
    return found if isinstance(found, int) else None
