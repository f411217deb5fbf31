"""Refit: the update of a blend. Its rule learns from what was remembered, its trained expert from the new events."""

import copy
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch

from freshrec.config import Count, CountOrNone, Positive, check_options
from freshrec.data.batches import Targets, due_targets, joined_events, place, random_source, targets_at
from freshrec.device import permutation
from freshrec.learn.fit import Clock, Fit, adapt, best_epoch, ndcg, ndcg_of, train
from freshrec.learn.listwise import LEVEL, better, refit, worth
from freshrec.models.blend import Blend
from freshrec.models.experts import RANK, SHARE, TRAINED
from freshrec.models.pooled import Pooled
from freshrec.strategies.plain import Absorb
from freshrec.types import DUE, NEVER, NEXT, NOW, Histories, Span, State

JUDGED = 1407  # tells the random numbers from others
SPEED = 30_000  # passes in a second, with as much time again for what counts: half of what one core does
QUERIES = 1000  # by which the epochs of the first training are chosen, and the manner of the others
TRIED = 24_000  # targets, the latest, on which manners are tried
LEAST = 100  # queries to choose a manner by; with fewer it is the first
JUDGES = 300  # queries that tell whether the trained expert adds anything; with fewer it is kept
WORTH = 0.005  # nats by which it must make the targets likelier
MANNERS = (1.0, 0.3, 0.0)  # of an update: what the learning rate is multiplied by; 0: nothing is trained


@dataclass(frozen=True)
class Refit:
    """Learn again how the experts of a blend are joined; what they count, the replay has already given them."""

    decay: Positive = 20.0  # on the squares of the weights, as against the sum over queries
    least: Count = 40  # queries to learn from; with fewer the best expert speaks alone
    epochs: CountOrNone = 6  # of the network that corrects the weights; 0: weights only
    trains: Literal["worth", "always", "never"] = "worth"  # the expert that learns by gradients: unless it adds nothing
    fit: Fit = Fit(epochs=3, max_epochs=30, patience=3)  # how it is trained
    safe: bool = True  # each update trains in the manner that was best on the newest sixth of its targets
    passes: Count = 6_000_000  # targets of one training, epochs counted: a large log gets fewer epochs, or its latest
    anew: bool = False  # forget everything, and do with all events so far as with a base block: a full retrain

    def __post_init__(self) -> None:
        check_options(self)

    def update(self, state: State, span: Span) -> State:
        """The same experts, joined by what was remembered up to now, then trained on what is new."""
        after, clock = Absorb().update(state, span), Clock()
        if self.anew:
            span = replace(span, events=joined_events((*(state.memory or ()), span.events)))
            model = Blend(state.model.spec, state.model.seed)
            model.grow(span.n_users, span.n_items)
            model.absorb(span.events[span.events.joins_E != NEVER], Histories.empty())
            released = torch.where(span.events.joins_E == NEXT, NOW, span.events.joins_E)
            after = replace(after, model=model, memory=(replace(span.events, joins_E=released),))
        model, rest = after.model, due_targets(state.recent)
        if model.waiting and self.trains != "never":
            model, rest = self._begin(model, span, state.seed, clock)
        since = time.process_time()
        refit(model, self.decay, self.least, self.epochs)
        clock.timed("refit_cpu_s", since)
        if self.trains == "always" or (self.trains == "worth" and not model.given_up):
            fit, rest = self._within(self.fit, rest)
            key = state.seed, span.index
            if self.safe and state.spans_seen and not self.anew:
                fit = _safest(model.experts.trained, rest, fit, key, clock)
            if fit.epochs:
                adapt(model.experts.trained, rest, fit, key, clock)
            model.experts.unsettle()
        return replace(after, model=model, costs=clock.costs)

    def _begin(self, model: Blend, span: Span, seed: int, clock: Clock) -> tuple[Blend, Targets]:
        """Train on what came before the base block's last window; as long as it gets better at that, which is the rest.

        What was remembered of the window then hears what this expert thinks of it. If that adds nothing to what the
        others think, beyond chance, the expert is given up; fewer than JUDGES queries cannot tell.
        """
        since = time.process_time()
        histories, rows_E = place(Histories.empty(), span.events[span.events.joins_E != NEVER], span.n_users)
        parts = rows_E.split([len(rows_E) - model.experts.window, model.experts.window])
        early, late = (targets_at(histories, rows[histories.due_R[rows] == DUE]) for rows in parts)
        judges = late[late.lengths(1) > 0]
        judges = judges[permutation(len(judges), random_source(seed, JUDGED))[:QUERIES]]
        fit, early = self._within(replace(self.fit, epochs=self.fit.max_epochs), early)
        epochs = train(model.experts.trained, early, fit.epochs, (seed, span.index, JUDGED))
        best_epoch(model.experts.trained, epochs, lambda: ndcg(model.experts.trained, judges, None), self.fit.patience)
        clock.timed("train_cpu_s", since)
        heard = copy.copy(model)
        heard.hear_trained()
        if self.trains == "worth" and len(heard.remembered.x_QCF) >= JUDGES:
            nats, p = worth(heard.remembered, [SHARE["pooled"], RANK["pooled"]])
            clock.costs |= {"trained_worth": nats, "trained_worth_p": p}
            if not (p < LEVEL and nats > WORTH):
                model.experts.trained = TRAINED.build(model.seed)
                model.experts.trained.grow(model.n_users, model.n_items)
                model.experts.unsettle()
                model.waiting, model.given_up = [], True
                return model, late
        return heard, late

    def _within(self, fit: Fit, targets: Targets) -> tuple[Fit, Targets]:
        """Fewer epochs, and in the end fewer targets, the latest, where there would be too many passes."""
        latest = targets.histories.times_R[targets.rows_N].argsort(stable=True)[-self.passes :].sort().values
        n_epochs = max(1, min(fit.epochs, self.passes // max(1, len(latest))))
        return replace(fit, epochs=n_epochs), targets[latest]


def _safest(trained: Pooled, due: Targets, fit: Fit, key: tuple[int, ...], clock: Clock) -> Fit:
    """`fit`, or with less of a learning rate, or without epochs: which is best on the newest sixth of the targets.

    The others have to be better than `fit` beyond chance (t-test of the differences in ndcg@20, the level halved, as
    there are two of them). What was chosen stands in the costs: "manner", what the learning rate is multiplied by.
    """
    since = time.process_time()
    by_time_N = due.histories.times_R[due.rows_N].argsort(stable=True)[-TRIED:]
    n_late = len(by_time_N) // 6
    early, late = (due[part_N.sort().values] for part_N in by_time_N.split([len(by_time_N) - n_late, n_late]))
    late = late[late.lengths(1) > 0]
    late = late[permutation(len(late), random_source(*key, JUDGED))[:QUERIES]]
    if len(late) < LEAST:
        return fit
    values, chosen = [], 0
    for i, manner in enumerate(MANNERS):
        candidate = copy.deepcopy(trained)
        if manner:
            for _ in train(candidate, early, fit.epochs, key, lr_scale=fit.lr_scale * manner):
                pass
        values.append(ndcg_of(candidate, late, None).numpy())
        if i and better(values[i], values[0], LEVEL / 2) and values[i].mean() > values[chosen].mean():
            chosen = i
    clock.timed("manner_cpu_s", since)
    clock.costs["manner"] = MANNERS[chosen]
    return replace(fit, lr_scale=fit.lr_scale * (MANNERS[chosen] or 1.0), epochs=fit.epochs if MANNERS[chosen] else 0)
