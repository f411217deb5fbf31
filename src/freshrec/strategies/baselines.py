"""The simplest strategies: absorb, frozen, fine-tuning, full retrain, and retraining on the last w spans."""

import copy
from dataclasses import dataclass, replace

from freshrec.data.batches import due_targets
from freshrec.data.histories import append_events, mark_trained, release_deferred
from freshrec.data.stored_interests import stored_interests_of
from freshrec.learn.fit import (
    CostMeter,
    FitConfig,
    finish_update,
    fit_base_block,
    fit_from_scratch,
    fit_model,
    grown_copy,
    new_model,
)
from freshrec.nn.scoring import history_length
from freshrec.types import Events, Histories, Span, State


@dataclass(frozen=True)
class Absorb:
    """No gradient training. A counting model has already absorbed the events when `update` is called."""

    def update(self, state: State, span: Span) -> State:
        """Return the same model with rows for the new users and items."""
        model = copy.deepcopy(state.model)
        model.grow(span.n_users, span.n_items)
        recent = mark_trained(state.histories, history_length(model))
        return replace(state, model=model, histories=recent, spans_seen=state.spans_seen + 1)


@dataclass(frozen=True)
class Frozen:
    """No training after the base block. New users and items get untrained vectors."""

    fit: FitConfig = FitConfig()  # Training options of the base block.

    def update(self, state: State, span: Span) -> State:
        """Return the base model with rows for new users and items. Stored interests do not change."""
        if state.spans_seen == 0:
            return fit_base_block(state, span, self.fit)
        model = grown_copy(state, span)
        recent = mark_trained(state.histories, history_length(model))
        return replace(state, model=model, histories=recent, spans_seen=state.spans_seen + 1, costs={"rows_read": 0.0})


@dataclass(frozen=True)
class FineTune:
    """Fine-tuning: continue training the previous model on the new events."""

    fit: FitConfig = FitConfig()  # Training options of the model.

    def update(self, state: State, span: Span) -> State:
        """Train the previous weights and interests on the due events. The optimiser keeps its state."""
        if state.spans_seen == 0:
            return fit_base_block(state, span, self.fit)
        model = grown_copy(state, span)
        targets = due_targets(state.histories, self.fit.history)
        stored_interests = stored_interests_of(model, state.interests, span.index)
        meter = CostMeter({"rows_read": float(len(targets))})
        fit_model(model, targets, self.fit, (state.seed, span.index), meter, stored_interests=stored_interests)
        return finish_update(state, model, stored_interests, self.fit.history, meter)


@dataclass(frozen=True)
class Retrain:
    """Retraining on all events so far, or on those of the last `spans` spans."""

    from_scratch: bool = True  # Start from untrained weights (true) or from the previous model (false).
    spans: int = 0  # Number of most recent spans to train on. 0 = all.
    fit: FitConfig = FitConfig()  # Training options of the model.

    def update(self, state: State, span: Span) -> State:
        """Train on the remembered events. `memory` holds references to them, not copies."""
        past_events: tuple[Events, ...] = (*(state.memory or ()), span.events)
        past_events = past_events[-self.spans :] if self.spans else past_events
        if state.spans_seen == 0:
            return replace(fit_base_block(state, span, self.fit), memory=past_events)
        histories = _rebuild_histories(past_events, span.n_users)
        targets = due_targets(histories)
        meter, fit = CostMeter({"rows_read": float(len(targets))}), self.fit
        if self.from_scratch:
            fit = fit_from_scratch(state, histories, len(targets), fit, span.index, meter)
        model = new_model(state, span.n_users, span.n_items) if self.from_scratch else grown_copy(state, span)
        stored_interests = stored_interests_of(model, None if self.from_scratch else state.interests, span.index)
        fit_model(model, targets, fit, (state.seed, span.index), meter, stored_interests=stored_interests)
        after = finish_update(replace(state, histories=histories), model, stored_interests, "recent", meter)
        return replace(after, memory=past_events, histories=mark_trained(state.histories, history_length(model)))


def _rebuild_histories(past: tuple[Events, ...], n_users: int) -> Histories:
    """Mark all remembered events as due again. Events that the last span deferred stay deferred."""
    histories = Histories.empty()
    for events in past:
        histories = append_events(release_deferred(histories), events, n_users)
    return histories
