"""The command line: parse, call, print. An error sets its own exit code; Ctrl-C gives 130.

Commands import torch only when they run: `freshrec --help` and `freshrec list` answer in a fraction of a second.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from freshrec.cli import query, server, store, versions
from freshrec.cli.id_arguments import separate_ids
from freshrec.cli.options import (
    AsJson,
    Columns,
    EventTypes,
    FormatName,
    LogPath,
    MinRating,
    Quarantine,
    Separator,
    TimeFormat,
    parse_list,
    parse_pairs,
)
from freshrec.cli.output import print_json, print_labelled, print_wrapped
from freshrec.cli.pipes import closed_pipes_ignored
from freshrec.cli.replay import demo, replay
from freshrec.data.formats import FORMATS
from freshrec.data.log import read_log
from freshrec.data.validate import LogReport, format_percent, validate_log
from freshrec.deprecation import replace_old_flags
from freshrec.errors import FreshrecError, OptionError, StateError, unknown_name_error
from freshrec.memory_limits import naming_memory_shortage, require_address_space
from freshrec.text_layout import format_count
from freshrec.user_modules import IMPORTS, import_allowed
from freshrec.version import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def print_version(is_requested: bool) -> None:
    """Print the version and exit if `--version` is given."""
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
OLD_FLAGS = {  # first word of a command -> {flag of 0.1.0: current flag}
    "recommend": {"--include-seen": "--no-exclude-seen"},
    "update": {"--again": "--retry"},
    "serve": SEARCH_FLAGS,
    "bench": SEARCH_FLAGS,
}
ID_COMMANDS = ("recommend", "similar", "explain", "inspect", "erase")  # their arguments are ids
OWN_NAMES = {  # how to name a custom model or strategy
    "models": "Name your own model by its module and class, such as my_model:MyModelSpec:hours=2.",
    "strategies": "Name your own strategy by its module and class, such as my_strategy:MyStrategy:keep=0.3.",
}
LISTED_KINDS = ("models", "strategies", "metrics", "worlds", "formats", "recipes")


def validate(
    log: LogPath,
    columns: Columns = "",
    format_name: FormatName = None,
    time_format: TimeFormat = None,
    events: EventTypes = "",
    separator: Separator = None,
    min_rating: MinRating = None,
    quarantine: Quarantine = None,
    as_json: AsJson = False,
) -> None:
    """Check a log: count what it holds, warn of problems, and suggest how to split it into spans."""
    names, event_types = parse_pairs(columns), parse_list(events)
    found = read_log(
        log,
        columns=names,
        format=format_name,
        events=event_types,
        separator=separator,
        min_rating=min_rating,
        quarantine=quarantine,
        time_format=time_format,
    )
    report = validate_log(found)
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
    else:
        given = {"--columns": columns, "--format": format_name, "--time-format": time_format, "--events": events}
        given["--separator"], given["--min-rating"] = separator, "" if min_rating is None else f"{min_rating:g}"
        options = [word for flag, value in given.items() if value for word in (flag, value)]
        _print_report(report, log, options, quarantine)


def list_names(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=f"Names to list: {', '.join(LISTED_KINDS)}.")],
    as_json: AsJson = False,
) -> None:
    """List models, strategies, metrics, worlds, formats or recipes, with a line about each."""
    lines = describe_names(kind)
    if as_json:
        typer.echo(json.dumps(lines, indent=2))
        return
    width = max(map(len, lines))
    for name, text in lines.items():
        sentence = text.partition(" [")[0]  # docs/reference.md lists the options in brackets
        print_labelled([(name, sentence)], label_width=width + 2, indent="")
    if kind in OWN_NAMES:
        print_wrapped(f"{OWN_NAMES[kind]} CONTRIBUTING.md and docs/examples show how to write one.", to_stderr=True)


GROUPS: dict[str, tuple[Callable[..., None], ...]] = {  # the headings of `freshrec --help`, and the commands below each
    "Update a store": (store.fit, store.update),
    "Query a store": (query.recommend, query.similar, query.explain, query.inspect),
    "Operate a store": (
        query.status,
        versions.history,
        query.diff,
        versions.promote,
        versions.rollback,
        versions.erase,
        versions.gc,
        versions.sign,
        query.doctor,
    ),
    "Serve": (server.serve, server.export),
    "Compare ways of updating": (validate, replay, demo, list_names),
}
NAMES = {list_names: "list"}  # commands that are named differently from their function

for group, commands in GROUPS.items():
    for command in commands:
        app.command(NAMES.get(command), rich_help_panel=group)(command)
app.add_typer(server.bench, name="bench", rich_help_panel="Serve")


def describe_names(kind: str) -> dict[str, str]:
    """Return name -> description for one kind of names. Raises OptionError for an unknown kind."""
    from freshrec.data.synthetic import WORLDS

    if kind == "formats":
        return {name: log_format.description for name, log_format in FORMATS.items()}
    if kind == "worlds":
        return {name: _first_line(world.__doc__) for name, world in WORLDS.items()}
    if kind == "recipes":
        from freshrec.replay.recipe_files import describe_recipes

        return describe_recipes()
    if kind == "metrics":
        from freshrec.replay.metrics import METRICS

        return {f"{name}@k": metric.description for name, metric in METRICS.items()}
    if kind in ("models", "strategies"):  # from a generated file, because importing them would import torch
        listed: dict[str, str] = json.loads(files("freshrec").joinpath("names.json").read_text())[kind]
        return listed
    raise unknown_name_error("list", kind, LISTED_KINDS)


def _first_line(doc: str | None) -> str:
    return (doc or "").partition("\n")[0]


SUGGESTED_SPLITS = {  # rule -> description of its spans
    "period": "one span per period",
    "count-alpha": "half of the rows, then spans of equal duration",
    "count": "half of the rows, then spans with equal numbers of rows",
}
REPORT_LABEL_WIDTH = 18  # columns
CLICK_MODEL, CLICK_STRATEGIES = "embedding-mlp", "frozen,finetune,full"  # for a replay of a log with exposures


def _print_report(report: LogReport, path: Path, options: Sequence[str], quarantine: Path | None) -> None:
    """Print a report, its notes and warnings, and the next commands. `options` are the flags that read the log."""
    typer.secho(path.name, bold=True)
    print_labelled(_report_lines(report).items(), REPORT_LABEL_WIDTH, indent="")
    for note in report.notes:
        print_wrapped(f"Note: {note}")
    for warning in report.warnings:
        print_wrapped(f"Warning: {warning}", color="yellow")
    typer.echo("\n" + "\n".join(_next_commands(report, shlex.join([str(path), *options]), quarantine)))


def _next_commands(report: LogReport, log: str, quarantine: Path | None) -> list[str]:
    """Return the commands that can read the log, below a line about them. A replay cannot read a log with bad rows."""
    fit = f"  freshrec fit {log} --store shop"
    if report.bad_rows and quarantine is not None:
        fit += f" {shlex.join(['--quarantine', str(quarantine)])}"
    if report.bad_rows or not report.suggested_spans:
        advice = ["A replay needs a log without bad rows. Fix them first."] if report.bad_rows else []
        return ["Next, make the first version of a store:", fit, *advice]
    split = f"--by {report.suggested_by} --spans {report.suggested_spans} --plan"
    replays = [f"  freshrec replay {log} {split}"]
    if report.exposures:
        clicks = f"--exposures --models {CLICK_MODEL} --strategies {CLICK_STRATEGIES}"
        replays.append(f"  freshrec replay {log} {clicks} {split}")
    head = "Next, look at the spans of a replay and its estimated time, or make the first version of a store:"
    return [head, *replays, fit]


def _report_lines(report: LogReport) -> dict[str, str]:
    """Return the numbers of a report in words, by label."""
    rows, share, unknown = partial(format_count, noun="row"), format_percent, "unknown: the log has no timestamps"
    if 0 < report.missing_timestamps < report.rows:
        unknown = f"unknown: {report.missing_timestamps:,} of {rows(report.rows)} have no timestamp"
    by, n_spans = report.suggested_by, report.suggested_spans
    lines = {"Rows": f"{report.rows:,}", "Users": f"{report.users:,}", "Items": f"{report.items:,}"}
    lines["Time range"] = lines["Same-time events"] = unknown
    lines["Duplicates"] = "none: without a timestamp in every row, each row is an event of its own."
    if report.first:
        lines["Time range"] = f"{report.first} to {report.last}"
    if report.periods is not None:
        lines["Periods"] = f"{report.periods:,}"
    if report.duplicates is not None:
        lines["Duplicates"] = (
            f"{rows(report.duplicates)} with the event_id, or user, item and timestamp, of another row."
        )
    if report.ties is not None:
        lines["Same-time events"] = (
            f"{share(report.ties)} of rows share user and timestamp with another row; their order in the file is kept."
        )
    lines["Out of order"] = f"{share(report.out_of_order)} of rows come after a later row in the file; they are sorted."
    lines["Repeats"] = f"{share(report.repeats)} of rows repeat an item of the same user."
    if report.exposures:
        lines["Exposures"] = f"{share(report.exposures)} of rows are items that were shown but not clicked (label 0)."
    nulls = {"timestamp": report.missing_timestamps} | report.nulls
    missing_values = [f"{name} in {n:,} of {rows(report.rows)}" for name, n in nulls.items() if n]
    lines["Missing values"] = ", ".join(missing_values) or "none"
    lines["Bad rows"] = f"{rows(report.bad_rows)}, written to the quarantine file" if report.bad_rows else "none"
    spans = f"a base block and {format_count(n_spans, 'span')}, by {by} ({SUGGESTED_SPLITS[by]})"
    return lines | {"Suggested split": spans if n_spans else "none: the log cannot be split into spans"}


def import_own_modules() -> None:
    """Import the modules that FRESHREC_IMPORT names. A store with custom classes opens only if they are imported.

    The user names the modules, not the store, so that a store from elsewhere cannot choose what code runs.
    """
    import_allowed(parse_list(os.environ.get(IMPORTS, "")), IMPORTS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. Errors that freshrec raises on purpose become one line on stderr.

    With --json, stdout always holds one JSON value: the error, if the command has no other answer. If the reader of
    stdout or stderr goes away, as in `freshrec history | head -1`, the command completes its work.
    """
    with closed_pipes_ignored():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    given_arguments = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in given_arguments
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", FutureWarning)  # of former names of options
            warnings.showwarning = lambda message, *_: _warn(str(message))
            with naming_memory_shortage():
                require_address_space(given_arguments)
                import_own_modules()
                app(args=_separate_ids(replace_old_flags(given_arguments, OLD_FLAGS, _warn)), prog_name="freshrec")
    except FreshrecError as error:
        return _report_failure(str(error), error.exit_code, as_json, error.json_output)
    except OSError as problem:
        where, reason = problem.filename or "a file", problem.strerror or str(problem)
        advice = "Check the path, its permissions and the free disk space."
        return _report_failure(f"{where} cannot be read or written ({reason}). {advice}", StateError.exit_code, as_json)
    except SystemExit as stop:
        if stop.code == 130:
            return _report_failure("", 130, as_json)
        if stop.code == OptionError.exit_code and as_json:
            print_json({"error": "There is no such command, option or value. See --help.", "exit_code": stop.code})
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return _report_failure("", 130, as_json)
    return 0


def _separate_ids(arguments: list[str]) -> list[str]:
    """Let commands take ids that start with `-`. Other arguments stay as they are."""
    is_special = any(re.match("-[^-]", word) for word in arguments)
    if not is_special or arguments[0] not in ID_COMMANDS:
        return arguments
    commands: Any = typer.main.get_command(app)
    return arguments[:1] + separate_ids(arguments[1:], commands.commands[arguments[0]].params)


def _warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr)  # noqa: T201


def _report_failure(message: str, code: int, as_json: bool, answer: Any = None) -> int:
    """Print why a command ended early, and return its exit code."""
    print(f"error: {message}" if message else "interrupted", file=sys.stderr)  # noqa: T201
    if as_json:
        print_json({"error": message or "interrupted", "exit_code": code} if answer is None else answer)
    return code


if __name__ == "__main__":
    sys.exit(main())
