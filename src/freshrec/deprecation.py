"""Old names of arguments and command line flags: they keep working, with one line of warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import TypeVar

T = TypeVar("T")


class Unset(Enum):
    """The value of an argument that was not given, where None would be a value like others."""

    UNSET = "unset"


UNSET = Unset.UNSET


def value_of_renamed(name: str, value: T, old_name: str, old_value: T | Unset) -> T:
    """`old_value`, with a FutureWarning, where the caller used an argument's old name; else `value`.

    Call it directly in the public function that has both arguments: the warning points to that function's caller.
    """
    if isinstance(old_value, Unset):
        return value
    warnings.warn(describe_rename(old_name, name), FutureWarning, stacklevel=3)
    return old_value


def replace_old_flags(
    arguments: Sequence[str], renamed: Mapping[str, Mapping[str, str]], warn: Callable[[str], None]
) -> list[str]:
    """Command line arguments in which the old flags of a command are its new ones; `warn` gets a sentence for each.

    `renamed` holds, by command, the new flag of each old one. `--old=value` keeps its value. What follows `--` is not
    a flag.
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
    """The sentence of the warning."""
    return f"{old} is called {new} now; the old name still works."
