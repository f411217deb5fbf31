"""How answers are printed: tables and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Rows under their names; what is None stays empty.

    Ids are printed as they are, whatever they look like, and whole, however narrow the terminal.
    """
    table = Table(box=None)
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    Console(highlight=False).print(table)


def print_json(found: Any) -> None:
    """One line of JSON, in which a number that JSON does not know, such as infinity, is null."""
    typer.echo(json.dumps(_json_safe(found)))


def _json_safe(node: Any) -> Any:
    if isinstance(node, dict):
        return {name: _json_safe(child) for name, child in node.items()}
    if isinstance(node, list | tuple):
        return [_json_safe(child) for child in node]
    return None if isinstance(node, float) and not isfinite(node) else node
