"""What tests/test_gold.py records of a store: four nights, one of them refused, and the lists that it then serves."""

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
    """A fit, an ordinary day, a day that one user made alone, which the gate refuses, and two ordinary days.

    `trains`: the model learns by gradients, so that scores move with the last bits of the processor's sums.
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
            for about in job.catch_up():
                verdicts[str(about.id)], numbers[str(about.id)] = _verdict(about, job), _numbers(about)
        lists = {"python": _python(Path(folder), five), "http": _http(Path(folder))}
        hashes = {f"version {n}": _hash(job.store, int(n)) for n in verdicts}
        measured = {"numbers": numbers} | lists
        if trains:
            return Record({"verdicts": verdicts}, measured, hashes)
        return Record({"verdicts": verdicts} | measured, {}, hashes)


def _verdict(about: Manifest, job: NightlyJob) -> dict[str, Any]:
    """Whether the gate let a version go live, which one is live then, and the facts of the day."""
    verdict = {"promoted": about.promoted, "reasons": len(about.reasons), "live": job.store.live}
    numbers = {"parent": about.parent, "batch": about.batch, "held": about.held, "spans_seen": about.spans_seen}
    day = {name: value for name, value in about.data["day"].items() if value is not None}
    return verdict | numbers | {"sizes": about.sizes, "day": day}


def _numbers(about: Manifest) -> dict[str, Any]:
    """What was measured, but for times."""
    return {name: value for name, value in about.numbers.items() if not name.endswith("_s")} | {
        "notes": len(about.notes)
    }


def _hash(store: Store, number: int) -> str:
    """Of all that a version holds: models, histories, ids, events that wait, queries for the nights to come."""
    kept = read_bundle(store.verified_files(number))
    served = kept.served
    ids = (served.users.frame, served.items.frame, served.categories)
    return state_hash(served.state, served.counts, served.pending, ids, kept.holdout_queries)


def _python(folder: Path, next_day: pl.DataFrame) -> dict[str, Any]:
    """What the Python class answers."""
    loved = Recommender.load(folder / "s")
    some = ["item-3", "item-12", "item-20", "item-31", "item-47", "no-item"]
    ways: dict[str, Any] = {
        "plain": loved.recommend(USERS, 8),
        "with what they had": loved.recommend(USERS, 8, exclude_seen=False),
        "allowed": loved.recommend(USERS, 4, exclude_seen=False, allow=some),
        "denied": loved.recommend(USERS, 4, deny=some),
        "of a category": loved.recommend(USERS, 4, exclude_seen=False, category="1"),
        "diverse": loved.recommend(USERS, 6, diversity=0.05),
    }
    found: dict[str, Any] = {name: _lists(frame) for name, frame in ways.items()}
    first = {user: rows[0][0] for user, rows in found["plain"].items()}
    found["explained"] = {user: _reasons(loved.explain(user, first[user])) for user in USERS[:3]}
    evaluated = loved.evaluate(next_day).iter_rows(named=True)
    found["evaluated"] = {row["metric"]: [row["value"], row["n"], row["n_users"]] for row in evaluated}
    try:
        similar = loved.similar_items(some[:3], 4)
        found["similar"] = {item: _pairs(similar.filter(item_id=item), "similar_id") for item in some[:3]}
    except IncompatibleError:
        found["similar"] = "none"
    return found


def _lists(frame: pl.DataFrame) -> dict[str, Any]:
    """user -> item, score, and whether the model did not choose it."""
    return {
        user: [[row["item_id"], row["score"], row["fallback"] is not None] for row in rows.iter_rows(named=True)]
        for (user,), rows in frame.group_by("user_id", maintain_order=True)
    }


def _pairs(frame: pl.DataFrame, name: str) -> list[list[Any]]:
    return [list(row) for row in frame.select(name, "score").iter_rows()]


def _reasons(frame: pl.DataFrame) -> list[list[Any]]:
    return [list(row) for row in frame.select("place", "points", "because").iter_rows()]


def _http(folder: Path) -> dict[str, Any]:
    """What the server answers; at the end a click comes in."""
    ways = {
        "plain": "k=8",
        "with what they had": "k=8&exclude_seen=false",
        "allowed": "k=4&exclude_seen=false&allow=item-3&allow=item-12&allow=item-20",
        "denied": "k=4&deny=item-3&deny=item-12",
        "of a category": "k=4&exclude_seen=false&category=1",
        "diverse": "k=6&diversity=0.05",
    }
    with server(folder) as (client, _):

        def ask(path: str, key: str = "items") -> Any:
            answer = client.get(path)
            return answer.json()[key] if answer.status_code == 200 else answer.status_code

        def listed(query: str) -> dict[str, Any]:
            return {user: _answered(ask(f"/recommend/{user}?{query}")) for user in USERS}

        found: dict[str, Any] = {name: listed(query) for name, query in ways.items()}
        both = client.post("/recommend", json={"users": USERS, "k": 3}).json()
        found["together"] = {one["user_id"]: _answered(one["items"]) for one in both["lists"]}
        found["similar"] = _answered(ask("/similar/item-3?k=4"))
        item = found["plain"]["user-7"][0][0]
        why = ask(f"/explain/user-7/{item}", "reasons")
        found["explained"] = [[one["place"], one["points"], one["because"]] for one in why]
        cards = ask("/users/user-7/interests", "interests")
        found["interests"] = [_answered(card["items"]) for card in cards]
        found["came since the version before"] = _answered(ask("/users/user-7/changes", "came"))
        found["version"] = {key: ask("/version", key) for key in ("version", "parent", "sizes", "promoted")}
        click = {"user_id": "user-7", "item_id": "item-3", "timestamp": "2025-02-01T00:00:00Z", "event_id": "one"}
        client.post("/events", json={"events": [click]})
        found["after a click"] = _answered(ask("/recommend/user-7?k=8&exclude_seen=false"))
    return found


def _answered(items: Any) -> Any:
    """Items and scores; the status where there is no list."""
    if isinstance(items, int):
        return items
    return [[one["item_id"], one["score"], one.get("fallback") is not None] for one in items]
