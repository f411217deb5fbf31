"""The answer of a replay: its methods in one metric, their references, and the tested differences.

A method is one model with one strategy, averaged over all seeds. `answer_text.py` formats the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from freshrec.models import CONTROLS
from freshrec.replay.cell import Cell
from freshrec.replay.click_metrics import LOWER_IS_BETTER
from freshrec.replay.epochs import EpochSummary, epochs_of_method
from freshrec.strategies.baselines import FineTune, Frozen, Retrain

SIGNIFICANCE_LEVEL = 0.05  # a difference with a smaller corrected p-value is "beyond chance"

Method = tuple[str, str]  # model, strategy


@dataclass(frozen=True)
class Difference:
    """Difference between two methods, with a 95 % interval and the corrected p-value of the paired test."""

    value: float  # positive = better
    low: float
    high: float
    p: float

    @property
    def is_beyond_chance(self) -> bool:
        return self.p < SIGNIFICANCE_LEVEL


@dataclass(frozen=True)
class MethodSummary:
    """One row of the table."""

    method: Method
    value: float
    low: float
    high: float
    forgetting: float | None  # positive = lost; None: not measured
    cpu_s: float | None  # of one update, a mean; None: no update was made
    epochs: EpochSummary | None = None  # of the updates; None: they trained no model


@dataclass(frozen=True, eq=False)
class Answer:
    """A replay's methods in one metric, the best first, and every difference between two of them."""

    metric: str
    summaries: tuple[MethodSummary, ...]
    references: dict[Method, Method]  # the method that each one is compared with
    differences: dict[tuple[Method, Method], Difference]  # (a, b) -> a minus b; positive = a is better
    cells: dict[Method, Cell]  # one run of each method

    def __repr__(self) -> str:
        listed = ", ".join(f"{row.method[0]}/{row.method[1]} {row.value:.4f}" for row in self.summaries)
        return f"Answer({self.metric}: {listed})"

    def frame(self) -> pl.DataFrame:
        """Return one row per method, the best first: model, strategy, value, low, high, forgetting, cpu_s, gain, p.

        `low` and `high` are a 95 % interval. `cpu_s` is the mean cost of an update. `gain` is the difference from the
        method's reference (positive = better), and `p` its corrected p-value. Unknown values are null.
        """
        rows = []
        for row in self.summaries:
            gain = self.gain(row.method)
            numbers = (row.value, row.low, row.high, row.forgetting, row.cpu_s)
            rows.append((*row.method, *numbers, gain and gain.value, gain and gain.p))
        numbers_schema = dict.fromkeys(("value", "low", "high", "forgetting", "cpu_s", "gain", "p"), pl.Float64)
        return pl.DataFrame(rows, {"model": pl.String, "strategy": pl.String, **numbers_schema}, orient="row")

    @property
    def best(self) -> MethodSummary:
        return self.summaries[0]

    def summary(self, method: Method) -> MethodSummary:
        """The row of one method."""
        return next(row for row in self.summaries if row.method == method)

    def gain(self, method: Method) -> Difference | None:
        """Difference from the method's reference; None for a reference, or if they have no query in common."""
        return self.differences.get((method, self.references[method]))

    def chosen(self) -> Method:
        """The method to use: the best one, or its reference if that costs less and the lead is within chance."""
        best, reference = self.best.method, self.references[self.best.method]
        gain = self.gain(best)
        if gain is not None and not gain.is_beyond_chance and self.cpu_s(reference) < self.cpu_s(best):
            return reference
        return best

    @property
    def n_ties(self) -> int:
        """Number of other methods that the best one does not beat beyond chance."""
        pairs = [self.differences.get((self.best.method, row.method)) for row in self.summaries[1:]]
        return sum(1 for pair in pairs if pair is None or not pair.is_beyond_chance)

    @property
    def has_no_winner(self) -> bool:
        """Whether the lead of the best method over every other one is within chance; False for a single method."""
        return 0 < self.n_ties == len(self.summaries) - 1

    def cpu_s(self, method: Method) -> float:
        """CPU seconds of one update."""
        return self.summary(method).cpu_s or 0.0

    @property
    def has_forgetting(self) -> bool:
        """Whether the forgetting of any method was measured."""
        return any(row.forgetting is not None for row in self.summaries)

    @property
    def n_pairs(self) -> int:
        return len(self.differences) // 2


def headline_metric(metrics: Sequence[str]) -> str:
    """The metric that summarises a replay: the first ndcg of the recipe, else its first metric."""
    return next((metric for metric in metrics if metric.startswith("ndcg@")), metrics[0])


def read_answer(cells: Sequence[Cell], out: Path, metric: str) -> Answer:
    """Return the answer of a replay from the files that `collect_results` wrote to `out`."""
    methods, tests = (pl.read_parquet(out / name, glob=False) for name in ("methods.parquet", "tests.parquet"))
    return make_answer(cells, methods, tests, metric)


def make_answer(cells: Sequence[Cell], methods: pl.DataFrame, tests: pl.DataFrame, metric: str) -> Answer:
    """Return the answer of a replay from its methods.parquet and tests.parquet."""
    by_method = {(cell.model_name, cell.strategy_name): cell for cell in reversed(cells)}  # keeps the first seed's run
    values = {(row["model"], row["strategy"], row["metric"]): row for row in methods.iter_rows(named=True)}
    sign = -1 if metric in LOWER_IS_BETTER else 1
    summaries = []
    for method in by_method:
        if row := values.get((*method, metric)):
            forgetting, cpu_s = (values.get((*method, name)) for name in (f"forgetting {metric}", "update_cpu_s"))
            summaries.append(
                MethodSummary(
                    method,
                    row["value"],
                    row["low"],
                    row["high"],
                    forgetting["value"] if forgetting else None,
                    cpu_s["value"] if cpu_s else None,
                    epochs_of_method(values, *method),
                )
            )
    summaries.sort(key=lambda row: (-sign * row.value, row.method))
    cells_by_method = {row.method: by_method[row.method] for row in summaries}
    references = reference_methods(list(cells_by_method.values()))
    return Answer(metric, tuple(summaries), references, _differences(tests, metric, sign), cells_by_method)


def _differences(tests: pl.DataFrame, metric: str, sign: int) -> dict[tuple[Method, Method], Difference]:
    found = {}
    for row in tests.filter(pl.col("metric") == metric).iter_rows(named=True):
        a, b = (row["model_a"], row["strategy_a"]), (row["model_b"], row["strategy_b"])
        low, high = sorted((sign * row["low"], sign * row["high"]))
        found[a, b] = Difference(sign * row["difference"], low, high, row["p_adjusted"])
        found[b, a] = Difference(-sign * row["difference"], -high, -low, row["p_adjusted"])
    return found


def reference_methods(cells: Sequence[Cell]) -> dict[Method, Method]:
    """Return the method that each method is compared with. `cells` are sorted by quality, best first.

    It is the same model with fine-tuning, else frozen, else fully retrained. A model without any of these is compared
    with the best of the other models' references. If there are none, it is the best method that is not a control.
    """
    own: dict[str, Method] = {}
    for kind in (FineTune, Frozen, Retrain):
        for cell in cells:
            if isinstance(cell.strategy_instance, kind):
                own.setdefault(cell.model_name, (cell.model_name, cell.strategy_name))
    methods = [(cell.model_name, cell.strategy_name) for cell in cells]
    candidates = [method for method in methods if method == own.get(method[0])]
    candidates += [method for method in methods if method[0] not in CONTROLS]
    return {method: own.get(method[0], (candidates or methods)[0]) for method in methods}
