"""The profile of a user or an item in sentences, for `freshrec inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import groupby
from types import MappingProxyType
from typing import Any

from freshrec.text_layout import format_count, printable_id, wrap_lines

INTERESTS = (
    "An interest is a vector for one part of what the user likes. The score of an item is its largest inner product "
    "with an interest."
)


def user_text(found: dict[str, Any], versions: Mapping[int, int] = MappingProxyType({})) -> str:
    """The profile of a user; `found` is what `freshrec inspect user --json` prints.

    `versions`: span -> number of the version that learned it.
    """
    events, n_events = found["events"], found["n_events"]
    count = format_count(n_events, "event")
    parts = [_fill(f"User {printable_id(found['user_id'])} has {count}: {_first_and_last(found, versions)}.")]
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
    parts += [_interest_block(interest, versions) for interest in found["interests"]]
    return "\n\n".join(parts)


def _interests_heading(found: dict[str, Any]) -> str:
    kind, n = found["kind"], len(found["interests"])
    if not n:
        return "Interests: this model has none." if kind == "this model has no interests" else "Interests: none yet."
    if kind == "interests":
        return _fill(f"Interests: {n}. {INTERESTS}")
    return _fill(f"Interests: the model stores none. Shown are {kind}.")


def _first_and_last(found: dict[str, Any], versions: Mapping[int, int]) -> str:
    """Name the versions that learned the first and the last event."""
    first, last = (_version_name(found[name], versions) for name in ("first_span", "last_span"))
    return f"learned by {first}" if first == last else f"the first learned by {first}, the last by {last}"


def _version_name(span: int, versions: Mapping[int, int]) -> str:
    """ "version 4"; without a version of this span "the fit" or "update 3"."""
    if span in versions:
        return f"version {versions[span]}"
    return f"update {span}" if span else "the fit"


def _interest_block(interest: dict[str, Any], versions: Mapping[int, int]) -> str:
    """Title, best items and past events of an interest."""
    title = f"{interest['title'][0].upper()}{interest['title'][1:]}"
    if interest["born_span"] is not None:
        born, used = (_version_name(interest[name], versions) for name in ("born_span", "used_span"))
        title += f": created by {born}, last used by {used}"
    lines = [title, _fill(f"best items: {', '.join(map(printable_id, interest['items'])) or 'none'}", "  ")]
    if interest["events"]:
        by_date = groupby(interest["events"], lambda event: time_in_words(event["at"]))
        events = [f"{_count_items(event['item_id'] for event in group)} {date}" for date, group in by_date]
        lines.append(_fill(f"supported by past events: {'; '.join(events)}", "  "))
    return "\n".join(lines)


def _count_items(ids: Iterable[Any]) -> str:
    """List ids, each once, with the number of its repeats: "7, 12 (9 times)"."""
    return ", ".join(
        f"{printable_id(name)} ({n} times)" if n > 1 else printable_id(name) for name, n in Counter(ids).items()
    )


def item_text(found: dict[str, Any], versions: Mapping[int, int] = MappingProxyType({})) -> str:
    """The statistics of an item; `found` is what `freshrec inspect item --json` prints. `versions`: see `user_text`."""
    events, users = format_count(found["n_events"], "event"), format_count(found["n_users"], "user")
    times = f" ({_time(found['first'])} to {_time(found['last'])} UTC)" if "first" in found else ""
    learned = _first_and_last(found, versions)
    return _fill(f"Item {printable_id(found['item_id'])} has {events} from {users}{times}: {learned}.")


def _fill(text: str, indent: str = "") -> str:
    return "\n".join(wrap_lines(text, first=indent, rest=2 * indent))


def _time(at: str | int) -> str:
    """ "2011-12-08 13:59", or the position in a log without timestamps."""
    return f"{at:,}" if isinstance(at, int) else f"{at[:10]} {at[11:16]}"


def time_in_words(at: str | int) -> str:
    """The date of an event (UTC), or its position in a log without timestamps."""
    return f"at position {at:,}" if isinstance(at, int) else f"on {at[:10]}"
