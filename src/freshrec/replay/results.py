"""From the cells' files to results.parquet, tests.parquet and table.md."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from freshrec.replay.measure import SLICES
from freshrec.replay.metrics import evaluate
from freshrec.replay.replay import Cell
from freshrec.replay.significance import compare, interval

COLUMNS = ("model", "strategy", "seed", "span", "slice", "metric", "value", "low", "high", "n")
OVERALL = -1  # the span of a mean over spans


def collect(cells: Sequence[Cell], facts: pl.DataFrame, metrics: Sequence[str], out: Path) -> pl.DataFrame:
    """The long results table of all finished cells, written to `out`, with the paired tests and a table for people.

    Spans weigh equally, users equally within a span. The row of span -1 is the mean over spans. Costs are metrics too.
    A model's other readouts are rows of their own: "comirec-dr@stored".
    """
    parts, per_query = [], []
    for cell in cells:
        folder = out / cell.name
        asked = [pl.read_parquet(file) for file in sorted(folder.glob("span-*.parquet"))]
        parts.append(_costs(cell, folder))
        if not asked:
            continue
        ranks = pl.concat(asked)
        values = evaluate(ranks["rank"].to_numpy(), metrics)
        ranks = ranks.with_columns(pl.Series(name, values[:, i]) for i, name in enumerate(metrics))
        tested = ranks.filter(pl.col("after") == pl.col("asked") - 1).join(
            facts, left_on=["asked", "event"], right_on=["span", "event"], how="left", maintain_order="left"
        )
        for (readout,), rows in tested.group_by("readout", maintain_order=True):
            name = cell.model if readout == "recent" else f"{cell.model}@{readout}"
            parts.append(_quality(name, cell, rows, metrics))
            per_query.append(_for_tests(name, cell, rows, metrics))
        parts.append(_forgetting(cell, ranks, metrics))
    results = pl.concat(parts).select(COLUMNS)
    results.write_parquet(out / "results.parquet")
    tests = compare(pl.concat(per_query)) if per_query else pl.DataFrame()
    tests.write_parquet(out / "tests.parquet")
    (out / "table.md").write_text(table(results, metrics) + "\n")
    return results


def _quality(name: str, cell: Cell, rows: pl.DataFrame, metrics: Sequence[str]) -> pl.DataFrame:
    """Mean and interval of each metric, by slice, for each span and over all."""
    found = []
    for part in SLICES:
        sliced = rows.filter(part)
        spans: list[tuple[int, pl.DataFrame]] = [(OVERALL, sliced)]
        spans += [(int(str(key[0])), group) for key, group in sliced.group_by("asked", maintain_order=True)]
        for span, group in spans:
            if len(group):
                found.append(_row(name, cell, span, part, group, metrics, sure=part == "all" or span == OVERALL))
    return pl.concat(found) if found else _empty()


def _row(
    name: str, cell: Cell, span: int, part: str, rows: pl.DataFrame, metrics: Sequence[str], sure: bool = True
) -> pl.DataFrame:
    """One row a metric; an interval where `sure` (a slice of a single span goes without: thousands of bootstraps)."""
    share = 1.0 / (
        pl.len().over("asked", "user") * pl.col("user").n_unique().over("asked") * pl.col("asked").n_unique()
    )
    weighed = rows.select("user", *((pl.col(m) * share).alias(m) for m in metrics))
    by_user = weighed.group_by("user").sum().sort("user").select(metrics).to_numpy()
    by_user = by_user * len(by_user)  # so that their mean is the value
    low, high = interval(by_user) if sure else (np.full(len(metrics), np.nan), np.full(len(metrics), np.nan))
    return pl.DataFrame(
        {"metric": list(metrics), "value": by_user.mean(0), "low": low, "high": high, "n": [len(rows)] * len(metrics)}
    ).select(*_labels(name, cell, span, part), "metric", "value", "low", "high", pl.col("n").cast(pl.Int64))


def _labels(name: str, cell: Cell, span: int, part: str) -> list[pl.Expr]:
    texts = {"model": name, "strategy": cell.strategy, "slice": part}
    numbers = {"seed": cell.seed, "span": span}
    return [
        *(pl.lit(v).alias(k) for k, v in texts.items()),
        *(pl.lit(v, pl.Int64).alias(k) for k, v in numbers.items()),
    ]


def _empty() -> pl.DataFrame:
    kinds = {
        "value": pl.Float64,
        "low": pl.Float64,
        "high": pl.Float64,
        "seed": pl.Int64,
        "span": pl.Int64,
        "n": pl.Int64,
    }
    return pl.DataFrame(schema={c: kinds.get(c, pl.String) for c in COLUMNS}).select(
        "model", "strategy", "slice", "seed", "span", "metric", "value", "low", "high", "n"
    )


def _for_tests(name: str, cell: Cell, rows: pl.DataFrame, metrics: Sequence[str]) -> pl.DataFrame:
    return rows.select(
        pl.lit(name).alias("model"), pl.lit(cell.strategy).alias("strategy"), pl.lit(cell.seed).alias("seed"),
        pl.col("asked").alias("span"), "user", pl.col("event").alias("target"), *metrics,
    )  # fmt: skip


def _forgetting(cell: Cell, ranks: pl.DataFrame, metrics: Sequence[str]) -> pl.DataFrame:
    """How much worse the model after span t answers earlier spans' secret queries than the model of that time did."""
    recent = ranks.filter(pl.col("readout") == "recent")
    then = recent.filter(pl.col("after") == pl.col("asked") - 1).select("asked", "event", *metrics)
    now = recent.filter(pl.col("after") >= pl.col("asked"))
    both = now.join(then, on=["asked", "event"], suffix=" then")
    if not len(both):
        return _empty()
    lost = both.select("after", "user", *((pl.col(f"{m} then") - pl.col(m)).alias(f"forgetting {m}") for m in metrics))
    names = [f"forgetting {m}" for m in metrics]
    found = []
    last = int(str(lost["after"].max()))
    for span in [*sorted(lost["after"].unique()), OVERALL]:  # over all: after the last span
        rows = lost.filter(pl.col("after") == (last if span == OVERALL else span)).rename({"after": "asked"})
        found.append(_row(cell.model, cell, span, "all", rows, names))
    return pl.concat(found)


def _costs(cell: Cell, folder: Path) -> pl.DataFrame:
    """What each update cost, as metrics of the span it trained on; over all: the mean of the spans after the base."""
    by_span = {int(f.stem.rpartition("-")[2]): json.loads(f.read_text()) for f in folder.glob("costs-*.json")}
    rows = [(span, name, value) for span, costs in sorted(by_span.items()) for name, value in costs.items()]
    for name in sorted({name for span, name, _ in rows if span}):
        rows.append((OVERALL, name, float(np.nanmean([v for s, n, v in rows if n == name and s > 0]))))
    if not rows:
        return _empty()
    spans, names, values = zip(*rows)
    frame = pl.DataFrame({"span": spans, "metric": names, "value": values})
    same = [pl.col("value").alias("low"), pl.col("value").alias("high"), pl.lit(1, pl.Int64).alias("n")]
    return frame.select(
        *_labels(cell.model, cell, 0, "all")[:4], pl.col("span").cast(pl.Int64), "metric", "value", *same
    )


def table(results: pl.DataFrame, metrics: Sequence[str]) -> str:
    """A Markdown table, a row per method: quality with intervals, forgetting and costs, means over spans and seeds."""
    costs = {"update_cpu_s": "CPU-s per update", "peak_mb": "peak MB", "mean_k": "interests per user"}
    forgotten = f"forgetting {metrics[0]}"
    overall = results.filter((pl.col("span") == OVERALL) & (pl.col("slice") == "all"))
    mean = overall.group_by("model", "strategy", "metric", maintain_order=True).agg(
        pl.col("value").mean(), pl.col("low").mean(), pl.col("high").mean()
    )
    values = {(r["model"], r["strategy"], r["metric"]): r for r in mean.iter_rows(named=True)}
    methods = sorted(
        {(m, s) for m, s, metric in values if metric == metrics[0]}, key=lambda ms: -values[(*ms, metrics[0])]["value"]
    )
    head = ["model", "strategy", *metrics, forgotten, *costs.values()]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for model, strategy in methods:
        cells = [model, strategy]
        for metric in metrics:
            r = values[model, strategy, metric]
            cells.append(f"{100 * r['value']:.2f} ({100 * r['low']:.2f} .. {100 * r['high']:.2f})")
        lost = values.get((model, strategy, forgotten))
        cells.append(f"{100 * lost['value']:+.2f}" if lost else "")
        for cost in costs:
            spent = values.get((model.partition("@")[0], strategy, cost))
            cells.append(f"{spent['value']:.1f}" if spent else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
