"""The HTTP application: routes, error handlers, metrics and pages."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import generate_latest

from freshrec.errors import BusyError, FreshrecError, IncompatibleError, LogError, OptionError, StateError
from freshrec.server.middleware import RequestMiddleware
from freshrec.server.parameters import ERROR_RESPONSES, refuse_unknown_parameters
from freshrec.server.routes import ROUTES
from freshrec.server.service import Service
from freshrec.version import __version__

PAGE_FOLDER = Path(__file__).parent / "page"
API_DESCRIPTION = """\
Recommendations from the live version of a store.

Every answer with data names the `version` that it was computed from. If a list is not personal, `fallback` gives the
reason. An error is a status of 4xx or 5xx with a sentence in `detail`. If the server has a token, send it with each
request: `Authorization: Bearer TOKEN`.
"""
API_TAGS = [
    {"name": "lists", "description": "Recommendations and similar items."},
    {"name": "events", "description": "Clicks. They change lists at once; the next update trains on them."},
    {"name": "people", "description": "Profiles and explanations for users, and erasing a user."},
    {"name": "versions", "description": "The live version, all versions, and rolling back."},
    {"name": "health", "description": "Probes and metrics for operators."},
]
STATUS_BY_ERROR = {LogError: 422, OptionError: 409, IncompatibleError: 409, BusyError: 409, StateError: 409}


def create_app(service: Service) -> RequestMiddleware:
    """Build the application and its middleware."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.live.stop()
        service.workers.shutdown(wait=True)

    app = FastAPI(
        title="freshrec",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        description=API_DESCRIPTION,
        openapi_tags=API_TAGS,
        dependencies=[Depends(refuse_unknown_parameters)],
        responses={code: ERROR_RESPONSES[code] for code in (401, 403, 408, 409, 413, 421, 422, 429)},
    )
    _add_error_handlers(app)
    for add_routes in ROUTES:
        add_routes(app, service)
    _add_page_routes(app, service)
    return RequestMiddleware(app, service.limits, service.metrics)


def _add_error_handlers(app: FastAPI) -> None:
    """Turn every exception into a status and a sentence."""

    @app.exception_handler(FreshrecError)
    async def handle_freshrec_error(request: Request, error: FreshrecError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, STATUS_BY_ERROR.get(type(error), 409))

    @app.exception_handler(RequestValidationError)
    async def handle_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": _describe_validation_errors(error.errors())}, 422)

    @app.exception_handler(Exception)
    async def handle_unexpected_error(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": "Internal server error. The log of the server has the details."}, 500)


def _describe_validation_errors(errors: Sequence[Any]) -> str:
    """Return a sentence about the first error of a request."""
    wrong = next((entry for entry in errors if entry["type"] != "int_type"), errors[0])  # an id may also be text
    reason = wrong["msg"].removeprefix("Value error, ")[:200].rstrip(".")
    if wrong is not errors[0] and wrong["type"] == "string_type":  # it is neither
        reason = "Input should be a valid integer or text"
    added = ("constrained-", "function-")  # by pydantic, for the types of an id
    where = ".".join(str(part) for part in wrong["loc"] if not str(part).startswith(added) and len(str(part)) < 40)
    return f"{where}: {reason}."


def _add_page_routes(app: FastAPI, service: Service) -> None:
    """Add the metrics, the page for people and the page of the API."""

    @app.get(
        "/metrics",
        tags=["health"],
        summary="Metrics",
        response_class=PlainTextResponse,
        response_description="The metrics as text.",
    )
    async def metrics() -> Response:
        """Return the metrics of the server in the Prometheus text format: latencies, fallbacks, clicks, version."""
        gauges, live = service.metrics, service.live
        gauges.version.set(service.version.number)
        gauges.index_recall.set(service.version.search_info.recall)
        gauges.swaps.set(live.n_swaps)
        gauges.version_refused.set(1 if live.problem else 0)
        if (newest := live.newest_time) is not None:
            gauges.newest_event_age.set(time.time() - newest / 1e6)
        return Response(generate_latest(gauges.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    for path, name, kind in (
        ("/", "page.html", "text/html"),
        ("/docs", "docs.html", "text/html"),
        ("/page.css", "page.css", "text/css"),
        ("/page.js", "page.js", "text/javascript"),
    ):
        body = (PAGE_FOLDER / name).read_bytes()

        async def page(body: bytes = body, kind: str = kind) -> Response:
            return Response(body, media_type=kind)

        app.add_api_route(path, page, include_in_schema=False, response_class=HTMLResponse)
