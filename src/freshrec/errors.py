"""All errors that freshrec raises on purpose.

    FreshrecError                 the base class: catch this one
    ├── LogError                  a file, column or row of the log is invalid
    │   └── NoRowsError           the log has no rows
    ├── SpanError                 the log cannot be split into these spans
    ├── IncompatibleError         the strategy cannot update the model
    ├── OptionError               an unknown name, option or value; a close valid one is suggested
    ├── TrainingError             training diverged or a score is not finite
    ├── StateError                a state on disk is damaged, incomplete or in another format
    │   └── SignatureError        a file of a store is not signed with the given key
    ├── RefusedError              the gate refused a new version; the live version stays
    ├── BusyError                 another process is changing the same store
    └── OutOfMemoryError          there is less memory than is needed

Each message says in one or two short sentences what is wrong, where, and what to do.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

MAX_LISTED_NAMES = 12  # a message lists no more valid names than this
LIST_COMMANDS = {
    "model": "models",
    "strategy": "strategies",
    "metric": "metrics",
    "world": "worlds",
    "format": "formats",
}


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


class SignatureError(StateError):
    """A file of a store is not signed, or not with the given key."""


class RefusedError(FreshrecError):
    """The gate refused a new version."""

    exit_code = 8


class BusyError(FreshrecError):
    """Another process is changing the same store."""

    exit_code = 9


class OutOfMemoryError(FreshrecError):
    """There is less memory than is needed."""


def unknown_name_error(kind: str, name: str, valid: Iterable[str], parent: str = "") -> OptionError:
    """Return the error for an unknown `kind` ("model", "strategy", ...) called `name`, with a hint at valid names.

    `parent`: the path before the name and before each valid name, such as "spans.".
    """
    valid = list(valid)
    hint = suggest_name(name, valid, parent=parent)
    if kind in LIST_COMMANDS and len(valid) > MAX_LISTED_NAMES and not close_name(name, valid):
        hint = f"`freshrec list {LIST_COMMANDS[kind]}` lists the valid names."
    return OptionError(f'There is no {kind} "{parent}{name[:60]}". {hint}')


def suggest_name(name: str, valid: Iterable[str], label: str = "Valid names", parent: str = "") -> str:
    """Ask whether a close valid name was meant, or else list the valid names after the `label`."""
    valid = list(valid)
    close = close_name(name, valid)
    listed = list_names(f"{parent}{word}" for word in valid)
    return f'Did you mean "{parent}{close}"?' if close else f"{label}: {listed}."


def close_name(name: str, valid: Iterable[str]) -> str | None:
    """Return the valid name that is most similar to `name`, or None if all of them differ too much."""
    return next(iter(get_close_matches(name, sorted(valid), n=1, cutoff=0.6)), None)


def list_names(names: Iterable[str]) -> str:
    """List names for a message, at most MAX_LISTED_NAMES of them; "none" without names."""
    names = sorted(names)
    n_more = len(names) - MAX_LISTED_NAMES
    return (", ".join(names[:MAX_LISTED_NAMES]) or "none") + (f" and {n_more} more" if n_more > 0 else "")
