"""`freshrec replay`: options -> recipe -> cells, a live table while they run, and the results."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from freshrec.data.spans import plan
from freshrec.errors import OptionError
from freshrec.recipes import (
    Recipe, cells_of, cut_of, load_recipe, recipe_from, save_recipe, settings_of,
)  # fmt: skip
from freshrec.replay.measure import facts
from freshrec.replay.metrics import evaluate
from freshrec.replay.plan import estimate
from freshrec.replay.replay import Cell
from freshrec.replay.results import OVERALL, collect
from freshrec.replay.run import run


def replay(
    log: Annotated[str, typer.Argument(metavar="[LOG]", help="The log; or --world, or log.path in a recipe.")] = "",
    recipe_file: Annotated[Path | None, typer.Option("--recipe", help="A TOML recipe; other options override it.")] = None,
    world: Annotated[str | None, typer.Option(help="Replay a generated world instead of a log.")] = None,
    models: Annotated[str | None, typer.Option(help="Models, with options as in comirec-dr:k=1,sasrec.")] = None,
    strategies: Annotated[str | None, typer.Option(help="Strategies, as in finetune,imsr:retain.weight=1.")] = None,
    by: Annotated[str | None, typer.Option(help="How the log is cut: count, time, count-alpha, period, ...")] = None,
    spans: Annotated[int | None, typer.Option(help="Spans after the base block.")] = None,
    targets: Annotated[str | None, typer.Option(help="What is tested: last, all or split.")] = None,
    heldout: Annotated[str | None, typer.Option(help="When held-out events join training: next or never.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Training seeds.")] = None,
    cadence: Annotated[int | None, typer.Option(help="Blocks a span is replayed in; counters learn after each.")] = None,
    metrics: Annotated[str | None, typer.Option(help="As in ndcg@20,hr@10.")] = None,
    data: Annotated[str | None, typer.Option(help="The folder where a recipe's log lies.")] = None,
    columns: Annotated[str | None, typer.Option(help="Our names and yours, as in user_id=uid.")] = None,
    log_format: Annotated[str | None, typer.Option("--format", help="A public format.")] = None,
    events: Annotated[str | None, typer.Option(help="The event types to keep.")] = None,
    users: Annotated[int | None, typer.Option(help="Keep a seeded sample of this many users.")] = None,
    tune: Annotated[bool | None, typer.Option("--tune/--no-tune", help="Choose knobs on the span before.")] = None,
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("runs/replay"),
    jobs: Annotated[int, typer.Option(help="Processes, one thread each.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --out.")] = False,
    plan_only: Annotated[bool, typer.Option("--plan", help="Print spans and estimated time, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the path and a summary as JSON.")] = False,
) -> None:
    """Compare ways of updating on your own log, span by span."""
    given: dict[str, dict[str, Any]] = {
        "log": {
            "path": log or None, "folder": data, "world": world, "format": log_format, "users": users,
            "events": _words(events), "columns": _pairs(columns),
        },
        "spans": {"by": by, "spans": spans, "targets": targets, "heldout": heldout},
        "replay": {
            "models": _words(models), "strategies": _words(strategies), "seeds": seeds, "cadence": cadence,
            "metrics": _words(metrics), "tune": tune,
        },
    }  # fmt: skip
    recipe = _resolved(recipe_file, given)
    cells, settings, cut = cells_of(recipe), settings_of(recipe), cut_of(recipe)
    console = Console(stderr=True)
    if not as_json:
        _print_plan(console, cells, plan(cut), cut.notes)
    if plan_only:
        _print_estimate(console, estimate(cells, cut))
        return
    _prepare(out, recipe, resume)
    board = Board(cells, [span.index for span in cut.spans[1:]], out, console)
    with board.live():
        run(cells, cut, settings, out, jobs=jobs, tell=board.tell)
    results = collect(cells, facts(cut.spans), recipe.replay.metrics, out)
    if as_json:
        typer.echo(json.dumps({"out": str(out), "summary": _summary(results)}))
    else:
        typer.echo((out / "table.md").read_text())
        console.print(f"results.parquet, tests.parquet, recipe.toml and table.md are in {out}")


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _pairs(text: str | None) -> dict[str, str] | None:
    from freshrec.cli import pairs

    return None if text is None else pairs(text)


def _resolved(file: Path | None, given: dict[str, dict[str, Any]]) -> Recipe:
    """The recipe in `file`, or the default one, with what was given on the command line."""
    tables = (load_recipe(file) if file else Recipe()).model_dump()
    for part, options in given.items():
        tables[part] |= {name: value for name, value in options.items() if value is not None}
    return recipe_from(tables)


def _prepare(out: Path, recipe: Recipe, resume: bool) -> None:
    """Refuse to mix two replays in one folder."""
    there = out / "recipe.toml"
    if there.exists():
        if not resume:
            raise OptionError(f"{out} holds a replay already: go on with --resume, or choose another --out.")
        kept = {"log": {"folder"}, "replay": {"models", "strategies", "also", "controls", "seeds", "metrics"}}
        if load_recipe(there).model_dump(exclude=kept) != recipe.model_dump(exclude=kept):
            raise OptionError(f"{out} holds a replay of another log or protocol: choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, there)


class Board:
    """ndcg@20 of each cell and span as they come in: a live table on a terminal, plain lines elsewhere."""

    def __init__(self, cells: list[Cell], spans: list[int], out: Path, console: Console) -> None:
        self.cells, self.spans, self.out, self.console = cells, spans, out, console
        self.seen: dict[tuple[str, int], str] = {}
        self.since = time.monotonic()
        self._live: Live | None = None

    def live(self) -> Live:
        """The context in which the table is drawn."""
        self._live = Live(self._table(), console=self.console, auto_refresh=False, transient=True)
        return self._live

    def tell(self, cell: Cell, span: int) -> None:
        """A cell has finished a span."""
        file = self.out / cell.name / f"span-{span}.parquet"
        cost = json.loads((self.out / cell.name / f"costs-{span}.json").read_text())["update_cpu_s"]
        quality = ""
        if file.exists():
            tested = pl.read_parquet(file).filter((pl.col("after") == span - 1) & (pl.col("readout") == "recent"))
            quality = f"{100 * evaluate(tested['rank'].to_numpy(), ['ndcg@20']).mean():.2f}" if len(tested) else "-"
        self.seen[cell.name, span] = quality
        if self.console.is_terminal and self._live is not None:
            self._live.update(self._table(), refresh=True)
            return
        done, total = len(self.seen), len(self.cells) * (len(self.spans) + 1)
        passed = time.monotonic() - self.since
        text = f"{cell.model} {cell.strategy} seed {cell.seed} span {span}: ndcg@20 {quality or '-'} %, {cost:.1f} CPU-s"
        print(f"[{done}/{total}, {passed:.0f} s] {text}", file=sys.stderr, flush=True)  # noqa: T201

    def _table(self) -> Table:
        table = Table(title=f"ndcg@20 in %, {time.monotonic() - self.since:.0f} s", title_justify="left")
        for head in ("model", "strategy", "seed", *(f"span {span}" for span in self.spans)):
            table.add_column(head, justify="right" if head.startswith("s") else "left")
        for cell in self.cells:
            values = [self.seen.get((cell.name, span), "") for span in self.spans]
            table.add_row(cell.model, cell.strategy, str(cell.seed), *values)
        return table


def _print_plan(console: Console, cells: list[Cell], spans: pl.DataFrame, notes: tuple[str, ...]) -> None:
    table = Table(title=f"{len(cells)} cells", title_justify="left")
    for name in spans.columns:
        table.add_column(name.replace("_", " "), justify="right" if spans[name].dtype.is_numeric() else "left")
    for row in spans.iter_rows():
        table.add_row(*("" if v is None else f"{v:.2f}" if isinstance(v, float) else f"{v}" for v in row))
    console.print(table)
    for note in notes:
        console.print(f"note: {note}")


def _print_estimate(console: Console, seconds: pl.DataFrame) -> None:
    table = Table(title="estimated CPU seconds (within a factor of 2)", title_justify="left")
    for name in seconds.columns:
        table.add_column(name.replace("_", " "))
    for row in seconds.iter_rows():
        table.add_row(*(f"{v:.0f}" if isinstance(v, float) else f"{v}" for v in row))
    console.print(table)
    total = sum(seconds["base_s"].to_list()) + sum(seconds["updates_s"].to_list())
    console.print(f"in all {total:.0f} s with --jobs 1; measuring comes on top")


def _summary(results: pl.DataFrame) -> list[dict[str, Any]]:
    overall = results.filter((pl.col("span") == OVERALL) & (pl.col("slice") == "all"))
    return overall.select("model", "strategy", "seed", "metric", "value", "low", "high", "n").to_dicts()
