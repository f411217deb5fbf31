"""Options that several commands have, and how those with several values are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from freshrec.data.formats import FORMATS
from freshrec.data.log import COLUMN_ALIASES
from freshrec.errors import OptionError

LogPath = Annotated[Path, typer.Argument(metavar="LOG", help="CSV(.gz), Parquet (file or folder) or JSON lines.")]
Columns = Annotated[
    str, typer.Option(help=f"Our names and yours, as in user_id=uid,... Ours: {', '.join(COLUMN_ALIASES)}.")
]


FormatName = Annotated[str | None, typer.Option("--format", help=f"A public format: {', '.join(FORMATS)}.")]
EventTypes = Annotated[str, typer.Option(help="The event types to keep, as in pv,buy; all unless given.")]
Quarantine = Annotated[Path | None, typer.Option(help="Set bad rows aside in this .parquet or .csv file, and go on.")]


def require_local_path(path: Path | None) -> Path | None:
    """OptionError where it is a URL: what a store promises rests on renaming, locks and fsync."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):
        raise OptionError(f"{path} is a URL, and a store lies in a folder of this machine; copy whole versions there.")
    return path


StoreOption = typer.Option(
    "--store", metavar="DIR", callback=require_local_path, help="The folder of versions that `fit` makes."
)


StorePath = Annotated[Path, StoreOption]
Jobs = Annotated[int, typer.Option(help="Processes, one thread each.")]
JOBS = 1
ReasonOption = Annotated[str, typer.Option(help="Reason, stored in the history.")]
WaitOption = Annotated[
    str, typer.Option(help="How long to wait for another process that changes the store, as in 10m.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def parse_pairs(text: str) -> dict[str, str]:
    """`a=b,c=d` as a dict. OptionError for what is not a pair."""
    found = {}
    for pair in parse_list(text):
        name, equals, source_name = pair.partition("=")
        if not (name and equals and source_name):
            raise OptionError(f'"{pair[:60]}" is not a pair of column names; write --columns user_id=uid,item_id=sku.')
        found[name.strip()] = source_name.strip()
    return found


def parse_list(text: str) -> list[str]:
    """`a,b` as a list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def parse_duration(text: str) -> int:
    """`90s`, `10m` or `2h` in seconds. OptionError for anything else."""
    number, unit = text[:-1], {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    if unit is None or not number.isdecimal() or not int(number):
        raise OptionError(f'"{text[:60]}" is no time; write 90s, 10m or 2h.')
    return int(number) * unit
