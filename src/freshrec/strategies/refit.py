"""Refit: the update of a blend. Its rule learns from what was remembered, its trained expert from the new events."""

import time
from dataclasses import dataclass, replace

import torch

from freshrec.data.batches import Targets, due_targets, place, random_source, targets_at
from freshrec.learn.fit import Clock, Fit, adapt, best_epoch, ndcg, train
from freshrec.learn.listwise import refit
from freshrec.models.blend import Blend
from freshrec.options import Count, CountOrNone, Positive, check_options
from freshrec.strategies.plain import Absorb
from freshrec.types import DUE, NEVER, Histories, Span, State

JUDGED = 1407  # tells the random numbers from others
SPEED = 30_000  # passes in a second, with as much time again for what counts: half of what one core does
QUERIES = 1000  # by which the epochs of the first training are chosen


@dataclass(frozen=True)
class Refit:
    """Learn again how the experts of a blend are joined; what they count, the replay has already given them."""

    decay: Positive = 1e-4  # on the squares of the weights
    least: Count = 300  # queries to learn from; with fewer the best expert speaks alone
    epochs: CountOrNone = 6  # of the network that corrects the weights; 0: weights only
    trains: bool = True  # the expert that learns by gradients; false: counters alone
    fit: Fit = Fit(epochs=3, max_epochs=30, patience=3)  # how it is trained
    passes: Count = 6_000_000  # targets of one training, epochs counted: a large log gets fewer epochs, or its latest
    needs = "experts"
    base = "absorb"

    def __post_init__(self) -> None:
        check_options(self)

    def alternatives(self) -> "tuple[Refit, ...]":
        """Nothing to tune."""
        return (self,)

    def work(self, sizes: list[int], base_epochs: int) -> list[float]:
        """What the trained expert passes."""
        work = self.fit.work(sizes, base_epochs) if self.trains else [0.0] * len(sizes)
        return [min(passes, float(self.passes)) for passes in work]

    def update(self, state: State, span: Span) -> State:
        """The same experts, joined by what was remembered up to now, then trained on what is new."""
        after, clock = Absorb().update(state, span), Clock()
        model: Blend = after.model
        rest = due_targets(state.recent)
        if self.trains and model.waiting:
            rest = self._begin(model, span, state.seed, clock)
        since = time.process_time()
        refit(model, self.decay, self.least, self.epochs)
        clock.timed("refit_cpu_s", since)
        if self.trains:
            fit, rest = self._within(self.fit, rest)
            adapt(model.experts.trained, rest, fit, (state.seed, span.index), clock)
            model.experts.unsettle()
        return replace(after, costs=clock.costs)

    def _begin(self, model: Blend, span: Span, seed: int, clock: Clock) -> Targets:
        """Train on what came before the base block's last window; as long as it gets better at that, which is the rest.

        What was remembered of the window then hears what this expert thinks of it.
        """
        since = time.process_time()
        histories, rows_E = place(Histories.empty(), span.events[span.events.joins_E != NEVER], span.n_users)
        parts = rows_E.split([len(rows_E) - model.window, model.window])
        early, late = (targets_at(histories, rows[histories.due_R[rows] == DUE]) for rows in parts)
        judges = late[late.lengths(1) > 0]
        judges = judges[torch.randperm(len(judges), generator=random_source(seed, JUDGED))[:QUERIES]]
        fit, early = self._within(replace(self.fit, epochs=self.fit.max_epochs), early)
        epochs = train(model.experts.trained, early, fit.epochs, (seed, span.index, JUDGED))
        best_epoch(model.experts.trained, epochs, lambda: ndcg(model.experts.trained, judges, None), self.fit.patience)
        clock.timed("train_cpu_s", since)
        model.hear_trained()
        return late

    def _within(self, fit: Fit, targets: Targets) -> tuple[Fit, Targets]:
        """Fewer epochs, and in the end fewer targets, the latest, where there would be too many passes."""
        latest = targets.histories.times_R[targets.rows_N].argsort(stable=True)[-self.passes :].sort().values
        n_epochs = max(1, min(fit.epochs, self.passes // max(1, len(latest))))
        return replace(fit, epochs=n_epochs), targets[latest]
