"""Options and bounds, one system: models, strategies, the gate, the server, recipes and the command line.

An option is a field of a frozen dataclass or of a recipe section. Its type says which values it takes, and may carry a
sentence for --help and docs/reference.md:

    d: Count = 64
    weighting: Literal["all", "last"] = "all"
    share: Annotated[Rate, Field(description="Share of the targets held out.")] = 0.0

pydantic checks the values; `option_error` says what it found in the words of this package. `find_instance` reads
`name:field=value:part.field=value`: an instance from a table of instances, with some fields replaced.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from functools import cache
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from freshrec.deprecation import describe_rename
from freshrec.disk_names import former_class_names, former_fields, former_values
from freshrec.errors import OptionError, unknown_name_error
from freshrec.user_modules import Interface, import_instance

T = TypeVar("T")

HISTORY_LENGTH = 50  # most recent events of a user that a model reads or keeps, unless its paper says otherwise

Count = Annotated[int, Ge(1)]
CountOrZero = Annotated[int, Ge(0)]  # 0 = none of them
Positive = Annotated[float, Gt(0), Lt(math.inf)]
Weight = Annotated[float, Ge(0), Lt(math.inf)]
Rate = Annotated[float, Ge(0), Lt(1)]
Share = Annotated[float, Ge(0), Le(1)]  # of a whole, which may be all of it
Fraction = Annotated[float, Gt(0), Lt(1)]  # a part of a whole, and something is left


def check_options(instance: Any) -> None:
    """OptionError where a field of a dataclass has a value that its type does not take; for `__post_init__`.

    Only fields with bounds or a list of valid values are checked. Values stay as they are: an int in a float's field
    remains an int.
    """
    for name, adapter in _adapters(instance.__class__).items():
        try:
            adapter.validate_python(getattr(instance, name), strict=True)
        except ValidationError as problem:
            raise option_error(problem, type(instance), "option {} of " + type(instance).__name__, name) from None


def option_error(problem: ValidationError, kind: type, place: str, *parents: str) -> OptionError:
    """The first error that pydantic found, as one sentence: what, where, and the nearest valid name or value.

    `kind`: the class whose fields are checked. `place`: how to say where, as in "recipe key {}". `parents`: the fields
    that lead to what was checked.
    """
    error = problem.errors()[0]
    path = [*parents, *error["loc"]]
    where, value = place.format(".".join(map(str, path))), error["input"]
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        names = [".".join(map(str, [*path[:-1], name])) for name in hints_of(_type_at(kind, path[:-1]))]
        return unknown_name_error(place.partition(" {}")[0], ".".join(map(str, path)), names)
    if error["type"] == "literal_error":
        valid = [str(choice) for choice in get_args(bare_type(_type_at(kind, path)))]
        near = get_close_matches(str(value), valid, n=1, cutoff=0)
        return OptionError(f'{where} is one of {", ".join(valid)}, not "{value}"; did you mean "{near[0]}"?')
    if error["type"].startswith(("greater_than", "less_than")):
        return OptionError(f"{where} is {value}; it must be {bounds_of(_type_at(kind, path))}.")
    return OptionError(f"{where} is {value!r:.60}: {error['msg'][:1].lower()}{error['msg'][1:]}.")


def bounds_of(annotation: Any) -> str:
    """The bounds of a type in words, as in "at least 0 and below 1"; empty where it has none."""
    words = []
    for bound in _metadata(annotation):
        match bound:
            case Ge(ge):
                words.append(f"at least {ge:g}")
            case Gt(gt):
                words.append(f"above {gt:g}")
            case Le(le):
                words.append(f"at most {le:g}")
            case Lt(lt) if lt != math.inf:
                words.append(f"below {lt:g}")
    return " and ".join(words)


def description_of(annotation: Any) -> str:
    """The sentence that a type carries: `Annotated[Count, Field(description="...")]`; empty where it has none."""
    found = [info.description for info in _metadata(annotation) if isinstance(info, FieldInfo)]
    return next((text for text in found if text), "")


@cache
def hints_of(kind: type) -> dict[str, Any]:
    """The types of the fields of a class, with their bounds."""
    return get_type_hints(kind, include_extras=True)


@cache
def _adapters(kind: type) -> dict[str, "TypeAdapter[Any]"]:
    """What checks each field that has bounds or a list of valid values."""
    hints = {name: hint for name, hint in hints_of(kind).items() if get_origin(hint) in (Annotated, Literal)}
    return {name: TypeAdapter(hint) for name, hint in hints.items()}


def _type_at(kind: Any, path: list[str | int]) -> Any:
    """The type of a field, of a field of a field, or of an entry of a list."""
    for part in path:
        kind = get_args(bare_type(kind))[0] if isinstance(part, int) else hints_of(bare_type(kind))[part]
    return kind


def bare_type(annotation: Any) -> Any:
    """A type without its bounds."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _metadata(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()


def find_instance(
    kind: str,
    text: str,
    table: Mapping[str, T],
    interface: Interface | None = None,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> T:
    """The instance that `text` names, as in "comirec-dr:k=1:attention=soft" or "imsr:fit.epochs=5:retain=none".

    `aliases`: other names -> names in the table. A name may also be "their_package.module:Thing", somebody else's
    instance that has this `interface`, or a class of such; "their_package.module.Thing" is the same. OptionError for
    anything else.
    """
    name, *options = text.split(":")
    name = aliases.get(name, name)
    if name not in table and options and "=" not in options[0]:  # the colon of "module:Thing", not that of an option
        name = f"{name}:{options.pop(0)}"
    instance: Any = table[name] if name in table else import_instance(kind, name, [*table, *aliases], interface)
    changes = []
    for option in options:
        path, equals, value = option.partition("=")
        if not equals:
            raise OptionError(f'"{option[:60]}" in "{text[:60]}" is not an option: write {name}:field=value.')
        changes.append((path.split("."), value))
    return _replace_fields(instance, changes, text) if changes else instance  # type: ignore[no-any-return]


def _replace_fields(instance: Any, changes: list[tuple[list[str], str]], text: str) -> Any:
    """`instance` with fields, or fields of its parts, set from strings; all at once, as some go together only."""
    new_values: dict[str, Any] = {}
    for (first, *rest), value in changes:
        if not is_dataclass(instance) or isinstance(instance, type) or not fields(instance):
            raise OptionError(f'"{text[:60]}": there are no options below "{first[:60]}".')
        names = {f.name for f in fields(instance)}
        if first not in names and (current := former_fields(type(instance)).get(first)):
            warnings.warn(describe_rename(f"option {first} of {text[:60]}", current), FutureWarning, stacklevel=2)
            first = current
        if first not in names:
            raise unknown_name_error(f"option of {type(instance).__name__}", first, [f.name for f in fields(instance)])
        old = new_values.get(first, getattr(instance, first))
        if rest:
            new_values[first] = _replace_fields(old, [(rest, value)], text)
        else:
            if current := former_values(type(instance), first).get(value):
                warnings.warn(describe_rename(f"{first}={value} of {text[:60]}", current), FutureWarning, stacklevel=2)
                value = current
            new_values[first] = _parse_value(get_type_hints(instance.__class__)[first], old, value, first)
    return replace(instance, **new_values)


def _parse_value(kind: Any, current: Any, value: str, name: str) -> Any:
    """`value` as the type of its field; "none" leaves out a part that may be left out, a class's name puts one in."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    for part in members:
        if isinstance(part, type) and is_dataclass(part) and value in (part.__name__, *former_class_names(part)):
            return part()
    if NoneType in members and value.lower() == "none":
        return None
    if str in members or get_origin(kind) is Literal:
        return value
    if bool in members and value.lower() in ("true", "false"):
        return value.lower() == "true"
    for number in (int, float):
        try:
            if number in members:
                return number(value)
        except ValueError:
            continue
    if is_dataclass(current):
        raise OptionError(f'{name} cannot be "{value[:60]}"; it has options of its own: write {name}.field=value.')
    raise OptionError(f'option {name} cannot be "{value[:60]}"; its default is {current}.')
