"""The routes of users: explanations, profiles, changes of lists, and erasure. See list_routes.py for their paths."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, HTTPException, Request

from freshrec.errors import BusyError
from freshrec.recommender.ids import normalize_id
from freshrec.recommender.list_request import ListRequest
from freshrec.recommender.search import EXACT_SEARCH
from freshrec.server import handlers, schemas
from freshrec.server.handlers import LoadedVersion
from freshrec.server.list_routes import require_item
from freshrec.server.live_version import load_version
from freshrec.server.parameters import (
    ERROR_RESPONSES,
    ItemId,
    KQuery,
    UserId,
    add_with_both_paths,
    error_response,
    require_token,
)
from freshrec.server.service import Service


def add_explanation_routes(app: FastAPI, service: Service) -> None:
    """Add explanations."""

    async def explain(user: UserId, item: ItemId) -> schemas.ExplanationResponse:
        """Return the reasons why a user is offered an item: experts or interests, and past items of the user."""
        version = service.version
        require_item(version, item)
        if not handlers.user_row(version, user):
            raise HTTPException(404, "This user has no events, so there is nothing to explain.")
        return await service.run_in_worker(lambda: handlers.explain(version, user, item))

    add_with_both_paths(
        app.get,
        ("/explain/{user}/{item}", "/explain"),
        explain,
        tag="people",
        summary="Explain a recommendation",
        answer="The reasons.",
        answer_model=schemas.ExplanationResponse,
        responses=error_response(404, "The user or the item is unknown."),
    )


def add_user_routes(app: FastAPI, service: Service) -> None:
    """Add profiles and changes of users."""

    async def interests(user: UserId) -> schemas.UserProfile:
        """Return the profile of a user: recent events, and interests with their best items and their events."""
        version = service.version
        found = await service.run_in_worker(lambda: handlers.user_profile(version, user))
        if found is None:
            raise HTTPException(404, "This user has no events. GET /recommend returns popular items.")
        return found

    add_with_both_paths(
        app.get,
        ("/users/{user:path}/interests", "/users/interests"),
        interests,
        tag="people",
        summary="Profile of a user",
        answer="The profile.",
        answer_model=schemas.UserProfile,
        responses=error_response(404, "The user is unknown."),
    )

    async def changes(user: UserId, k: KQuery = 20) -> schemas.ListChanges:
        """Compare the list of a user with that of the parent version, which is loaded for this request."""
        version = service.version
        parent = version.manifest.parent
        if parent is None:
            raise HTTPException(404, "The live version is the first one, so there is nothing to compare.")
        if not handlers.user_row(version, user):
            raise HTTPException(404, "This user has no events, so there is nothing to compare.")
        return await service.run_in_worker(lambda: _compare_lists(service, version, parent, user, k))

    add_with_both_paths(
        app.get,
        ("/users/{user:path}/changes", "/users/changes"),
        changes,
        tag="people",
        summary="Changes since the parent version",
        answer="The differences between the two lists.",
        answer_model=schemas.ListChanges,
        responses=error_response(404, "The user is unknown, or the live version has no parent version."),
    )


def add_erasure_routes(app: FastAPI, service: Service) -> None:
    """Add the erasure of users."""

    async def leave(user: UserId, request: Request) -> dict[str, Any]:
        """Erase a user from the log, the clicks and all versions, and return a receipt. This needs the token."""
        require_token(service, request)
        normalize_id("user_id", user, service.version.served.users)  # LogError for an id that cannot be in the log

        def work() -> dict[str, Any]:
            with service.live.erasing(user):
                return service.erase(user)

        receipt = await asyncio.to_thread(work)
        return {"version": service.version.number, **receipt}

    add_with_both_paths(
        app.delete,
        ("/users/{user:path}", "/users"),
        leave,
        tag="people",
        summary="Erase a user",
        answer="A receipt: what was deleted.",
        answer_model=dict[str, Any],
        responses={403: ERROR_RESPONSES[403]},
    )


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
