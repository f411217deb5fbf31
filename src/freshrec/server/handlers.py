"""Handlers of requests: from a version and ids to responses. They do not depend on HTTP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from freshrec.recommender.explain import explain_item
from freshrec.recommender.ids import column_tensor, normalize_ids, require_rows, resolve_request
from freshrec.recommender.list_request import ListRequest
from freshrec.recommender.lists import FALLBACK_REASONS, make_lists, similar_items
from freshrec.recommender.search import SearchInfo
from freshrec.recommender.served_state import ServedState
from freshrec.recommender.serving_bundle import ServingBundle
from freshrec.recommender.user_profile import Interest, PastEvent, profile_of
from freshrec.server import schemas
from freshrec.server.request_ids import possible_id, without_impossible_items
from freshrec.store.erasures import Erasures
from freshrec.store.manifest import Manifest

N_PAST_EVENTS = 30  # most recent events in a user's profile


@dataclass(eq=False)
class HiddenUsers:
    """Users that a version in memory must not show, because they are being erased or were erased after it was loaded.

    The erasures are replaced when the store has others. All requests to the version see the new ones.
    """

    erasures: Erasures = field(default_factory=Erasures)
    n_known: int = 0  # number of the last erasure before the version was loaded
    requested: Counter[int | str] = field(default_factory=Counter)  # users whose erasure this server has requested

    def __contains__(self, user_id: int | str) -> bool:
        return user_id in self.requested or self.erasures.hides(user_id, self.n_known)


@dataclass(frozen=True, eq=False)
class LoadedVersion:
    """A version in memory, with everything that is swapped together with it."""

    manifest: Manifest
    bundle: ServingBundle
    search_info: SearchInfo
    live_since: str
    hidden: HiddenUsers = field(default_factory=HiddenUsers)

    @property
    def served(self) -> ServedState:
        """The state that lists are computed from."""
        return self.bundle.served

    @property
    def number(self) -> int:
        """The number of the version."""
        return self.manifest.id


def user_row(version: LoadedVersion, user: int | str) -> int:
    """Return the row of a user of version or overlay; 0 if unknown."""
    served = version.served
    user_id = possible_id(served.users, user)
    if user_id is None:
        return 0
    row = served.users.row(user_id) or served.overlay.new_users.get(user_id, 0)
    return 0 if row and user_id in version.hidden else row


def n_past_events(version: LoadedVersion, user: int | str) -> int:
    """Return the number of events that a list of the user leaves out."""
    row, served = user_row(version, user), version.served
    return int(served.n_seen(torch.tensor([row]))) + len(served.overlay.clicks.get(row, ()))


def recommend(version: LoadedVersion, users: Sequence[int | str], request: ListRequest) -> list[schemas.UserList]:
    """Recommend lists for users, in the given order. Raises OptionError for an unknown category."""
    users_N = torch.tensor([user_row(version, user) for user in users])
    request = without_impossible_items(version.served, request)
    found = make_lists(version.served, users_N, resolve_request(version.served, request))
    lists, ids = [], version.served.items.id_column
    columns = (found.items_NK.tolist(), found.scores_NK.tolist(), found.fallback_NK.tolist())
    for user, items, scores, reasons in zip(users, *columns):
        listed = [
            schemas.RankedItem(
                item_id=ids.item(items[at] - 1), score=scores[at], rank=at + 1, fallback=FALLBACK_REASONS[reasons[at]]
            )
            for at in range(len(items))
            if items[at]
        ]
        lists.append(schemas.UserList(user_id=user, items=listed, fallback=FALLBACK_REASONS[max(reasons, default=0)]))
    return lists


def similar(version: LoadedVersion, item: str, k: int) -> list[schemas.RankedItem]:
    """Return the items most similar to one. Raises OptionError for an unknown item."""
    rows_N = require_rows(normalize_ids("item_id", item, version.served.items), version.served.items)
    found = similar_items(version.served, rows_N, k)
    return _rank_items(version, column_tensor(found), column_tensor(found, "score"))


def user_profile(version: LoadedVersion, user: str) -> schemas.UserProfile | None:
    """Return the profile of a user, newest events last; None for an unknown user."""
    row = user_row(version, user)
    if not row:
        return None
    found = profile_of(version.served, row, version.bundle.read_options.has_clock)
    return schemas.UserProfile(
        version=version.number,
        user_id=user,
        n_events=len(found.events),
        n_fresh=found.n_fresh,
        first_span=found.first_span,
        last_span=found.last_span,
        events=_past_events(found.events[-N_PAST_EVENTS:]),
        interests=[_interest_card(interest) for interest in found.interests],
        kind=found.kind,
    )


def _interest_card(interest: Interest) -> schemas.InterestCard:
    return schemas.InterestCard(
        title=interest.title,
        items=[schemas.RankedItem(item_id=i, score=s, rank=n + 1) for n, (i, s) in enumerate(interest.items)],
        events=_past_events(interest.events),
        born_span=interest.born_span,
        used_span=interest.used_span,
    )


def _past_events(events: list[PastEvent]) -> list[schemas.PastEvent]:
    return [schemas.PastEvent(item_id=event.item_id, at=event.at) for event in events]


def explain(version: LoadedVersion, user: str, item: str) -> schemas.ExplanationResponse:
    """Explain why a user is offered an item.

    Raises OptionError for unknown ids, IncompatibleError if the model cannot explain.
    """
    served = version.served
    row = user_row(version, user)
    item_row = int(require_rows(normalize_ids("item_id", item, served.items), served.items))
    if not row:
        require_rows(normalize_ids("user_id", user, served.users), served.users)
    found = [
        schemas.ExplanationReason(source=source, place=place, points=points, because=_item_id(served, because))
        for source, place, points, because in explain_item(served, torch.tensor([row]), item_row).iter_rows()
    ]
    return schemas.ExplanationResponse(
        version=version.number, user_id=user, item_id=item, offered=bool(found), reasons=found
    )


def _item_id(served: ServedState, item: int) -> int | str | None:
    name: int | str | None = served.items.ids(torch.tensor([item]))[0]
    return name


def _rank_items(version: LoadedVersion, rows_N: Tensor, scores_N: Tensor) -> list[schemas.RankedItem]:
    ids = version.served.items.ids(rows_N)
    return [schemas.RankedItem(item_id=i, score=s, rank=n + 1) for n, (i, s) in enumerate(zip(ids, scores_N.tolist()))]
