"""Write docs/results.md from benchmarks/results/*.json: tables, and the paired tests that belong to each claim."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from epoch_text import epochs_cell, has_epochs, joint_epochs_cell, mean_epochs_cell, row_name
from formatting import difference, fraction
from recipe_tables import FORGETTING, method_means, protocol_table, recipe_facts, recipe_table
from studies import studies

MULTI = ("comirec-dr", "comirec-sa", "mind")
TRAINED = (*MULTI, "sasrec")


@dataclass(frozen=True)
class Claim:
    """A sentence that the numbers can contradict: `better` minus `worse` should be positive for each model."""

    sentence: str
    better: str
    worse: str
    models: tuple[str, ...]


CLAIMS = (
    Claim("Updating is better than keeping the base model", "finetune", "frozen", TRAINED),
    Claim("Histories across spans are better than histories within one span", "finetune", "finetune-span", TRAINED),
    Claim("A full retrain is better than fine-tuning (the paper: FR > FT)", "full", "finetune", TRAINED),
    Claim("IMSR is better than fine-tuning (the paper: by about 8 %)", "imsr", "finetune", MULTI),
    Claim("The retainer helps: IMSR is better than IMSR without it", "imsr", "imsr-no-eir", MULTI),
    Claim("New interests help: IMSR is better than IMSR without them", "imsr", "imsr-no-expansion", MULTI),
    Claim("IMSR compared with a full retrain: the difference IMSR - full", "imsr", "full", MULTI),
    Claim("Interests that were unused for 1 span can be deleted without loss", "imsr:upkeep.retire=1", "imsr", MULTI),
    Claim("Interests that were unused for 3 spans can be deleted without loss", "imsr:upkeep.retire=3", "imsr", MULTI),
    Claim("Half precision is enough for stored interests", "imsr:upkeep.fp16=true", "imsr", MULTI),
    Claim("About two interests per user, the closest merged, are enough", "imsr:upkeep.megabytes=0.5", "imsr", MULTI),
    Claim("One interest per user is enough", "imsr:upkeep.megabytes=0.001", "imsr", MULTI),
)
WITH_EXPERTS = [
    f"blend-{log}" for log in ("beauty", "electronics", "globo", "gowalla", "grocery", "kuairand", "taobao", "uci")
]
SHOWN = (("item-knn", "absorb"), ("popularity", "absorb"), ("comirec-dr", "finetune"), ("comirec-dr", "full"))
FATES = ("nights", "refused", "learned", "waiting", "lost")  # of the days in benchmarks/results/nights.json
DAGGER = "Rows marked with † were made by commit 42fdc16 or earlier, under the rules of that time."
OURS = {"ndcg@20", "hr@20"}  # recipes that measure both are compared; all others follow a paper's protocol


def readme(root: Path) -> str:
    """Return README.md with the table of results between its two marks."""
    return _marked((root / "README.md").read_text(), "results", _short(_found(root)))


def _marked(text: str, mark: str, lines: list[str]) -> str:
    """Return `text` with these lines between <!-- mark --> and <!-- /mark -->."""
    head, _, rest = text.partition(f"<!-- {mark} -->\n")
    _, _, tail = rest.partition(f"<!-- /{mark} -->\n")
    return f"{head}<!-- {mark} -->\n" + "\n".join(lines) + f"\n<!-- /{mark} -->\n{tail}"


def operations(root: Path) -> str:
    """Return docs/operations.md with the tables of nights between their marks."""
    found = json.loads((root / "benchmarks/results/nights.json").read_text())
    text = _marked((root / "docs/operations.md").read_text(), "nights", _verdict_table(found["rows"]))
    return _marked(text, "obeyed", _obeyed_tables(found["stores"]))


def _verdict_table(found: list[dict[str, Any]]) -> list[str]:
    """Return a table of the share of correct verdicts, by log and kind of day."""
    rows = pl.DataFrame(found)
    kinds = rows["kind"].unique(maintain_order=True).sort().to_list()
    kinds = ["good", *(kind for kind in kinds if kind != "good")]
    lines = ["Correct verdicts on all days; correct verdicts from day 8 on:", ""]
    lines += ["| log | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    counts = pl.col("days", "right", "later", "later_right").sum()
    for name, of_log in (*rows.group_by("log", maintain_order=True), (("all",), rows)):
        sums = {row["kind"]: row for row in of_log.group_by("kind").agg(counts).iter_rows(named=True)}
        cells = ["{right} of {days}; {later_right} of {later}".format(**sums[kind]) for kind in kinds]
        lines.append(f"| {name[0]} | " + " | ".join(cells) + " |")
    return lines


def _obeyed_tables(stores: list[dict[str, Any]]) -> list[str]:
    """Return what became of the days of resampled nights: of all stores, and of those with both gates."""
    by_gate = {gate: [row for row in stores if row["gate"] == gate] for gate in ("now", "0.1.0")}
    both = {(row["log"], row["store"]) for row in by_gate["0.1.0"]}
    same = [row for row in by_gate["now"] if (row["log"], row["store"]) in both]
    now = by_gate["now"]
    good = [row["kinds"]["good"] for row in now]
    separate, rows = sum(kind["separate_rows"] for kind in good), sum(kind["rows"] for kind in good)
    logs = ", ".join(dict.fromkeys(row["log"].partition(",")[0] for row in now))
    lines = [
        f"{sum(row['nights'] for row in now):,} nights of {len(now)} stores on four logs ({logs}):",
        "",
        *_fates(now),
        "",
        f"Of the rows of good days, {100 * separate / rows:.2f} % belong to a suspicious user and were set aside.",
    ]
    if both:
        head = f"The same {sum(row['nights'] for row in same):,} nights with the gate of 0.1.0 and with this one"
        lines += [
            "",
            f"{head} ({len(same)} of the stores):",
            "",
            *_fates(by_gate["0.1.0"], "0.1.0"),
            *_fates(same, "now")[2:],
        ]
    return lines


def _fates(stores: list[dict[str, Any]], gate: str = "") -> list[str]:
    """Return a table of what became of each kind of day."""
    lines = ["| day | nights | refused at first | learned | waiting at the end | not learned |", "|---" * 6 + "|"]
    if gate:
        lines = ["| gate " + lines[0], "|---" + lines[1]]
    for kind in stores[0]["kinds"]:
        counts = [sum(row["kinds"][kind][name] for row in stores) for name in FATES]
        cells = [kind, *(f"{count:,}" for count in counts)]
        lines.append("| " + " | ".join([gate, *cells] if gate else cells) + " |")
    return lines


def _short(found: list[dict[str, Any]]) -> list[str]:
    """Return a table with ndcg@20 of the blend, of the best other method and of a few more, and with costs."""
    found = [result for result in found if result["recipe"].startswith("default-")]  # the others replay fewer methods
    is_trained = any(has_epochs(method_means(result)) for result in found)
    lines = [
        "| log | blend | best other | item-knn | popularity | comirec-dr, fine-tuned | comirec-dr, full retrain "
        "| CPU-s per update of comirec-dr: fine-tuned / full retrain |" + " their epochs per update |" * is_trained,
        "|---" * (len(SHOWN) + 4 + is_trained) + "|",
    ]
    for result in found:
        means = method_means(result)
        at = {(m, s): row["value"] for (m, s, metric), row in means.items() if metric == "ndcg@20" and "@" not in m}
        blend = at.pop(("blend", "refit"))
        best = max(at, key=lambda method: at[method])
        name = best[0] if best[1] == "absorb" else ", ".join(best)
        cells = [fraction(blend), f"{fraction(at[best])} ({name})", *(fraction(at[method]) for method in SHOWN)]
        cost = [means["comirec-dr", way, "update_cpu_s"]["value"] for way in ("finetune", "full")]
        log = result["resolved"]["log"]["path"].partition(".")[0].replace("_", " ")
        cells.append(f"{cost[0]:.1f} / {cost[1]:.1f}")
        ways = [("comirec-dr", way) for way in ("finetune", "full")]
        cells += [joint_epochs_cell(result, means, ways)] * is_trained
        lines.append(f"| {row_name(result, log)} | " + " | ".join(cells) + " |")
    if any("commit" not in result for result in found):
        lines += ["", DAGGER]
    return lines


def _found(root: Path) -> list[dict[str, Any]]:
    files = sorted((root / "benchmarks/results").glob("*.json"))
    return [result for result in map(json.loads, (f.read_text() for f in files)) if "methods" in result]


def results_page(root: Path) -> str:
    """Return the whole page."""
    every = _found(root)
    found = [result for result in every if set(result["resolved"]["replay"]["metrics"]) >= OURS]
    parts = ["# Results", "", "Generated by `make docs` from `benchmarks/results/*.json`; do not edit.", ""]
    parts += ["This page has three parts: the findings, tables that combine recipes, and one section per recipe.", ""]
    parts += [(root / "docs/findings.md").read_text().strip(), "", *_how_to_read(), "", "## Claims and tests", ""]
    trained = [r for r in found if set(r["resolved"]["replay"]["models"]) & set(TRAINED)]
    parts += _claims([r for r in trained if not r["recipe"].startswith("default-")])
    bench = (root / "benchmarks/results/bench.jsonl").read_text().strip()
    parts += ["", "## The blend", "", *_blend([r for r in found if r["recipe"] in WITH_EXPERTS])]
    parts += _strategies([r for r in found if r["recipe"].startswith("strategies-")])
    parts += studies(root, found, _difference)
    parts += ["", "## Benchmarks", "", "The output of `make bench`, on one thread:", "", "```json", bench, "```"]
    for result in found:
        parts += ["", f"## {result['recipe']}", "", *recipe_facts(result), "", *recipe_table(result)]
    for result in every:
        if result not in found:
            parts += ["", f"## {result['recipe']}", "", *protocol_table(result)]
    return "\n".join(parts).rstrip() + "\n"


def _how_to_read() -> list[str]:
    """Return the section that says once what holds for all tables."""
    return [
        "## How to read the tables",
        "",
        "- *Units.* ndcg, hr, recall, mrr and auc are fractions from 0 to 1: higher is better. Log loss is in nats per",
        "  event: lower is better. CPU-s are seconds of processor time, all threads together.",
        "- *Means.* Values are means over spans. Each query is averaged over seeds first.",
        "- *Intervals.* `value (low .. high)` is a 95 % bootstrap interval over users. It does not cover the random",
        "  choices of training.",
        "- *Beyond chance.* A paired sign-flip test over users gives p < 0.05 after the Benjamini-Hochberg correction",
        "  for all pairs of methods of the same recipe. Differences beyond chance are **bold**.",
        "- *Epochs.* The mean number of epochs per update, and what set it. *Fixed*: an option. *Patience*: the",
        "  quality of held-out events had not risen for `fit.patience` epochs. *Minimum*: raised to `fit.min_epochs`.",
        "  *Maximum*: training reached `fit.max_epochs`. A percentage is the share of the trainings. Recipes made by",
        "  commit 42fdc16 or earlier recorded no reasons, and most of them no epochs.",
        f"- *Rules.* {DAGGER}",
        "- *Forgetting.* The loss of ndcg@20 on targets of earlier spans, measured after the last span: positive =",
        "  forgotten, negative = improved. The loss is counted from the update on the span of the target. Only users",
        "  whose held-out events are never trained on are measured.",
        "- *Histories and stored interests.* A multi-interest model normally reads a user's interests from the recent",
        '  history. "Stored interests" means the interests that were stored at the last update are read instead, and',
        '  "recent and stored interests" means that both are used.',
        "- *Blocks.* `(4 blocks)` after a strategy means that each span was measured and counted in 4 blocks, one",
        "  after the other. Without it, a span is one block.",
    ]


def _claims(found: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Each cell is a difference in ndcg@20, the first method minus the second: positive = the first is better. It",
        "comes with its 95 % bootstrap interval over users, and is **bold** where it is beyond chance. Spans weigh",
        "equally, and users weigh equally within a span.",
    ]
    for claim in CLAIMS:
        columns = {
            model: [_difference(r["tests"], (model, claim.better), (model, claim.worse)) for r in found]
            for model in claim.models
        }
        lines += ["", f"### {claim.sentence}", "", f"`{claim.better}` minus `{claim.worse}`:", ""]
        lines += _side_by_side(columns, found)
    lines += ["", "### More interests are better than one (fine-tuned ComiRec-DR)", ""]
    pair = ("comirec-dr", "finetune"), ("comirec-dr-k1", "finetune")
    lines += _side_by_side({"K = 4 minus K = 1": [_difference(r["tests"], *pair) for r in found]}, found)
    lines += ["", "### The best model, fully retrained, beats item-knn", ""]
    lines += [
        "The model is the best fully retrained one, chosen on these numbers, which favours it. Counting models learn",
        "held-out events one update earlier than trained models do, which favours the counting models",
        "([decision 4](decisions/004-controls-absorb-at-once.md)).",
        "",
    ]
    columns = {}
    for other in ("item-knn", "popularity"):
        best = [(_best_full(r), r["tests"]) for r in found]
        columns[f"best full minus {other}"] = [
            f"{model}: {_difference(tests, (model, 'full'), (other, 'absorb'))}" if model else ""
            for model, tests in best
        ]
    return lines + _side_by_side(columns, found)


def _side_by_side(columns: dict[str, list[str]], found: list[dict[str, Any]]) -> list[str]:
    """Return a table with a row for each recipe, without empty rows and columns."""
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    rows = [(row_name(result), *(cells[i] for cells in columns.values())) for i, result in enumerate(found)]
    lines = [f"| recipe | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows if any(row[1:])]


def _blend(found: list[dict[str, Any]]) -> list[str]:
    """Return a table that compares the blend with the best single expert of each log."""
    is_trained = any(has_epochs(method_means(result)) for result in found)
    lines = [
        "ndcg@20 of the blend (`refit`) and of the best single expert of each log. That expert is chosen on these",
        "numbers, which favours it. *Counting only* is the blend without its trained expert (`refit:trains=never`).",
        "The targets are the last event of each user in each span and two others, about 3,000 per span. They weigh",
        "equally. On gowalla the targets are those of the log's own split, and users weigh equally.",
        "",
        "| recipe | best single | its ndcg@20 | counting only | blend | blend - best single | CPU-s per update |"
        + " epochs |" * is_trained,
        "|---" * (7 + is_trained) + "|",
    ]
    for result in found:
        means = method_means(result)
        at = {key[:2]: row["value"] for key, row in means.items() if key[2] == "ndcg@20"}
        best = max((key for key in at if key[0] != "blend"), key=lambda key: at[key])
        cost = means["blend", "refit", "update_cpu_s"]["value"]
        counting = next(key for key in at if key[1].startswith("refit:trains="))
        ways = (best, counting, ("blend", "refit"))
        cells = [fraction(at[way]) for way in ways]
        gain = f"{_difference(result['tests'], ('blend', 'refit'), best)}, {100 * (at[ways[-1]] / at[best] - 1):+.0f} %"
        cells += [gain, f"{cost:.1f}", *[epochs_cell(result, means, "blend", "refit")] * is_trained]
        lines.append(f"| {row_name(result)} | {best[0]} | " + " | ".join(cells) + " |")
    return lines


def _strategies(found: list[dict[str, Any]]) -> list[str]:
    """Return a table for each log: the quality of every strategy by model, its mean rank, and its mean costs."""
    lines = [
        "",
        "## Every strategy",
        "",
        "ndcg@20 by model, higher is better. + and - mark differences from fine-tuning of the same model that are",
        "beyond chance: + is better, - is worse. *Rank* is the place among the strategies of a model (1 = best), as a",
        "mean over models. CPU-s per update, peak memory, forgetting (positive = forgotten) and epochs are means over",
        "models too. Peak memory is that of a process that had run other strategies before and kept some of their",
        "memory.",
    ]
    for result in found:
        at, models = method_means(result), result["resolved"]["replay"]["models"]
        strategies = sorted({s for m, s, metric in at if m == models[0] and metric == "ndcg@20"})
        order = {m: sorted(strategies, key=lambda s, m=m: -at[m, s, "ndcg@20"]["value"]) for m in models}  # type: ignore[misc]
        ranks = {s: sum(order[m].index(s) + 1 for m in models) / len(models) for s in strategies}
        names = ["strategy", "rank", *models, "CPU-s", "peak MB", "forgetting", *["epochs"] * has_epochs(at)]
        lines += ["", f"**{result['recipe']}**", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for strategy in sorted(strategies, key=lambda s: (ranks[s], s)):
            marks = [_mark(result["tests"], (m, strategy), (m, "finetune")) for m in models]
            cells = [strategy.partition(":")[0], f"{ranks[strategy]:.1f}"]
            cells += [fraction(at[m, strategy, "ndcg@20"]["value"]) + mark for m, mark in zip(models, marks)]
            for metric, form in (("update_cpu_s", ".1f"), ("peak_mb", ".0f"), (FORGETTING, "+.4f")):
                known = [at[m, strategy, metric]["value"] for m in models if (m, strategy, metric) in at]
                cells.append(format(sum(known) / len(known), form) if known else "")
            cells += [mean_epochs_cell(result, at, models, strategy)] * has_epochs(at)
            lines.append("| " + " | ".join(cells) + " |")
    return lines if found else []


def _mark(tests: dict[str, list[Any]], a: tuple[str, str], b: tuple[str, str]) -> str:
    """Return "+" where a is above b beyond chance, "-" where it is below, else nothing."""
    found = _difference(tests, a, b)
    return found[2] if found.startswith("**") else ""


def _best_full(result: dict[str, Any]) -> str:
    """Return the model whose full retrain has the highest ndcg@20, in the same numbers that are then tested."""
    at = {key: row["value"] for key, row in method_means(result).items() if key[1:] == ("full", "ndcg@20")}
    plain = [key for key in at if "@" not in key[0]]
    return max(plain, key=lambda key: at[key])[0] if plain else ""


def _difference(tests: dict[str, list[Any]], a: tuple[str, str], b: tuple[str, str]) -> str:
    """Return a - b with its interval, bold where it is beyond chance; empty where the pair was not run."""
    pairs = zip(zip(tests["model_a"], tests["strategy_a"]), zip(tests["model_b"], tests["strategy_b"]))
    for i, (first, second) in enumerate(pairs):
        if {first, second} == {a, b}:
            row = {name: column[i] for name, column in tests.items()}
            sign = 1 if first == a else -1
            low, high = sorted((sign * row["low"], sign * row["high"]))
            text = difference(sign * row["difference"], low, high)
            return f"**{text}**" if row["p_adjusted"] < 0.05 else text
    return ""
