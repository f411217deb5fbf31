"""JSON with a checksum: what was changed by anything but us is noticed."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from freshrec.errors import StateError
from freshrec.models.checkpoint import save_text

PIECE = 1 << 20  # bytes read at once


def write_signed(content: Any, path: Path) -> None:
    """Write what JSON can hold to `path`, whole or not at all."""
    save_text(json.dumps({"checksum": _sum_of(content), "content": content}, indent=1), path)
    sync(path.parent)


def read_signed(path: Path) -> Any:
    """What `write_signed` wrote. StateError where there is nothing, or something else."""
    try:
        whole = json.loads(path.read_bytes())
        content, checksum = whole["content"], whole["checksum"]
    except FileNotFoundError:
        raise StateError(f"{path} is missing; was this folder made by freshrec?") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise StateError(f"{path} cannot be read ({str(problem)[:80]}); restore it from a backup.") from None
    if checksum != _sum_of(content):
        raise StateError(f"{path} was changed by something else than freshrec; restore it from a backup.")
    return content


def sync(folder: Path) -> None:
    """The names in a folder reach the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _sum_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sum_of_file(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
