"""Check the token, rate, size and number of requests before they are answered, and measure latency. No id is kept."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from freshrec.config import Count, CountOrZero, check_options
from freshrec.server.metrics import ServerMetrics

# Paths that need no token
PUBLIC_PATHS = ("/", "/page.css", "/page.js", "/docs", "/openapi.json", "/health/live", "/health/ready")
MAX_TRACKED_CLIENTS = 10_000  # clients whose rate is tracked; the least recent ones are dropped first
CONTENT_SECURITY_POLICY = (
    b"default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
RETRY_AFTER = [(b"retry-after", b"1")]
SECURITY_HEADERS = [
    (b"content-security-policy", CONTENT_SECURITY_POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


@dataclass(frozen=True)
class ServerLimits:
    """Limits of a server."""

    token: str = ""  # Token that every request needs; "" = none.
    max_body_bytes: Count = 1 << 20  # Maximum size of a request body, in bytes.
    max_requests_per_s: CountOrZero = 500  # Maximum number of requests per second and client; 0 = no limit.
    max_concurrent: Count = (
        64  # Maximum number of requests that are answered, and of bodies that are received, at a time.
    )
    body_timeout_s: Count = 10  # Maximum time for a request body to arrive, in seconds.

    def __post_init__(self) -> None:
        check_options(self)


@dataclass
class TokenBucket:
    """Number of requests that a client may still make."""

    tokens: float  # requests left
    updated_at: float  # time of the last request, in seconds


@dataclass
class RequestMiddleware:
    """An ASGI application that wraps another one."""

    app: ASGIApp
    limits: ServerLimits
    metrics: ServerMetrics
    buckets: OrderedDict[str, TokenBucket] = field(default_factory=OrderedDict)
    n_active: int = 0  # requests being answered
    n_receiving: int = 0  # bodies being received; counted apart, so slow clients do not block requests without a body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or the start or stop of the server."""
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
        path = scope["path"]
        if not self._is_authorized(scope):
            headers = [(b"www-authenticate", b"Bearer")]
            await send_detail(
                send, 401, "This server requires a token. Send the header `Authorization: Bearer TOKEN`.", headers
            )
            return
        health = path.startswith("/health/")
        if not health and not self._is_within_rate(scope):
            rate = self.limits.max_requests_per_s
            sentence = f"The limit is {rate} requests per second and client. Send fewer."
            await send_detail(send, 429, sentence, RETRY_AFTER)
            return
        if has_body(scope):
            body = await self._receive_body(receive, send)
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

    async def _receive_body(self, receive: Receive, send: Send) -> bytes | None:
        """Receive the body of a request. If that fails, send an error and return None."""
        if self.n_receiving >= self.limits.max_concurrent:
            await send_detail(send, 429, "Too many request bodies are being received. Try again.", RETRY_AFTER)
            return None
        try:
            self.n_receiving += 1
            async with asyncio.timeout(self.limits.body_timeout_s):
                body = await read_body(receive, self.limits.max_body_bytes)
        except TimeoutError:
            seconds = self.limits.body_timeout_s
            await send_detail(send, 408, f"The request body did not arrive within {seconds} s. Send it again.")
            return None
        finally:
            self.n_receiving -= 1
        if body is None:
            await send_detail(send, 413, f"The request body exceeds {self.limits.max_body_bytes:,} bytes. Split it.")
        return body

    def _is_authorized(self, scope: Scope) -> bool:
        """Whether the request has the token that it needs. The comparison takes constant time."""
        if not self.limits.token or scope["path"] in PUBLIC_PATHS:
            return True
        return has_token(scope, self.limits.token)

    def _is_within_rate(self, scope: Scope) -> bool:
        """Whether the client is within its rate: a token bucket that holds the requests of one second."""
        if not self.limits.max_requests_per_s:
            return True
        client = scope["client"][0] if scope.get("client") else ""
        now, bucket = time.monotonic(), self.buckets.pop(client, None)
        bucket = bucket or TokenBucket(self.limits.max_requests_per_s, now)
        rate = self.limits.max_requests_per_s
        bucket.tokens = min(rate, bucket.tokens + (now - bucket.updated_at) * rate) - 1
        bucket.updated_at = now
        self.buckets[client] = bucket
        if len(self.buckets) > MAX_TRACKED_CLIENTS:
            self.buckets.popitem(last=False)
        if bucket.tokens < 0:
            bucket.tokens = 0
            return False
        return True


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
