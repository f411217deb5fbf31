"""The server answers only under its own names, so that pages of other sites cannot read or change anything."""

from pathlib import Path
from typing import Any

import pytest
from serving import TOKEN, server, stored
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from freshrec.cli.server import describe_limits, make_config
from freshrec.errors import OptionError
from freshrec.server.connections import ConnectionLimits
from freshrec.server.hosts import host_name, is_local, make_allowed_hosts
from freshrec.server.metrics import ServerMetrics
from freshrec.server.middleware import RequestMiddleware, ServerLimits

# (address to listen on, --allowed-hosts, Host, whether it is allowed)
HOSTS = [
    # By default, only names that mean this machine on this machine.
    *[
        ("127.0.0.1", "", host, True)
        for host in (
            "localhost", "localhost:8000", "LOCALHOST:8000", "localhost.", "localhost.:80", "127.0.0.1", "127.0.0.1:80",
            "[::1]", "[::1]:8000", "[0:0:0:0:0:0:0:1]:8000", "app.localhost:8000", " localhost ",
        )
    ],
    *[
        ("127.0.0.1", "", host, False)
        for host in (
            "evil.example", "evil.example:8000", "localhost.evil.example", "evil-localhost", "127.0.0.1.evil.example",
            "10.0.0.5", "0.0.0.0", "[::2]", "::1", "", ":8000", "localhost:port", "localhost:8000:8000", "a@localhost",
            "localhost/", "[::1", "::1]", "[evil]", "http://localhost", "localhost, evil.example", "localhost..",
            "2130706433", "lоcalhost",
        )
    ],
    # The address of --host.
    ("10.0.0.5", "", "10.0.0.5:8000", True),
    ("10.0.0.5", "", "10.0.0.6", False),
    ("Shop.example", "", "shop.example", True),
    ("fd00::5", "", "[FD00:0::5]:8000", True),
    ("::1", "", "[::1]", True),
    # A server that listens everywhere: all addresses, and the name of the machine. Another site has a name.
    ("0.0.0.0", "", "10.0.0.5", True),
    ("0.0.0.0", "", "[fd00::5]:8000", True),
    ("0.0.0.0", "", "machine:8000", True),
    ("0.0.0.0", "", "evil.example", False),
    ("0.0.0.0", "", "10.0.0.5.evil.example", False),
    ("::", "", "10.0.0.5", True),
    ("::", "", "evil.example", False),
    # --allowed-hosts adds names.
    ("127.0.0.1", "shop.example.com", "shop.example.com:443", True),
    ("127.0.0.1", "Shop.Example.com.", "SHOP.example.com.", True),
    ("127.0.0.1", "shop.example.com", "a.shop.example.com", False),
    ("127.0.0.1", "shop.example.com", "localhost", True),
    ("127.0.0.1", "a.example, b.example", "b.example", True),
    ("127.0.0.1", "*.example.com", "a.b.example.com", True),
    ("127.0.0.1", "*.example.com", "example.com", False),
    ("127.0.0.1", "*.example.com", "evilexample.com", False),
    ("127.0.0.1", "10.0.0.5,[fd00::5]", "[fd00:0::5]", True),
    ("127.0.0.1", "*", "evil.example", True),
    ("127.0.0.1", "*", "", True),
]  # fmt: skip


@pytest.mark.parametrize(("listen", "words", "host", "is_allowed"), HOSTS)
def test_a_host_is_allowed_if_it_names_this_server(
    listen: str, words: str, host: str, is_allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "Machine")
    assert make_allowed_hosts(listen, words).allows(host) == is_allowed


ORIGINS = {
    "http://localhost:8000": True,
    "HTTP://LOCALHOST:8000": True,
    "https://shop.example.com": True,
    "http://[::1]:8000": True,
    "null": False,
    "": False,
    "http://evil.example": False,
    "https://shop.example.com.evil.example": False,
    "chrome-extension://localhost": False,
    "file://": False,
    "localhost": False,
    "http://localhost http://evil.example": False,
}


@pytest.mark.parametrize("origin", ORIGINS)
def test_an_origin_is_allowed_if_it_is_a_page_of_this_server(origin: str) -> None:
    assert make_allowed_hosts("127.0.0.1", "shop.example.com").allows_origin(origin) == ORIGINS[origin]
    assert make_allowed_hosts("127.0.0.1", "*").allows_origin(origin)


@pytest.mark.parametrize("word", ["http://shop.example", "shop.example:8000", "a b", "*.", "a.*.example", "/", "ä"])
def test_a_word_that_is_no_name_is_refused_with_an_example(word: str) -> None:
    with pytest.raises(OptionError, match="Write names without http:// and without a port"):
        make_allowed_hosts("127.0.0.1", word)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    stored(folder, "popularity")
    return folder


REQUESTS: list[tuple[dict[str, str], int, str]] = [  # (headers, status, what the answer says)
    ({"host": "localhost:8000"}, 200, ""),
    ({"host": "127.0.0.1", "origin": "http://127.0.0.1:8000"}, 200, ""),
    ({"host": "evil.example:8000"}, 421, "--allowed-hosts"),
    ({"host": "evil.example:8000", "origin": "http://evil.example:8000"}, 421, "--allowed-hosts"),
    ({"host": "localhost", "origin": "http://evil.example"}, 403, "--allowed-hosts"),
    ({"host": "localhost", "origin": "null"}, 403, "--allowed-hosts"),
]


@pytest.mark.parametrize("token", ["", TOKEN])
def test_pages_of_other_sites_get_no_answer_with_or_without_a_token(shop: Path, token: str) -> None:
    rules = ServerLimits(token, max_requests_per_s=0, allowed_hosts=make_allowed_hosts("127.0.0.1"))
    routes = [("GET", "/"), ("GET", "/recommend/user-1"), ("GET", "/users/user-1/interests"), ("GET", "/health/live")]
    with server(shop, rules) as (client, _):
        for headers, status, sentence in REQUESTS:
            for method, path in routes:
                given = headers | ({"authorization": f"Bearer {token}"} if token else {})
                found = client.request(method, path, headers=given)
                assert found.status_code == status and sentence in found.text, (path, headers, found.text)
                assert found.headers["cache-control"] == "no-store"
        click = {"events": [{"user_id": "user-1", "item_id": "item-1"}]}
        for headers, status, _ in REQUESTS[2:]:
            given = headers | ({"authorization": f"Bearer {token}"} if token else {})
            assert client.post("/events", json=click, headers=given).status_code == status
        documented = client.get("/openapi.json", headers={"host": "localhost"}).json()
        assert {"403", "421"} <= documented["paths"]["/events"]["post"]["responses"].keys()


def test_a_request_without_a_host_is_older_than_browsers() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    guard = RequestMiddleware(app, ServerLimits(allowed_hosts=make_allowed_hosts("127.0.0.1")), ServerMetrics())

    async def without_host(scope: Any, receive: Any, send: Any) -> None:
        await guard(scope | {"headers": []}, receive, send)

    assert TestClient(without_host).get("/").status_code == 200
    assert TestClient(guard).get("/").status_code == 421  # its host is "testserver"


def test_a_websocket_is_closed_before_anything_is_asked() -> None:
    guard = RequestMiddleware(None, ServerLimits(TOKEN), ServerMetrics())  # type: ignore[arg-type]
    with pytest.raises(WebSocketDisconnect), TestClient(guard).websocket_connect("/events"):
        pass


@pytest.mark.parametrize(
    ("host", "has_token", "warns"),
    [
        ("127.0.0.1", False, False),
        ("localhost", False, False),
        ("::1", False, False),
        ("0.0.0.0", False, True),
        ("10.0.0.5", False, True),
        ("::", False, True),
        ("0.0.0.0", True, False),
    ],
)
def test_a_server_says_at_start_under_which_names_it_answers(host: str, has_token: bool, warns: bool) -> None:
    said: list[str] = []
    hosts = make_allowed_hosts(host)
    describe_limits(ConnectionLimits(), hosts, not has_token and not is_local(host), said.append)
    assert "localhost" in said[0] and "--allowed-hosts" in said[0]
    assert ("all IP addresses" in said[0]) == (host in ("0.0.0.0", "::"))
    assert any("--token-file" in line for line in said) == warns


def test_the_headers_of_proxies_are_ignored_unless_one_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    config = make_config(None, "127.0.0.1", 0, ConnectionLimits())
    assert not config.proxy_headers and config.forwarded_allow_ips == []
    assert host_name("LOCALHOST.:80") == "localhost"
