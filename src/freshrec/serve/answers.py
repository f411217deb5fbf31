"""Answers to what is asked over HTTP: from one version and ids to plain values. Nothing here knows HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from freshrec.serve import asked
from freshrec.serve.explain import reasons
from freshrec.serve.index import Searching
from freshrec.serve.list_request import ListRequest
from freshrec.serve.profile import Interest, PastEvent, profile_of
from freshrec.serve.reading import id_of, ids_of, known_rows, resolve_request, rows_of
from freshrec.serve.recommend import WHY, Served, lists_of, similar_items
from freshrec.serve.saved import Kept
from freshrec.store.versions import Manifest

PAST = 30  # events of a user


@dataclass(frozen=True, eq=False)
class Version:
    """All of one version that answers come from, and what changes with it."""

    about: Manifest
    kept: Kept
    searching: Searching
    live_since: str

    @property
    def served(self) -> Served:
        """What it serves."""
        return self.kept.served

    @property
    def number(self) -> int:
        """Its number."""
        return self.about.id


def row_of(version: Version, user: int | str) -> int:
    """The row of a user, known to the version or since; 0: a stranger. LogError where it cannot be an id."""
    served = version.served
    one = id_of("user_id", user, served.users)
    row = served.users.row(one) or served.fresh.newcomers.get(one, 0)
    return 0 if row in served.fresh.gone else row


def recommend(version: Version, users: Sequence[int | str], request: ListRequest) -> list[asked.Listed]:
    """The lists of some users, in the order asked. OptionError for an unknown category."""
    users_N = torch.tensor([row_of(version, user) for user in users])
    found = lists_of(version.served, users_N, resolve_request(version.served, request))
    lists, ids = [], version.served.items.column
    columns = (found.items_NK.tolist(), found.scores_NK.tolist(), found.why_NK.tolist())
    for user, items, scores, why in zip(users, *columns):
        listed = [
            asked.Item(item_id=ids.item(items[at] - 1), score=scores[at], rank=at + 1, fallback=WHY[why[at]])
            for at in range(len(items)) if items[at]
        ]  # fmt: skip
        lists.append(asked.Listed(user_id=user, items=listed, fallback=WHY[max(why, default=0)]))
    return lists


def similar(version: Version, item: str, k: int) -> list[asked.Item]:
    """The items most like one. OptionError where it is not known."""
    rows_N = known_rows(ids_of("item_id", item, version.served.items), version.served.items)
    found = similar_items(version.served, rows_N, k)
    return _items(version, rows_of(found), rows_of(found, "score"))


def person(version: Version, user: str) -> asked.Person | None:
    """What is known of a user, the newest events last; None of a stranger."""
    row = row_of(version, user)
    if not row:
        return None
    found = profile_of(version.served, row, version.kept.reading.has_clock)
    return asked.Person(
        version=version.number, user_id=user, n_events=len(found.events), n_fresh=found.n_fresh,
        first_span=found.first_span, last_span=found.last_span, events=_past(found.events[-PAST:]),
        interests=[_interest(one) for one in found.interests], kind=found.kind,
    )  # fmt: skip


def _interest(one: Interest) -> asked.Interest:
    items = [asked.Item(item_id=item, score=score, rank=n + 1) for n, (item, score) in enumerate(one.items)]
    return asked.Interest(
        title=one.title, items=items, events=_past(one.events), born_span=one.born_span, used_span=one.used_span
    )


def _past(events: list[PastEvent]) -> list[asked.Past]:
    return [asked.Past(item_id=event.item_id, at=event.at) for event in events]


def explain(version: Version, user: str, item: str) -> asked.Explained:
    """Why a user is offered an item. OptionError for unknown ids, IncompatibleError for models that cannot say."""
    served = version.served
    row, item_row = row_of(version, user), int(known_rows(ids_of("item_id", item, served.items), served.items))
    if not row:
        known_rows(ids_of("user_id", user, served.users), served.users)
    found = [
        asked.Reason(source=source, place=place, points=points, because=_name(served, because))
        for source, place, points, because in reasons(served, torch.tensor([row]), item_row).iter_rows()
    ]
    return asked.Explained(version=version.number, user_id=user, item_id=item, offered=bool(found), reasons=found)


def _name(served: Served, item: int) -> int | str | None:
    name: int | str | None = served.items.ids(torch.tensor([item]))[0]
    return name


def _items(version: Version, rows_N: Tensor, scores_N: Tensor) -> list[asked.Item]:
    ids = version.served.items.ids(rows_N)
    return [asked.Item(item_id=i, score=s, rank=n + 1) for n, (i, s) in enumerate(zip(ids, scores_N.tolist()))]
