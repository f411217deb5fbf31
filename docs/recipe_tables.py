"""The tables of single recipes in docs/results.md, and the facts about log, spans and seeds above each."""

from __future__ import annotations

from typing import Any

import polars as pl
from epoch_text import base_block_epochs, choice_of_epochs, epochs_cell, first_span, has_epochs, made_by
from formatting import fraction, strategy_name, with_interval

from freshrec.disk_names import RECIPE_KEYS, with_current_keys
from freshrec.models import CONTROLS
from freshrec.replay.click_metrics import LOWER_IS_BETTER, describe_click_averaging

PUBLISHED_METRICS = "recall@20 / recall@10 / mrr@20 / mrr@10"
PUBLISHED = {  # from ADER's poster, means over 16 cycles in %, in the order of PUBLISHED_METRICS
    "ader-diginetica": {
        "finetune": (47.28, 35.00, 16.01, 15.16), "dropout": (49.07, 36.53, 16.86, 16.00),
        "ewc": (47.66, 35.48, 16.28, 15.44), "er-random": (49.14, 36.61, 16.79, 15.92),
        "er-loss": (49.31, 36.65, 16.90, 16.02), "er-herding": (49.44, 36.88, 16.95, 16.08),
        "ader-equal": (49.92, 37.21, 17.23, 16.35), "ader-fix": (50.09, 37.41, 17.29, 16.41),
        "ader": (50.21, 37.52, 17.32, 16.45), "joint": (50.03, 37.27, 17.31, 16.43),
    },
    "ader-diginetica-ewc": {"ewc": (47.66, 35.48, 16.28, 15.44)},
    "ader-yoochoose": {
        "finetune": (71.86, 63.82, 36.49, 35.92), "dropout": (72.20, 64.15, 36.60, 36.03),
        "ewc": (71.91, 63.89, 36.53, 35.97), "ader": (72.38, 64.41, 36.71, 36.14),
        "joint": (72.22, 64.16, 36.65, 36.08),
    },
}  # fmt: skip
EQUAL = {"users": "a span's users", "targets": "a span's targets", "pooled": "all targets"}
FORGETTING = "forgetting ndcg@20"


def method_means(result: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Map (model, strategy, metric) to its value, low and high over all spans and seeds."""
    return {(r["model"], r["strategy"], r["metric"]): r for r in pl.DataFrame(result["methods"]).iter_rows(named=True)}


def recipe_facts(result: dict[str, Any]) -> list[str]:
    """Return the command, the log, the spans, the targets, the seeds and the tuning of a recipe."""
    resolved = result["resolved"]
    base, *later = result["spans"]
    events, targets = [span["events"] for span in later], sum(span["targets"] for span in later)
    seen = sum((span["seen_share"] or 0.0) * span["targets"] for span in later) / max(targets, 1)
    log = resolved["log"]["path"] or f"the {resolved['log']['world']} world"
    users = f"{resolved['log']['users']:,} sampled users" if resolved["log"]["users"] else "all users"
    tuned = "the options of each update are chosen on the span before, except for full, which has no options to choose"
    return [
        _command(result),
        "",
        made_by(result),
        f"- Log: {log}, {users}. The base block has {base['events']:,} events.",
        f"- Spans: {len(later)}, with {min(events):,} to {max(events):,} events each. Means and tests start at span "
        f"{first_span(result)}.",
        f"- Targets: {targets:,}; {100 * seen:.0f} % of them are items that were seen before their span. Counting "
        "models may also offer users their own new items again.",
        f"- Seeds: {resolved['replay']['seeds']}.",
        f"- Tuning: {tuned if resolved['replay']['tune'] else 'none'}. {choice_of_epochs(result)}",
        *base_block_epochs(result),
    ]


def _command(result: dict[str, Any]) -> str:
    return f"`make reproduce RECIPE={result['recipe']} DATA=...`"


def recipe_table(result: dict[str, Any]) -> list[str]:
    """Return the table of a recipe that measures ndcg@20 and hr@20: quality, forgetting and costs."""
    at = method_means(result)
    methods = {(m, s) for m, s, metric in at if metric == "ndcg@20" and "@" not in m}
    has_bytes, is_trained = any(metric == "interest_bytes" for _, _, metric in at), has_epochs(at)
    lines = [
        "| model | strategy | ndcg@20 | hr@20 | ndcg@20, stored interests | forgetting | CPU-s per update |"
        + " epochs |" * is_trained
        + " interests per user |"
        + " their bytes |" * has_bytes,
        "|---" * (8 + is_trained + has_bytes) + "|",
    ]
    for model, strategy in sorted(methods, key=lambda method: (-at[(*method, "ndcg@20")]["value"], method)):
        row = at[model, strategy, "ndcg@20"]
        stored = at.get((f"{model}@stored", strategy, "ndcg@20"))
        lost, k = at.get((model, strategy, FORGETTING)), at.get((model, strategy, "mean_k"))
        cells = [
            model,
            strategy_name(strategy),
            with_interval(row),
            fraction(at[model, strategy, "hr@20"]["value"]),
            fraction(stored["value"]) if stored else "",
            f"{lost['value']:+.4f}" if lost else "",
            f"{at[model, strategy, 'update_cpu_s']['value']:.2f}",
            *[epochs_cell(result, at, model, strategy)] * is_trained,
            f"{k['value']:.2f}" if k and model not in CONTROLS else "",
        ]
        if has_bytes:
            n_bytes = at.get((model, strategy, "interest_bytes"))
            cells.append(f"{n_bytes['value']:.0f}" if n_bytes else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def protocol_table(result: dict[str, Any]) -> list[str]:
    """Return the table of a recipe that follows a paper's own protocol, with the published numbers if there are any."""
    part, (base, *later) = result["resolved"]["replay"], result["spans"]
    part = with_current_keys(part, RECIPE_KEYS["replay"])
    at, metrics = method_means(result), part["metrics"]
    is_trained = has_epochs(at)
    published = PUBLISHED.get(result["recipe"], {})
    methods = {(m, s) for m, s, metric in at if metric == metrics[0]}
    up = -1 if metrics[0] in LOWER_IS_BETTER else 1
    first, last, seeds = first_span(result), len(later), part["seeds"]
    mean = f"means over spans {first} to {last}" if first < last else f"those of span {last}"
    averaged = f"{mean}, where {EQUAL[part['averaging']]} weigh equally."
    if result["resolved"]["log"].get("exposures"):
        averaged = f"{mean}. {describe_click_averaging(metrics)}"
    candidates = {metric.partition(" among ")[2] for metric in metrics}  # {"999 sampled"}, or {""}: all items
    ranking = f"among {candidates.pop()}" if len(candidates) == 1 and "" not in candidates else ""
    lines = [
        _command(result),
        "",
        made_by(result),
        f"- Log: {result['resolved']['log']['path']}. The base block has {base['events']:,} events.",
        f"- Spans: {len(later)}. Values are {averaged}",
        *([f"- Ranking: {ranking} items."] if ranking else []),
        f"- Seeds: {seeds}.",
        *base_block_epochs(result),
        "",
        "| model | strategy | "
        + " | ".join(metric.removesuffix(f" {ranking}") for metric in metrics)
        + " | CPU-s per update | peak MB |"
        + " epochs |" * is_trained
        + f" published: {PUBLISHED_METRICS} |" * bool(published),
        "|---" * (4 + len(metrics) + is_trained + bool(published)) + "|",
    ]
    for model, strategy in sorted(methods, key=lambda method: (-up * at[(*method, metrics[0])]["value"], method)):
        costs = [at.get((model, strategy, cost)) for cost in ("update_cpu_s", "peak_mb")]
        known = published.get(strategy.partition(":")[0])
        cells = [_short_name(model), _short_name(strategy)]
        cells += [with_interval(at[model, strategy, metric]) for metric in metrics]
        cells += [f"{cost['value']:.1f}" if cost else "" for cost in costs]
        cells += [epochs_cell(result, at, model, strategy)] * is_trained
        cells += [" / ".join(fraction(n / 100) for n in known) if known else ""] if published else []
        lines.append("| " + " | ".join(cells) + " |")
    return lines + _improvements(at, metrics)


def _improvements(at: dict[tuple[str, str, str], dict[str, Any]], metrics: list[str]) -> list[str]:
    """Return the relative improvement of SML over each other method, for recipes with SML, recall and ndcg."""
    recalls, ndcgs = ([m for m in metrics if m.startswith(kind)] for kind in ("recall", "ndcg"))
    models = sorted({m for m, s, _ in at if s == "sml"})
    if not (recalls and ndcgs and models):
        return []
    found = []
    for model, strategy in sorted({(m, s) for m, s, metric in at if metric == metrics[0] and s != "sml"}):
        both = [
            improvement([at[models[0], "sml", m]["value"] for m in of], [at[model, strategy, m]["value"] for m in of])
            for of in (recalls, ndcgs)
        ]
        found.append(
            f"| {_short_name(model)} | {_short_name(strategy)} | {100 * both[0]:+.0f} % | {100 * both[1]:+.0f} % |"
        )
    return [
        "",
        "Relative improvement (RI) of sml over each other method, as means over k: positive = sml is better.",
        "",
        "| model | strategy | RI in recall | RI in ndcg |",
        "|---|---|---|---|",
        *found,
    ]


def improvement(ours: list[float], theirs: list[float]) -> float:
    """Return RI as SML reports it: mean over k of (ours / theirs - 1)."""
    return sum(a / b - 1 for a, b in zip(ours, theirs, strict=True)) / len(ours)


def _short_name(name: str) -> str:
    """Return the name with only those options that distinguish methods; the recipe holds the others."""
    distinguishing = ("dropout=", "rounds=", "transfer=", "k=", "weight=")
    kept = [part for part in name.split(":")[1:] if part.startswith(distinguishing)]
    return ":".join([name.partition(":")[0], *kept])
