"""Progress of `fit` and `update`: a bar on a terminal, a few plain lines in a pipe or in cron, or a call of a function.

The command line and `Recommender` share it. Progress goes to stderr.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from freshrec.errors import OptionError
from freshrec.progress import Progress, listen

ProgressOption = bool | Callable[[Progress], object]  # True = show it on stderr, False = do not report it

READING = "reading"  # the stage before anything is known about a file


class ProgressBar:
    """A bar with the stage, the time so far, and the time left if the number of steps is known."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Bar | None = None
        self._last, self._reported_s, self._stage_started_s = Progress(""), time.monotonic(), 0.0

    def __call__(self, progress: Progress) -> None:
        """Draw a report."""
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[detail]}"))
            # The answers of a command go to stdout, which may be a pipe: the bar must not redirect them.
            self._bar = Bar(*columns, TimeElapsedColumn(), console=self.console, transient=True, redirect_stdout=False)
            self._bar.add_task("", detail="")
            self._bar.start()
        if progress.stage != self._last.stage or progress.step <= self._last.step:
            self._stage_started_s = self._reported_s  # a new stage, or another training
        self._last, self._reported_s = progress, time.monotonic()
        detail = progress.detail
        if 0 < progress.step < progress.n_steps:
            steps_left = (progress.n_steps - progress.step) / progress.step
            left_s = (self._reported_s - self._stage_started_s) * steps_left
            detail += f", at most {format_duration(left_s)} left"
        task, total = self._bar.task_ids[0], progress.n_steps or None
        self._bar.update(task, description=progress.stage, total=total, completed=progress.step, detail=detail)
        self._bar.refresh()

    def clear(self) -> None:
        """Remove the bar. The next report draws a new one."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class ProgressLines:
    """A line on stderr for each stage, and for epochs 1, 2, 4, 8, ... of a training."""

    def __init__(self) -> None:
        self.started_s = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        """Print a report."""
        if progress.stage == READING or progress.step & (progress.step - 1):
            return  # reading prints nothing, so an error stays one line; epochs that are no power of 2 are skipped
        text = f"{progress.stage}: {progress.detail}" if progress.detail else progress.stage
        print(f"[{time.monotonic() - self.started_s:.0f} s] {text}", file=sys.stderr, flush=True)  # noqa: T201

    def clear(self) -> None:
        """Nothing to remove: lines stay."""


@contextmanager
def show_progress(is_shown: bool, with_lines: bool) -> Iterator[Callable[[], None]]:
    """Show progress while the block runs. Yields a function that removes the bar, to be called before printing.

    `with_lines`: print lines if stderr is not a terminal.
    """
    console = Console(stderr=True)
    shown: ProgressBar | ProgressLines | None = None
    if is_shown and console.is_terminal:
        shown = ProgressBar(console)
    elif is_shown and with_lines:
        shown = ProgressLines()
    with listen(shown):
        try:
            yield (lambda: None) if shown is None else shown.clear
        finally:
            if shown is not None:
                shown.clear()


def check_progress(progress: ProgressOption) -> None:
    """Raise OptionError unless `progress` is true, false or a function."""
    if not isinstance(progress, bool) and not callable(progress):
        raise OptionError(f"progress is {progress!r:.60}. Pass True, False, or a function that takes a Progress.")


@contextmanager
def reporting(progress: ProgressOption) -> Iterator[None]:
    """Show the progress of the block on stderr (True), or pass it to a function. False changes nothing.

    Raises OptionError for anything else.
    """
    check_progress(progress)
    if progress is True:
        with show_progress(True, with_lines=True):
            yield
    elif callable(progress):
        with listen(progress):
            yield
    else:
        yield


def format_duration(seconds: float) -> str:
    """Return "45 s", "3 min" or "2.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5940 else f"{seconds / 3600:.1f} h"
