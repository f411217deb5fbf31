"""The demo: a world in which users gain interests, replayed; the table, and in words what it shows."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from scipy.stats import mannwhitneyu

from freshrec.data.spans import Cut, cut
from freshrec.data.worlds import World, make
from freshrec.models import CONTROLS, MODELS
from freshrec.models.checkpoint import load_state
from freshrec.models.counted import absorb
from freshrec.replay.measure import facts
from freshrec.replay.replay import Cell, Settings
from freshrec.replay.results import OVERALL, collect
from freshrec.replay.run import Tell, run
from freshrec.strategies import STRATEGIES, find_strategy
from freshrec.strategies.imsr import Detect
from freshrec.types import State

WAYS = ("frozen", "finetune", "full", "imsr")
METRICS = ("ndcg@20", "hr@20")
EXPLAINED = """
What it shows. The world is called newborn: half of the users start to like something new on the way, and an
update sees only the newest events.
"""


@dataclass(frozen=True, eq=False)
class Known:
    """A world, and its log in spans."""

    world: World
    cut: Cut


def world() -> Known:
    """Half of the users gain an interest on the way."""
    made = make("newborn", users=1000, items=400, events=60_000, spans=4)
    return Known(made, cut(made.log, by="period", spans=4))


def cells() -> list[Cell]:
    """The controls, and ComiRec-DR updated in four ways."""
    controls = [Cell(name, spec, "absorb", STRATEGIES["absorb"], 0) for name, spec in CONTROLS.items()]
    ways = [(way, find_strategy(f"{way}:fit.base_epochs=4:fit.epochs=2")) for way in WAYS]  # enough for 400 items
    return controls + [Cell("comirec-dr", MODELS["comirec-dr"], way, strategy, 0) for way, strategy in ways]


def demo(known: Known, out: Path, tell: Tell, jobs: int = 1) -> str:
    """Replay the world into `out`; the table and its explanation, made from the numbers."""
    run(cells(), known.cut, Settings(), out, jobs=jobs, tell=tell)
    results = collect(cells(), facts(known.cut.spans), METRICS, out)
    tests = pl.read_parquet(out / "tests.parquet")
    base = load_state(next((out / "bases").glob("comirec-dr--0--*.safetensors")))
    found = judged(base, known, Detect())
    return (out / "table.md").read_text() + EXPLAINED + "\n".join([*sentences(results, tests), found.sentence()])


def sentences(results: pl.DataFrame, tests: pl.DataFrame) -> list[str]:
    """What table and tests say of quality, cost and forgetting; each sentence follows from the numbers beside it."""
    comirec = results.filter((pl.col("slice") == "all") & (pl.col("model") == "comirec-dr"))
    overall = comirec.filter(pl.col("span") == OVERALL)
    value = {(r["strategy"], r["metric"]): float(r["value"]) for r in overall.iter_rows(named=True)}
    grown = comirec.filter((pl.col("strategy") == "imsr") & (pl.col("metric") == "mean_k")).sort("span")["value"][-1]

    def quality(way: str) -> float:
        return 100 * value[way, "ndcg@20"]

    def seconds(way: str) -> float:
        return max(value[way, "update_cpu_s"], 1e-3)

    lost = {way: 100 * value[way, "forgetting ndcg@20"] for way in ("finetune", "imsr")}
    said = [
        f"- Updating at all is worth {quality('finetune') - quality('frozen'):+.1f} points of ndcg@20: "
        f"{quality('frozen'):.1f} % frozen, {quality('finetune'):.1f} % fine-tuned"
        + ("." if _differ(tests, "finetune", "frozen") else "; by the paired test no more than chance."),
        f"- A full retrain reaches {quality('full'):.1f} % and costs {seconds('full') / seconds('finetune'):.0f} x the "
        f"CPU seconds of fine-tuning ({seconds('full'):.1f} against {seconds('finetune'):.1f}) for each update.",
        f"- IMSR reaches {quality('imsr'):.1f} % at {seconds('imsr') / seconds('finetune'):.1f} x fine-tuning's cost, "
        f"and after the last span leaves {grown:.1f} interests a user where all began with 4; "
        + (
            "its quality differs from fine-tuning's by more than chance."
            if _differ(tests, "imsr", "finetune")
            else "the paired test does not tell its quality from fine-tuning's, so call it a tie."
        ),
        "- Forgetting is what the model after the last span has lost on earlier spans' questions since it was updated "
        f"on them; below zero it has gained. Fine-tuning: {lost['finetune']:+.1f} points, IMSR: {lost['imsr']:+.1f}.",
    ]
    controls = results.filter(
        (pl.col("span") == OVERALL) & (pl.col("slice") == "all") & (pl.col("metric") == "ndcg@20")
    )
    best = controls.filter(pl.col("model").is_in(list(CONTROLS))).sort("value", descending=True).row(0, named=True)
    ways = ", ".join(w for w in WAYS if quality(w) > 100 * best["value"]) or "none"
    said.append(f"- The best control is {best['model']} with {100 * best['value']:.1f} %; above it: {ways}.")
    return said


def _differ(tests: pl.DataFrame, a: str, b: str) -> bool:
    """Whether the paired test tells two ways of updating ComiRec-DR apart, corrected for the number of tests."""
    ways, models = pl.concat_list("strategy_a", "strategy_b"), pl.concat_list("model_a", "model_b")
    pair = ways.list.contains(a) & ways.list.contains(b) & (models.list.unique() == ["comirec-dr"])
    return bool(tests.filter(pair & (pl.col("metric") == "ndcg@20"))["p_adjusted"].item() < 0.05)


@dataclass(frozen=True)
class Detection:
    """The new-interests detector against the truth, for the users judged in the first span after the base."""

    n_users: int
    n_gained: int
    auc: float  # that a user with a new interest looks more puzzling than one without
    precision: float
    recall: float

    def sentence(self) -> str:
        """In words."""
        return (
            f"- The detector of new interests, against the truth of the world ({self.n_users} users judged in span 1, "
            f"{self.n_gained} with something new): AUC {self.auc:.2f}; of those whom IMSR lets gain interests, "
            f"{100 * self.precision:.0f} % have gained one, and they are {100 * self.recall:.0f} % of all who have."
        )


def judged(base: State, known: Known, detect: Detect) -> Detection:
    """`detect` on span 1, from the state after the base block."""
    span, truth = known.cut.spans[1], known.world.truth
    state = absorb(base, span.events, span.n_users, span.n_items)
    assert state.users is not None and truth is not None
    puzzled_N, users_N, kl_N = detect.judge(state.model, state.users, state.recent, base.model.n_items)
    gained = truth.filter(pl.col("span") == 1)["user_id"].unique()
    gained_N = np.isin(users_N.numpy(), known.cut.users.rows(gained).numpy())
    auc = float(mannwhitneyu(-kl_N.numpy()[gained_N], -kl_N.numpy()[~gained_N]).statistic)
    hits = int(torch.isin(puzzled_N, users_N[torch.from_numpy(gained_N)]).sum())
    n_gained = int(gained_N.sum())
    return Detection(
        len(users_N),
        n_gained,
        auc / max(n_gained * int((~gained_N).sum()), 1),
        hits / max(len(puzzled_N), 1),
        hits / max(n_gained, 1),
    )
