"""Writes docs/results.md from benchmarks/results/*.json: tables, and for each claim what the paired tests say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from studies import studies

from freshrec.disk_names import RECIPE_KEYS, with_current_keys
from freshrec.models import CONTROLS
from freshrec.replay.click_metrics import LOWER_IS_BETTER
from freshrec.replay.results import format_with_interval

MULTI = ("comirec-dr", "comirec-sa", "mind")
TRAINED = (*MULTI, "sasrec")


@dataclass(frozen=True)
class Claim:
    """A sentence that the numbers can contradict: they are of `better` minus `worse`, on each of `models`."""

    sentence: str
    better: str
    worse: str
    models: tuple[str, ...]


CLAIMS = (
    Claim("Updating at all is better than keeping the base model", "finetune", "frozen", TRAINED),
    Claim("The user's history across spans is better than this span's alone", "finetune", "finetune-span", TRAINED),
    Claim("A full retrain is better than fine-tuning (the paper: FR > FT)", "full", "finetune", TRAINED),
    Claim("IMSR is better than fine-tuning (the paper: by about 8 %)", "imsr", "finetune", MULTI),
    Claim("The retainer helps: IMSR is better than IMSR without it", "imsr", "imsr-no-eir", MULTI),
    Claim("New interests help: IMSR is better than IMSR without them", "imsr", "imsr-no-expansion", MULTI),
    Claim("IMSR against a full retrain: the difference IMSR - full", "imsr", "full", MULTI),
    Claim("Interests unused for 1 span may go", "imsr:upkeep.retire=1", "imsr", MULTI),
    Claim("Interests unused for 3 spans may go", "imsr:upkeep.retire=3", "imsr", MULTI),
    Claim("Half precision is enough for stored interests", "imsr:upkeep.fp16=true", "imsr", MULTI),
    Claim("About two interests a user, the closest merged, are enough", "imsr:upkeep.megabytes=0.5", "imsr", MULTI),
    Claim("One interest a user is enough", "imsr:upkeep.megabytes=0.001", "imsr", MULTI),
)


WITH_EXPERTS = [
    f"blend-{log}" for log in ("beauty", "electronics", "globo", "gowalla", "grocery", "kuairand", "taobao", "uci")
]
SHOWN = (
    ("blend", "refit"), ("popularity", "absorb"), ("item-knn", "absorb"), ("markov", "absorb"), ("sasrec", "finetune"),
    ("gru4rec", "finetune"), ("comirec-dr", "finetune"), ("comirec-dr", "full"), ("comirec-dr-k1", "full"),
)  # fmt: skip


PUBLISHED = {  # ADER's poster, mean of 16 cycles, %
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
OURS = {"ndcg@20", "hr@20"}  # recipes that measure both are compared with each other; others follow a paper's protocol


def readme(root: Path) -> str:
    """README.md with the table of results between its two marks."""
    return _marked((root / "README.md").read_text(), "results", _short(_found(root)))


def _marked(text: str, mark: str, lines: list[str]) -> str:
    """`text` with these lines between <!-- mark --> and <!-- /mark -->."""
    head, _, rest = text.partition(f"<!-- {mark} -->\n")
    _, _, tail = rest.partition(f"<!-- /{mark} -->\n")
    return f"{head}<!-- {mark} -->\n" + "\n".join(lines) + f"\n<!-- /{mark} -->\n{tail}"


def operations(root: Path) -> str:
    """docs/operations.md with the table of nights between its two marks."""
    rows = pl.DataFrame(json.loads((root / "benchmarks/results/nights.json").read_text())["rows"])
    kinds = rows["kind"].unique(maintain_order=True).sort().to_list()
    kinds = ["good", *(kind for kind in kinds if kind != "good")]
    lines = ["| right, of so many days; from day 8 | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    counts = pl.col("days", "right", "later", "later_right").sum()
    for name, of_log in (*rows.group_by("log", maintain_order=True), (("all",), rows)):
        sums = {row["kind"]: row for row in of_log.group_by("kind").agg(counts).iter_rows(named=True)}
        cells = ["{right} of {days}; {later_right} of {later}".format(**sums[kind]) for kind in kinds]
        lines.append(f"| {name[0]} | " + " | ".join(cells) + " |")
    return _marked((root / "docs/operations.md").read_text(), "nights", lines)


def _short(found: list[dict[str, Any]]) -> list[str]:
    """ndcg@20 of a few methods on every log, and what a full retrain costs."""
    names = [model if strategy in ("absorb", "refit") else f"{model} {strategy}" for model, strategy in SHOWN]
    lines = ["| ndcg@20, % | " + " | ".join(names) + " | CPU-s, full : finetune |", "|---" * (len(SHOWN) + 2) + "|"]
    for result in found:
        if not result["recipe"].startswith("default-"):  # the others replay fewer methods
            continue
        at = {key: 100 * row["value"] for key, row in _means(result).items() if key[2] == "ndcg@20"}
        best = max(at[(*method, "ndcg@20")] for method in SHOWN)
        cells = [f"{at[(*method, 'ndcg@20')]:.2f}" for method in SHOWN]
        cells = [f"**{cell}**" if cell == f"{best:.2f}" else cell for cell in cells]
        cost = [_means(result)["comirec-dr", way, "update_cpu_s"]["value"] for way in ("full", "finetune")]
        log = result["resolved"]["log"]["path"].partition(".")[0].replace("_", " ")
        lines.append(f"| {log} | " + " | ".join(cells) + f" | {cost[0]:.0f} : {cost[1]:.1f} |")
    return lines


def _means(result: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """(model, strategy, metric) -> value, low and high over all spans and seeds."""
    return {(r["model"], r["strategy"], r["metric"]): r for r in pl.DataFrame(result["methods"]).iter_rows(named=True)}


def _found(root: Path) -> list[dict[str, Any]]:
    files = sorted((root / "benchmarks/results").glob("*.json"))
    return [result for result in map(json.loads, (f.read_text() for f in files)) if "methods" in result]


def results_page(root: Path) -> str:
    """The whole page."""
    every = _found(root)
    found = [result for result in every if set(result["resolved"]["replay"]["metrics"]) >= OURS]
    parts = ["# Results", "", "Generated by `make docs` from `benchmarks/results/*.json`; do not edit.", ""]
    parts += [(root / "docs/findings.md").read_text().strip(), "", "## Claims and tests", ""]
    trained = [r for r in found if set(r["resolved"]["replay"]["models"]) & set(TRAINED)]
    parts += _claims([r for r in trained if not r["recipe"].startswith("default-")])
    bench = (root / "benchmarks/results/bench.jsonl").read_text().strip()
    parts += ["", "## The blend", "", *_blend([r for r in found if r["recipe"] in WITH_EXPERTS])]
    parts += _strategies([r for r in found if r["recipe"].startswith("strategies-")])
    parts += studies(root, found, _difference)
    parts += ["", "## Benchmarks", "", "`make bench`, one thread:", "", "```json", bench, "```"]
    for result in found:
        parts += ["", f"## {result['recipe']}", "", *_about(result), "", *_table(result)]
    for result in every:
        if result not in found:
            parts += ["", f"## {result['recipe']}", "", *_protocol(result)]
    return "\n".join(parts).rstrip() + "\n"


def _claims(found: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Difference in ndcg@20, in points (%), with its 95 % bootstrap interval over users. Each query is averaged",
        "over seeds first; spans weigh equally, users equally within a span, as in the tables below. **Bold** where a",
        "paired sign-flip test over users says p < 0.05 after correcting for all pairs of methods of that log",
        "(Benjamini-Hochberg). Positive: the first named is better.",
    ]
    for claim in CLAIMS:
        rows = {
            model: [_difference(r["tests"], (model, claim.better), (model, claim.worse)) for r in found]
            for model in claim.models
        }
        lines += ["", f"**{claim.sentence}.**", "", *_side_by_side("model", rows, found)]
    lines += ["", "**More interests are better than one (fine-tuned ComiRec-DR, K = 4 against K = 1).**", ""]
    pair = ("comirec-dr", "finetune"), ("comirec-dr-k1", "finetune")
    lines += _side_by_side("", {"K = 4 minus K = 1": [_difference(r["tests"], *pair) for r in found]}, found)
    lines += ["", "**The best model, fully retrained, beats item-knn.**", ""]
    lines += [
        "The model is the best of the fully retrained, chosen on these numbers: that flatters it. Controls learn",
        "held-out events one update earlier than trained models do",
        "([decision 4](decisions/004-controls-absorb-at-once.md)): that flatters the controls.",
        "",
    ]
    rows = {}
    for other in ("item-knn", "popularity"):
        best = [(_best_full(r), r["tests"]) for r in found]
        rows[f"best full minus {other}"] = [
            f"{model}: {_difference(tests, (model, 'full'), (other, 'absorb'))}" if model else ""
            for model, tests in best
        ]
    return lines + _side_by_side("", rows, found)


def _side_by_side(corner: str, rows: dict[str, list[str]], found: list[dict[str, Any]]) -> list[str]:
    """A table with a column for each recipe; rows and columns in which nothing stands are left out."""
    rows = {name: cells for name, cells in rows.items() if any(cells)}
    columns = [i for i in range(len(found)) if any(cells[i] for cells in rows.values())]
    lines = [
        f"| {corner} | " + " | ".join(found[i]["recipe"] for i in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    return lines + [f"| {name} | " + " | ".join(cells[i] for i in columns) + " |" for name, cells in rows.items()]


def _blend(found: list[dict[str, Any]]) -> list[str]:
    """What joining the experts is worth on each log, against the one of them that turned out best there."""
    lines = [
        "The blend (`refit`) against the best single expert of each log, chosen on these very numbers: that flatters",
        "the single. *Counters*: without the trained expert (`refit:trains=never`). Of each user and span the last",
        "event and two others are asked for, about 3,000 a span, all alike (gowalla: the log's own split, by user).",
        "",
        "| recipe | best single | ndcg@20 | counters | blend | blend - best single | CPU-s per update |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in found:
        at = {key[:2]: row["value"] for key, row in _means(result).items() if key[2] == "ndcg@20"}
        best = max((key for key in at if key[0] != "blend"), key=lambda key: at[key])
        cost = _means(result)["blend", "refit", "update_cpu_s"]["value"]
        counting = next(key for key in at if key[1].startswith("refit:trains="))
        ways = (best, counting, ("blend", "refit"))
        cells = [f"{100 * at[way]:.2f}" for way in ways]
        gain = f"{_difference(result['tests'], ('blend', 'refit'), best)}, {100 * (at[ways[-1]] / at[best] - 1):+.0f} %"
        lines.append(f"| {result['recipe']} | {best[0]} | " + " | ".join([*cells, gain, f"{cost:.1f}"]) + " |")
    return lines


def _strategies(found: list[dict[str, Any]]) -> list[str]:
    """Every strategy on the models of each log: quality by model, mean rank, and mean costs."""
    lines = [
        "",
        "## Every strategy",
        "",
        "ndcg@20 in %; + and -: above or below fine-tuning of the same model beyond chance (corrected for all pairs of",
        "methods of the log). *Rank*: among the strategies of a model, mean over models. CPU seconds per update, MB at",
        "the peak (of a process that had run other strategies before, and kept some of their memory) and forgetting",
        "(positive: forgotten) are means over models too.",
    ]
    for result in found:
        at, models = _means(result), result["resolved"]["replay"]["models"]
        strategies = sorted({s for m, s, metric in at if m == models[0] and metric == "ndcg@20"})
        order = {m: sorted(strategies, key=lambda s, m=m: -at[m, s, "ndcg@20"]["value"]) for m in models}  # type: ignore[misc]
        ranks = {s: sum(order[m].index(s) + 1 for m in models) / len(models) for s in strategies}
        names = ["strategy", "rank", *models, "CPU-s", "peak MB", "forgetting"]
        lines += ["", f"**{result['recipe']}**", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for strategy in sorted(strategies, key=lambda s: (ranks[s], s)):
            marks = [_mark(result["tests"], (m, strategy), (m, "finetune")) for m in models]
            cells = [strategy.partition(":")[0], f"{ranks[strategy]:.1f}"]
            cells += [f"{100 * at[m, strategy, 'ndcg@20']['value']:.2f}{mark}" for m, mark in zip(models, marks)]
            for metric, scale, form in (("update_cpu_s", 1, ".1f"), ("peak_mb", 1, ".0f"), (FORGETTING, 100, "+.2f")):
                known = [scale * at[m, strategy, metric]["value"] for m in models if (m, strategy, metric) in at]
                cells.append(format(sum(known) / len(known), form) if known else "")
            lines.append("| " + " | ".join(cells) + " |")
    return lines if found else []


def _mark(tests: dict[str, list[Any]], a: tuple[str, str], b: tuple[str, str]) -> str:
    """ "+" where a is above b beyond chance, "-" where it is below, else nothing."""
    difference = _difference(tests, a, b)
    return difference[2] if difference.startswith("**") else ""


def _best_full(result: dict[str, Any]) -> str:
    """The model whose full retrain has the highest ndcg@20, in the same numbers that are then tested."""
    at = {key: row["value"] for key, row in _means(result).items() if key[1:] == ("full", "ndcg@20")}
    plain = [key for key in at if "@" not in key[0]]
    return max(plain, key=lambda key: at[key])[0] if plain else ""


def _difference(tests: dict[str, list[Any]], a: tuple[str, str], b: tuple[str, str]) -> str:
    """a - b with its interval, bold where it is significant; empty where the pair was not run."""
    pairs = zip(zip(tests["model_a"], tests["strategy_a"]), zip(tests["model_b"], tests["strategy_b"]))
    for i, (first, second) in enumerate(pairs):
        if {first, second} == {a, b}:
            row = {name: column[i] for name, column in tests.items()}
            sign = 1 if first == a else -1
            low, high = sorted((sign * row["low"], sign * row["high"]))
            text = f"{100 * sign * row['difference']:+.2f} ({100 * low:+.2f} .. {100 * high:+.2f})"
            return f"**{text}**" if row["p_adjusted"] < 0.05 else text
    return ""


def _about(result: dict[str, Any]) -> list[str]:
    resolved = result["resolved"]
    base, *later = result["spans"]
    events, targets = [span["events"] for span in later], sum(span["targets"] for span in later)
    seen = sum((span["seen_share"] or 0.0) * span["targets"] for span in later) / max(targets, 1)
    log = resolved["log"]["path"] or f"the {resolved['log']['world']} world"
    users = f"{resolved['log']['users']:,} sampled users" if resolved["log"]["users"] else "all users"
    seeds, tuned = resolved["replay"]["seeds"], resolved["replay"]["tune"]
    return [
        f"`make reproduce RECIPE={result['recipe']} DATA=...` -- {log}, {users}; base block "
        f"{base['events']:,} events, then {len(later)} spans of {min(events):,} to {max(events):,} events; "
        f"{targets:,} targets, of which {100 * seen:.0f} % are of items seen "
        f"before their span (what counts may also offer users their own new items again); "
        f"{seeds} seed{'s' if seeds > 1 else ''}"
        + ("; knobs of each update chosen on the span before" if tuned else "; nothing tuned")
        + ", but full has no knob to choose" * tuned
        + ". The epochs of the base block are chosen once, on that block, and full uses as many at each retrain: it is "
        "otherwise untuned.",
        "",
        "Means over spans, in %, with 95 % bootstrap intervals over users; each query is averaged over seeds first, so "
        "an interval does not cover the chance in training. *stored* = ndcg@20 read from the interests stored at the "
        "last update instead of the recent history. Forgetting: what the model after the last span has lost on earlier "
        "spans' targets since it was updated on their span, for users whose held-out events are never trained on "
        "(positive: forgotten; negative: gained).",
    ]


def _table(result: dict[str, Any]) -> list[str]:
    at = _means(result)
    methods = {(m, s) for m, s, metric in at if metric == "ndcg@20" and "@" not in m}
    has_bytes = any(metric == "interest_bytes" for _, _, metric in at)
    lines = [
        "| model | strategy | ndcg@20 | hr@20 | stored | forgetting | CPU-s per update | interests per user |"
        + " their bytes |" * has_bytes,
        "|---|---|---|---|---|---|---|---|" + "---|" * has_bytes,
    ]
    for model, strategy in sorted(methods, key=lambda method: (-at[(*method, "ndcg@20")]["value"], method)):
        row = at[model, strategy, "ndcg@20"]
        stored = at.get((f"{model}@stored", strategy, "ndcg@20"))
        lost, k = at.get((model, strategy, FORGETTING)), at.get((model, strategy, "mean_k"))
        cells = [
            model,
            strategy,
            f"{100 * row['value']:.2f} ({100 * row['low']:.2f} .. {100 * row['high']:.2f})",
            f"{100 * at[model, strategy, 'hr@20']['value']:.2f}",
            f"{100 * stored['value']:.2f}" if stored else "",
            f"{100 * lost['value']:+.2f}" if lost else "",
            f"{at[model, strategy, 'update_cpu_s']['value']:.2f}",
            f"{k['value']:.2f}" if k and model not in CONTROLS else "",
        ]
        if has_bytes:
            n_bytes = at.get((model, strategy, "interest_bytes"))
            cells.append(f"{n_bytes['value']:.0f}" if n_bytes else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _protocol(result: dict[str, Any]) -> list[str]:
    """A table of a recipe that follows a paper's own protocol: every metric, the cost, and what was published."""
    part, (base, *later) = result["resolved"]["replay"], result["spans"]
    part = with_current_keys(part, RECIPE_KEYS["replay"])
    at, metrics = _means(result), part["metrics"]
    published = PUBLISHED.get(result["recipe"], {})
    methods = {(m, s) for m, s, metric in at if metric == metrics[0]}
    up = -1 if metrics[0] in LOWER_IS_BETTER else 1
    first, seeds = max(1, part["from_span"]), part["seeds"]
    lines = [
        f"`make reproduce RECIPE={result['recipe']} DATA=...` -- {result['resolved']['log']['path']}; base block "
        f"{base['events']:,} events, then {len(later)} spans; means over spans {first} to {len(later)}, where "
        f"{EQUAL[part['averaging']]} weigh equally; {seeds} seed{'s' if seeds > 1 else ''}.",
        "",
        "| model | strategy | "
        + " | ".join(metrics)
        + " | CPU-s per update | peak MB |"
        + " published |" * bool(published),
        "|---" * (4 + len(metrics) + bool(published)) + "|",
    ]
    for model, strategy in sorted(methods, key=lambda method: (-up * at[(*method, metrics[0])]["value"], method)):
        costs = [at.get((model, strategy, cost)) for cost in ("update_cpu_s", "peak_mb")]
        known = published.get(strategy.partition(":")[0])
        cells = [_short_name(model), _short_name(strategy)]
        cells += [format_with_interval(metric, at[model, strategy, metric]) for metric in metrics]
        cells += [f"{cost['value']:.1f}" if cost else "" for cost in costs]
        cells += [" / ".join(f"{n:.2f}" for n in known) if known else ""] if published else []
        lines.append("| " + " | ".join(cells) + " |")
    return lines + _improvements(at, metrics)


def _improvements(at: dict[tuple[str, str, str], dict[str, Any]], metrics: list[str]) -> list[str]:
    """RI of SML over each other method, where a recipe has it and the metrics that RI is a mean over."""
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
        found.append(f"{_short_name(model)} {_short_name(strategy)} {100 * both[0]:+.0f} / {100 * both[1]:+.0f} %")
    return ["", "RI of sml (recall / ndcg, means over k) over: " + "; ".join(found) + "."]


def improvement(ours: list[float], theirs: list[float]) -> float:
    """RI, as SML reports it: by what share ours is higher, the mean over k of the metric at k."""
    return sum(a / b - 1 for a, b in zip(ours, theirs, strict=True)) / len(ours)


def _short_name(name: str) -> str:
    """Without the options of the protocol, which the recipe holds; those that tell methods apart stay."""
    telling = ("dropout=", "rounds=", "transfer=", "k=", "weight=")
    kept = [part for part in name.split(":")[1:] if part.startswith(telling)]
    return ":".join([name.partition(":")[0], *kept])
