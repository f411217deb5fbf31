"""The sections of docs/results.md that combine recipes: the default, categories, IMSR's case studies, libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
from epoch_text import Rows, epochs_cell, has_epochs, joint_epochs_cell, row_name
from formatting import difference as format_difference
from formatting import fraction, model_name, with_interval

SLICES = ("all", "tail", "new item")
CASES = ("known pair", "new pair", "old item", "new item")
STRATEGIES = ("frozen", "finetune", "full", "imsr")

Difference = Callable[[dict[str, list[Any]], tuple[str, str], tuple[str, str]], str]  # (tests, a, b) -> a - b as text


def studies(root: Path, found: list[dict[str, Any]], difference: Difference) -> list[str]:
    """Return all sections for which there are results."""
    parts = [
        _default([r for r in found if r["recipe"].startswith("default-")], difference),
        _categories([r for r in found if r["recipe"].startswith("features-")], difference),
        _cases(found), _interests(root), _peers(root),
    ]  # fmt: skip
    return [line for part in parts if part for line in ["", *part]]


def _default(found: list[dict[str, Any]], difference: Difference) -> list[str]:
    """Return a table that compares the untuned blend with the best model of each kind, chosen in hindsight."""
    is_trained = any(has_epochs(_rows(result)) for result in found)
    lines = [
        "## The default compared with every model",
        "",
        "ndcg@20, higher is better. The default is the blend as `freshrec fit` makes it, with the same options on",
        "every log. Of the other models, the best of each kind is shown. It is chosen on these numbers, which favours",
        "it. The kinds are counting models (item-knn, markov, user-knn, stan, popularities), fine-tuned models, and",
        "models that are fully retrained after every span. A name followed by *(recent and stored interests)* or",
        "*(stored interests)* says what the interests were read from. Without it, they were read from the recent",
        "history. *Blend - best* is the difference from the best of all of them. *Below, level, above* counts the",
        "other methods that are below the blend beyond chance, level with it, and above it beyond chance. Only",
        "interests from the recent history are counted there, because the others are not tested.",
        "",
        "| recipe | blend | best counting | best fine-tuned | best retrained | blend - best | below, level, above |"
        + " epochs: blend / best fine-tuned / best retrained |" * is_trained,
        "|---" * (7 + is_trained) + "|",
    ]
    blend = ("blend", "refit")
    for result in found:
        table = pl.DataFrame(result["methods"]).filter(pl.col("metric") == "ndcg@20").sort("value", descending=True)
        at = {(r["model"], r["strategy"]): r["value"] for r in table.iter_rows(named=True)}
        best = {way: next(m for m in at if m[1] == way and m != blend) for way in ("absorb", "finetune", "full")}
        first = next(m for m in at if m != blend)
        tested = [one for other in at if other != blend and (one := difference(result["tests"], blend, other))]
        beyond = [one for one in tested if one.startswith("**")]
        below, above = sum(one.startswith("**+") for one in beyond), sum(one.startswith("**-") for one in beyond)
        cells = [fraction(at[blend]), *(f"{fraction(at[way])} {model_name(way[0])}" for way in best.values())]
        more = difference(result["tests"], blend, first) or f"{at[blend] - at[first]:+.4f} (not tested)"
        cells.append(f"{more} {model_name(first[0])}, {first[1]}")
        cells.append(f"{below}, {len(tested) - below - above}, {above}")
        trained = (blend, best["finetune"], best["full"])
        cells += [joint_epochs_cell(result, _rows(result), trained)] * is_trained
        lines.append(f"| {row_name(result)} | " + " | ".join(cells) + " |")
    return lines if found else []


def _rows(result: dict[str, Any]) -> Rows:
    """Map (model, strategy, metric) to its means over all spans and seeds."""
    return {(r["model"], r["strategy"], r["metric"]): r for r in pl.DataFrame(result["methods"]).iter_rows(named=True)}


def _slices(result: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, float]]:
    """Map (model, strategy, slice) to ndcg@20, its interval and the number of targets, as means over seeds."""
    table = pl.DataFrame(result["overall"]).filter(pl.col("metric") == "ndcg@20")
    means = table.group_by("model", "strategy", "slice").agg(pl.col("value", "low", "high").mean(), pl.col("n").max())
    return {(r["model"], r["strategy"], r["slice"]): r for r in means.iter_rows(named=True)}


def _categories(found: list[dict[str, Any]], difference: Difference) -> list[str]:
    """Return a table that compares models with and without categories."""
    if not found:
        return []
    is_trained = any(has_epochs(_rows(result)) for result in found)
    lines = [
        "## Categories as an input",
        "",
        "With `categories=100`, an item's vector is the sum of its own vector and one of its category. A new item",
        "starts at the vector of its category. The table shows ndcg@20 (higher is better) with 95 % bootstrap",
        "intervals over users. *Tail*: items other than the most popular ones that make up half of all events. *New",
        "item*: items first seen in the span before, with the number of targets. *Difference*: with minus without",
        "categories on all targets, **bold** where it is beyond chance.",
        "",
        "| recipe | model | strategy | " + " | ".join(SLICES) + " | difference |" + " epochs |" * is_trained,
        "|---" * (len(SLICES) + 4 + is_trained) + "|",
    ]
    for result in found:
        at = _slices(result)
        methods = [(m, s) for m, s, part in at if ":categories=" in m and "@" not in m and part == "all"]
        for model, strategy in sorted(methods, key=lambda method: (method[1], method[0])):
            for name in (model.partition(":categories=")[0], model):
                cells = [with_interval(at[name, strategy, part]) for part in SLICES]
                cells[-1] += f", {at[name, strategy, SLICES[-1]]['n']:,} targets"
                plain = model.partition(":categories=")[0]
                cells.append(difference(result["tests"], (name, strategy), (plain, strategy)) if name != plain else "")
                cells += [epochs_cell(result, _rows(result), name, strategy)] * is_trained
                lines.append(f"| {row_name(result)} | {name} | {strategy} | " + " | ".join(cells) + " |")
    return lines


def _cases(found: list[dict[str, Any]]) -> list[str]:
    """Return IMSR's first case study: each strategy on known and new pairs, and on old and new items."""
    spines = [result for result in found if result["recipe"].endswith("-spine")]
    lines = [
        "## Old and new, by strategy",
        "",
        "This is IMSR's first case study, on ComiRec-DR. The paper finds that a full retrain is best on old targets,",
        "that fine-tuning is best on new ones, and that IMSR lies between them. The table shows ndcg@20 (higher is",
        "better) as means over spans; the number of targets is in parentheses. *Known pair*: the user had the item",
        "before. *New pair*: the user never had it. *Old item*: seen at least two spans before. *New item*: first seen",
        "in the span before. The best of each row is **bold**.",
        "",
        "| recipe | targets | " + " | ".join(STRATEGIES) + " |",
        "|---" * (len(STRATEGIES) + 2) + "|",
    ]
    for result in spines:
        at = _slices(result)
        for part in CASES:
            values = [at.get(("comirec-dr", strategy, part)) for strategy in STRATEGIES]
            if not all(values):
                continue
            cells = [fraction(value["value"]) for value in values if value]
            best = max(cells, key=float)
            cells = [f"**{cell}**" if cell == best and float(cell) else cell for cell in cells]
            n_targets = max(value["n"] for value in values if value)
            lines.append(f"| {row_name(result)} | {part} ({n_targets:,}) | " + " | ".join(cells) + " |")
        if has_epochs(_rows(result)):
            cells = [epochs_cell(result, _rows(result), "comirec-dr", strategy) for strategy in STRATEGIES]
            lines.append(f"| {row_name(result)} | epochs | " + " | ".join(cells) + " |")
    return lines if spines else []


def _interests(root: Path) -> list[str]:
    """Return what case-interests.json says about the interests of users over the spans."""
    path = root / "benchmarks/results/case-interests.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    shares = found["serving"]
    lines = [
        "## How interests change",
        "",
        f"`python benchmarks/case_interests.py --data ...`: recipe {found['recipe']}, strategy {found['strategy']},",
        "one seed. The first row is the share of the last span's targets that are nearest to an interest created",
        "in each span. The second row is the share of these users' interests that were created in that span. In the",
        "paper, the nearest interest of most users is one of span 1 or 2.",
        "",
        "| created in span | " + " | ".join(str(n) for n in range(len(shares["targets"]))) + " |",
        "|---" * (len(shares["targets"]) + 1) + "|",
    ]
    for name, words in (("targets", "share of targets, %"), ("interests", "share of interests, %")):
        lines.append(f"| {words} | " + " | ".join(f"{100 * share:.1f}" for share in shares[name]) + " |")
    lines += [
        "",
        "Cosine between each interest before and after an update, for the users whose interests the update changed:",
        "",
        "| update of span | users | median cosine | new interests |",
        "|---|---|---|---|",
    ]
    for n, row in enumerate(found["kept"], 1):
        lines.append(f"| {n} | {row['users']:,} | {row['median_cosine']:.2f} | {row['new_interests']:,} |")
    lines += [
        "",
        "The user whose interests come from the most spans: the items nearest to each interest after each update.",
    ]
    n_most = max(len(interests) for interests in found["user"])
    lines += ["", "| after span | " + " | ".join(f"interest {k + 1}" for k in range(n_most)) + " |"]
    lines.append("|---" * (n_most + 1) + "|")
    for n, interests in enumerate(found["user"]):
        cells = [f"created in {one['born']}: {', '.join(map(str, one['items']))}" for one in interests]
        lines.append(f"| {n} | " + " | ".join(cells + [""] * (n_most - len(cells))) + " |")
    return lines


def _peers(root: Path) -> list[str]:
    """Return the table of peers.json: our models and the same models of other libraries."""
    path = root / "benchmarks/results/peers.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    lines = [
        "## Comparison with other libraries",
        "",
        f"`python benchmarks/bench_peers.py --data ... --users {found['users']}`",
        "",
        f"- Log: {found['log']}, {found['tested']:,} users, {found['items']:,} items, {found['events']:,} events.",
        "- Split: each user's last event is the test, and the one before it chooses the epoch. All items are ranked.",
        "- Setting: one environment per library, one machine, one thread, one run, one seed.",
        "- Cells: ours / theirs. The differences have 95 % bootstrap intervals over users: positive = ours is better.",
        "- CPU-s: training up to the best epoch. *(limit)* means that training was stopped after "
        f"{found['limit_s']:.0f}",
        "  CPU-s, when the model may still have been improving.",
        "",
        "| ours | theirs | recall@20 | difference | ndcg@20 | difference | CPU-s | theirs : ours | epochs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        cells = [row["ours"], f"{row['library'].replace('==', ' ')}: {row['theirs']}"]
        for metric in ("recall@20", "ndcg@20"):
            ours, theirs, low, high = row[metric]
            cells += [f"{fraction(ours)} / {fraction(theirs)}", format_difference(ours - theirs, low, high)]
        ours, theirs = row["cpu_s"]
        cells += [f"{ours:.1f} / {theirs:.1f}" + " (limit)" * row["limited"][1], f"{theirs / max(ours, 0.01):.1f}"]
        lines.append("| " + " | ".join([*cells, "{} / {}".format(*row["epochs"])]) + " |")
    if found["failed"]:
        failed = "; ".join(f"{name} ({error})" for name, error in found["failed"].items())
        lines += ["", f"These could not be run: {failed}."]
    return lines
