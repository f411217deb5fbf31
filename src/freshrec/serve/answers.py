"""Answers to what is asked over HTTP: from one version and ids to plain values. Nothing here knows HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from freshrec.models.blend import Blend
from freshrec.models.pairs import Pairs
from freshrec.models.scoring import item_vectors, user_vectors
from freshrec.serve import asked
from freshrec.serve.explain import reasons
from freshrec.serve.fresh import asked_of
from freshrec.serve.index import Searching
from freshrec.serve.reading import Ids, id_of, ids_of, item_rows, known_rows, of_category, rows_of
from freshrec.serve.recommend import WHY, Served, Wanted, batch_of_user, best_items, lists_of, similar_items
from freshrec.serve.saved import Kept
from freshrec.store.versions import Manifest
from freshrec.types import InterestModel, VectorModel

SHOWN = 10  # items of an interest
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


def wanted(version: Version, by: asked.Asked) -> Wanted:
    """What the lists may hold. OptionError for a category that is not known."""
    served = version.served
    allow_M = None if by.allow is None else item_rows(served, _alike(by.allow))
    if by.category is not None:
        allow_M = of_category(served, by.category, allow_M)
    deny_M = item_rows(served, _alike(by.deny)) if by.deny else torch.zeros(0, dtype=torch.int64)
    return Wanted(by.k, by.exclude_seen, allow_M, deny_M, by.diversity)


def _alike(ids: list[int | str]) -> Ids:
    """Ids of one kind: text, where some are."""
    if all(isinstance(one, int) for one in ids):
        return [one for one in ids if isinstance(one, int)]
    return [str(one) for one in ids]


def recommend(version: Version, by: asked.Asked) -> list[asked.Listed]:
    """The lists of some users, in the order asked."""
    users_N = torch.tensor([row_of(version, user) for user in by.users])
    found = lists_of(version.served, users_N, wanted(version, by))
    lists, ids = [], version.served.items.column
    columns = (found.items_NK.tolist(), found.scores_NK.tolist(), found.why_NK.tolist())
    for user, items, scores, why in zip(by.users, *columns):
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
    served, row = version.served, row_of(version, user)
    if not row:
        return None
    ends = asked_of(served.counts.recent, served.fresh, torch.tensor([row]))
    rows = slice(int(ends.from_N), int(ends.rows_N))
    items, times = ends.histories.items_R[rows].long(), ends.histories.times_R[rows]
    order = times.argsort(stable=True)
    events = _past(version, items[order], times[order])
    about = served.users.frame.row(row - 1, named=True) if row <= len(served.users) else {}
    kind, interests = _interests(version, row, items[order], times[order])
    return asked.Person(
        version=version.number, user_id=user, n_events=len(events), n_fresh=len(served.fresh.clicks.get(row, ())),
        first_span=about.get("first_span"), last_span=about.get("last_span"), events=events[-PAST:],
        interests=interests, kind=kind,
    )  # fmt: skip


def _interests(version: Version, row: int, items_T: Tensor, times_T: Tensor) -> tuple[str, list[asked.Interest]]:
    """What a user is interested in: the vectors of a model that has such, else the events that speak for the list."""
    served, model = version.served, version.served.state.model
    if isinstance(model, VectorModel):
        return _vectors(version, row, items_T, times_T)
    counter = model.experts.counters["item-knn"] if isinstance(model, Blend) else model
    if not isinstance(counter, Pairs):
        return "this model has no interests: it knows what is popular, or what the user had", []
    found = best_items(served, torch.tensor([row]), Wanted(30))
    batch, groups = batch_of_user(served, torch.tensor([row])), dict[int, list[int]]()
    for at, item in enumerate(found["item"]):
        groups.setdefault(counter.because(batch, item), []).append(at)
    cards = []
    for because, places in sorted(groups.items(), key=lambda group: (group[0] == 0, -len(group[1]))):
        name = served.items.ids(torch.tensor([because]))[0] if because else None
        which = torch.tensor(places)
        of = items_T == because
        cards.append(
            asked.Interest(
                title=f"because of {name}" if because else "liked by others who are alike, or by all",
                items=_items(version, rows_of(found)[which][:SHOWN], rows_of(found, "score")[which]),
                events=_past(version, items_T[of], times_T[of]),
            )
        )  # fmt: skip
    return "items of the list, by the event that speaks most for them", cards


def _vectors(version: Version, row: int, items_T: Tensor, times_T: Tensor) -> tuple[str, list[asked.Interest]]:
    served, model = version.served, version.served.state.model
    batch = batch_of_user(served, torch.tensor([row]))
    n = int(batch.alive_BK.sum()) if batch.alive_BK is not None else None
    vectors_KD, items_ID = user_vectors(model, batch)[0][:n], item_vectors(model)
    scores_KI = vectors_KD @ items_ID.T
    scores_KI[:, 0] = -torch.inf
    best_KN = scores_KI.topk(min(SHOWN, model.n_items))
    learnt_T = torch.where(items_T <= model.n_items, items_T, 0)
    closest_T = scores_KI[:, learnt_T].argmax(0)
    born, used = _ages(served, row, len(vectors_KD))
    cards = []
    for k in range(len(vectors_KD)):
        of = (closest_T == k) & (learnt_T > 0)
        cards.append(
            asked.Interest(
                title=f"interest {k + 1}" if len(vectors_KD) > 1 else "what the user is like now",
                items=_items(version, best_KN.indices[k], best_KN.values[k]),
                events=_past(version, items_T[of], times_T[of])[-SHOWN:], born_span=born[k], used_span=used[k],
            )
        )  # fmt: skip
    kind = "interests" if isinstance(model, InterestModel) else "vectors, read from the user's last events"
    return kind, cards


def _ages(served: Served, row: int, n: int) -> tuple[list[int | None], list[int | None]]:
    """The spans in which stored interests were born and used last; None of those that are not stored."""
    born, used = list[int | None]([None] * n), list[int | None]([None] * n)
    users = served.state.users
    if users is not None and row <= users.n_users:
        mine = slice(int(users.offsets_U[row]), int(users.offsets_U[row + 1]))
        stored = len(users.born_S[mine])
        born[:stored], used[:stored] = users.born_S[mine].tolist(), users.used_S[mine].tolist()
    return born[:n], used[:n]


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


def _past(version: Version, rows_N: Tensor, times_N: Tensor) -> list[asked.Past]:
    ids, has_clock = version.served.items.ids(rows_N), version.kept.reading.has_clock
    when: list[Any] = [moment(time) if has_clock else time for time in times_N.tolist()]
    return [asked.Past(item_id=i, at=at) for i, at in zip(ids, when)]


def moment(microseconds: int) -> str:
    """UTC, to the second."""
    return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat(timespec="seconds")
