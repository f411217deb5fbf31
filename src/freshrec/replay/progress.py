"""What a person sees of a replay: the plan, an estimate, a live table while it runs."""

import sys
import time
from pathlib import Path

import polars as pl
from rich.console import Console
from rich.live import Live
from rich.table import Table

from freshrec.learn.click_quality import auc
from freshrec.replay.cell import Cell
from freshrec.replay.metrics import compute_metrics, mean_per_user
from freshrec.replay.results import read_costs, read_ranks


class ProgressBoard:
    """ndcg@20, or the AUC, of each cell and span as they come in: a live table on a terminal, plain lines elsewhere."""

    def __init__(
        self, cells: list[Cell], spans: list[int], out: Path, console: Console, metric: str = "ndcg@20"
    ) -> None:
        self.cells, self.spans, self.out, self.console, self.metric = cells, spans, out, console, metric
        self.quality_by_span: dict[tuple[str, int], str] = {}
        self.started_s = time.monotonic()
        self._live: Live | None = None

    def live(self) -> Live:
        """The context in which the table is drawn."""
        self._live = Live(self._table(), console=self.console, auto_refresh=False, transient=True)
        return self._live

    def report_span(self, cell: Cell, span: int) -> None:
        """A cell has finished a span."""
        file = self.out / cell.folder_name / f"span-{span}.parquet"
        cost = read_costs(self.out / cell.folder_name / f"costs-{span}.json").get("update_cpu_s", 0.0)
        quality = ""
        if file.exists():
            tested = read_ranks(file).filter((pl.col("after") == span - 1) & (pl.col("readout") == "recent"))
            quality = f"{100 * _mean_quality(tested):.2f}" if len(tested) else "-"
        self.quality_by_span[cell.folder_name, span] = quality
        if self.console.is_terminal and self._live is not None:
            self._live.update(self._table(), refresh=True)
            return
        done, total = len(self.quality_by_span), len(self.cells) * (len(self.spans) + 1)
        elapsed_s = time.monotonic() - self.started_s
        text = f"{cell.model_name} {cell.strategy_name} seed {cell.seed} span {span}: {self.metric} {quality or '-'} %"
        text += f", {cost:.1f} CPU-s"
        print(f"[{done}/{total}, {elapsed_s:.0f} s] {text}", file=sys.stderr, flush=True)  # noqa: T201

    def _table(self) -> Table:
        table = Table(title=f"{self.metric} in %, {time.monotonic() - self.started_s:.0f} s", title_justify="left")
        for head in ("model", "strategy", "seed", *(f"span {span}" for span in self.spans)):
            table.add_column(head, justify="right" if head.startswith("s") else "left")
        for cell in self.cells:
            values = [self.quality_by_span.get((cell.folder_name, span), "") for span in self.spans]
            table.add_row(cell.model_name, cell.strategy_name, str(cell.seed), *values)
        return table


def _mean_quality(tested: pl.DataFrame) -> float:
    """The mean ndcg@20 over users, or the AUC of all events."""
    if "p" in tested.columns:
        return auc(tested["label"].to_numpy(), tested["p"].to_numpy())
    _, values_U1 = mean_per_user(tested["user"].to_numpy(), compute_metrics(tested["rank"].to_numpy(), ["ndcg@20"]))
    return float(values_U1.mean())


def print_plan(console: Console, cells: list[Cell], spans: pl.DataFrame, notes: tuple[str, ...]) -> None:
    table = Table(title=f"{len(cells)} cells", title_justify="left")
    for name in spans.columns:
        table.add_column(name.replace("_", " "), justify="right" if spans[name].dtype.is_numeric() else "left")
    for row in spans.iter_rows():
        table.add_row(*("" if v is None else f"{v:.2f}" if isinstance(v, float) else f"{v}" for v in row))
    console.print(table)
    for note in notes:
        console.print(f"note: {note}")


def print_estimate(console: Console, seconds: pl.DataFrame) -> None:
    table = Table(title="estimated CPU seconds (within a factor of 2)", title_justify="left")
    for name in seconds.columns:
        table.add_column(name.replace("_", " "))
    for row in seconds.iter_rows():
        table.add_row(*(f"{v:.0f}" if isinstance(v, float) else f"{v}" for v in row))
    console.print(table)
    total = sum(seconds["base_s"].to_list()) + sum(seconds["updates_s"].to_list())
    console.print(f"in all {total:.0f} s with --jobs 1; measuring comes on top")
