"""Print answers: tables, labelled lines and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from math import isfinite
from shutil import get_terminal_size
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from freshrec.data.identities import json_id
from freshrec.text_layout import WIDTH, wrap_lines


def print_table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows below their names. None becomes an empty cell.

    Ids are printed unchanged, and in full even on a narrow terminal.
    """
    table = Table(box=None)
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    Console(highlight=False).print(table)


LABEL_WIDTH = 12  # characters


def print_labelled(lines: Iterable[tuple[str, str]], label_width: int = LABEL_WIDTH, indent: str = "  ") -> None:
    """Print each text after its label, wrapped at the width of the terminal, at most WIDTH characters."""
    for label, text in lines:
        typer.echo("\n".join(_wrap(f"{indent}{label:<{label_width}}", text)))


def print_wrapped(text: str, indent: str = "", to_stderr: bool = False, color: str | None = None) -> None:
    """Print a text, wrapped at the width of the terminal; lines after the first one are indented."""
    typer.secho("\n".join(_wrap("", text, indent)), err=to_stderr, fg=color)


def _wrap(start: str, text: str, indent: str = "") -> list[str]:
    return wrap_lines(text, _text_width(), start, indent or " " * len(start)) or [start.rstrip()]


def _text_width() -> int:
    """Return the width of the terminal, at most WIDTH; WIDTH for a pipe or a file, unless COLUMNS is set."""
    return min(WIDTH, get_terminal_size((WIDTH, 24)).columns)


def make_console(to_stderr: bool = False) -> Console:
    """Return a console as wide as the terminal; for a pipe or a file, as wide as all other texts."""
    console = Console(stderr=to_stderr)
    if not console.is_terminal:
        console.width = _text_width()
    return console


def print_json(found: Any) -> None:
    """Print one line of JSON. An integer beyond 2^53 becomes text, and infinity becomes null."""
    typer.echo(json.dumps(_json_safe(found)))


def _json_safe(node: Any) -> Any:
    if isinstance(node, dict):
        return {name: _json_safe(child) for name, child in node.items()}
    if isinstance(node, list | tuple):
        return [_json_safe(child) for child in node]
    if isinstance(node, int):
        return json_id(node)
    return None if isinstance(node, float) and not isfinite(node) else node
