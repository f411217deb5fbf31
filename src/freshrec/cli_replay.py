"""`freshrec replay` and `freshrec demo`: options -> recipe -> cells, a live table while they run, and the results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from freshrec.cli_options import pairs, words
from freshrec.errors import OptionError

if TYPE_CHECKING:
    import polars as pl

    from freshrec.recipes import Recipe


def demo(
    out: Annotated[Path, typer.Option(help="Where results go; what is there already is not run again.")] = Path(
        "runs/demo"
    ),
    jobs: Annotated[int, typer.Option(help="Processes, one thread each.")] = 1,
) -> None:
    """Replay a generated world in which users gain interests, and say in words what the table shows."""
    from freshrec.report.board import Board
    from freshrec.report.demo import cells, demo, world

    spans = world()
    board = Board(cells(), [span.index for span in spans.cut.spans[1:]], out, Console(stderr=True))
    with board.live():
        text = demo(spans, out, board.tell, jobs)
    typer.echo(text)


def replay(
    log: Annotated[str, typer.Argument(metavar="[LOG]", help="The log; or --world, or log.path in a recipe.")] = "",
    recipe_file: Annotated[Path | None, typer.Option("--recipe", help="A TOML recipe; options override it.")] = None,
    world: Annotated[str | None, typer.Option(help="Replay a generated world instead of a log.")] = None,
    models: Annotated[str | None, typer.Option(help="Models, with options as in comirec-dr:k=1,sasrec.")] = None,
    strategies: Annotated[str | None, typer.Option(help="Strategies, as in finetune,imsr:retain.weight=1.")] = None,
    by: Annotated[str | None, typer.Option(help="How the log is cut: count, time, count-alpha, period, ...")] = None,
    spans: Annotated[int | None, typer.Option(help="Spans after the base block.")] = None,
    alpha: Annotated[float | None, typer.Option(help="The base block's share of the log.")] = None,
    dates: Annotated[str | None, typer.Option(help="Where spans start, for --by dates: 2025-06-01,2025-07-01.")] = None,
    targets: Annotated[str | None, typer.Option(help="What is tested: last, three, all or split.")] = None,
    n_targets: Annotated[int | None, typer.Option(help="Test about so many of a span, of random users.")] = None,
    heldout: Annotated[str | None, typer.Option(help="When held-out events join training: now, next or never.")] = None,
    min_events: Annotated[int | None, typer.Option(help="Leave out users with fewer events.")] = None,
    min_history: Annotated[int | None, typer.Option(help="Events a user needs before a target.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Training seeds.")] = None,
    cadence: Annotated[
        str | None, typer.Option(help="Blocks to a span; counters learn after each. 1,4 for both.")
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="As in ndcg@20,hr@10.")] = None,
    data: Annotated[str | None, typer.Option(help="The folder where a recipe's log lies.")] = None,
    columns: Annotated[str | None, typer.Option(help="Our names and yours, as in user_id=uid.")] = None,
    log_format: Annotated[str | None, typer.Option("--format", help="A public format.")] = None,
    events: Annotated[str | None, typer.Option(help="The event types to keep.")] = None,
    users: Annotated[int | None, typer.Option(help="Keep a seeded sample of this many users.")] = None,
    tune: Annotated[bool | None, typer.Option("--tune/--no-tune", help="Choose knobs on the span before.")] = None,
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("runs/replay"),
    jobs: Annotated[int, typer.Option(help="Processes, one thread each.")] = 1,
    device: Annotated[str, typer.Option(help="Where models train: cpu, cuda.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --out.")] = False,
    plan_only: Annotated[bool, typer.Option("--plan", help="Print spans and estimated time, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the path and a summary as JSON.")] = False,
) -> None:
    """Compare ways of updating on your own log, span by span."""
    given: dict[str, dict[str, Any]] = {
        "log": {
            "path": log or None, "folder": data, "world": world, "format": log_format, "users": users,
            "events": _maybe(words, events), "columns": _maybe(pairs, columns),
        },
        "spans": {
            "by": by, "spans": spans, "alpha": alpha, "dates": _maybe(words, dates), "targets": targets,
            "heldout": heldout, "min_events": min_events, "n_targets": n_targets,
        },
        "replay": {
            "models": _maybe(words, models), "strategies": _maybe(words, strategies), "seeds": seeds,
            "cadence": _maybe(words, cadence), "metrics": _maybe(words, metrics), "tune": tune,
            "min_history": min_history,
        },
    }  # fmt: skip
    recipe = resolved(recipe_file, given)
    if plan_only:
        _plan(recipe)
    else:
        _run(recipe, out, jobs, device, resume, as_json)


def _maybe(parse: Callable[[str], Any], text: str | None) -> Any:
    """What was not given stays None."""
    return None if text is None else parse(text)


def resolved(file: Path | None, given: dict[str, dict[str, Any]]) -> Recipe:
    """The recipe in `file`, or the default one, with what was given on the command line."""
    from freshrec.recipes import Recipe, load_recipe, recipe_from

    path, world = given["log"]["path"], given["log"]["world"]
    if path and world:
        raise OptionError(f"a replay is of one log, and both {path} and --world {world} are given; drop one.")
    tables = (load_recipe(file) if file else Recipe()).model_dump()
    if path or world:
        tables["log"] |= {"path": "", "folder": "", "world": ""}  # those of the file give way
    for part, options in given.items():
        tables[part] |= {name: value for name, value in options.items() if value is not None}
    return recipe_from(tables)


def _plan(recipe: Recipe) -> None:
    """Say what would run, and how long it would take."""
    from freshrec.data.spans import plan
    from freshrec.recipes import cells_of, cut_of, settings_of
    from freshrec.replay.plan import estimate
    from freshrec.report.board import print_estimate, print_plan

    cells, settings, cut, console = cells_of(recipe), settings_of(recipe), cut_of(recipe), Console()
    print_plan(console, cells, plan(cut), cut.notes)
    print_estimate(console, estimate(cells, cut, settings))


def _run(recipe: Recipe, out: Path, jobs: int, device: str, resume: bool, as_json: bool) -> None:
    """Run what is not done yet, and write and print the results."""
    from freshrec.data.spans import plan
    from freshrec.recipes import cells_of, cut_of, settings_of
    from freshrec.replay.measure import facts
    from freshrec.replay.results import collect
    from freshrec.replay.run import run
    from freshrec.report.board import Board, print_plan

    cells, settings, cut, part = cells_of(recipe), settings_of(recipe), cut_of(recipe), recipe.replay
    if part.from_span >= len(cut.spans):
        raise OptionError(f"replay.from_span is {part.from_span}, and the last span is {len(cut.spans) - 1}: lower it.")
    console = Console(stderr=True)
    _prepare(out, recipe, resume)
    if not as_json:
        print_plan(console, cells, plan(cut), cut.notes)
    metric = "AUC" if recipe.log.exposures else "ndcg@20"
    board = Board(cells, [span.index for span in cut.spans[1:]], out, console, metric)
    try:
        with board.live():
            run(cells, cut, settings, out, jobs=jobs, device=device, tell=board.tell)
    except KeyboardInterrupt:
        console.print(f"finished spans are kept in {out}: the same command with --resume goes on.", markup=False)
        raise
    if recipe.log.exposures:  # AUC and log loss are those of a span's events, whoever's they are, and of all of them
        results = collect(cells, None, part.metrics, out, "targets", part.from_span)
    else:
        results = collect(cells, facts(cut.spans), part.metrics, out, part.mean, part.from_span)
    if as_json:
        typer.echo(json.dumps({"out": str(out), "summary": _summary(results)}))
        return
    typer.echo((out / "table.md").read_text())
    console.print(f"results.parquet, tests.parquet, recipe.toml and table.md are in {out}")


def _prepare(out: Path, recipe: Recipe, resume: bool) -> None:
    """Refuse to mix two replays in one folder."""
    from freshrec.recipes import load_recipe, save_recipe

    there = out / "recipe.toml"
    if there.exists():
        if not resume:
            raise OptionError(f"{out} holds a replay already: go on with --resume, or choose another --out.")
        kept = {
            "log": {"folder"},
            "replay": {"models", "strategies", "also", "controls", "seeds", "metrics", "mean", "from_span"},
        }
        if load_recipe(there).model_dump(exclude=kept) != recipe.model_dump(exclude=kept):
            raise OptionError(f"{out} holds a replay of another log or protocol: choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, there)


def _summary(results: pl.DataFrame) -> list[dict[str, Any]]:
    """The averages over all spans."""
    import polars as pl

    from freshrec.replay.results import OVERALL

    overall = results.filter((pl.col("span") == OVERALL) & (pl.col("slice") == "all"))
    return overall.select("model", "strategy", "seed", "metric", "value", "low", "high", "n").to_dicts()
