"""JSON with a checksum: what was changed by anything but us is noticed."""

import hashlib
import json
from pathlib import Path
from typing import Any

from freshrec.errors import StateError
from freshrec.files import sync_folder, write_text_atomically


def write_checksummed(content: Any, path: Path) -> None:
    """Write what JSON can hold to `path`, whole or not at all."""
    write_text_atomically(json.dumps({"checksum": _checksum(content), "content": content}, indent=1), path)
    sync_folder(path.parent)


def read_checksummed(path: Path) -> Any:
    """What `write_checksummed` wrote. StateError where there is nothing, or something else."""
    try:
        document = json.loads(path.read_bytes())
        content, checksum = document["content"], document["checksum"]
    except FileNotFoundError:
        raise StateError(f"{path} is missing; was this folder made by freshrec?") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise StateError(f"{path} cannot be read ({str(problem)[:80]}); restore it from a backup.") from None
    if checksum != _checksum(content):
        raise StateError(f"{path} was changed by something else than freshrec; restore it from a backup.")
    return content


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
