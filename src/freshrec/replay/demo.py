"""The demo: a world in which users gain interests, replayed; the table, and in words what it shows."""

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
from freshrec.replay.cell import Cell, ReplaySettings
from freshrec.replay.results import OVERALL_SPAN, collect_results
from freshrec.replay.runner import ProgressCallback, run_cells
from freshrec.replay.slices import slice_table
from freshrec.store.checkpoint import load_state
from freshrec.strategies import STRATEGIES, find_strategy
from freshrec.strategies.imsr import Detector
from freshrec.types import State

DEMO_STRATEGIES = ("frozen", "finetune", "full", "imsr")
DEMO_METRICS = ("ndcg@20", "hr@20")
EXPLANATION = """
What it shows. The world is called newborn: half of the users start to like something new on the way, and an
update sees only the newest events.
"""


@dataclass(frozen=True, eq=False)
class DemoWorld:
    """A world, and its log in spans."""

    world: World
    split: LogSplit


def make_demo_world() -> DemoWorld:
    """Half of the users gain an interest on the way."""
    generated = make_world("newborn", users=1000, items=400, events=60_000, spans=4)
    return DemoWorld(generated, split_log(generated.log, by="period", spans=4))


def make_demo_cells() -> list[Cell]:
    """The controls, and ComiRec-DR updated in four ways."""
    controls = [Cell(name, spec, "absorb", STRATEGIES["absorb"], 0) for name, spec in CONTROLS.items()]
    epochs = "fit.base_epochs=4:fit.epochs=2"  # enough for 400 items
    strategies = [(name, find_strategy(f"{name}:{epochs}")) for name in DEMO_STRATEGIES]
    return controls + [Cell("comirec-dr", MODELS["comirec-dr"], name, strategy, 0) for name, strategy in strategies]


def run_demo(demo_world: DemoWorld, out: Path, on_span_done: ProgressCallback, jobs: int = 1) -> str:
    """Replay the world into `out`; the table and its explanation, made from the numbers."""
    run_cells(make_demo_cells(), demo_world.split, ReplaySettings(), out, jobs=jobs, on_span_done=on_span_done)
    results = collect_results(make_demo_cells(), slice_table(demo_world.split.spans), DEMO_METRICS, out)
    tests = pl.read_parquet(out / "tests.parquet")
    base = load_state(next((out / "bases").glob("comirec-dr--0--*.safetensors")))
    detection = measure_detection(base, demo_world, Detector())
    sentences = [*describe_results(results, tests), detection.describe()]
    return (out / "table.md").read_text() + EXPLANATION + "\n".join(sentences)


def describe_results(results: pl.DataFrame, tests: pl.DataFrame) -> list[str]:
    """What table and tests say of quality, cost and forgetting; each sentence follows from the numbers beside it."""
    comirec = results.filter((pl.col("slice") == "all") & (pl.col("model") == "comirec-dr"))
    overall = comirec.filter(pl.col("span") == OVERALL_SPAN)
    value = {(r["strategy"], r["metric"]): float(r["value"]) for r in overall.iter_rows(named=True)}
    mean_k = comirec.filter((pl.col("strategy") == "imsr") & (pl.col("metric") == "mean_k"))
    final_interests = mean_k.sort("span")["value"][-1]

    def quality(strategy: str) -> float:
        return 100 * value[strategy, "ndcg@20"]

    def seconds(strategy: str) -> float:
        return max(value[strategy, "update_cpu_s"], 1e-3)

    forgetting = {name: 100 * value[name, "forgetting ndcg@20"] for name in ("finetune", "imsr")}
    lines = [
        f"- Updating at all is worth {quality('finetune') - quality('frozen'):+.1f} points of ndcg@20: "
        f"{quality('frozen'):.1f} % frozen, {quality('finetune'):.1f} % fine-tuned"
        + ("." if _is_different(tests, "finetune", "frozen") else "; by the paired test no more than chance."),
        f"- A full retrain reaches {quality('full'):.1f} % and costs {seconds('full') / seconds('finetune'):.0f} x the "
        f"CPU seconds of fine-tuning ({seconds('full'):.1f} against {seconds('finetune'):.1f}) for each update.",
        f"- IMSR reaches {quality('imsr'):.1f} % at {seconds('imsr') / seconds('finetune'):.1f} x fine-tuning's cost, "
        f"and after the last span leaves {final_interests:.1f} interests a user where all began with 4; "
        + (
            "its quality differs from fine-tuning's by more than chance."
            if _is_different(tests, "imsr", "finetune")
            else "the paired test does not tell its quality from fine-tuning's, so call it a tie."
        ),
        "- Forgetting is what the model after the last span has lost on earlier spans' questions since it was updated "
        f"on them; below zero it has gained. Fine-tuning: {forgetting['finetune']:+.1f} points, "
        f"IMSR: {forgetting['imsr']:+.1f}.",
    ]
    controls = results.filter(
        (pl.col("span") == OVERALL_SPAN) & (pl.col("slice") == "all") & (pl.col("metric") == "ndcg@20")
    )
    best = controls.filter(pl.col("model").is_in(list(CONTROLS))).sort("value", descending=True).row(0, named=True)
    better = ", ".join(name for name in DEMO_STRATEGIES if quality(name) > 100 * best["value"]) or "none"
    lines.append(f"- The best control is {best['model']} with {100 * best['value']:.1f} %; above it: {better}.")
    return lines


def _is_different(tests: pl.DataFrame, a: str, b: str) -> bool:
    """Whether the paired test tells two ways of updating ComiRec-DR apart, corrected for the number of tests."""
    strategies, models = pl.concat_list("strategy_a", "strategy_b"), pl.concat_list("model_a", "model_b")
    pair = strategies.list.contains(a) & strategies.list.contains(b) & (models.list.unique() == ["comirec-dr"])
    return bool(tests.filter(pair & (pl.col("metric") == "ndcg@20"))["p_adjusted"].item() < 0.05)


@dataclass(frozen=True)
class DetectionQuality:
    """The new-interests detector against the truth, for the users judged in the first span after the base."""

    n_users: int
    n_gained: int
    auc: float  # that a user with a new interest looks more puzzling than one without
    precision: float
    recall: float

    def describe(self) -> str:
        """In words."""
        return (
            f"- The detector of new interests, against the truth of the world ({self.n_users} users judged in span 1, "
            f"{self.n_gained} with something new): AUC {self.auc:.2f}; of those whom IMSR lets gain interests, "
            f"{100 * self.precision:.0f} % have gained one, and they are {100 * self.recall:.0f} % of all who have."
        )


def measure_detection(base: State, demo_world: DemoWorld, detect: Detector) -> DetectionQuality:
    """`detect` on span 1, from the state after the base block."""
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
