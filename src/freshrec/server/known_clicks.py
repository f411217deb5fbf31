"""Which clicks a server knows: those that it has accepted, and those that the live version has learned."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from freshrec.data.duplicates import EventIndex, EventKey
from freshrec.recommender.ids import normalize_id
from freshrec.recommender.served_state import ServedState
from freshrec.store.click_journal import Click
from freshrec.store.learned_ids import LearnedIds, is_in

RECEIVED, LEARNED = "This click was received before.", "The history of the user has this event already."


class ClickCheck(NamedTuple):
    """Whether a click is known."""

    reason: str  # why it is known; "" = it is new
    has_new_id: bool = False  # it is known by user, item and time, and its id is not known yet


class KnownClicks:
    """The clicks that are known beside a version. `data/duplicates.py` has the rule."""

    def __init__(self, served: ServedState, has_clock: bool, learned_ids: LearnedIds) -> None:
        self.served, self.has_clock, self.learned_ids = served, has_clock, learned_ids
        self._received = EventIndex()

    def check(self, clicks: Sequence[Click]) -> list[ClickCheck]:
        """Return for each click whether it is known, or is the same event as an earlier click of the list."""
        earlier, found = EventIndex(), list[ClickCheck]()
        learned = self.learned_ids.find(clicks)
        by_key = (
            click
            for click, (is_id_learned, has_key_ids) in zip(clicks, learned)
            if not is_id_learned and (click.event_id is None or not has_key_ids)
        )
        in_histories = self._in_histories(by_key) if self.has_clock else ()
        for click, (is_id_learned, _) in zip(clicks, learned):
            id, key = click.event_id, self._key(click)
            is_id_known = is_id_learned or self._received.holds_id(id) or earlier.holds_id(id)
            reason = ""
            if self._received.holds(id, key) or earlier.holds(id, key):
                reason = RECEIVED
            elif is_id_learned or click in in_histories:
                reason = LEARNED
            earlier.add(id, None if reason else key)
            found.append(ClickCheck(reason, bool(reason) and id is not None and not is_id_known))
        return found

    def add(self, click: Click, check: ClickCheck) -> None:
        """Add a click that was checked: as an event if it is new, otherwise its id only."""
        self._received.add(click.event_id, None if check.reason else self._key(click))

    def _key(self, click: Click) -> EventKey | None:
        return click.key if self.has_clock else None

    def _in_histories(self, clicks: Iterable[Click]) -> set[Click]:
        """Return the clicks whose user, item and time are an event of the version. Each history is read once."""
        served, histories = self.served, self.served.counts.histories
        by_user, found = defaultdict[int | str, list[Click]](list), set[Click]()
        for click in clicks:
            by_user[click.user_id].append(click)
        for user_id, of_user in by_user.items():
            user = served.users.row(normalize_id("user_id", user_id, served.users))
            if not user or user > histories.n_users:
                continue
            rows = slice(int(histories.offsets_U[user]), int(histories.offsets_U[user + 1]))
            times_R, items_R = histories.times_R[rows].numpy(), histories.items_R[rows].numpy()
            is_at_click_R = is_in(times_R, np.unique([click.time for click in of_user]))
            events = set(zip(times_R[is_at_click_R].tolist(), items_R[is_at_click_R].tolist()))
            for click in of_user if events else ():
                item = served.items.row(normalize_id("item_id", click.item_id, served.items))
                if (click.time, item) in events:
                    found.add(click)
        return found
