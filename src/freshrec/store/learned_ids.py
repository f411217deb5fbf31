"""The event ids of learned rows, as sorted 64-bit hashes, 16 bytes a row. A server recognises clicks by them."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import polars as pl

from freshrec.data.duplicates import EVENT_KEYS
from freshrec.files import file_checksum
from freshrec.store.click_journal import Click
from freshrec.store.log_files import damage_error, read_checksums

Hashes: TypeAlias = "np.ndarray[Any, np.dtype[np.uint64]]"
SEED = secrets.randbits(63)  # other hashes in every process, so that no id can be made to collide with another


@dataclass(frozen=True, eq=False)
class LearnedIds:
    """Hashes of the event ids of some files of the event log, and of the keys (user, item, time) of their rows."""

    files: frozenset[str] = frozenset()
    ids_N: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))  # sorted, as the keys
    keys_N: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))

    def read(self, folder: Path, batches: Collection[int]) -> LearnedIds:
        """Return the ids of these batches of the event log in `folder`. Reads only files that were not read before.

        There are none if the log is missing. Raises StateError, OSError or PolarsError if it is damaged.
        """
        sums = read_checksums(folder) or {}
        prefixes = {f"batch={batch}" for batch in batches}
        files = frozenset(name for name in sums if name.partition("/")[0] in prefixes)
        known = self if self.files <= files else LearnedIds()  # a file is rewritten if a user was erased
        ids, keys = [known.ids_N], [known.keys_N]
        for name in sorted(files - known.files):
            path = folder / name
            if "event_id" not in pl.scan_parquet(path, glob=False).collect_schema():
                continue
            if file_checksum(path) != sums[name]:
                raise damage_error(folder, name)
            rows = pl.read_parquet(path, columns=[*EVENT_KEYS, "event_id"], glob=False).drop_nulls("event_id")
            ids.append(_hash_ids(rows))
            keys.append(_hash_keys(rows))
        if len(ids) == 1:
            return LearnedIds(files, *ids, *keys)
        return LearnedIds(files, np.sort(np.concatenate(ids)), np.sort(np.concatenate(keys)))

    def find(self, clicks: Sequence[Click]) -> list[tuple[bool, bool]]:
        """Return for each click whether a row has its id, and whether a row with an id has its key."""
        if not len(self.ids_N):
            return [(False, False)] * len(clicks)
        frame = pl.DataFrame([click[:4] for click in clicks], schema=[*EVENT_KEYS, "event_id"], orient="row")
        has_id = frame["event_id"].is_not_null().to_numpy()
        return list(
            zip(
                (is_in(_hash_ids(frame), self.ids_N) & has_id).tolist(),
                is_in(_hash_keys(frame), self.keys_N).tolist(),
            )
        )


def _hash_ids(rows: pl.DataFrame) -> Hashes:
    return rows["event_id"].cast(pl.String).hash(SEED).to_numpy()


def _hash_keys(rows: pl.DataFrame) -> Hashes:
    return rows.select(pl.struct(EVENT_KEYS).hash(SEED)).to_series().to_numpy()


def is_in(values_N: np.ndarray[Any, Any], sorted_M: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return for each value whether it is in a sorted array, which is not empty."""
    places_N = np.searchsorted(sorted_M, values_N).clip(max=len(sorted_M) - 1)
    found: np.ndarray[Any, np.dtype[np.bool_]] = sorted_M[places_N] == values_N
    return found
