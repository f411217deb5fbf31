"""Connections, with real sockets: clients that wait, are slow or break off keep nobody out, and no click gets lost."""

from __future__ import annotations

import errno
import json
import re
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from serving import TOKEN, listening, stored

from freshrec.cli.server import listening_socket, make_config
from freshrec.errors import OptionError
from freshrec.server import connections
from freshrec.server.app import create_app
from freshrec.server.clients import MAX_TRACKED_CLIENTS, ClientRates, client_key, parse_proxies
from freshrec.server.connections import Acceptor, ConnectionLimits, RareLog, limit_to_descriptors, make_server
from freshrec.server.live_version import LiveVersion
from freshrec.server.metrics import ServerMetrics
from freshrec.server.middleware import FAILURES_AT_ONCE, RequestMiddleware, ServerLimits
from freshrec.server.service import Service
from freshrec.store.click_journal import read_journal
from freshrec.store.versions import open_store

LIVE = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
LIMITS = ConnectionLimits(header_timeout_s=0.3, write_timeout_s=0.3)


@dataclass
class Running:
    """A server in a thread of this process."""

    port: int
    acceptor: Acceptor
    metrics: ServerMetrics
    said: list[str] = field(default_factory=list)  # lines of its log
    opened: list[socket.socket] = field(default_factory=list)  # connections, which are closed at the end

    def connect(self, address: str = "127.0.0.1", data: bytes = b"") -> socket.socket:
        """Connect from an address of this machine, and send these bytes."""
        opened = socket.create_connection(("127.0.0.1", self.port), 5, (address, 0))
        self.opened.append(opened)
        opened.sendall(data)
        return opened

    def n_closed(self, reason: str) -> float:
        return self.metrics.registry.get_sample_value("freshrec_closed_connections_total", {"reason": reason}) or 0


@contextmanager
def running(app: Any, limits: ConnectionLimits = LIMITS, metrics: ServerMetrics | None = None) -> Iterator[Running]:
    """Run a server of an ASGI application."""
    metrics = metrics or ServerMetrics()
    config = make_config(app, "127.0.0.1", 0, limits)
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch, listening_socket(config) as opened:
        patch.setattr(connections, "SWEEP_INTERVAL_S", 0.05)
        found = Running(opened.getsockname()[1], None, metrics, said)  # type: ignore[arg-type]
        server, found.acceptor = make_server(config, opened, limits, metrics, said.append)
        thread = threading.Thread(target=connections.run_server, args=(server, found.acceptor))
        thread.start()
        try:
            yield found
        finally:
            server.should_exit = True
            thread.join(15)
            assert not thread.is_alive()
            for each in found.opened:
                each.close()


@contextmanager
def store_server(
    folder: Path,
    limits: ConnectionLimits = LIMITS,
    rules: ServerLimits = ServerLimits(max_requests_per_s=0),  # noqa: B008
) -> Iterator[Running]:
    """Run a server of a store."""
    live = LiveVersion(open_store(folder / "s"), lambda line: None)
    live.start()
    service = Service(live, rules, lambda user: {})
    with running(create_app(service), limits, service.metrics) as found:
        yield found


async def tiny(scope: Any, receive: Any, send: Any) -> None:
    """Answer every request with its path; "/big" with 8 MB."""
    if scope["type"] == "lifespan":
        for kind in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{kind}.complete"})
        return
    body = scope["path"].encode() if scope["path"] != "/big" else b"x" * (8 << 20)
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def guarded(**rules: Any) -> RequestMiddleware:
    """The tiny application behind the checks of a real one."""
    return RequestMiddleware(tiny, ServerLimits(**{"max_requests_per_s": 0} | rules), ServerMetrics())


def rest(opened: socket.socket) -> bytes:
    """Return everything until the server closes the connection."""
    received = b""
    try:
        while part := opened.recv(1 << 16):
            received += part
    except ConnectionResetError:
        pass
    return received


def answer(opened: socket.socket) -> tuple[int, bytes]:
    """Return the status and the body of the next response. Its length must be given."""
    received = b""
    while b"\r\n\r\n" not in received:
        part = opened.recv(1)
        assert part, received
        received += part
    size = int(re.findall(rb"content-length: (\d+)", received)[0])
    body = b""
    while len(body) < size:
        body += opened.recv(size - len(body))
    return int(received.split()[1]), body


def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_open(opened: socket.socket) -> bool:
    opened.setblocking(False)
    try:
        return opened.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False
    finally:
        opened.settimeout(5)


def click_request(user: str, *, length: int | None = None) -> bytes:
    body = json.dumps({"events": [{"user_id": user, "item_id": "item-1"}]}).encode()
    head = f"POST /events HTTP/1.1\r\nHost: localhost\r\ncontent-length: {length or len(body)}\r\n"
    return head.encode() + b"content-type: application/json\r\n\r\n" + body


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a store with one version."""
    folder = tmp_path_factory.mktemp("shop")
    stored(folder, "popularity")
    return folder


@pytest.mark.parametrize(("files", "n_idle"), [("", 1500), ("ulimit -n 64;", 200)])
def test_idle_connections_neither_delay_the_answers_of_a_server_nor_fill_its_log(
    shop: Path, files: str, n_idle: int
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < n_idle + 200:
        if hard != resource.RLIM_INFINITY and hard < n_idle + 200:
            pytest.skip("The system allows too few open files.")
        resource.setrlimit(resource.RLIMIT_NOFILE, (n_idle + 200, hard))
    run = f"{files} exec {sys.executable} -m freshrec serve --store {shop / 's'} --port 0"
    log, latencies = shop / f"{n_idle}.log", []
    with listening(["bash", "-c", run], log) as (url, _), ExitStack() as opened:
        port = int(url.rpartition(":")[2])

        def ask(method: str, path: str, body: str | None = None) -> bytes:
            client = HTTPConnection("127.0.0.1", port, timeout=5)
            client.request(method, path, body, {"content-type": "application/json"})
            found = client.getresponse()
            received = found.read()
            assert found.status == 200, received
            client.close()
            return received

        ask("GET", "/recommend/user-1")  # the first request is slower
        n_bytes = log.stat().st_size
        for nth in range(n_idle):
            opened.enter_context(socket.create_connection(("127.0.0.1", port), 5))
            if nth % 25 == 0:
                asked_s = time.perf_counter()
                ask("GET", "/health/live")
                latencies.append(time.perf_counter() - asked_s)
        click = json.dumps({"events": [{"user_id": "u", "item_id": "item-1"}]})
        assert json.loads(ask("POST", "/events", click))["events"][0]["folded"]
        assert b"items" in ask("GET", "/recommend/user-1")
        ask("GET", "/users/user-1/interests")
    # Another process may delay a few answers. Before, each took a minute or failed.
    assert sorted(latencies)[len(latencies) * 9 // 10] < 0.1 and max(latencies) < 1
    text = log.read_bytes()[n_bytes:].decode()
    assert len(text) < 500 and "Traceback" not in text and "limit" in text


def test_one_client_does_not_keep_another_one_out() -> None:
    with running(tiny, ConnectionLimits(max_connections=30, max_per_client=20)) as found:
        idle = [found.connect() for _ in range(60)]
        assert answer(found.connect("127.0.0.2", LIVE))[0] == 200
        until(lambda: found.n_closed("client limit") == 40)  # the oldest ones
        assert not is_open(idle[0]) and is_open(idle[-1])
        others = [found.connect(f"127.0.0.{nth}") for nth in range(3, 23)]  # more clients than connections
        assert answer(found.connect("127.0.0.2", LIVE))[0] == 200
        assert found.n_closed("limit") >= 10 and is_open(others[-1])
        assert answer(found.connect(data=LIVE))[0] == 200  # the first client too
        assert found.said[0] == "A client reached its limit of 20 connections." and len(found.said) == 2


def test_when_all_connections_of_a_client_are_busy_it_is_refused_with_a_sentence_and_others_are_served() -> None:
    body = b"POST /x HTTP/1.1\r\nHost: localhost\r\ncontent-length: 2\r\n\r\n1"
    with running(guarded(), ConnectionLimits(max_connections=30, max_per_client=5)) as found:
        busy = [found.connect(data=body) for _ in range(5)]
        until(lambda: len(found.acceptor.table.kept) == 5)
        refused = rest(found.connect())
        assert refused.startswith(b"HTTP/1.1 503 ") and b"too many connections" in refused
        assert answer(found.connect("127.0.0.2", LIVE))[0] == 200
        for opened in busy:  # none was cut
            opened.sendall(b"2")
            assert answer(opened) == (200, b"/x")
        until(lambda: answer(found.connect(data=LIVE))[0] == 200)
        assert found.n_closed("refused") == 1


def test_a_connection_that_was_used_outlives_those_that_were_not_and_no_request_is_cut() -> None:
    with running(guarded(), ConnectionLimits(max_connections=20, max_per_client=20)) as found:
        good = found.connect(data=LIVE)
        assert answer(good)[0] == 200
        started = found.connect(data=b"POST /x HTTP/1.1\r\nHost: localhost\r\ncontent-length: 2\r\n\r\n1")
        until(lambda: len(found.acceptor.table.kept) == 2)
        for _ in range(3):
            idle = [found.connect() for _ in range(40)]
            until(lambda: len(found.acceptor.table) == 20)
            good.sendall(LIVE)
            assert answer(good)[0] == 200
            for opened in idle:
                opened.close()
        started.sendall(b"2")
        assert answer(started) == (200, b"/x")


def test_trusted_proxies_have_no_limit_of_their_own() -> None:
    limits = ConnectionLimits(max_connections=30, max_per_client=5, trusted_proxies=parse_proxies("127.0.0.9"))
    with running(tiny, limits) as found:
        from_proxy = [found.connect("127.0.0.9", LIVE) for _ in range(20)]
        assert [answer(opened)[0] for opened in from_proxy] == [200] * 20 and found.n_closed("client limit") == 0


SLOW: dict[str, bytes] = {
    "nothing": b"",
    "a header without an end": b"GET /health/live HTTP/1.1\r\nHost: ",
    "the next header, after an answer": LIVE + b"GET /",
    "a body after its answer": b"POST /x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n",
}


@pytest.mark.parametrize("start", SLOW)
def test_a_client_that_sends_a_byte_now_and_then_is_closed_after_the_timeout(start: str) -> None:
    with running(tiny) as found:
        opened, started_s = found.connect(data=SLOW[start]), time.monotonic()
        more = iter(b"x" * 1000 if "body" not in start else b"1\r\na\r\n" * 200)
        try:
            while time.monotonic() < started_s + 5:
                if start != "nothing":
                    opened.sendall(bytes([next(more)]))
                opened.settimeout(0.05)
                try:
                    if not opened.recv(1 << 16):
                        break
                except TimeoutError:
                    pass
        except (ConnectionResetError, BrokenPipeError):
            pass
        assert 0.2 < time.monotonic() - started_s < 3  # the timeout is 0.3 s
        until(lambda: found.n_closed("header timeout") == 1 and len(found.acceptor.table) == 0)


def test_a_slow_body_is_refused_in_time_and_its_click_is_not_stored(shop: Path) -> None:
    rules = ServerLimits(max_requests_per_s=0, body_timeout_s=1)
    with store_server(shop, rules=rules) as found:
        opened = found.connect(data=click_request("slow", length=500))
        for _ in range(30):  # a byte now and then keeps no connection open
            try:
                opened.sendall(b" ")
            except OSError:
                break
            time.sleep(0.05)
        received = rest(opened)
        assert received.startswith(b"HTTP/1.1 408 ") and b"did not arrive within 1 s" in received
        until(lambda: len(found.acceptor.table) == 0)
    assert not any(click.user_id == "slow" for file in read_journal(shop / "s") for click in file.clicks)


def test_one_client_receives_only_a_part_of_the_places_for_bodies() -> None:
    body = b"POST /x HTTP/1.1\r\nHost: localhost\r\ncontent-length: 2\r\n\r\n1"
    app = guarded(max_concurrent=4, max_bodies_per_client=2)
    with running(app) as found:
        slow = [found.connect(data=body) for _ in range(2)]
        until(lambda: app.n_receiving == 2)
        assert answer(found.connect(data=body))[0] == 429
        other = found.connect("127.0.0.2", body)
        other.sendall(b"2")
        assert answer(other) == (200, b"/x")
        for opened in slow:
            opened.sendall(b"2")
            assert answer(opened)[0] == 200
        assert answer(found.connect(data=body + b"2"))[0] == 200 and not app.receiving


def test_a_client_that_does_not_read_its_answer_is_closed() -> None:
    with running(tiny) as found:
        opened = found.connect(data=b"GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3)
        until(lambda: found.n_closed("write timeout") == 1 and len(found.acceptor.table) == 0)
        assert len(rest(opened)) < 3 * (8 << 20)


def test_a_client_that_reads_slowly_gets_its_whole_answer() -> None:
    with running(tiny, replace(LIMITS, header_timeout_s=5, write_timeout_s=5)) as found:
        opened = found.connect(data=b"GET /big HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        time.sleep(0.3)  # several sweeps
        assert len(rest(opened)) > 8 << 20


HALF_CLOSED: list[tuple[bytes, int]] = [  # what is sent before the client closes its side, and the number of answers
    (b"", 0),
    (b"GET /he", 0),
    (LIVE, 1),
    (LIVE * 3, 3),
    (b"GET /health/live HTTP/1.0\r\n\r\n", 1),
    (click_request("half"), 1),
    (click_request("half") + LIVE, 2),
    (click_request("half", length=500), 0),  # the rest of the body never comes
]


def test_a_half_closed_connection_gets_its_answers_and_is_closed(shop: Path) -> None:
    with store_server(shop, ConnectionLimits(header_timeout_s=30, write_timeout_s=30)) as found:
        for sent, n_answers in HALF_CLOSED:
            opened = found.connect(data=sent)
            opened.shutdown(socket.SHUT_WR)
            assert rest(opened).count(b" 200 OK\r\n") == n_answers, sent
            until(lambda: len(found.acceptor.table) == 0)


def test_pipelined_requests_are_answered_in_their_order() -> None:
    paths = [f"/{nth}" for nth in range(50)]
    requests = "".join(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n" for path in paths)
    with running(guarded()) as found:
        opened = found.connect(data=requests.encode())
        assert [answer(opened)[1].decode() for _ in paths] == paths


def test_odd_requests_get_an_answer_and_no_line_in_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    upgrade = LIVE[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n"
    with running(guarded(token=TOKEN)) as found:
        assert answer(found.connect(data=upgrade))[0] == 200  # as without the upgrade
        assert answer(found.connect(data=upgrade.replace(b"/health/live", b"/events")))[0] == 401
        old = found.connect(data=b"GET /health/live HTTP/1.0\r\n\r\n")
        assert answer(old)[0] == 200 and rest(old) == b""
        huge = found.connect(data=b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 70_000)
        assert rest(huge).startswith(b"HTTP/1.1 400 ")
        two_hosts, no_host = LIVE[:-2] + b"Host: b\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"
        for wrong in (b"\x16\x03\x01\x02\x00\x01\x00", b"HELLO\r\n\r\n", no_host, two_hosts):
            assert rest(found.connect(data=wrong)).startswith(b"HTTP/1.1 400 "), wrong
        assert answer(found.connect(data=LIVE))[0] == 200 and found.said == []
    assert capfd.readouterr() == ("", "")


def test_a_click_is_acknowledged_or_the_client_sees_an_error(shop: Path) -> None:
    """12 clients send clicks beside a flood of idle connections, and some break off."""
    acknowledged: list[str] = []
    with store_server(shop, ConnectionLimits(max_connections=30, max_per_client=20)) as found:
        stop = threading.Event()

        def flood() -> None:
            opened = []
            while not stop.is_set():
                opened.append(found.connect("127.0.0.2"))

        def send(client: int) -> None:
            for nth in range(20):
                user = f"c{client}-{nth}"
                opened = found.connect()
                try:
                    opened.sendall(click_request(user))
                    if nth % 5 == 0:
                        opened.close()  # without waiting
                    elif answer(opened)[0] == 200:
                        acknowledged.append(user)
                except (AssertionError, OSError):
                    pass

        threads = [threading.Thread(target=send, args=(client,)) for client in range(12)]
        flooding = threading.Thread(target=flood)
        flooding.start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stop.set()
        flooding.join()
    users = [str(click.user_id) for file in read_journal(shop / "s") for click in file.clicks]
    stored_users = [user for user in users if user.startswith("c")]
    assert set(acknowledged) <= set(stored_users) and len(stored_users) == len(set(stored_users))
    assert len(acknowledged) >= 150  # of 12 x 16; the flood cuts few, because it has fewer places than the clients


def test_a_request_is_completed_when_the_server_stops_and_idle_connections_do_not_delay_it() -> None:
    with running(guarded()) as found:
        idle, started = found.connect(), found.connect(data=click_request("a", length=100))
        until(lambda: len(found.acceptor.table.kept) == 1)
        later = threading.Timer(0.3, lambda: started.sendall(b" " * 100))
        later.start()
        received: list[bytes] = []
        reading = threading.Thread(target=lambda: received.extend([rest(started), rest(idle)]))
        reading.start()
        stopped_s = time.monotonic()
    reading.join()
    assert received[0].startswith(b"HTTP/1.1 200 ") and received[1] == b"" and time.monotonic() - stopped_s < 5


def test_without_descriptors_accepting_pauses_with_one_line_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    n_failed = 0
    accept = socket.socket.accept

    def fail(listener: socket.socket) -> Any:
        nonlocal n_failed
        if n_failed < 3:
            n_failed += 1
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(listener)

    monkeypatch.setattr(connections, "ACCEPT_PAUSE_S", 0.02)
    monkeypatch.setattr(socket.socket, "accept", fail)
    with running(tiny) as found:
        assert answer(found.connect(data=LIVE))[0] == 200
        assert found.said == ["A connection could not be accepted: Too many open files."] and n_failed == 3


def test_a_problem_has_one_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], list[str]()
    monkeypatch.setattr(connections.time, "monotonic", lambda: now[0])
    log = RareLog(said.append)
    for now[0] in range(130):
        log.write("a", "A.")
    log.write("b", "B.")
    assert said == ["A.", *["A. This happened 59 more times since the last line."] * 2, "B."]


@pytest.mark.parametrize(
    ("soft", "hard", "expected", "soft_after"),
    [
        (1 << 20, 1 << 20, 1000, 1 << 20),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 1000, resource.RLIM_INFINITY),
        (256, 1 << 20, 1000, 20 + 64 + 1000),  # raised to what is needed: 20 are open, and 64 are for files
        (256, 256, 256 - 20 - 64, 256),
        (64, 64, 22, 64),  # 44 are free; half of them are for files
        (10, 10, 1, 10),
    ],
)
def test_there_are_as_many_connections_as_descriptors_allow(
    soft: int, hard: int, expected: int, soft_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limit[0])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limit.__setitem__(0, new))
    monkeypatch.setattr(Path, "iterdir", lambda self: iter([self] * 20))
    assert limit_to_descriptors(ConnectionLimits()) == expected and limit == [(soft_after, hard)]


# Who is counted as one client.
KEYS = {
    "10.0.0.5": "10.0.0.5",
    "::ffff:10.0.0.5": "10.0.0.5",  # the same client at a socket of IPv6
    "2001:db8:1:2::1": "2001:db8:1:2::/64",
    "2001:db8:1:2:ffff::9": "2001:db8:1:2::/64",
    "2001:db8:1:3::1": "2001:db8:1:3::/64",
    "fe80::1%eth0": "fe80::/64",
    "testclient": "testclient",
}


@pytest.mark.parametrize("address", KEYS)
def test_a_client_is_an_ipv4_address_or_a_network_of_ipv6(address: str) -> None:
    assert client_key(address) == KEYS[address]


def test_rates_of_many_clients_need_bounded_memory() -> None:
    rates = ClientRates(1, 1)
    for nth in range(MAX_TRACKED_CLIENTS + 5):
        assert rates.take(str(nth))
    assert len(rates.buckets) == MAX_TRACKED_CLIENTS and not rates.take(str(nth))


@pytest.mark.parametrize("words", ["*", "localhost", "10.0.0.5:80", "10.0.0.0/33"])
def test_a_trusted_proxy_is_an_address(words: str) -> None:
    with pytest.raises(OptionError, match="Write addresses or networks"):
        parse_proxies(words)


@pytest.mark.parametrize(("proxies", "n_limited"), [("", 15), ("127.0.0.1", 0), ("127.0.0.0/8", 0), ("10.0.0.1", 15)])
def test_only_a_trusted_proxy_says_who_the_client_is(proxies: str, n_limited: int) -> None:
    """20 requests with 20 clients in X-Forwarded-For. The rate is 5, so 15 of one client are too many."""
    limits = replace(LIMITS, trusted_proxies=parse_proxies(proxies))
    with running(guarded(max_requests_per_s=5), limits) as found:
        requests = (f"GET /x HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: 10.1.1.{i}\r\n\r\n" for i in range(20))
        opened = found.connect(data="".join(requests).encode())
        statuses = [answer(opened)[0] for _ in range(20)]
    assert statuses.count(429) in range(n_limited - 3, n_limited + 1) and set(statuses) <= {200, 429}


def test_an_address_without_the_token_must_wait_and_others_need_not() -> None:
    wrong = b"GET /x HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer wrong\r\n\r\n"
    right = wrong.replace(b"wrong", TOKEN.encode())
    n = int(FAILURES_AT_ONCE)
    with running(guarded(token=TOKEN)) as found:
        good, bad = found.connect(data=right), found.connect("127.0.0.2", wrong * n + wrong)
        assert answer(good)[0] == 200
        assert [answer(bad)[0] for _ in range(n + 1)] == [401] * n + [429]
        bad.sendall(right)
        assert answer(bad)[0] == 429  # not compared, so that guessing is slow
        bad.sendall(LIVE)
        assert answer(bad)[0] == 200  # needs no token
        # The first address has sent the token before. Others who share it cannot lock it out.
        good.sendall(wrong * n + wrong + right)
        assert [answer(good)[0] for _ in range(n + 2)] == [401] * n + [429, 200]
