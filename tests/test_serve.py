"""Serving: lists equal those of a replay, every answer names its version, and a wrong request gets a sentence."""

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from serving import TOKEN, click, items, server, stored
from starlette.testclient import TestClient

from freshrec.cli.server import listening_socket, read_token
from freshrec.errors import OptionError
from freshrec.nightly.inspection import user_profile as inspect_user
from freshrec.recommender.bundle import read_bundle
from freshrec.recommender.log_reading import encode_events
from freshrec.replay.measure import QueryOptions, SpanBlock, make_queries, rank_queries
from freshrec.server.metrics import ServerMetrics
from freshrec.server.middleware import RequestMiddleware, ServerLimits
from freshrec.store.versions import open_store
from freshrec.types import TRAIN

FAST = "finetune:fit.base_epochs=1:fit.epochs=1"
IMSR = "imsr:fit.base_epochs=1:fit.epochs=1"
WAYS = [
    ("popularity", None), ("item-knn", None), ("blend", None), ("sasrec:d=8", FAST), ("mf:d=8", FAST),
    ("comirec-dr:d=8", IMSR),
]  # fmt: skip


@pytest.mark.parametrize(("model", "strategy"), WAYS)
def test_a_served_list_equals_the_list_of_a_replay_with_the_same_state_and_history(
    model: str, strategy: str | None, tmp_path: Path
) -> None:
    # The replay ranks each event of the next day, with all events before it in the history. The server gets each event
    # as a click after its list was requested. A target's rank is 1 + the items ahead + half of those level with it.
    _, day, _ = stored(tmp_path, model, strategy)
    store = open_store(tmp_path / "s")
    served = read_bundle(store.verified_files(store.live)).served
    events = encode_events(served, day.rename({"timestamp": "time"})).events
    which = (events.items_E <= served.state.model.n_items).nonzero()[:50, 0]
    block, state = (
        SpanBlock(events[which], 0, int(events.users_E.max()), served.state.model.n_items),
        served.current_state,
    )
    queries = make_queries(state.histories, block, state.model.spec.length, QueryOptions(TRAIN))
    ranks = dict(zip(queries.events_N.tolist(), rank_queries(state, queries).tolist()))
    assert len(ranks) > 25
    with server(tmp_path) as (client, _):
        for nth, row in enumerate(day[which.tolist()].iter_rows(named=True)):
            if nth in ranks:
                answer = client.get(f"/recommend/{row['user_id']}", params={"k": 100, "exclude_seen": False}).json()
                scores = {one["item_id"]: one["score"] for one in answer["items"] if one["fallback"] is None}
                mine = scores.get(row["item_id"])
                if mine is None:
                    assert ranks[nth] > len(scores)
                else:
                    ahead = sum(score > mine for score in scores.values())
                    level = sum(score == mine for score in scores.values()) - 1
                    assert ranks[nth] == 1 + ahead + level / 2
            click(client, row["user_id"], row["item_id"], timestamp=row["timestamp"] // 1000)


def test_every_answer_names_its_version_and_a_fallback_its_reason(tmp_path: Path) -> None:
    stored(tmp_path, "comirec-dr:d=8", IMSR, n=2)
    with server(tmp_path) as (client, _):
        for path in (
            "/recommend/user-1", "/similar/item-1", "/users/user-1/interests", "/explain/user-1/item-1", "/version",
            "/versions", "/health/ready", "/users/user-1/changes",
        ):  # fmt: skip
            answer = client.get(path)
            assert answer.status_code == 200 and answer.json()["version"] == 2, (path, answer.text)
        found = client.post("/recommend", json={"users": ["user-1", "nobody"], "k": 4}).json()
        assert found["version"] == 2 and [one["fallback"] for one in found["lists"]] == [None, "unknown user"]
        stranger = client.get("/recommend/nobody?k=4").json()
        assert [one["fallback"] for one in stranger["items"]] == ["unknown user"] * 4
        assert stranger["items"] == found["lists"][1]["items"]
        told = client.get("/metrics").text
        assert 'freshrec_fallbacks_total{reason="unknown user"} 2.0' in told and "freshrec_version 2.0" in told
        assert 'freshrec_request_seconds_count{route="/version",status="200"} 1.0' in told
        assert "freshrec_index_recall 1.0" in told and "process_resident_memory_bytes" in told


def test_filters_exclude_and_allow_items(tmp_path: Path) -> None:
    stored(tmp_path, "popularity")
    with server(tmp_path) as (client, _):
        every = items(client.get("/recommend/user-1?k=100&exclude_seen=false"))
        unseen = items(client.get("/recommend/user-1?k=100"))
        seen = {one["item_id"] for one in client.get("/users/user-1/interests").json()["events"]}
        assert seen and set(every) - set(unseen) == seen
        assert items(client.get(f"/recommend/user-1?allow={unseen[0]}&allow={unseen[3]}&allow=none")) == [
            unseen[0], unseen[3],
        ]  # fmt: skip
        assert items(client.get(f"/recommend/user-1?k=2&deny={unseen[0]}&deny={unseen[2]}")) == [unseen[1], unseen[3]]
        third = [item for item in unseen if int(item.removeprefix("item-")) % 3 == 0]
        assert sorted(items(client.get("/recommend/user-1?k=100&category=0"))) == sorted(
            third
        )  # some have the same score
        mixed = items(client.get("/recommend/user-1?k=3&diversity=1000000"))
        assert len({int(item.removeprefix("item-")) % 3 for item in mixed}) == 3  # one of each category


def test_a_profile_has_interests_and_their_events(tmp_path: Path) -> None:
    for model, strategy, kind in (
        ("comirec-dr:d=8", IMSR, "interests"), ("blend", None, "items of the user's list"),
        ("popularity", None, "this model"),
    ):  # fmt: skip
        folder = tmp_path / kind.split()[0]
        folder.mkdir()
        base, *_ = stored(folder, model, strategy)
        with server(folder) as (client, _):
            found = client.get("/users/user-1/interests").json()
            own = base.filter(base["user_id"] == "user-1")["item_id"].to_list()
            assert [one["item_id"] for one in found["events"]] == own[-30:] and found["n_events"] == len(own)
            assert found["kind"].startswith(kind)
            behind = {event["item_id"] for one in found["interests"] for event in one["events"]}
            assert behind <= set(own) and bool(behind) == (kind != "this model")
            if kind == "interests":
                assert behind == set(own)  # each event belongs to its closest interest
                assert {one["born_span"] for one in found["interests"]} == {0}


@pytest.mark.parametrize(("model", "strategy"), [("comirec-dr:d=8", IMSR), ("blend", None), ("popularity", None)])
def test_inspect_shows_the_same_profile_as_the_server(model: str, strategy: str | None, tmp_path: Path) -> None:
    stored(tmp_path, model, strategy)
    store = open_store(tmp_path / "s")
    inspected = inspect_user(read_bundle(store.verified_files(store.live)), "user-1")
    with server(tmp_path) as (client, _):
        found = client.get("/users/user-1/interests").json()
    for name in ("user_id", "n_events", "first_span", "last_span", "kind"):
        assert inspected[name] == found[name]
    assert inspected["events"] == found["events"][-20:]  # inspect shows 20, the server 30
    names = ("title", "born_span", "used_span", "events")
    expected = [
        {name: one[name] for name in names} | {"items": [item["item_id"] for item in one["items"]]}
        for one in found["interests"]
    ]
    assert inspected["interests"] == expected and bool(expected) == (model != "popularity")


def test_an_explanation_names_past_items_of_the_user(tmp_path: Path) -> None:
    stored(tmp_path, "item-knn")
    with server(tmp_path) as (client, _):
        best = items(client.get("/recommend/user-1"))[0]
        found = client.get(f"/explain/user-1/{best}").json()
        assert found["offered"]
        own = {one["item_id"] for one in client.get("/users/user-1/interests").json()["events"]}
        because = {one["because"] for one in found["reasons"]} - {None}
        assert because and because <= own


WRONG: list[tuple[str, str, Any, int, str]] = [
    ("GET", "/recommend/user-1?k=0", None, 422, "greater than or equal to 1"),
    ("GET", "/recommend/user-1?k=501", None, 422, "less than or equal to 500"),
    ("GET", "/recommend/user-1?category=none", None, 404, "No item has this category"),
    ("GET", "/recommend/user-1?diversity=nan", None, 422, "diversity"),
    ("GET", "/recommend/" + "u" * 1001, None, 422, "at most 1000"),
    ("GET", "/similar/item-none", None, 404, "No event has this item_id"),
    ("GET", "/users/nobody/interests", None, 404, "no events"),
    ("GET", "/explain/nobody/item-1", None, 404, "no events"),
    ("GET", "/nothing", None, 404, "Not Found"),
    ("POST", "/recommend", {"users": []}, 422, "at least 1"),
    ("POST", "/recommend", {"users": ["u"] * 257}, 422, "at most 256"),
    ("POST", "/recommend", {"users": ["u"], "kk": 3}, 422, "kk"),
    ("POST", "/events", {"events": [{"user_id": "a"}]}, 422, "item_id"),
    ("POST", "/events", {"events": [{"user_id": True, "item_id": "b"}]}, 422, "valid integer or text"),
    ("POST", "/events", {"events": [{"user_id": " ", "item_id": "b"}]}, 422, "must not be blank"),
    ("POST", "/events", {"events": [{"user_id": "a", "item_id": "b\u0085"}]}, 422, "control characters"),
    ("POST", "/events", {"events": [{"user_id": "a", "item_id": "\u00e9" * 501}]}, 422, "longer than 1,000 bytes"),
    ("POST", "/events", {"events": [{"user_id": "a", "item_id": "b", "category": "\u2003"}]}, 422, "must not be blank"),
    ("POST", "/events", {"events": [{"user_id": "a\n", "item_id": "b"}]}, 422, "control characters"),
    (
        "POST",
        "/events",
        {"events": [{"user_id": "a", "item_id": "b", "timestamp": "2999-01-01"}]},
        422,
        "in the future",
    ),
    ("POST", "/recommend", {"users": [5.0]}, 422, "valid integer or text"),
    ("POST", "/events", {"events": [{"user_id": "a", "item_id": "b"}] * 1001}, 422, "at most 1000"),
    ("DELETE", "/users/user-1", None, 403, "token"),
    ("POST", "/rollback", {"version": 1}, 403, "token"),
]


@pytest.fixture(scope="module")
def one_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    stored(folder)
    return folder


@pytest.fixture(scope="module")
def reader(one_store: Path) -> Iterator[TestClient]:
    """A client of one server, for tests that change nothing."""
    with server(one_store) as (client, _):
        yield client


@pytest.mark.parametrize(("method", "path", "body", "status", "said"), WRONG)
def test_a_wrong_request_gets_a_status_and_a_sentence(
    method: str, path: str, body: Any, status: int, said: str, reader: TestClient
) -> None:
    answer = reader.request(method, path, json=body)
    assert answer.status_code == status and said in answer.json()["detail"], answer.text


def test_size_and_rate_of_requests_are_limited(one_store: Path) -> None:
    with server(one_store, ServerLimits(max_requests_per_s=5, max_body_bytes=300)) as (client, _):
        large = client.post("/recommend", json={"users": ["user-with-a-long-name"] * 20})
        assert large.status_code == 413 and "300 bytes" in large.json()["detail"]
        assert client.post("/recommend", content=iter([b"x" * 200] * 3)).status_code == 413  # without a length
        found = [client.get("/version").status_code for _ in range(10)]
        assert 429 in found and found[0] == 200
        assert client.get("/health/live").status_code == 200


def test_slow_bodies_do_not_delay_requests_without_a_body() -> None:
    told: list[tuple[str, int]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ask(guard: RequestMiddleware, method: str, arrives: asyncio.Event) -> None:
        async def receive() -> Any:
            await arrives.wait()
            return {"type": "http.request", "body": b"{}", "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                told.append((method, message["status"]))

        headers = [] if method == "GET" else [(b"content-length", b"2")]
        await guard({"type": "http", "path": "/recommend", "method": method, "headers": headers}, receive, send)

    async def all_of_them() -> None:
        guard, never, now = (
            RequestMiddleware(app, ServerLimits(max_concurrent=2), ServerMetrics()),
            asyncio.Event(),
            asyncio.Event(),
        )
        now.set()
        slow = [asyncio.create_task(ask(guard, "POST", never)) for _ in range(3)]
        await asyncio.sleep(0)
        for _ in range(5):
            await ask(guard, "GET", now)
        never.set()
        await asyncio.gather(*slow)
        assert guard.n_receiving == guard.n_active == 0

    asyncio.run(all_of_them())
    assert told == [("POST", 429), *[("GET", 200)] * 5, ("POST", 200), ("POST", 200)]


def test_a_server_with_a_token_requires_it(one_store: Path) -> None:
    with server(one_store, ServerLimits(TOKEN)) as (client, _):
        answer = client.get("/recommend/user-1")
        assert answer.status_code == 401 and "token" in answer.json()["detail"]
        for wrong in ("", "Bearer ", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN):
            assert client.get("/recommend/user-1", headers={"authorization": wrong}).status_code == 401
        for right in (f"Bearer {TOKEN}", f"bearer {TOKEN}"):
            assert client.get("/recommend/user-1", headers={"authorization": right}).status_code == 200
        assert [client.get(path).status_code for path in ("/health/ready", "/", "/metrics")] == [200, 200, 401]


def test_a_token_is_read_from_a_file_and_must_be_valid(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(f" {TOKEN}\n")
    assert read_token(path) == TOKEN and read_token(None) == ""
    for wrong in ("short", "a token\nin two lines of text", "ä" * 20):
        path.write_text(wrong)
        with pytest.raises(OptionError, match="is not valid"):
            read_token(path)
    with pytest.raises(OptionError, match="cannot be read"):
        read_token(tmp_path / "none")


def test_pages_load_nothing_from_other_servers(reader: TestClient) -> None:
    page = reader.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    for path in ("/", "/docs", "/page.css", "/page.js"):
        text = reader.get(path).text
        assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text, path


def test_a_serving_process_imports_no_training_code(one_store: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from freshrec.cli import app;"
        "from freshrec.server.app import create_app;"
        "from freshrec.server.live_version import LiveVersion; from freshrec.store.versions import open_store;"
        f"live = LiveVersion(open_store(Path({str(one_store / 's')!r})), print); live.start(); live.stop();"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    above = ("freshrec.learn", "freshrec.strategies", "freshrec.nightly", "freshrec.replay.cell", "deltalake")
    assert "freshrec.server.live_version" in loaded and not [name for name in loaded if name.startswith(above)]


def test_a_server_accepts_connections_before_it_logs_its_address() -> None:
    async def no_app(scope: Any, receive: Any, send: Any) -> None: ...

    # `serve` prints the address when it has this socket, and runs the server after that
    with listening_socket(uvicorn.Config(no_app, "127.0.0.1", 0, log_level="critical")) as opened:
        socket.create_connection(opened.getsockname(), timeout=5).close()


def test_the_openapi_document_describes_every_route_parameter_response_and_field(reader: TestClient) -> None:
    document = reader.get("/openapi.json").json()
    for path in ("/recommend/{user}", "/events", "/similar/{item}", "/users/{user}", "/rollback", "/metrics"):
        assert path in document["paths"]
    for path, methods in document["paths"].items():
        for route in methods.values():
            assert route["summary"], path
            responses = [response["description"] for response in route["responses"].values()]
            parameters = [parameter["description"] for parameter in route.get("parameters", [])]
            for text in (route["description"], *responses, *parameters):
                assert text[0].isupper() and text.endswith("."), (path, text)
    for name, schema in document["components"]["schemas"].items():
        assert all(one["description"].endswith(".") for one in schema["properties"].values()), name
