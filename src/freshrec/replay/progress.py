"""Output of a replay before and while it runs: the spans, the estimated cost, and the quality of each run by span."""

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.live import Live
from rich.table import Table

from freshrec.data.validate import format_percent
from freshrec.learn.click_quality import auc
from freshrec.replay.answer_text import MIN_TABLE_WIDTH, Labels, format_seconds, table_lines, wrap
from freshrec.replay.cell import Cell
from freshrec.replay.epochs import summarize_epochs
from freshrec.replay.estimate import Range, RunEstimate
from freshrec.replay.metrics import compute_metrics, mean_per_user
from freshrec.replay.results import read_costs, read_ranks
from freshrec.text_layout import format_count


class ProgressBoard:
    """Show the quality of each run and span: in a live table on a terminal, in plain lines elsewhere.

    Spans that an earlier replay finished in the same folder are counted and shown, too.
    """

    def __init__(
        self, cells: list[Cell], spans: list[int], out: Path, console: Console, metric: str = "ndcg@20"
    ) -> None:
        self.cells, self.spans, self.out, self.console, self.metric = cells, spans, out, console, metric
        self.labels = Labels.of((cell.model_name, cell.strategy_name) for cell in cells)
        self.quality_by_span: dict[tuple[str, int], str] = {}
        self.trained_bases: set[Any] = set()  # keys of the base blocks that were trained
        self.started_s = time.monotonic()
        self._live: Live | None = None
        for cell in cells:
            for span in (0, *spans):
                if (out / cell.folder_name / f"costs-{span}.json").exists():
                    self.quality_by_span[cell.folder_name, span] = self._read_quality(cell, span)
                    self.trained_bases |= {cell.base_key} if span == 0 and cell.base_key is not None else set()

    def live(self) -> Live:
        """The context in which the table is drawn."""
        self._live = Live(self._table(), console=self.console, auto_refresh=False, transient=True)
        return self._live

    def report_span(self, cell: Cell, span: int) -> None:
        """Show that a run has finished a span."""
        costs = read_costs(self.out / cell.folder_name / f"costs-{span}.json")
        quality = self.quality_by_span[cell.folder_name, span] = self._read_quality(cell, span)
        if self.console.is_terminal and self._live is not None:
            self._live.update(self._table(), refresh=True)
            return
        done, total = len(self.quality_by_span), len(self.cells) * (len(self.spans) + 1)
        elapsed_s = time.monotonic() - self.started_s
        cost = f"{format_seconds(costs['update_cpu_s'])} CPU-s" if "update_cpu_s" in costs else "no update"
        if epochs := summarize_epochs(costs):
            cost += f", epochs: {epochs.long}"
        place, result = f"span {span}", f"{self.metric} {quality}, {cost}" if quality else f"no targets, {cost}"
        if span == 0:
            place, result = "base block", self._describe_base(cell, cost)
        text = f"{' '.join(self._names(cell))}, seed {cell.seed}, {place}: {result}"
        print(f"[{done}/{total} spans, {elapsed_s:.0f} s] {text}", file=sys.stderr, flush=True)  # noqa: T201

    def _read_quality(self, cell: Cell, span: int) -> str:
        """The quality of a run in a finished span; "" without targets."""
        file = self.out / cell.folder_name / f"span-{span}.parquet"
        if not file.exists():
            return ""
        tested = read_ranks(file).filter((pl.col("after") == span - 1) & (pl.col("readout") == "recent"))
        return f"{_mean_quality(tested, self.metric):.4f}" if len(tested) else ""

    def _describe_base(self, cell: Cell, cost: str) -> str:
        """Say how this run got its base block, and the cost unless another run paid it. No run is tested on it."""
        if cell.strategy_name.startswith("absorb"):
            return f"absorbed, {cost}"
        if cell.base_key is None:
            return f"trained, {cost}"
        is_shared = cell.base_key in self.trained_bases
        self.trained_bases.add(cell.base_key)
        return "already trained by an earlier run" if is_shared else f"trained, {cost}"

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


DAY = re.compile(r"\d{4}-\d\d-\d\d")
ROUNDING = 1.2  # a range whose ends differ by less is printed as one number
HEADS = {  # of the table of spans; narrow, so that it fits 80 columns
    "name": "dates",
    "new_users": "new\nusers",
    "new_items": "new\nitems",
    "seen_share": "seen",
}


def print_plan(console: Console, n_cells: int, spans: pl.DataFrame, notes: Sequence[str]) -> None:
    """Print the spans of a replay, with a legend."""
    counts = f"{format_count(n_cells, 'run')} over a base block and {format_count(len(spans) - 1, 'span')}"
    table = Table(title=counts, title_justify="left", box=None, pad_edge=False)
    table.padding = (0, 1, 0, 0)
    for name in spans.columns:
        is_text = name == "name"
        table.add_column(HEADS.get(name, name), justify="left" if is_text else "right", no_wrap=not is_text)
    for row in spans.iter_rows():
        table.add_row(*map(_format_cell, row))
    _print_table(console, table)
    lines = [
        "Span 0 is the base block. new users, new items: those without an earlier event. "
        "seen: share of the targets whose item has an earlier event."
    ]
    days = [DAY.findall(name) for name in spans["name"]]
    if any(a[-1:] == b[:1] != [] for a, b in zip(days, days[1:])):
        lines.append("Days are in UTC. Spans that share a day do not overlap: the later one starts within that day.")
    _print_lines(console, [*lines, *(f"note: {note}" for note in notes)])


def _print_lines(console: Console, lines: Sequence[str]) -> None:
    """Print each line, wrapped at the width of the console, without spaces at its end."""
    for line in lines:
        console.print(wrap(line, console.width), highlight=False, markup=False, soft_wrap=True)


def _format_cell(value: Any) -> str:
    """Format a cell of the table of spans: a count, a share, a text, or "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return format_percent(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _print_table(console: Console, table: Table) -> None:
    """Print a table; in a pipe, in a file or on a narrow terminal as plain text."""
    if console.is_terminal and console.width >= MIN_TABLE_WIDTH:
        console.print(table, highlight=False, markup=False)
        return
    for line in table_lines(table, console.width):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


class MeasuringLog:
    """Report each measurement of a plan on stderr. A plan of a few seconds stays silent."""

    def __init__(self, silent_s: float = 5.0) -> None:
        self.silent_s, self.started_s = silent_s, time.process_time()

    def __call__(self, text: str) -> None:
        """Print one line."""
        elapsed_s = time.process_time() - self.started_s
        if elapsed_s >= self.silent_s:
            print(f"[{elapsed_s:.0f} CPU-s] timing {text}", file=sys.stderr, flush=True)  # noqa: T201


def print_estimate(console: Console, estimates: Sequence[RunEstimate]) -> None:
    """Print the estimated CPU-s of each model with each strategy, and their sum."""
    title = "Estimated CPU-s, from short runs on this log"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    labels = Labels.of((row.model, row.strategy) for row in estimates)
    for head in ("model", "strategy", "seeds", "base block", "updates", "measuring", "total"):
        is_text = head in ("model", "strategy")
        table.add_column(head, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    for row in estimates:
        method = row.model, row.strategy
        seconds = [format_range(part) for part in (row.base, row.updates, row.measuring, row.total)]
        table.add_row(labels.model(method), labels.strategy(method), str(row.n_seeds), *seconds)
    _print_table(console, table)
    total = sum((row.total for row in estimates), Range())
    lines = [
        f"Total: {format_range(total)} CPU-s. With --jobs 1 the replay takes about as long.",
        "base block: choosing the number of epochs, and training. Little if an earlier row trains it.",
        "updates: absorbing and training, all spans together.",
        "measuring: ranking the targets before each update, and held-out targets again after it.",
        "Not included: starting, reading the log and writing the tables, usually some seconds.",
    ]
    if total.high > ROUNDING * total.low:
        lines.append("Ranges: the epochs were chosen on a sample of users, and the whole log may need fewer or more.")
    _print_lines(console, lines)


def format_range(seconds: Range) -> str:
    """One number, or two if they differ by more than rounding: "12" or "12 .. 40". Less than 0.05 s is "<0.1"."""
    low, high = (format_seconds(value) if value < 10 else f"{value:,.0f}" for value in (seconds.low, seconds.high))
    is_single = seconds.high < 0.05 or seconds.high <= ROUNDING * seconds.low or low == high
    return high if is_single else f"{low} .. {high}"
