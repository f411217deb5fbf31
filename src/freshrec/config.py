"""Options are fields of frozen dataclasses, whose types say which values they take: `d: Count`, `keep: Literal[...]`.

`name:field=value:part.field=value` is an instance from a table of instances, with some fields replaced.
"""

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from freshrec.errors import OptionError, unknown

T = TypeVar("T")


@dataclass(frozen=True)
class Bounds:
    """The numbers a field takes: from `low` on, or above it, and below `high`."""

    low: float
    above: bool = False  # `low` itself is refused
    high: float = math.inf

    def __str__(self) -> str:
        least = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        return least + (f" and below {self.high:g}" if self.high < math.inf else "")

    def holds(self, value: float) -> bool:
        """Whether `value` is one of them; nan never is."""
        return (self.low < value if self.above else self.low <= value) and value < self.high


Count = Annotated[int, Bounds(1)]
CountOrNone = Annotated[int, Bounds(0)]  # 0 = none of them
Positive = Annotated[float, Bounds(0, above=True)]
Weight = Annotated[float, Bounds(0)]
Rate = Annotated[float, Bounds(0, high=1)]


def check_options(instance: Any) -> None:
    """OptionError where a field has a value that its type does not take; for `__post_init__`."""
    for name, kind in _hints(instance.__class__).items():
        value, option = getattr(instance, name), f"option {name} of {type(instance).__name__}"
        if get_origin(kind) is Literal and value not in get_args(kind):
            valid, near = get_args(kind), get_close_matches(str(value), get_args(kind), n=1, cutoff=0)
            raise OptionError(f'{option} is one of {", ".join(valid)}, not "{value}"; did you mean "{near[0]}"?')
        if get_origin(kind) is Annotated:
            number, bounds = get_args(kind)
            if not isinstance(value, int | number) or not bounds.holds(value):
                raise OptionError(f"{option} is {value}; it must be {bounds}.")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def choose(kind: str, text: str, table: Mapping[str, T]) -> T:
    """The instance that `text` names, as in "comirec-dr:k=1:attention=soft" or "imsr:fit.epochs=5:retain=none".

    A name may also be "their_package.module.thing", an instance of somebody else's. OptionError for anything unknown.
    """
    name, *options = text.split(":")
    chosen: Any = table[name] if name in table else _imported(kind, name, table)
    wanted = []
    for option in options:
        path, equals, value = option.partition("=")
        if not equals:
            raise OptionError(f'"{option[:60]}" in "{text[:60]}" is not an option: write {name}:field=value.')
        wanted.append((path.split("."), value))
    return _replaced(chosen, wanted, text) if wanted else chosen  # type: ignore[no-any-return]


def _imported(kind: str, name: str, table: Mapping[str, T]) -> T:
    module, dot, thing = name.rpartition(".")
    if not dot:
        raise unknown(kind, name, table)
    try:
        found: T = vars(importlib.import_module(module))[thing]
    except (ImportError, KeyError, ValueError):
        raise OptionError(f'{kind} "{name[:60]}": cannot import "{thing}" from "{module}".') from None
    return found


def _replaced(instance: Any, wanted: list[tuple[list[str], str]], text: str) -> Any:
    """`instance` with fields, or fields of its parts, set from strings; all at once, as some go together only."""
    changes: dict[str, Any] = {}
    for (first, *rest), value in wanted:
        if not is_dataclass(instance) or isinstance(instance, type) or not fields(instance):
            raise OptionError(f'"{text[:60]}": there are no options below "{first[:60]}".')
        if first not in {f.name for f in fields(instance)}:
            raise unknown(f"option of {type(instance).__name__}", first, [f.name for f in fields(instance)])
        old = changes.get(first, getattr(instance, first))
        if rest:
            changes[first] = _replaced(old, [(rest, value)], text)
        else:
            changes[first] = _parsed(get_type_hints(instance.__class__)[first], old, value, first)
    return replace(instance, **changes)


def _parsed(kind: Any, old: Any, value: str, name: str) -> Any:
    """`value` as the type of its field; "none" leaves out a part that may be left out, a class's name puts one in."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    for part in kinds:
        if isinstance(part, type) and is_dataclass(part) and part.__name__ == value:
            return part()
    if NoneType in kinds and value.lower() == "none":
        return None
    if str in kinds or get_origin(kind) is Literal:
        return value
    if bool in kinds and value.lower() in ("true", "false"):
        return value.lower() == "true"
    for number in (int, float):
        try:
            if number in kinds:
                return number(value)
        except ValueError:
            continue
    if is_dataclass(old):
        raise OptionError(f'{name} cannot be "{value[:60]}"; it has options of its own: write {name}.field=value.')
    raise OptionError(f'option {name} cannot be "{value[:60]}"; its default is {old}.')
