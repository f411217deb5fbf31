"""The routes: what is asked over HTTP to answers, and errors to one sentence."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import generate_latest
from pydantic import Field

from freshrec.data.log import format_time, to_microseconds
from freshrec.errors import BusyError, FreshrecError, IncompatibleError, LogError, OptionError, StateError
from freshrec.serve import answers, asked
from freshrec.serve.answers import Version
from freshrec.serve.guard import Guard, Metrics, Rules, has_token
from freshrec.serve.index import ALL
from freshrec.serve.list_request import DEFAULTS, ListRequest, help_of
from freshrec.serve.live import Live, checked, loaded
from freshrec.serve.reading import ids_of
from freshrec.serve.together import Together
from freshrec.store.clicks import Click
from freshrec.version import __version__

T = TypeVar("T")
PAGE = Path(__file__).parent / "page"
AHEAD_S = 600  # how far in the future an event may be: clocks differ
EARLIEST = datetime(1980, 1, 1, tzinfo=UTC)
STATUS = {LogError: 422, OptionError: 409, IncompatibleError: 409, BusyError: 409, StateError: 409}
SAID: dict[int | str, dict[str, Any]] = {
    code: {"model": asked.Said, "description": why}
    for code, why in {
        401: "A token is missing.", 403: "This server has no token, so that nobody may do this.",
        404: "The id has never occurred.", 408: "The request came too slowly.",
        409: "Not now, or not with this model.", 413: "The request is too large.",
        422: "Something in the request is not what it must be.", 429: "Too many requests.",
    }.items()
}  # fmt: skip
User = Annotated[
    str, InPath(min_length=1, max_length=asked.ID_LENGTH, pattern=asked.PLAIN, description="An id of a user.")
]
ItemId = Annotated[
    str, InPath(min_length=1, max_length=asked.ID_LENGTH, pattern=asked.PLAIN, description="An id of an item.")
]
K = Annotated[asked.Many, Query(description=help_of("k"))]
Some = Annotated[list[asked.Text] | None, Field(max_length=asked.MOST_IDS)]


@dataclass
class Service:
    """What all routes share."""

    live: Live
    rules: Rules
    erase: Callable[[str], dict[str, Any]]  # a user, out of the store: in a process of its own, which may learn
    metrics: Metrics = field(default_factory=Metrics)
    workers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "answer"))

    def __post_init__(self) -> None:
        self.together = Together(self.run)

    async def run(self, work: Callable[[], T]) -> T:
        """In a worker, so that health is told while others wait."""
        return await asyncio.get_running_loop().run_in_executor(self.workers, work)

    @property
    def version(self) -> Version:
        """The live version. StateError before it is loaded."""
        if self.live.version is None:
            raise StateError(self.live.trouble or "the live version is being loaded; try again.")
        return self.live.version

    def fell_back(self, lists: list[asked.Listed]) -> None:
        """Count why popular items completed lists."""
        for one in lists:
            if one.fallback:
                self.metrics.fallbacks.labels(one.fallback).inc()


def app_of(service: Service) -> Guard:
    """The application, behind its guard."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.live.end()
        service.workers.shutdown(wait=True)

    app = FastAPI(
        title="freshrec", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan,
        description="Recommendations of the live version of a store. Every answer names its version.",
        responses={code: SAID[code] for code in (401, 408, 409, 413, 422, 429)},
    )  # fmt: skip
    _errors(app)
    _lists(app, service)
    _events(app, service)
    _people(app, service)
    _versions(app, service)
    _pages(app, service)
    return Guard(app, service.rules, service.metrics)


def _errors(app: FastAPI) -> None:
    """Everything that may go wrong, as a status and a sentence."""

    @app.exception_handler(FreshrecError)
    async def ours(request: Request, why: FreshrecError) -> JSONResponse:
        return JSONResponse({"detail": str(why)}, STATUS.get(type(why), 409))

    @app.exception_handler(RequestValidationError)
    async def theirs(request: Request, why: RequestValidationError) -> JSONResponse:
        errors = why.errors()
        wrong = next((error for error in errors if error["type"] != "int_type"), errors[0])  # an id may be text
        where = ".".join(str(part) for part in wrong["loc"] if part not in ("str", "int") and len(str(part)) < 40)
        return JSONResponse({"detail": f"{where}: {wrong['msg'][:200]}."}, 422)

    @app.exception_handler(Exception)
    async def nobodys(request: Request, why: Exception) -> JSONResponse:
        line = why.__traceback__
        while line is not None and line.tb_next is not None:
            line = line.tb_next
        at = f"{Path(line.tb_frame.f_code.co_filename).name}:{line.tb_lineno}" if line is not None else "?"
        log(f"an answer failed: {type(why).__name__} at {at}")  # not its text, which may hold an id
        return JSONResponse({"detail": "this is a fault of the server; it was written to its log."}, 500)


def _lists(app: FastAPI, service: Service) -> None:
    @app.get("/recommend/{user:path}", tags=["lists"], response_model=asked.Recommended, responses={404: SAID[404]})
    async def recommend(
        user: User, k: K = DEFAULTS.k,
        exclude_seen: Annotated[bool, Query(description=help_of("exclude_seen"))] = DEFAULTS.exclude_seen,
        allow: Annotated[Some, Query(description=help_of("allow"))] = None,
        deny: Annotated[Some, Query(description=help_of("deny"))] = None,
        category: Annotated[asked.Text | None, Query(description=help_of("category"))] = None,
        diversity: Annotated[asked.Penalty, Query(description=help_of("diversity"))] = DEFAULTS.diversity,
    ) -> Response:  # fmt: skip
        """The best items of one user. A stranger gets what is popular, and `fallback` says so."""
        allowed = None if allow is None else tuple(allow)
        request = ListRequest(k, exclude_seen, allowed, tuple(deny or ()), category, diversity)
        version = service.version
        _must_be_category(version, category)
        found = await service.together.ask(version, user, request)
        service.fell_back([found])
        answer = asked.Recommended(
            version=version.number, user_id=user, items=found.items, fallback=found.fallback
        )  # fmt: skip
        return Response(answer.model_dump_json(), media_type="application/json")

    @app.post("/recommend", tags=["lists"], responses={404: SAID[404]})
    async def recommend_many(by: asked.Asked) -> asked.Batch:
        """The best items of several users, all from one version."""
        version = service.version
        _must_be_category(version, by.category)
        found = await service.run(lambda: answers.recommend(version, by.users, by.to_request()))
        service.fell_back(found)
        return asked.Batch(version=version.number, lists=found)

    @app.get("/similar/{item:path}", tags=["lists"], responses={404: SAID[404]})
    async def similar(item: ItemId, k: K = DEFAULTS.k) -> asked.Similar:
        """The items most like one."""
        version = service.version
        _must_know(version.served.items, "item_id", item)
        items = await service.run(lambda: answers.similar(version, item, k))
        return asked.Similar(version=version.number, item_id=item, items=items)


def _events(app: FastAPI, service: Service) -> None:
    @app.post("/events", tags=["events"])
    async def events(clicks: asked.Clicks) -> asked.Taken:
        """Clicks. They are on the disk when this answers, and in their users' histories; the next update learns them.

        `event_id`, else user, item and timestamp, says which click it is: sent twice, or in a nightly file too, it
        counts once.
        """
        version = service.version
        given = [checked(version, _click(one, version)) for one in clicks.events]
        number, found = await service.run(lambda: service.live.take(given))
        n_known = sum(one.known for one in found)
        service.metrics.events.labels("yes").inc(n_known)
        service.metrics.events.labels("no").inc(len(found) - n_known)
        rows = [
            asked.Acknowledged(
                event_id=one.click.event_id, timestamp=one.click.time, known=one.known, folded=one.folded, why=one.why
            )
            for one in found
        ]
        return asked.Taken(version=number, accepted=len(found) - n_known, known=n_known, events=rows)


def _people(app: FastAPI, service: Service) -> None:
    @app.get("/explain/{user}/{item}", tags=["people"], responses={404: SAID[404]})
    async def explain(user: User, item: ItemId) -> asked.Explained:
        """Why a user is offered an item: which experts or which interest, and by which past events."""
        version = service.version
        _must_know(version.served.items, "item_id", item)
        if not answers.row_of(version, user):
            raise HTTPException(404, "this user has no event, so nothing can be explained.")
        return await service.run(lambda: answers.explain(version, user, item))

    @app.get("/users/{user:path}/interests", tags=["people"], responses={404: SAID[404]})
    async def interests(user: User) -> asked.Person:
        """What is known of a user: events, and interests with their best items and the events behind them."""
        version = service.version
        found = await service.run(lambda: answers.person(version, user))
        if found is None:
            raise HTTPException(404, "this user has no event; /recommend answers with what is popular.")
        return found

    @app.get("/users/{user:path}/changes", tags=["people"], responses={404: SAID[404]})
    async def changes(user: User, k: K = 20) -> asked.Changed:
        """How a user's list differs from that of the version before, which is loaded for it."""
        version = service.version
        parent = version.about.parent
        if parent is None:
            raise HTTPException(404, "the live version is the first one; nothing can have changed.")
        return await service.run(lambda: _changed(service, version, parent, user, k))

    @app.delete("/users/{user:path}", tags=["people"], responses={403: SAID[403]})
    async def leave(user: User, request: Request) -> dict[str, Any]:
        """Erase a user from the log, from the clicks and from every version; needs the token. A receipt."""
        _only_with_token(service, request)
        answers.row_of(service.version, user)  # it can be an id

        def work() -> dict[str, Any]:
            with service.live.leaving(user):
                return service.erase(user)

        receipt = await asyncio.to_thread(work)
        return {"version": service.version.number, **receipt}


def _changed(service: Service, version: Version, parent: int, user: str, k: int) -> asked.Changed:
    """Compare the lists of two versions; one such comparison at a time, and none while a version is loaded."""
    if not service.live.loading.acquire(blocking=False):
        raise BusyError("another version is being loaded at this moment; try again.")
    try:
        before = loaded(service.live.store, service.live.store.manifest(parent), ALL)
        [then], [now] = (answers.recommend(one, [user], ListRequest(k=k)) for one in (before, version))
        people = [answers.person(one, user) for one in (before, version)]
    finally:
        service.live.loading.release()
    old, new = ({item.item_id: item for item in one.items} for one in (then, now))
    moved = [
        {"item_id": item, "rank": new[item].rank, "was": old[item].rank}
        for item in new.keys() & old.keys() if new[item].rank != old[item].rank
    ]  # fmt: skip
    return asked.Changed(
        version=version.number, before=parent, came=[new[item] for item in new if item not in old],
        left=[old[item] for item in old if item not in new],
        moved=sorted(moved, key=lambda one: int(one["rank"])),
        interests=[None if one is None else len(one.interests) for one in people],
    )  # fmt: skip


def _versions(app: FastAPI, service: Service) -> None:
    @app.get("/version", tags=["versions"])
    async def about() -> asked.About:
        """The live version: how old, how good, how it is searched."""
        return about_of(service)

    @app.get("/versions", tags=["versions"])
    async def history() -> dict[str, Any]:
        """All versions, the newest first, and every move of the live pointer."""
        store = service.live.store
        told = ("id", "parent", "kind", "made_at", "promoted", "goes_live", "reasons", "notes", "numbers", "sizes")
        versions = [manifest.model_dump(include=set(told)) for manifest in reversed(store.versions())]
        moves = [move.model_dump() for move in reversed(store.moves())]
        return {
            "version": service.version.number,
            "trouble": service.live.trouble,
            "versions": versions,
            "moves": moves,
        }

    @app.post("/rollback", tags=["versions"], responses={403: SAID[403]})
    async def rollback(move: asked.Move, request: Request) -> dict[str, Any]:
        """Go back to an earlier version, once it is found to be whole; needs the token."""
        _only_with_token(service, request)
        store = service.live.store

        def work() -> dict[str, Any]:
            was = store.live
            if move.version >= was:
                raise OptionError(f"version {move.version} is not earlier than the live one, {was}.")
            if not store.manifest(move.version).goes_live and not move.reason:
                raise OptionError(f"version {move.version} was refused by the gate; give a reason, which is kept.")
            with store.locked():
                store.point(move.version, "rollback", move.reason)
            service.live.look()
            return {"version": service.version.number, "was": was}

        return await asyncio.to_thread(work)

    @app.get("/health/live", tags=["health"])
    async def alive() -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    @app.get("/health/ready", tags=["health"], responses={503: {"model": asked.Said, "description": "Not yet."}})
    async def ready() -> JSONResponse:
        """A version is served."""
        if service.live.version is None:
            return JSONResponse({"detail": service.live.trouble or "the live version is being loaded."}, 503)
        return JSONResponse({"status": "ready", "version": service.version.number, "trouble": service.live.trouble})


def _pages(app: FastAPI, service: Service) -> None:
    @app.get("/metrics", tags=["health"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        told, live = service.metrics, service.live
        told.version.set(service.version.number)
        told.recall.set(service.version.searching.recall)
        told.swaps.set(live.swaps)
        told.refused.set(1 if live.trouble else 0)
        if (newest := live.newest) is not None:
            told.age.set(time.time() - newest / 1e6)
        return Response(generate_latest(told.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    for path, name, kind in (
        ("/", "page.html", "text/html"), ("/docs", "docs.html", "text/html"),
        ("/page.css", "page.css", "text/css"), ("/page.js", "page.js", "text/javascript"),
    ):  # fmt: skip
        body = (PAGE / name).read_bytes()

        async def page(body: bytes = body, kind: str = kind) -> Response:
            return Response(body, media_type=kind)

        app.add_api_route(path, page, include_in_schema=False, response_class=HTMLResponse)


def about_of(service: Service) -> asked.About:
    """What is to be said of the live version."""
    version, about, newest = service.version, service.version.about, service.live.newest
    has_clock = version.kept.reading.has_clock
    return asked.About(
        version=about.id, parent=about.parent, kind=about.kind, made_at=about.made_at, live_since=version.live_since,
        model=version.kept.names[0], strategy=version.kept.names[1], sizes=about.sizes, numbers=about.numbers,
        promoted=about.promoted, reasons=about.reasons, notes=about.notes,
        newest_event=format_time(newest) if newest is not None and has_clock else newest,
        search=asdict(version.searching), has_token=bool(service.rules.token),
    )  # fmt: skip


def _click(one: asked.Happened, version: Version) -> Click:
    """A click as the journal keeps it. LogError where this log would not take it."""
    reading, now = version.kept.reading, datetime.now(UTC)
    when = one.timestamp or now
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    if not when >= EARLIEST or (when - now).total_seconds() > AHEAD_S:
        raise LogError(
            f"a timestamp is {when:%Y-%m-%d %H:%M}, which is before 1980 or to come; send when it happened, in UTC."
        )
    if reading.events and one.event not in reading.events:
        raise LogError(f"this log takes events of the types {', '.join(reading.events)}; say which one it is.")
    event_id, category = (None if value is None else str(value) for value in (one.event_id, one.category))
    if not reading.has_clock:  # without times only an id says that it is the same click
        event_id = event_id or uuid.uuid4().hex
    return Click(one.user_id, one.item_id, to_microseconds(when), event_id, category, one.event)


def _must_know(catalog: Any, name: str, given: str) -> None:
    if not int(catalog.rows(ids_of(name, given, catalog))):
        raise HTTPException(404, f"this {name} has never occurred in an event; ask for one that has.")


def _must_be_category(version: Version, category: str | None) -> None:
    if category is not None and not (version.served.categories["category"] == category).any():
        raise HTTPException(404, "no item has this category; ask for one that the log has.")


def _only_with_token(service: Service, request: Request) -> None:
    if not has_token(request.scope, service.rules.token):
        raise HTTPException(403, "only a server with a token lets somebody do this; start it with --token-file FILE.")


def log(line: str) -> None:
    """A line for whoever runs the server, as JSON; it never holds an id of a user or an item."""
    sys.stderr.write(json.dumps({"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "what": line}) + "\n")
    sys.stderr.flush()
