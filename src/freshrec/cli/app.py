"""The command line: parse, call, print. Exit codes are those of the errors; 130 after Ctrl-C.

Commands import torch only when they run: `freshrec --help` and `freshrec list` answer in a fraction of a second.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from freshrec.cli import query, server, store, versions
from freshrec.cli.options import AsJson, Columns, EventTypes, FormatName, LogPath, Quarantine, parse_list, parse_pairs
from freshrec.cli.output import print_json
from freshrec.cli.replay import demo, replay
from freshrec.data.formats import FORMATS
from freshrec.data.log import read_log
from freshrec.data.validate import LogReport, validate_log
from freshrec.deprecation import replace_old_flags
from freshrec.errors import FreshrecError, OptionError, StateError, unknown_name_error
from freshrec.user_modules import IMPORTS, import_named
from freshrec.version import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def print_version(is_requested: bool) -> None:
    """Print the version and stop, where `--version` is given."""
    if is_requested:
        typer.echo(f"freshrec {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Update recommenders from new events only."""


SEARCH_FLAGS = {"--exact": "--exact-max-items", "--floor": "--min-recall", "--head": "--n-longest"}
OLD_FLAGS = {  # by the first word of a command: flags of 0.1.0, and their new names
    "recommend": {"--include-seen": "--no-exclude-seen"},
    "update": {"--again": "--retry"},
    "serve": SEARCH_FLAGS,
    "bench": SEARCH_FLAGS,
}
OWN_NAMES = {  # how to name what is no part of freshrec
    "models": "Your own model is named as in my_model:MyModelSpec:hours=2.",
    "strategies": "Your own strategy is named as in my_strategy:MyStrategy:keep=0.3.",
}
LISTED_KINDS = ("models", "strategies", "metrics", "worlds", "formats")


def validate(
    log: LogPath,
    columns: Columns = "",
    format_name: FormatName = None,
    events: EventTypes = "",
    quarantine: Quarantine = None,
    as_json: AsJson = False,
) -> None:
    """Check a log: its size, its faults, and how to cut it into spans."""
    names, event_types = parse_pairs(columns), parse_list(events)
    report = validate_log(read_log(log, columns=names, format=format_name, events=event_types, quarantine=quarantine))
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
    else:
        _print_report(report, log.name)


def list_names(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=f"What to list: {', '.join(LISTED_KINDS)}.")],
    as_json: AsJson = False,
) -> None:
    """List models, strategies, metrics, worlds or formats, with a line on each."""
    lines = describe_names(kind)
    width = max(map(len, lines))
    typer.echo(json.dumps(lines, indent=2) if as_json else "\n".join(f"{n:<{width}}  {t}" for n, t in lines.items()))
    if not as_json and kind in OWN_NAMES:
        typer.echo(f"{OWN_NAMES[kind]} CONTRIBUTING.md and docs/examples show how to write one.", err=True)


GROUPS: dict[str, tuple[Callable[..., None], ...]] = {  # the headings of `freshrec --help`, and the commands below each
    "Update a store": (store.fit, store.update),
    "Ask a store": (query.recommend, query.similar, query.explain, query.inspect),
    "Operate a store": (
        query.status,
        versions.history,
        query.diff,
        versions.promote,
        versions.rollback,
        versions.erase,
        versions.gc,
        query.doctor,
    ),
    "Serve": (server.serve, server.export),
    "Compare ways of updating": (validate, replay, demo, list_names),
}
NAMES = {list_names: "list"}  # of commands whose functions are called otherwise

for group, commands in GROUPS.items():
    for command in commands:
        app.command(NAMES.get(command), rich_help_panel=group)(command)
app.add_typer(server.bench, name="bench", rich_help_panel="Serve")


def describe_names(kind: str) -> dict[str, str]:
    """Each name with what its own code says of it. OptionError for an unknown kind."""
    from freshrec.data.synthetic import WORLDS

    if kind == "formats":
        return {name: log_format.description for name, log_format in FORMATS.items()}
    if kind == "worlds":
        return {name: _first_line(world.__doc__) for name, world in WORLDS.items()}
    if kind == "metrics":
        from freshrec.replay.metrics import METRICS

        return {f"{name}@k": metric.description for name, metric in METRICS.items()}
    if kind in ("models", "strategies"):  # written by docs/generate.py, because importing them imports torch
        listed: dict[str, str] = json.loads(files("freshrec").joinpath("names.json").read_text())[kind]
        return listed
    raise unknown_name_error("list", kind, LISTED_KINDS)


def _first_line(doc: str | None) -> str:
    return (doc or "").partition("\n")[0]


def _print_report(report: LogReport, name: str) -> None:
    fields_shown = {
        "rows": f"{report.rows:,}",
        "users": f"{report.users:,}",
        "items": f"{report.items:,}",
        "time": f"{report.first} .. {report.last}" if report.first else "no timestamps",
        "unit": report.unit,
        "periods": None if report.periods is None else f"{report.periods:,}",
        "duplicates": "unknown without timestamps" if report.duplicates is None else f"{report.duplicates:,}",
        "ties": "unknown without timestamps" if report.ties is None else f"{report.ties:.1%} of the rows",
        "out of order": f"{report.out_of_order:.1%} of the rows",
        "repeats": f"{report.repeats:.1%} of the rows",
        "exposures": f"{report.exposures:.1%} of the rows" if report.exposures else None,
        "nulls": ", ".join(f"{column} {n:,}" for column, n in report.nulls.items()) or "none",
        "bad rows": f"{report.bad_rows:,} in quarantine" if report.bad_rows else "none",
        "suggested": f"{report.suggested_spans} spans after the base block (--by {report.suggested_by})",
    }
    table = Table.grid(padding=(0, 2))
    for fact, value in fields_shown.items():
        if value is not None:
            table.add_row(Text(fact, style="bold"), Text(value))
    console = Console(highlight=False)
    console.print(Text(name, style="bold"))
    console.print(table)
    for note in report.notes:
        console.print(Text(f"note: {note}", style="dim"))
    for warning in report.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))


def import_own_modules() -> None:
    """Import the modules that the environment names: a store opens only when those of its own classes are imported.

    The user names them, not the store, so that a store from elsewhere cannot choose what code runs.
    """
    for module in filter(None, os.environ.get(IMPORTS, "").split(",")):
        try:
            import_named(module.strip())
        except ImportError as problem:
            raise OptionError(f"{IMPORTS} names {module}, which cannot be imported ({problem}); correct it.") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. What is raised on purpose becomes one line on stderr, for all commands.

    With --json, stdout holds one piece of JSON in any case: the error, where the command has no other answer.
    """
    given_arguments = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in given_arguments
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", FutureWarning)  # of former names of options
            warnings.showwarning = lambda message, *_: _warn(str(message))
            import_own_modules()
            app(args=replace_old_flags(given_arguments, OLD_FLAGS, _warn), prog_name="freshrec")
    except FreshrecError as error:
        return _report_failure(str(error), error.exit_code, as_json, error.json_output)
    except OSError as problem:
        where, reason = problem.filename or "a file", problem.strerror or str(problem)
        advice = "see that it is there, that it may be used, and that the disk has room"
        return _report_failure(
            f"{where} cannot be read or written ({reason}); {advice}.", StateError.exit_code, as_json
        )
    except SystemExit as stop:
        if stop.code == 130:
            return _report_failure("", 130, as_json)
        if stop.code == OptionError.exit_code and as_json:
            print_json({"error": "there is no such command, option or value; see --help.", "exit_code": stop.code})
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return _report_failure("", 130, as_json)
    return 0


def _warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr)  # noqa: T201


def _report_failure(message: str, code: int, as_json: bool, answer: Any = None) -> int:
    """Say why a command ended early; its exit code."""
    print(f"error: {message}" if message else "interrupted", file=sys.stderr)  # noqa: T201
    if as_json:
        print_json({"error": message or "interrupted", "exit_code": code} if answer is None else answer)
    return code


if __name__ == "__main__":
    sys.exit(main())
