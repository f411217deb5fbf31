"""Turn the files of all runs into results.parquet, methods.parquet, tests.parquet and table.md."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from freshrec.disk_names import COST_KEYS, RANK_COLUMNS, with_current_keys
from freshrec.replay.answer import headline_metric
from freshrec.replay.answer_text import format_seconds
from freshrec.replay.cell import Cell
from freshrec.replay.click_metrics import (
    CLICK_METRICS,
    LOWER_IS_BETTER,
    compute_click_metrics,
    describe_click_averaging,
)
from freshrec.replay.epochs import epochs_of_method
from freshrec.replay.metrics import compute_metrics
from freshrec.replay.recipe_schema import Averaging, ReplayRecipe
from freshrec.replay.significance import (
    METHOD_COLUMNS,
    BoolArray,
    Int64Array,
    QueryMetrics,
    arrange_metrics,
    bootstrap_interval,
    compare_methods,
)
from freshrec.replay.slices import SLICES

RESULT_SCHEMA = {
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
CELL_COLUMNS = (*METHOD_COLUMNS, "seed")
VALUE_COLUMNS = ("metric", "value", "low", "high", "n")
OVERALL_SPAN = -1  # the span number of a mean over spans


def collect_results(
    cells: Sequence[Cell],
    slices: pl.DataFrame | None,
    metrics: Sequence[str],
    out: Path,
    averaging: Averaging = ReplayRecipe.averaging,
    from_span: int = 1,
) -> pl.DataFrame:
    """Return the results of all runs as a long table, and write it and its summaries to `out`.

    results.parquet   each run, span, slice and metric; costs are metrics too
    methods.parquet   each model and strategy, averaged over spans and seeds
    tests.parquet     the paired test of each pair of methods
    table.md          methods.parquet as a table for people

    All spans have equal weight, and within a span all users (or targets: `averaging`). For click metrics, `averaging`
    must be "targets", so that the value of a span covers all its exposures at once. The rows of span -1 are means
    over the spans from `from_span` on. The other files hold the same means; forgetting covers all spans. A model with
    stored interests has further rows, such as "comirec-dr@stored", which are not tested. Without `slices`, the only
    slice is "all".
    """
    answers_per_cell = [_read_answers(cell, out / cell.folder_name, metrics) for cell in cells]
    answers = pl.concat([_empty_answers(metrics), *answers_per_cell])
    costs = pl.concat(
        [pl.DataFrame(schema=RESULT_SCHEMA), *(cell_costs(cell, out / cell.folder_name, from_span) for cell in cells)]
    )
    tested = answers.filter(pl.col("after") == pl.col("span") - 1)
    reported = tested.filter(pl.col("span") >= from_span)
    forgetting = _forgetting_per_query(answers, metrics)
    early_rows = _quality_by_slice(tested.filter(pl.col("span") < from_span), slices, metrics, averaging)
    early_rows = early_rows.filter(pl.col("span") != OVERALL_SPAN)
    results = pl.concat(
        [
            early_rows,
            _quality_by_slice(reported, slices, metrics, averaging),
            _forgetting_by_span(forgetting, averaging),
            costs,
        ]
    )
    results.write_parquet(out / "results.parquet")
    methods = _summarize_methods(reported, forgetting, costs, metrics, averaging)
    methods.write_parquet(out / "methods.parquet")
    tests = compare_methods(reported.filter(~pl.col("model").str.contains("@")), metrics, averaging=averaging)
    tests.write_parquet(out / "tests.parquet")
    notes = "\n".join(table_notes(methods, metrics, averaging))
    (out / "table.md").write_text(f"{markdown_table(methods, metrics)}\n\n{notes}\n")
    return results


def read_ranks(file: Path) -> pl.DataFrame:
    """Read span-*.parquet of a run, of any version, with the current column names."""
    return pl.read_parquet(file, glob=False).rename(RANK_COLUMNS, strict=False)


def read_costs(file: Path) -> dict[str, float]:
    """Read costs-*.json of a run, of any version, with the current names."""
    found: dict[str, float] = with_current_keys(json.loads(file.read_text()), COST_KEYS)
    return found


def _empty_answers(metrics: Sequence[str]) -> pl.DataFrame:
    schema = {"model": pl.String, "strategy": pl.String, "seed": pl.Int64, "span": pl.Int64, "after": pl.Int64}
    return pl.DataFrame(schema=schema | {"user": pl.Int64, "target": pl.Int64} | dict.fromkeys(metrics, pl.Float64))


def _read_answers(cell: Cell, folder: Path, metrics: Sequence[str]) -> pl.DataFrame:
    """A row per query and ranking: span, last span that the model was updated on (`after`), and the metrics."""
    files = sorted(folder.glob("span-*.parquet"))
    if not files:
        return _empty_answers(metrics)
    rows = pl.concat([read_ranks(file) for file in files])
    is_clicks = "p" in rows.columns
    values_QM = compute_click_metrics(rows, metrics) if is_clicks else compute_metrics(rows["rank"].to_numpy(), metrics)
    readout = pl.col("readout")
    return rows.select(
        pl.when(readout == "recent")
        .then(pl.lit(cell.model_name))
        .otherwise(f"{cell.model_name}@" + readout)
        .alias("model"),
        pl.lit(cell.strategy_name).alias("strategy"),
        pl.lit(cell.seed, pl.Int64).alias("seed"),
        pl.col("asked").cast(pl.Int64).alias("span"),
        pl.col("after").cast(pl.Int64),
        pl.col("user"),
        pl.col("event").alias("target"),
    ).hstack(pl.DataFrame(values_QM, schema=list(metrics)))


def _quality_by_slice(
    tested: pl.DataFrame, slices: pl.DataFrame | None, metrics: Sequence[str], averaging: Averaging
) -> pl.DataFrame:
    """Each metric by run and slice, for each span and over all. Slices of one span have no interval."""
    answers = arrange_metrics(tested, metrics, CELL_COLUMNS, averaging)
    queries = answers.queries.with_columns(pl.lit(True).alias("all"))
    if slices is not None:
        queries = answers.queries.join(
            slices, left_on=["span", "target"], right_on=["span", "event"], how="left", maintain_order="left"
        )
    span_Q = queries["span"].to_numpy()
    found = [pl.DataFrame(schema=RESULT_SCHEMA)]
    for methods_A, answered_Q in _groups_by_queries(answers):
        for part in SLICES if slices is not None else ("all",):
            in_part_Q = answered_Q & queries[part].to_numpy()
            for span in [OVERALL_SPAN, *np.unique(span_Q[in_part_Q]).tolist()] if in_part_Q.any() else []:
                is_included_Q = in_part_Q if span == OVERALL_SPAN else in_part_Q & (span_Q == span)
                has_interval = part == "all" or span == OVERALL_SPAN
                rows = _summarize(answers, methods_A, is_included_Q, metrics, has_interval)
                found.append(_add_span_and_slice(rows, span, part))
    return pl.concat(found)


def _groups_by_queries(answers: QueryMetrics) -> Iterator[tuple[Int64Array, BoolArray]]:
    """Yield methods (A,) that answered the same queries, with the mask (Q,); they can share the resampled users."""
    answered_AQ = answers.answered_AQ
    groups: dict[bytes, list[int]] = {}
    for a, answered_Q in enumerate(answered_AQ):
        groups.setdefault(answered_Q.tobytes(), []).append(a)
    for methods in groups.values():
        yield np.array(methods), answered_AQ[methods[0]]


def _summarize(
    answers: QueryMetrics,
    methods_A: Int64Array,
    is_included_Q: BoolArray,
    metrics: Sequence[str],
    has_interval: bool = True,
) -> pl.DataFrame:
    """A row per method and metric on these queries. The interval is optional, because the bootstrap is slow."""
    by_user_UAM = answers.by_user(methods_A, is_included_Q, centred=True)
    by_user_UN = by_user_UAM.reshape(len(by_user_UAM), -1)
    no_interval_N = np.full(by_user_UN.shape[1], np.nan)
    low_N, high_N = bootstrap_interval(by_user_UN) if has_interval else (no_interval_N, no_interval_N)
    names = answers.methods[np.repeat(methods_A, len(metrics))]
    return names.with_columns(
        pl.Series("metric", list(metrics) * len(methods_A), pl.String),
        pl.Series("value", by_user_UN.mean(0)),
        pl.Series("low", low_N),
        pl.Series("high", high_N),
        pl.lit(int(is_included_Q.sum()), pl.Int64).alias("n"),
    )


def _add_span_and_slice(rows: pl.DataFrame, span: int, part: str) -> pl.DataFrame:
    return rows.with_columns(span=pl.lit(span, pl.Int64), slice=pl.lit(part)).select(RESULT_SCHEMA.keys())


def _forgetting_per_query(answered: pl.DataFrame, metrics: Sequence[str]) -> pl.DataFrame:
    """Loss of each later model on held-out queries of an earlier span, against the model just updated on that span."""
    query = [*CELL_COLUMNS, "span", "user", "target"]
    after_update = answered.filter(pl.col("after") == pl.col("span")).select(*query, *metrics)
    both = answered.filter(pl.col("after") > pl.col("span")).join(after_update, on=query, suffix=" then")
    return both.select(*query, "after", *((pl.col(f"{m} then") - pl.col(m)).alias(f"forgetting {m}") for m in metrics))


def _forgetting_by_span(forgetting: pl.DataFrame, averaging: Averaging) -> pl.DataFrame:
    """Forgetting after each span, a mean over the earlier spans; overall: forgetting after the last span."""
    names = [name for name in forgetting.columns if name.startswith("forgetting ")]
    found = [pl.DataFrame(schema=RESULT_SCHEMA)]
    for (after,), rows in forgetting.group_by("after", maintain_order=True):
        measured = _summarize_all(arrange_metrics(rows, names, CELL_COLUMNS, averaging), names)
        found.append(_add_span_and_slice(measured, int(str(after)), "all"))
        if after == forgetting["after"].max():
            found.append(_add_span_and_slice(measured, OVERALL_SPAN, "all"))
    return pl.concat(found)


def _summarize_all(answers: QueryMetrics, metrics: Sequence[str]) -> pl.DataFrame:
    return pl.concat(
        [
            _summarize(answers, methods_A, is_included_Q, metrics)
            for methods_A, is_included_Q in _groups_by_queries(answers)
        ]
    )


def cell_costs(cell: Cell, folder: Path, from_span: int = 1) -> pl.DataFrame:
    """Costs of each update, as metrics of the span that it trained on; overall: the mean from `from_span` on."""
    by_span = {int(file.stem.rpartition("-")[2]): read_costs(file) for file in folder.glob("costs-*.json")}
    rows = [(span, name, value) for span, costs in sorted(by_span.items()) for name, value in costs.items()]
    for name in sorted({name for span, name, _ in rows if span >= from_span}):
        rows.append((OVERALL_SPAN, name, float(np.nanmean([v for s, n, v in rows if n == name and s >= from_span]))))
    frame = pl.DataFrame(rows, schema={"span": pl.Int64, "metric": pl.String, "value": pl.Float64}, orient="row")
    return frame.with_columns(
        pl.lit(cell.model_name).alias("model"),
        pl.lit(cell.strategy_name).alias("strategy"),
        pl.lit(cell.seed, pl.Int64).alias("seed"),
        pl.lit("all").alias("slice"),
        pl.col("value").alias("low"),
        pl.col("value").alias("high"),
        pl.lit(1, pl.Int64).alias("n"),
    ).select(RESULT_SCHEMA.keys())


def _summarize_methods(
    tested: pl.DataFrame, forgetting: pl.DataFrame, costs: pl.DataFrame, metrics: Sequence[str], averaging: Averaging
) -> pl.DataFrame:
    """A row per model, strategy and metric over all spans. Each query is averaged over seeds before resampling."""
    names = [f"forgetting {m}" for m in metrics]
    columns = (*METHOD_COLUMNS, *VALUE_COLUMNS)
    found = [pl.DataFrame(schema={name: kind for name, kind in RESULT_SCHEMA.items() if name in columns})]
    last = forgetting.filter(pl.col("after") == pl.col("after").max())
    for rows, metric_names in ((tested, metrics), (last, names)):
        if len(rows):
            arranged = arrange_metrics(rows, metric_names, METHOD_COLUMNS, averaging)
            found.append(_summarize_all(arranged, metric_names))
    overall = costs.filter(pl.col("span") == OVERALL_SPAN).group_by(*METHOD_COLUMNS, "metric", maintain_order=True)
    found.append(overall.agg(pl.col("value", "low", "high").mean(), pl.len().cast(pl.Int64).alias("n")))
    return pl.concat(found)


def markdown_table(methods: pl.DataFrame, metrics: Sequence[str]) -> str:
    """A Markdown table with a row per method, sorted by the first metric, the best first.

    Quality has 95 % intervals. Forgetting is the loss of the last model on held-out targets of earlier spans, against
    the model just updated on them; positive = lost. It is that of the headline metric. All other numbers are means
    over spans.
    """
    costs = {"update_cpu_s": "CPU-s per update", "peak_mb": "peak MB", "mean_k": "interests per user"}
    forgetting_metric = f"forgetting {headline_metric(metrics)}"
    values = {(r["model"], r["strategy"], r["metric"]): r for r in methods.iter_rows(named=True)}
    costs = {cost: name for cost, name in costs.items() if any(metric == cost for *_, metric in values)}
    sign = -1 if metrics[0] in LOWER_IS_BETTER else 1
    order = sorted(
        {(m, s) for m, s, metric in values if metric == metrics[0]},
        key=lambda ms: (-sign * values[(*ms, metrics[0])]["value"], ms),
    )
    has_forgetting = any(metric == forgetting_metric for *_, metric in values)
    has_epochs = any(metric == "epochs" for *_, metric in values)
    head = ["model", "strategy", *metrics, *[forgetting_metric] * has_forgetting, *costs.values()]
    head += ["epochs"] * has_epochs
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for model, strategy in order:
        cells = [
            model,
            strategy,
            *(format_with_interval(values[model, strategy, metric]) for metric in metrics),
        ]
        if has_forgetting:
            forgetting = values.get((model, strategy, forgetting_metric))
            cells.append(f"{forgetting['value']:+.4f}" if forgetting else "")
        for cost in costs:
            cost_row = values.get((model.partition("@")[0], strategy, cost))
            number = format_seconds if cost == "update_cpu_s" else "{:.1f}".format
            cells.append(number(cost_row["value"]) if cost_row else "")
        if has_epochs:
            epochs = epochs_of_method(values, model, strategy)
            cells.append(epochs.long if epochs else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_notes(
    methods: pl.DataFrame, metrics: Sequence[str], averaging: Averaging = ReplayRecipe.averaging
) -> list[str]:
    """Explain the columns and the names of a Markdown table."""
    means = {"users": "spans and users", "targets": "spans and targets", "pooled": "all targets of all spans"}
    is_clicks = set(metrics) <= set(CLICK_METRICS)
    lines = [f"- Quality: mean over {'spans' if is_clicks else means[averaging]}, with its 95 % interval."]
    lines[0] += f" {describe_click_averaging(metrics)}" if is_clicks else ""
    lines[0] += " Higher is better; lower for logloss." if LOWER_IS_BETTER & set(metrics) else " Higher is better."
    if any(metric.startswith("forgetting ") for metric in methods["metric"]):
        lines.append(
            f"- Forgetting: loss of {headline_metric(metrics)} on held-out events of earlier spans, after the last "
            "update. Positive = lost."
        )
    lines.append("- CPU-s: seconds of processor time, without measuring. Peak MB: largest memory of the process.")
    if (methods["metric"] == "epochs").any():
        lines.append(
            "- Epochs: mean number per update, and what set it. Fixed: an option. Patience: the quality of held-out "
            "events had not risen for `fit.patience` epochs. Minimum: raised to `fit.min_epochs`. Maximum: training "
            "reached `fit.max_epochs`. A percentage is the share of the trainings."
        )
    if any("@" in model for model in methods["model"]):
        lines.append(
            "- `MODEL@stored` ranks by the interests that the last update stored, `MODEL@both` by these and the recent "
            "ones. All other rows rank by interests computed from recent events."
        )
    if any(" x" in strategy for strategy in methods["strategy"]):
        lines.append(
            "- `absorb x3`: each span is replayed in 3 blocks, and the model absorbs each block after its test."
        )
    return lines


def format_with_interval(row: dict[str, Any]) -> str:
    """A value and its 95 % interval, with 4 digits; quality is a fraction."""
    return "{value:.4f} ({low:.4f} .. {high:.4f})".format_map(row)
