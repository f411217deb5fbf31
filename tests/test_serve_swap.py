"""The hot swap: within two seconds, complete, and tested first. A broken version is never served."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from serving import ANY, TOKEN, click, items, run, server, stored
from starlette.testclient import TestClient

from freshrec.errors import StateError
from freshrec.server import handlers
from freshrec.server import live_version as live_module
from freshrec.server.handlers import LoadedVersion
from freshrec.server.live_version import LiveVersion
from freshrec.server.middleware import ServerLimits
from freshrec.store.versions import open_store


def slower() -> float:
    """How many times slower this process runs because of others; 1 on an idle machine."""
    wall, cpu = time.monotonic(), time.thread_time()
    while time.thread_time() - cpu < 0.02:
        pass
    return max(1.0, (time.monotonic() - wall) / 0.02)


def comes(client: TestClient, version: int, within_s: float = 2.0) -> None:
    """Wait until a version answers, longer on an overloaded machine."""
    since, factor = time.monotonic(), slower()
    while client.get("/version").json()["version"] != version:
        factor = max(factor, slower())
        assert time.monotonic() - since < within_s * factor, "not seen in time"
        time.sleep(0.02)


def test_promote_and_rollback_in_another_process_are_seen_within_two_seconds(tmp_path: Path) -> None:
    stored(tmp_path, n=3)
    with server(tmp_path) as (client, _):
        lists = {3: items(client.get("/recommend/user-1"))}
        for words, version in ((["rollback"], 2), (["rollback", "1"], 1), (["promote", "3"], 3)):
            command = [sys.executable, "-m", "freshrec", *words, "--store", str(tmp_path / "s")]
            assert subprocess.run(command, capture_output=True).returncode == 0
            comes(client, version)
            answer = client.get("/recommend/user-1").json()
            assert answer["version"] == version
            found = [one["item_id"] for one in answer["items"]]
            assert lists.setdefault(version, found) == found
        assert lists[1] != lists[3]


def test_a_broken_version_is_never_served_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(tmp_path, "sasrec:d=8", "finetune:fit.base_epochs=1:fit.epochs=1", n=2)
    store = open_store(tmp_path / "s")
    with server(tmp_path) as (client, live):
        path = store.verified_files(1)["served.safetensors"]
        whole = path.read_bytes()
        store.move_pointer(1, "rollback")  # undamaged at that time
        path.write_bytes(whole[:-1] + b"x")
        live.refresh()
        assert client.get("/version").json()["version"] == 2
        ready = client.get("/health/ready").json()
        assert ready["version"] == 2 and "damaged" in ready["trouble"]
        assert "freshrec_version_refused 1.0" in client.get("/metrics").text
        path.write_bytes(whole)
        store.move_pointer(2, "promote")
        live.refresh()
        assert client.get("/health/ready").json()["trouble"] == ""

        def broken(path: Path) -> object:  # the checksum is right, but the model is wrong, for example diverged
            tree = load(path)
            tree[2].model.items.weights[3] = torch.nan
            return tree

        load = live_module.load_for_serving
        monkeypatch.setattr(live_module, "load_for_serving", broken)
        store.move_pointer(1, "rollback")
        live.refresh()
        assert client.get("/version").json()["version"] == 2
        assert "not finite" in client.get("/health/ready").json()["trouble"]


def test_a_version_that_cannot_be_served_is_tried_again_and_a_damaged_journal_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "RETRY_INTERVAL_S", 0.0)
    monkeypatch.setattr(live_module, "POLL_INTERVAL_S", 3600.0)  # this test refreshes by itself
    stored(tmp_path, n=2)
    store = open_store(tmp_path / "s")
    with server(tmp_path) as (client, live):
        for n in range(3):
            click(client, "user-1", f"item-{n}", event_id=f"e{n}")
        [journal] = (tmp_path / "s" / "clicks").iterdir()
        whole = journal.read_bytes()
        journal.write_bytes(whole.replace(b'"e1"', b'"e9"'))
        store.move_pointer(1, "rollback")
        live.refresh()
        ready = client.get("/health/ready").json()
        assert ready["version"] == 2 and "is damaged" in ready["trouble"]
        assert click(client, "user-1", "item-1", event_id="e1")["known"]  # nothing was forgotten
        path = store.verified_files(1)["served.safetensors"]
        good = path.read_bytes()
        path.write_bytes(good[:-1] + b"x")
        journal.write_bytes(whole)
        live.refresh()
        assert "damaged" in client.get("/health/ready").json()["trouble"]
        path.write_bytes(good)  # fixed; the pointer has not moved
        live.refresh()
        assert client.get("/health/ready").json() == {"status": "ready", "version": 1, "trouble": ""}
        assert click(client, "user-1", "item-1", event_id="e1")["known"]


def test_ids_and_model_of_two_versions_are_not_served_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(tmp_path, n=3)
    store = open_store(tmp_path / "s")
    files = {**store.verified_files(3), "items.parquet": store.verified_files(1)["items.parquet"]}
    monkeypatch.setattr(type(store), "verified_files", lambda self, number: files)
    live = LiveVersion(store, print)
    with pytest.raises(StateError, match="belong to different versions"):
        live.start()


def test_requests_in_flight_finish_on_the_version_they_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(tmp_path, n=2)
    began, go_on = threading.Event(), threading.Event()
    ask = handlers.recommend

    def slow(version: LoadedVersion, *rest: object) -> object:
        began.set()
        assert go_on.wait(20)
        return ask(version, *rest)  # type: ignore[arg-type]

    with server(tmp_path) as (client, live):
        wanted = {"users": ["user-1", "user-2"]}
        before = client.post("/recommend", json=wanted).json()
        monkeypatch.setattr(handlers, "recommend", slow)
        found: list[object] = []
        asking = threading.Thread(target=lambda: found.append(client.post("/recommend", json=wanted).json()))
        asking.start()
        assert began.wait(20)
        live.store.move_pointer(1, "rollback")
        live.refresh()
        assert client.get("/version").json()["version"] == 1
        go_on.set()
        asking.join()
        assert found == [before] and before["version"] == 2
        assert client.get("/recommend/user-1").json()["version"] == 1


def test_clicks_outlive_a_swap_and_a_restart(tmp_path: Path) -> None:
    stored(tmp_path, n=2)
    with server(tmp_path) as (client, live):
        answer = client.post("/events", json={"events": [{"user_id": "neu", "item_id": "item-1"}]}).json()
        assert answer["version"] == 2
        live.store.move_pointer(1, "rollback")
        live.refresh()
        assert client.get("/recommend/neu").json()["fallback"] is None
    with server(tmp_path) as (client, _):
        found = client.get("/users/neu/interests").json()
        assert found["n_events"] == 1 and found["version"] == 1


def test_rolling_back_over_http_needs_the_token_and_an_earlier_version(tmp_path: Path) -> None:
    stored(tmp_path, n=2)
    assert run("update", tmp_path, *ANY) == 0
    with server(tmp_path, ServerLimits(TOKEN, max_requests_per_s=0)) as (client, _):
        assert client.post("/rollback", json={"version": 1}).status_code == 401
        client.headers["authorization"] = f"Bearer {TOKEN}"
        assert "not earlier" in client.post("/rollback", json={"version": 2}).json()["detail"]
        assert client.post("/rollback", json={"version": 1, "reason": "a test"}).json() == {"version": 1, "was": 2}
        told = client.get("/versions").json()
        assert told["moves"][0]["reason"] == "a test" and told["version"] == 1


def test_a_server_does_not_start_if_the_live_version_cannot_be_served(tmp_path: Path) -> None:
    stored(tmp_path)
    store = open_store(tmp_path / "s")
    store.verified_files(1)["served.safetensors"].write_bytes(b"damaged")
    with pytest.raises(StateError, match="Version 1 cannot be served: .*damaged"):
        LiveVersion(store, print).start()
