"""Tuning: before each update, choose the variant of a strategy that would have been best at the previous update.

`alternatives` lists the variants. A strategy without a function here has nothing to tune.
"""

import time
from dataclasses import replace
from functools import singledispatch

import torch

from freshrec.learn.fit import FitConfig
from freshrec.nn.scoring import history_length
from freshrec.replay.measure import QueryOptions, SpanBlock, make_queries, rank_queries
from freshrec.strategies.ader import ADER
from freshrec.strategies.ader_s import ADERS
from freshrec.strategies.asmg import ASMG
from freshrec.strategies.baselines import FineTune, Retrain
from freshrec.strategies.compatible import next_state
from freshrec.strategies.ewc import EWC
from freshrec.strategies.imsr import IMSR
from freshrec.strategies.incctr import IncCTR
from freshrec.strategies.sml import SML
from freshrec.strategies.spmf import SPMF
from freshrec.types import VALID, Span, State, Strategy


def tune(
    strategy: Strategy, before: State, last: Span, span: Span, min_history: int
) -> tuple[Strategy, dict[str, float]]:
    """Return the alternative of `strategy` that is best on this span's VALID events after an update on span `last`.

    `before`: the state before the update on `last`. Quality is ndcg@20 over targets with a history of `min_history` or
    more events. The costs are "tune_cpu_s", the CPU-s of all trials, and "tuned_to", the position of the chosen
    alternative in `alternatives(strategy)` (0 = the strategy with its own options).
    """
    choices = alternatives(strategy)
    if len(choices) < 2 or not bool((span.events.role_E == VALID).any()):
        return strategy, {}
    started_at, qualities = time.process_time(), []
    for choice in choices:
        state = next_state(choice, before, last)
        block = SpanBlock(span.events, 0, span.n_users, last.n_items)
        queries = make_queries(state.histories, block, history_length(state.model), QueryOptions(VALID, min_history))
        ranks_N = rank_queries(state, queries)
        qualities.append(float(((ranks_N <= 20) / torch.log2(1 + ranks_N)).nan_to_num(0.0).mean()))
    best = max(range(len(qualities)), key=qualities.__getitem__)
    return choices[best], {"tune_cpu_s": time.process_time() - started_at, "tuned_to": float(best)}


@singledispatch
def alternatives(strategy: Strategy) -> tuple[Strategy, ...]:
    """The strategy itself first, then its variants. By default there are no variants.

    All tuned strategies have six alternatives with the same number of epochs in total, so that none has an advantage.
    """
    return (strategy,)


@alternatives.register
def _(strategy: FineTune | SPMF | ASMG | ADERS | SML) -> tuple[Strategy, ...]:
    return tuple(replace(strategy, fit=fit) for fit in fit_grid(strategy.fit))


@alternatives.register
def _(strategy: Retrain) -> tuple[Strategy, ...]:
    if strategy.from_scratch:  # its number of epochs was chosen on the base block
        return (strategy,)
    return tuple(replace(strategy, fit=fit) for fit in fit_grid(strategy.fit))


@alternatives.register
def _(strategy: ADER) -> tuple[Strategy, ...]:
    both = zip(fit_grid(strategy.fit), weight_grid(strategy.weight, 0.3, 3.0))
    return tuple(replace(strategy, fit=fit, weight=weight) for fit, weight in both)


@alternatives.register
def _(strategy: EWC) -> tuple[Strategy, ...]:
    both = zip(fit_grid(strategy.fit), weight_grid(strategy.weight, 0.1, 10.0))
    return tuple(replace(strategy, fit=fit, weight=weight) for fit, weight in both)


@alternatives.register
def _(strategy: IncCTR) -> tuple[Strategy, ...]:
    fits, distill = fit_grid(strategy.fit), strategy.distill
    if distill is None:
        return tuple(replace(strategy, fit=fit) for fit in fits)
    weights = [min(weight, 0.9) for weight in weight_grid(distill.weight, 0.5, 2.0)]
    return tuple(replace(strategy, fit=f, distill=replace(distill, weight=w)) for f, w in zip(fits, weights))


@alternatives.register
def _(strategy: IMSR) -> tuple[Strategy, ...]:
    fits, retain = fit_grid(strategy.fit), strategy.retain
    if retain is None:
        return tuple(replace(strategy, fit=fit) for fit in fits)
    weights = weight_grid(retain.weight, 0.0, 10.0)
    return tuple(replace(strategy, fit=f, retain=replace(retain, weight=w)) for f, w in zip(fits, weights))


def fit_grid(fit: FitConfig) -> list[FitConfig]:
    """`fit` first, then 5, 2 or 10 epochs at the model's learning rate or 0.3 of it; six in all.

    If `fit` holds out targets, early stopping chooses the number of epochs. Then the grid has six learning rates.
    """
    if fit.holdout:
        return [fit, *(replace(fit, lr_scale=fit.lr_scale * factor) for factor in (0.3, 0.1, 3.0, 0.5, 2.0))]
    others = [replace(fit, epochs=epochs, lr_scale=lr_scale) for lr_scale in (1.0, 0.3) for epochs in (5, 2, 10)]
    return [fit, *(other for other in others if other != fit)][:6]


def weight_grid(weight: float, low: float, high: float) -> list[float]:
    """A weight for each of the six entries of `fit_grid`: unchanged, times `low` or times `high`, twice each."""
    return [weight * factor for factor in (1.0, low, high, low, high, 1.0)]
