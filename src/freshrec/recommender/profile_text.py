"""The profile of a user or an item in sentences, for `freshrec inspect`."""

from __future__ import annotations

import textwrap
from itertools import groupby
from typing import Any

from freshrec.data.formats import printable_id

WIDTH = 100  # characters per line
SPANS = "Span 0 is the fit, span n the n-th update."
INTERESTS = (
    "An interest is a vector for one part of what the user likes. The score of an item is its largest inner product "
    "with an interest."
)


def user_text(found: dict[str, Any]) -> str:
    """The profile of a user; `found` is what `freshrec inspect user --json` prints."""
    events, n_events = found["events"], found["n_events"]
    count = "1 event" if n_events == 1 else f"{n_events:,} events"
    spans = f"the first in span {found['first_span']}, the last in span {found['last_span']}"
    parts = [_fill(f"User {printable_id(found['user_id'])} has {count}: {spans}. {SPANS}")]
    if events:
        shown = "All events" if len(events) == n_events else f"The {len(events)} most recent events"
        name = "position" if isinstance(events[0]["at"], int) else "time (UTC)"
        width = max(len(name), *(len(_time(event["at"])) for event in events))
        lines = [
            f"  {name:<{width}}  item",
            *(f"  {_time(e['at']):<{width}}  {printable_id(e['item_id'])}" for e in events),
        ]
        parts.append("\n".join([f"{shown}, newest last:", *lines]))
    parts.append(_interests_heading(found))
    parts += [_interest_block(interest) for interest in found["interests"]]
    return "\n\n".join(parts)


def _interests_heading(found: dict[str, Any]) -> str:
    kind, n = found["kind"], len(found["interests"])
    if not n:
        return "Interests: this model has none." if kind == "this model has no interests" else "Interests: none yet."
    if kind == "interests":
        return _fill(f"Interests: {n}. {INTERESTS}")
    return _fill(f"Interests: the model stores none. Shown are {kind}.")


def _interest_block(interest: dict[str, Any]) -> str:
    """Title, best items and past events of an interest."""
    title = f"{interest['title'][0].upper()}{interest['title'][1:]}"
    if interest["born_span"] is not None:
        title += f": created in span {interest['born_span']}, last used in span {interest['used_span']}"
    lines = [title, _fill(f"best items: {', '.join(map(printable_id, interest['items'])) or 'none'}", "  ")]
    if interest["events"]:
        by_date = groupby(interest["events"], lambda event: _date(event["at"]))
        events = [f"{', '.join(printable_id(event['item_id']) for event in group)} {date}" for date, group in by_date]
        lines.append(_fill(f"supported by past events: {'; '.join(events)}", "  "))
    return "\n".join(lines)


def item_text(found: dict[str, Any]) -> str:
    """The statistics of an item; `found` is what `freshrec inspect item --json` prints."""
    events = "1 event" if found["n_events"] == 1 else f"{found['n_events']:,} events"
    users = "1 user" if found["n_users"] == 1 else f"{found['n_users']:,} users"
    times = f" ({_time(found['first'])} to {_time(found['last'])} UTC)" if "first" in found else ""
    spans = f"the first in span {found['first_span']}, the last in span {found['last_span']}"
    return _fill(f"Item {printable_id(found['item_id'])} has {events} from {users}{times}: {spans}. {SPANS}")


def _fill(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=2 * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _time(at: str | int) -> str:
    """ "2011-12-08 13:59", or the position in a log without timestamps."""
    return f"{at:,}" if isinstance(at, int) else f"{at[:10]} {at[11:16]}"


def _date(at: str | int) -> str:
    return f"at position {at:,}" if isinstance(at, int) else f"on {at[:10]}"
