"""From the cells' files to results.parquet, methods.parquet, tests.parquet and table.md."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from freshrec.disk_names import COST_KEYS, RANK_COLUMNS, with_current_keys
from freshrec.replay.clicks import CLICK_METRICS, DOWN, evaluate_clicks
from freshrec.replay.measure import SLICES
from freshrec.replay.metrics import evaluate
from freshrec.replay.recipe_schema import Equal, ReplayRecipe
from freshrec.replay.replay import Cell
from freshrec.replay.significance import METHOD, Answers, Index, Mask, arrange, compare, interval

COLUMNS = {
    "model": pl.String,
    "strategy": pl.String,
    "seed": pl.Int64,
    "span": pl.Int64,
    "slice": pl.String,
    "metric": pl.String,
    "value": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "n": pl.Int64,
}
CELL = (*METHOD, "seed")
NUMBERS = ("metric", "value", "low", "high", "n")
OVERALL = -1  # the span of a mean over spans


def collect(
    cells: Sequence[Cell],
    facts: pl.DataFrame | None,
    metrics: Sequence[str],
    out: Path,
    equal: Equal = ReplayRecipe.mean,
    from_span: int = ReplayRecipe.from_span,
) -> pl.DataFrame:
    """The long results table of all finished cells, written to `out` with what is made of it.

    results.parquet   each cell, span, slice and metric; costs are metrics too
    methods.parquet   each model and strategy over all spans and seeds
    tests.parquet     each pair of these, in the recent readout: the paired tests
    table.md          methods.parquet for people

    Spans weigh equally, users (or targets: `equal`) equally within a span. The row of span -1 is the mean over spans
    from `from_span` on, and so is what the other files say (of forgetting, from the first span on). A model's other
    readouts are rows of their own: "comirec-dr@stored". Without `facts`, no slices but "all".
    """
    asked = [_asked(cell, out / cell.name, metrics) for cell in cells]
    answered = pl.concat([_empty_answers(metrics), *asked])
    costs = pl.concat([pl.DataFrame(schema=COLUMNS), *(costs_of(cell, out / cell.name, from_span) for cell in cells)])
    tested = answered.filter(pl.col("after") == pl.col("span") - 1)
    counted = tested.filter(pl.col("span") >= from_span)
    lost = _lost(answered, metrics)
    early = _quality(tested.filter(pl.col("span") < from_span), facts, metrics, equal)
    early = early.filter(pl.col("span") != OVERALL)
    results = pl.concat([early, _quality(counted, facts, metrics, equal), _forgetting(lost, equal), costs])
    results.write_parquet(out / "results.parquet")
    methods = _methods(counted, lost, costs, metrics, equal)
    methods.write_parquet(out / "methods.parquet")
    compare(counted.filter(~pl.col("model").str.contains("@")), metrics, equal=equal).write_parquet(
        out / "tests.parquet"
    )
    (out / "table.md").write_text(table(methods, metrics) + "\n")
    return results


def read_ranks(file: Path) -> pl.DataFrame:
    """What a cell's span-*.parquet of any version holds, with the names of now."""
    return pl.read_parquet(file).rename(RANK_COLUMNS, strict=False)


def read_costs(file: Path) -> dict[str, float]:
    """What a cell's costs-*.json of any version holds, with the names of now."""
    found: dict[str, float] = with_current_keys(json.loads(file.read_text()), COST_KEYS)
    return found


def _empty_answers(metrics: Sequence[str]) -> pl.DataFrame:
    kinds = {"model": pl.String, "strategy": pl.String, "seed": pl.Int64, "span": pl.Int64, "after": pl.Int64}
    return pl.DataFrame(schema=kinds | {"user": pl.Int64, "target": pl.Int64} | dict.fromkeys(metrics, pl.Float64))


def _asked(cell: Cell, folder: Path, metrics: Sequence[str]) -> pl.DataFrame:
    """A row per query and time of asking: its span, the last span the model had been updated on, and the metrics."""
    files = sorted(folder.glob("span-*.parquet"))
    if not files:
        return _empty_answers(metrics)
    asked = pl.concat([read_ranks(file) for file in files])
    clicks = "p" in asked.columns
    values_QM = evaluate_clicks(asked, metrics) if clicks else evaluate(asked["rank"].to_numpy(), metrics)
    readout = pl.col("readout")
    return asked.select(
        pl.when(readout == "recent").then(pl.lit(cell.model)).otherwise(f"{cell.model}@" + readout).alias("model"),
        pl.lit(cell.strategy).alias("strategy"),
        pl.lit(cell.seed, pl.Int64).alias("seed"),
        pl.col("asked").cast(pl.Int64).alias("span"),
        pl.col("after").cast(pl.Int64),
        pl.col("user"),
        pl.col("event").alias("target"),
    ).hstack(pl.DataFrame(values_QM, schema=list(metrics)))


def _quality(tested: pl.DataFrame, facts: pl.DataFrame | None, metrics: Sequence[str], equal: Equal) -> pl.DataFrame:
    """Each metric by cell and slice, for each span and over all; a slice of a single span goes without interval."""
    answers = arrange(tested, metrics, CELL, equal)
    queries = answers.queries.with_columns(pl.lit(True).alias("all"))
    if facts is not None:
        queries = answers.queries.join(
            facts, left_on=["span", "target"], right_on=["span", "event"], how="left", maintain_order="left"
        )
    span_Q = queries["span"].to_numpy()
    found = [pl.DataFrame(schema=COLUMNS)]
    for which_A, answered_Q in _alike(answers):
        for part in SLICES if facts is not None else ("all",):
            in_part_Q = answered_Q & queries[part].to_numpy()
            for span in [OVERALL, *np.unique(span_Q[in_part_Q]).tolist()] if in_part_Q.any() else []:
                which_Q = in_part_Q if span == OVERALL else in_part_Q & (span_Q == span)
                rows = _rows(answers, which_A, which_Q, metrics, sure=part == "all" or span == OVERALL)
                found.append(_placed(rows, span, part))
    return pl.concat(found)


def _alike(answers: Answers) -> Iterator[tuple[Index, Mask]]:
    """The methods (A,) that answered the same queries, and which (Q,) these are: they can share drawn users."""
    answered_AQ = answers.answered_AQ
    together: dict[bytes, list[int]] = {}
    for a, answered_Q in enumerate(answered_AQ):
        together.setdefault(answered_Q.tobytes(), []).append(a)
    for methods in together.values():
        yield np.array(methods), answered_AQ[methods[0]]


def _rows(answers: Answers, which_A: Index, which_Q: Mask, metrics: Sequence[str], sure: bool = True) -> pl.DataFrame:
    """A row a method and metric on these queries; an interval where `sure`: bootstraps are what takes the time."""
    by_user_UAM = answers.by_user(which_A, which_Q, centred=True)
    by_user_UN = by_user_UAM.reshape(len(by_user_UAM), -1)
    nothing = np.full(by_user_UN.shape[1], np.nan)
    low_N, high_N = interval(by_user_UN) if sure else (nothing, nothing)
    names = answers.methods[np.repeat(which_A, len(metrics))]
    return names.with_columns(
        pl.Series("metric", list(metrics) * len(which_A), pl.String),
        pl.Series("value", by_user_UN.mean(0)),
        pl.Series("low", low_N),
        pl.Series("high", high_N),
        pl.lit(int(which_Q.sum()), pl.Int64).alias("n"),
    )


def _placed(rows: pl.DataFrame, span: int, part: str) -> pl.DataFrame:
    return rows.with_columns(span=pl.lit(span, pl.Int64), slice=pl.lit(part)).select(COLUMNS.keys())


def _lost(answered: pl.DataFrame, metrics: Sequence[str]) -> pl.DataFrame:
    """By how much each later model answers an earlier span's secret queries worse than the model just updated on it."""
    query = [*CELL, "span", "user", "target"]
    then = answered.filter(pl.col("after") == pl.col("span")).select(*query, *metrics)
    both = answered.filter(pl.col("after") > pl.col("span")).join(then, on=query, suffix=" then")
    return both.select(*query, "after", *((pl.col(f"{m} then") - pl.col(m)).alias(f"forgetting {m}") for m in metrics))


def _forgetting(lost: pl.DataFrame, equal: Equal) -> pl.DataFrame:
    """What is lost after each span, the mean over the spans before it; over all: what is lost after the last span."""
    names = [name for name in lost.columns if name.startswith("forgetting ")]
    found = [pl.DataFrame(schema=COLUMNS)]
    for (after,), rows in lost.group_by("after", maintain_order=True):
        measured = _all(arrange(rows, names, CELL, equal), names)
        found.append(_placed(measured, int(str(after)), "all"))
        if after == lost["after"].max():
            found.append(_placed(measured, OVERALL, "all"))
    return pl.concat(found)


def _all(answers: Answers, metrics: Sequence[str]) -> pl.DataFrame:
    return pl.concat([_rows(answers, which_A, which_Q, metrics) for which_A, which_Q in _alike(answers)])


def costs_of(cell: Cell, folder: Path, from_span: int = ReplayRecipe.from_span) -> pl.DataFrame:
    """What each update cost, as metrics of the span it trained on; over all: the mean from `from_span` on."""
    by_span = {int(file.stem.rpartition("-")[2]): read_costs(file) for file in folder.glob("costs-*.json")}
    rows = [(span, name, value) for span, costs in sorted(by_span.items()) for name, value in costs.items()]
    for name in sorted({name for span, name, _ in rows if span >= from_span}):
        rows.append((OVERALL, name, float(np.nanmean([v for s, n, v in rows if n == name and s >= from_span]))))
    frame = pl.DataFrame(rows, schema={"span": pl.Int64, "metric": pl.String, "value": pl.Float64}, orient="row")
    return frame.with_columns(
        pl.lit(cell.model).alias("model"),
        pl.lit(cell.strategy).alias("strategy"),
        pl.lit(cell.seed, pl.Int64).alias("seed"),
        pl.lit("all").alias("slice"),
        pl.col("value").alias("low"),
        pl.col("value").alias("high"),
        pl.lit(1, pl.Int64).alias("n"),
    ).select(COLUMNS.keys())


def _methods(
    tested: pl.DataFrame, lost: pl.DataFrame, costs: pl.DataFrame, metrics: Sequence[str], equal: Equal
) -> pl.DataFrame:
    """A row per model, strategy and metric, over all spans: each query averaged over seeds, and only then resampled."""
    names = [f"forgetting {m}" for m in metrics]
    found = [pl.DataFrame(schema={name: kind for name, kind in COLUMNS.items() if name in (*METHOD, *NUMBERS)})]
    last = lost.filter(pl.col("after") == pl.col("after").max())
    found += [
        _all(arrange(rows, of, METHOD, equal), of) for rows, of in ((tested, metrics), (last, names)) if len(rows)
    ]
    overall = costs.filter(pl.col("span") == OVERALL).group_by(*METHOD, "metric", maintain_order=True)
    found.append(overall.agg(pl.col("value", "low", "high").mean(), pl.len().cast(pl.Int64).alias("n")))
    return pl.concat(found)


def table(methods: pl.DataFrame, metrics: Sequence[str]) -> str:
    """A Markdown table, a row per method, the best in the first metric first, all but forgetting as means over spans.

    Quality comes with 95 % intervals, forgetting is what the model after the last span has lost, on earlier spans'
    held-out targets, since it was updated on them: positive = forgotten.
    """
    costs = {"update_cpu_s": "CPU-s per update", "peak_mb": "peak MB", "mean_k": "interests per user"}
    forgotten = f"forgetting {metrics[0]}"
    values = {(r["model"], r["strategy"], r["metric"]): r for r in methods.iter_rows(named=True)}
    costs = {cost: name for cost, name in costs.items() if any(metric == cost for *_, metric in values)}
    up = -1 if metrics[0] in DOWN else 1
    order = sorted(
        {(m, s) for m, s, metric in values if metric == metrics[0]},
        key=lambda ms: (-up * values[(*ms, metrics[0])]["value"], ms),
    )
    forgets = any(metric == forgotten for *_, metric in values)
    head = ["model", "strategy", *metrics, *[forgotten] * forgets, *costs.values()]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for model, strategy in order:
        cells = [model, strategy, *(with_interval(metric, values[model, strategy, metric]) for metric in metrics)]
        if forgets:
            lost = values.get((model, strategy, forgotten))
            cells.append(f"{100 * lost['value']:+.2f}" if lost else "")
        for cost in costs:
            spent = values.get((model.partition("@")[0], strategy, cost))
            cells.append(f"{spent['value']:.1f}" if spent else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_interval(metric: str, row: dict[str, Any]) -> str:
    """The value and the ends of its interval: shares in %, AUC and log loss as they are."""
    scale, digits = (1, 4) if metric in CLICK_METRICS else (100, 2)
    value, low, high = (f"{scale * row[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low} .. {high})"
