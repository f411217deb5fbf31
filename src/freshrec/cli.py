"""The command line: parse, call, print. Exit codes are those of the errors; 130 after Ctrl-C."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from freshrec.cli_options import pairs, seconds, words
from freshrec.cli_replay import demo, replay
from freshrec.data.formats import FORMATS
from freshrec.data.log import ALIASES, read_log
from freshrec.data.validate import Report
from freshrec.data.validate import validate as report_of
from freshrec.errors import FreshrecError, OptionError, unknown

if TYPE_CHECKING:
    from freshrec.serve.recommender import Recommender

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
KINDS = ("models", "strategies", "metrics", "worlds", "formats")


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


@app.command()
def fit(
    log: LogPath,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the recommender is saved.")],
    model: Annotated[str, typer.Option(help="See `freshrec list models`.")] = "blend",
    strategy: Annotated[str | None, typer.Option(help="How updates learn; see `freshrec list strategies`.")] = None,
    columns: Columns = "",
    format_name: FormatName = None,
    events: EventTypes = "",
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    budget: Annotated[str, typer.Option(help="Time for the blend's training, as in 90s, 10m or 2h.")] = "",
    as_json: AsJson = False,
) -> None:
    """Learn from a whole log, once; after that `update` needs the new events only."""
    from freshrec.serve.recommender import Recommender, check_folder
    from freshrec.strategies.refit import SPEED

    check_folder(out)
    if budget and model.partition(":")[0] != "blend":
        raise OptionError(f'--budget sizes the blend; "{model}" trains as its options say, as in fit.base_epochs=5.')
    if budget:
        strategy = f"{strategy or 'refit'}:passes={seconds(budget) * SPEED}"
    since, recommender = time.perf_counter(), Recommender(model, strategy, seed)
    recommender.fit(log, columns=pairs(columns), format=format_name, events=words(events)).save(out)
    _print_learnt(recommender, {}, time.perf_counter() - since, out, as_json)


@app.command()
def update(
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Events newer than all before; read as the log was.")],
    at: Annotated[Path, typer.Option(metavar="DIR", help="The recommender to update.")],
    as_json: AsJson = False,
) -> None:
    """Learn from new events; only the new rows are needed."""
    from freshrec.serve.recommender import Recommender

    since, recommender = time.perf_counter(), Recommender.load(at)
    before = recommender.sizes()
    recommender.update(new).save(at)
    _print_learnt(recommender, before, time.perf_counter() - since, at, as_json)


def _print_learnt(recommender: Recommender, before: dict[str, int], wait_s: float, folder: Path, as_json: bool) -> None:
    """What a fit or an update has learnt from: new events, users and items."""
    model, strategy = recommender.names
    new = {name: n - before.get(name, 0) for name, n in recommender.sizes().items()}
    if as_json:
        typer.echo(json.dumps({"dir": str(folder), "model": model, "strategy": strategy, **new, "wait_s": wait_s}))
        return
    done, kind = ("updated", "new ") if before else ("fitted", "")
    what = f"{new['events']:,} events, {new['users']:,} {kind}users, {new['items']:,} {kind}items"
    typer.echo(f"{done} {model} by {strategy}: {what}; {wait_s:.1f} s; saved in {folder}")


@app.command()
def recommend(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A recommender that `fit` has saved.")],
    users: Annotated[list[str], typer.Argument(metavar="USER...", help="User ids; an unknown one gets popular items.")],
    k: Annotated[int, typer.Option(help="Items a user.")] = 10,
    allow: Annotated[str | None, typer.Option(help="Only these items, as in 17,42.")] = None,
    deny: Annotated[str | None, typer.Option(help="None of these items.")] = None,
    include_seen: Annotated[bool, typer.Option("--include-seen", help="Also what the user has had.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the best items of some users."""
    from freshrec.serve.recommender import Recommender

    lists = [None if text is None else words(text) for text in (allow, deny)]
    found = Recommender.load(folder).recommend(users, k, not include_seen, *lists)
    if as_json:
        typer.echo(json.dumps(found.to_dicts()))
        return
    table = Table("user", "rank", "item", "score", "fallback", box=None)
    for user, item, score, rank, fallback in found.iter_rows():
        table.add_row(*(Text(str(cell)) for cell in (user, rank, item, f"{score:.4g}", fallback or "")))
    Console(highlight=False).print(table)


@app.command()
def explain(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A blend that `fit` has saved.")],
    user: Annotated[str, typer.Argument(metavar="USER")],
    item: Annotated[str, typer.Argument(metavar="ITEM")],
    as_json: AsJson = False,
) -> None:
    """Print why a user is offered an item: which experts put it there, and by which past event."""
    from freshrec.serve.recommender import Recommender

    found = Recommender.load(folder).explain(user, item)
    if as_json:
        typer.echo(json.dumps(found.to_dicts()))
        return
    if found.is_empty():
        typer.echo(f"{item} is not offered to {user}")
        return
    table = Table("source", "place", "points", "because of", box=None)
    for source, place, points, because in found.iter_rows():
        table.add_row(*(Text(cell) for cell in (source, str(place or ""), f"{points:+.2f}", str(because or ""))))
    Console(highlight=False).print(table)


app.command()(replay)
app.command()(demo)


@app.command("list")
def list_names(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=f"What to list: {', '.join(KINDS)}.")],
    as_json: AsJson = False,
) -> None:
    """List models, strategies, metrics, worlds or formats, with a line on each."""
    lines = lines_of(kind)
    width = max(map(len, lines))
    typer.echo(json.dumps(lines, indent=2) if as_json else "\n".join(f"{n:<{width}}  {t}" for n, t in lines.items()))


def lines_of(kind: str) -> dict[str, str]:
    """Each name with what its own code says of it. OptionError for an unknown kind."""
    from freshrec.data.worlds import WORLDS

    if kind == "formats":
        return {name: form.about for name, form in FORMATS.items()}
    if kind == "worlds":
        return {name: _first_line(world.__doc__) for name, world in WORLDS.items()}
    if kind == "metrics":
        from freshrec.replay.metrics import METRICS

        return {f"{name}@k": metric.description for name, metric in METRICS.items()}
    if kind == "models":
        from freshrec.models import MODELS

        return {name: _line(spec, sys.modules[type(spec).__module__].__doc__) for name, spec in MODELS.items()}
    if kind == "strategies":
        from freshrec.strategies import STRATEGIES

        return {name: _line(strategy, type(strategy).__doc__) for name, strategy in STRATEGIES.items()}
    raise unknown("list", kind, KINDS)


def _line(instance: Any, doc: str | None) -> str:
    """The first line of what is said of a kind of thing, and how this one differs from the others."""
    return " ".join([_first_line(doc), *(f"[{option}]" for option in options_of(instance))])


def _first_line(doc: str | None) -> str:
    return (doc or "").partition("\n")[0]


def options_of(instance: Any) -> list[str]:
    """The fields in which a dataclass differs from its class's defaults, as one writes them: `fit.epochs=5`."""
    options = []
    for name in (field.name for field in fields(instance)):
        value, default = getattr(instance, name), getattr(type(instance)(), name)
        if is_dataclass(value):
            options += [] if type(value) is type(default) else [f"{name}={type(value).__name__}"]
            options += [f"{name}.{option}" for option in options_of(value)]
        elif value != default:
            options.append(f"{name}={'none' if value is None else value}")
    return options


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
