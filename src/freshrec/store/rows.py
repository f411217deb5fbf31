"""The rows of an event log: their columns, and which of them say the same event."""

import polars as pl

KEYS = ("user_id", "item_id", "time")
KINDS = {
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


def split_named(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows that have an event_id, and the others."""
    given = pl.col("event_id").is_not_null() if "event_id" in rows.columns else pl.lit(False)
    return rows.filter(given), rows.filter(~given)


def each_once(rows: pl.DataFrame, has_clock: bool) -> pl.DataFrame:
    """The first row of each event."""
    named, plain = split_named(rows)
    named = named.unique("event_id", keep="first") if len(named) else named
    return pl.concat([named, plain.unique(KEYS, keep="first") if has_clock else plain])


def ends_of(rows: pl.DataFrame) -> tuple[int | None, int | None]:
    """The first and the last time."""
    return moment(rows["time"].min()), moment(rows["time"].max())


def moment(found: object) -> int | None:
    """A time that polars found among some, if any."""
    return found if isinstance(found, int) else None
