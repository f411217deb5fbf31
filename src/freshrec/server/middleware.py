"""Check host, token, rate and size of requests before they are answered, and measure latency. No id is kept."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from freshrec.config import Count, CountOrZero, check_options
from freshrec.server.clients import MAX_TRACKED_CLIENTS, ClientRates, client_key
from freshrec.server.hosts import AllowedHosts, header_values
from freshrec.server.metrics import ServerMetrics

# Paths that need no token
PUBLIC_PATHS = ("/", "/page.css", "/page.js", "/docs", "/openapi.json", "/health/live", "/health/ready")
FAILURES_PER_S, FAILURES_AT_ONCE = 1.0, 20.0  # requests without the right token, of one client
CONTENT_SECURITY_POLICY = (
    b"default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
RETRY_AFTER = [(b"retry-after", b"1")]
HOSTS_HINT = "If the name is yours, start the server with `--allowed-hosts NAME`."
SECURITY_HEADERS = [
    (b"content-security-policy", CONTENT_SECURITY_POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]

Refusal = tuple[int, str, list[tuple[bytes, bytes]]]  # status, sentence and headers


@dataclass(frozen=True)
class ServerLimits:
    """Limits of a server."""

    token: str = ""  # Token that every request needs; "" = none.
    max_body_bytes: Count = 1 << 20  # Maximum size of a request body, in bytes.
    max_requests_per_s: CountOrZero = 500  # Maximum number of requests per second and client; 0 = no limit.
    max_concurrent: Count = (
        64  # Maximum number of requests that are answered, and of bodies that are received, at a time.
    )
    max_bodies_per_client: Count = 32  # Maximum number of bodies that are received from one client at a time.
    body_timeout_s: Count = 10  # Maximum time for a request body to arrive, in seconds.
    allowed_hosts: AllowedHosts | None = None  # Names under which clients reach the server; None = all names.

    def __post_init__(self) -> None:
        check_options(self)


@dataclass
class RequestMiddleware:
    """An ASGI application that wraps another one."""

    app: ASGIApp
    limits: ServerLimits
    metrics: ServerMetrics
    n_active: int = 0  # requests being answered
    n_receiving: int = 0  # bodies being received; counted apart, so slow clients do not block requests without a body
    receiving: Counter[str] = field(default_factory=Counter)  # bodies being received, by client
    authorized_clients: dict[str, None] = field(default_factory=dict)  # clients that have sent the token

    def __post_init__(self) -> None:
        rate = self.limits.max_requests_per_s
        self.rates, self.failures = ClientRates(rate, rate), ClientRates(FAILURES_PER_S, FAILURES_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or the start or stop of the server."""
        if scope["type"] == "websocket":  # there are no routes for it
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started_s, status = time.perf_counter(), 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *SECURITY_HEADERS]}
            await send(message)

        try:
            await self._handle(scope, receive, send_with_headers)
        finally:
            route = scope.get("route")
            name = "none" if route is None else route.path
            self.metrics.request_seconds.labels(name, str(status)).observe(time.perf_counter() - started_s)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the limits, then pass the request on."""
        client = client_key(scope["client"][0]) if scope.get("client") else ""
        health = scope["path"].startswith("/health/")
        if not health and self.limits.max_requests_per_s and not self.rates.take(client):
            rate = self.limits.max_requests_per_s
            sentence = f"The limit is {rate} requests per second and client. Send fewer."
            await send_detail(send, 429, sentence, RETRY_AFTER)
            return
        if refusal := self._wrong_host(scope) or self._wrong_token(scope, client):
            await send_detail(send, *refusal)
            return
        if has_body(scope):
            body = await self._receive_body(receive, send, client)
            if body is None:
                return
            receive = replay_body(body, receive)
        if not health and self.n_active >= self.limits.max_concurrent:
            await send_detail(send, 429, "Too many requests are being answered. Try again.", RETRY_AFTER)
            return
        try:
            self.n_active += 1
            await self.app(scope, receive, send)
        finally:
            self.n_active -= 1

    async def _receive_body(self, receive: Receive, send: Send, client: str) -> bytes | None:
        """Receive the body of a request. If that fails, send an error and return None."""
        limits = self.limits
        of_client = self.receiving[client] if client else 0
        if self.n_receiving >= limits.max_concurrent or of_client >= limits.max_bodies_per_client:
            await send_detail(send, 429, "Too many request bodies are being received. Try again.", RETRY_AFTER)
            return None
        try:
            self.n_receiving += 1
            self.receiving[client] += 1
            async with asyncio.timeout(limits.body_timeout_s):
                body = await read_body(receive, limits.max_body_bytes)
        except TimeoutError:
            seconds = limits.body_timeout_s
            await send_detail(send, 408, f"The request body did not arrive within {seconds} s. Send it again.")
            return None
        finally:
            self.n_receiving -= 1
            self.receiving[client] -= 1
            if not self.receiving[client]:
                del self.receiving[client]
        if body is None:
            await send_detail(send, 413, f"The request body exceeds {limits.max_body_bytes:,} bytes. Split it.")
        return body

    def _wrong_host(self, scope: Scope) -> Refusal | None:
        """Return the refusal of a request that a page of another site may have sent.

        A request without `Host` is older than HTTP/1.1, so it comes from no browser.
        """
        allowed = self.limits.allowed_hosts
        if allowed is None:
            return None
        if not all(map(allowed.allows, header_values(scope["headers"], b"host"))):
            return 421, "This server does not answer under the name in the header `Host`. " + HOSTS_HINT, []
        if not all(map(allowed.allows_origin, header_values(scope["headers"], b"origin"))):
            return 403, "The header `Origin` names another site, or none. " + HOSTS_HINT, []
        return None

    def _wrong_token(self, scope: Scope, client: str) -> Refusal | None:
        """Return the refusal of a request without the token that it needs. The comparison takes constant time.

        A client that sends many such requests must wait, and its token is not compared meanwhile. An address from which
        the token has come before is exempt, because a proxy or a network may share it with others.
        """
        if not self.limits.token or scope["path"] in PUBLIC_PATHS:
            return None
        must_wait = not self.failures.has_tokens(client)
        is_known = client in self.authorized_clients
        if (is_known or not must_wait) and has_token(scope, self.limits.token):
            if not is_known and len(self.authorized_clients) < MAX_TRACKED_CLIENTS:
                self.authorized_clients[client] = None
            return None
        if must_wait:
            return 429, "Too many requests without the right token came from this address. Wait.", RETRY_AFTER
        self.failures.take(client)
        headers = [(b"www-authenticate", b"Bearer")]
        return 401, "This server requires a token. Send the header `Authorization: Bearer TOKEN`.", headers


def has_body(scope: Scope) -> bool:
    """Whether the headers of a request announce a body."""
    headers = dict(scope["headers"])
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"


def has_token(scope: Scope, token: str) -> bool:
    """Whether a request sends this token."""
    header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    scheme, _, given_token = header.partition(b" ")
    return bool(token) and scheme.lower() == b"bearer" and hmac.compare_digest(given_token.strip(), token.encode())


async def read_body(receive: Receive, max_bytes: int) -> bytes | None:
    """Return the body of a request; None if it is too large. Raises TimeoutError if the client disconnects."""
    parts, size = [], 0
    while True:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            return None
        parts.append(part)
        if message["type"] == "http.disconnect":
            raise TimeoutError
        if not message.get("more_body", False):
            return b"".join(parts)


def replay_body(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` function that yields a body again, after it was read."""
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Any:
        return unread.pop() if unread else await receive()

    return receive_again


async def send_detail(send: Send, status: int, sentence: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    """Send an error with a sentence in `detail`."""
    body = json.dumps({"detail": sentence}).encode()
    all_headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *(headers or []),
    ]
    await send({"type": "http.response.start", "status": status, "headers": all_headers})
    await send({"type": "http.response.body", "body": body})
