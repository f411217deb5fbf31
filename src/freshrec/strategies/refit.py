"""Refit: the update of a blend. Its rule learns from logged queries, its trained expert from the new events."""

import copy
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from freshrec.config import Count, CountOrZero, Positive, check_options
from freshrec.data.batches import Targets, due_targets, targets_at
from freshrec.data.histories import concat_events, insert_events
from freshrec.device import permutation
from freshrec.learn.fit import CostMeter, FitConfig, fit_model, train, train_to_best_epoch
from freshrec.learn.validation import mean_ndcg, target_ndcg
from freshrec.models.blend.experts import RANK_COLUMN, SHARE_COLUMN, TRAINED_SPEC
from freshrec.models.blend.model import Blend, fit_rule
from freshrec.models.blend.rule import SIGNIFICANCE_LEVEL, feature_gain, is_significantly_better
from freshrec.models.pooled import Pooled
from freshrec.progress import report_progress
from freshrec.random_streams import stream, stream_seed
from freshrec.strategies.baselines import Absorb
from freshrec.types import DUE, NEVER, NEXT, NOW, Histories, Span, State

# Targets that one core trains on per second, halved: the counting experts get the other half of the time.
TARGETS_PER_SECOND = 30_000
# Queries for choosing the epochs of the first training and the learning rate of later ones.
MAX_VALIDATION_QUERIES = 1000
MAX_TRIAL_TARGETS = 24_000  # most recent targets on which learning rates are tried
MIN_TRIAL_QUERIES = 100  # with fewer queries, the first learning rate is used
MIN_GAIN_QUERIES = 300  # with fewer queries, the trained expert is kept without a test
MIN_GAIN_NATS = 0.005  # minimal gain in log-likelihood per target for keeping the trained expert, in nats
LR_FACTORS = (1.0, 0.3, 0.0)  # factors of an update's learning rate; 0 = no training


@dataclass(frozen=True)
class Refit:
    """Fit the weights of a blend's experts again. Its counting experts have already absorbed the events."""

    weight_decay: Positive = 20.0  # L2 penalty on the expert weights, relative to the loss summed over queries.
    min_queries: Count = 40  # Queries needed to fit the weights. With fewer, the best expert is used alone.
    epochs: CountOrZero = 6  # Epochs of the network that corrects the weights. 0 = weights only.
    trains: Literal["worth", "always", "never"] = "worth"  # Whether to train the trained expert. "worth" = if it helps.
    fit: FitConfig = FitConfig(epochs=3, max_epochs=30, patience=3)  # Training options of the trained expert.
    guard: bool = True  # Use the learning rate that is best on the newest sixth of an update's targets.
    max_passes: Count = 6_000_000  # Limit of targets x epochs per training. Epochs are reduced first, then targets.
    full_retrain: bool = False  # Rebuild everything from all events so far, as on a base block.

    def __post_init__(self) -> None:
        check_options(self)

    def update(self, state: State, span: Span) -> State:
        """Fit the rule on the queries logged so far, then train the trained expert on the new events."""
        after, meter = Absorb().update(state, span), CostMeter()
        if self.full_retrain:
            span = replace(span, events=concat_events((*(state.memory or ()), span.events)))
            model = Blend(state.model.spec, state.model.seed)
            model.grow(span.n_users, span.n_items)
            model.absorb(span.events[span.events.train_at_E != NEVER], Histories.empty())
            train_at = torch.where(span.events.train_at_E == NEXT, NOW, span.events.train_at_E)
            after = replace(after, model=model, memory=(replace(span.events, train_at_E=train_at),))
        model, targets = after.model, due_targets(state.histories)
        if model.pending_queries and self.trains != "never":
            model, targets = self._train_base(model, span, state.seed, meter)
        report_progress("combining experts")
        started_at = time.process_time()
        fit_rule(model, self.weight_decay, self.min_queries, self.epochs)
        meter.add_time("refit_cpu_s", started_at)
        if self.trains == "always" or (self.trains == "worth" and not model.is_trained_expert_dropped):
            fit, targets = self._limit_passes(self.fit, targets)
            key = state.seed, span.index
            if self.guard and state.spans_seen and not self.full_retrain:
                fit = _choose_lr_factor(model.experts.trained_model, targets, fit, key, meter)
            if fit.epochs:
                fit_model(model.experts.trained_model, targets, fit, key, meter)
            model.experts.invalidate_cache()
        return replace(after, model=model, costs=meter.costs)

    def _train_base(self, model: Blend, span: Span, seed: int, meter: CostMeter) -> tuple[Blend, Targets]:
        """Train the trained expert on the base block without its last window, and return the window as targets.

        Training stops when the quality on that window no longer improves. The queries logged from the window then
        get this expert's scores. If the scores add nothing beyond chance to those of the other experts, the expert is
        dropped. With fewer than MIN_GAIN_QUERIES queries it is kept.
        """
        started_at = time.process_time()
        histories, rows_E = insert_events(Histories.empty(), span.events[span.events.train_at_E != NEVER], span.n_users)
        parts = rows_E.split([len(rows_E) - model.experts.window_events, model.experts.window_events])
        train_targets, window_targets = (targets_at(histories, rows[histories.due_R[rows] == DUE]) for rows in parts)
        validation = window_targets[window_targets.history_lengths(1) > 0]
        order_N = permutation(len(validation), stream(seed, "refit base queries"))
        validation = validation[order_N[:MAX_VALIDATION_QUERIES]]
        fit, train_targets = self._limit_passes(replace(self.fit, epochs=self.fit.max_epochs), train_targets)
        key = (stream_seed(seed, "refit base"), span.index)
        epochs = train(model.experts.trained_model, train_targets, fit.epochs, key)
        quality = partial(mean_ndcg, model.experts.trained_model, validation, None)
        choice = train_to_best_epoch(model.experts.trained_model, epochs, quality, self.fit.patience, fit.epochs)
        meter.costs |= choice.costs()
        meter.add_time("train_cpu_s", started_at)
        scored = copy.copy(model)
        scored.score_pending_queries()
        if self.trains == "worth" and len(scored.query_log.x_QCF) >= MIN_GAIN_QUERIES:
            nats, p = feature_gain(scored.query_log, [SHARE_COLUMN["pooled"], RANK_COLUMN["pooled"]])
            meter.costs |= {"trained_worth": nats, "trained_worth_p": p}
            if not (p < SIGNIFICANCE_LEVEL and nats > MIN_GAIN_NATS):
                model.experts.trained_model = TRAINED_SPEC.build(model.seed)
                model.experts.trained_model.grow(model.n_users, model.n_items)
                model.experts.invalidate_cache()
                model.pending_queries, model.is_trained_expert_dropped = [], True
                return model, window_targets
        return scored, window_targets

    def _limit_passes(self, fit: FitConfig, targets: Targets) -> tuple[FitConfig, Targets]:
        """Reduce the epochs, and then the targets to the most recent ones, to stay within `max_passes`."""
        latest = targets.histories.times_R[targets.rows_N].argsort(stable=True)[-self.max_passes :].sort().values
        n_epochs = max(1, min(fit.epochs, self.max_passes // max(1, len(latest))))
        return replace(fit, epochs=n_epochs), targets[latest]


def _choose_lr_factor(
    model: Pooled, targets: Targets, fit: FitConfig, key: tuple[int, ...], meter: CostMeter
) -> FitConfig:
    """Return `fit` with the learning rate, or no training, that is best on the newest sixth of the targets.

    A smaller factor is chosen only if it is better than factor 1 beyond chance. The test is a t-test on differences in
    ndcg@20. Its level is halved because there are two alternatives. The costs report the choice as "lr_factor".
    """
    started_at, (seed, *path) = time.process_time(), key
    by_time_N = targets.histories.times_R[targets.rows_N].argsort(stable=True)[-MAX_TRIAL_TARGETS:]
    n_late = len(by_time_N) // 6
    train_targets, validation = (
        targets[part_N.sort().values] for part_N in by_time_N.split([len(by_time_N) - n_late, n_late])
    )
    validation = validation[validation.history_lengths(1) > 0]
    order_N = permutation(len(validation), stream(seed, "refit trial queries", *path))
    validation = validation[order_N[:MAX_VALIDATION_QUERIES]]
    if len(validation) < MIN_TRIAL_QUERIES:
        return fit
    report_progress("choosing the learning rate")
    ndcg_by_factor, chosen, trial_key = [], 0, (stream_seed(seed, "refit trials"), *path)
    for i, lr_factor in enumerate(LR_FACTORS):
        candidate = copy.deepcopy(model)
        if lr_factor:
            for _ in train(candidate, train_targets, fit.epochs, trial_key, lr_scale=fit.lr_scale * lr_factor):
                pass
        ndcg_by_factor.append(target_ndcg(candidate, validation, None).numpy())
        is_better = i > 0 and is_significantly_better(ndcg_by_factor[i], ndcg_by_factor[0], SIGNIFICANCE_LEVEL / 2)
        if is_better and ndcg_by_factor[i].mean() > ndcg_by_factor[chosen].mean():
            chosen = i
    meter.add_time("lr_choice_cpu_s", started_at)
    lr_factor = meter.costs["lr_factor"] = LR_FACTORS[chosen]
    return replace(fit, lr_scale=fit.lr_scale * (lr_factor or 1.0), epochs=fit.epochs if lr_factor else 0)
