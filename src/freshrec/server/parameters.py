"""What routes share: parameters of URLs, descriptions of errors, and the check of the token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import HTTPException, Query, Request
from pydantic import Field

from freshrec.errors import unknown_name_error
from freshrec.recommender.list_request import DEFAULTS, ListRequest, help_of
from freshrec.server import schemas
from freshrec.server.middleware import has_token
from freshrec.server.service import Service

Handler = TypeVar("Handler", bound=Callable[..., Any])

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


# A parameter is part of the path if the path names it, and part of the query otherwise.
UserId = Annotated[schemas.ShortText, Field(description="Id of the user.", examples=["user-1"])]
ItemId = Annotated[schemas.ShortText, Field(description="Id of the item.", examples=["item-1"])]
KQuery = Annotated[schemas.ListLength, Query(description=help_of("k"))]
IdsQuery = Annotated[list[schemas.ShortText] | None, Field(max_length=schemas.MAX_IDS)]


def add_with_both_paths(
    add: Callable[..., Callable[[Handler], Handler]],
    paths: tuple[str, str],
    handler: Handler,
    *,
    tag: str,
    summary: str,
    answer: str,
    answer_model: Any,
    responses: dict[int | str, dict[str, Any]],
) -> None:
    """Add a route with the id in its path, and the same one with the id in the query.

    `add` is a method of the application, such as `app.get`. `answer` describes the response, and `answer_model` is its
    type.
    """
    for path, summary_of_path in zip(paths, (summary, f"{summary}, with the id in the query")):
        add(
            path,
            tags=[tag],
            summary=summary_of_path,
            response_description=answer,
            response_model=answer_model,
            responses=responses,
        )(handler)


async def read_list_options(
    k: KQuery = DEFAULTS.k,
    exclude_seen: Annotated[bool, Query(description=help_of("exclude_seen"))] = DEFAULTS.exclude_seen,
    allow: Annotated[IdsQuery, Query(description=help_of("allow"))] = None,
    deny: Annotated[IdsQuery, Query(description=help_of("deny"))] = None,
    category: Annotated[schemas.ShortText | None, Query(description=help_of("category"))] = None,
    diversity: Annotated[schemas.DiversityWeight, Query(description=help_of("diversity"))] = DEFAULTS.diversity,
) -> ListRequest:
    """Return the options of a list in a query."""
    allowed = None if allow is None else tuple(allow)
    return ListRequest(k, exclude_seen, allowed, tuple(deny or ()), category, diversity)


async def refuse_unknown_parameters(request: Request) -> None:
    """Raise 422 for a parameter of the query that the route does not have, and for a repeated one that is no list.

    Pages, metrics and health checks ignore such parameters.
    """
    route = request.scope["route"]
    if not request.query_params or not route.include_in_schema or "health" in route.tags:
        return
    described = request.app.openapi()["paths"][route.path_format][request.method.lower()].get("parameters", [])
    schema_of = {parameter["name"]: parameter["schema"] for parameter in described if parameter["in"] == "query"}
    for name in request.query_params:
        if name not in schema_of:
            raise HTTPException(422, str(unknown_name_error("parameter", name, schema_of)))
        n_values = len(request.query_params.getlist(name))
        if n_values > 1 and not any(part.get("type") == "array" for part in schema_of[name].get("anyOf", [])):
            raise HTTPException(422, f"The parameter {name} is given {n_values} times. Give it once.")


def require_token(service: Service, request: Request) -> None:
    """Raise 403 if the server has no token."""
    if not has_token(request.scope, service.limits.token):
        raise HTTPException(403, "This needs a server with a token. Start it with `freshrec serve --token-file FILE`.")
