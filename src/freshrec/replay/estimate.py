"""Estimate the CPU seconds of a replay before it runs, from short measured runs on a sample of the log.

Each trained model is trained on a sample of users for two epochs; then each of its strategies makes one update there.
Training grows with targets times epochs (`plan.py`), ranking with the number of queries. The number of epochs of the
base block is chosen on the sample, in the same way as in the replay. If the sample is not the whole log, the replay may
need fewer or more epochs, so the estimate is a range.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from freshrec.data.batches import due_targets
from freshrec.data.histories import append_events
from freshrec.data.split import LogSplit
from freshrec.data.stored_interests import stored_interests_of
from freshrec.device import permutation, uniform
from freshrec.learn.fit import EXPECTED_EPOCHS, FitConfig, choose_epochs, fit_base_block, new_model, train
from freshrec.models.absorb import absorb_block
from freshrec.nn.ranking import READOUTS
from freshrec.random_streams import stream
from freshrec.replay.cell import Cell, ReplaySettings
from freshrec.replay.measure import Queries, SpanBlock, make_queries, predict_clicks, rank_queries
from freshrec.replay.plan import count_tuning_targets, training_passes
from freshrec.strategies.baselines import Retrain
from freshrec.strategies.compatible import next_state
from freshrec.strategies.refit import Refit
from freshrec.types import NEXT, NOW, TEST, Events, Histories, InterestModel, Span, State, Strategy, TrainedModel

FIRST_SAMPLE = 5_000  # events of the base block in the first sample of users
EPOCH_S = 1.0  # CPU-s that an epoch on the sample takes at most
COUNTING_SAMPLE = 30_000  # events of the base block in the sample on which counting models are measured
N_RANKED = 512  # queries that are ranked to measure the speed of ranking
EPOCHS_OF_WHOLE = 1 / 3, 2.0  # epochs that the whole log needs, relative to those chosen on a sample

Spans = tuple[Span, ...]
Report = Callable[[str], None]  # called with the name of the current measurement


@dataclass(frozen=True)
class Range:
    """A number, such as CPU seconds or epochs, that lies between `low` and `high`."""

    low: float = 0.0
    high: float = 0.0

    def __add__(self, other: "Range") -> "Range":
        return Range(self.low + other.low, self.high + other.high)

    def __mul__(self, factor: float) -> "Range":
        return Range(self.low * factor, self.high * factor)


@dataclass(frozen=True)
class RunEstimate:
    """The estimate for one model with one strategy, all seeds together."""

    model: str
    strategy: str
    n_seeds: int
    base: Range  # zero if an earlier run trains the same base block
    updates: Range
    measuring: Range

    @property
    def total(self) -> Range:
        return self.base + self.updates + self.measuring


@dataclass(frozen=True)
class Sizes:
    """Numbers of targets and queries of a replay, by span."""

    targets: list[int]  # events that the update trains on
    queries: list[int]  # queries that test the model before the update
    ranked_again: list[int]  # held-out queries of earlier spans, ranked after the update


@dataclass(frozen=True)
class ModelSpeed:
    """Measured speed of one trained model on a sample of users."""

    spans: Spans  # the sample
    base: State  # the state after one epoch on the sampled base block
    epoch_s: float  # CPU-s of an epoch on the whole base block
    rank_s: dict[str, float]  # CPU-s per query, by readout


def estimate_cost(
    cells: Sequence[Cell], split: LogSplit, settings: ReplaySettings, report: Report = lambda text: None
) -> list[RunEstimate]:
    """Estimate each model with each strategy; `report` is called with the name of the next measurement."""
    torch.set_num_threads(1)  # as in a replay
    sizes = measure_sizes(split, settings)
    speeds: dict[str, ModelSpeed] = {}
    bases: dict[object, Range] = {}  # epochs of each base block that was estimated
    estimates = []
    n_seeds = Counter((cell.model_name, cell.strategy_name) for cell in cells)
    for method, n in n_seeds.items():
        cell = next(cell for cell in cells if (cell.model_name, cell.strategy_name) == method)
        report(" ".join(method))
        if not isinstance(cell.model_spec.build(cell.seed), TrainedModel):
            parts = _estimate_counting(cell, split, settings, sizes)
        else:
            if cell.model_name not in speeds:
                speeds[cell.model_name] = measure_model(cell, split, settings)
            speed, key = speeds[cell.model_name], cell.base_key or method
            is_trained_before = key in bases
            if not is_trained_before:
                bases[key] = expected_epochs(cell, split, speed)
            base, updates = _estimate_training(cell, split, settings, sizes, speed, bases[key])
            if not is_trained_before:
                base += base_seconds(cell, speed, bases[key], sizes)
            parts = base, updates, ranking_seconds(speed.rank_s, sizes)
        estimates.append(RunEstimate(*method, n, *(part * n for part in parts)))
    return estimates


def count_targets(spans: Sequence[Span]) -> list[int]:
    """Number of events that each update may train on: those of its span, and those that the previous span deferred."""
    found, deferred = [], 0
    for span in spans:
        train_at_E = span.events.train_at_E[_has_label(span.events)]
        found.append(int((train_at_E == NOW).sum()) + deferred)
        deferred = int((train_at_E == NEXT).sum())
    return found


def _has_label(events: Events) -> Tensor:
    """Whether each event can be a target, shape (E,): in a log with exposures, only events with a label."""
    return torch.ones(len(events), dtype=torch.bool) if events.labels_E is None else ~events.labels_E.isnan()


def measure_sizes(split: LogSplit, settings: ReplaySettings) -> Sizes:
    """Count the targets and queries of each span as the replay will make them, without a model."""
    queries, held_out, recent = [0], [0], Histories.empty()
    for span in split.spans:
        if span.index and span.events.labels_E is None:
            block = SpanBlock(span.events, 0, span.n_users, split.spans[span.index - 1].n_items)
            found = make_queries(recent, block, 1, settings.query_options)
            queries.append(len(found))
            held_out.append(int(found.heldout_N.sum()))
        elif span.index:
            is_query_E = (span.events.role_E == TEST) & _has_label(span.events)
            queries.append(int(is_query_E.sum()))
            held_out.append(0)
        recent = append_events(recent, span.events, span.n_users)
    n_updates = len(split.spans) - (0 if settings.last_update else 1)
    ranked_again = [sum(held_out[: t + 1]) if t < n_updates else 0 for t in range(len(split.spans))]
    return Sizes(count_targets(split.spans), queries, ranked_again)


def sample_users(split: LogSplit, n_events: int, n_spans: int = 2) -> Spans:
    """The first spans, with the events of a random sample of users: about `n_events` of them in the base block."""
    share, n_users = n_events / max(len(split.spans[0].events), 1), split.spans[-1].n_users
    spans = split.spans[:n_spans]
    if share >= 1:
        return spans
    is_kept_U = uniform((n_users + 1,), stream(0, "sample of a plan")) < share
    return tuple(replace(span, events=span.events[is_kept_U[span.events.users_E]]) for span in spans)


def measure_model(cell: Cell, split: LogSplit, settings: ReplaySettings) -> ModelSpeed:
    """Train a model for two epochs on a sample that is as large as `EPOCH_S` allows, and rank with it."""
    n_all = len(split.spans[0].events)
    spans, n_events, n_targets, epoch_s = split.spans[:2], FIRST_SAMPLE, 1, 0.0
    for _ in range(2):
        spans = sample_users(split, n_events)
        n_targets, epoch_s = time_epoch(cell, spans[0])
        factor = EPOCH_S / max(epoch_s, 1e-3)
        if n_events >= n_all or factor < 1.5:
            break
        n_events = int(n_events * min(factor, 20))
    (n_base_targets,) = count_targets(split.spans[:1])
    absorbed = _absorbed(cell, spans[0])
    base = fit_base_block(absorbed, spans[0], FitConfig(base_epochs=1))
    rank_s = measure_ranking(base, spans, settings)
    return ModelSpeed(spans, base, epoch_s * n_base_targets / max(n_targets, 1), rank_s)


def _absorbed(cell: Cell, span: Span) -> State:
    return absorb_block(
        State(cell.model_spec.build(cell.seed), seed=cell.seed), span.events, span.n_users, span.n_items
    )


def time_epoch(cell: Cell, span: Span) -> tuple[int, float]:
    """Number of targets of an epoch on the base block, and its CPU-s: the faster of two after one to warm up."""
    state = _absorbed(cell, span)
    model, targets = new_model(state, span.n_users, span.n_items), due_targets(state.histories)
    epochs, seconds = train(model, targets, 3, (cell.seed, 0), stored_interests=stored_interests_of(model, None, 0)), []
    started_at = time.process_time()
    for _ in epochs:
        seconds.append(time.process_time() - started_at)
        started_at = time.process_time()
    return len(targets), min(seconds[1:])


def measure_ranking(state: State, spans: Spans, settings: ReplaySettings) -> dict[str, float]:
    """CPU-s per query by readout, from queries of the second span of a sample."""
    span = spans[1]
    block = SpanBlock(span.events, 0, span.n_users, spans[0].n_items)
    if span.events.labels_E is not None:
        started_at = time.process_time()
        n_queries = len(predict_clicks(state, block, settings.query_options))
        return {"recent": (time.process_time() - started_at) / max(n_queries, 1)}
    queries: Queries = make_queries(state.histories, block, 50, settings.query_options)
    queries = queries[permutation(len(queries), stream(0, "queries of a plan"))[:N_RANKED]]
    seconds = {}
    for readout in READOUTS if isinstance(state.model, InterestModel) else READOUTS[:1]:
        started_at = time.process_time()
        rank_queries(state, queries, readout, settings.query_options.n_sampled)
        seconds[readout] = (time.process_time() - started_at) / max(len(queries), 1)
    return seconds


def ranking_seconds(rank_s: dict[str, float], sizes: Sizes) -> Range:
    """CPU-s of ranking: all readouts before each update, the recent one again after it."""
    seconds = sum(rank_s.values()) * sum(sizes.queries) + rank_s["recent"] * sum(sizes.ranked_again)
    return Range(seconds, seconds)


def expected_epochs(cell: Cell, split: LogSplit, speed: ModelSpeed) -> Range:
    """The number of epochs of the base block: fixed by an option, or chosen on the sample.

    Measured on logs of 77,000 to 99,000 events, on a third of the users and on all: SASRec needed 9 and 11, 18 and 9,
    47 and 24 epochs, GRU4Rec 10 and 4, 12 and 25.
    """
    fit = cell.shared_fit or FitConfig()
    if fit.holdout:
        return Range(EXPECTED_EPOCHS / 2, EXPECTED_EPOCHS * 2)
    if fit.base_epochs:
        return Range(fit.base_epochs, fit.base_epochs)
    absorbed = _absorbed(cell, speed.spans[0])
    n_epochs = choose_epochs(absorbed, absorbed.histories, fit).n_epochs
    is_whole = len(speed.spans[0].events) == len(split.spans[0].events)
    if is_whole:
        return Range(n_epochs, n_epochs)
    low, high = (n_epochs * factor for factor in EPOCHS_OF_WHOLE)
    return Range(max(1, low), min(fit.max_epochs, high))


def base_seconds(cell: Cell, speed: ModelSpeed, epochs: Range, sizes: Sizes) -> Range:
    """CPU-s of the base block: the choice of the number of epochs, with a test after each, and the training."""
    fit = cell.shared_fit or FitConfig()
    if fit.base_epochs or fit.holdout:
        return epochs * speed.epoch_s
    test_s = speed.rank_s["recent"] * min(2000, sizes.targets[0] / 6)

    def seconds(n_epochs: float) -> float:
        n_tried = min(n_epochs + fit.patience, fit.max_epochs)
        return n_epochs * speed.epoch_s + n_tried * (5 / 6 * speed.epoch_s + test_s)

    return Range(seconds(epochs.low), seconds(epochs.high))


def _estimate_training(
    cell: Cell, split: LogSplit, settings: ReplaySettings, sizes: Sizes, speed: ModelSpeed, epochs: Range
) -> tuple[Range, Range]:
    """CPU-s that the strategy adds to the base block, and CPU-s of its updates, from one update on the sample."""
    strategy, (base, span) = _shortened(cell.strategy_instance), speed.spans
    share = len(base.events) / max(len(split.spans[0].events), 1)
    shared = speed.base if cell.shared_fit else None
    state, base_s = _timed(lambda: next_state(strategy, replace(_absorbed(cell, base), shared_base=shared), base))
    state = replace(state, shared_base=None)
    empty = replace(span, events=span.events[:0])
    _, empty_s = _timed(lambda: next_state(strategy, _absorb(state, empty), empty))
    # an update trains on events that the previous one deferred, so its size is about the same as without deferring
    train_at_E = torch.where(span.events.train_at_E == NEXT, NOW, span.events.train_at_E)
    span = replace(span, events=replace(span.events, train_at_E=train_at_E))
    _, update_s = _timed(lambda: next_state(strategy, _absorb(state, span), span))
    n_base, n_new = count_targets((base, span))
    empty_passes, passes = (training_passes(strategy, [n_base, n], 1)[1] for n in (0, n_new))
    fixed_s, per_pass_s = split_cost(empty_passes, empty_s, passes, update_s)

    def seconds(n_epochs: float) -> float:
        later = training_passes(cell.strategy_instance, sizes.targets, max(1, round(n_epochs)))[1:]
        later = later if settings.last_update else later[:-1]
        tuning = count_tuning_targets(strategy, sizes.targets) if settings.tune else 0.0
        return len(later) * fixed_s + per_pass_s * (sum(later) + tuning)

    base_s = base_s / max(share, 1e-9)
    return Range(base_s, base_s), Range(seconds(epochs.low), seconds(epochs.high))


def _shortened(strategy: Strategy) -> Strategy:
    """Return a full retrain whose new model trains for one epoch; any other strategy unchanged."""
    if isinstance(strategy, Retrain) and strategy.from_scratch and not strategy.fit.holdout:
        return replace(strategy, fit=replace(strategy.fit, base_epochs=1))
    return strategy


def split_cost(empty_passes: float, empty_s: float, passes: float, update_s: float) -> tuple[float, float]:
    """CPU-s of an update that do not grow with the log, and CPU-s per target and epoch.

    One update has no new events, the other one those of the sample. If the first one trains about as much as the
    second, as in a full retrain, the whole cost is assumed to grow with the log.
    """
    if not passes:
        return update_s, 0.0
    if empty_passes > 0.2 * passes:
        return 0.0, update_s / passes
    per_pass_s = max(update_s - empty_s, 0.0) / (passes - empty_passes)
    return max(empty_s - empty_passes * per_pass_s, 0.0), per_pass_s


def _absorb(state: State, span: Span) -> State:
    return absorb_block(state, span.events, span.n_users, span.n_items)


def _timed(run: Callable[[], State]) -> tuple[State, float]:
    started_at = time.process_time()
    state = run()
    return state, time.process_time() - started_at


def _estimate_counting(
    cell: Cell, split: LogSplit, settings: ReplaySettings, sizes: Sizes
) -> tuple[Range, Range, Range]:
    """CPU-s of base block, updates and measuring of a model that absorbs.

    If the log is large, two samples are measured, because a part of the blend's cost does not grow with the log.
    """
    n_base = len(split.spans[0].events)
    n_events = min(COUNTING_SAMPLE, n_base)
    base, update, rank_s = _measure_counting(cell, split, settings, n_events)
    if n_events < n_base:
        small_base, small_update, _ = _measure_counting(cell, split, settings, n_events // 4)
        factor = (n_base - n_events) / (n_events - n_events // 4)
        base, update = extrapolate(base, small_base, factor), extrapolate(update, small_update, factor)
    n_updates = len(split.spans) - (1 if settings.last_update else 2)
    return base, update * n_updates, ranking_seconds(rank_s, sizes)


def extrapolate(large: Range, small: Range, factor: float) -> Range:
    """`large` and `factor` times the growth from `small` to it, if it grows."""
    low, high = (b + max(b - a, 0.0) * factor for a, b in ((small.low, large.low), (small.high, large.high)))
    return Range(low, high)


def _measure_counting(
    cell: Cell, split: LogSplit, settings: ReplaySettings, n_events: int
) -> tuple[Range, Range, dict[str, float]]:
    """CPU-s of the base block and of the last of two updates on a sample, and of ranking a query.

    Whether the blend keeps its trained expert cannot be known from a sample: with training is the upper end.
    """
    strategy, is_forced = cell.strategy_instance, False
    if isinstance(strategy, Refit) and strategy.trains == "worth" and n_events < len(split.spans[0].events):
        strategy, is_forced = replace(strategy, trains="always"), True
    state, seconds = State(cell.model_spec.build(cell.seed), seed=cell.seed), []
    spans, rank_s = sample_users(split, n_events, n_spans=3), {"recent": 0.0}
    for span in spans:
        if span.index == 1:
            rank_s = measure_ranking(state, spans, settings)
        state, elapsed_s = _timed(partial(_absorb_and_update, strategy, state, span))
        trained_s = state.costs.get("train_cpu_s", 0.0) + state.costs.get("lr_choice_cpu_s", 0.0)
        seconds.append(Range(elapsed_s - trained_s if is_forced and span.index else elapsed_s, elapsed_s))
    return seconds[0], seconds[-1], rank_s


def _absorb_and_update(strategy: Strategy, state: State, span: Span) -> State:
    return next_state(strategy, _absorb(state, span), span)
