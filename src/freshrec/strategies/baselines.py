"""Strategies without machinery: absorb, frozen, fine-tune, full retrain, batch update over the last w spans."""

import copy
from dataclasses import dataclass, replace

from freshrec.data.batches import due_targets
from freshrec.data.histories import append_events, mark_trained, release_deferred
from freshrec.data.stored_interests import stored_interests_of
from freshrec.learn.fit import CostMeter, FitConfig, finish_update, fit_base_block, fit_model, grown_copy, new_model
from freshrec.nn.scoring import history_length
from freshrec.types import Events, Histories, Span, State


@dataclass(frozen=True)
class Absorb:
    """No training at all: what a model counts, the replay has already given it. The strategy of the controls."""

    def update(self, state: State, span: Span) -> State:
        """The same model with room for the new users and items."""
        model = copy.deepcopy(state.model)
        model.grow(span.n_users, span.n_items)
        recent = mark_trained(state.histories, history_length(model))
        return replace(state, model=model, histories=recent, spans_seen=state.spans_seen + 1)


@dataclass(frozen=True)
class Frozen:
    """Never updated after the base block; new users and items get untrained rows."""

    fit: FitConfig = FitConfig()

    def update(self, state: State, span: Span) -> State:
        """The base model, grown; interests stay as they were stored."""
        if state.spans_seen == 0:
            return fit_base_block(state, span, self.fit)
        model = grown_copy(state, span)
        recent = mark_trained(state.histories, history_length(model))
        return replace(state, model=model, histories=recent, spans_seen=state.spans_seen + 1, costs={"rows_read": 0.0})


@dataclass(frozen=True)
class FineTune:
    """Train the previous model on the new events."""

    fit: FitConfig = FitConfig()

    def update(self, state: State, span: Span) -> State:
        """The previous weights, interests and optimiser state, trained on the due events."""
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
    """Train on all events so far, or on those of the last `spans` spans."""

    from_scratch: bool = True  # from untrained weights, for the base block's number of epochs; else from the last ones
    spans: int = 0  # 0 = all
    fit: FitConfig = FitConfig()

    def update(self, state: State, span: Span) -> State:
        """A model trained on the remembered events; `memory` refers to them, without copying."""
        past_events: tuple[Events, ...] = (*(state.memory or ()), span.events)
        past_events = past_events[-self.spans :] if self.spans else past_events
        if state.spans_seen == 0:
            return replace(fit_base_block(state, span, self.fit), memory=past_events)
        histories = _rebuild_histories(past_events, span.n_users)
        model = new_model(state, span.n_users, span.n_items) if self.from_scratch else grown_copy(state, span)
        fit = replace(self.fit, epochs=state.base_epochs, lr_scale=1.0) if self.from_scratch else self.fit
        targets = due_targets(histories)
        stored_interests = stored_interests_of(model, None if self.from_scratch else state.interests, span.index)
        meter = CostMeter({"rows_read": float(len(targets))})
        fit_model(model, targets, fit, (state.seed, span.index), meter, stored_interests=stored_interests)
        after = finish_update(replace(state, histories=histories), model, stored_interests, "recent", meter)
        return replace(after, memory=past_events, histories=mark_trained(state.histories, history_length(model)))


def _rebuild_histories(past: tuple[Events, ...], n_users: int) -> Histories:
    """All remembered events by user, due once more; what the last span deferred stays deferred."""
    histories = Histories.empty()
    for events in past:
        histories = append_events(release_deferred(histories), events, n_users)
    return histories
