"""A user leaves: out of the log, and out of all that every version remembers by user. What is shared stays."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from freshrec.data.batches import Targets
from freshrec.data.histories import filter_interests, filter_rows, row_users
from freshrec.learn.reservoir import Reservoir, TrainingSamples
from freshrec.models.blend.model import Blend
from freshrec.nightly.job import NightlyJob
from freshrec.nn.embedding_table import embedding_tables
from freshrec.recommender.bundle import read_bundle, write_bundle
from freshrec.recommender.ids import normalize_ids
from freshrec.replay.measure import Queries
from freshrec.store import click_journal
from freshrec.store.versions import delete_files, is_collected
from freshrec.types import ErasableModel, Events, Histories, Impressions, Interests, Model, TrainedModel

T = TypeVar("T")
M = TypeVar("M", bound=Model)
USER_TABLE = "users"  # the name of every table that has a row for each user
REMAINING_DATA = (
    "weights that all users share, and counts of items and of pairs of items, to which the user's events have "
    "contributed: they hold no id, and fade as the model learns; a new `fit` on the log is without them"
)


def erase_user(job: NightlyJob, user_id: str) -> dict[str, Any]:
    """Remove a user from the log, from the journal of clicks and from all versions; a receipt.

    What was interrupted is completed by another call. StateError where the live version is damaged; others that are
    damaged give up their files, as nobody can use them.
    """
    store, rewritten, live = job.store, [], job.bundle.served.users
    stored_id = normalize_ids("user_id", user_id, live)[0]  # a number, where ids are numbers
    job.log.batches()  # it can be read, or nothing is begun
    readable = {manifest.id for manifest in store.manifests()}
    for number in store.version_numbers():
        if is_collected(store, number):
            continue
        if number not in readable or store.find_damage(number):
            delete_files(store, number)
            continue
        bundle = read_bundle(store.verified_files(number))
        row = int(bundle.served.users.rows(normalize_ids("user_id", user_id, bundle.served.users)))
        if row:
            reduced = without_user(bundle, row)
            reduced = replace(reduced, served=replace(reduced.served, users=bundle.served.users.erase_row(row)))
            store.rewrite_version(number, lambda folder, new=reduced: write_bundle(new, folder))  # type: ignore[misc]
            rewritten.append(number)
    n_clicks, n_events = click_journal.erase_user_clicks(store.folder, stored_id), job.log.erase_user(stored_id)
    return {"user_id": user_id, "events": n_events, "clicks": n_clicks, "versions": rewritten, "stays": REMAINING_DATA}


def without_user(node: T, user: int) -> T:
    """`node`, a tree of what states and versions are made of, after forgetting the user in a row."""
    result: Any = node
    match node:
        case Events():
            result = node[node.users_E != user]
        case Impressions():
            result = node[(node.users_E != user).nonzero()[:, 0]]
        case Histories():
            remaining = filter_rows(node, row_users(node) != user)
            impressions = None if node.impressions is None else without_user(node.impressions, user)
            result = replace(remaining, impressions=impressions)
        case Targets():
            items_R = torch.where(row_users(node.histories) == user, 0, node.histories.items_R)
            others = node[(node.users_N != user).nonzero()[:, 0]]
            result = replace(others, histories=replace(node.histories, items_R=items_R))
        case Interests():
            result = filter_interests(node, row_users(node) != user)
        case TrainingSamples() | Queries():
            result = node[(node.users_N != user).nonzero()[:, 0]]
        case Reservoir():
            result = _reservoir_without_user(node, user)
        case Model():
            result = _model_without_user(node, user)
        case tuple() | list():
            result = type(node)(without_user(child, user) for child in node)
        case dict():
            result = {name: _weights_without_user(name, child, user) for name, child in node.items()}
        case _ if is_dataclass(node) and not isinstance(node, type):
            result = copy.copy(node)
            for part in fields(node):
                object.__setattr__(result, part.name, without_user(getattr(node, part.name), user))
    return result  # type: ignore[no-any-return]


def _reservoir_without_user(reservoir: Reservoir, user: int) -> Reservoir:
    """Other targets take the places, so that it is as full as the stream that went by wants it to be."""
    is_user_N = reservoir.samples.users_N == user
    other_rows_M = (~is_user_N).nonzero()[:, 0]
    if not len(other_rows_M):
        return Reservoir(reservoir.samples[other_rows_M], reservoir.size)
    index_N = torch.arange(len(is_user_N))
    index_N[is_user_N] = other_rows_M[torch.arange(int(is_user_N.sum())) % len(other_rows_M)]
    return replace(reservoir, samples=reservoir.samples[index_N])


def _model_without_user(model: M, user: int) -> M:
    """A copy in which the user's own row says nothing; what all users share is as it was."""
    model = copy.deepcopy(model)
    if isinstance(model, Blend):
        counters = model.experts.counters
        model.experts.counters = {name: _model_without_user(counter, user) for name, counter in counters.items()}
        model.experts.invalidate_cache()
    elif isinstance(model, ErasableModel) and user <= model.n_users:
        model.erase_user(user)
    elif isinstance(model, TrainedModel):
        for name, table in embedding_tables(model).items():
            if name == USER_TABLE and user < len(table.packed):
                table.packed[user], table.steps_R[user] = 0.0, 0.0
    return model


def _weights_without_user(name: Any, child: Any, user: int) -> Any:
    """A value of a dict: where it is the table of the users, among the weights of an earlier model, its row is 0."""
    if isinstance(child, Tensor):
        if name != USER_TABLE or user >= len(child):
            return child
        child = child.clone()
        child[user] = 0
        return child
    return without_user(child, user)
