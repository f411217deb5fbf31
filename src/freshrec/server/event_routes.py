"""The route that takes clicks."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

from fastapi import FastAPI

from freshrec.data.moments import to_microseconds
from freshrec.errors import LogError
from freshrec.server import schemas
from freshrec.server.handlers import LoadedVersion
from freshrec.server.request_ids import check_click_ids, require_exact
from freshrec.server.service import Service
from freshrec.store.click_journal import Click

MAX_CLOCK_SKEW_S = 600  # how far in the future an event may be, because clocks differ
MIN_TIMESTAMP = datetime(1980, 1, 1, tzinfo=UTC)


def add_event_routes(app: FastAPI, service: Service) -> None:
    """Add the intake of clicks."""

    @app.post("/events", tags=["events"], summary="Send clicks", response_description="The result of each click.")
    async def events(clicks: schemas.ClicksRequest) -> schemas.ClicksResponse:
        """Store up to 1,000 clicks and add them to the histories of their users.

        The clicks are on disk before the server answers. The next lists of these users reflect them, and the next
        update trains on them. A click is identified by its `event_id`. If a click, or the event that it repeats, has no
        id, user, item and timestamp decide. A click is counted once, even if it is sent twice or is also in a file for
        `freshrec update`. A known click is not stored again.
        """
        version = service.version
        checked_clicks = [check_click_ids(version.served, _to_click(click, version)) for click in clicks.events]
        number, found = await service.run_in_worker(lambda: service.live.accept_clicks(checked_clicks))
        n_known = sum(outcome.is_duplicate for outcome in found)
        service.metrics.events.labels("yes").inc(n_known)
        service.metrics.events.labels("no").inc(len(found) - n_known)
        rows = [
            schemas.ClickAcknowledgement(
                event_id=outcome.click.event_id,
                timestamp=outcome.click.time,
                known=outcome.is_duplicate,
                folded=outcome.is_in_overlay,
                why=outcome.reason,
            )
            for outcome in found
        ]
        return schemas.ClicksResponse(version=number, accepted=len(found) - n_known, known=n_known, events=rows)


def _to_click(click: schemas.ClickIn, version: LoadedVersion) -> Click:
    """Convert a click for the journal. Raises LogError if it does not fit the log."""
    read_options, now = version.bundle.read_options, datetime.now(UTC)
    timestamp = click.timestamp or now
    timestamp = timestamp if timestamp.tzinfo else timestamp.replace(tzinfo=UTC)
    if not timestamp >= MIN_TIMESTAMP or (timestamp - now).total_seconds() > MAX_CLOCK_SKEW_S:
        raise LogError(
            f"The timestamp {timestamp:%Y-%m-%d %H:%M} is before 1980 or in the future. Send the time of the click in "
            "UTC."
        )
    if read_options.events and click.event not in read_options.events:
        raise LogError(f"The log needs an event type. Set `event` to one of {', '.join(read_options.events)}.")
    event_id = None if click.event_id is None else str(require_exact("event_id", click.event_id))
    category = None if click.category is None else str(require_exact("category", click.category))
    if not read_options.has_clock:  # without timestamps, only an id identifies a click
        event_id = event_id or uuid.uuid4().hex
    return Click(click.user_id, click.item_id, to_microseconds(timestamp), event_id, category, click.event)
