"""What the generated pages say about epochs: the number per update, what stopped it, and the rules of each recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from freshrec.learn.fit import STOPPED_BY, FitConfig
from freshrec.replay.epochs import EPOCH_COSTS, EpochSummary, epochs_of_method, summarize_epochs
from freshrec.text_layout import format_count

Rows = Mapping[tuple[str, str, str], Mapping[str, Any]]  # by model, strategy and metric
OLD_RULES = (
    "- Made by commit 42fdc16 or earlier, under the rules of that time (see the findings). A full retrain used the "
    "number of epochs of the base block. Every copy of a duplicate counted."
)


def has_epochs(rows: Rows) -> bool:
    """Whether a recipe recorded the epochs of any method."""
    return any(metric == "epochs" for *_, metric in rows)


def epochs_cell(result: Mapping[str, Any], rows: Rows, model: str, strategy: str) -> str:
    """Return the epochs of a method with what stopped them: "12.4 (patience)"; "" if it trained no model."""
    return _cell(result, epochs_of_method(rows, model, strategy))


def joint_epochs_cell(result: Mapping[str, Any], rows: Rows, methods: Sequence[tuple[str, str]]) -> str:
    """Return the epochs of several methods in one cell, "-" for those that trained no model; "" if none did."""
    cells = [epochs_cell(result, rows, *method) for method in methods]
    return " / ".join(cell or "-" for cell in cells) if any(cells) else ""


def mean_epochs_cell(result: Mapping[str, Any], rows: Rows, models: Sequence[str], strategy: str) -> str:
    """Return the epochs of a strategy as a mean over models."""
    found = {
        name: [rows[m, strategy, name]["value"] for m in models if (m, strategy, name) in rows] for name in EPOCH_COSTS
    }
    return _cell(
        result, summarize_epochs({name: sum(values) / len(values) for name, values in found.items() if values})
    )


def _cell(result: Mapping[str, Any], epochs: EpochSummary | None) -> str:
    """Return number and reasons. Recipes without a commit are older than the records of reasons."""
    if epochs is None:
        return ""
    return epochs.long if "commit" in result else epochs.number


def made_by(result: Mapping[str, Any]) -> str:
    """Say which commit made the numbers of a recipe, and under which rules."""
    return f"- Made by commit {result['commit']}." if "commit" in result else OLD_RULES


def row_name(result: Mapping[str, Any], name: str = "") -> str:
    """Return the name of a recipe, or another name for its row, with a dagger if it was made under the old rules."""
    return (name or str(result["recipe"])) + ("" if "commit" in result else " †")


def first_span(result: Mapping[str, Any]) -> int:
    """Return the span at which the means and tests of a recipe start. Old files do not have it, or have 0."""
    return max(1, result["resolved"]["replay"].get("from_span") or 1)


def choice_of_epochs(result: Mapping[str, Any]) -> str:
    """Say how the number of epochs of new models was chosen."""
    if "commit" not in result:
        return (
            "The epochs of the base block are chosen once, on that block. Full uses the same number at each retrain "
            "and is otherwise untuned."
        )
    fit = FitConfig()
    return (
        "Unless an option sets it, the base block and each full retrain choose their number of epochs on the latest "
        f"sixth of their own events. The choice ends when ndcg@20 has not risen for {fit.patience} epochs. A new model "
        f"is then trained on all of these events. A full retrain has at least {fit.min_epochs} epochs and is otherwise "
        "untuned."
    )


def base_block_epochs(result: Mapping[str, Any]) -> list[str]:
    """Return a line about the epochs of the base block over models and seeds; none if they were not recorded.

    Strategies that share a base block have the same numbers, which count once.
    """
    table = pl.DataFrame(result.get("epochs_by_span", {}))
    if "epochs" not in table.columns:
        return []
    base = table.filter((pl.col("span") == 0) & pl.col("epochs").is_not_null())
    base = base.select("model", "seed", pl.col("^(epochs|stopped_by_.*)$")).unique()
    if base.is_empty():
        return []
    numbers = base["epochs"].sort().to_list()
    low, high = f"{numbers[0]:.0f}", f"{numbers[-1]:.0f}"
    counts = {
        reason: int(base[f"stopped_by_{reason}"].sum()) for reason in STOPPED_BY if f"stopped_by_{reason}" in base
    }
    counts["fixed"] = len(base) - sum(counts.values())
    kept = {reason: n for reason, n in counts.items() if n}
    reasons = next(iter(kept)) if len(kept) == 1 else ", ".join(f"{reason} in {n}" for reason, n in kept.items())
    trainings = f"{format_count(len(base), 'training')} of {format_count(base['model'].n_unique(), 'model')}"
    return [f"- Epochs of the base block: {low if low == high else f'{low} to {high}'}, in {trainings} ({reasons})."]
