"""The routes of the API. Each checks the request, calls a handler in a worker thread, and returns the version."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from freshrec.errors import OptionError
from freshrec.server import schemas
from freshrec.server.event_routes import add_event_routes
from freshrec.server.list_routes import add_list_routes, add_similar_routes
from freshrec.server.parameters import ERROR_RESPONSES, error_response, require_token
from freshrec.server.service import Service, describe_version
from freshrec.server.user_routes import add_erasure_routes, add_explanation_routes, add_user_routes

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
        moves = [move.model_dump(exclude={"store"}) for move in reversed(store.moves())]
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
        require_token(service, request)
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


ROUTES = (
    add_list_routes,
    add_similar_routes,
    add_event_routes,
    add_explanation_routes,
    add_user_routes,
    add_erasure_routes,
    add_version_routes,
    add_health_routes,
)
