"""Everything freshrec raises on purpose.

    FreshrecError                 one root: catch this
    ├── LogError                  the log is not what it should be (a file, a column, a row)
    │   └── NoRowsError           there is nothing in it
    ├── SpanError                 the log cannot be cut as asked
    ├── IncompatibleError         this strategy cannot update this model
    ├── OptionError               an unknown name, option or value; the nearest valid one is suggested
    ├── TrainingError             training diverged or a score is not finite
    ├── StateError                a state on disk is damaged, incomplete or of another format
    ├── RefusedError              the gate rejected a new version; the live one stays
    └── BusyError                 somebody else is changing the same store

Each message is one sentence that says what is wrong, where, and what to do.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class FreshrecError(Exception):
    """Root of all errors raised on purpose; the command line prints its message and exits with `exit_code`."""

    exit_code = 1
    json_output: Any = None  # what `--json` prints nevertheless, where the command has found or done something


class LogError(FreshrecError):
    """The log is not what it should be."""

    exit_code = 3


class NoRowsError(LogError):
    """A log without rows."""


class SpanError(FreshrecError):
    """The log cannot be cut into spans as asked."""

    exit_code = 4


class IncompatibleError(FreshrecError):
    """A strategy cannot update this kind of model."""

    exit_code = 5


class OptionError(FreshrecError):
    """An unknown name, option or value."""

    exit_code = 2


class TrainingError(FreshrecError):
    """Training diverged, or a model gave a score that is not finite."""

    exit_code = 6


class StateError(FreshrecError):
    """A state on disk is damaged, incomplete or of another format."""

    exit_code = 7


class RefusedError(FreshrecError):
    """A new version did not pass the gate."""

    exit_code = 8


class BusyError(FreshrecError):
    """Another process is changing the same store."""

    exit_code = 9


def unknown_name_error(kind: str, name: str, valid: Iterable[str]) -> OptionError:
    """The error for an unknown `kind` ("model", "strategy", ...) called `name`, with the nearest valid name."""
    valid = sorted(valid)
    nearest = get_close_matches(name, valid, n=1, cutoff=0.4)
    hint = f'did you mean "{nearest[0]}"?' if nearest else f"valid: {', '.join(valid)}."
    return OptionError(f'there is no {kind} "{name[:60]}"; {hint}')
