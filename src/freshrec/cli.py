"""The command line: parse, call, print. Exit codes are those of the errors; 130 after Ctrl-C."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from freshrec.data.formats import FORMATS
from freshrec.data.log import ALIASES, read_log
from freshrec.data.validate import Report
from freshrec.data.validate import validate as report_of
from freshrec.errors import FreshrecError, OptionError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def about() -> None:
    """Update recommenders from new events only."""


LogPath = Annotated[Path, typer.Argument(metavar="LOG", help="CSV(.gz), Parquet (file or folder) or JSON lines.")]
Columns = Annotated[str, typer.Option(help=f"Our names and yours, as in user_id=uid,... Ours: {', '.join(ALIASES)}.")]
FormatName = Annotated[str | None, typer.Option("--format", help=f"A public format: {', '.join(FORMATS)}.")]
EventTypes = Annotated[str, typer.Option(help="The event types to keep, as in pv,buy; all unless given.")]
Quarantine = Annotated[Path | None, typer.Option(help="Set bad rows aside in this .parquet or .csv file, and go on.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def validate(
    log: LogPath,
    columns: Columns = "",
    format_name: FormatName = None,
    events: EventTypes = "",
    quarantine: Quarantine = None,
    as_json: AsJson = False,
) -> None:
    """Say what a log holds, what is wrong with it, and how it could be cut into spans."""
    report = report_of(
        read_log(log, columns=pairs(columns), format=format_name, events=words(events), quarantine=quarantine)
    )
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
    else:
        _print_report(report, log.name)


def pairs(text: str) -> dict[str, str]:
    """`a=b,c=d` as a dict. OptionError for what is not a pair."""
    found = {}
    for pair in words(text):
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            raise OptionError(f'"{pair[:60]}" is not a pair of column names; write --columns user_id=uid,item_id=sku.')
        found[ours.strip()] = theirs.strip()
    return found


def words(text: str) -> list[str]:
    """`a,b` as a list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _print_report(report: Report, name: str) -> None:
    facts = {
        "rows": f"{report.rows:,}",
        "users": f"{report.users:,}",
        "items": f"{report.items:,}",
        "time": f"{report.first} .. {report.last}" if report.first else "no clock",
        "unit": report.unit,
        "periods": None if report.periods is None else f"{report.periods:,}",
        "duplicates": "unknown without a clock" if report.duplicates is None else f"{report.duplicates:,}",
        "ties": "unknown without a clock" if report.ties is None else f"{report.ties:.1%} of the rows",
        "out of order": f"{report.out_of_order:.1%} of the rows",
        "repeats": f"{report.repeats:.1%} of the rows",
        "exposures": f"{report.exposures:.1%} of the rows" if report.exposures else None,
        "nulls": ", ".join(f"{column} {n:,}" for column, n in report.nulls.items()) or "none",
        "bad rows": f"{report.bad_rows:,} set aside" if report.bad_rows else "none",
        "suggested": f"{report.suggested_spans} spans after the base block, cut by {report.suggested_by}",
    }
    table = Table.grid(padding=(0, 2))
    for fact, value in facts.items():
        if value is not None:
            table.add_row(Text(fact, style="bold"), Text(value))
    console = Console(highlight=False)
    console.print(Text(name, style="bold"))
    console.print(table)
    for note in report.notes:
        console.print(Text(f"note: {note}", style="dim"))
    for warning in report.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. What is raised on purpose becomes one line on stderr, for all commands."""
    try:
        app(args=arguments, prog_name="freshrec")
    except FreshrecError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except SystemExit as stop:
        if stop.code == 130:
            print("interrupted", file=sys.stderr)  # noqa: T201
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
