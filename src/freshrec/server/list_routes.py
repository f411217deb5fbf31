"""The routes of lists: recommendations and similar items.

A route with an id in its path has a second path with the id in the query. The second one takes every id: clients change
paths with `.` or `..` before they send them.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import Response

from freshrec.recommender.list_request import DEFAULTS, Id, ListRequest
from freshrec.server import handlers, schemas
from freshrec.server.handlers import LoadedVersion
from freshrec.server.parameters import ItemId, KQuery, UserId, add_with_both_paths, error_response, read_list_options
from freshrec.server.request_ids import item_row
from freshrec.server.service import Service


def add_list_routes(app: FastAPI, service: Service) -> None:
    """Add recommendations."""
    no_category = error_response(404, "No item has this category.")

    async def recommend(user: UserId, options: Annotated[ListRequest, Depends(read_list_options)]) -> Response:
        """Return the best items for one user. An unknown user gets popular items, and `fallback` gives the reason."""
        version = service.version
        _require_category(version, options.category)
        found = await service.batcher.recommend(version, user, options)
        service.count_fallbacks([found])
        answer = schemas.RecommendResponse(
            version=version.number, user_id=user, items=found.items, fallback=found.fallback
        )
        return Response(answer.model_dump_json(), media_type="application/json")

    add_with_both_paths(
        app.get,
        ("/recommend/{user:path}", "/recommend"),
        recommend,
        tag="lists",
        summary="Recommend items to a user",
        answer="The list of the user.",
        answer_model=schemas.RecommendResponse,
        responses=no_category,
    )

    @app.post(
        "/recommend",
        tags=["lists"],
        summary="Recommend items to several users",
        response_description="The lists, in the order of the users.",
        responses=no_category,
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

    async def similar(item: ItemId, k: KQuery = DEFAULTS.k) -> schemas.SimilarResponse:
        """Return the items that are most similar to one item.

        Models with vectors compare them by cosine. Other models count how often two items occur together.
        """
        version = service.version
        require_item(version, item)
        items = await service.run_in_worker(lambda: handlers.similar(version, item, k))
        return schemas.SimilarResponse(version=version.number, item_id=item, items=items)

    add_with_both_paths(
        app.get,
        ("/similar/{item:path}", "/similar"),
        similar,
        tag="lists",
        summary="Similar items",
        answer="The similar items.",
        answer_model=schemas.SimilarResponse,
        responses=error_response(404, "The item is unknown."),
    )


def require_item(version: LoadedVersion, item: str) -> None:
    """Raise 404 for an unknown item."""
    if not item_row(version.served, item):
        raise HTTPException(404, "No event has this item_id. Check the id.")


def _require_category(version: LoadedVersion, category: Id | None) -> None:
    """Raise 404 for an unknown category."""
    if category is not None and not (version.served.categories["category"] == str(category)).any():
        raise HTTPException(404, "No item has this category. Check its name.")
