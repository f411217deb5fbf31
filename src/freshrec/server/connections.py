"""Accept connections, and close those that only wait, so that no client keeps others out.

uvicorn answers the requests. This module decides which connections it gets:

- A client has a limited number of connections, and so has the server. Beyond a limit, the oldest idle one is closed.
- A request must be complete in time, and its response must be taken in time.
- If the system has no more file descriptors, an idle connection is closed, and accepting pauses.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from freshrec.config import Count, Positive, check_options
from freshrec.server.clients import Network, client_key, is_in_networks
from freshrec.server.metrics import ServerMetrics

SWEEP_INTERVAL_S = 1.0  # time between two searches for connections that are overdue
ACCEPT_PAUSE_S = 0.1  # time before the next attempt, if the system could not accept a connection
LOG_INTERVAL_S = 60.0  # time between two lines of the log about the same problem
RESERVED_DESCRIPTORS = 64  # for files of the store, while versions are loaded and clicks are written
REFUSAL_BODY = b'{"detail": "The server has too many connections. Try again in a second."}'
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(REFUSAL_BODY), REFUSAL_BODY)
)


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of connections."""

    max_connections: Count = 1000  # Maximum number of open connections.
    max_per_client: Count = 250  # Maximum number of open connections of one client; trusted proxies have no limit.
    header_timeout_s: Positive = 10.0  # Maximum time for the header of a request to arrive, in seconds.
    write_timeout_s: Positive = 60.0  # Maximum time for a client to take a response, in seconds.
    trusted_proxies: tuple[Network, ...] = ()  # Proxies in front of the server.

    def __post_init__(self) -> None:
        check_options(self)


class Connection(asyncio.Protocol):
    """A connection of a client. From the first byte on, uvicorn's `http` handles it."""

    def __init__(self, table: ConnectionTable, client: str, opened: socket.socket) -> None:
        self.table, self.client, self.socket = table, client, opened
        self.transport: asyncio.Transport | None = None
        self.http: H11Protocol | None = None
        self.header_since: float | None = time.monotonic()  # since when a request is awaited; None = during a request
        self.is_half_closed = False  # whether the client sends no more
        self.unsent_since: float | None = None  # since when the client has not taken all bytes of a response

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first request."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.table.add(self)

    def data_received(self, data: bytes) -> None:
        """Pass bytes to uvicorn, and note whether they complete the header of a request."""
        if self.http is None:
            assert self.transport is not None
            self.http = self.table.make_http()
            self.http.connection_made(self.transport)
        self.http.data_received(data)
        if self.is_busy:
            self.header_since = None
            self.table.keep(self)
        elif self.header_since is None:
            self.header_since = time.monotonic()

    def eof_received(self) -> bool:
        """Close the connection; if complete requests have arrived, after their responses."""
        if self.http is None or not self.is_busy or self.http.cycle.more_body:
            return False
        self.is_half_closed = True
        if not self.http.conn.trailing_data[0]:  # no other request follows
            self.http.cycle.keep_alive = False
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self.table.remove(self)
        if self.http is not None:
            self.http.connection_lost(exc)

    def pause_writing(self) -> None:
        """Make the response wait until the client has taken what was sent."""
        if self.http is not None:
            self.http.pause_writing()

    def resume_writing(self) -> None:
        """Continue the response."""
        if self.http is not None:
            self.http.resume_writing()

    @property
    def is_busy(self) -> bool:
        """Whether a request is being answered."""
        cycle = None if self.http is None else self.http.cycle
        return cycle is not None and not cycle.response_complete

    def is_idle(self, now: float, patience_s: float) -> bool:
        """Whether the connection may be closed without loss: nothing is being answered, sent or read."""
        if self.is_busy or (self.unsent_since is not None and now - self.unsent_since < patience_s):
            return False
        try:
            return not self.socket.recv(1, socket.MSG_PEEK)  # b"": the client has closed it
        except BlockingIOError:
            return True
        except OSError:
            return True

    def overdue(self, now: float, limits: ConnectionLimits) -> str:
        """Return why the connection must be closed: the timeout that it has passed, or its end. "" if it must not."""
        assert self.transport is not None
        if not self.transport.get_write_buffer_size():
            self.unsent_since = None
        elif self.unsent_since is None:
            self.unsent_since = now
        if now - (self.unsent_since or math.inf) > limits.write_timeout_s:
            return "write timeout"
        if self.is_half_closed and not self.is_busy and self.unsent_since is None:
            return "end"
        if not self.is_busy and now - (self.header_since or math.inf) > limits.header_timeout_s:
            return "header timeout"
        return ""

    def abort(self) -> None:
        """Close the connection at once."""
        self.table.remove(self)
        if self.transport is not None:
            self.transport.abort()


@dataclass
class ConnectionTable:
    """All open connections, and how many each client has."""

    limits: ConnectionLimits
    metrics: ServerMetrics
    log: RareLog
    make_http: Callable[[], H11Protocol]
    fresh: dict[Connection, None] = field(default_factory=dict)  # without a complete request so far, oldest first
    kept: dict[Connection, None] = field(default_factory=dict)  # the others, by the time of the last request
    per_client: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.fresh) + len(self.kept)

    def __iter__(self) -> Iterator[Connection]:
        return iter([*self.fresh, *self.kept])

    def add(self, connection: Connection) -> None:
        """Add a new connection."""
        self.fresh[connection] = None
        self.per_client[connection.client] += 1
        self.metrics.connections.set(len(self))

    def keep(self, connection: Connection) -> None:
        """Note that a request has arrived, so that connections without requests are closed before this one."""
        if connection in self.fresh or connection in self.kept:
            self.fresh.pop(connection, None)
            self.kept.pop(connection, None)
            self.kept[connection] = None

    def remove(self, connection: Connection) -> None:
        """Forget a connection, if it is in the table."""
        if connection in self.fresh or connection in self.kept:
            self.fresh.pop(connection, None)
            self.kept.pop(connection, None)
            self.per_client[connection.client] -= 1
            if not self.per_client[connection.client]:
                del self.per_client[connection.client]
            self.metrics.connections.set(len(self))

    def make_room(self, client: str, is_proxy: bool = False) -> bool:
        """Close an idle connection if a limit is reached. Returns False if there is none, so nobody can be let in."""
        limits = self.limits
        if not is_proxy and self.per_client[client] >= limits.max_per_client:
            self.log.write("client limit", f"A client reached its limit of {limits.max_per_client} connections.")
            if not self.close_idle("client limit", client):
                return False
        if len(self) >= limits.max_connections:
            self.log.write("limit", f"The limit of {limits.max_connections} connections was reached.")
            return self.close_idle("limit")
        return True

    def close_idle(self, reason: str, client: str | None = None) -> bool:
        """Close the connection that has been idle longest, of one client or of all. Returns False if none is idle."""
        now = time.monotonic()
        for connections in (self.fresh, self.kept):
            for connection in connections:
                if client in (None, connection.client) and connection.is_idle(now, self.limits.header_timeout_s):
                    self.close(connection, reason)
                    return True
        return False

    def close_overdue(self, now: float) -> None:
        """Close every connection whose client is too slow."""
        for connection in self:
            if reason := connection.overdue(now, self.limits):
                self.close(connection, reason)

    def close(self, connection: Connection, reason: str) -> None:
        """Close a connection and count it."""
        connection.abort()
        self.metrics.closed_connections.labels(reason).inc()


@dataclass
class RareLog:
    """A log in which each kind of problem has at most one line a minute."""

    log_line: Callable[[str], object]
    written_at: dict[str, float] = field(default_factory=dict)
    n_left_out: Counter[str] = field(default_factory=Counter)

    def write(self, kind: str, sentence: str) -> None:
        """Write a sentence, unless one of its kind was written in the last minute."""
        now = time.monotonic()
        if now - self.written_at.get(kind, -math.inf) < LOG_INTERVAL_S:
            self.n_left_out[kind] += 1
            return
        n_more = self.n_left_out.pop(kind, 0)
        self.written_at[kind] = now
        self.log_line(sentence + (f" This happened {n_more:,} more times since the last line." if n_more else ""))


@dataclass
class Acceptor:
    """Accepts the connections of a listening socket. It has the methods by which uvicorn stops a server."""

    listener: socket.socket
    table: ConnectionTable
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self) -> None:
        """Accept connections from now on."""
        self.listener.setblocking(False)
        self.tasks += [asyncio.create_task(self._accept_all()), asyncio.create_task(self._sweep())]

    def close(self) -> None:
        """Accept no more connections, and close those that have sent nothing. uvicorn closes the others."""
        for task in self.tasks:
            task.cancel()
        self.listener.close()
        for connection in list(self.table.fresh):
            connection.abort()

    async def wait_closed(self) -> None:
        """Wait until nothing is accepted."""
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _accept_all(self) -> None:
        loop, table = asyncio.get_running_loop(), self.table
        while True:
            try:
                opened, address = await loop.sock_accept(self.listener)
            except OSError as problem:
                table.log.write("accept", f"A connection could not be accepted: {problem.strerror}.")
                table.close_idle("no descriptor")
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            client = client_key(str(address[0]))
            if not table.make_room(client, is_in_networks(address[0], table.limits.trusted_proxies)):
                table.metrics.closed_connections.labels("refused").inc()
                refuse(opened)
                await asyncio.sleep(0)  # let other tasks run
                continue
            connection = Connection(table, client, opened)
            try:
                await loop.connect_accepted_socket(lambda new=connection: new, opened)  # type: ignore[misc]
            except OSError:  # the client is gone
                opened.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            self.table.close_overdue(time.monotonic())


def refuse(opened: socket.socket) -> None:
    """Answer a connection with status 503 and close it."""
    with contextlib.suppress(OSError):
        opened.send(REFUSAL)
    opened.close()


def make_server(
    config: uvicorn.Config,
    listener: socket.socket,
    limits: ConnectionLimits,
    metrics: ServerMetrics,
    log_line: Callable[[str], object],
) -> tuple[uvicorn.Server, Acceptor]:
    """Return a server, and what accepts its connections on a listening socket. `run_server` runs both."""
    server = uvicorn.Server(config)

    def make_http() -> H11Protocol:
        return H11Protocol(config, server.server_state, server.lifespan.state)

    return server, Acceptor(listener, ConnectionTable(limits, metrics, RareLog(log_line), make_http))


def run_server(server: uvicorn.Server, acceptor: Acceptor) -> None:
    """Answer requests until the process is stopped."""
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(_serve(server, acceptor))


async def _serve(server: uvicorn.Server, acceptor: Acceptor) -> None:
    """Run uvicorn without a socket of its own. It gets the connections that the acceptor lets in."""
    starting = asyncio.create_task(_start_accepting(server, acceptor))
    try:
        await server.serve(sockets=[])
    finally:
        starting.cancel()


async def _start_accepting(server: uvicorn.Server, acceptor: Acceptor) -> None:
    """Accept connections as soon as the server runs. If accepting ends with an error, stop the server."""
    while not server.started:
        await asyncio.sleep(0.01)
    acceptor.start()
    server.servers.append(acceptor)  # type: ignore[arg-type]
    await asyncio.wait(acceptor.tasks, return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True


def limit_to_descriptors(limits: ConnectionLimits) -> int:
    """Raise the soft limit of open files as needed, and return the number of connections that it allows."""
    n_open = len(list(Path("/dev/fd").iterdir()))
    needed = n_open + RESERVED_DESCRIPTORS + limits.max_connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
            soft = allowed
    if soft == resource.RLIM_INFINITY:
        return limits.max_connections
    free = max(2, soft - n_open)
    return min(limits.max_connections, free - min(RESERVED_DESCRIPTORS, free // 2))
