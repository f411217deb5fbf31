"""The only training loop, and what every strategy does around it: start, succeed, finish."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from freshrec.config import Count, CountOrNone, Positive, Rate, check_options
from freshrec.data.batches import (
    Targets,
    due_targets,
    owners,
    pair_batches,
    query_batches,
    random_source,
    settle,
    target_batches,
    targets_at,
    window_batches,
    without_secrets,
)
from freshrec.data.carried import Carried, carried_by
from freshrec.data.lanes import HiddenStates, lane_batches
from freshrec.device import integers, permutation
from freshrec.errors import TrainingError
from freshrec.learn.clicks import auc, clicks_of
from freshrec.learn.interests import Trim, costs_of, reread
from freshrec.learn.weights import View, grow, seen_through, snapshot
from freshrec.models.ranking import ranks
from freshrec.models.tables import tables_of
from freshrec.types import DUE, Batch, ClickModel, Histories, InterestModel, Span, State, Term, TrainedModel

Project = Callable[[Tensor, Tensor, Tensor], Tensor]
LIST_LENGTH = 20  # k of the ndcg and the hit rate that choose a number of epochs
USUAL_EPOCHS = 10  # of a training that chooses their number itself
HELD = 1011  # tells the random numbers that choose held-out targets from those of the epochs


@dataclass(frozen=True)
class Fit:
    """How a strategy trains; the model's own spec holds lr, batch size, negatives and history length."""

    epochs: CountOrNone = 5  # of an update
    lr_scale: Positive = 1.0  # of an update's lr against the model's
    history: Literal["recent", "span"] = "recent"  # the last events across spans, or this span's only (IMSR)
    base_epochs: CountOrNone = 0  # of the base block and of a full retrain; 0 = chosen on the base block's last sixth
    max_epochs: Count = 60  # where they are chosen
    patience: Count = 8  # epochs without a better ndcg@20 before the choice is made
    holdout: Rate = 0.0  # share of the targets of each training to stop by, as ADER does, instead of fixed epochs

    def __post_init__(self) -> None:
        check_options(self)

    def held(self, n_targets: int) -> int:
        """How many of so many targets are held out."""
        return max(1, round(n_targets * self.holdout)) if self.holdout and n_targets > 1 else 0

    @property
    def usual_epochs(self) -> int:
        """Of an update, for estimates."""
        return USUAL_EPOCHS if self.holdout else self.epochs


class Learner(Protocol):
    """What an optimiser trains: a model, or a network that maps a model's weights."""

    moments: dict[str, Tensor]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights that the optimiser changes."""


@dataclass
class Clock:
    """CPU seconds by part of an update, and whatever else it measures of itself."""

    costs: dict[str, float] = field(default_factory=dict)

    def timed(self, part: str, since: float) -> None:
        """Add the CPU seconds since `since` (time.process_time) to `part`."""
        self.costs[part] = self.costs.get(part, 0.0) + time.process_time() - since


def batches(
    model: TrainedModel, targets: Targets, source: torch.Generator, carried: Carried | None = None
) -> Iterator[Batch]:
    """One epoch of batches, as the model wants them cut."""
    spec = model.spec
    if model.unit == "pair":
        return pair_batches(targets, spec.batch, source)
    if model.unit == "lane":
        return lane_batches(targets, spec.batch)
    if model.unit == "window":
        return window_batches(targets, spec.batch, spec.length, source)
    least = 0 if model.unit == "click" else 1
    return target_batches(targets, spec.batch, spec.length, source, carried, least)


def train(
    model: TrainedModel,
    targets: Targets,
    n_epochs: int,
    key: tuple[int, ...],
    *,
    lr_scale: float = 1.0,
    carried: Carried | None = None,
    terms: Sequence[Term] = (),
    project: Project | None = None,
    view: View | None = None,
    learner: Learner | None = None,
    among_N: Tensor | None = None,
) -> Iterator[float]:
    """Train `model` in place; yields the mean loss after each epoch. All randomness comes from `key`: seed, span, ...

    `view`: what the forward pass sees instead of the weights (`learn.weights`). `learner`: what is trained in place of
    the model, which `view` then has to leave alone. `among_N`: the items that negatives are drawn from, else all.
    """
    lr = model.spec.lr * lr_scale
    tables = list(tables_of(model).values())
    trained: Learner = model if learner is None else learner
    dense, hidden = _resume(trained, lr), HiddenStates()
    for epoch in range(n_epochs):
        total, n_steps = 0.0, 0
        model.train()
        with torch.random.fork_rng(devices=[]), seen_through(model, view) as forward_pass:
            source = random_source(*key, epoch)
            torch.manual_seed(int(integers(0, 2**31, 1, source)))  # dropout
            for batch in batches(model, targets, source, carried):
                negatives_N = negatives(model, source, among_N)
                batch = replace(batch, negatives_N=negatives_N, project=project)
                forward = hidden.run(forward_pass, batch)
                loss = forward.loss
                for term in terms:
                    loss = loss + term(batch, forward)
                value = loss.item()
                if not math.isfinite(value):
                    raise TrainingError(f"the loss became {value} in epoch {epoch + 1}: lower lr (now {lr:g}).")
                loss.backward()
                for table in tables:
                    table.push(lr)
                if dense is not None:
                    dense.step()
                    dense.zero_grad(set_to_none=True)
                total, n_steps = total + value, n_steps + 1
        model.eval()
        if dense is not None:
            trained.moments = _moments(trained, dense)
        yield total / max(n_steps, 1)


def negatives(model: TrainedModel, source: torch.Generator, among_N: Tensor | None = None) -> Tensor:
    """Item rows drawn with replacement from `among_N`, or from all items."""
    n = model.spec.negatives
    if among_N is None:
        return integers(1, model.n_items + 1, n, source)
    return among_N[integers(0, len(among_N), n, source)]


def _resume(model: Learner, lr: float) -> torch.optim.Adam | None:
    named = dict(model.named_parameters())
    if not named:
        return None
    adam = torch.optim.Adam(named.values(), lr=lr, fused=True)
    if model.moments:
        for name, parameter in named.items():
            adam.state[parameter] = {k: model.moments[f"{name}.{k}"].clone() for k in ("step", "exp_avg", "exp_avg_sq")}
    return adam


def _moments(model: Learner, adam: torch.optim.Adam) -> dict[str, Tensor]:
    return {
        f"{name}.{k}": v.clone()
        for name, parameter in model.named_parameters()
        for k, v in adam.state[parameter].items()
    }


def successor(state: State, span: Span) -> TrainedModel:
    """A copy of the state's model with room for the span's new users and items."""
    model: TrainedModel = copy.deepcopy(state.model)
    grow(model, span.n_users, span.n_items, state.recent.kinds_I)
    return model


def fresh(state: State, n_users: int, n_items: int) -> TrainedModel:
    """An untrained model with the options of the state's."""
    model: TrainedModel = state.model.spec.build(state.seed)
    grow(model, n_users, n_items, state.recent.kinds_I)
    return model


def parted(targets: Targets, fit: Fit, key: tuple[int, ...]) -> tuple[Targets, Targets]:
    """What `adapt` trains on, and the held-out rest that it stops by: a share `fit.holdout`, drawn at random."""
    n_held = fit.held(len(targets))
    if not n_held:
        return targets, targets[torch.zeros(0, dtype=torch.int64)]
    order_N = permutation(len(targets), random_source(*key, HELD))
    return targets[order_N[n_held:].sort().values], targets[order_N[:n_held].sort().values]


def adapt(
    model: TrainedModel,
    targets: Targets,
    fit: Fit,
    key: tuple[int, ...],
    clock: Clock,
    *,
    carried: Carried | None = None,
    terms: Sequence[Term] = (),
    project: Project | None = None,
    view: View | None = None,
) -> int:
    """A whole training, its CPU seconds added to "train_cpu_s"; returns the epochs that the model has learnt for.

    That is `train` for `fit.epochs`; where a part is held out, until hr@20 (AUC, of labelled targets) on it has not
    risen for `fit.patience` epochs, and the model then is that of the best epoch [ADER section 3].
    """
    since = time.process_time()
    learnt, held = parted(targets, fit, key)
    n_epochs = fit.max_epochs if len(held) else fit.epochs
    epochs = train(
        model, learnt, n_epochs, key, lr_scale=fit.lr_scale, carried=carried, terms=terms, project=project, view=view
    )
    if len(held):
        n_epochs = best_epoch(model, epochs, lambda: hit_rate(model, held, carried), fit.patience)
        clock.costs["epochs"] = float(n_epochs)
    else:
        for _ in epochs:
            pass
    clock.timed("train_cpu_s", since)
    return n_epochs


def best_epoch(model: TrainedModel, epochs: Iterator[float], quality: Callable[[], float], patience: int) -> int:
    """Train until the quality has not risen for `patience` epochs; the best epoch, to which the model goes back."""
    best, n_best, back = -math.inf, 0, snapshot(model)
    for n_epochs, _ in enumerate(epochs, 1):
        value = quality()
        if value > best:
            best, n_best, back = value, n_epochs, snapshot(model)
        elif n_epochs - n_best >= patience:
            break
    back()
    return n_best


def start(state: State, span: Span, fit: Fit) -> State:
    """The first update of every strategy that trains plainly: a fresh model on the base block."""
    if state.started is not None:
        return state.started
    targets = due_targets(state.recent)
    n_epochs = 0 if fit.held(len(targets)) else fit.base_epochs or choose_epochs(state, fit)
    model = fresh(state, span.n_users, span.n_items)
    carried = carried_by(model, None, span.index)
    clock = Clock({"rows_read": float(len(targets))})
    fit = replace(fit, epochs=n_epochs, lr_scale=1.0)
    n_epochs = adapt(model, targets, fit, (state.seed, span.index), clock, carried=carried)
    return finish(replace(state, base_epochs=n_epochs), model, carried, "recent", clock)


def finish(
    state: State, model: TrainedModel, carried: Carried | None, history: str, clock: Clock, trim: Trim | None = None
) -> State:
    """The state after an update: interests read again for the users seen in it, histories settled and cut to length."""
    users = state.users
    if carried is not None and isinstance(model, InterestModel):
        since = time.process_time()
        users = reread(model, carried, state.recent, history, trim)
        clock.timed("extract_cpu_s", since)
        clock.costs |= costs_of(users)
    recent = settle(state.recent, model.spec.length)
    return replace(
        state, model=model, users=users, recent=recent, spans_seen=state.spans_seen + 1, costs=dict(clock.costs)
    )


def choose_epochs(state: State, fit: Fit) -> int:
    """How many epochs the base block needs: the best ndcg@20, or AUC, on its last sixth after training on the rest.

    The held-out part is a sixth, not a tail right behind the training rows: such a tail overstates quality 3-4 x.
    """
    targets, late = early_and_late(state.recent)
    late = late if late.labels_N is not None else late[late.lengths(1) > 0]
    late = late[permutation(len(late), random_source(state.seed, 7))[:2000]]
    if not len(late) or not len(targets):
        return 5  # too little to choose by
    model = fresh(state, state.recent.n_users, int(targets.items_N.max()))
    carried = carried_by(model, None, 0)
    epochs = train(model, targets, fit.max_epochs, (state.seed, 0), carried=carried)
    return best_epoch(model, epochs, lambda: ndcg(model, late, carried), fit.patience)


def early_and_late(histories: Histories) -> tuple[Targets, Targets]:
    """The due targets before the last sixth, and those in it."""
    if histories.shown is not None:
        due = due_targets(histories)
        late_N = histories.shown.times_E >= histories.shown.times_E.sort().values[len(due) * 5 // 6 :][:1]
        return due[~late_N], due[late_N]
    late_R, due_R = last_sixth(histories), histories.due_R == DUE
    parts = [targets_at(histories, rows_R.nonzero()[:, 0]) for rows_R in (due_R & ~late_R, due_R & late_R)]
    return parts[0], parts[1]


def last_sixth(histories: Histories) -> Tensor:
    """(R,) whether a row is in the last sixth."""
    return nth_part(histories, 6) == 5


def nth_part(histories: Histories, n: int) -> Tensor:
    """(R,) in which of n equal parts, 0 .. n - 1, a row is: by time, or of each user's own rows where time tells the
    users apart.

    Without a clock the order of events often runs user by user, so that the last part by time would be other users.
    """
    times_R = histories.times_R
    if not len(times_R):
        return torch.zeros(0, dtype=torch.int64)
    edges = times_R.sort().values[[len(times_R) * i // n for i in range(1, n)]]
    part_R = torch.searchsorted(edges, times_R, right=True)
    users_R, late_R = owners(histories), part_R == n - 1
    late_users = users_R[late_R].unique()
    if torch.isin(late_users, users_R[~late_R]).float().mean() > 0.2:
        return part_R
    sizes_U = histories.offsets_U.diff()
    place_R = torch.arange(len(times_R)) - histories.offsets_U[users_R]
    edges_UN = sizes_U[:, None] * torch.arange(1, n) // n
    return (place_R[:, None] >= edges_UN[users_R]).sum(1)


def ndcg(model: TrainedModel, targets: Targets, carried: Carried | None, k: int = LIST_LENGTH) -> float:
    """ndcg@k of some targets; AUC, if they have labels."""
    if targets.labels_N is not None:
        return _auc(model, targets)
    return float(ndcg_of(model, targets, carried, k).sum()) / max(len(targets), 1)


def ndcg_of(model: TrainedModel, targets: Targets, carried: Carried | None, k: int = LIST_LENGTH) -> Tensor:
    """(N,) ndcg@k of each target, the same targets always in the same order."""
    rank_N = _ranks(model, targets, carried)
    return ((rank_N <= k) / torch.log2(1 + rank_N)).nan_to_num(0.0)


def hit_rate(model: TrainedModel, targets: Targets, carried: Carried | None, k: int = LIST_LENGTH) -> float:
    """hr@k of some targets, which is ADER's recall@k; AUC, if they have labels."""
    if targets.labels_N is not None:
        return _auc(model, targets)
    return float((_ranks(model, targets, carried) <= k).sum()) / max(len(targets), 1)


def _auc(model: TrainedModel, targets: Targets) -> float:
    """AUC of targets with labels; 0 where all of them are alike."""
    assert isinstance(model, ClickModel) and targets.labels_N is not None
    return float(np.nan_to_num(auc(targets.labels_N.cpu().numpy(), clicks_of(model, targets).cpu().numpy())))


def _ranks(model: TrainedModel, targets: Targets, carried: Carried | None) -> Tensor:
    """(N,) the rank of each target among all items, in no order."""
    batches = query_batches(without_secrets(targets), model.spec.length, carried)
    return torch.cat([torch.zeros(0), *(ranks(model, batch, targets.items_N[which]) for which, batch in batches)])
