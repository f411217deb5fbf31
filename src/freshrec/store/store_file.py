"""The file `store.json`: it marks a folder as a store, and holds its format and its id."""

from __future__ import annotations

import secrets
from functools import lru_cache
from pathlib import Path
from typing import Any

from freshrec.errors import StateError
from freshrec.store.checksummed_json import read_checksummed, write_checksummed
from freshrec.store.manifest import FORMAT, utc_now
from freshrec.store.signing import SigningKey

STORE_FILE = "store.json"


def write_store_file(folder: Path, key: SigningKey | None = None) -> None:
    """Mark a folder as a store, with a new random id. A copy of the store keeps the id."""
    content = {"format": FORMAT, "made_at": utc_now(), "id": new_id()}
    write_checksummed(content, folder / STORE_FILE, key)


def new_id() -> str:
    """Return a random id for a store."""
    return secrets.token_hex(8)


def read_store_file(folder: Path, key: SigningKey | None = None) -> dict[str, Any]:
    """Return the content of the file. Raises StateError if it is damaged or if its format is unknown.

    Raises SignatureError if it lacks the signature of a given key.
    """
    found = read_checksummed(folder / STORE_FILE, key)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise StateError(f"The store {folder} does not have format {FORMAT}. Upgrade freshrec.")
    return found


def store_id(folder: Path) -> str:
    """Return the id of the store in a folder; "" if it has none, as before stores had ids, or if it cannot be read."""
    return _known_id(folder) or ""


def is_foreign(found: str, folder: Path) -> bool:
    """Whether `found` is the id of another store than the one in `folder`. False if one of them is not known."""
    return bool(found) and _known_id(folder) not in (None, found)


def _known_id(folder: Path) -> str | None:
    """Return the id, "" if the store has none, None if the file is missing or damaged."""
    try:
        state = (folder / STORE_FILE).stat()
        return _read_id(folder, state.st_ino, state.st_mtime_ns, state.st_size)
    except (OSError, StateError):
        return None


@lru_cache(maxsize=100)
def _read_id(folder: Path, inode: int, changed_ns: int, n_bytes: int) -> str:
    """Read the id. The last three arguments change with the content of the file."""
    return str(read_store_file(folder).get("id", ""))
