"""Clicks of a request: their times are read, and they are checked before they reach the journal."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from freshrec.data.moments import SECOND, YEAR_1980, parse_moments
from freshrec.errors import LogError
from freshrec.server.handlers import LoadedVersion
from freshrec.server.request_ids import check_click_ids, require_exact
from freshrec.server.schemas import ClickIn
from freshrec.store.click_journal import Click
from freshrec.text_layout import to_printable

MAX_CLOCK_SKEW_S = 600  # how far in the future an event may be, because clocks differ


def read_clicks(clicks: Sequence[ClickIn], version: LoadedVersion) -> list[Click]:
    """Convert the clicks of a request for the journal. Raises LogError if one does not fit the log."""
    times = _read_timestamps(clicks)
    return [check_click_ids(version.served, _to_click(click, when, version)) for click, when in zip(clicks, times)]


def _read_timestamps(clicks: Sequence[ClickIn]) -> list[int]:
    """Return the times in microseconds. Raises LogError for an impossible time.

    Clicks without a time get the present one, a microsecond apart, so that their order stays.
    """
    now = time.time_ns() // 1000
    times = [now + place for place in range(len(clicks))]
    given = {place: click.timestamp for place, click in enumerate(clicks) if click.timestamp is not None}
    for place, when in zip(given, parse_moments(list(given.values()))) if given else ():
        shown = to_printable(str(given[place]), 40)
        if when is None:
            raise LogError(f'The timestamp "{shown}" is neither ISO 8601 nor a number. Send 2025-06-01T04:00:00Z.')
        if not YEAR_1980 <= when <= now + MAX_CLOCK_SKEW_S * SECOND:
            raise LogError(
                f'The timestamp "{shown}" is before 1980 or in the future. Send the time of the click in UTC.'
            )
        times[place] = when
    return times


def _to_click(click: ClickIn, when: int, version: LoadedVersion) -> Click:
    read_options = version.bundle.read_options
    if read_options.events and click.event not in read_options.events:
        raise LogError(f"The log needs an event type. Set `event` to one of {', '.join(read_options.events)}.")
    event_id = None if click.event_id is None else str(require_exact("event_id", click.event_id))
    category = None if click.category is None else str(require_exact("category", click.category))
    if not read_options.has_clock:  # without timestamps, only an id identifies a click
        event_id = event_id or uuid.uuid4().hex
    return Click(click.user_id, click.item_id, when, event_id, category, click.event)
