"""Writes docs/reference.md: commands, exit codes, every model, strategy and option, metrics, worlds, formats."""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from names import names_of_type, options_of

from freshrec import errors
from freshrec.cli.app import OWN_NAMES, app, describe_names
from freshrec.config import bare_type, bounds_of, description_of, hints_of
from freshrec.models import MODEL_TABLE, MODELS
from freshrec.nightly.gate import GateLimits
from freshrec.recommender.list_request import DEFAULTS, ListRequest, help_of
from freshrec.replay.recipe_schema import Recipe
from freshrec.replay.slices import SLICES
from freshrec.strategies import ALIASES, STRATEGIES, STRATEGY_TABLE

ROOT = Path(__file__).resolve().parent.parent
OPTION_HEAD = ["| option | default | values | meaning |", "|---|---|---|---|"]
TYPE_NAMES = {bool: "`true` or `false`", int: "integer", float: "number", str: "text", tuple: "list", dict: "pairs"}


def reference_page(root: Path = ROOT) -> str:
    """Return the whole page."""
    sections = [
        ["# Reference", "", "Written by `make docs` from the code; do not edit."],
        ["## Commands", "", *_commands()],
        ["## Lists", "", *_list_options()],
        ["## Models", "", *_models(root)],
        ["## Strategies", "", *_strategies(root)],
        ["## Metrics", "", *_names(describe_names("metrics"))],
        ["## Worlds", "", *_names(describe_names("worlds"))],
        ["## Formats", "", *_names(describe_names("formats"))],
        ["## Slices", "", "Parts of the targets, measured one by one in a replay.", "", *_names(SLICES)],
        ["## Gate", "", *_gate(root)],
        ["## Recipes", "", *_recipes(root)],
    ]
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _commands() -> list[str]:
    commands = {c.name or c.callback.__name__: c.callback for c in app.registered_commands if c.callback}
    lines = [_row(name, _first_line(command)) for name, command in commands.items()]
    lines += ["", "`freshrec COMMAND --help` lists the options of a command. Exit codes:", ""]
    lines += ["| code | meaning |", "|---|---|", "| 0 | Success. |"]
    lines += [f"| {error.exit_code} | {_first_line(error)} |" for error in _errors()]
    return [*lines, "| 130 | Interrupted with Ctrl-C. |"]


def _errors() -> list[type[errors.FreshrecError]]:
    found = [e for e in vars(errors).values() if inspect.isclass(e) and issubclass(e, errors.FreshrecError)]
    return sorted(found, key=lambda error: error.exit_code)


def _list_options() -> list[str]:
    """The options of a list, which are the same in Python, on the command line and over HTTP."""
    hints = hints_of(ListRequest)
    lines = ["Arguments of `Recommender.recommend`, options of `freshrec recommend`, and fields of `/recommend`:", ""]
    for f in fields(ListRequest):
        default = _default(getattr(DEFAULTS, f.name))
        lines.append(f"| `{f.name}` | {default} | {_values(hints[f.name])} | {help_of(f.name)} |")
    return [*lines[:2], *OPTION_HEAD, *lines[2:]]


def _models(root: Path) -> list[str]:
    lines = ["Defaults that a name changes are in parentheses. An option is set with a colon: `comirec-dr:k=1`.", ""]
    lines += [_row(name, sentence, options_of(spec)) for name, (spec, sentence) in MODEL_TABLE.items()]
    lines += ["", f"{OWN_NAMES['models']} [CONTRIBUTING.md](../CONTRIBUTING.md) explains how to write one."]
    for kind in dict.fromkeys(type(spec) for spec in MODELS.values()):
        about = f"Options of {_list_of(f'`{name}`' for name in names_of_type(MODELS, kind))}."
        lines += _option_table(kind, about, root)
    return lines


def _strategies(root: Path) -> list[str]:
    lines = [
        "Defaults that a name changes are in parentheses. An option is set with a colon, an option of a part with a"
    ]
    lines += ["dot: `imsr:fit.epochs=5:retain.weight=1`. The value `none` leaves a part out: `imsr:retain=none`.", ""]
    lines += [_row(name, sentence, options_of(strategy)) for name, (strategy, sentence) in STRATEGY_TABLE.items()]
    lines += [_row(alias, f"Another name of `{name}`.") for alias, name in ALIASES.items()]
    lines += ["", f"{OWN_NAMES['strategies']} [CONTRIBUTING.md](../CONTRIBUTING.md) explains how to write one."]
    kinds = list(dict.fromkeys(type(strategy) for strategy in STRATEGIES.values()))
    for kind in kinds:
        names = names_of_type(STRATEGIES, kind)
        lines += _option_table(kind, f"{_first_line(kind)} Used by {_list_of(f'`{name}`' for name in names)}.", root)
    for part, paths in _parts(kinds).items():
        kind, field_name = paths[-1]
        is_default = type(getattr(kind(), field_name)) is part
        chosen = "" if is_default else f"{field_name}={part.__name__}:"
        option = fields(part)[0].name
        example = f"{names_of_type(STRATEGIES, kind)[0]}:{chosen}{field_name}.{option}={getattr(part(), option)}"
        owners = _list_of(f"[{kind.__name__}](#{kind.__name__.lower()})" for kind, _ in paths)
        about = f"{_first_line(part)} It is the part `{field_name}` of {owners}. Example: `{example}`."
        lines += _option_table(part, about, root)
    return lines


def _gate(root: Path) -> list[str]:
    return [
        "A version goes live only within these limits. Set them with `--gate` of `fit` and `update`, as in",
        "`--gate metric=hr@20:tolerance=0.1`.",
        *_option_table(GateLimits, "", root),
    ]


def _recipes(root: Path) -> list[str]:
    lines = ["A recipe has the sections `[log]`, `[spans]` and `[replay]`. Each key is an option of `freshrec replay`:"]
    lines += ["`log.path` is its argument LOG, and `log.folder` is `--data`. A recipe may begin with"]
    lines += ['`extends = "name"`. It then takes every key that it does not set from name.toml in the same folder.']
    for section, kind in hints_of(Recipe).items():
        lines += _option_table(kind, f"Section `[{section}]`.", root)
    return [*lines, "", "`src/freshrec/data/split_config.py` explains each value of `by`, `targets` and `heldout`."]


def option_classes() -> list[type]:
    """All classes with options: of models, of strategies and their parts, of the gate, and of recipes."""
    models = dict.fromkeys(type(spec) for spec in MODELS.values())
    strategies = dict.fromkeys(type(strategy) for strategy in STRATEGIES.values())
    return [*models, *strategies, *_parts(strategies), GateLimits, *hints_of(Recipe).values()]


def option_sentences(kind: type, root: Path = ROOT) -> dict[str, str]:
    """Option -> the sentence in its type, or else in the comment on its lines. Empty where there is none."""
    comments = _comments(kind, root)
    return {f.name: description_of(hints_of(kind)[f.name]) or comments.get(f.name, "") for f in fields(kind)}


def _parts(kinds: Mapping[type, Any] | list[type]) -> dict[type, list[tuple[type, str]]]:
    """Part -> the classes and fields in which it can stand."""
    found: dict[type, list[tuple[type, str]]] = {}
    for kind in kinds:
        for name, hint in hints_of(kind).items():
            for member in _members(bare_type(hint)):
                if isinstance(member, type) and is_dataclass(member):
                    found.setdefault(member, []).append((kind, name))
    return found


def _option_table(kind: type, about: str, root: Path) -> list[str]:
    """A heading, the text `about` the class, and a table of its options: default, valid values, meaning."""
    sentences, hints, default = option_sentences(kind, root), hints_of(kind), kind()
    lines = ["", f"### {kind.__name__}", ""]
    lines += [about, ""] if about else []
    if not fields(kind):
        return [*lines, "It has no options."]
    for f in fields(kind):
        meaning = sentences[f.name].replace("|", "/")
        lines.append(f"| `{f.name}` | {_default(getattr(default, f.name))} | {_values(hints[f.name])} | {meaning} |")
    at = len(lines) - len(fields(kind))
    return [*lines[:at], *OPTION_HEAD, *lines[at:]]


def _default(value: Any) -> str:
    """A default as a user writes it; a part by a link to its options."""
    match value:
        case bool() | None:
            return f"`{str(value).lower()}`"
        case float():
            return f"{value:.4g}"
        case int():
            return f"{value}"
        case str() | tuple() | list() | dict() if not value:
            return "empty"
        case tuple() | list():
            return f"`{','.join(map(str, value))}`"
        case str():
            return f"`{value}`"
    link = f"[{type(value).__name__}](#{type(value).__name__.lower()})"
    return link + "".join(f", `{option}`" for option in options_of(value))


def _values(hint: Any) -> str:
    """The values that a type takes, with its bounds."""
    kind, bounds = bare_type(hint), bounds_of(hint)
    words = []
    for member in _members(kind):
        if get_origin(member) is Literal:
            words.append(", ".join(f"`{choice}`" for choice in get_args(member)))
        elif isinstance(member, type) and is_dataclass(member):
            words.append(f"[{member.__name__}](#{member.__name__.lower()})")
        elif member is NoneType:
            words.append("`none`")
        else:
            plain = get_origin(bare_type(member)) or bare_type(member)
            words.append(", ".join(filter(None, [TYPE_NAMES.get(plain, "any"), bounds or bounds_of(member)])))
    return " or ".join(words)


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _comments(kind: type, root: Path) -> dict[str, str]:
    """Field -> the comment on the lines of its definition."""
    source = (root / "src" / f"{kind.__module__.replace('.', '/')}.py").read_text()
    return {field_name: comment for name, field_name, comment in field_comments(source) if name == kind.__name__}


def field_comments(source: str) -> Iterator[tuple[str, str, str]]:
    """(class, field, comment) for each field of the classes of a module. The comment is empty where there is none."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    lines = range(item.lineno, (item.end_lineno or item.lineno) + 1)
                    yield node.name, item.target.id, " ".join(comments[n] for n in lines if n in comments)


def _names(lines: Mapping[str, str]) -> list[str]:
    return [_row(name, line) for name, line in lines.items()]


def _row(name: str, text: str, options: list[str] | None = None) -> str:
    return f"- `{name}`" + (f": {text}" if text else "") + (f" (`{':'.join(options)}`)" if options else "")


def _first_line(thing: Any) -> str:
    """The first line of a docstring; empty where Python has made it."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def _list_of(words: Iterator[str] | list[str]) -> str:
    """The words with commas and a last "and"."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
