"""A short soak test with real processes: lists, clicks, erasures, promotions, rollbacks, kill -9 and restarts."""

import json
import random
import threading
import time
from collections import Counter
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import polars as pl
import pytest
from serving import ANY, TOKEN, process, run, stored

from freshrec.recommender.bundle import read_bundle
from freshrec.recommender.ids import resolve_request
from freshrec.recommender.list_request import ListRequest
from freshrec.recommender.lists import top_items
from freshrec.store.event_log import EventLog
from freshrec.store.versions import open_store

NOON = 1_790_000_000
ROUNDS, SECONDS = 2, 4.0  # number of kills, and lifetime of each server
QUIET = [f"user-{n}" for n in range(1, 15)]  # users who never click: their lists are known for each version
BUSY = [f"user-{n}" for n in range(20, 60)]
ERASED = [f"user-{n}" for n in range(70, 76)]


class Crowd:
    """Clients of the current server."""

    def __init__(self, expected: dict[tuple[int, str], list[str]]) -> None:
        self.expected, self.url = expected, ""
        self.over, self.statuses = threading.Event(), Counter[str]()
        self.taken: dict[str, tuple[str, str]] = {}  # acknowledged clicks by their event_id
        self.mixed: list[Any] = []

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        place = urlsplit(self.url)
        connection = HTTPConnection(place.hostname or "", place.port, timeout=300)
        try:
            text = None if body is None else json.dumps(body)
            headers = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
            connection.request(method, path, text, headers)
            answer = connection.getresponse()
            found = answer.status, json.loads(answer.read())
            self.statuses[str(answer.status)] += 1
            return found
        except (OSError, HTTPException) as why:
            self.statuses[type(why).__name__] += 1
            return 0, None
        finally:
            connection.close()

    def look(self, seed: int) -> None:
        source = random.Random(seed)
        while not self.over.is_set():
            user = source.choice(QUIET)
            status, found = self.ask("GET", f"/recommend/{user}?k=12")
            if status == 200:
                listed = [item["item_id"] for item in found["items"]]
                if self.expected[found["version"], user] != listed:
                    self.mixed.append((user, found))

    def click(self, seed: int) -> None:
        source, n = random.Random(seed), 0
        while not self.over.is_set():
            n += 1
            event = {
                "user_id": source.choice(BUSY), "item_id": f"item-{source.randrange(40)}", "event_id": f"{seed}-{n}",
                "timestamp": NOON + n,
            }  # fmt: skip
            status, found = self.ask("POST", "/events", {"events": [event]})
            if status == 200 and found["accepted"]:
                self.taken[event["event_id"]] = (event["user_id"], event["item_id"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_answer_mixes_versions_and_no_acknowledged_click_is_lost_or_doubled(tmp_path: Path) -> None:
    stored(tmp_path, "comirec-dr:d=8", "imsr:fit.base_epochs=1:fit.epochs=1", n=3)
    (tmp_path / "token").write_text(TOKEN)
    store = open_store(tmp_path / "s")
    expected = {}
    for number in (1, 2, 3):
        served = read_bundle(store.verified_files(number)).served
        for user in QUIET:
            found = top_items(served, served.users.rows(pl.Series([user])), resolve_request(served, ListRequest(k=12)))
            ids = served.items.frame["id"].gather(found["item"] - 1)
            expected[number, user] = ids.to_list()
    crowd = Crowd(expected)
    threads = [threading.Thread(target=crowd.look, args=(n,)) for n in range(2)]
    threads += [threading.Thread(target=crowd.click, args=(n,)) for n in range(2)]
    source, gone = random.Random(0), list(ERASED)
    for nth in range(ROUNDS):
        with process(tmp_path, "--token-file", str(tmp_path / "token"), "--rate", "0") as (url, running):
            crowd.url = url
            if nth == 0:
                for thread in threads:
                    thread.start()
            until = time.monotonic() + SECONDS
            while time.monotonic() < until:
                number = source.choice([1, 2, 3])
                with store.locked(30):
                    store.move_pointer(number, "promote", "soak")
                time.sleep(0.7)
                if len(gone) > len(ERASED) * (ROUNDS - 1 - nth) / ROUNDS:
                    status, found = crowd.ask("DELETE", f"/users/{gone.pop()}")
                    assert status == 200, found
            running.kill()
            running.wait()
    crowd.over.set()
    for thread in threads:
        thread.join()
    assert crowd.mixed == []
    allowed = {"200", "409", "ConnectionRefusedError", "ConnectionResetError", "RemoteDisconnected", "IncompleteRead",
               "BadStatusLine"}  # fmt: skip
    assert set(crowd.statuses) <= allowed and crowd.statuses["200"] > 50, crowd.statuses
    store.move_pointer(3, "promote")
    assert run("update", tmp_path, *ANY) == 0
    log = EventLog(tmp_path / "s" / "log").read()
    clicks = log.filter(pl.col("event_id").is_not_null())
    assert clicks["event_id"].is_unique().all()
    learnt = {row["event_id"]: (row["user_id"], row["item_id"]) for row in clicks.iter_rows(named=True)}
    lost = {event: click for event, click in crowd.taken.items() if learnt.get(event) != click}
    assert lost == {} and len(crowd.taken) > 20
    unacknowledged = learnt.keys() - crowd.taken.keys()  # written, but the server was killed before it answered
    assert len(unacknowledged) <= 2 * ROUNDS
    assert not set(ERASED[len(gone) :]) & set(log["user_id"])
    said = (tmp_path / "serve.log").read_text()
    assert "user-" not in said and "item-" not in said and TOKEN not in said
