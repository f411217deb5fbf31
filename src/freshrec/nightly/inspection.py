"""Reports about a store: its status, the difference of two versions, one user, one item."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import polars as pl
import torch

from freshrec.data.moments import format_time
from freshrec.nightly.deferral import batches_of, find_deferral
from freshrec.nightly.delivery_checks import waiting_batches
from freshrec.nightly.full_retrain import retrain_plan
from freshrec.nightly.gate import GateLimits
from freshrec.nightly.notes import current_notes
from freshrec.nightly.same_queries import compare_on_same_queries
from freshrec.random_streams import stream_seed
from freshrec.recommender.bundle import Bundle, read_bundle
from freshrec.recommender.ids import normalize_ids, require_rows, resolve_request
from freshrec.recommender.list_request import ListRequest
from freshrec.recommender.lists import top_items
from freshrec.recommender.user_profile import profile_of
from freshrec.store.click_journal import read_journal
from freshrec.store.collection import disk_bytes
from freshrec.store.event_log import EventLog, log_of
from freshrec.store.log_files import LOG_FOLDER
from freshrec.store.manifest import Manifest
from freshrec.store.versions import Store, is_collected, version_chain

N_SAMPLE_USERS, LIST_LENGTH = 300, 20  # sampled users, and items per list, to compare two versions


def store_status(store: Store) -> dict[str, Any]:
    """The live version, the size of the store, and the events that wait for the next update. Sizes are in bytes."""
    live, versions, log = store.live, store.manifests(), log_of(store)
    manifest, chain = store.manifest(live), version_chain(store)
    were_live = {move.to for move in store.moves()}
    refused = [m for m in versions if not m.goes_live and m.id not in were_live]
    n_bytes = sum(file.n_bytes for file in manifest.files.values())
    batches = log.batches()
    newest = batches.filter(pl.col("batch").is_in(batches_of(chain)))["last"].max()
    journal, deferral = read_journal(store.folder), find_deferral(store, GateLimits())
    return {
        "live": live,
        "made_at": manifest.made_at,
        "kind": manifest.kind,
        "model": manifest.recipe["model"],
        "strategy": manifest.recipe["strategy"],
        **manifest.sizes,
        "held": manifest.held,
        "newest_event": format_time(newest) if isinstance(newest, int) and log.has_clock else None,
        "versions": len(versions),
        "refused": [m.id for m in refused if m.id > live],
        "refused_not_learned": _refused_deliveries(refused, chain),
        "deferred": [m.id for m in deferral.versions],
        "with_new_ids": [m.id for m in deferral.pending],
        "batches_waiting": waiting_batches(store, log),
        "clicks_waiting": sum(len(file.clicks) for file in journal if file.batch is None),
        "bytes": n_bytes,
        "bytes_per_user": round(n_bytes / max(1, manifest.sizes["users"]), 1),
        "log_events": int(batches["rows"].sum()),
        "log_different_events": _count_different_events(store, log),
        "log_deliveries": len(batches),
        "log_bytes": disk_bytes(store.folder / LOG_FOLDER),
        "versions_bytes": disk_bytes(store.folder / "versions"),
        "total_bytes": disk_bytes(store.folder),
        "versions_deleted": [m.id for m in versions if is_collected(store, m.id)],
        "plan": retrain_plan(chain),
        "numbers": manifest.numbers,
        "notes": current_notes(chain),
    }


def _refused_deliveries(refused: list[Manifest], chain: list[Manifest]) -> list[int]:
    """Return the refused versions whose events the live version has not learned; the last one of each delivery."""
    learned = set(batches_of(chain))
    last = {m.batch or -m.id: m.id for m in refused if m.batch is None or m.batch not in learned}
    return sorted(last.values())


def _count_different_events(store: Store, log: EventLog) -> int:
    """Return the number of events in the log, without those that a later delivery repeats.

    Only deliveries after a refused or dropped version can repeat an event, so the log is read only if there is one.
    """
    batches, learned = log.batches(), {m.id for m in version_chain(store)}
    if all(m.id in learned and m.kind != "no rows" for m in store.manifests()):
        return int(batches["rows"].sum())
    return len(log.read()) if len(batches) else 0


def version_difference(store: Store, first: int, second: int) -> dict[str, Any]:
    """The quality of two versions on the same queries, the items that their lists share, and how their numbers differ.

    If the files of one were deleted, `same_queries` gives the reason and `shared` is None.
    """
    manifests = store.manifest(first), store.manifest(second)
    names = sorted({name for manifest in manifests for name in manifest.numbers})
    found: dict[str, Any] = {
        "versions": [first, second],
        "sizes": {name: [manifest.sizes.get(name) for manifest in manifests] for name in manifests[0].sizes},
        "numbers": {name: [manifest.numbers.get(name) for manifest in manifests] for name in names},
        "recipe": {},
        "shared": None,
        "users": 0,
        "list": LIST_LENGTH,
    }
    deleted = [number for number in (first, second) if is_collected(store, number)]
    if deleted:
        found["same_queries"] = {"reason": f"The files of version {deleted[0]} were deleted, so it cannot be queried."}
        return found | {"recipe": _different_options([manifest.recipe for manifest in manifests])}
    bundles = [read_bundle(store.verified_files(number)) for number in (first, second)]
    shared, n_users = _shared_items(bundles)
    same_queries = compare_on_same_queries(bundles[0], bundles[1], manifests)
    found |= {"shared": shared, "users": n_users, "same_queries": same_queries}
    # not the recipes of the manifests, which may hold former names of options
    return found | {"recipe": _different_options([bundle.recipe for bundle in bundles])}


def _different_options(recipes: list[dict[str, Any]]) -> dict[str, list[Any]]:
    keys = sorted(recipes[0].keys() | recipes[1].keys())
    return {key: [recipe.get(key) for recipe in recipes] for key in keys if recipes[0].get(key) != recipes[1].get(key)}


def _shared_items(bundles: list[Bundle]) -> tuple[float, int]:
    """The share of items that the lists of two versions have in common, and the number of sampled users."""
    known = [bundle.served.users.frame["id"].drop_nulls() for bundle in bundles]
    users = known[0].filter(known[0].is_in(known[1].implode()))
    users = users.sample(min(N_SAMPLE_USERS, len(users)), seed=stream_seed(0, "compared users"))
    lists = [_sample_lists(bundle, users) for bundle in bundles]
    ids = [
        found.select("nth", item=bundle.served.items.ids(torch.from_numpy(found["item"].to_numpy(writable=True))))
        for bundle, found in zip(bundles, lists)
    ]
    return ids[0].join(ids[1], on=["nth", "item"]).height / max(1, ids[0].height), len(users)


def _sample_lists(bundle: Bundle, users: pl.Series) -> pl.DataFrame:
    served = bundle.served
    return top_items(served, served.users.rows(users), resolve_request(served, ListRequest(k=LIST_LENGTH)))


def user_profile(bundle: Bundle, user_id: str | int) -> dict[str, Any]:
    """Return the events of a user, newest last, and the interests with their best items.

    Raises OptionError for an unknown user.
    """
    served = bundle.served
    row = int(require_rows(normalize_ids("user_id", user_id, served.users), served.users))
    found = profile_of(served, row, bundle.read_options.has_clock)
    interests = [
        {
            "title": interest.title,
            "born_span": interest.born_span,
            "used_span": interest.used_span,
            "items": [item_id for item_id, _ in interest.items],
            "events": [asdict(event) for event in interest.events],
        }
        for interest in found.interests
    ]
    return {
        "user_id": served.users.frame["id"][row - 1],
        "first_span": found.first_span,
        "last_span": found.last_span,
        "n_events": len(found.events),
        "events": [asdict(event) for event in found.events[-LIST_LENGTH:]],
        "kind": found.kind,
        "interests": interests,
    }


def item_profile(bundle: Bundle, item_id: str | int) -> dict[str, Any]:
    """Return the counts of events and users of an item, and its first and last times. Raises OptionError if unknown."""
    served = bundle.served
    row = int(require_rows(normalize_ids("item_id", item_id, served.items), served.items))
    histories = served.counts.histories
    at_R = (histories.items_R == row).nonzero()[:, 0]
    users_R = torch.searchsorted(histories.offsets_U, at_R, right=True)
    catalog_row = served.items.frame.row(row - 1, named=True)
    found = {
        "item_id": catalog_row["id"],
        "first_span": catalog_row["first_span"],
        "last_span": catalog_row["last_span"],
        "n_events": len(at_R),
        "n_users": len(users_R.unique()),
    }
    if bundle.read_options.has_clock and len(at_R):
        times = histories.times_R[at_R]
        found |= {"first": format_time(int(times.min())), "last": format_time(int(times.max()))}
    return found


def count_refused_events(store: Store, column: str, identifier: str | int) -> int:
    """Return the number of events with this id in deliveries that only refused versions learned.

    `column`: user_id or item_id.
    """
    learned = set(batches_of(version_chain(store)))
    refused = [manifest for manifest in store.manifests() if not manifest.promoted]
    batches = sorted(set(batches_of(refused)) - learned)
    if not batches:
        return 0
    log = log_of(store)
    return len(log.rows_not_in(log.read(batches).filter(pl.col(column) == identifier), learned))
