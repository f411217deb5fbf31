"""What a store can tell of itself: its state, differences between versions, one user, one item, whether it is whole."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version as version_of
from typing import Any

import polars as pl
import torch

from freshrec.errors import FreshrecError, StateError
from freshrec.nightly.anew import planned
from freshrec.nightly.job import batches_of, waiting
from freshrec.serve.contents import Contents, read_contents
from freshrec.serve.reading import ids_of, known_rows
from freshrec.serve.recommend import Wanted, best_items
from freshrec.store.eventlog import EventLog
from freshrec.store.versions import Store, chain_of, collected
from freshrec.types import InterestModel

SAMPLE, LIST = 300, 20  # users, and items of each, by which two versions are compared
SHOWN = 10  # of an interest's items
LIBRARIES = ("torch", "polars", "numpy", "scipy", "deltalake", "safetensors", "pydantic")


def status(store: Store) -> dict[str, Any]:
    """The live version, what waits, and what it takes on the disk."""
    live, versions, log = store.live, store.versions(), EventLog(store.folder / "log")
    about, chain = store.manifest(live), chain_of(store)
    n_bytes = sum(file.n_bytes for file in about.files.values())
    newest = log.batches().filter(pl.col("batch").is_in(batches_of(chain)))["last"].max()
    return {
        "live": live, "made_at": about.made_at, "kind": about.kind, "model": about.recipe["model"],
        "strategy": about.recipe["strategy"], **about.sizes, "held": about.held,
        "newest_event": _moment(newest) if isinstance(newest, int) and log.has_clock else None,
        "versions": len(versions), "refused": [m.id for m in versions if not m.promoted and m.id > live],
        "batches_waiting": waiting(store, log),
        "bytes": n_bytes, "bytes_per_user": round(n_bytes / max(1, about.sizes["users"]), 1),
        "plan": planned(chain), "numbers": about.numbers, "notes": about.notes,
    }  # fmt: skip


def difference(store: Store, first: int, second: int) -> dict[str, Any]:
    """What two versions differ in, and how much of the lists of a sample of users they share."""
    one, other = store.manifest(first), store.manifest(second)
    names = sorted(one.numbers.keys() | other.numbers.keys())
    both_contents = [read_contents(store.files(number)) for number in (first, second)]
    known = [contents.served.users.frame["id"].drop_nulls() for contents in both_contents]
    users = known[0].filter(known[0].is_in(known[1].implode()))
    users = users.sample(min(SAMPLE, len(users)), seed=0)
    lists = [best_items(contents.served, contents.served.users.rows(users), Wanted(LIST)) for contents in both_contents]
    ids = [
        found.select("nth", item=contents.served.items.ids(torch.from_numpy(found["item"].to_numpy(writable=True))))
        for contents, found in zip(both_contents, lists)
    ]
    shared = ids[0].join(ids[1], on=["nth", "item"]).height / max(1, ids[0].height)
    ways = [contents.recipe for contents in both_contents]  # not the manifests': those have the options' names of then
    recipe = {key for key in ways[0].keys() | ways[1].keys() if ways[0].get(key) != ways[1].get(key)}
    return {
        "versions": [first, second],
        "sizes": {name: [one.sizes.get(name), other.sizes.get(name)] for name in one.sizes},
        "numbers": {name: [one.numbers.get(name), other.numbers.get(name)] for name in names},
        "recipe": {key: [way.get(key) for way in ways] for key in sorted(recipe)},
        "shared": shared, "users": len(users), "list": LIST,
    }  # fmt: skip


def user(contents: Contents, user_id: str | int) -> dict[str, Any]:
    """One user: its events, and its interests with what they are for, where the model has such."""
    served = contents.served
    row = int(known_rows(ids_of("user_id", user_id, served.users), served.users))
    mine = served.counts.recent
    rows_R = torch.arange(int(mine.offsets_U[row]), int(mine.offsets_U[row + 1]))
    rows_R = rows_R[mine.times_R[rows_R].argsort(stable=True)]
    items = served.items.ids(mine.items_R[rows_R].long())
    when = [_moment(time) if contents.reading.has_clock else time for time in mine.times_R[rows_R].tolist()]
    about = served.users.frame.row(row - 1, named=True)
    found = {
        "user_id": about["id"], "first_span": about["first_span"], "last_span": about["last_span"],
        "n_events": len(items), "events": [{"item_id": i, "at": t} for i, t in zip(items, when)][-LIST:],
    }  # fmt: skip
    if isinstance(served.state.model, InterestModel) and served.state.users is not None:
        found["interests"] = _interests(contents, row)
    return found


def _interests(contents: Contents, row: int) -> list[dict[str, Any]]:
    """The stored interests of a user: when each was born and used last, and the items that it is nearest to."""
    served = contents.served
    interests = served.state.users
    assert interests is not None
    if row > interests.n_users:
        return []
    mine = slice(int(interests.offsets_U[row]), int(interests.offsets_U[row + 1]))
    scores_KI = interests.vectors_SD[mine].float() @ served.state.model.item_vectors().T
    scores_KI[:, 0] = -torch.inf
    best_KN = scores_KI.topk(min(SHOWN, served.state.model.n_items)).indices
    spans = zip(interests.born_S[mine].tolist(), interests.used_S[mine].tolist())
    return [
        {"born_span": born, "used_span": used, "items": served.items.ids(best_N).to_list()}
        for (born, used), best_N in zip(spans, best_KN)
    ]


def item(contents: Contents, item_id: str | int) -> dict[str, Any]:
    """One item: how often, by how many, and when it was taken."""
    served = contents.served
    row = int(known_rows(ids_of("item_id", item_id, served.items), served.items))
    mine = served.counts.recent
    at_R = (mine.items_R == row).nonzero()[:, 0]
    users_R = torch.searchsorted(mine.offsets_U, at_R, right=True)
    about = served.items.frame.row(row - 1, named=True)
    found = {
        "item_id": about["id"], "first_span": about["first_span"], "last_span": about["last_span"],
        "n_events": len(at_R), "n_users": len(users_R.unique()),
    }  # fmt: skip
    if contents.reading.has_clock and len(at_R):
        times = mine.times_R[at_R]
        found |= {"first": _moment(int(times.min())), "last": _moment(int(times.max()))}
    return found


def checkup(store: Store | None) -> list[tuple[bool, str]]:
    """What works and what does not: the environment, and every file of the store."""
    about = ", ".join(f"{name} {version_of(name)}" for name in LIBRARIES)
    found = [(True, f"Python {platform.python_version()}; {about}")]
    if store is None:
        return found
    readable = {manifest.id for manifest in store.versions()}
    for number in store.numbers():
        if number in readable and collected(store, number):
            found.append((True, f"version {number}: its files were given up by `freshrec gc` or `erase`"))
            continue
        try:
            wrong = store.damaged(number)
            found.append((not wrong, f"version {number}: {'; '.join(wrong) or 'whole'}"))
        except StateError as why:
            found.append((False, f"version {number}: {why}"))
    for check in (_live, _log):
        try:
            found.append((True, check(store)))
        except FreshrecError as why:
            found.append((False, str(why)))
    return found


def _live(store: Store) -> str:
    store.files(store.live)
    return f"version {store.live} is live, {len(chain_of(store)) - 1} updates after the first one"


def _log(store: Store) -> str:
    log = EventLog(store.folder / "log")
    n_batches = len(log.batches())
    n_rows = len(log.read()) if n_batches else 0
    return f"the log holds {n_rows:,} events in {n_batches:,} batches"


def _moment(microseconds: int) -> str:
    return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat(timespec="seconds")
