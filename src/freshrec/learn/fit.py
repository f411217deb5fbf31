"""The only training loop, and the steps that every strategy takes around it: copy and grow, fit, finish."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from freshrec.config import Count, CountOrZero, Positive, Rate, check_options
from freshrec.data.batches import Targets, due_targets, pair_batches, target_batches, window_batches
from freshrec.data.histories import mark_trained
from freshrec.data.session_parallel import HiddenStates, session_parallel_batches
from freshrec.data.stored_interests import StoredInterests, stored_interests_of
from freshrec.device import integers, permutation
from freshrec.errors import TrainingError
from freshrec.learn.base_stream import split_last_sixth
from freshrec.learn.interest_store import TrimFunction, interest_costs, update_interests
from freshrec.learn.validation import hit_rate, mean_ndcg
from freshrec.learn.weights import Parametrization, apply_parametrization, grow_model, snapshot
from freshrec.nn.embedding_table import embedding_tables
from freshrec.progress import report_epoch
from freshrec.random_streams import global_stream, stream, stream_seed
from freshrec.types import Batch, Histories, InterestModel, LossTerm, NegativeSampler, Span, State, TrainedModel

StoppedBy = Literal["fixed", "patience", "minimum", "maximum"]
Projection = Callable[[Tensor, Tensor, Tensor], Tensor]
FEW_TARGETS_EPOCHS = 5  # of a training with too few targets to choose the number by
STOPPED_BY = ("patience", "minimum", "maximum")  # what stops a training whose epochs are chosen
EXPECTED_EPOCHS = 10  # of a training that stops by held-out targets; for estimates only


@dataclass(frozen=True)
class FitConfig:
    """Training options of a strategy. The model's options hold learning rate, batch size, negatives, history length."""

    epochs: CountOrZero = 5  # Epochs of an update.
    lr_scale: Positive = 1.0  # Learning rate of an update as a multiple of the model's.
    history: Literal["recent", "span"] = "recent"  # Events in histories: all ("recent"), or this span's ("span").
    base_epochs: CountOrZero = 0  # Epochs of base block and full retrains. 0 = each chosen on its own latest sixth.
    min_epochs: Count = 5  # Minimum number of epochs of a full retrain if the number is chosen.
    max_epochs: Count = 60  # Maximum number of epochs if the number is chosen.
    patience: Count = 8  # Number of epochs without a better ndcg@20 after which training stops.
    holdout: Rate = 0.0  # Share of the targets held out to choose the epochs of each training (ADER). 0 = fixed epochs.

    def __post_init__(self) -> None:
        check_options(self)

    def n_held_out(self, n_targets: int) -> int:
        """Return how many of `n_targets` targets are held out."""
        return max(1, round(n_targets * self.holdout)) if self.holdout and n_targets > 1 else 0

    @property
    def expected_epochs(self) -> int:
        """Number of epochs of an update, for estimates."""
        return EXPECTED_EPOCHS if self.holdout else self.epochs


class Trainable(Protocol):
    """Anything an optimiser trains: a model, or a network that maps a model's weights."""

    moments: dict[str, Tensor]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the weights that the optimiser changes."""


@dataclass
class CostMeter:
    """CPU seconds per part of an update, and other numbers that the update measures."""

    costs: dict[str, float] = field(default_factory=dict)

    def add_time(self, part: str, started_at: float) -> None:
        """Add the CPU seconds since `started_at` (time.process_time) to `part`."""
        self.costs[part] = self.costs.get(part, 0.0) + time.process_time() - started_at


@dataclass(frozen=True)
class EpochChoice:
    """A number of epochs, and what stopped the training.

    fixed     an option sets the number, or there are too few targets to choose by
    patience  the quality on held-out targets had not risen for `FitConfig.patience` epochs
    minimum   as patience, but the number was raised to `FitConfig.min_epochs`
    maximum   training reached `FitConfig.max_epochs`
    """

    n_epochs: int
    stopped_by: StoppedBy

    def costs(self) -> dict[str, float]:
        """The choice as costs of an update. Means over updates are then a mean number and shares."""
        costs = {"epochs": float(self.n_epochs)}
        if self.stopped_by != "fixed":
            costs |= {f"stopped_by_{reason}": float(reason == self.stopped_by) for reason in STOPPED_BY}
        return costs


def training_batches(
    model: TrainedModel, targets: Targets, rng: torch.Generator, stored_interests: StoredInterests | None = None
) -> Iterator[Batch]:
    """Yield one epoch of batches in the model's batch format."""
    spec = model.spec
    if model.batch_format == "pair":
        return pair_batches(targets, spec.batch, rng)
    if model.batch_format == "session-parallel":
        return session_parallel_batches(targets, spec.batch)
    if model.batch_format == "window":
        return window_batches(targets, spec.batch, spec.length, rng)
    min_history = 0 if model.batch_format == "click" else 1
    return target_batches(targets, spec.batch, spec.length, rng, stored_interests, min_history)


def train(
    model: TrainedModel,
    targets: Targets,
    n_epochs: int,
    key: tuple[int, ...],
    *,
    lr_scale: float = 1.0,
    stored_interests: StoredInterests | None = None,
    terms: Sequence[LossTerm] = (),
    project: Projection | None = None,
    parametrization: Parametrization | None = None,
    trainable: Trainable | None = None,
    negative_pool_N: Tensor | None = None,
) -> Iterator[float]:
    """Train `model` in place, and yield the mean loss after each epoch.

    `key` is the source of all randomness: the seed, then the span and further integers.

    `parametrization` gives the weights that the forward pass sees instead of the model's (`learn.weights`).
    `trainable` is trained instead of the model. `parametrization` must then detach the model's weights.
    `negative_pool_N` holds the items that negatives are drawn from. By default, these are all items.

    Raises TrainingError if the loss is not finite.
    """
    (seed, *path), lr = key, model.spec.lr * lr_scale
    tables = list(embedding_tables(model).values())
    optimized: Trainable = model if trainable is None else trainable
    optimizer, hidden = _resume_adam(optimized, lr), HiddenStates()
    for epoch in range(n_epochs):
        total, n_steps = 0.0, 0
        model.train()
        batch_rng = stream(seed, "training batches", *path, epoch)
        negative_rng = stream(seed, "training negatives", *path, epoch)
        with (
            global_stream(seed, "forward pass", *path, epoch),  # dropout, and negatives that the model draws
            apply_parametrization(model, parametrization) as forward_pass,
        ):
            for batch in training_batches(model, targets, batch_rng, stored_interests):
                uniform_N = sample_negatives(model, negative_rng, negative_pool_N)
                batch = attach_negatives(model, replace(batch, project=project), uniform_N)
                forward = hidden.run(forward_pass, batch)
                loss = forward.loss
                for term in terms:
                    loss = loss + term(batch, forward)
                value = loss.item()
                if not math.isfinite(value):
                    raise TrainingError(f"The loss became {value} in epoch {epoch + 1}. Lower lr, which is {lr:g}.")
                loss.backward()
                for table in tables:
                    table.step(lr)
                if optimizer is not None:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                total, n_steps = total + value, n_steps + 1
        model.eval()
        if optimizer is not None:
            optimized.moments = _adam_moments(optimized, optimizer)
        yield total / max(n_steps, 1)


def sample_negatives(model: TrainedModel, rng: torch.Generator, pool_N: Tensor | None = None) -> Tensor:
    """Draw item rows with replacement from `pool_N`, or from all items."""
    n = model.spec.negatives
    if pool_N is None:
        return integers(1, model.n_items + 1, n, rng)
    return pool_N[integers(0, len(pool_N), n, rng)]


def attach_negatives(model: TrainedModel, batch: Batch, uniform_N: Tensor) -> Batch:
    """Return the batch with its negatives: `uniform_N`, or as many items that the model draws itself.

    All models that read the batch score these items. So a student and its teacher give logits of the same items.
    """
    batch = replace(batch, negatives_N=uniform_N)
    return replace(batch, negatives_N=model.draw_negatives(batch)) if isinstance(model, NegativeSampler) else batch


def _resume_adam(model: Trainable, lr: float) -> torch.optim.Adam | None:
    named = dict(model.named_parameters())
    if not named:
        return None
    adam = torch.optim.Adam(named.values(), lr=lr, fused=True)
    if model.moments:
        for name, parameter in named.items():
            adam.state[parameter] = {k: model.moments[f"{name}.{k}"].clone() for k in ("step", "exp_avg", "exp_avg_sq")}
    return adam


def _adam_moments(model: Trainable, adam: torch.optim.Adam) -> dict[str, Tensor]:
    return {
        f"{name}.{k}": v.clone()
        for name, parameter in model.named_parameters()
        for k, v in adam.state[parameter].items()
    }


def grown_copy(state: State, span: Span) -> TrainedModel:
    """Return a copy of the state's model with rows for the span's new users and items."""
    model: TrainedModel = copy.deepcopy(state.model)
    grow_model(model, span.n_users, span.n_items, state.histories.categories_I)
    return model


def new_model(state: State, n_users: int, n_items: int) -> TrainedModel:
    """Return an untrained model with the options of the state's model."""
    model: TrainedModel = state.model.spec.build(state.seed)
    grow_model(model, n_users, n_items, state.histories.categories_I)
    return model


def split_holdout(targets: Targets, fit: FitConfig, key: tuple[int, ...]) -> tuple[Targets, Targets]:
    """Split targets into those to train on and a random share `fit.holdout` to choose the epochs by."""
    n_held = fit.n_held_out(len(targets))
    if not n_held:
        return targets, targets[torch.zeros(0, dtype=torch.int64)]
    seed, *path = key
    order_N = permutation(len(targets), stream(seed, "holdout", *path))
    return targets[order_N[n_held:].sort().values], targets[order_N[:n_held].sort().values]


def fit_model(
    model: TrainedModel,
    targets: Targets,
    fit: FitConfig,
    key: tuple[int, ...],
    meter: CostMeter,
    *,
    stored_interests: StoredInterests | None = None,
    terms: Sequence[LossTerm] = (),
    project: Projection | None = None,
    parametrization: Parametrization | None = None,
) -> int:
    """Train the model and return the number of epochs. Adds the CPU seconds to "train_cpu_s".

    Without held-out targets, it trains for `fit.epochs`. With them, it trains until their hr@20 (AUC for labelled
    targets) has not risen for `fit.patience` epochs, and returns to the best epoch [ADER section 3].
    """
    started_at = time.process_time()
    train_targets, held_out = split_holdout(targets, fit, key)
    n_epochs = fit.max_epochs if len(held_out) else fit.epochs
    epochs = train(
        model,
        train_targets,
        n_epochs,
        key,
        lr_scale=fit.lr_scale,
        stored_interests=stored_interests,
        terms=terms,
        project=project,
        parametrization=parametrization,
    )
    if len(held_out):
        metric = "hr@20" if held_out.labels_N is None else "AUC"
        quality = partial(hit_rate, model, held_out, stored_interests)
        choice = train_to_best_epoch(model, epochs, quality, fit.patience, n_epochs, metric)
        n_epochs = choice.n_epochs
        meter.costs |= choice.costs()
    else:
        for epoch, _ in enumerate(epochs, 1):
            report_epoch(epoch, n_epochs)
        meter.costs.setdefault("epochs", float(n_epochs))
    meter.add_time("train_cpu_s", started_at)
    return n_epochs


def train_to_best_epoch(
    model: TrainedModel,
    epochs: Iterator[float],
    quality: Callable[[], float],
    patience: int,
    max_epochs: int,
    metric: str = "ndcg@20",
) -> EpochChoice:
    """Train until the quality has not risen for `patience` epochs. Restore and return the best epoch."""
    stopped_by: StoppedBy = "maximum"
    best, n_best, restore = -math.inf, 0, snapshot(model)
    for n_epochs, _ in enumerate(epochs, 1):
        value = quality()
        report_epoch(n_epochs, max_epochs, f"held-out {metric} {value:.4f}")
        if value > best:
            best, n_best, restore = value, n_epochs, snapshot(model)
        elif n_epochs - n_best >= patience:
            stopped_by = "patience"
            break
    restore()
    return EpochChoice(n_best, stopped_by)


def fit_base_block(state: State, span: Span, fit: FitConfig) -> State:
    """Train a new model on the base block: the first update of most strategies."""
    if state.shared_base is not None:
        return state.shared_base
    targets = due_targets(state.histories)
    meter = CostMeter({"rows_read": float(len(targets))})
    fit = fit_from_scratch(state, state.histories, len(targets), fit, span.index, meter)
    model = new_model(state, span.n_users, span.n_items)
    stored_interests = stored_interests_of(model, None, span.index)
    n_epochs = fit_model(model, targets, fit, (state.seed, span.index), meter, stored_interests=stored_interests)
    return finish_update(replace(state, base_epochs=n_epochs), model, stored_interests, "recent", meter)


def finish_update(
    state: State,
    model: TrainedModel,
    stored_interests: StoredInterests | None,
    history: str,
    meter: CostMeter,
    trim: TrimFunction | None = None,
) -> State:
    """Return the state after an update. Recompute the interests of active users and mark histories as trained on."""
    interests = state.interests
    if stored_interests is not None and isinstance(model, InterestModel):
        started_at = time.process_time()
        interests = update_interests(model, stored_interests, state.histories, history, trim)
        meter.add_time("extract_cpu_s", started_at)
        meter.costs |= interest_costs(interests)
    recent = mark_trained(state.histories, model.spec.length)
    return replace(
        state,
        model=model,
        interests=interests,
        histories=recent,
        spans_seen=state.spans_seen + 1,
        costs=dict(meter.costs),
    )


def fit_from_scratch(
    state: State, histories: Histories, n_targets: int, fit: FitConfig, span: int, meter: CostMeter
) -> FitConfig:
    """Return `fit` with the number of epochs of a new model on the `n_targets` due targets; span 0 = base block.

    The number is `fit.base_epochs`, or it is chosen on the latest sixth of the targets. A full retrain has at least
    `fit.min_epochs`. Adds the number and what stopped the training to the costs.
    """
    if fit.n_held_out(n_targets):
        return replace(fit, epochs=0, lr_scale=1.0)  # `fit_model` stops by the held-out share
    started_at = time.process_time()
    choice = EpochChoice(fit.base_epochs, "fixed") if fit.base_epochs else choose_epochs(state, histories, fit, span)
    if span and choice.stopped_by != "fixed" and choice.n_epochs < fit.min_epochs:
        choice = EpochChoice(fit.min_epochs, "minimum")
    meter.add_time("epoch_choice_cpu_s", started_at)
    meter.costs |= choice.costs()
    return replace(fit, epochs=choice.n_epochs, lr_scale=1.0)


def choose_epochs(state: State, histories: Histories, fit: FitConfig, span: int = 0) -> EpochChoice:
    """Return the number of epochs with the best ndcg@20 (or AUC) on the latest sixth of the due targets.

    A new model with the options of the state's is trained on the other five sixths. A short tail right after the
    training rows would overstate the quality 3 to 4 times.
    """
    targets, held_out = split_last_sixth(histories)
    held_out = held_out if held_out.labels_N is not None else held_out[held_out.history_lengths(1) > 0]
    path = (span,) if span else ()
    held_out = held_out[permutation(len(held_out), stream(state.seed, "epoch choice queries", *path))[:2000]]
    if not len(held_out) or not len(targets):
        return EpochChoice(FEW_TARGETS_EPOCHS, "fixed")
    model = new_model(state, histories.n_users, int(targets.items_N.max()))
    stored_interests = stored_interests_of(model, None, span)
    key = (stream_seed(state.seed, "epoch choice", *path), 0)
    epochs = train(model, targets, fit.max_epochs, key, stored_interests=stored_interests)
    metric = "ndcg@20" if held_out.labels_N is None else "AUC"
    quality = partial(mean_ndcg, model, held_out, stored_interests)
    return train_to_best_epoch(model, epochs, quality, fit.patience, fit.max_epochs, metric)
