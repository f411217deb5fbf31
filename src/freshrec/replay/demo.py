"""The demo: replay a world in which users gain interests, and explain the table of results."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from scipy.stats import mannwhitneyu

from freshrec.data.split import LogSplit, split_log
from freshrec.data.synthetic import World, make_world
from freshrec.models import CONTROLS, MODELS
from freshrec.models.absorb import absorb_block
from freshrec.replay.answer import SIGNIFICANCE_LEVEL, read_answer
from freshrec.replay.answer_text import output_width, render_table, wrap
from freshrec.replay.cell import Cell, ReplaySettings
from freshrec.replay.recipe_schema import FIRST_UPDATED_SPAN
from freshrec.replay.results import OVERALL_SPAN, collect_results
from freshrec.replay.runner import ProgressCallback, run_cells
from freshrec.replay.slices import slice_table
from freshrec.store.checkpoint import load_state
from freshrec.strategies import STRATEGIES, find_strategy
from freshrec.strategies.imsr import Detector
from freshrec.types import State

DEMO_STRATEGIES = ("frozen", "finetune", "full", "imsr")
DEMO_METRICS = ("ndcg@20", "hr@20")
EXPLANATION = (
    "What it shows. In this generated world half of the users start to like something new along the way. "
    "An update sees the newest events only."
)


@dataclass(frozen=True, eq=False)
class DemoWorld:
    """A world and its log, split into spans."""

    world: World
    split: LogSplit


def make_demo_world() -> DemoWorld:
    """Generate the world: half of the users gain an interest along the way."""
    generated = make_world("newborn", users=1000, items=400, events=60_000, spans=4)
    return DemoWorld(generated, split_log(generated.log, by="period", spans=4))


def make_demo_cells() -> list[Cell]:
    """The runs of the demo: the controls, and ComiRec-DR updated in four ways."""
    controls = [Cell(name, spec, "absorb", STRATEGIES["absorb"], 0) for name, spec in CONTROLS.items()]
    epochs = "fit.base_epochs=4:fit.epochs=2"  # enough for 400 items
    strategies = [(name, find_strategy(f"{name}:{epochs}")) for name in DEMO_STRATEGIES]
    return controls + [Cell("comirec-dr", MODELS["comirec-dr"], name, strategy, 0) for name, strategy in strategies]


def run_demo(demo_world: DemoWorld, out: Path, on_span_done: ProgressCallback, jobs: int = 1) -> str:
    """Replay the world into `out`. Return the table and its explanation, made from the numbers."""
    cells = make_demo_cells()
    run_cells(cells, demo_world.split, ReplaySettings(), out, jobs=jobs, on_span_done=on_span_done)
    results = collect_results(
        cells, slice_table(demo_world.split.spans), DEMO_METRICS, out, from_span=FIRST_UPDATED_SPAN
    )
    tests = pl.read_parquet(out / "tests.parquet", glob=False)
    base = load_state(next((out / "bases").glob("comirec-dr--0--*.safetensors")))
    sentences = [*describe_results(results, tests), measure_detection(base, demo_world, Detector()).describe()]
    width = output_width()
    lines = [EXPLANATION, *sentences, "Next: the same on your own log, `freshrec replay LOG --plan`."]
    table = render_table(read_answer(cells, out, DEMO_METRICS[0]), width)
    return "\n".join([table, "", *(wrap(line, width, "  " * line.startswith("- ")) for line in lines)])


def describe_results(results: pl.DataFrame, tests: pl.DataFrame) -> list[str]:
    """Sentences on quality, cost and forgetting, each derived from the numbers in it."""
    comirec = results.filter((pl.col("slice") == "all") & (pl.col("model") == "comirec-dr"))
    overall = comirec.filter(pl.col("span") == OVERALL_SPAN)
    value = {(r["strategy"], r["metric"]): float(r["value"]) for r in overall.iter_rows(named=True)}
    mean_k = comirec.filter((pl.col("strategy") == "imsr") & (pl.col("metric") == "mean_k"))
    final_interests = mean_k.sort("span")["value"][-1]

    def quality(strategy: str) -> float:
        return value[strategy, "ndcg@20"]

    def seconds(strategy: str) -> float:
        return max(value[strategy, "update_cpu_s"], 1e-3)

    forgetting = {name: value[name, "forgetting ndcg@20"] for name in ("finetune", "imsr")}
    is_chance = {
        "updating": not _is_different(tests, "finetune", "frozen"),
        "imsr": not _is_different(tests, "imsr", "finetune"),
    }
    lines = [
        f"- Updating gains {quality('finetune') - quality('frozen'):+.4f} ndcg@20: {quality('finetune'):.4f} with "
        f"fine-tuning, {quality('frozen'):.4f} frozen. "
        + ("By the paired test this is within chance." if is_chance["updating"] else "This is beyond chance."),
        f"- A full retrain reaches {quality('full'):.4f}. It costs {seconds('full'):.1f} CPU-s per update, "
        f"{seconds('full') / seconds('finetune'):.0f} times as much as fine-tuning ({seconds('finetune'):.1f}).",
        f"- IMSR reaches {quality('imsr'):.4f} at {seconds('imsr') / seconds('finetune'):.1f} times the cost of "
        "fine-tuning. "
        + (
            "The paired test cannot separate the two: call it a tie."
            if is_chance["imsr"]
            else "By the paired test it differs from fine-tuning beyond chance."
        ),
        f"- Every user starts with 4 interests. After the last span IMSR keeps {final_interests:.1f} per user.",
        f"- Forgetting of earlier spans, as loss of ndcg@20 (positive = lost): {forgetting['finetune']:+.4f} with "
        f"fine-tuning, {forgetting['imsr']:+.4f} with IMSR.",
    ]
    controls = results.filter(
        (pl.col("span") == OVERALL_SPAN) & (pl.col("slice") == "all") & (pl.col("metric") == "ndcg@20")
    )
    best = controls.filter(pl.col("model").is_in(list(CONTROLS))).sort("value", descending=True).row(0, named=True)
    better = ", ".join(name for name in DEMO_STRATEGIES if quality(name) > best["value"]) or "none"
    lines.append(f"- The best control is {best['model']} with {best['value']:.4f}. Better than it: {better}.")
    return lines


def _is_different(tests: pl.DataFrame, a: str, b: str) -> bool:
    """Whether two ways of updating ComiRec-DR differ beyond chance by the paired test."""
    strategies, models = pl.concat_list("strategy_a", "strategy_b"), pl.concat_list("model_a", "model_b")
    pair = strategies.list.contains(a) & strategies.list.contains(b) & (models.list.unique() == ["comirec-dr"])
    return bool(tests.filter(pair & (pl.col("metric") == "ndcg@20"))["p_adjusted"].item() < SIGNIFICANCE_LEVEL)


@dataclass(frozen=True)
class DetectionQuality:
    """Quality of IMSR's detector of new interests in span 1, compared with the truth of the world."""

    n_users: int  # rated by the detector
    n_gained: int  # who really have a new interest
    auc: float  # probability that a user with a new interest has the higher puzzlement of two
    precision: float  # share of the detected users who have a new interest
    recall: float  # share of the users with a new interest who are detected

    def describe(self) -> str:
        """The numbers in words."""
        return (
            f"- IMSR's detector of new interests rates {self.n_users} users in span 1, and {self.n_gained} of them "
            f"really have a new interest. Its AUC is {self.auc:.4f}, its precision {self.precision:.4f}, "
            f"its recall {self.recall:.4f}."
        )


def measure_detection(base: State, demo_world: DemoWorld, detect: Detector) -> DetectionQuality:
    """Run `detect` on span 1, with the state after the base block."""
    span, truth = demo_world.split.spans[1], demo_world.world.truth
    state = absorb_block(base, span.events, span.n_users, span.n_items)
    assert state.interests is not None and truth is not None
    flagged_N, users_N, kl_N = detect.find_puzzled_users(
        state.model, state.interests, state.histories, base.model.n_items
    )
    gained = truth.filter(pl.col("span") == 1)["user_id"].unique()
    gained_N = np.isin(users_N.numpy(), demo_world.split.user_catalog.rows(gained).numpy())
    auc = float(mannwhitneyu(-kl_N.numpy()[gained_N], -kl_N.numpy()[~gained_N]).statistic)
    hits = int(torch.isin(flagged_N, users_N[torch.from_numpy(gained_N)]).sum())
    n_gained = int(gained_N.sum())
    return DetectionQuality(
        len(users_N),
        n_gained,
        auc / max(n_gained * int((~gained_N).sum()), 1),
        hits / max(len(flagged_N), 1),
        hits / max(n_gained, 1),
    )
