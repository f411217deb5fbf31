"""Results of the replay of a log that says what was shown: AUC and log loss.

Both are those of a span's events pooled, whoever's they are; over all: the mean of the spans, then of the seeds. The
pooled numbers of a span are no means over users, so they come without intervals and tests.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from freshrec.errors import unknown
from freshrec.learn.clicks import auc, log_loss
from freshrec.replay.replay import Cell
from freshrec.replay.results import COLUMNS, OVERALL, costs_of

Column = NDArray[np.float32]

CLICK_METRICS: dict[str, Callable[[Column, Column], float]] = {"auc": auc, "logloss": log_loss}


def click_metric(name: str) -> Callable[[Column, Column], float]:
    """The function (labels, probabilities) -> value that `name` names. Raises OptionError."""
    if name not in CLICK_METRICS:
        raise unknown("metric of a log with exposures", name, CLICK_METRICS)
    return CLICK_METRICS[name]


def collect_clicks(cells: Sequence[Cell], metrics: Sequence[str], out: Path, from_span: int = 1) -> pl.DataFrame:
    """The long results table of all finished cells; results.parquet, methods.parquet and table.md in `out`.

    The same columns and rows as `results.collect` makes, without intervals, slices, forgetting and tests. Means are
    over the spans from `from_span` on.
    """
    measured = [pl.DataFrame(schema=COLUMNS), *(_measured(cell, out / cell.name, metrics, from_span) for cell in cells)]
    results = pl.concat([*measured, *(costs_of(cell, out / cell.name, from_span) for cell in cells)])
    results.write_parquet(out / "results.parquet")
    overall = results.filter(pl.col("span") == OVERALL).group_by("model", "strategy", "metric", maintain_order=True)
    methods = overall.agg(pl.col("value", "low", "high").mean(), pl.len().cast(pl.Int64).alias("n"))
    methods.write_parquet(out / "methods.parquet")
    (out / "table.md").write_text(_table(methods, metrics) + "\n")
    return results


def _measured(cell: Cell, folder: Path, metrics: Sequence[str], from_span: int) -> pl.DataFrame:
    """A row per span and metric, and over all the mean of the spans that have a value."""
    rows: list[tuple[int, str, float, int]] = []
    for file in folder.glob("span-*.parquet"):
        asked = pl.read_parquet(file)
        for (span,), part in asked.group_by("asked"):
            columns = part["label"].to_numpy(), part["p"].to_numpy()
            rows += [(int(str(span)), name, click_metric(name)(*columns), len(part)) for name in metrics]
    rows.sort()
    for name in metrics if rows else []:
        counted = [row for row in rows if row[1] == name and row[0] >= from_span]
        values, n = [row[2] for row in counted if not np.isnan(row[2])], sum(row[3] for row in counted)
        rows.append((OVERALL, name, float(np.mean(values)) if values else float("nan"), n))
    kinds = {"span": pl.Int64, "metric": pl.String, "value": pl.Float64, "n": pl.Int64}
    nothing = pl.lit(None, pl.Float64)
    return pl.DataFrame(rows, schema=kinds, orient="row").with_columns(
        pl.lit(cell.model).alias("model"), pl.lit(cell.strategy).alias("strategy"),
        pl.lit(cell.seed, pl.Int64).alias("seed"), pl.lit("all").alias("slice"),
        nothing.alias("low"), nothing.alias("high"),
    ).select(COLUMNS.keys())  # fmt: skip


def _table(methods: pl.DataFrame, metrics: Sequence[str]) -> str:
    """A Markdown table, a row per method, the best in the first metric first."""
    values = {(r["model"], r["strategy"], r["metric"]): r["value"] for r in methods.iter_rows(named=True)}
    first = 1 if metrics[0] == "logloss" else -1
    named = {(model, strategy) for model, strategy, metric in values if metric == metrics[0]}
    costs = {"update_cpu_s": "CPU-s per update", "peak_mb": "peak MB"}
    head = ["model", "strategy", *metrics, *costs.values()]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method in sorted(named, key=lambda method: first * values[(*method, metrics[0])]):
        numbers = [f"{values[(*method, metric)]:.4f}" for metric in metrics]
        numbers += [f"{values[(*method, cost)]:.1f}" if (*method, cost) in values else "" for cost in costs]
        lines.append("| " + " | ".join([*method, *numbers]) + " |")
    return "\n".join(lines)
