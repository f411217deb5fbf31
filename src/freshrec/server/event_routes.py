"""The route that takes clicks."""

from __future__ import annotations

from fastapi import FastAPI

from freshrec.server import schemas
from freshrec.server.received_clicks import read_clicks
from freshrec.server.service import Service


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
        checked_clicks = read_clicks(clicks.events, version)
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
