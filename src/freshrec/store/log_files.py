"""The files of the event log: commits, data files, and the checksums of both. A server can import it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from freshrec.errors import StateError
from freshrec.files import file_checksum, sync_folder
from freshrec.store.checksummed_json import read_checksummed, write_checksummed
from freshrec.store.signing import SigningKey, unsigned_error
from freshrec.text_layout import to_printable

if TYPE_CHECKING:
    from deltalake import DeltaTable

LOG_FOLDER = "log"  # in the folder of a store
COMMIT_FOLDER, CHECKSUM_FILE = "_delta_log", "checksums.json"
UNSUPPORTED_PATH = re.compile(
    r"[][#?|^\\\x00-\x1f\x7f\ud800-\udfff]|%[0-9A-Fa-f]{2}"
)  # Delta misreads or refuses these
COMMIT_NAME = re.compile(r"[0-9]{20}(\.checkpoint[0-9.]*)?\.(json|parquet)")  # other files are not part of the log


def commit_files(folder: Path) -> list[str]:
    """Return the names of the commit files, without the checkpoint hint."""
    return sorted(
        f"{COMMIT_FOLDER}/{path.name}"
        for path in (folder / COMMIT_FOLDER).glob("*")
        if COMMIT_NAME.fullmatch(path.name)
    )


def path_fault(folder: Path) -> str:
    """Say what the path of a Delta table may not hold; "" if the path of this one is right. Links are followed."""
    found = UNSUPPORTED_PATH.search(str(folder.resolve()))
    if not found:
        return ""
    sign = f'"{found[0]}"' if found[0].isprintable() else "a control character"
    return f"The path {to_printable(str(folder), 200)} holds {sign}, which the event log does not support."


def require_supported_path(folder: Path) -> None:
    """Raise StateError if Delta tables do not support the path of the event log."""
    if fault := path_fault(folder):
        raise StateError(f"{fault} Move the store to another folder.")


def commit_path(folder: Path, number: int) -> Path:
    """Return the path of the file of a commit."""
    return folder / COMMIT_FOLDER / f"{number:020}.json"


def read_checksums(folder: Path, key: SigningKey | None = None) -> dict[str, str] | None:
    """Read the checksums of all files by name. None if the file of checksums is missing.

    Raises SignatureError if it lacks the signature of a given key, or the checksum of a commit.
    """
    if not (folder / CHECKSUM_FILE).exists():
        return None
    found: dict[str, str] = read_checksummed(folder / CHECKSUM_FILE, key)
    if key is not None and (unsigned := sorted(set(commit_files(folder)) - found.keys())):
        raise unsigned_error(folder / unsigned[0])
    return found


def write_checksums(folder: Path, data_files: Iterable[str], key: SigningKey | None = None) -> None:
    """Sync the last commit to the disk, and write the checksums of all commits and of these data files."""
    sums = read_checksums(folder) or {}
    names = [*commit_files(folder), *data_files]
    for name in [name for name in names if name not in sums]:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
        sums[name] = file_checksum(folder / name)
        sync_folder((folder / name).parent)
    write_checksummed({name: sums[name] for name in names}, folder / CHECKSUM_FILE, key)


def data_files(table: DeltaTable | None) -> pl.DataFrame:
    """A row per data file: name, batch, rows, first and last (times)."""
    if table is None:
        column_types = {"batch": pl.Int32, "rows": pl.Int64, "first": pl.Int64, "last": pl.Int64}
        return pl.DataFrame(schema={"name": pl.String, **column_types})
    actions = pl.DataFrame(table.get_add_actions(flatten=True))
    stats = {"rows": "num_records", "first": "min.time", "last": "max.time"}
    return actions.select(name="path", batch="partition.batch", **stats)


def verify_files(folder: Path, names: Iterable[str]) -> None:
    """Raise StateError if a file is missing or damaged."""
    sums = read_checksums(folder) or {}
    for name in names:
        if not (folder / name).exists() or (name in sums and file_checksum(folder / name) != sums[name]):
            raise damage_error(folder, name)


def damage_error(folder: Path, name: str) -> StateError:
    """Return the error for a file that is missing or damaged."""
    return StateError(
        f"The event log in {folder} is damaged: {name} is missing or has changed. Restore it from a backup."
    )


def batch_predicate(batches: Iterable[int]) -> str:
    """Return a predicate that holds for the rows of these batches."""
    return f"batch IN ({', '.join(map(str, [0, *batches]))})"  # there is no batch 0, and a list is never empty
