"""Writes docs/reference.md: commands, exit codes, every model, strategy and option, metrics, worlds, formats."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from names import options_of

from freshrec import errors
from freshrec.cli.app import OWN_NAMES, app, describe_names
from freshrec.config import description_of, hints_of
from freshrec.models import MODELS
from freshrec.recommender.list_request import DEFAULTS, ListRequest, help_of
from freshrec.replay.recipe_schema import Recipe
from freshrec.replay.slices import SLICES
from freshrec.strategies import ALIASES, STRATEGIES


def reference_page(root: Path) -> str:
    """The whole page."""
    commands = {c.name or c.callback.__name__: c.callback for c in app.registered_commands if c.callback}
    parts = ["# Reference", "", "Written by `make docs` from the code; do not edit.", "", "## Commands", ""]
    parts += [_row(name, inspect.getdoc(command)) for name, command in commands.items()]
    parts += ["", "Each says its options with `--help`. Exit codes:", "", "| code | meaning |", "|---|---|"]
    parts += ["| 0 | done |", *(f"| {error.exit_code} | {inspect.getdoc(error)} |" for error in _leaves())]
    parts += ["| 130 | interrupted |", "", "## Lists", "", *_list_options(), "", "## Models", ""]
    parts += [_row(name, None, options_of(spec)) for name, spec in MODELS.items()]
    parts += ["", f"{OWN_NAMES['models']} [CONTRIBUTING.md](../CONTRIBUTING.md) says how to write one."]
    parts += _options({type(spec): spec for spec in MODELS.values()}, root)
    parts += ["", "## Strategies", ""]
    parts += [_row(name, inspect.getdoc(type(s)), options_of(s)) for name, s in STRATEGIES.items()]
    parts += [_row(alias, f"Another name of `{name}`.") for alias, name in ALIASES.items()]
    parts += ["", f"{OWN_NAMES['strategies']} [CONTRIBUTING.md](../CONTRIBUTING.md) says how to write one."]
    parts += _options(_parts({type(s): s for s in STRATEGIES.values()}), root)
    for title in ("metrics", "worlds", "formats"):
        parts += [
            "",
            f"## {title.capitalize()}",
            "",
            *(_row(name, line) for name, line in describe_names(title).items()),
        ]
    parts += ["", "## Slices", "", *(_row(name, line) for name, line in SLICES.items())]
    parts += [
        "",
        "## Recipes",
        "",
        "The sections `[log]`, `[spans]` and `[replay]` of a recipe; each field is an option of",
    ]
    parts += ["`freshrec replay` (`log.path` is its LOG, `log.folder` its `--data`). A recipe may begin with"]
    parts += ['`extends = "name"`: it then has every field of name.toml, beside it, that it does not set itself.']
    parts += _options({kind: kind() for kind in hints_of(Recipe).values()}, root)
    parts += ["", "`src/freshrec/data/split_config.py` says at its top what each `by`, `targets` and `heldout` means."]
    return "\n".join(parts) + "\n"


def _list_options() -> list[str]:
    """The options of a list, which are the same in Python, on the command line and over HTTP."""
    rows = [f"| `{f.name}` | {getattr(DEFAULTS, f.name)!r} | {help_of(f.name)} |" for f in fields(ListRequest)]
    where = "Arguments of `Recommender.recommend`, flags of `freshrec recommend`, fields of `/recommend`:"
    return [where, "", "| option | default | |", "|---|---|---|", *rows]


def _leaves() -> list[type[errors.FreshrecError]]:
    found = [e for e in vars(errors).values() if inspect.isclass(e) and issubclass(e, errors.FreshrecError)]
    return sorted(found, key=lambda error: error.exit_code)


def _row(name: str, text: str | None, options: list[str] | None = None) -> str:
    first = (text or "").partition("\n")[0]
    return f"- `{name}`" + (f": {first}" if first else "") + (f" ({', '.join(options)})" if options else "")


def _parts(table: dict[type, Any]) -> dict[type, Any]:
    """The classes of `table`, and of the parts their instances have."""
    found = dict(table)
    for instance in table.values():
        for part in (getattr(instance, f.name) for f in fields(instance)):
            if is_dataclass(part):
                found.setdefault(type(part), part)
    return found


def _options(table: dict[type, Any], root: Path) -> list[str]:
    """A table of fields, defaults and sentences, or else comments, for each class."""
    lines = []
    for kind in table:
        comments, hints = _comments(kind, root), hints_of(kind)
        lines += ["", f"`{kind.__name__}`", "", "| option | default | |", "|---|---|---|"]
        default = kind()
        for f in fields(kind):
            value = getattr(default, f.name)
            shown = type(value).__name__ if is_dataclass(value) else repr(value)
            about = (description_of(hints[f.name]) or comments.get(f.name, "")).replace("|", "/")
            lines.append(f"| `{f.name}` | {shown} | {about} |")
    return lines


def _comments(kind: type, root: Path) -> dict[str, str]:
    """The comment behind each field in the source."""
    source = (root / "src" / f"{kind.__module__.replace('.', '/')}.py").read_text()
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == kind.__name__:
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    comment = re.search(r"#\s(.*)", lines[(item.end_lineno or item.lineno) - 1])
                    found[item.target.id] = comment.group(1) if comment else ""
    return found
