"""JSON files with a checksum, which detects changes by other programs, and with an optional signature."""

import hashlib
import json
from pathlib import Path
from typing import Any

from freshrec.errors import StateError
from freshrec.files import sync_folder, write_text_atomically
from freshrec.store.signing import SigningKey


def write_checksummed(content: Any, path: Path, key: SigningKey | None = None) -> None:
    """Write JSON content, its checksum and, with a key, its signature to `path`, completely or not at all."""
    signature = {} if key is None else {"signature": key.sign(content, path.name)}
    write_text_atomically(json.dumps({"checksum": _checksum(content), **signature, "content": content}, indent=1), path)
    sync_folder(path.parent)


def read_checksummed(path: Path, key: SigningKey | None = None) -> Any:
    """Read what `write_checksummed` wrote.

    Raises StateError if the file is missing, damaged or changed, or if it lacks a valid signature of a given key.
    """
    return read_signed(path, key)[0]


def read_signed(path: Path, key: SigningKey | None = None) -> tuple[Any, str]:
    """Read the content of a file, and the id of the key that signed it; "" if it is not signed. See `read_checksummed`.

    Without a key, the signature is not verified.
    """
    try:
        document = json.loads(path.read_bytes())
        content, checksum, signature = document["content"], document["checksum"], document.get("signature")
    except FileNotFoundError:
        raise StateError(f"{path} is missing. Check that freshrec made this folder.") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise StateError(f"{path} cannot be read ({str(problem)[:80]}). Restore it from a backup.") from None
    if checksum != _checksum(content):
        raise StateError(f"{path} was changed by another program. Restore it from a backup.")
    if key is not None:
        key.verify(signature, content, path)
    return content, str(signature.get("key", "")) if isinstance(signature, dict) else ""


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
