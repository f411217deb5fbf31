"""The routes of the API: each checks a request, calls a handler in a worker thread, and names the version."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi import Path as PathParameter
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from freshrec.data.log import to_microseconds
from freshrec.errors import BusyError, LogError, OptionError
from freshrec.recommender.ids import normalize_ids
from freshrec.recommender.list_request import DEFAULTS, ListRequest, help_of
from freshrec.recommender.search import EXACT_SEARCH
from freshrec.server import handlers, schemas
from freshrec.server.handlers import LoadedVersion
from freshrec.server.live_version import check_click_ids, load_version
from freshrec.server.middleware import has_token
from freshrec.server.service import Service, describe_version
from freshrec.store.click_journal import Click

MAX_CLOCK_SKEW_S = 600  # how far in the future an event may be: clocks differ
MIN_TIMESTAMP = datetime(1980, 1, 1, tzinfo=UTC)
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"model": schemas.ErrorDetail, "description": description}
    for code, description in {
        401: "A token is missing.",
        403: "This server has no token, so that nobody may do this.",
        404: "The id has never occurred.",
        408: "The request came too slowly.",
        409: "Not now, or not with this model.",
        413: "The request is too large.",
        422: "Something in the request is not what it must be.",
        429: "Too many requests.",
    }.items()
}


UserIdPath = Annotated[
    str,
    PathParameter(
        min_length=1, max_length=schemas.MAX_ID_LENGTH, pattern=schemas.ID_PATTERN, description="An id of a user."
    ),
]


ItemIdPath = Annotated[
    str,
    PathParameter(
        min_length=1, max_length=schemas.MAX_ID_LENGTH, pattern=schemas.ID_PATTERN, description="An id of an item."
    ),
]


KQuery = Annotated[schemas.ListLength, Query(description=help_of("k"))]
IdsQuery = Annotated[list[schemas.ShortText] | None, Field(max_length=schemas.MAX_IDS)]


def add_list_routes(app: FastAPI, service: Service) -> None:
    @app.get(
        "/recommend/{user:path}",
        tags=["lists"],
        response_model=schemas.RecommendResponse,
        responses={404: ERROR_RESPONSES[404]},
    )
    async def recommend(
        user: UserIdPath,
        k: KQuery = DEFAULTS.k,
        exclude_seen: Annotated[bool, Query(description=help_of("exclude_seen"))] = DEFAULTS.exclude_seen,
        allow: Annotated[IdsQuery, Query(description=help_of("allow"))] = None,
        deny: Annotated[IdsQuery, Query(description=help_of("deny"))] = None,
        category: Annotated[schemas.ShortText | None, Query(description=help_of("category"))] = None,
        diversity: Annotated[schemas.DiversityWeight, Query(description=help_of("diversity"))] = DEFAULTS.diversity,
    ) -> Response:
        """The best items of one user. A stranger gets what is popular, and `fallback` says so."""
        allowed = None if allow is None else tuple(allow)
        request = ListRequest(k, exclude_seen, allowed, tuple(deny or ()), category, diversity)
        version = service.version
        _require_category(version, category)
        found = await service.batcher.recommend(version, user, request)
        service.count_fallbacks([found])
        answer = schemas.RecommendResponse(
            version=version.number, user_id=user, items=found.items, fallback=found.fallback
        )
        return Response(answer.model_dump_json(), media_type="application/json")

    @app.post("/recommend", tags=["lists"], responses={404: ERROR_RESPONSES[404]})
    async def recommend_many(request: schemas.RecommendRequest) -> schemas.BatchRecommendResponse:
        """The best items of several users, all from one version."""
        version = service.version
        _require_category(version, request.category)
        found = await service.run_in_worker(lambda: handlers.recommend(version, request.users, request.to_request()))
        service.count_fallbacks(found)
        return schemas.BatchRecommendResponse(version=version.number, lists=found)

    @app.get("/similar/{item:path}", tags=["lists"], responses={404: ERROR_RESPONSES[404]})
    async def similar(item: ItemIdPath, k: KQuery = DEFAULTS.k) -> schemas.SimilarResponse:
        """The items most like one."""
        version = service.version
        _require_known(version.served.items, "item_id", item)
        items = await service.run_in_worker(lambda: handlers.similar(version, item, k))
        return schemas.SimilarResponse(version=version.number, item_id=item, items=items)


def add_event_routes(app: FastAPI, service: Service) -> None:
    @app.post("/events", tags=["events"])
    async def events(clicks: schemas.ClicksRequest) -> schemas.ClicksResponse:
        """Clicks. They are on the disk when this answers, and in their users' histories; the next update learns them.

        `event_id`, else user, item and timestamp, says which click it is: sent twice, or in a nightly file too, it
        counts once.
        """
        version = service.version
        checked_clicks = [check_click_ids(version, _to_click(click, version)) for click in clicks.events]
        number, found = await service.run_in_worker(lambda: service.live.accept_clicks(checked_clicks))
        n_known = sum(outcome.is_duplicate for outcome in found)
        service.metrics.events.labels("yes").inc(n_known)
        service.metrics.events.labels("no").inc(len(found) - n_known)
        rows = [
            schemas.ClickAcknowledgement(
                event_id=outcome.click.event_id,
                timestamp=outcome.click.time,
                known=outcome.is_duplicate,
                folded=outcome.is_in_overlay,
                why=outcome.reason,
            )
            for outcome in found
        ]
        return schemas.ClicksResponse(version=number, accepted=len(found) - n_known, known=n_known, events=rows)


def add_user_routes(app: FastAPI, service: Service) -> None:
    @app.get("/explain/{user}/{item}", tags=["people"], responses={404: ERROR_RESPONSES[404]})
    async def explain(user: UserIdPath, item: ItemIdPath) -> schemas.ExplanationResponse:
        """Why a user is offered an item: which experts or which interest, and by which past events."""
        version = service.version
        _require_known(version.served.items, "item_id", item)
        if not handlers.user_row(version, user):
            raise HTTPException(404, "this user has no event, so nothing can be explained.")
        return await service.run_in_worker(lambda: handlers.explain(version, user, item))

    @app.get("/users/{user:path}/interests", tags=["people"], responses={404: ERROR_RESPONSES[404]})
    async def interests(user: UserIdPath) -> schemas.UserProfile:
        """What is known of a user: events, and interests with their best items and the events behind them."""
        version = service.version
        found = await service.run_in_worker(lambda: handlers.user_profile(version, user))
        if found is None:
            raise HTTPException(404, "this user has no event; /recommend answers with what is popular.")
        return found

    @app.get("/users/{user:path}/changes", tags=["people"], responses={404: ERROR_RESPONSES[404]})
    async def changes(user: UserIdPath, k: KQuery = 20) -> schemas.ListChanges:
        """How a user's list differs from that of the version before, which is loaded for it."""
        version = service.version
        parent = version.manifest.parent
        if parent is None:
            raise HTTPException(404, "the live version is the first one; nothing can have changed.")
        return await service.run_in_worker(lambda: _compare_lists(service, version, parent, user, k))

    @app.delete("/users/{user:path}", tags=["people"], responses={403: ERROR_RESPONSES[403]})
    async def leave(user: UserIdPath, request: Request) -> dict[str, Any]:
        """Erase a user from the log, from the clicks and from every version; needs the token. A receipt."""
        _require_token(service, request)
        handlers.user_row(service.version, user)  # it can be an id

        def work() -> dict[str, Any]:
            with service.live.erasing(user):
                return service.erase(user)

        receipt = await asyncio.to_thread(work)
        return {"version": service.version.number, **receipt}


def _compare_lists(service: Service, version: LoadedVersion, parent: int, user: str, k: int) -> schemas.ListChanges:
    """Compare the lists of two versions; one such comparison at a time, and none while a version is loaded."""
    if not service.live.loading_lock.acquire(blocking=False):
        raise BusyError("another version is being loaded at this moment; try again.")
    try:
        earlier = load_version(service.live.store, service.live.store.manifest(parent), EXACT_SEARCH)
        versions = earlier, version
        lists = [handlers.recommend(loaded, [user], ListRequest(k=k))[0] for loaded in versions]
        profiles = [handlers.user_profile(loaded, user) for loaded in versions]
    finally:
        service.live.loading_lock.release()
    old, new = ({item.item_id: item for item in user_list.items} for user_list in lists)
    moved = [
        {"item_id": item, "rank": new[item].rank, "was": old[item].rank}
        for item in new.keys() & old.keys()
        if new[item].rank != old[item].rank
    ]
    return schemas.ListChanges(
        version=version.number,
        before=parent,
        came=[new[item] for item in new if item not in old],
        left=[old[item] for item in old if item not in new],
        moved=sorted(moved, key=lambda item: int(item["rank"])),
        interests=[None if profile is None else len(profile.interests) for profile in profiles],
    )


# Fields of a manifest that GET /versions shows.
VERSION_FIELDS = {"id", "parent", "kind", "made_at", "promoted", "goes_live", "reasons", "notes", "numbers", "sizes"}


def add_version_routes(app: FastAPI, service: Service) -> None:
    @app.get("/version", tags=["versions"])
    async def about() -> schemas.VersionInfo:
        """The live version: how old, how good, how it is searched."""
        return describe_version(service)

    @app.get("/versions", tags=["versions"])
    async def history() -> dict[str, Any]:
        """All versions, the newest first, and every move of the live pointer."""
        store = service.live.store
        versions = [manifest.model_dump(include=VERSION_FIELDS) for manifest in reversed(store.manifests())]
        moves = [move.model_dump() for move in reversed(store.moves())]
        return {
            "version": service.version.number,
            "trouble": service.live.problem,
            "versions": versions,
            "moves": moves,
        }

    @app.post("/rollback", tags=["versions"], responses={403: ERROR_RESPONSES[403]})
    async def rollback(move: schemas.RollbackRequest, request: Request) -> dict[str, Any]:
        """Go back to an earlier version, once it is found to be whole; needs the token."""
        _require_token(service, request)
        store = service.live.store

        def work() -> dict[str, Any]:
            was = store.live
            if move.version >= was:
                raise OptionError(f"version {move.version} is not earlier than the live one, {was}.")
            if not store.manifest(move.version).goes_live and not move.reason:
                raise OptionError(f"version {move.version} was refused by the gate; give a reason, which is kept.")
            with store.locked():
                store.move_pointer(move.version, "rollback", move.reason)
            service.live.refresh()
            return {"version": service.version.number, "was": was}

        return await asyncio.to_thread(work)

    @app.get("/health/live", tags=["health"])
    async def alive() -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    @app.get(
        "/health/ready", tags=["health"], responses={503: {"model": schemas.ErrorDetail, "description": "Not yet."}}
    )
    async def ready() -> JSONResponse:
        """A version is served."""
        if service.live.version is None:
            return JSONResponse({"detail": service.live.problem or "the live version is being loaded."}, 503)
        return JSONResponse({"status": "ready", "version": service.version.number, "trouble": service.live.problem})


def _to_click(click: schemas.ClickIn, version: LoadedVersion) -> Click:
    """A click as the journal keeps it. LogError where this log would not take it."""
    read_options, now = version.bundle.read_options, datetime.now(UTC)
    timestamp = click.timestamp or now
    timestamp = timestamp if timestamp.tzinfo else timestamp.replace(tzinfo=UTC)
    if not timestamp >= MIN_TIMESTAMP or (timestamp - now).total_seconds() > MAX_CLOCK_SKEW_S:
        raise LogError(
            f"a timestamp is {timestamp:%Y-%m-%d %H:%M}, which is before 1980 or to come; send when it happened, "
            "in UTC."
        )
    if read_options.events and click.event not in read_options.events:
        raise LogError(f"this log takes events of the types {', '.join(read_options.events)}; say which one it is.")
    event_id, category = (None if value is None else str(value) for value in (click.event_id, click.category))
    if not read_options.has_clock:  # without times only an id says that it is the same click
        event_id = event_id or uuid.uuid4().hex
    return Click(click.user_id, click.item_id, to_microseconds(timestamp), event_id, category, click.event)


def _require_known(catalog: Any, name: str, given: str) -> None:
    if not int(catalog.rows(normalize_ids(name, given, catalog))):
        raise HTTPException(404, f"this {name} has never occurred in an event; ask for one that has.")


def _require_category(version: LoadedVersion, category: str | None) -> None:
    if category is not None and not (version.served.categories["category"] == category).any():
        raise HTTPException(404, "no item has this category; ask for one that the log has.")


def _require_token(service: Service, request: Request) -> None:
    if not has_token(request.scope, service.limits.token):
        raise HTTPException(403, "only a server with a token lets somebody do this; start it with --token-file FILE.")
