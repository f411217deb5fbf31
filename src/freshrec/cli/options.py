"""Options that several commands share, and parsers of their values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from freshrec.data.formats import FORMATS
from freshrec.data.source_columns import COLUMN_ALIASES
from freshrec.errors import OptionError
from freshrec.user_modules import ALLOW_IMPORT, import_allowed

SIGN_KEY_VARIABLE = "FRESHREC_SIGN_KEY_FILE"  # environment variable: the same as --sign-key-file

LogPath = Annotated[
    Path, typer.Argument(metavar="LOG", help="CSV (.csv, .csv.gz), Parquet (file or folder) or JSON lines.")
]
Columns = Annotated[
    str,
    typer.Option(help=f"Your column names, such as user_id=uid,item_id=sku. Columns: {', '.join(COLUMN_ALIASES)}."),
]


FormatName = Annotated[str | None, typer.Option("--format", help=f"Name of a public format: {', '.join(FORMATS)}.")]
TimeFormat = Annotated[
    str | None,
    typer.Option(help="Format of the timestamps, such as %d.%m.%Y (default: ISO 8601, or numbers since 1970)."),
]
EventTypes = Annotated[str, typer.Option(help="Event types to read, such as pv,buy (default: all).")]
Separator = Annotated[
    str | None, typer.Option(help="Separator of a text file: a character, or tab, semicolon, pipe, comma or space.")
]
MinRating = Annotated[
    float | None, typer.Option(help="Keep only rows with at least this rating, in column rating or weight.")
]
Quarantine = Annotated[Path | None, typer.Option(help="Write bad rows to this .parquet or .csv file and continue.")]


def require_local_path(path: Path | None) -> Path | None:
    """Return the path. Raises OptionError for a URL: a store needs atomic renames, locks and fsync."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):
        url = re.sub(":/+", "://", str(path), count=1)  # a path keeps only one of the two slashes
        raise OptionError(f"{url} is a URL, but a store must be in a local folder. Pass --store DIR.")
    return path


StoreOption = typer.Option("--store", metavar="DIR", callback=require_local_path, help="Folder of the store.")


StorePath = Annotated[Path, StoreOption]


def allow_imports(modules: list[str] | None) -> list[str]:
    """Import the modules that the user allows, and return their names. Raises OptionError if one does not exist."""
    names = [name for text in modules or () for name in parse_list(text)]
    import_allowed(names, ALLOW_IMPORT)
    return names


AllowImport = Annotated[
    list[str] | None,
    typer.Option(
        ALLOW_IMPORT,
        metavar="MODULE",
        callback=allow_imports,
        help="Import this module, which defines a custom model or strategy of the store. May be repeated.",
    ),
]
SignKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--sign-key-file",
        metavar="FILE",
        envvar=SIGN_KEY_VARIABLE,
        help="File with a secret key: sign what is written, and refuse files of the store without its signature.",
    ),
]
Jobs = Annotated[int, typer.Option(help="Number of processes, with one thread each.")]
JOBS = 1
ReasonOption = Annotated[str, typer.Option(help="Reason, stored in the history.")]
WaitOption = Annotated[str, typer.Option(help="Time to wait while another process changes the store, such as 10m.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def parse_pairs(text: str) -> dict[str, str]:
    """Parse `a=b,c=d` into a dict. Raises OptionError if a part is not a pair."""
    found = {}
    for pair in parse_list(text):
        name, equals, source_name = pair.partition("=")
        if not (name and equals and source_name):
            raise OptionError(f'"{pair[:60]}" is not a pair of column names. Write --columns user_id=uid,item_id=sku.')
        found[name.strip()] = source_name.strip()
    return found


def parse_list(text: str) -> list[str]:
    """Parse `a,b` into a list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def parse_duration(text: str, flag: str) -> int:
    """Parse `90s`, `10m` or `2h` into seconds. Raises OptionError, which names the `flag`, for anything else."""
    number, unit = text[:-1], {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    if unit is None or not number.isdecimal() or not int(number):
        fault = "has no unit" if text.isdecimal() else "is not a duration"
        raise OptionError(f'{flag} is "{text[:60]}", which {fault}. Write 90s, 10m or 2h.')
    return int(number) * unit
