"""Output whose reader has gone, as in `freshrec history | head -1`: a command completes, and the rest is dropped."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast


class PipeStream:
    """A text stream that drops what nobody reads. Everything else is left to `stream`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text, unless the reader has gone."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, unless the reader has gone."""
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # also for what is still buffered
            os.close(nowhere)


@contextmanager
def closed_pipes_ignored() -> Iterator[None]:
    """Drop output within this context that can no longer be read."""
    streams = sys.stdout, sys.stderr  # None if they were closed from the start
    sys.stdout, sys.stderr = (stream and cast(TextIO, PipeStream(stream)) for stream in streams)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = streams
