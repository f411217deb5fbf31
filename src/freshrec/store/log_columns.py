"""Columns and times of the event log."""

from pathlib import Path

import polars as pl

from freshrec.store.log_files import require_supported_path

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
ID_COLUMNS = tuple(name for name, allowed in COLUMN_TYPES.items() if allowed == (pl.Int64, pl.String))


def has_column(log_folder: Path, name: str) -> bool:
    """Return whether the event log in a folder has a column. A folder without a log has none.

    Raises StateError if Delta tables do not support the path of the folder.
    """
    from deltalake import DeltaTable  # here, because servers import this module

    require_supported_path(log_folder)
    if not DeltaTable.is_deltatable(str(log_folder)):
        return False
    return name in {field.name for field in DeltaTable(log_folder).schema().fields}


def time_range(rows: pl.DataFrame) -> tuple[int | None, int | None]:
    """Return the smallest and the largest time, or None for both if there are no rows."""
    return as_time(rows["time"].min()), as_time(rows["time"].max())


def as_time(found: object) -> int | None:
    """Return the result of a minimum or maximum as a time, None if there were no values."""
    return found if isinstance(found, int) else None
