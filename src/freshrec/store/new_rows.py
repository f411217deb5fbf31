"""Which rows of a delivery are new, compared with batches of the event log."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import polars as pl

from freshrec.data.duplicates import EVENT_KEYS, drop_known_rows, split_by_event_id
from freshrec.store.log_columns import time_range
from freshrec.store.log_files import batch_predicate, data_files, verify_files

if TYPE_CHECKING:
    from deltalake import DeltaTable


class NewRows(NamedTuple):
    """The new rows of a delivery, in their order."""

    rows: pl.DataFrame
    n_reused_ids: int  # event ids of other rows that the log holds for another user, item or time


def find_new_rows(
    rows: pl.DataFrame, table: DeltaTable, has_clock: bool, folder: Path, batches: Collection[int]
) -> NewRows:
    """Return the rows whose event is in none of these batches. `data/duplicates.py` has the rule.

    Reads the ids of all these batches if a row has an id, and the keys in the time range of the rows.
    """
    with_id = split_by_event_id(rows)[0]
    log_has_ids = "event_id" in [field.name for field in table.schema().fields]
    files, in_batches = data_files(table).filter(pl.col("batch").is_in(batches)), batch_predicate(batches)
    known_ids, known_rows, n_reused_ids = None, None, 0
    if len(with_id) and log_has_ids:
        verify_files(folder, files["name"])
        predicate = f"{in_batches} AND event_id IS NOT NULL"
        known_ids = pl.DataFrame(table.scan(columns=["event_id"], predicate=predicate))["event_id"]
        known_ids = known_ids.filter(known_ids.is_in(with_id["event_id"].implode()))
    if len(rows) and has_clock:
        first, last = time_range(rows)
        verify_files(folder, files.filter(pl.col("first") <= last, pl.col("last") >= first)["name"])
        predicate = f"{in_batches} AND time >= {first} AND time <= {last}"
        columns = [*EVENT_KEYS, "event_id"] if log_has_ids else list(EVENT_KEYS)
        known_rows = pl.DataFrame(table.scan(columns=columns, predicate=predicate))
        if known_ids is not None and len(known_ids):
            repeated = with_id.filter(pl.col("event_id").is_in(known_ids.implode()))
            n_reused_ids = repeated.join(known_rows, on=columns, how="anti")["event_id"].n_unique()
    return NewRows(drop_known_rows(rows, known_ids, known_rows), n_reused_ids)
