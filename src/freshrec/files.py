"""Files that are complete or absent: atomic writes, synced folders, checksums."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import polars as pl
from safetensors import SafetensorError


def write_text_atomically(text: str, path: Path) -> None:
    """Write a text completely or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all: `write` writes a temporary file, which is then renamed to `path`.

    Raises OSError if the file cannot be written, also if `write` raises an error of safetensors or polars.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors removes the read permission of others, but another user may serve
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (SafetensorError, pl.exceptions.PolarsError) as problem:
        raise OSError(str(problem)) from problem
    finally:
        temporary.unlink(missing_ok=True)  # leave nothing after a failed write, such as on a full disk


CHUNK_BYTES = 1 << 20  # bytes per read


def sync_folder(folder: Path) -> None:
    """Write the directory entries of a folder to disk (fsync)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
