"""Which clicks a server knows: those that it has accepted, and those that the live version has learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from freshrec.data.duplicates import EventIndex, EventKey
from freshrec.recommender.ids import normalize_id
from freshrec.recommender.served_state import ServedState
from freshrec.store.click_journal import Click
from freshrec.store.learned_ids import LearnedIds

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
        for click, (is_id_learned, has_key_ids) in zip(clicks, self.learned_ids.find(clicks)):
            id, key = click.event_id, self._key(click)
            is_id_known = is_id_learned or self._received.holds_id(id) or earlier.holds_id(id)
            reason = ""
            if self._received.holds(id, key) or earlier.holds(id, key):
                reason = RECEIVED
            elif is_id_learned or (self.has_clock and (id is None or not has_key_ids) and self._is_in_history(click)):
                reason = LEARNED
            earlier.add(id, None if reason else key)
            found.append(ClickCheck(reason, bool(reason) and id is not None and not is_id_known))
        return found

    def add(self, click: Click, check: ClickCheck) -> None:
        """Add a click that was checked: as an event if it is new, otherwise its id only."""
        self._received.add(click.event_id, None if check.reason else self._key(click))

    def _key(self, click: Click) -> EventKey | None:
        return click.key if self.has_clock else None

    def _is_in_history(self, click: Click) -> bool:
        """Whether the events of the version have this user, item and time."""
        served, histories = self.served, self.served.counts.histories
        user = served.users.row(normalize_id("user_id", click.user_id, served.users))
        if not user or user > histories.n_users:
            return False
        rows = slice(int(histories.offsets_U[user]), int(histories.offsets_U[user + 1]))
        at = histories.times_R[rows] == click.time  # late events are not in order
        if not bool(at.any()):
            return False
        item = served.items.row(normalize_id("item_id", click.item_id, served.items))
        return bool((histories.items_R[rows][at] == item).any())
