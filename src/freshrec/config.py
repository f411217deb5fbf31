"""One system of options and bounds for models, strategies, the gate, the server, recipes and the command line.

An option is a field of a frozen dataclass or of a recipe section. Its type gives the valid values and may hold a
sentence for --help and docs/reference.md:

    d: Count = 64
    weighting: Literal["all", "last"] = "all"
    share: Annotated[Rate, Field(description="Share of the targets held out.")] = 0.0

pydantic checks the values, and `option_error` turns its errors into sentences. `find_instance` reads
`name:field=value:part.field=value`: it takes an instance from a table and replaces some fields.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from freshrec.deprecation import describe_rename
from freshrec.disk_names import former_class_names, former_fields, former_values, tag_of
from freshrec.errors import OptionError, close_name, suggest_name, unknown_name_error
from freshrec.user_modules import Interface, import_instance

T = TypeVar("T")

HISTORY_LENGTH = 50  # recent events of a user that a model reads or keeps, unless its paper says otherwise

Count = Annotated[int, Ge(1)]
CountOrZero = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0), Lt(math.inf)]
Weight = Annotated[float, Ge(0), Lt(math.inf)]
Rate = Annotated[float, Ge(0), Lt(1)]
Share = Annotated[float, Ge(0), Le(1)]  # 0 and 1 are valid
Fraction = Annotated[float, Gt(0), Lt(1)]  # 0 and 1 are not valid


def check_options(instance: Any) -> None:
    """Check the fields of a dataclass that have bounds or a list of valid values. Call it in `__post_init__`.

    Raises OptionError for an invalid value. Values are not converted: an int in a float field stays an int.
    """
    for name, adapter in _adapters(instance.__class__).items():
        try:
            adapter.validate_python(getattr(instance, name), strict=True)
        except ValidationError as problem:
            raise option_error(problem, type(instance), "option {}", name) from None


def option_error(problem: ValidationError, kind: type, place: str, *parents: str) -> OptionError:
    """Turn the first error of pydantic into a message: what is wrong, where, and what to write instead.

    - `kind`: the class whose fields were checked.
    - `place`: the words for a field, such as "recipe key {}". "--{}" names the flag of the field.
    - `parents`: the names of the fields that lead to the checked value.
    """
    error = problem.errors()[0]
    path = [*parents, *error["loc"]]
    value = error["input"]
    if place == "--{}":  # --cadence, for the path replay.cadence.0
        where = place.format([part for part in path if isinstance(part, str)][-1].replace("_", "-"))
    else:
        where = place.format(".".join(map(str, path)))
        where = where[0].upper() + where[1:]
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        parent = "".join(f"{part}." for part in path[:-1])
        return unknown_name_error(place.partition(" {}")[0], str(path[-1]), hints_of(_type_at(kind, path[:-1])), parent)
    if error["type"] == "literal_error":
        valid = [str(choice) for choice in get_args(bare_type(_type_at(kind, path)))]
        close = close_name(str(value), valid)
        question = f' Did you mean "{close}"?' if close else ""
        return OptionError(f'{where} is "{value}". Use one of {", ".join(valid)}.{question}')
    if error["type"].startswith(("greater_than", "less_than")):
        finite = "" if math.isfinite(value) else " and finite"
        return OptionError(f"{where} is {value}. It must be {bounds_of(_type_at(kind, path))}{finite}.")
    shown = f'"{value[:60]}"' if isinstance(value, str) else f"{value!r:.60}"
    return OptionError(f"{where} is {shown}. {_expected_value(error['type']) or error['msg']}.")


EXPECTED_VALUES = {  # start of an error type of pydantic -> what to write instead
    "int": "Write a whole number",
    "float": "Write a number",
    "finite": "Write a finite number",
    "bool": "Write true or false",
    "string": "Write a text",
    "tuple": "Write a list",
    "too_short": "Write at least one value",
    "dict": "Write a table of keys and values",
    "dataclass": "Write a table of keys and values",
}


def _expected_value(error_type: str) -> str:
    """Say what to write after an error of this type; "" for other errors."""
    return next((text for start, text in EXPECTED_VALUES.items() if error_type.startswith(start)), "")


def bounds_of(annotation: Any) -> str:
    """Return the bounds of a type in words, such as "at least 0 and below 1"; empty if it has none."""
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
    """Return the description of a type, `Annotated[Count, Field(description="...")]`; empty if it has none."""
    found = [info.description for info in _metadata(annotation) if isinstance(info, FieldInfo)]
    return next((text for text in found if text), "")


@cache
def hints_of(kind: type) -> dict[str, Any]:
    """Return the types of the fields of a class, with their bounds."""
    return get_type_hints(kind, include_extras=True)


@cache
def _adapters(kind: type) -> dict[str, "TypeAdapter[Any]"]:
    """Return a validator for each field with bounds or a list of valid values."""
    hints = {name: hint for name, hint in hints_of(kind).items() if get_origin(hint) in (Annotated, Literal)}
    return {name: TypeAdapter(hint) for name, hint in hints.items()}


def _type_at(kind: Any, path: list[str | int]) -> Any:
    """Return the type of a field, a nested field or a list entry."""
    for part in path:
        kind = get_args(bare_type(kind))[0] if isinstance(part, int) else hints_of(bare_type(kind))[part]
    return kind


def bare_type(annotation: Any) -> Any:
    """Return a type without its bounds."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _metadata(annotation: Any) -> tuple[Any, ...]:
    """Return the bounds and descriptions of a type."""
    return get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()


def find_instance(
    kind: str,
    text: str,
    table: Mapping[str, T],
    interface: Interface | None = None,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> T:
    """Return the instance that `text` names, such as "comirec-dr:k=1:attention=soft" or "imsr:retain=none".

    `aliases` are other names -> names in the table. A name may also be "their_package.module:Thing" or
    "their_package.module.Thing": a custom instance with this `interface`, or a class of such instances. Raises
    OptionError for an unknown name, option or value.
    """
    name, *options = text.split(":")
    name = aliases.get(name, name)
    if name not in table and options and "=" not in options[0]:  # the colon of "module:Thing", not of an option
        name = f"{name}:{options.pop(0)}"
    instance: Any = table[name] if name in table else import_instance(kind, name, [*table, *aliases], interface)
    changes = []
    for option in options:
        path, equals, value = option.partition("=")
        if not equals:
            raise OptionError(f'"{option[:60]}" in "{text[:60]}" is not an option. Write {name}:field=value.')
        changes.append((path.split("."), value))
    owner = "The gate" if kind == name == "gate" else f"{kind.capitalize()} {name[:60]}"
    return _replace_fields(instance, changes, text, owner) if changes else instance  # type: ignore[no-any-return]


def name_of(instance: Any, table: Mapping[str, Any]) -> str:
    """Return the name of an instance with its options, such as "sasrec:d=8", as `find_instance` reads it.

    The name is that of the most similar instance of the table, or else the name of the class in files.
    """
    tag, kind = tag_of(type(instance)), type(instance)
    others = [(name, other) for name, other in table.items() if type(other) is kind]
    if not others and is_dataclass(instance) and all(_has_default(field) for field in fields(instance)):
        others = [(tag, kind())]
    named = [(name, _option_texts(instance, other)) for name, other in others]
    options = [(name, texts) for name, texts in named if texts is not None]
    name, texts = min(options, key=lambda pair: len(pair[1] or ()), default=(tag, []))
    return ":".join([name, *(texts or [])])


def _has_default(field: Any) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING or not field.init


def _option_texts(instance: Any, other: Any, parent: str = "") -> list[str] | None:
    """Return the options in which an instance differs from another one of its class; None if texts cannot say it."""
    found: list[str] = []
    for name in [field.name for field in fields(instance)] if is_dataclass(instance) else []:
        value, default = getattr(instance, name), getattr(other, name)
        if value is default or (type(value) is type(default) and value == default):
            continue
        if value is None or isinstance(value, bool | int | float | str):
            text = str(value).lower() if value is None or isinstance(value, bool) else str(value)
            found.append(f"{parent}{name}={text}")
        elif type(value) is type(default) and is_dataclass(value):
            parts = _option_texts(value, default, f"{parent}{name}.")
            if parts is None:
                return None
            found += parts
        else:
            return None
    return found


def _replace_fields(
    instance: Any, changes: list[tuple[list[str], str]], text: str, owner: str, parent: str = ""
) -> Any:
    """Set fields of an instance, or of its parts, from strings. All are set at once, because some need each other.

    `owner`: the words for the whole instance, such as "Model sasrec". `parent`: the path of this part, such as "fit.".
    """
    new_values: dict[str, Any] = {}
    for (first, *rest), value in changes:
        if not is_dataclass(instance) or isinstance(instance, type) or not fields(instance):
            raise OptionError(
                f'"{text[:60]}": there are no options below "{first[:60]}". Check the name before the dot.'
            )
        names = {f.name for f in fields(instance)}
        if first not in names and (current := former_fields(type(instance)).get(first)):
            warnings.warn(describe_rename(f"option {first} of {text[:60]}", current), FutureWarning, stacklevel=2)
            first = current
        if first not in names:
            hint = suggest_name(first, names, "Its options", parent)
            raise OptionError(f'{owner} has no option "{parent}{first[:60]}". {hint}')
        old = new_values.get(first, getattr(instance, first))
        if rest:
            new_values[first] = _replace_fields(old, [(rest, value)], text, owner, f"{parent}{first}.")
        else:
            if current := former_values(type(instance), first).get(value):
                warnings.warn(describe_rename(f"{first}={value} of {text[:60]}", current), FutureWarning, stacklevel=2)
                value = current
            new_values[first] = _parse_value(get_type_hints(instance.__class__)[first], old, value, first)
    try:
        return replace(instance, **new_values)
    except OptionError as problem:
        is_placed = str(problem).startswith('"')  # a part of the instance was checked before it
        raise problem if is_placed else OptionError(f'"{text[:60]}": {problem}') from None


def _parse_value(kind: Any, current: Any, value: str, name: str) -> Any:
    """Convert `value` to the type of its field. "none" removes an optional part, and a class name adds one."""
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
        raise OptionError(f'{name} cannot be "{value[:60]}". It has its own options: write {name}.field=value.')
    raise OptionError(f'Option {name} cannot be "{value[:60]}". Write a value like its default, {current}.')
