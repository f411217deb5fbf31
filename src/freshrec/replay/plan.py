"""What a replay will take, before it runs: seconds by cell, from a second of measured training.

`training_passes` says how many targets a strategy trains on. A strategy without a function here counts as fine-tuning.
"""

import time
from dataclasses import replace
from functools import singledispatch
from typing import Protocol, runtime_checkable

import polars as pl
import torch
from torch import Tensor

from freshrec.data.batches import due_targets
from freshrec.data.split import LogSplit
from freshrec.data.stored_interests import stored_interests_of
from freshrec.learn.fit import EXPECTED_EPOCHS, FitConfig, train
from freshrec.models.absorb import absorb_block
from freshrec.models.blend.model import Blend
from freshrec.replay.cell import Cell, ReplaySettings
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
from freshrec.types import Events, State, Strategy, TrainedModel

EPOCH_SEARCH_FACTOR = 2.0  # choosing them trains about as much again


def estimate_cost(cells: list[Cell], split: LogSplit, settings: ReplaySettings) -> pl.DataFrame:
    """model, strategy, seed, and CPU seconds of the base and of the updates of each cell; right to a factor of 2.

    The seconds of the updates include those of tuning them.
    """
    sizes = [int(trainable_mask(span.events).sum()) for span in split.spans]
    speeds: dict[str, float] = {}
    rows, trained_bases = [], set()
    for cell in cells:
        if cell.model_name not in speeds:
            speeds[cell.model_name] = measure_speed(cell, split)
        base, *later = training_passes(cell.strategy_instance, sizes, EXPECTED_EPOCHS)
        later = later if settings.last_update else later[:-1]
        base = 0.0 if (cell.model_name, cell.seed) in trained_bases else base * EPOCH_SEARCH_FACTOR
        if cell.shared_fit:  # trained once for all
            trained_bases.add((cell.model_name, cell.seed))
        tuning = count_tuning_targets(cell.strategy_instance, sizes) if settings.tune else 0.0
        seconds = (base / speeds[cell.model_name], (sum(later) + tuning) / speeds[cell.model_name])
        rows.append((cell.model_name, cell.strategy_name, cell.seed, *seconds))
    names = ["model", "strategy", "seed", "base_s", "updates_s"]
    return pl.DataFrame(rows, schema=names, orient="row")


def trainable_mask(events: Events) -> Tensor:
    """(E,) whether a model can be trained on an event: where the log has labels, on those that have one."""
    return torch.ones(len(events), dtype=torch.bool) if events.labels_E is None else ~events.labels_E.isnan()


def count_tuning_targets(strategy: Strategy, sizes: list[int]) -> float:
    """Targets trained on to choose options: from span 2 on, every alternative repeats the update of the span before."""
    choices = alternatives(strategy)
    if len(choices) < 2:
        return 0.0
    return sum(sum(training_passes(choice, sizes, EXPECTED_EPOCHS)[1:-1]) for choice in choices)


def measure_speed(cell: Cell, split: LogSplit, n_events: int = 10_000) -> float:
    """Targets a CPU-second that training this model passes, on the first events of the base block."""
    model = cell.model_spec.build(cell.seed)
    model = model.experts.trained_model if isinstance(model, Blend) else model
    if not isinstance(model, TrainedModel):
        return float("inf")
    span = split.spans[0]
    sample = span.events[trainable_mask(span.events)][:n_events]
    state = absorb_block(replace(State(model), seed=cell.seed), sample, span.n_users, span.n_items)
    model.grow(span.n_users, span.n_items)
    targets = due_targets(state.histories)
    stored_interests = stored_interests_of(model, None, 0)
    epochs = train(model, targets, 2, (cell.seed, 0), stored_interests=stored_interests)
    next(epochs)  # the first one also warms up
    started_s = time.process_time()
    next(epochs)
    return max(len(targets), 1) / max(time.process_time() - started_s, 1e-6)


@runtime_checkable
class HasFit(Protocol):
    """A strategy whose field `fit` says how it trains."""

    @property
    def fit(self) -> FitConfig:
        """Epochs, learning rate, held-out share."""


def fine_tuning_passes(fit: FitConfig, sizes: list[int], base_epochs: int) -> list[float]:
    """Targets passed in each span, epochs counted, by a strategy that trains on the new events only."""
    return [float(sizes[0] * base_epochs)] + [float(size * fit.expected_epochs) for size in sizes[1:]]


@singledispatch
def training_passes(strategy: Strategy, sizes: list[int], base_epochs: int) -> list[float]:
    """Targets that a strategy trains on in each span, epochs counted; `sizes`: the events of each span.

    By default those of fine-tuning: with the strategy's own `fit` where it has one.
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
    """All remembered events, each time."""
    n_epochs, spans = base_epochs if strategy.from_scratch else strategy.fit.expected_epochs, strategy.spans
    remembered = [sum(sizes[max(0, t + 1 - spans) if spans else 0 : t + 1]) for t in range(len(sizes))]
    return [float(sizes[0] * base_epochs)] + [float(size * n_epochs) for size in remembered[1:]]


@training_passes.register
def _(strategy: Refit, sizes: list[int], base_epochs: int) -> list[float]:
    """Those of the trained expert, if it is trained at all."""
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
    """The new events of each span, and those of the reservoir."""
    base, *later = fine_tuning_passes(strategy.fit, sizes, base_epochs)
    if strategy.take == "all":
        return [base, *(n * (1 + strategy.share) for n in later)]
    return [base, *(n + strategy.reservoir_size(sizes[0]) * strategy.fit.epochs for n in later)]


@training_passes.register
def _(strategy: IncCTR, sizes: list[int], base_epochs: int) -> list[float]:
    """The new events of each span; the teacher reads them too, which is a third of the work."""
    base, *later = fine_tuning_passes(strategy.fit, sizes, base_epochs)
    return [base, *(n * (4 / 3 if strategy.distill else 1) for n in later)]


@training_passes.register
def _(strategy: ADER, sizes: list[int], base_epochs: int) -> list[float]:
    """The new events of each span, and the exemplars of all spans before it."""
    base, *later = fine_tuning_passes(strategy.fit, sizes, base_epochs)
    counts = [min(strategy.exemplars, sum(sizes[:t])) for t in range(1, len(sizes))]
    return [base, *(n + m * strategy.fit.expected_epochs for n, m in zip(later, counts))]


@training_passes.register
def _(strategy: ADERS, sizes: list[int], base_epochs: int) -> list[float]:
    """The new events of each span, and at most `share` of the pool, taken to hold a sequence per two events."""
    base, *later = fine_tuning_passes(strategy.fit, sizes, base_epochs)
    pools = [strategy.share * sum(sizes[:t]) / 2 for t in range(1, len(sizes))]
    return [base, *(n + m * strategy.fit.expected_epochs for n, m in zip(later, pools))]


@training_passes.register
def _(strategy: SML, sizes: list[int], base_epochs: int) -> list[float]:
    """Those of fine-tuning; the end of a stage from the second update on; the parts of the base block."""
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
    """Those of the chain, and those of the generator, whose past spans count at the size of the new one."""
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
    """Those of fine-tuning, at most half as many again, and the parts of the base block."""
    base, *later = fine_tuning_passes(strategy.fit, sizes, base_epochs)
    part, n_base = sizes[0] / max(strategy.base_parts, 1), max(1, strategy.base_parts // 3)
    n_chains = 1 + sum(map(len, SEARCH_SPACE.values()))
    if strategy.base_parts:
        n_stages = strategy.base_parts - n_base - 1
        base += part * (n_base * base_epochs + n_chains * n_stages * strategy.fit.epochs)
    return [base, *(1.5 * n for n in later)]
