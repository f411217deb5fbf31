"""Refuses to work in a process that was forked after polars had started its threads.

A fork copies one thread only. In the copy, polars waits for its other threads for ever, and OpenMP in torch does too.
Neither can start them again, so an error is the best answer.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from freshrec.errors import StateError

THREADS = Path("/proc/self/task")  # Linux only
THREAD_NAMES = ("polars-0", "async-executor", "tokio-rt")  # of polars, from its first query on


@dataclass
class _Process:
    has_threads: bool = False  # whether polars may have started threads here
    is_cut_off: bool = False  # whether they exist in another process only


_process = _Process()


def require_threads() -> None:
    """Raise StateError in a process whose threads are missing. Every function that needs them calls this first."""
    if _process.is_cut_off:
        raise StateError(
            "This process was forked after freshrec or polars had been used, so it lacks their threads, and every call "
            "would hang. Load the recommender only after the fork, or start processes with spawn."
        )
    _process.has_threads = True


def _look_for_threads() -> None:
    """Notice whether polars has started its threads, also if the program used it without freshrec."""
    if THREADS.is_dir():
        _process.has_threads = any(_thread_name(task).startswith(THREAD_NAMES) for task in THREADS.iterdir())


def _thread_name(task: Path) -> str:
    try:
        return (task / "comm").read_text()
    except OSError:  # the thread has ended
        return ""


def _inherit() -> None:
    _process.is_cut_off = _process.is_cut_off or _process.has_threads


if sys.platform != "win32":  # which cannot fork
    os.register_at_fork(before=_look_for_threads, after_in_child=_inherit)
