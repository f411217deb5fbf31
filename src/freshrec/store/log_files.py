"""The files of the event log: their names, times and checksums. It needs no deltalake, so a server can import it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from freshrec.errors import StateError
from freshrec.files import file_checksum
from freshrec.store.checksummed_json import read_checksummed

if TYPE_CHECKING:
    from deltalake import DeltaTable

CHECKSUM_FILE = "checksums.json"


def commit_files(folder: Path) -> list[str]:
    """Return the names of the commit files, without the checkpoint hint."""
    found = (folder / "_delta_log").glob("[0-9]*")
    return sorted(f"_delta_log/{path.name}" for path in found if path.suffix in (".json", ".parquet"))


def read_checksums(folder: Path) -> dict[str, str] | None:
    """Read the checksums of all files by name. None if the file of checksums is missing."""
    if not (folder / CHECKSUM_FILE).exists():
        return None
    found: dict[str, str] = read_checksummed(folder / CHECKSUM_FILE)
    return found


def data_files(table: DeltaTable | None) -> pl.DataFrame:
    """A row per data file: name, batch, rows, first and last (times)."""
    if table is None:
        column_types = {"batch": pl.Int32, "rows": pl.Int64, "first": pl.Int64, "last": pl.Int64}
        return pl.DataFrame(schema={"name": pl.String, **column_types})
    actions = pl.DataFrame(table.get_add_actions(flatten=True))
    stats = {"rows": "num_records", "first": "min.time", "last": "max.time"}
    return actions.select(name="path", batch="partition.batch", **stats)


def verify_files(folder: Path, files: pl.DataFrame) -> None:
    """Raise StateError if a file is missing or damaged."""
    sums = read_checksums(folder) or {}
    for name in files["name"]:
        if not (folder / name).exists() or (name in sums and file_checksum(folder / name) != sums[name]):
            raise damage_error(folder, name)


def damage_error(folder: Path, name: str) -> StateError:
    return StateError(
        f"The event log in {folder} is damaged: {name} is missing or has changed. Restore it from a backup."
    )


def batch_predicate(batches: Iterable[int]) -> str:
    return f"batch IN ({', '.join(map(str, [0, *batches]))})"  # there is no batch 0, and a list is never empty
