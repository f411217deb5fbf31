"""JSON files with a checksum, which detects changes by other programs."""

import hashlib
import json
from pathlib import Path
from typing import Any

from freshrec.errors import StateError
from freshrec.files import sync_folder, write_text_atomically


def write_checksummed(content: Any, path: Path) -> None:
    """Write JSON content and its checksum to `path`, completely or not at all."""
    write_text_atomically(json.dumps({"checksum": _checksum(content), "content": content}, indent=1), path)
    sync_folder(path.parent)


def read_checksummed(path: Path) -> Any:
    """Read what `write_checksummed` wrote. Raises StateError if the file is missing, damaged or changed."""
    try:
        document = json.loads(path.read_bytes())
        content, checksum = document["content"], document["checksum"]
    except FileNotFoundError:
        raise StateError(f"{path} is missing. Check that freshrec made this folder.") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise StateError(f"{path} cannot be read ({str(problem)[:80]}). Restore it from a backup.") from None
    if checksum != _checksum(content):
        raise StateError(f"{path} was changed by another program. Restore it from a backup.")
    return content


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
