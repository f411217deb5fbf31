"""Strategies without machinery: absorb, frozen, fine-tune, full retrain, batch update over the last w spans."""

import copy
from dataclasses import dataclass, replace

from freshrec.data.batches import append, due_targets, released, settle
from freshrec.data.carried import carried_by
from freshrec.learn.fit import Clock, Fit, adapt, finish, fresh, start, successor
from freshrec.models.scoring import history_length
from freshrec.types import Events, Histories, Span, State


@dataclass(frozen=True)
class Absorb:
    """No training at all: what a model counts, the replay has already given it. The strategy of the controls."""

    def update(self, state: State, span: Span) -> State:
        """The same model with room for the new users and items."""
        model = copy.deepcopy(state.model)
        model.grow(span.n_users, span.n_items)
        recent = settle(state.recent, history_length(model))
        return replace(state, model=model, recent=recent, spans_seen=state.spans_seen + 1)


@dataclass(frozen=True)
class Frozen:
    """Never updated after the base block; new users and items get untrained rows."""

    fit: Fit = Fit()

    def update(self, state: State, span: Span) -> State:
        """The base model, grown; interests stay as they were stored."""
        if state.spans_seen == 0:
            return start(state, span, self.fit)
        model = successor(state, span)
        recent = settle(state.recent, history_length(model))
        return replace(state, model=model, recent=recent, spans_seen=state.spans_seen + 1, costs={"rows_read": 0.0})


@dataclass(frozen=True)
class FineTune:
    """Train the previous model on the new events."""

    fit: Fit = Fit()

    def update(self, state: State, span: Span) -> State:
        """The previous weights, interests and optimiser state, trained on the due events."""
        if state.spans_seen == 0:
            return start(state, span, self.fit)
        model = successor(state, span)
        targets = due_targets(state.recent, self.fit.history)
        carried = carried_by(model, state.users, span.index)
        clock = Clock({"rows_read": float(len(targets))})
        adapt(model, targets, self.fit, (state.seed, span.index), clock, carried=carried)
        return finish(state, model, carried, self.fit.history, clock)


@dataclass(frozen=True)
class Retrain:
    """Train on all events so far, or on those of the last `spans` spans."""

    fresh: bool = True  # from untrained weights, with as many epochs as the base block needed; else from the last ones
    spans: int = 0  # 0 = all
    fit: Fit = Fit()

    def update(self, state: State, span: Span) -> State:
        """A model trained on the remembered events; `memory` refers to them, without copying."""
        past: tuple[Events, ...] = (*(state.memory or ()), span.events)
        past = past[-self.spans :] if self.spans else past
        if state.spans_seen == 0:
            return replace(start(state, span, self.fit), memory=past)
        histories = _histories(past, span.n_users)
        model = fresh(state, span.n_users, span.n_items) if self.fresh else successor(state, span)
        fit = replace(self.fit, epochs=state.base_epochs, lr_scale=1.0) if self.fresh else self.fit
        targets = due_targets(histories)
        carried = carried_by(model, None if self.fresh else state.users, span.index)
        clock = Clock({"rows_read": float(len(targets))})
        adapt(model, targets, fit, (state.seed, span.index), clock, carried=carried)
        after = finish(replace(state, recent=histories), model, carried, "recent", clock)
        return replace(after, memory=past, recent=settle(state.recent, history_length(model)))


def _histories(past: tuple[Events, ...], n_users: int) -> Histories:
    """All remembered events by user, due once more; what the last span held back stays held back."""
    histories = Histories.empty()
    for events in past:
        histories = append(released(histories), events, n_users)
    return histories
