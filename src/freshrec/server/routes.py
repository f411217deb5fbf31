"""The routes of the API. Each checks the request, calls a handler in a worker thread, and returns the version."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi import Path as PathParameter
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from freshrec.data.moments import to_microseconds
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

MAX_CLOCK_SKEW_S = 600  # how far in the future an event may be, because clocks differ
MIN_TIMESTAMP = datetime(1980, 1, 1, tzinfo=UTC)
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"model": schemas.ErrorDetail, "description": description}
    for code, description in {
        401: "The token is missing or wrong.",
        403: "The server was started without a token, or a page of another site sent the request.",
        408: "The request body did not arrive in time.",
        409: "The state of the store or the model does not allow this now.",
        413: "The request body is too large.",
        421: "The server does not answer under this host name.",
        422: "A parameter or the body is invalid.",
        429: "There are too many requests. Retry after one second.",
    }.items()
}


def error_response(status: int, description: str) -> dict[int | str, dict[str, Any]]:
    """Describe an error of one route for the OpenAPI document."""
    return {status: {"model": schemas.ErrorDetail, "description": description}}


UserIdPath = Annotated[
    str,
    PathParameter(
        min_length=1, max_length=schemas.MAX_ID_LENGTH, pattern=schemas.ID_PATTERN, description="Id of the user."
    ),
]


ItemIdPath = Annotated[
    str,
    PathParameter(
        min_length=1, max_length=schemas.MAX_ID_LENGTH, pattern=schemas.ID_PATTERN, description="Id of the item."
    ),
]


KQuery = Annotated[schemas.ListLength, Query(description=help_of("k"))]
IdsQuery = Annotated[list[schemas.ShortText] | None, Field(max_length=schemas.MAX_IDS)]


def add_list_routes(app: FastAPI, service: Service) -> None:
    """Add recommendations."""

    @app.get(
        "/recommend/{user:path}",
        tags=["lists"],
        summary="Recommend items to a user",
        response_description="The list of the user.",
        response_model=schemas.RecommendResponse,
        responses=error_response(404, "No item has this category."),
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
        """Return the best items for one user. An unknown user gets popular items, and `fallback` gives the reason."""
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

    @app.post(
        "/recommend",
        tags=["lists"],
        summary="Recommend items to several users",
        response_description="The lists, in the order of the users.",
        responses=error_response(404, "No item has this category."),
    )
    async def recommend_many(request: schemas.RecommendRequest) -> schemas.BatchRecommendResponse:
        """Return the best items for up to 256 users. All lists come from one version."""
        version = service.version
        _require_category(version, request.category)
        found = await service.run_in_worker(lambda: handlers.recommend(version, request.users, request.to_request()))
        service.count_fallbacks(found)
        return schemas.BatchRecommendResponse(version=version.number, lists=found)


def add_similar_routes(app: FastAPI, service: Service) -> None:
    """Add similar items."""

    @app.get(
        "/similar/{item:path}",
        tags=["lists"],
        summary="Similar items",
        response_description="The similar items.",
        responses=error_response(404, "The item is unknown."),
    )
    async def similar(item: ItemIdPath, k: KQuery = DEFAULTS.k) -> schemas.SimilarResponse:
        """Return the items that are most similar to one item.

        Models with vectors compare them by cosine. Other models count how often two items occur together.
        """
        version = service.version
        _require_known(version.served.items, "item_id", item)
        items = await service.run_in_worker(lambda: handlers.similar(version, item, k))
        return schemas.SimilarResponse(version=version.number, item_id=item, items=items)


def add_event_routes(app: FastAPI, service: Service) -> None:
    """Add the intake of clicks."""

    @app.post("/events", tags=["events"], summary="Send clicks", response_description="The result of each click.")
    async def events(clicks: schemas.ClicksRequest) -> schemas.ClicksResponse:
        """Store up to 1,000 clicks and add them to the histories of their users.

        The clicks are on disk before the server answers. The next lists of these users reflect them, and the next
        update trains on them. A click is identified by its `event_id`, or else by user, item and timestamp. A click is
        counted once, even if it is sent twice or is also in a file for `freshrec update`.
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
    """Add explanations, profiles and changes of users."""

    @app.get(
        "/explain/{user}/{item}",
        tags=["people"],
        summary="Explain a recommendation",
        response_description="The reasons.",
        responses=error_response(404, "The user or the item is unknown."),
    )
    async def explain(user: UserIdPath, item: ItemIdPath) -> schemas.ExplanationResponse:
        """Return the reasons why a user is offered an item: experts or interests, and past items of the user."""
        version = service.version
        _require_known(version.served.items, "item_id", item)
        if not handlers.user_row(version, user):
            raise HTTPException(404, "This user has no events, so there is nothing to explain.")
        return await service.run_in_worker(lambda: handlers.explain(version, user, item))

    @app.get(
        "/users/{user:path}/interests",
        tags=["people"],
        summary="Profile of a user",
        response_description="The profile.",
        responses=error_response(404, "The user is unknown."),
    )
    async def interests(user: UserIdPath) -> schemas.UserProfile:
        """Return the profile of a user: recent events, and interests with their best items and their events."""
        version = service.version
        found = await service.run_in_worker(lambda: handlers.user_profile(version, user))
        if found is None:
            raise HTTPException(404, "This user has no events. GET /recommend returns popular items.")
        return found

    @app.get(
        "/users/{user:path}/changes",
        tags=["people"],
        summary="Changes since the parent version",
        response_description="The differences between the two lists.",
        responses=error_response(404, "The live version has no parent version."),
    )
    async def changes(user: UserIdPath, k: KQuery = 20) -> schemas.ListChanges:
        """Compare the list of a user with that of the parent version, which is loaded for this request."""
        version = service.version
        parent = version.manifest.parent
        if parent is None:
            raise HTTPException(404, "The live version is the first one, so there is nothing to compare.")
        return await service.run_in_worker(lambda: _compare_lists(service, version, parent, user, k))


def add_erasure_routes(app: FastAPI, service: Service) -> None:
    """Add the erasure of users."""

    @app.delete(
        "/users/{user:path}",
        tags=["people"],
        summary="Erase a user",
        response_description="A receipt: what was deleted.",
        responses={403: ERROR_RESPONSES[403]},
    )
    async def leave(user: UserIdPath, request: Request) -> dict[str, Any]:
        """Erase a user from the log, the clicks and all versions, and return a receipt. This needs the token."""
        _require_token(service, request)
        handlers.user_row(service.version, user)  # LogError for an invalid id

        def work() -> dict[str, Any]:
            with service.live.erasing(user):
                return service.erase(user)

        receipt = await asyncio.to_thread(work)
        return {"version": service.version.number, **receipt}


def _compare_lists(service: Service, version: LoadedVersion, parent: int, user: str, k: int) -> schemas.ListChanges:
    """Compare the lists of two versions. BusyError during another comparison or while a version is loaded."""
    if not service.live.loading_lock.acquire(blocking=False):
        raise BusyError("Another version is being loaded. Try again.")
    try:
        earlier = load_version(service.live.store, service.live.store.manifest(parent), EXACT_SEARCH)
        earlier = replace(earlier, hidden=version.hidden)
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


# Fields of a manifest that GET /versions returns
VERSION_FIELDS = {"id", "parent", "kind", "made_at", "promoted", "goes_live", "reasons", "notes", "numbers", "sizes"}


def add_version_routes(app: FastAPI, service: Service) -> None:
    """Add the versions and rolling back."""

    @app.get("/version", tags=["versions"], summary="Live version", response_description="The live version.")
    async def about() -> schemas.VersionInfo:
        """Return the live version: age, quality, sizes, and how items are searched."""
        return describe_version(service)

    @app.get("/versions", tags=["versions"], summary="All versions", response_description="Versions and moves.")
    async def history() -> dict[str, Any]:
        """Return all versions and all moves of the live pointer, newest first.

        `trouble` says why the live version of the store cannot be served; it is empty if it is served.
        """
        store = service.live.store
        versions = [manifest.model_dump(include=VERSION_FIELDS) for manifest in reversed(store.manifests())]
        moves = [move.model_dump() for move in reversed(store.moves())]
        return {
            "version": service.version.number,
            "trouble": service.live.problem,
            "versions": versions,
            "moves": moves,
        }

    @app.post(
        "/rollback",
        tags=["versions"],
        summary="Roll back",
        response_description="The live version now, and the one before (`was`).",
        responses={403: ERROR_RESPONSES[403]},
    )
    async def rollback(move: schemas.RollbackRequest, request: Request) -> dict[str, Any]:
        """Make an earlier version the live one, after checking its files. This needs the token."""
        _require_token(service, request)
        store = service.live.store

        def work() -> dict[str, Any]:
            was = store.live
            if move.version >= was:
                raise OptionError(f"Version {move.version} is not earlier than the live version {was}. Choose another.")
            if not store.manifest(move.version).goes_live and not move.reason:
                raise OptionError(
                    f"The gate refused version {move.version}. Give a reason, which is stored in the history."
                )
            with store.locked():
                store.move_pointer(move.version, "rollback", move.reason)
            service.live.refresh()
            return {"version": service.version.number, "was": was}

        return await asyncio.to_thread(work)


def add_health_routes(app: FastAPI, service: Service) -> None:
    """Add the health checks."""

    @app.get("/health/live", tags=["health"], summary="Liveness", response_description="The process is running.")
    async def alive() -> dict[str, str]:
        """Return 200 while the process is running."""
        return {"status": "alive"}

    @app.get(
        "/health/ready",
        tags=["health"],
        summary="Readiness",
        response_description="A version is served.",
        responses=error_response(503, "No version is loaded yet."),
    )
    async def ready() -> JSONResponse:
        """Return 200 once a version is served.

        `trouble` says why a newer live version of the store cannot be served; it is empty if there is no problem.
        """
        if service.live.version is None:
            return JSONResponse({"detail": service.live.problem or "The live version is still being loaded."}, 503)
        return JSONResponse({"status": "ready", "version": service.version.number, "trouble": service.live.problem})


def _to_click(click: schemas.ClickIn, version: LoadedVersion) -> Click:
    """Convert a click for the journal. Raises LogError if it does not fit the log."""
    read_options, now = version.bundle.read_options, datetime.now(UTC)
    timestamp = click.timestamp or now
    timestamp = timestamp if timestamp.tzinfo else timestamp.replace(tzinfo=UTC)
    if not timestamp >= MIN_TIMESTAMP or (timestamp - now).total_seconds() > MAX_CLOCK_SKEW_S:
        raise LogError(
            f"The timestamp {timestamp:%Y-%m-%d %H:%M} is before 1980 or in the future. Send the time of the click in "
            "UTC."
        )
    if read_options.events and click.event not in read_options.events:
        raise LogError(f"The log needs an event type. Set `event` to one of {', '.join(read_options.events)}.")
    event_id, category = (None if value is None else str(value) for value in (click.event_id, click.category))
    if not read_options.has_clock:  # without timestamps, only an id identifies a click
        event_id = event_id or uuid.uuid4().hex
    return Click(click.user_id, click.item_id, to_microseconds(timestamp), event_id, category, click.event)


def _require_known(catalog: Any, name: str, given: str) -> None:
    """Raise 404 for an id that is not in a catalog."""
    if not int(catalog.rows(normalize_ids(name, given, catalog))):
        raise HTTPException(404, f"No event has this {name}. Check the id.")


def _require_category(version: LoadedVersion, category: str | None) -> None:
    """Raise 404 for an unknown category."""
    if category is not None and not (version.served.categories["category"] == category).any():
        raise HTTPException(404, "No item has this category. Check its name.")


def _require_token(service: Service, request: Request) -> None:
    """Raise 403 if the server has no token."""
    if not has_token(request.scope, service.limits.token):
        raise HTTPException(403, "This needs a server with a token. Start it with `freshrec serve --token-file FILE`.")


ROUTES = (
    add_list_routes,
    add_similar_routes,
    add_event_routes,
    add_user_routes,
    add_erasure_routes,
    add_version_routes,
    add_health_routes,
)
