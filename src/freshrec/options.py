"""`name:field=value:part.field=value` -> an instance from a table of instances, with some fields replaced."""

import importlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from freshrec.errors import OptionError, unknown

T = TypeVar("T")


def choose(kind: str, text: str, table: Mapping[str, T]) -> T:
    """The instance that `text` names, as in "comirec-dr:k=1:attention=soft" or "imsr:fit.epochs=5:retain=none".

    A name may also be "their_package.module.thing", an instance of somebody else's. OptionError for anything unknown.
    """
    name, *options = text.split(":")
    chosen: Any = table[name] if name in table else _imported(kind, name, table)
    for option in options:
        path, equals, value = option.partition("=")
        if not equals:
            raise OptionError(f'"{option[:60]}" in "{text[:60]}" is not an option: write {name}:field=value.')
        chosen = _replaced(chosen, path.split("."), value, text)
    return chosen  # type: ignore[no-any-return]


def _imported(kind: str, name: str, table: Mapping[str, T]) -> T:
    module, dot, thing = name.rpartition(".")
    if not dot:
        raise unknown(kind, name, table)
    try:
        found: T = vars(importlib.import_module(module))[thing]
    except (ImportError, KeyError, ValueError):
        raise OptionError(f'{kind} "{name[:60]}": cannot import "{thing}" from "{module}".') from None
    return found


def _replaced(instance: Any, path: list[str], value: str, text: str) -> Any:
    """`instance` with one field, or a field of a part, set from a string."""
    first, *rest = path
    if not is_dataclass(instance) or isinstance(instance, type):
        raise OptionError(f'"{text[:60]}": there are no options below "{first[:60]}".')
    if first not in {f.name for f in fields(instance)}:
        raise unknown(f"option of {type(instance).__name__}", first, [f.name for f in fields(instance)])
    old = getattr(instance, first)
    new = _replaced(old, rest, value, text) if rest else _parsed(old, value, first)
    return replace(instance, **{first: new})


def _parsed(old: Any, value: str, name: str) -> Any:
    """`value` as the type of what it replaces; "none" leaves a part out."""
    if value.lower() == "none":
        return None
    if isinstance(old, str):
        return value
    if isinstance(old, bool) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(old, int | float) and not isinstance(old, bool):
        try:
            return type(old)(value)
        except ValueError:
            pass
    raise OptionError(f'option {name} cannot be "{value[:60]}"; its default is {old}.')
