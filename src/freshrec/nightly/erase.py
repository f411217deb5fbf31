"""Erase a user from the log, the click journal and the per-user data of every version. Shared weights stay."""

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
from freshrec.store.collection import delete_files
from freshrec.store.erasures import begin_erasure, complete_erasure
from freshrec.store.log_fingerprint import require_same_log
from freshrec.store.versions import Store, is_collected, replace_manifest
from freshrec.types import ErasableModel, Events, Histories, Impressions, Interests, Model, TrainedModel

T = TypeVar("T")
M = TypeVar("M", bound=Model)
USER_TABLE = "users"  # name of every embedding table with a row per user
REMAINING_DATA = (
    "weights that all users share, and counts of items and of item pairs. They contain no user id, and the user's part "
    "in them shrinks with every update. A new `freshrec fit` on the log removes it."
)


def erase_user(job: NightlyJob, user_id: str) -> dict[str, Any]:
    """Erase a user from the log, the click journal and all versions. Return a receipt.

    If an earlier call was interrupted, this one completes it. Damaged versions, which cannot be used anyway, lose their
    files. Raises StateError if the live version is damaged, or if the event log contradicts it.
    """
    require_same_log(job.store)
    stored_id = normalize_ids("user_id", user_id, job.bundle.served.users)[0]  # a number, if ids are numbers
    job.log.batches()  # raises an error before anything changes, if the log cannot be read
    folder = job.store.folder
    begin_erasure(folder, stored_id)
    rewritten = _erase_from_versions(job.store, user_id)
    n_clicks, n_events = click_journal.erase_user_clicks(folder, stored_id), job.log.erase_user(stored_id)
    _record_log(job)
    complete_erasure(folder, stored_id, bool(rewritten or n_clicks or n_events))
    return {"user_id": user_id, "events": n_events, "clicks": n_clicks, "versions": rewritten, "stays": REMAINING_DATA}


def _erase_from_versions(store: Store, user_id: str) -> list[int]:
    """Erase a user from the files of all versions. Return the numbers of the versions that had the user."""
    rewritten = []
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
    return rewritten


def _record_log(job: NightlyJob) -> None:
    """Note the present log in the live version. So an older copy, which still has the user, contradicts it."""
    manifest, fingerprint = job.store.manifest(job.store.live), job.log.fingerprint()
    if manifest.log != fingerprint:
        replace_manifest(job.store, manifest.model_copy(update={"log": fingerprint}))


def without_user(node: T, user: int) -> T:
    """Return a copy of `node`, any part of a state or version, without the user in row `user`."""
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
    """Return the reservoir with the user's samples replaced by others, so that its size still matches its stream."""
    is_user_N = reservoir.samples.users_N == user
    other_rows_M = (~is_user_N).nonzero()[:, 0]
    if not len(other_rows_M):
        return Reservoir(reservoir.samples[other_rows_M], reservoir.size)
    index_N = torch.arange(len(is_user_N))
    index_N[is_user_N] = other_rows_M[torch.arange(int(is_user_N.sum())) % len(other_rows_M)]
    return replace(reservoir, samples=reservoir.samples[index_N])


def _model_without_user(model: M, user: int) -> M:
    """Return a copy of the model in which the user's own row is zero. Shared weights stay as they are."""
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
    """Return a value of a dict without the user. In a user table of an earlier model, the user's row becomes 0."""
    if isinstance(child, Tensor):
        if name != USER_TABLE or user >= len(child):
            return child
        child = child.clone()
        child[user] = 0
        return child
    return without_user(child, user)
