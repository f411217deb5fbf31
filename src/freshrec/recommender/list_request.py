"""The options of a recommendation list: each with its default, its bounds and its description in one place.

Python, the command line and HTTP build a `ListRequest`, and their help comes from its fields. A replay has no lists: it
ranks targets among all items, and the rank of a target is its place in the list of `ListRequest(exclude_seen=False)`.
This file imports no torch, so that `--help` is fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias, get_args

from annotated_types import Ge
from pydantic import Field

from freshrec.config import Count, Weight, check_options, description_of, hints_of
from freshrec.errors import OptionError

Id: TypeAlias = int | str


@dataclass(frozen=True)
class ListRequest:
    """What the lists of some users may hold, in ids of the log. OptionError for a value out of bounds.

    Unknown items in `allow` and `deny` are ignored. A list is shorter than `k` where fewer items are left.
    """

    k: Annotated[Count, Field(description="Maximum number of items per list.")] = 10
    exclude_seen: Annotated[bool, Field(description="Leave out items that the user has had.")] = True
    allow: Annotated[tuple[Any, ...] | None, Field(description="Only these items; all if not given.")] = None
    deny: Annotated[tuple[Any, ...], Field(description="None of these items.")] = ()
    category: Annotated[Any, Field(description="Only items of this category; all if not given.")] = None
    diversity: Annotated[
        Weight,
        Field(description="Score an item loses for each item of its category above it in the list; 0 = off."),
    ] = 0.0

    def __post_init__(self) -> None:
        check_k(self.k)
        check_options(self)


def check_k(k: int) -> int:
    """k, the number of items of a list. OptionError where it is not a whole number of at least 1."""
    minimum = lower_bound("k")
    if not isinstance(k, int) or k < minimum:
        raise OptionError(f"k is {str(k)[:40]}; ask for a whole number of items, at least {minimum:g}.")
    return k


def help_of(name: str) -> str:
    """The description of a field of `ListRequest`."""
    return description_of(hints_of(ListRequest)[name])


def lower_bound(name: str) -> Any:
    """The lowest value of a numeric field of `ListRequest`."""
    return next(bound.ge for bound in get_args(hints_of(ListRequest)[name]) if isinstance(bound, Ge))


DEFAULTS = ListRequest()
