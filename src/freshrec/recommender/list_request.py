"""Options of a recommendation list, with defaults, bounds and descriptions.

Python, the command line and HTTP all build a `ListRequest` and take their help from its fields. A replay makes no
lists. It ranks targets among all items, so the rank of a target is its place in a list with `exclude_seen=False`.
This file does not import torch, to keep `--help` fast.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any, SupportsIndex, TypeAlias, get_args

from annotated_types import Ge
from pydantic import Field

from freshrec.config import Count, Weight, check_options, description_of, hints_of
from freshrec.errors import OptionError

Id: TypeAlias = int | str


@dataclass(frozen=True)
class ListRequest:
    """Options of a recommendation list; items are ids of the log. Raises OptionError for a value out of bounds.

    Unknown items in `allow` and `deny` are ignored. A list has fewer than `k` items if the filters leave fewer.
    """

    k: Annotated[Count, Field(description="Maximum number of items per list.")] = 10
    exclude_seen: Annotated[bool, Field(description="Leave out items that the user already has.")] = True
    allow: Annotated[tuple[Any, ...] | None, Field(description="Recommend only these items (default: all).")] = None
    deny: Annotated[tuple[Any, ...], Field(description="Never recommend these items.")] = ()
    category: Annotated[Any, Field(description="Recommend only items of this category (default: all).")] = None
    diversity: Annotated[
        Weight,
        Field(description="Score that an item loses for each item of its category above it in the list; 0 = off."),
    ] = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", check_k(self.k))
        weight: Any = self.diversity
        if type(weight) not in (bool, int, float) and isinstance(weight, Real):  # such as numpy.float32
            object.__setattr__(self, "diversity", float(weight))
        check_options(self)


def check_k(k: SupportsIndex) -> int:
    """Return k, the length of a list, as an integer. Raises OptionError unless it is an integer of at least 1."""
    minimum = lower_bound("k")
    try:
        length = minimum - 1 if isinstance(k, bool) else operator.index(k)
    except TypeError:
        length = minimum - 1
    if length < minimum:
        raise OptionError(f"k is {str(k)[:40]}, but must be an integer of at least {minimum:g}.")
    return int(length)


def help_of(name: str) -> str:
    """Return the description of a field of `ListRequest`."""
    return description_of(hints_of(ListRequest)[name])


def lower_bound(name: str) -> Any:
    """Return the lower bound of a numeric field of `ListRequest`."""
    return next(bound.ge for bound in get_args(hints_of(ListRequest)[name]) if isinstance(bound, Ge))


DEFAULTS = ListRequest()
