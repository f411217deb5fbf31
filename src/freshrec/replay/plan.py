"""Numbers of targets that each strategy trains on in a replay. `estimate.py` turns these numbers into seconds.

`training_passes` returns them for a strategy. A strategy without a function here counts as fine-tuning.
"""

from dataclasses import replace
from functools import singledispatch
from typing import Protocol, runtime_checkable

from freshrec.learn.fit import EXPECTED_EPOCHS, FitConfig
from freshrec.replay.tuning import alternatives
from freshrec.strategies.ader import ADER
from freshrec.strategies.ader_s import ADERS
from freshrec.strategies.asmg import ASMG
from freshrec.strategies.baselines import Absorb, Frozen, Retrain
from freshrec.strategies.incctr import IncCTR
from freshrec.strategies.refit import MAX_TRIAL_TARGETS, Refit
from freshrec.strategies.self_tuned import SEARCH_SPACE, SelfTuned
from freshrec.strategies.sml import SML
from freshrec.strategies.spmf import SPMF
from freshrec.types import Strategy


def count_tuning_targets(strategy: Strategy, sizes: list[int]) -> float:
    """Targets trained on to choose options: from span 2 on, each alternative repeats the previous update."""
    choices = alternatives(strategy)
    if len(choices) < 2:
        return 0.0
    return sum(sum(training_passes(choice, sizes, EXPECTED_EPOCHS)[1:-1]) for choice in choices)


@runtime_checkable
class HasFit(Protocol):
    """A strategy with training options in the field `fit`."""

    @property
    def fit(self) -> FitConfig:
        """Its epochs, learning rate and held-out share."""


def fine_tuning_passes(fit: FitConfig, sizes: list[int], base_epochs: int) -> list[float]:
    """Targets times epochs in each span, for a strategy that trains on the new events only."""
    return [float(sizes[0] * base_epochs)] + [float(size * fit.expected_epochs) for size in sizes[1:]]


@singledispatch
def training_passes(strategy: Strategy, sizes: list[int], base_epochs: int) -> list[float]:
    """Targets times epochs that a strategy trains on in each span; `sizes`: number of events in each span.

    The default is fine-tuning, with the field `fit` of the strategy if it has one.
    """
    fit = strategy.fit if isinstance(strategy, HasFit) and isinstance(strategy.fit, FitConfig) else FitConfig()
    return fine_tuning_passes(fit, sizes, base_epochs)


@training_passes.register
def _(strategy: Absorb, sizes: list[int], base_epochs: int) -> list[float]:
    return [0.0] * len(sizes)


@training_passes.register
def _(strategy: Frozen, sizes: list[int], base_epochs: int) -> list[float]:
    return [float(sizes[0] * base_epochs)] + [0.0] * (len(sizes) - 1)


@training_passes.register
def _(strategy: Retrain, sizes: list[int], base_epochs: int) -> list[float]:
    """All remembered events, at each update. A new model also trains on five sixths of them to choose its epochs."""
    fit, spans = strategy.fit, strategy.spans
    n_epochs: float = fit.expected_epochs
    if strategy.from_scratch and fit.base_epochs:
        n_epochs = fit.base_epochs
    elif strategy.from_scratch and not fit.holdout:
        n_chosen = max(base_epochs, fit.min_epochs)
        n_epochs = n_chosen + 5 / 6 * min(n_chosen + fit.patience, fit.max_epochs)
    remembered = [sum(sizes[max(0, t + 1 - spans) if spans else 0 : t + 1]) for t in range(len(sizes))]
    return [float(sizes[0] * base_epochs)] + [float(size * n_epochs) for size in remembered[1:]]


@training_passes.register
def _(strategy: Refit, sizes: list[int], base_epochs: int) -> list[float]:
    """The targets of the blend's trained expert; none if it is never trained."""
    if strategy.trains == "never":
        return [0.0] * len(sizes)
    passes = fine_tuning_passes(strategy.fit, sizes, base_epochs)
    if strategy.full_retrain:
        passes = [float(sum(sizes[: t + 1]) * base_epochs) for t in range(len(sizes))]
    elif strategy.guard:
        trial_passes = MAX_TRIAL_TARGETS * strategy.fit.expected_epochs
        passes = passes[:1] + [n + 2 * 5 / 6 * min(n, trial_passes) for n in passes[1:]]
    return [min(n, float(strategy.max_passes)) for n in passes]


@training_passes.register
def _(strategy: SPMF, sizes: list[int], base_epochs: int) -> list[float]:
    """The new events of each span and those of the reservoir."""
    base, *later = fine_tuning_passes(strategy.fit, sizes, base_epochs)
    if strategy.take == "all":
        return [base, *(n * (1 + strategy.share) for n in later)]
    return [base, *(n + strategy.reservoir_size(sizes[0]) * strategy.fit.epochs for n in later)]


@training_passes.register
def _(strategy: IncCTR, sizes: list[int], base_epochs: int) -> list[float]:
    """The new events of each span. The teacher's forward pass adds a third."""
    base, *later = fine_tuning_passes(strategy.fit, sizes, base_epochs)
    return [base, *(n * (4 / 3 if strategy.distill else 1) for n in later)]


@training_passes.register
def _(strategy: ADER, sizes: list[int], base_epochs: int) -> list[float]:
    """The new events of each span and the exemplars of all earlier spans."""
    base, *later = fine_tuning_passes(strategy.fit, sizes, base_epochs)
    counts = [min(strategy.exemplars, sum(sizes[:t])) for t in range(1, len(sizes))]
    return [base, *(n + m * strategy.fit.expected_epochs for n, m in zip(later, counts))]


@training_passes.register
def _(strategy: ADERS, sizes: list[int], base_epochs: int) -> list[float]:
    """The new events of each span and at most `share` of the pool, assumed to hold one sequence per two events."""
    base, *later = fine_tuning_passes(strategy.fit, sizes, base_epochs)
    pools = [strategy.share * sum(sizes[:t]) / 2 for t in range(1, len(sizes))]
    return [base, *(n + m * strategy.fit.expected_epochs for n, m in zip(later, pools))]


@training_passes.register
def _(strategy: SML, sizes: list[int], base_epochs: int) -> list[float]:
    """Fine-tuning, the end of a stage from the second update on, and the parts of the base block."""
    passes, epochs = fine_tuning_passes(strategy.fit, sizes, base_epochs), strategy.fit.expected_epochs
    later_rounds, transfer_epochs = (strategy.rounds - 1) * epochs, strategy.rounds * strategy.transfer_epochs
    if strategy.base_parts and strategy.fits_network_on(0):
        n, n_base = strategy.base_parts, max(1, strategy.base_parts // 3)
        stages = (n - n_base - 1) * (epochs + later_rounds + transfer_epochs)
        passes[0] += sizes[0] / n * (n_base * base_epochs + stages)
    for t in range(2, len(sizes)):
        n_targets = sizes[t] if strategy.objective == "next" else sizes[t - 1]
        passes[t] += strategy.fits_network_on(t) * (later_rounds * sizes[t - 1] + transfer_epochs * n_targets)
    return passes


@training_passes.register
def _(strategy: ASMG, sizes: list[int], base_epochs: int) -> list[float]:
    """The chain of models and the generator; each past span of the generator counts with the size of the new one."""
    chain = fine_tuning_passes(strategy.fit, sizes, base_epochs)
    lengths = [min(max(t - 1, 0), strategy.k or t) for t in range(len(sizes))]
    spans = [min(length, 1) if strategy.loss == "last" else length for length in lengths]
    passes = [n + strategy.epochs * n_spans * size for n, n_spans, size in zip(chain, spans, sizes)]
    if strategy.base_parts:
        part, n_base = sizes[0] // strategy.base_parts, max(1, strategy.base_parts // 3)
        parts = [n_base * part] + [part] * (strategy.base_parts - n_base)
        passes[0] += sum(training_passes(replace(strategy, base_parts=0), parts, base_epochs))
    return passes


@training_passes.register
def _(strategy: SelfTuned, sizes: list[int], base_epochs: int) -> list[float]:
    """Fine-tuning, at most half as much again for replayed events, and the parts of the base block."""
    base, *later = fine_tuning_passes(strategy.fit, sizes, base_epochs)
    part, n_base = sizes[0] / max(strategy.base_parts, 1), max(1, strategy.base_parts // 3)
    n_chains = 1 + sum(map(len, SEARCH_SPACE.values()))
    if strategy.base_parts:
        n_stages = strategy.base_parts - n_base - 1
        base += part * (n_base * base_epochs + n_chains * n_stages * strategy.fit.epochs)
    return [base, *(1.5 * n for n in later)]
