"""States that have counted: events in everybody's history, and in the models that count."""

import copy
from dataclasses import replace

import torch

from freshrec.data.histories import append_events
from freshrec.types import HELD_OUT, NEVER, Events, State, TrainedModel


def absorb_block(state: State, block: Events, n_users: int, n_items: int) -> State:
    """The state after counting a block: cheap experts learn at once, everybody's recent events are kept."""
    recent = append_events(state.histories, block, n_users)
    if isinstance(state.model, TrainedModel):
        return replace(state, histories=recent)
    model = copy.deepcopy(state.model)
    model.grow(n_users, n_items)
    visible_items_R = torch.where(state.histories.due_R == HELD_OUT, 0, state.histories.items_R)
    model.absorb(block[block.train_at_E != NEVER], replace(state.histories, items_R=visible_items_R))
    return replace(state, model=model, histories=recent)


def grow_items(state: State, n_items: int) -> State:
    """The state with room for new items, where the model counts: it may offer a user an own one again.

    A trained model stays as it is until its update: what it has not learnt it neither offers nor finds.
    """
    if isinstance(state.model, TrainedModel) or state.model.n_items == n_items:
        return state
    model = copy.deepcopy(state.model)
    model.grow(model.n_users, n_items)
    return replace(state, model=model)
