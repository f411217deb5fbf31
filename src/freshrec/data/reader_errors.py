"""Damaged sources: every error of the reader becomes a LogError."""

from __future__ import annotations

import os
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import polars as pl

from freshrec.errors import LogError
from freshrec.text_layout import to_printable

# EOFError and zlib.error: of damaged gzip files
READER_ERRORS = (pl.exceptions.PolarsError, OSError, UnicodeError, ValueError, EOFError, zlib.error)


@contextmanager
def as_log_error(name: str) -> Iterator[None]:
    """Turn every error that polars raises for a damaged or foreign file into a LogError."""
    try:
        with _mute_panics():
            yield
    except (*READER_ERRORS, pl.exceptions.PanicException) as problem:
        is_panic = isinstance(problem, pl.exceptions.PanicException)
        message = "its data is not where its index says" if is_panic else str(problem).split("\n")[0].split(". ")[0]
        reason = to_printable(message, 160).rstrip(".")
        raise LogError(
            f"{name} cannot be read as a table ({reason}). It may be truncated, damaged or in another format. "
            "Check the file, or pass --format NAME."
        ) from problem


@contextmanager
def _mute_panics() -> Iterator[None]:
    """Hide what the reader's threads print to standard error when they panic. Other output is passed on."""
    sys.stderr.flush()
    original_stderr = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        except pl.exceptions.PanicException:
            captured.truncate(0)
            raise
        finally:
            os.dup2(original_stderr, 2)
            os.close(original_stderr)
            captured.seek(0)
            os.write(2, captured.read())
