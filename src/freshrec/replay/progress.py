"""What a person sees of a replay before and while it runs: the spans, and the quality of each run span by span."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.live import Live
from rich.table import Table

from freshrec.learn.click_quality import auc
from freshrec.replay.answer_text import Labels
from freshrec.replay.cell import Cell
from freshrec.replay.metrics import compute_metrics, mean_per_user
from freshrec.replay.results import read_costs, read_ranks


class ProgressBoard:
    """Shows the quality of each run and span: in a live table on a terminal, in plain lines elsewhere."""

    def __init__(
        self, cells: list[Cell], spans: list[int], out: Path, console: Console, metric: str = "ndcg@20"
    ) -> None:
        self.cells, self.spans, self.out, self.console, self.metric = cells, spans, out, console, metric
        self.labels = Labels.of((cell.model_name, cell.strategy_name) for cell in cells)
        self.quality_by_span: dict[tuple[str, int], str] = {}
        self.trained_bases: set[Any] = set()  # keys of the base blocks that were trained
        self.started_s = time.monotonic()
        self._live: Live | None = None

    def live(self) -> Live:
        """The context in which the table is drawn."""
        self._live = Live(self._table(), console=self.console, auto_refresh=False, transient=True)
        return self._live

    def report_span(self, cell: Cell, span: int) -> None:
        """Show that a run has finished a span."""
        file = self.out / cell.folder_name / f"span-{span}.parquet"
        costs = read_costs(self.out / cell.folder_name / f"costs-{span}.json")
        quality = ""
        if file.exists():
            tested = read_ranks(file).filter((pl.col("after") == span - 1) & (pl.col("readout") == "recent"))
            quality = f"{_mean_quality(tested, self.metric):.4f}" if len(tested) else ""
        self.quality_by_span[cell.folder_name, span] = quality
        if self.console.is_terminal and self._live is not None:
            self._live.update(self._table(), refresh=True)
            return
        done, total = len(self.quality_by_span), len(self.cells) * (len(self.spans) + 1)
        elapsed_s = time.monotonic() - self.started_s
        place, result = f"span {span}", f"{self.metric} {quality}" if quality else "no targets"
        if span == 0:
            place, result = "base block", self._describe_base(cell)
        cost = f"{costs['update_cpu_s']:.1f} CPU-s" if "update_cpu_s" in costs else "no update"
        text = f"{' '.join(self._names(cell))}, seed {cell.seed}, {place}: {result}, {cost}"
        print(f"[{done}/{total}, {elapsed_s:.0f} s] {text}", file=sys.stderr, flush=True)  # noqa: T201

    def _describe_base(self, cell: Cell) -> str:
        """What happened to the base block, which no run is tested on."""
        if cell.strategy_name.startswith("absorb"):
            return "absorbed"
        if cell.base_key is None:
            return "trained"
        is_shared = cell.base_key in self.trained_bases
        self.trained_bases.add(cell.base_key)
        return "trained earlier" if is_shared else "trained"

    def _names(self, cell: Cell) -> tuple[str, str]:
        method = cell.model_name, cell.strategy_name
        return self.labels.model(method), self.labels.strategy(method)

    def _table(self) -> Table:
        elapsed_s = time.monotonic() - self.started_s
        title = f"{self.metric} by span (higher is better), {elapsed_s:.0f} s"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for head in ("model", "strategy", "seed", *map(str, self.spans)):
            table.add_column(head, justify="left" if head in ("model", "strategy") else "right")
        for cell in self.cells:
            values = [self.quality_by_span.get((cell.folder_name, span), "") for span in self.spans]
            table.add_row(*self._names(cell), str(cell.seed), *values)
        return table


def _mean_quality(tested: pl.DataFrame, metric: str) -> float:
    """The mean of the metric over users, or the AUC of all events."""
    if "p" in tested.columns:
        return auc(tested["label"].to_numpy(), tested["p"].to_numpy())
    _, values_U1 = mean_per_user(tested["user"].to_numpy(), compute_metrics(tested["rank"].to_numpy(), [metric]))
    return float(values_U1.mean())


HEADS = {  # of the table of spans; one line each, so that it fits 80 columns
    "name": "dates",
    "new_users": "new",
    "new_items": "new",
    "seen_share": "seen",
}


def print_plan(console: Console, n_cells: int, spans: pl.DataFrame, notes: Sequence[str]) -> None:
    """Print the spans of a replay, and what each column means."""
    table = Table(title=f"{n_cells} runs over {len(spans)} spans", title_justify="left", box=None, pad_edge=False)
    table.padding = (0, 1, 0, 0)
    for name in spans.columns:
        is_text = name == "name"
        table.add_column(HEADS.get(name, name), justify="left" if is_text else "right", no_wrap=not is_text)
    for row in spans.iter_rows():
        table.add_row(*("-" if v is None else f"{v:.2f}" if isinstance(v, float) else f"{v}" for v in row))
    console.print(table, highlight=False, markup=False)
    console.print(
        "Span 0 is the base block. new: users or items without an earlier event. "
        "seen: share of the targets whose item has an earlier event.",
        highlight=False,
    )
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def print_estimate(console: Console, seconds: pl.DataFrame) -> None:
    table = Table(title="estimated CPU seconds (within a factor of 2)", title_justify="left")
    for name in seconds.columns:
        table.add_column(name.replace("_", " "))
    for row in seconds.iter_rows():
        table.add_row(*(f"{v:.0f}" if isinstance(v, float) else f"{v}" for v in row))
    console.print(table)
    total = sum(seconds["base_s"].to_list()) + sum(seconds["updates_s"].to_list())
    console.print(f"in all {total:.0f} s with --jobs 1; measuring comes on top")
