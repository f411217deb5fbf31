"""States that have counted: events in everybody's history, and in the models that count."""

import copy
from dataclasses import replace

import torch

from freshrec.data.batches import append
from freshrec.types import NEVER, SECRET, Events, State, TrainedModel


def absorb(state: State, block: Events, n_users: int, n_items: int) -> State:
    """The state after counting a block: cheap experts learn at once, everybody's recent events are kept."""
    recent = append(state.recent, block, n_users)
    if isinstance(state.model, TrainedModel):
        return replace(state, recent=recent)
    model = copy.deepcopy(state.model)
    model.grow(n_users, n_items)
    hidden_R = torch.where(state.recent.due_R == SECRET, 0, state.recent.items_R)
    model.absorb(block[block.joins_E != NEVER], replace(state.recent, items_R=hidden_R))
    return replace(state, model=model, recent=recent)


def told(state: State, n_items: int) -> State:
    """The state with room for new items, where the model counts: it may offer a user an own one again.

    A trained model stays as it is until its update: what it has not learnt it neither offers nor finds.
    """
    if isinstance(state.model, TrainedModel) or state.model.n_items == n_items:
        return state
    model = copy.deepcopy(state.model)
    model.grow(model.n_users, n_items)
    return replace(state, model=model)
