"""Erasures of users that running servers must know. Only keyed hashes of ids are on the disk.

    store/erasures.json    the key, a number per completed erasure, and the erasures that are not complete

A server reads this file before it loads a version. It hides every user whose erasure is not complete, or was completed
after that: the version in its memory may still hold the user.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from freshrec.errors import StateError
from freshrec.store.checksummed_json import read_checksummed, write_checksummed

ERASURE_FILE = "erasures.json"
KEEP_FOR = timedelta(days=30)  # a server that has not loaded a version for so long must be restarted
UserId = int | str


@dataclass(frozen=True)
class Erasures:
    """The erasures of a store. Users are keyed hashes of their ids."""

    key: str = ""
    last_number: int = 0  # number of the last completed erasure
    pending: dict[str, str] = field(default_factory=dict)  # user -> when the erasure began
    completed: dict[str, tuple[int, str]] = field(default_factory=dict)  # user -> number, and when it was complete

    def hides(self, user_id: UserId, n_known: int) -> bool:
        """Whether a version must not show a user. `n_known` is `last_number` from before the version was loaded."""
        if not self.pending and self.last_number <= n_known:
            return False
        user = self.user_hash(user_id)
        return user in self.pending or self.completed.get(user, (0, ""))[0] > n_known

    def began_at(self, user_id: UserId) -> datetime | None:
        """When the erasure of a user began; None if none is pending."""
        began = self.pending.get(self.user_hash(user_id)) if self.pending else None
        return None if began is None else datetime.fromisoformat(began)

    def user_hash(self, user_id: UserId) -> str:
        """Return the keyed hash of an id. The ids 7 and "7" have different ones."""
        return hmac.digest(bytes.fromhex(self.key), repr(user_id).encode(), hashlib.sha256).hex()


def erasures_path(store: Path) -> Path:
    """Return the path of the file. It exists once a user was erased."""
    return store / ERASURE_FILE


def read_erasures(store: Path) -> Erasures:
    """Read the erasures of a store. Raises StateError if the file is damaged."""
    path = erasures_path(store)
    if not path.exists():
        return Erasures()
    content = read_checksummed(path)
    try:
        completed = {user: (int(number), str(at)) for user, (number, at) in content["completed"].items()}
        return Erasures(content["key"], int(content["last_number"]), dict(content["pending"]), completed)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise StateError(f"{path} is no list of erasures. Restore it from a backup.") from None


def begin_erasure(store: Path, user_id: UserId) -> None:
    """Hide a user in all servers from now on. The caller must hold the lock of the store."""
    erasures = read_erasures(store)
    if not erasures.key:
        erasures = Erasures(secrets.token_hex(32))
    began = {erasures.user_hash(user_id): datetime.now(UTC).isoformat()}
    _write(replace(erasures, pending=erasures.pending | began), store)


def complete_erasure(store: Path, user_id: UserId, was_known: bool) -> None:
    """Hide a user, whose data are gone, in those servers only that have loaded a version before now.

    Nothing is recorded for a user who was not known. The caller must hold the lock of the store.
    """
    erasures, now = read_erasures(store), datetime.now(UTC)
    user, number, oldest = erasures.user_hash(user_id), erasures.last_number, (now - KEEP_FOR).isoformat()
    pending = {other: began for other, began in erasures.pending.items() if other != user}
    completed = {other: entry for other, entry in erasures.completed.items() if entry[1] >= oldest}
    if was_known:
        number += 1
        completed[user] = (number, now.isoformat())
    _write(Erasures(erasures.key, number, pending, completed), store)


def _write(erasures: Erasures, store: Path) -> None:
    content: dict[str, Any] = {
        "key": erasures.key,
        "last_number": erasures.last_number,
        "pending": erasures.pending,
        "completed": erasures.completed,
    }
    write_checksummed(content, erasures_path(store))
