"""The rows of an event log: their columns, and which of them say the same event."""

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
    """The rows that have an event_id, and the others."""
    given = pl.col("event_id").is_not_null() if "event_id" in rows.columns else pl.lit(False)
    return rows.filter(given), rows.filter(~given)


def drop_duplicates(rows: pl.DataFrame, has_clock: bool) -> pl.DataFrame:
    """The first row of each event."""
    with_id, without_id = split_by_event_id(rows)
    with_id = with_id.unique("event_id", keep="first") if len(with_id) else with_id
    return pl.concat([with_id, without_id.unique(EVENT_KEYS, keep="first") if has_clock else without_id])


def time_range(rows: pl.DataFrame) -> tuple[int | None, int | None]:
    """The first and the last time."""
    return as_time(rows["time"].min()), as_time(rows["time"].max())


def as_time(found: object) -> int | None:
    """A time that polars found among some, if any."""
    return found if isinstance(found, int) else None
