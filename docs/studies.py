"""Sections of docs/results.md that are not one table a recipe: the default, categories, IMSR's cases, libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

SLICES = ("all", "tail", "new item")
CASES = ("known pair", "new pair", "old item", "new item")
STRATEGIES = ("frozen", "finetune", "full", "imsr")


Difference = Callable[[dict[str, list[Any]], tuple[str, str], tuple[str, str]], str]  # (tests, a, b) -> a - b, in words


def studies(root: Path, found: list[dict[str, Any]], difference: Difference) -> list[str]:
    """All sections for which there are results."""
    parts = [
        _default([r for r in found if r["recipe"].startswith("default-")], difference),
        _categories([r for r in found if r["recipe"].startswith("features-")], difference),
        _cases(found), _interests(root), _peers(root),
    ]  # fmt: skip
    return [line for part in parts if part for line in ["", *part]]


def _default(found: list[dict[str, Any]], difference: Difference) -> list[str]:
    """The blend, untuned, against everything else on each log, by the best of each kind in hindsight."""
    lines = [
        "## The default beside every model",
        "",
        "ndcg@20 in %. The default is the blend as `freshrec fit` makes it, on every log the same. Of the others",
        "the best of each kind is shown, chosen on these very numbers, which flatters them: what counts (item-knn,",
        "markov, user-knn, stan, popularities), a trained model that is fine-tuned, and one that is fully",
        "retrained after every span; each with what it is read from, where that is a choice (`@both`, `@stored`).",
        "*Below, level, above*: how many of all others are so beside the blend, beyond chance (corrected for all",
        "pairs of methods of the log); each by its usual reading, as the others are not tested.",
        "",
        "| recipe | blend | best counter | best fine-tuned | best retrained | blend - best | below, level, above |",
        "|---|---|---|---|---|---|---|",
    ]
    blend = ("blend", "refit")
    for result in found:
        table = pl.DataFrame(result["methods"]).filter(pl.col("metric") == "ndcg@20").sort("value", descending=True)
        at = {(r["model"], r["strategy"]): 100 * r["value"] for r in table.iter_rows(named=True)}
        best = {way: next(m for m in at if m[1] == way and m != blend) for way in ("absorb", "finetune", "full")}
        first = next(m for m in at if m != blend)
        told = [one for other in at if other != blend and (one := difference(result["tests"], blend, other))]
        beyond = [one for one in told if one.startswith("**")]
        below, above = sum(one.startswith("**+") for one in beyond), sum(one.startswith("**-") for one in beyond)
        cells = [f"{at[blend]:.2f}", *(f"{at[way]:.2f} {way[0]}" for way in best.values())]
        more = difference(result["tests"], blend, first) or f"{at[blend] - at[first]:+.2f} (not tested)"
        cells.append(f"{more} {first[0]}, {first[1]}")
        cells.append(f"{below}, {len(told) - below - above}, {above}")
        lines.append(f"| {result['recipe']} | " + " | ".join(cells) + " |")
    return lines if found else []


def _slices(result: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, float]]:
    """(model, strategy, slice) -> ndcg@20 in %, a mean over seeds, and its interval."""
    table = pl.DataFrame(result["overall"]).filter(pl.col("metric") == "ndcg@20")
    means = table.group_by("model", "strategy", "slice").agg(
        pl.col("value", "low", "high").mean() * 100, pl.col("n").max()
    )
    return {(r["model"], r["strategy"], r["slice"]): r for r in means.iter_rows(named=True)}


def _categories(found: list[dict[str, Any]], difference: Difference) -> list[str]:
    if not found:
        return []
    lines = [
        "## Categories as an input",
        "",
        "`categories=100`: an item's vector is its own plus one of its category, and a new item starts at its",
        "category's. ndcg@20 in %, 95 % bootstrap intervals over users; *tail*: items outside the most popular, which",
        "make up half of all events; *new item*: first seen in the span before (so many targets). Difference on all",
        "targets, **bold** beyond chance.",
        "",
        "| recipe | model | strategy | " + " | ".join(SLICES) + " | difference |",
        "|---" * (len(SLICES) + 4) + "|",
    ]
    for result in found:
        at = _slices(result)
        told = [(m, s) for m, s, part in at if ":categories=" in m and "@" not in m and part == "all"]
        for model, strategy in sorted(told, key=lambda method: (method[1], method[0])):
            for name in (model.partition(":categories=")[0], model):
                cells = [_with(at[name, strategy, part]) for part in SLICES]
                cells[-1] += f" ({at[name, strategy, SLICES[-1]]['n']:,})"
                plain = model.partition(":categories=")[0]
                cells.append(difference(result["tests"], (name, strategy), (plain, strategy)) if name != plain else "")
                lines.append(f"| {result['recipe']} | {name} | {strategy} | " + " | ".join(cells) + " |")
    return lines


def _with(row: dict[str, float]) -> str:
    return "{value:.2f} ({low:.2f} .. {high:.2f})".format(**row)


def _cases(found: list[dict[str, Any]]) -> list[str]:
    """IMSR's first case: what each strategy is worth on what a user, or anybody, had before, and on what is new."""
    spines = [result for result in found if result["recipe"].endswith("-spine")]
    lines = [
        "## Old and new, by strategy",
        "",
        "IMSR's case study (ComiRec-DR; the paper: a full retrain is best on what is old, fine-tuning on what is",
        "new, IMSR lies between). ndcg@20 in %, means over spans, and how many targets. *Known pair*: an item that the",
        "user had before; *new item*: one that nobody had before the last span. **Bold**: the best of the row.",
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
            cells = [f"{value['value']:.2f}" for value in values if value]
            best = max(cells, key=float)
            cells = [f"**{cell}**" if cell == best and float(cell) else cell for cell in cells]
            n_targets = max(value["n"] for value in values if value)
            lines.append(f"| {result['recipe']} | {part} ({n_targets:,}) | " + " | ".join(cells) + " |")
    return lines if spines else []


def _interests(root: Path) -> list[str]:
    path = root / "benchmarks/results/case-interests.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    shares = found["serving"]
    lines = [
        "## What becomes of interests",
        "",
        f"`python benchmarks/case_interests.py --data ...` -- {found['recipe']}, {found['strategy']}, one seed.",
        "Of the last span's targets, which share is nearest to an interest born in each span, and which share of their",
        "users' interests was born there (the paper: for most users the nearest is one of span 1 or 2).",
        "",
        "| born in span | " + " | ".join(str(n) for n in range(len(shares["targets"]))) + " |",
        "|---" * (len(shares["targets"]) + 1) + "|",
    ]
    for name, words in (("targets", "targets nearest, %"), ("interests", "interests, %")):
        lines.append(f"| {words} | " + " | ".join(f"{100 * share:.1f}" for share in shares[name]) + " |")
    lines += [
        "",
        "How near interests are to what they were before each update, of users that it read again:",
        "",
        "| update of span | users | median cosine | new interests |",
        "|---|---|---|---|",
    ]
    for n, row in enumerate(found["kept"], 1):
        lines.append(f"| {n} | {row['users']:,} | {row['median_cosine']:.2f} | {row['new_interests']:,} |")
    lines += [
        "",
        "The user with interests of the most spans: the items nearest to each, after each update.",
    ]
    n_most = max(len(interests) for interests in found["user"])
    lines += ["", "| after span | " + " | ".join(f"interest {k + 1}" for k in range(n_most)) + " |"]
    lines.append("|---" * (n_most + 1) + "|")
    for n, interests in enumerate(found["user"]):
        cells = [f"born {one['born']}: {', '.join(map(str, one['items']))}" for one in interests]
        lines.append(f"| {n} | " + " | ".join(cells + [""] * (n_most - len(cells))) + " |")
    return lines


def _peers(root: Path) -> list[str]:
    path = root / "benchmarks/results/peers.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    lines = [
        "## Against other libraries",
        "",
        f"`python benchmarks/bench_peers.py --data ... --users {found['users']}` --",
        f"{found['log']}, {found['tested']:,} users,",
        f"{found['items']:,} items, {found['events']:,} events: one environment per library, the same split (each",
        "user's last event is the test, the one before it chooses the epoch), the same ranking of all items,",
        "one machine, one thread, one run, one seed. In % ours / theirs, and the difference with its 95 % bootstrap",
        "interval over users. CPU-s: training up to the best epoch; *(limit)*: stopped after "
        f"{found['limit_s']:.0f} CPU-s,",
        "while it may still have been rising.",
        "",
        "| ours | theirs | recall@20 | difference | ndcg@20 | difference | CPU-s | times as fast | epochs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        cells = [row["ours"], f"{row['library'].replace('==', ' ')}: {row['theirs']}"]
        for metric in ("recall@20", "ndcg@20"):
            ours, theirs, low, high = (100 * number for number in row[metric])
            cells += [f"{ours:.2f} / {theirs:.2f}", f"{ours - theirs:+.2f} ({low:+.2f} .. {high:+.2f})"]
        ours, theirs = row["cpu_s"]
        cells += [f"{ours:.1f} / {theirs:.1f}" + " (limit)" * row["limited"][1], f"{theirs / max(ours, 0.01):.1f}"]
        lines.append("| " + " | ".join([*cells, "{} / {}".format(*row["epochs"])]) + " |")
    if found["failed"]:
        why = "; ".join(f"{name} ({what})" for name, what in found["failed"].items())
        lines += ["", f"Could not be run: {why}."]
    return lines
