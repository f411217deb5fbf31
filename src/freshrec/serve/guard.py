"""What stands before every answer: size, rate, token, waiting; and after it: how long it took. No id is kept."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from freshrec.config import Count, CountOrNone, check_options

OPEN = ("/", "/page.css", "/page.js", "/docs", "/openapi.json", "/health/live", "/health/ready")  # without a token
CLIENTS = 10_000  # whose rate is remembered; those seen longest ago are forgotten
BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
POLICY = b"default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
AFTER = [(b"retry-after", b"1")]
HEADERS = [
    (b"content-security-policy", POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


@dataclass(frozen=True)
class Rules:
    """What a server allows."""

    token: str = ""  # whoever asks must have it; "": nobody needs one
    body: Count = 1 << 20  # bytes of a request
    rate: CountOrNone = 500  # requests of a client in a second, 0: no limit
    waiting: Count = 64  # requests that are answered at a time, and bodies that arrive; more are sent away
    body_s: Count = 10  # how long a request's body may take to arrive

    def __post_init__(self) -> None:
        check_options(self)


class Metrics:
    """What /metrics tells."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        r = self.registry
        self.seconds = Histogram(
            "freshrec_request_seconds", "How long answers took.", ("route", "status"), buckets=BUCKETS, registry=r
        )
        self.version = Gauge("freshrec_version", "The version that is served.", registry=r)
        self.age = Gauge(
            "freshrec_newest_event_age_seconds", "Since the newest event that is answered from.", registry=r
        )
        self.fallbacks = Counter("freshrec_fallbacks", "Lists that popular items complete.", ("reason",), registry=r)
        self.recall = Gauge(
            "freshrec_index_recall", "Of the best items the index finds; 1: all are scored.", registry=r
        )
        self.events = Counter("freshrec_events", "Clicks taken.", ("known",), registry=r)
        self.swaps = Gauge("freshrec_swaps", "How often a version was taken into service.", registry=r)
        self.refused = Gauge(
            "freshrec_version_refused", "1: the store points to a version that cannot be served.", registry=r
        )


@dataclass
class Bucket:
    """How many requests a client may still make, and since when."""

    left: float
    since: float


@dataclass
class Guard:
    """An ASGI application around another."""

    app: ASGIApp
    rules: Rules
    metrics: Metrics
    buckets: OrderedDict[str, Bucket] = field(default_factory=OrderedDict)
    busy: int = 0
    arriving: int = 0  # requests whose bodies are on their way: they keep nobody waiting who sends none

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the start and the end of the server."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        since, status = time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
            await send(message)

        try:
            await self._answered(scope, receive, sending)
        finally:
            route = scope.get("route")
            name = "none" if route is None else route.path
            self.metrics.seconds.labels(name, str(status)).observe(time.perf_counter() - since)

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if not self._may(scope):
            headers = [(b"www-authenticate", b"Bearer")]
            await say(send, 401, "this server wants a token: send it as `Authorization: Bearer ...`.", headers)
            return
        health = path.startswith("/health/")
        if not health and not self._in_time(scope):
            say_more = f"this server answers {self.rules.rate} requests a second of one client; ask more slowly."
            await say(send, 429, say_more, AFTER)
            return
        if has_body(scope):
            body = await self._body(receive, send)
            if body is None:
                return
            receive = replayed(body, receive)
        if not health and self.busy >= self.rules.waiting:
            await say(send, 429, "too many requests wait for an answer; try again.", AFTER)
            return
        try:
            self.busy += 1
            await self.app(scope, receive, send)
        finally:
            self.busy -= 1

    async def _body(self, receive: Receive, send: Send) -> bytes | None:
        """What a request brings; None where that was wrong, and was said."""
        if self.arriving >= self.rules.waiting:
            await say(send, 429, "too many requests are on their way; try again.", AFTER)
            return None
        try:
            self.arriving += 1
            async with asyncio.timeout(self.rules.body_s):
                body = await read_body(receive, self.rules.body)
        except TimeoutError:
            await say(send, 408, f"the request did not arrive within {self.rules.body_s} seconds; send it again.")
            return None
        finally:
            self.arriving -= 1
        if body is None:
            await say(send, 413, f"a request may have {self.rules.body:,} bytes; send less at a time.")
        return body

    def _may(self, scope: Scope) -> bool:
        """Whether this request has the token it needs; compared in a time that does not depend on where it differs."""
        if not self.rules.token or scope["path"] in OPEN:
            return True
        return has_token(scope, self.rules.token)

    def _in_time(self, scope: Scope) -> bool:
        """Whether the client has not asked too often: a bucket of a second's requests that fills as time goes by."""
        if not self.rules.rate:
            return True
        client = scope["client"][0] if scope.get("client") else ""
        now, bucket = time.monotonic(), self.buckets.pop(client, None)
        bucket = bucket or Bucket(self.rules.rate, now)
        bucket.left = min(self.rules.rate, bucket.left + (now - bucket.since) * self.rules.rate) - 1
        bucket.since = now
        self.buckets[client] = bucket
        if len(self.buckets) > CLIENTS:
            self.buckets.popitem(last=False)
        if bucket.left < 0:
            bucket.left = 0
            return False
        return True


def has_body(scope: Scope) -> bool:
    """Whether a request says that it has a body."""
    said = dict(scope["headers"])
    return b"transfer-encoding" in said or said.get(b"content-length", b"0") != b"0"


def has_token(scope: Scope, token: str) -> bool:
    """Whether a request has this token."""
    given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    kind, _, word = given.partition(b" ")
    return bool(token) and kind.lower() == b"bearer" and hmac.compare_digest(word.strip(), token.encode())


async def read_body(receive: Receive, most: int) -> bytes | None:
    """All of a request's body; None where it is larger than may be. TimeoutError where its client has gone."""
    parts, size = [], 0
    while True:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            return None
        parts.append(part)
        if message["type"] == "http.disconnect":
            raise TimeoutError
        if not message.get("more_body", False):
            return b"".join(parts)


def replayed(body: bytes, receive: Receive) -> Receive:
    """A body that was read, to be read by somebody else."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return left.pop() if left else await receive()

    return again


async def say(send: Send, status: int, sentence: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    """An answer of one sentence."""
    body = json.dumps({"detail": sentence}).encode()
    about = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": about})
    await send({"type": "http.response.body", "body": body})
