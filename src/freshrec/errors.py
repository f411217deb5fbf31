"""All errors that freshrec raises on purpose.

    FreshrecError                 the base class: catch this one
    ├── LogError                  a file, column or row of the log is invalid
    │   └── NoRowsError           the log has no rows
    ├── SpanError                 the log cannot be split into these spans
    ├── IncompatibleError         the strategy cannot update the model
    ├── OptionError               an unknown name, option or value; the nearest valid one is suggested
    ├── TrainingError             training diverged or a score is not finite
    ├── StateError                a state on disk is damaged, incomplete or in another format
    ├── RefusedError              the gate refused a new version; the live version stays
    └── BusyError                 another process is changing the same store

Each message says in one or two short sentences what is wrong, where, and what to do.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class FreshrecError(Exception):
    """Base class of all errors. The command line prints the message and exits with `exit_code`."""

    exit_code = 1
    json_output: Any = None  # the result that `--json` prints in spite of the error, if there is one


class LogError(FreshrecError):
    """The log is invalid: a file, a column or a row."""

    exit_code = 3


class NoRowsError(LogError):
    """The log has no rows."""


class SpanError(FreshrecError):
    """The log cannot be split into spans in this way."""

    exit_code = 4


class IncompatibleError(FreshrecError):
    """The strategy cannot update this model."""

    exit_code = 5


class OptionError(FreshrecError):
    """A name, option or value is unknown or invalid."""

    exit_code = 2


class TrainingError(FreshrecError):
    """Training diverged, or a score is not finite."""

    exit_code = 6


class StateError(FreshrecError):
    """A state on disk is damaged, incomplete or in another format."""

    exit_code = 7


class RefusedError(FreshrecError):
    """The gate refused a new version."""

    exit_code = 8


class BusyError(FreshrecError):
    """Another process is changing the same store."""

    exit_code = 9


def unknown_name_error(kind: str, name: str, valid: Iterable[str]) -> OptionError:
    """Return the error for an unknown `kind` ("model", "strategy", ...) called `name`, with the nearest valid name."""
    return OptionError(f'There is no {kind} "{name[:60]}". {suggest_name(name, valid)}')


def suggest_name(name: str, valid: Iterable[str]) -> str:
    """Ask whether the nearest valid name was meant, or else list the valid names."""
    valid = sorted(valid)
    nearest = get_close_matches(name, valid, n=1, cutoff=0.4)
    return f'Did you mean "{nearest[0]}"?' if nearest else f"Valid names: {', '.join(valid)}."
