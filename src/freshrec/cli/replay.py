"""The commands that compare: `replay` and `demo` make a recipe from options, run it and print the answer."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from freshrec.cli.options import JOBS, Jobs
from freshrec.cli.output import make_console, print_json
from freshrec.cli.parameters import Parameter, make_command, parameters_of
from freshrec.config import description_of, hints_of
from freshrec.errors import OptionError
from freshrec.replay.recipe_files import merge_tables
from freshrec.replay.recipe_schema import (
    FIRST_UPDATED_SPAN,
    LogRecipe,
    Recipe,
    default_metrics,
    load_recipe,
    parse_recipe,
    save_recipe,
)

if TYPE_CHECKING:
    import polars as pl


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results. Finished runs in it are not repeated.")] = Path(
        "runs/demo"
    ),
    jobs: Jobs = JOBS,
) -> None:
    """Replay a generated world in which users gain interests, and explain the result."""
    from freshrec.replay.demo import make_demo_cells, make_demo_world, run_demo
    from freshrec.replay.progress import ProgressBoard

    demo_world = make_demo_world()
    spans = [span.index for span in demo_world.split.spans[1:]]
    board = ProgressBoard(make_demo_cells(), spans, out, Console(stderr=True))
    with board.live():
        text = run_demo(demo_world, out, board.report_span, jobs)
    typer.echo(text)


OWN_PARAMETERS: list[Parameter] = [  # all other parameters are fields of a recipe
    (
        "path",
        Annotated[str | None, typer.Argument(metavar="[LOG]", help=description_of(hints_of(LogRecipe)["path"]))],
        None,
    ),
    (
        "recipe",
        Annotated[
            str | None,
            typer.Option(
                metavar="FILE|NAME",
                help="A TOML file, or a name of `freshrec list recipes`. Options override it.",
            ),
        ],
        None,
    ),
    ("out", Annotated[Path, typer.Option(help="Folder for the results.")], Path("runs/replay")),
    ("jobs", Jobs, JOBS),
    ("device", Annotated[str, typer.Option(help="Device for training: cpu or cuda.")], "cpu"),
    ("resume", Annotated[bool, typer.Option("--resume", help="Continue the replay in --out.")], False),
    (
        "plan_only",
        Annotated[bool, typer.Option("--plan", help="Print the spans and the estimated cost, then stop.")],
        False,
    ),
    (
        "as_json",
        Annotated[bool, typer.Option("--json", help="Print the folder and a summary, or the plan, as JSON.")],
        False,
    ),
]
PANELS = {"log": "The log", "spans": "Spans", "replay": "Comparison"}


def _parameters() -> list[Parameter]:
    """Return the parameters of the command itself, then one for each field of a recipe."""
    found = list(OWN_PARAMETERS)
    for section, kind in hints_of(Recipe).items():
        found += parameters_of(kind, PANELS[section], {"folder": "--data"}, leave_out=["path"])
    return found


def _replay(values: dict[str, Any]) -> None:
    """Resolve the recipe, then plan it or run it."""
    given = {section: {name: values[name] for name in hints_of(kind)} for section, kind in hints_of(Recipe).items()}
    recipe = resolve_recipe(values["recipe"], given)
    if values["plan_only"] and values["as_json"]:
        print_json(_plan(recipe))
    elif values["plan_only"]:
        _show_plan(recipe)
    else:
        run_recipe(recipe, values["out"], values["jobs"], values["device"], values["resume"], values["as_json"])


replay = make_command(
    "replay", "Compare ways of updating a model on your own log, span by span.", _parameters(), _replay
)


def resolve_recipe(file: str | Path | None, given: dict[str, dict[str, Any]]) -> Recipe:
    """Return the recipe that `file` names, or the default one, with the options of the command line."""
    path, world = given["log"].get("path"), given["log"].get("world")
    if path and world:
        raise OptionError(f"A replay uses one log, and both {path} and --world {world} are given. Remove one.")
    tables = asdict(load_recipe(file) if file else Recipe())
    if path or world:
        tables["log"] |= {"path": "", "folder": "", "world": ""}  # they replace those of the file
    if tables["replay"]["metrics"] == default_metrics(tables["log"]["exposures"]):
        del tables["replay"]["metrics"]  # the default depends on --exposures
    changes = {part: {k: v for k, v in options.items() if v is not None} for part, options in given.items()}
    return parse_recipe(merge_tables(tables, changes), "--{}")  # the file is valid, so an error is in an option


def _show_plan(recipe: Recipe) -> None:
    """Print the spans and the estimated time of the replay."""
    from freshrec.data.split import describe_spans
    from freshrec.replay.estimate import estimate_cost
    from freshrec.replay.progress import MeasuringLog, print_estimate, print_plan
    from freshrec.replay.recipes import load_split, make_cells, make_replay_settings, pairs_to_compare

    cells, settings, split, console = (
        make_cells(recipe),
        make_replay_settings(recipe),
        load_split(recipe),
        make_console(),
    )
    print_plan(console, len(cells), describe_spans(split), [*split.notes, *pairs_to_compare(recipe)[1]])
    print_estimate(console, estimate_cost(cells, split, settings, MeasuringLog()))


def _plan(recipe: Recipe) -> dict[str, Any]:
    """Return the plan of a replay: its spans, notes and number of runs, and CPU-s of each model with each strategy."""
    from freshrec.data.split import describe_spans
    from freshrec.replay.estimate import Range, estimate_cost
    from freshrec.replay.progress import MeasuringLog
    from freshrec.replay.recipes import load_split, make_cells, make_replay_settings, pairs_to_compare

    cells, settings, split = make_cells(recipe), make_replay_settings(recipe), load_split(recipe)
    estimates = estimate_cost(cells, split, settings, MeasuringLog())
    return {
        "spans": describe_spans(split).to_dicts(),
        "notes": [*split.notes, *pairs_to_compare(recipe)[1]],
        "n_runs": len(cells),
        "estimate_cpu_s": [asdict(row) | {"total": asdict(row.total)} for row in estimates],
        "total_cpu_s": asdict(sum((row.total for row in estimates), Range())),
    }


def run_recipe(recipe: Recipe, out: Path, jobs: int, device: str, resume: bool, as_json: bool) -> None:
    """Run what the folder does not hold yet, then write the results and print the answer."""
    from freshrec.data.split import describe_spans
    from freshrec.replay.answer import headline_metric, read_answer
    from freshrec.replay.answer_text import output_width, render_answer
    from freshrec.replay.progress import ProgressBoard, print_plan
    from freshrec.replay.recipes import load_split, make_cells, make_replay_settings, pairs_to_compare
    from freshrec.replay.results import collect_results
    from freshrec.replay.runner import run_cells
    from freshrec.replay.slices import slice_table

    cells, settings, split, part = make_cells(recipe), make_replay_settings(recipe), load_split(recipe), recipe.replay
    last_span = len(split.spans) - 1
    from_span = part.from_span or min(FIRST_UPDATED_SPAN, last_span)
    if from_span > last_span:
        raise OptionError(f"--from-span is {from_span}, but the last span is {last_span}. Use a lower number.")
    recipe = replace(recipe, replay=replace(part, from_span=from_span))
    console = make_console(to_stderr=True)
    _prepare_folder(out, recipe, resume)
    if not as_json:
        print_plan(console, len(cells), describe_spans(split), [*split.notes, *pairs_to_compare(recipe)[1]])
    metric = "auc" if recipe.log.exposures else headline_metric(part.metrics)
    board = ProgressBoard(cells, [span.index for span in split.spans[1:]], out, console, metric)
    try:
        with board.live():
            run_cells(cells, split, settings, out, jobs=jobs, device=device, on_span_done=board.report_span)
    except KeyboardInterrupt:
        console.print(f"Finished spans are kept in {out}. To continue, add --resume to the command.", markup=False)
        raise
    if recipe.log.exposures:  # AUC and log loss cover all exposures of a span
        results = collect_results(cells, None, part.metrics, out, "targets", from_span)
    else:
        results = collect_results(cells, slice_table(split.spans), part.metrics, out, part.averaging, from_span)
    if as_json:
        typer.echo(json.dumps({"out": str(out), "summary": _overall_rows(results)}))
        return
    answer = read_answer(cells, out, headline_metric(part.metrics))
    typer.echo(render_answer(answer, recipe.log, output_width(), from_span))
    typer.echo(
        f"\nResults in {out}:\n  table.md, results.parquet, methods.parquet, tests.parquet, recipe.toml", err=True
    )


def _prepare_folder(out: Path, recipe: Recipe, resume: bool) -> None:
    """Write the recipe to `out`. Raises OptionError if the folder holds another replay."""
    recipe_path = out / "recipe.toml"
    if recipe_path.exists():
        if not resume:
            raise OptionError(f"{out} already holds a replay. Continue it with --resume, or choose another --out.")
        may_differ = {
            "log": {"folder"},
            "replay": {"models", "strategies", "extra_pairs", "controls", "seeds", "metrics", "averaging", "from_span"},
        }
        if _without(load_recipe(recipe_path), may_differ) != _without(recipe, may_differ):
            raise OptionError(f"{out} holds a replay of another log or protocol. Choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, recipe_path)


def _without(recipe: Recipe, fields: dict[str, set[str]]) -> dict[str, dict[str, Any]]:
    """Return the recipe without some fields of its sections."""
    tables = asdict(recipe)
    return {part: {k: v for k, v in table.items() if k not in fields.get(part, ())} for part, table in tables.items()}


def _overall_rows(results: pl.DataFrame) -> list[dict[str, Any]]:
    """Return the means over all spans."""
    import polars as pl

    from freshrec.replay.results import OVERALL_SPAN

    overall = results.filter((pl.col("span") == OVERALL_SPAN) & (pl.col("slice") == "all"))
    return overall.select("model", "strategy", "seed", "metric", "value", "low", "high", "n").to_dicts()
