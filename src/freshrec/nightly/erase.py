"""A user leaves: out of the log, and out of all that every version remembers by user. What is shared stays."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from freshrec.data.batches import Targets, interests_where, owners, rows_where
from freshrec.learn.reservoir import Kept, Reservoir
from freshrec.models.blend import Blend
from freshrec.models.tables import tables_of
from freshrec.nightly.job import Job
from freshrec.replay.measure import Queries
from freshrec.serve.contents import read_contents, write_contents
from freshrec.serve.reading import ids_of
from freshrec.store import clicks
from freshrec.store.versions import collected, give_up
from freshrec.types import Events, Histories, Interests, Model, RememberingModel, Shown, TrainedModel

T = TypeVar("T")
M = TypeVar("M", bound=Model)
USERS = "users"  # the name of every table that has a row for each user
STAYS = (
    "weights that all users share, and counts of items and of pairs of items, to which the user's events have "
    "contributed: they hold no id, and fade as the model learns; a new `fit` on the log is without them"
)


def erase(job: Job, user_id: str) -> dict[str, Any]:
    """Remove a user from the log, from the journal of clicks and from all versions; a receipt.

    What was interrupted is completed by another call. StateError where the live version is damaged; others that are
    damaged give up their files, as nobody can use them.
    """
    store, rewritten, live = job.store, [], job.contents.served.users
    theirs = ids_of("user_id", user_id, live)[0]  # a number, where ids are numbers
    job.log.batches()  # it can be read, or nothing is begun
    readable = {manifest.id for manifest in store.versions()}
    for number in store.numbers():
        if collected(store, number):
            continue
        if number not in readable or store.damaged(number):
            give_up(store, number)
            continue
        contents = read_contents(store.files(number))
        row = int(contents.served.users.rows(ids_of("user_id", user_id, contents.served.users)))
        if row:
            less = without(contents, row)
            less = replace(less, served=replace(less.served, users=contents.served.users.without(row)))
            store.rewrite(number, lambda aside, less=less: write_contents(less, aside))  # type: ignore[misc]
            rewritten.append(number)
    n_clicks, n_events = clicks.erase(store.folder, theirs), job.log.erase(theirs)
    return {"user_id": user_id, "events": n_events, "clicks": n_clicks, "versions": rewritten, "stays": STAYS}


def without(node: T, user: int) -> T:
    """`node`, a tree of what states and versions are made of, after forgetting the user in a row."""
    found: Any = node
    match node:
        case Events():
            found = node[node.users_E != user]
        case Shown():
            found = node[(node.users_E != user).nonzero()[:, 0]]
        case Histories():
            less = rows_where(node, owners(node) != user)
            found = replace(less, shown=None if node.shown is None else without(node.shown, user))
        case Targets():
            blank_R = torch.where(owners(node.histories) == user, 0, node.histories.items_R)
            others = node[(node.users_N != user).nonzero()[:, 0]]
            found = replace(others, histories=replace(node.histories, items_R=blank_R))
        case Interests():
            found = interests_where(node, owners(node) != user)
        case Kept() | Queries():
            found = node[(node.users_N != user).nonzero()[:, 0]]
        case Reservoir():
            found = _reservoir_without(node, user)
        case Model():
            found = _model_without(node, user)
        case tuple() | list():
            found = type(node)(without(child, user) for child in node)
        case dict():
            found = {name: _weights_without(name, child, user) for name, child in node.items()}
        case _ if is_dataclass(node) and not isinstance(node, type):
            found = copy.copy(node)
            for part in fields(node):
                object.__setattr__(found, part.name, without(getattr(node, part.name), user))
    return found  # type: ignore[no-any-return]


def _reservoir_without(reservoir: Reservoir, user: int) -> Reservoir:
    """Other targets take the places, so that it is as full as the stream that went by wants it to be."""
    theirs_N = reservoir.kept.users_N == user
    others_M = (~theirs_N).nonzero()[:, 0]
    if not len(others_M):
        return Reservoir(reservoir.kept[others_M], reservoir.size)
    which_N = torch.arange(len(theirs_N))
    which_N[theirs_N] = others_M[torch.arange(int(theirs_N.sum())) % len(others_M)]
    return replace(reservoir, kept=reservoir.kept[which_N])


def _model_without(model: M, user: int) -> M:
    """A copy in which the user's own row says nothing; what all users share is as it was."""
    model = copy.deepcopy(model)
    if isinstance(model, Blend):
        counters = model.experts.counters
        model.experts.counters = {name: _model_without(counter, user) for name, counter in counters.items()}
        model.experts.unsettle()
    elif isinstance(model, RememberingModel) and user <= model.n_users:
        model.forget(user)
    elif isinstance(model, TrainedModel):
        for name, table in tables_of(model).items():
            if name == USERS and user < len(table.packed):
                table.packed[user], table.steps_R[user] = 0.0, 0.0
    return model


def _weights_without(name: Any, child: Any, user: int) -> Any:
    """A value of a dict: where it is the table of the users, among the weights of an earlier model, its row is 0."""
    if isinstance(child, Tensor):
        if name != USERS or user >= len(child):
            return child
        child = child.clone()
        child[user] = 0
        return child
    return without(child, user)
