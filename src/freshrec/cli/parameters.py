"""Commands whose parameters are made from the fields of dataclasses, so that a new field needs no second line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import make_dataclass
from typing import Annotated, Any, get_origin

import typer

from freshrec.cli.options import parse_list, parse_pairs
from freshrec.config import bare_type, description_of, hints_of

Parameter = tuple[str, Any, Any]  # name, type with its typer.Option or typer.Argument, default
# How fields with several values are written
COLLECTION_PARSERS: dict[Any, tuple[Any, str]] = {tuple: (parse_list, "A,B"), dict: (parse_pairs, "A=B,C=D")}


def parameters_of(section: type, panel: str, flags: dict[str, str], leave_out: Sequence[str] = ()) -> list[Parameter]:
    """An option for each field of a dataclass, None where it is not given; its help is the field's description.

    `panel`: the heading in --help. `flags`: names of options where they differ from the field's. Fields with several
    values are written `a,b`, those with names and values `a=b,c=d`.
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
    """A command with these parameters, to be registered with typer: `run` gets their values by name.

    Typer reads the parameters of a callable and calls it with keywords. The callable is a dataclass, because a function
    cannot be given parameters without `**kwargs`, which would accept any name.
    """

    def __post_init__(self: Any) -> None:  # noqa: N807
        run(dict(vars(self)))

    return make_dataclass(name, parameters, namespace={"__doc__": description, "__post_init__": __post_init__})
