"""Ids of HTTP requests. A look-up of an id that cannot be in the log finds nothing; a click with one is refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from freshrec.data.catalog import Catalog
from freshrec.data.identities import json_id
from freshrec.errors import LogError
from freshrec.recommender.ids import normalize_id
from freshrec.recommender.list_request import Id, ListRequest
from freshrec.recommender.served_state import ServedState
from freshrec.store.click_journal import Click


def possible_id(catalog: Catalog, value: Id) -> Id | None:
    """Return an id as the type of a catalog; None if no id of the log can be this one."""
    try:
        return normalize_id("id", value, catalog)
    except LogError:
        return None


def item_row(served: ServedState, item: Id) -> int:
    """Return the row of an item; 0 if it is unknown."""
    item_id = possible_id(served.items, item)
    return 0 if item_id is None else served.items.row(item_id)


def without_impossible_items(served: ServedState, request: ListRequest) -> ListRequest:
    """Return a request without items that cannot be in the log. Lists ignore them, as they ignore unknown items."""
    allow = None if request.allow is None else _possible_items(served, request.allow)
    return replace(request, allow=allow, deny=_possible_items(served, request.deny))


def _possible_items(served: ServedState, items: Iterable[Id]) -> tuple[Id, ...]:
    found = (possible_id(served.items, item) for item in items)
    return tuple(item for item in found if item is not None)


def check_click_ids(served: ServedState, click: Click) -> Click:
    """Return a click with ids of the types of the log. Raises LogError for an id that cannot be one of the log."""
    user_id = normalize_id("user_id", click.user_id, served.users)
    item_id = normalize_id("item_id", click.item_id, served.items)
    require_exact("user_id", click.user_id, bool(served.users.row(user_id)) or user_id in served.overlay.new_users)
    require_exact("item_id", click.item_id, bool(served.items.row(item_id)))
    return click._replace(user_id=user_id, item_id=item_id)


def require_exact(name: str, value: Id, is_known: bool = False) -> Id:
    """Return a sent id. Raises LogError for an unknown number beyond 2^53, which the client may have rounded."""
    if not is_known and json_id(value) != value:
        raise LogError(
            f"{name} is the unknown number {value}. Many programs round numbers beyond 2^53. Send it as text."
        )
    return value
