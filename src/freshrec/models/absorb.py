"""Count new events without training: append them to the histories, and update counting models."""

import copy
from dataclasses import replace

import torch

from freshrec.data.histories import append_events
from freshrec.types import HELD_OUT, NEVER, Events, State, TrainedModel


def absorb_block(state: State, block: Events, n_users: int, n_items: int) -> State:
    """Return the state after counting a block: the histories gain its events, and a counting model learns from them.

    Held-out events join the histories, but counting models do not see them.
    """
    recent = append_events(state.histories, block, n_users)
    if isinstance(state.model, TrainedModel):
        return replace(state, histories=recent)
    model = copy.deepcopy(state.model)
    model.grow(n_users, n_items)
    visible_items_R = torch.where(state.histories.due_R == HELD_OUT, 0, state.histories.items_R)
    model.absorb(block[block.train_at_E != NEVER], replace(state.histories, items_R=visible_items_R))
    return replace(state, model=model, histories=recent)


def grow_items(state: State, n_items: int) -> State:
    """Return the state with rows for new items, if its model is a counting model.

    A counting model can then recommend a new item to users who have it. A trained model stays unchanged until its
    update, because it has no vectors of new items.
    """
    if isinstance(state.model, TrainedModel) or state.model.n_items == n_items:
        return state
    model = copy.deepcopy(state.model)
    model.grow(model.n_users, n_items)
    return replace(state, model=model)
