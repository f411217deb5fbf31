"""The part of a version that answers, without what its updates need: how it lies on the disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from freshrec import models  # so that the specs of all models are imported  # noqa: F401
from freshrec.data.catalog import Catalog
from freshrec.disk_names import TABLE_COLUMNS
from freshrec.errors import StateError
from freshrec.models.checkpoint import save_tree, write_whole
from freshrec.serve.reading import Reading
from freshrec.serve.recommend import Served

SERVED, USERS, ITEMS, CATEGORIES = "served.safetensors", "users.parquet", "items.parquet", "categories.parquet"


@dataclass(frozen=True, eq=False)
class Kept:
    """All that answers are made of, and how it came to be."""

    served: Served
    names: tuple[str, str]  # of model and strategy, as they were asked for
    reading: Reading


def write_served(kept: Kept, folder: Path) -> None:
    """Write to a folder; without what the state keeps for its updates."""
    served = kept.served
    state = replace(served.state, memory=None, costs={}, started=None)
    save_tree((kept.names, kept.reading, state, served.counts, served.pending), folder / SERVED)
    for name, frame in ((USERS, served.users.frame), (ITEMS, served.items.frame), (CATEGORIES, served.categories)):
        write_whole(folder / name, frame.write_parquet)


def read_served(files: Mapping[str, Path], load: Callable[[Path], Any]) -> Kept:
    """What `write_served` wrote; `load` is `load_tree`, or `load_to_ask`. StateError where it is not that."""
    must_have(files, (SERVED, USERS, ITEMS, CATEGORIES))
    names, reading, state, counts, pending = load(files[SERVED])
    users, items = (catalog_in(files[name]) for name in (USERS, ITEMS))
    served = Served(state, counts, users, items, parquet_in(files[CATEGORIES]), pending)
    return Kept(served, names, reading)


def must_have(files: Mapping[str, Path], names: Sequence[str]) -> None:
    """StateError where a file is not there."""
    missing = [name for name in names if name not in files]
    if missing:
        raise StateError(f"a version without {missing[0]} cannot be read; go back to another one.")


def catalog_in(path: Path) -> Catalog:
    """The catalog in a Parquet file."""
    return Catalog.load(parquet_in(path))


def parquet_in(path: Path) -> pl.DataFrame:
    """The rows of a Parquet file. StateError where it cannot be read."""
    try:
        return pl.read_parquet(path).rename(TABLE_COLUMNS, strict=False)
    except (OSError, pl.exceptions.PolarsError) as problem:
        raise StateError(f"{path} cannot be read ({problem}); go back to another version.") from None
