"""What tests/test_gold.py records of a store: four updates, one of them refused, and the lists served afterwards."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl
from recorded import Record, state_hash
from serving import days, server

from freshrec.data.log import read_log
from freshrec.errors import IncompatibleError
from freshrec.nightly.gate import GateLimits
from freshrec.nightly.job import NightlyJob
from freshrec.recommender.bundle import new_bundle, read_bundle
from freshrec.recommender.recommender import Recommender
from freshrec.store.manifest import Manifest
from freshrec.store.versions import Store, create_store, open_store

LIMITS = GateLimits()
USERS = ["user-0", "user-7", "user-60", "nobody"]


def nights(model: str, strategy: str, trains: bool = True) -> Record:
    """Record a fit, an ordinary day, a day with events of one user only, and two more ordinary days.

    The gate refuses the day of one user. `trains` says that the model is trained by gradient descent, so its scores
    depend on the last bits of the processor's sums.
    """
    with TemporaryDirectory() as folder:
        base, one, two, three, four, five = days(5)
        with create_store(Path(folder) / "s") as store:
            NightlyJob(store, LIMITS).fit_first_version(read_log(base), "base", new_bundle(model, strategy, 0))
        job = NightlyJob(open_store(Path(folder) / "s"), LIMITS)
        first = job.store.manifest(1)
        verdicts, numbers = {"1": _verdict(first, job)}, {"1": _numbers(first)}
        for day in (one, two.with_columns(user_id=pl.lit("user-7")), three, four):
            job.append_delivery(read_log(day), f"day {len(verdicts)}")
            for manifest in job.catch_up():
                verdicts[str(manifest.id)], numbers[str(manifest.id)] = _verdict(manifest, job), _numbers(manifest)
        lists = {"python": _python_answers(Path(folder), five), "http": _http_answers(Path(folder))}
        hashes = {f"version {n}": _hash(job.store, int(n)) for n in verdicts}
        measured = {"numbers": numbers} | lists
        if trains:
            return Record({"verdicts": verdicts}, measured, hashes)
        return Record({"verdicts": verdicts} | measured, {}, hashes)


def _verdict(manifest: Manifest, job: NightlyJob) -> dict[str, Any]:
    """Whether the version was promoted, which version is live afterwards, and the statistics of the delivery."""
    verdict = {"promoted": manifest.promoted, "reasons": len(manifest.reasons), "live": job.store.live}
    numbers = {
        "parent": manifest.parent,
        "batch": manifest.batch,
        "held": manifest.held,
        "spans_seen": manifest.spans_seen,
    }
    day = {name: value for name, value in manifest.data["day"].items() if value is not None}
    return verdict | numbers | {"sizes": manifest.sizes, "day": day}


def _numbers(manifest: Manifest) -> dict[str, Any]:
    """Everything that was measured, except times."""
    return {name: value for name, value in manifest.numbers.items() if not name.endswith("_s")} | {
        "notes": len(manifest.notes)
    }


def _hash(store: Store, number: int) -> str:
    """Hash of the models, histories, ids, pending events and held-out queries of a version."""
    bundle = read_bundle(store.verified_files(number))
    served = bundle.served
    ids = (served.users.frame, served.items.frame, served.categories)
    return state_hash(served.state, served.counts, served.pending, ids, bundle.holdout_queries)


def _python_answers(folder: Path, next_day: pl.DataFrame) -> dict[str, Any]:
    """The answers of the Python class `Recommender`."""
    recommender = Recommender.load(folder / "s")
    some_items = ["item-3", "item-12", "item-20", "item-31", "item-47", "no-item"]
    requests: dict[str, Any] = {
        "plain": recommender.recommend(USERS, 8),
        "with what they had": recommender.recommend(USERS, 8, exclude_seen=False),
        "allowed": recommender.recommend(USERS, 4, exclude_seen=False, allow=some_items),
        "denied": recommender.recommend(USERS, 4, deny=some_items),
        "of a category": recommender.recommend(USERS, 4, exclude_seen=False, category="1"),
        "diverse": recommender.recommend(USERS, 6, diversity=0.05),
    }
    found: dict[str, Any] = {name: _lists(frame) for name, frame in requests.items()}
    first = {user: rows[0][0] for user, rows in found["plain"].items()}
    found["explained"] = {user: _reasons(recommender.explain(user, first[user])) for user in USERS[:3]}
    evaluated = recommender.evaluate(next_day).iter_rows(named=True)
    found["evaluated"] = {row["metric"]: [row["value"], row["n"], row["n_users"]] for row in evaluated}
    try:
        similar = recommender.similar_items(some_items[:3], 4)
        found["similar"] = {item: _pairs(similar.filter(item_id=item), "similar_id") for item in some_items[:3]}
    except IncompatibleError:
        found["similar"] = "none"
    return found


def _lists(frame: pl.DataFrame) -> dict[str, Any]:
    """Map each user to a list of [item, score, whether it is a fallback]."""
    return {
        user: [[row["item_id"], row["score"], row["fallback"] is not None] for row in rows.iter_rows(named=True)]
        for (user,), rows in frame.group_by("user_id", maintain_order=True)
    }


def _pairs(frame: pl.DataFrame, name: str) -> list[list[Any]]:
    return [list(row) for row in frame.select(name, "score").iter_rows()]


def _reasons(frame: pl.DataFrame) -> list[list[Any]]:
    return [list(row) for row in frame.select("place", "points", "because").iter_rows()]


def _http_answers(folder: Path) -> dict[str, Any]:
    """The answers of the server. The last one follows a click."""
    requests = {
        "plain": "k=8",
        "with what they had": "k=8&exclude_seen=false",
        "allowed": "k=4&exclude_seen=false&allow=item-3&allow=item-12&allow=item-20",
        "denied": "k=4&deny=item-3&deny=item-12",
        "of a category": "k=4&exclude_seen=false&category=1",
        "diverse": "k=6&diversity=0.05",
    }
    with server(folder) as (client, _):

        def get(path: str, key: str = "items") -> Any:
            answer = client.get(path)
            return answer.json()[key] if answer.status_code == 200 else answer.status_code

        def lists_for(query: str) -> dict[str, Any]:
            return {user: _served_items(get(f"/recommend/{user}?{query}")) for user in USERS}

        found: dict[str, Any] = {name: lists_for(query) for name, query in requests.items()}
        batch = client.post("/recommend", json={"users": USERS, "k": 3}).json()
        found["together"] = {entry["user_id"]: _served_items(entry["items"]) for entry in batch["lists"]}
        found["similar"] = _served_items(get("/similar/item-3?k=4"))
        item = found["plain"]["user-7"][0][0]
        reasons = get(f"/explain/user-7/{item}", "reasons")
        found["explained"] = [[reason["place"], reason["points"], reason["because"]] for reason in reasons]
        cards = get("/users/user-7/interests", "interests")
        found["interests"] = [_served_items(card["items"]) for card in cards]
        found["came since the version before"] = _served_items(get("/users/user-7/changes", "came"))
        found["version"] = {key: get("/version", key) for key in ("version", "parent", "sizes", "promoted")}
        click = {"user_id": "user-7", "item_id": "item-3", "timestamp": "2025-02-01T00:00:00Z", "event_id": "one"}
        client.post("/events", json={"events": [click]})
        found["after a click"] = _served_items(get("/recommend/user-7?k=8&exclude_seen=false"))
    return found


def _served_items(items: Any) -> Any:
    """A list of [item, score, whether it is a fallback], or the HTTP status if there is no list."""
    if isinstance(items, int):
        return items
    return [[entry["item_id"], entry["score"], entry.get("fallback") is not None] for entry in items]
