"""Make command-line parameters from the fields of dataclasses, so that each option is declared once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import make_dataclass
from typing import Annotated, Any, get_origin

import typer

from freshrec.cli.options import parse_list, parse_pairs
from freshrec.config import bare_type, description_of, hints_of

Parameter = tuple[str, Any, Any]  # name, type with its typer.Option or typer.Argument, default
# parser and placeholder of fields with several values
COLLECTION_PARSERS: dict[Any, tuple[Any, str]] = {tuple: (parse_list, "A,B"), dict: (parse_pairs, "A=B,C=D")}


def parameters_of(section: type, panel: str, flags: dict[str, str], leave_out: Sequence[str] = ()) -> list[Parameter]:
    """Make an option for each field of a dataclass. The field's description is its help, None its default.

    `panel`: heading in --help. `flags`: names of options that differ from the field's. A tuple is typed as `a,b`, a
    dictionary as `a=b,c=d`.
    """
    found = []
    for name, hint in hints_of(section).items():
        if name in leave_out:
            continue
        flag, kind = flags.get(name, "--" + name.replace("_", "-")), bare_type(hint)
        if kind is bool:
            flag += "/--no-" + flag.removeprefix("--")
        parser, metavar = COLLECTION_PARSERS.get(get_origin(kind), (None, None))
        option = typer.Option(flag, help=description_of(hint), parser=parser, metavar=metavar, rich_help_panel=panel)
        found.append((name, Annotated[(kind if kind in (bool, int, float) else str) | None, option], None))
    return found


def make_command(
    name: str, description: str, parameters: Sequence[Parameter], run: Callable[[dict[str, Any]], None]
) -> Callable[..., Any]:
    """Make a typer command with these parameters, which calls `run` with their values by name.

    Typer reads the parameters of a callable and calls it with keywords. The callable is a dataclass, because a function
    with computed parameters would need `**kwargs`, which accepts any name.
    """

    def __post_init__(self: Any) -> None:  # noqa: N807
        run(dict(vars(self)))

    return make_dataclass(name, parameters, namespace={"__doc__": description, "__post_init__": __post_init__})
