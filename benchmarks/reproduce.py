"""Run one recipe and write its JSON to benchmarks/results.

`python benchmarks/reproduce.py recipes/NAME.toml --data FOLDER`. Finished parts in runs/NAME are not run again.
"""

import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import typer

import freshrec
from freshrec.cli.replay import resolve_recipe, run_recipe
from freshrec.data.split import describe_spans
from freshrec.learn.fit import STOPPED_BY
from freshrec.replay.recipe_schema import load_recipe
from freshrec.replay.recipes import load_split
from freshrec.replay.results import OVERALL_SPAN

SHOWN = "ndcg@20"  # the metric of docs/results.md; if a recipe does not measure it, its first metric
KEPT_COSTS = {
    "update_cpu_s", "rows_read", "peak_mb", "mean_k", "interest_bytes", "nid_rate", "detect_cpu_s", "extract_cpu_s",
    "kl_p50", "train_cpu_s", "remember_cpu_s", "transfer_cpu_s", "generator_cpu_s", "epoch_choice_cpu_s",
}  # fmt: skip
COMMIT_FILE = "commit.txt"  # in the folder of a run
EPOCH_COSTS = ("epochs", *(f"stopped_by_{reason}" for reason in STOPPED_BY))


def reproduce(
    recipe: Annotated[Path, typer.Argument(help="recipes/NAME.toml")],
    data: Annotated[str, typer.Option(help="The folder of the logs.")] = ".",
    jobs: int = 1,
    device: Annotated[str, typer.Option(help="Where models train: cpu, cuda.")] = "cpu",
    results: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("benchmarks/results"),
) -> None:
    """Start or resume the replay of a recipe, and write the JSON for the results page."""
    out = Path("runs") / recipe.stem
    _record_commit(out / COMMIT_FILE)
    run_recipe(resolve_recipe(recipe, {"log": {"folder": data}}), out, jobs, device, resume=True, as_json=False)
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{recipe.stem}.json").write_text(_lines(summary(recipe, out)) + "\n")


def _record_commit(file: Path) -> None:
    """Write the commit of this checkout to `file` at the start of a run. A resumed run keeps the first one."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        file.write_text(found.stdout.strip() or "unknown")


def _lines(tables: dict[str, Any]) -> str:
    """JSON with one line per table, for readable diffs."""
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(part)}" for name, part in tables.items()) + "\n}"


def summary(recipe: Path, out: Path) -> dict[str, Any]:
    """Means over spans by method, seed and slice, with costs, paired tests and the resolved recipe.

    Values by span are those of ndcg@20. If a recipe does not measure it (protocols of papers), they are all metrics
    and the CPU seconds. The epochs of each update and what stopped its training are given by span too.
    """
    resolved = load_recipe(out / "recipe.toml")
    table = pl.read_parquet(out / "results.parquet")
    metrics = resolved.replay.metrics
    wanted = [*metrics, *(f"forgetting {m}" for m in metrics), *KEPT_COSTS, *EPOCH_COSTS]
    overall = table.filter((pl.col("span") == OVERALL_SPAN) & pl.col("metric").is_in(wanted))
    base = table.filter((pl.col("span") == 0) & (pl.col("metric") == "update_cpu_s"))
    shown = [SHOWN] if SHOWN in metrics else [*metrics, "update_cpu_s"]
    by_span = table.filter((pl.col("span") >= 0) & (pl.col("slice") == "all") & pl.col("metric").is_in(shown))
    by_span = by_span.select("model", "strategy", "seed", "span", *(["metric"] * (len(shown) > 1)), "value", "n")
    is_choice = (pl.col("span") >= 0) & pl.col("metric").is_in(EPOCH_COSTS)
    choices = table.filter(is_choice).pivot("metric", index=["model", "strategy", "seed", "span"], values="value")
    tests = pl.read_parquet(out / "tests.parquet").filter(pl.col("metric") == shown[0])
    methods = pl.read_parquet(out / "methods.parquet").filter(pl.col("metric").is_in(wanted))
    tables = asdict(resolved)
    del tables["log"]["folder"]  # it differs between machines
    return {
        "recipe": recipe.stem,
        "freshrec": freshrec.__version__,
        "commit": (out / COMMIT_FILE).read_text(),
        "resolved": tables,
        "spans": describe_spans(load_split(resolved)).to_dicts(),
        "methods": _rounded(methods),
        "overall": _rounded(overall.drop("span")),
        "base_cpu_s": _rounded(base.select("model", "strategy", "seed", "value")),
        "epochs_by_span": _rounded(choices),
        "by_span": _rounded(by_span),
        "tests": _rounded(tests.drop("metric")),
    }


def _rounded(table: pl.DataFrame) -> dict[str, list[Any]]:
    return table.with_columns(pl.col(pl.Float64).round(6).fill_nan(None)).to_dict(as_series=False)


if __name__ == "__main__":
    typer.run(reproduce)
