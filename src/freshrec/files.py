"""Files that are whole or absent: atomic writes, synced folders, checksums."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import polars as pl
from safetensors import SafetensorError


def write_text_atomically(text: str, path: Path) -> None:
    """Write a text, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write` writes a file beside `path`, which then takes its name: whole or not at all.

    OSError where the system refuses, whatever the library that writes makes of it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors lets nobody else read: whoever serves may be another user
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (SafetensorError, pl.exceptions.PolarsError) as problem:
        raise OSError(str(problem)) from problem
    finally:
        temporary.unlink(missing_ok=True)  # a write that failed, as on a full disk, leaves nothing


CHUNK_BYTES = 1 << 20  # bytes read at once


def sync_folder(folder: Path) -> None:
    """The names in a folder reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_checksum(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
