"""Progress reports of a long computation. They never influence a result.

with listen(print):
    strategy.update(state, span)  # calls report_progress
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Progress(NamedTuple):
    """The stage of a computation, and how far it is."""

    stage: str
    step: int = 0  # finished steps, such as epochs
    n_steps: int = 0  # steps at most; 0 = unknown
    detail: str = ""


_listener: ContextVar[Callable[[Progress], object] | None] = ContextVar("progress listener", default=None)


@contextmanager
def listen(listener: Callable[[Progress], object] | None) -> Iterator[None]:
    """Pass all reports within this context to `listener`; None = no listener."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def report_progress(stage: str, step: int = 0, n_steps: int = 0, detail: str = "") -> None:
    """Pass a report to the listener, if there is one."""
    if (listener := _listener.get()) is not None:
        listener(Progress(stage, step, n_steps, detail))


def report_epoch(epoch: int, max_epochs: int, quality: str = "") -> None:
    """Report a finished epoch, with its quality on held-out events if that decides when to stop."""
    count = f"epoch {epoch} of at most {max_epochs}, {quality}" if quality else f"epoch {epoch} of {max_epochs}"
    report_progress("training", epoch, max_epochs, count)
