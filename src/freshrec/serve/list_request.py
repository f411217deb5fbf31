"""The options of a recommendation list: each with its default, its bounds and its description in one place.

Python, the command line and HTTP build a `ListRequest`, and their help comes from its fields. A replay has no lists: it
ranks targets among all items, and the rank of a target is its place in the list of `ListRequest(exclude_seen=False)`.
This file imports no torch, so that `--help` is fast.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, TypeAlias, get_args, get_type_hints

from freshrec.errors import OptionError
from freshrec.options import Bounds, Count, Weight, check_options

Id: TypeAlias = int | str
HELP = "help"  # key of a field's description in its metadata


def _help(text: str) -> dict[str, str]:
    return {HELP: text}


@dataclass(frozen=True)
class ListRequest:
    """What the lists of some users may hold, in ids of the log. OptionError for a value out of bounds.

    Unknown items in `allow` and `deny` are ignored. A list is shorter than `k` where fewer items are left.
    """

    k: Count = field(default=10, metadata=_help("Maximum number of items per list."))
    exclude_seen: bool = field(default=True, metadata=_help("Leave out items that the user has had."))
    allow: tuple[Id, ...] | None = field(default=None, metadata=_help("Only these items; all if not given."))
    deny: tuple[Id, ...] = field(default=(), metadata=_help("None of these items."))
    category: Id | None = field(default=None, metadata=_help("Only items of this category; all if not given."))
    diversity: Weight = field(
        default=0.0,
        metadata=_help("Score that an item loses for each item of its category above it in the list; 0 = off."),
    )

    def __post_init__(self) -> None:
        check_k(self.k)
        check_options(self)


def check_k(k: int) -> int:
    """k, the number of items of a list. OptionError where it is not a whole number of at least 1."""
    least = bounds_of("k").low
    if not isinstance(k, int) or k < least:
        raise OptionError(f"k is {str(k)[:40]}; ask for a whole number of items, at least {least:g}.")
    return k


def help_of(name: str) -> str:
    """The description of a field of `ListRequest`."""
    return {option.name: str(option.metadata[HELP]) for option in fields(ListRequest)}[name]


@cache
def bounds_of(name: str) -> Bounds:
    """The bounds of a numeric field of `ListRequest`."""
    hints: dict[str, Any] = get_type_hints(ListRequest, include_extras=True)
    bounds = get_args(hints[name])[1]
    assert isinstance(bounds, Bounds)
    return bounds


DEFAULTS = ListRequest()
