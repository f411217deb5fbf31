"""Which rows of a delivery are new, compared with batches of the event log."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from freshrec.data.duplicates import EVENT_KEYS, drop_known_rows, split_by_event_id
from freshrec.store.log_columns import time_range
from freshrec.store.log_files import batch_predicate, data_files, verify_files

if TYPE_CHECKING:
    from deltalake import DeltaTable


def new_rows(
    rows: pl.DataFrame, table: DeltaTable, has_clock: bool, folder: Path, batches: Collection[int]
) -> pl.DataFrame:
    """Return the rows whose event is in none of these batches, in their order. `data/duplicates.py` has the rule.

    Reads the ids of all these batches if a row has an id, and the keys in the time range of the rows.
    """
    with_id, without_id = split_by_event_id(rows)
    log_has_ids = "event_id" in [field.name for field in table.schema().fields]
    files, in_batches = data_files(table).filter(pl.col("batch").is_in(batches)), batch_predicate(batches)
    known_ids, known_rows = None, None
    if len(with_id) and log_has_ids:
        verify_files(folder, files)
        predicate = f"{in_batches} AND event_id IS NOT NULL"
        known_ids = pl.DataFrame(table.scan(columns=["event_id"], predicate=predicate))["event_id"]
    if len(rows) and has_clock:
        first, last = time_range(rows)
        verify_files(folder, files.filter(pl.col("first") <= last, pl.col("last") >= first))
        predicate = f"{in_batches} AND time >= {first} AND time <= {last}"
        if log_has_ids and not len(without_id):
            predicate += " AND event_id IS NULL"  # keys decide only if one of two rows has no id
        columns = [*EVENT_KEYS, "event_id"] if log_has_ids else list(EVENT_KEYS)
        known_rows = pl.DataFrame(table.scan(columns=columns, predicate=predicate))
    return drop_known_rows(rows, known_ids, known_rows)
