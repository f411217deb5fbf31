"""The profile of a user: past events, and interests with their best items and closest past events.

The server and `freshrec inspect` show the same profile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from freshrec.data.moments import format_time
from freshrec.models.blend.model import Blend
from freshrec.models.item_knn import ItemKNN
from freshrec.nn.scoring import item_vectors, user_vectors
from freshrec.recommender.click_overlay import current_targets
from freshrec.recommender.ids import column_tensor, resolve_request
from freshrec.recommender.list_request import Id, ListRequest
from freshrec.recommender.lists import top_items, user_batch
from freshrec.recommender.served_state import ServedState
from freshrec.text_layout import printable_id
from freshrec.types import InterestModel, VectorModel

N_ITEMS = 10  # items and events shown per interest
N_LISTED = 30  # length of the list that is grouped by past event, for models without vectors


@dataclass(frozen=True)
class PastEvent:
    """An item of the user's history and its time: ISO 8601, or a position in the log if it has no timestamps."""

    item_id: Id
    at: str | int


@dataclass(frozen=True)
class Interest:
    """A group of items that the user may like, and the past events that support it."""

    title: str
    items: list[tuple[Id, float]]  # ids and scores, best first
    events: list[PastEvent]
    born_span: int | None = None  # None for an interest that is not stored
    used_span: int | None = None


@dataclass(frozen=True)
class Profile:
    """Events and interests of a user."""

    n_fresh: int  # number of events that no version has learned yet
    first_span: int | None  # None for a user who is in no version yet
    last_span: int | None
    events: list[PastEvent]  # all events, in time order
    interests: list[Interest]
    kind: str  # description of `interests`


def profile_of(served: ServedState, row: int, has_clock: bool) -> Profile:
    """Return the profile of the user in a row (not row 0). `has_clock`: whether the log has timestamps."""
    items_T, times_T = user_events(served, row)
    events = past_events(served, items_T, times_T, has_clock)
    is_in_catalog = row <= len(served.users)
    catalog_row = (
        served.users.frame.row(row - 1, named=True) if is_in_catalog else {"first_span": None, "last_span": None}
    )
    kind, interests = _interests(served, row, items_T, events)
    n_fresh = len(served.overlay.clicks.get(row, ()))
    return Profile(n_fresh, catalog_row["first_span"], catalog_row["last_span"], events, interests, kind)


def user_events(served: ServedState, row: int) -> tuple[Tensor, Tensor]:
    """Return items and times of all events of a user, in time order, shape (T,) each."""
    ends = current_targets(served.counts.histories, served.overlay, torch.tensor([row]))
    rows = slice(int(ends.first_row_N), int(ends.rows_N))
    items_T, times_T = ends.histories.items_R[rows].long(), ends.histories.times_R[rows]
    order_T = times_T.argsort(stable=True)
    return items_T[order_T], times_T[order_T]


def past_events(served: ServedState, items_T: Tensor, times_T: Tensor, has_clock: bool) -> list[PastEvent]:
    """Return events with ids instead of rows, and with readable times."""
    times = times_T.tolist()
    when = map(format_time, times) if has_clock else times
    return [PastEvent(item, at) for item, at in zip(served.items.ids(items_T), when)]


def _interests(served: ServedState, row: int, items_T: Tensor, events: list[PastEvent]) -> tuple[str, list[Interest]]:
    """Return the kind of interests in words, and the interests: user vectors, or groups of recommended items."""
    model = served.current_state.model
    if isinstance(model, VectorModel):
        return _interests_of_vectors(served, model, row, items_T, events)
    counter = model.experts.counters["item-knn"] if isinstance(model, Blend) else model
    if isinstance(counter, ItemKNN):
        return _interests_of_pairs(served, counter, row, items_T, events)
    return "this model has no interests", []


def _interests_of_pairs(
    served: ServedState, counter: ItemKNN, row: int, items_T: Tensor, events: list[PastEvent]
) -> tuple[str, list[Interest]]:
    """Group the items of the user's list by the past event that supports each most."""
    user_1 = torch.tensor([row])
    found = top_items(served, user_1, resolve_request(served, ListRequest(k=N_LISTED)))
    batch, groups = user_batch(served, user_1), dict[int, list[int]]()
    for at, item in enumerate(found["item"]):
        groups.setdefault(counter.most_influential_item(batch, item), []).append(at)
    interests = []
    for because, places in sorted(groups.items(), key=lambda group: (group[0] == 0, -len(group[1]))):
        name = printable_id(served.items.ids(torch.tensor([because]))[0]) if because else None
        title = f"because of item {name}" if because else "popular, or liked by similar users"
        index = torch.tensor(places)[:N_ITEMS]
        items = _items_with_scores(served, column_tensor(found)[index], column_tensor(found, "score")[index])
        interests.append(Interest(title, items, _select_events(events, items_T == because)))
    return "items of the user's list, grouped by the past event that supports each most", interests


def _interests_of_vectors(
    served: ServedState, model: VectorModel, row: int, items_T: Tensor, events: list[PastEvent]
) -> tuple[str, list[Interest]]:
    """Describe each vector of the user by its best items and by the past events closest to it."""
    batch = user_batch(served, torch.tensor([row]))
    n = int(batch.alive_BK.sum()) if batch.alive_BK is not None else None
    vectors_KD, items_ID = user_vectors(model, batch)[0][:n], item_vectors(model)
    scores_KI = vectors_KD @ items_ID.T
    scores_KI[:, 0] = -torch.inf
    best_KN = scores_KI.topk(min(N_ITEMS, model.n_items))
    learned_T = torch.where(items_T <= model.n_items, items_T, 0)
    closest_T = scores_KI[:, learned_T].argmax(0)
    born_K, used_K = _spans_of_interests(served, row, len(vectors_KD))
    interests = []
    for k in range(len(vectors_KD)):
        title = f"interest {k + 1}" if len(vectors_KD) > 1 else "current vector of the user"
        items = _items_with_scores(served, best_KN.indices[k], best_KN.values[k])
        reasons = _select_events(events, (closest_T == k) & (learned_T > 0))[-N_ITEMS:]
        interests.append(Interest(title, items, reasons, born_K[k], used_K[k]))
    is_stored = isinstance(model, InterestModel)
    return "interests" if is_stored else "vectors, computed from the user's most recent events", interests


def _spans_of_interests(served: ServedState, row: int, n: int) -> tuple[list[int | None], list[int | None]]:
    """Spans that created and last used each of the user's n interests; None for an interest that is not stored."""
    born, used = list[int | None]([None] * n), list[int | None]([None] * n)
    interests = served.current_state.interests
    if interests is not None and row <= interests.n_users:
        rows = slice(int(interests.offsets_U[row]), int(interests.offsets_U[row + 1]))
        n_stored = len(interests.born_S[rows])
        born[:n_stored], used[:n_stored] = interests.born_S[rows].tolist(), interests.used_S[rows].tolist()
    return born[:n], used[:n]


def _items_with_scores(served: ServedState, rows_N: Tensor, scores_N: Tensor) -> list[tuple[Id, float]]:
    return list(zip(served.items.ids(rows_N), scores_N.tolist()))


def _select_events(events: list[PastEvent], is_selected_T: Tensor) -> list[PastEvent]:
    return [events[place] for place in is_selected_T.nonzero()[:, 0].tolist()]
