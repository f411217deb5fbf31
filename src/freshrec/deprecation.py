"""Old names of arguments and flags. They still work, with a warning of one line."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
PACKAGE = str(Path(__file__).parent)


class Unset(Enum):
    """The default of an argument for which None is a valid value."""

    UNSET = "unset"


UNSET = Unset.UNSET


def value_of_renamed(name: str, value: T, old_name: str, old_value: T | Unset) -> T:
    """Return `old_value` with a FutureWarning if the caller used the old name of an argument, else `value`.

    The warning points to the line that called freshrec.
    """
    if isinstance(old_value, Unset):
        return value
    warn_caller(describe_rename(old_name, name), FutureWarning)
    return old_value


def warn_caller(message: str, category: type[Warning]) -> None:
    """Show a warning that points to the line that called freshrec, through any number of decorators."""
    own_files, level, frame = (PACKAGE, contextlib.__file__), 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(own_files):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def replace_old_flags(
    arguments: Sequence[str], renamed: Mapping[str, Mapping[str, str]], warn: Callable[[str], None]
) -> list[str]:
    """Replace the old flags of a command in command line arguments. Call `warn` with one sentence for each.

    `renamed` holds the new flag of each old one, by command. `--old=value` keeps its value. After `--` there are no
    flags.
    """
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    flags, replaced = renamed.get(command, {}), list(arguments)
    end = replaced.index("--") if "--" in replaced else len(replaced)
    for place, argument in enumerate(replaced[:end]):
        old, equals, value = argument.partition("=")
        if old in flags:
            warn(describe_rename(old, flags[old]))
            replaced[place] = flags[old] + equals + value
    return replaced


def describe_rename(old: str, new: str) -> str:
    """Return the text of the warning."""
    return f"{old} is now called {new}. The old name still works."
