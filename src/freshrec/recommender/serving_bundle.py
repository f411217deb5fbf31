"""The files of a version that answer requests, without the data that only updates need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from freshrec import models  # registers the specs of all models  # noqa: F401
from freshrec.data.catalog import Catalog
from freshrec.disk_names import TABLE_COLUMNS
from freshrec.errors import StateError
from freshrec.files import write_atomically
from freshrec.forks import require_threads
from freshrec.recommender.log_reading import ReadOptions
from freshrec.recommender.served_state import ServedState
from freshrec.store.checkpoint import save_tree

SERVED_FILE = "served.safetensors"
USERS_FILE, ITEMS_FILE, CATEGORIES_FILE = "users.parquet", "items.parquet", "categories.parquet"


@dataclass(frozen=True, eq=False)
class ServingBundle:
    """A served state with the names and read options of its version."""

    served: ServedState
    names: tuple[str, str]  # model and strategy, as the user typed them
    read_options: ReadOptions


def write_serving_bundle(bundle: ServingBundle, folder: Path) -> None:
    """Write the files to `folder`, without memory and costs of the state."""
    served = bundle.served
    state = replace(served.state, memory=None, costs={}, shared_base=None)
    save_tree((bundle.names, bundle.read_options, state, served.counts, served.pending), folder / SERVED_FILE)
    for name, frame in (
        (USERS_FILE, served.users.frame),
        (ITEMS_FILE, served.items.frame),
        (CATEGORIES_FILE, served.categories),
    ):
        write_atomically(folder / name, frame.write_parquet)


def read_serving_bundle(files: Mapping[str, Path], load: Callable[[Path], Any]) -> ServingBundle:
    """Read the files of `write_serving_bundle`. Raises StateError for bad files.

    `load`: `load_tree` or `load_for_serving`.
    """
    require_threads()
    require_files(files, (SERVED_FILE, USERS_FILE, ITEMS_FILE, CATEGORIES_FILE))
    names, read_options, state, counts, pending = load(files[SERVED_FILE])
    users, items = (read_catalog(files[name]) for name in (USERS_FILE, ITEMS_FILE))
    served = ServedState(state, counts, users, items, read_parquet_file(files[CATEGORIES_FILE]), pending)
    return ServingBundle(served, names, read_options)


def require_files(files: Mapping[str, Path], names: Sequence[str]) -> None:
    """Raise StateError for a missing file."""
    missing = [name for name in names if name not in files]
    if missing:
        raise StateError(f"A version without {missing[0]} cannot be read. Roll back to another version.")


def read_catalog(path: Path) -> Catalog:
    """Read a catalog from a Parquet file."""
    return Catalog.load(read_parquet_file(path))


def read_parquet_file(path: Path) -> pl.DataFrame:
    """Read a Parquet file. Raises StateError for an unreadable file."""
    try:
        return pl.read_parquet(path, glob=False).rename(TABLE_COLUMNS, strict=False)
    except (OSError, pl.exceptions.PolarsError) as problem:
        raise StateError(f"{path} cannot be read ({problem}). Roll back to another version.") from None
