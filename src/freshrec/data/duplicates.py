"""Which rows are the same event. Replay, fit, update, event log, click journal and server all follow this rule.

Two rows with an `event_id` are the same event if and only if the ids are equal. If one of them has no id, they are the
same event if user, item and time are equal (the key of the event). In a log with exposures, the label belongs to the
key. Times are compared in microseconds. Without timestamps, only ids decide, and a row without id is always new.

A row without id stands for every event of its key. For rows A, B and one without id, all of one key, that means:

- In one delivery they are two events, A and B, in any order. So are A and B that are known when the third row arrives.
- If the row without id is known first, all later rows of its key are known too, so they are one event.

The first row of an id counts, whatever later rows with it hold (`count_reused_ids`). The type of an event is not part
of the key. A view and a purchase of one moment are two events only if both have ids.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import polars as pl

from freshrec.data.log import Log
from freshrec.text_layout import format_count

EVENT_KEYS = ("user_id", "item_id", "time")
EventKey: TypeAlias = tuple[int | str, ...]


class EventIndex:
    """Events that arrived one by one. It answers in constant time whether another one is among them.

    `key` is user, item and time of an event; None without timestamps.
    """

    def __init__(self) -> None:
        self._ids = set[str]()
        self._keys = dict[EventKey, bool]()  # whether an event with this key has no id

    def add(self, event_id: str | None, key: EventKey | None) -> None:
        """Add an event."""
        if event_id is not None:
            self._ids.add(event_id)
        if key is not None:
            self._keys[key] = event_id is None or self._keys.get(key, False)

    def holds_id(self, event_id: str | None) -> bool:
        """Whether an event has this id; False for None."""
        return event_id in self._ids

    def holds(self, event_id: str | None, key: EventKey | None) -> bool:
        """Whether an event is among those that were added."""
        if event_id is None:
            return key is not None and key in self._keys
        return event_id in self._ids or (key is not None and self._keys.get(key, False))


def split_by_event_id(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Split the rows into those with an event_id and those without."""
    given = pl.col("event_id").is_not_null() if "event_id" in rows.columns else pl.lit(False)
    return rows.filter(given), rows.filter(~given)


def drop_duplicate_rows(rows: pl.DataFrame, has_clock: bool, keys: Sequence[str] = EVENT_KEYS) -> pl.DataFrame:
    """Keep one row of each event, in the order of the rows: the first with an id, or else the first.

    `keys`: the columns of the key. `has_clock`: whether the rows have timestamps.
    """
    if "event_id" not in rows.columns:
        return rows.filter(pl.struct(keys).is_first_distinct()) if has_clock else rows
    places = _places_of_events(rows, has_clock, keys)
    return rows if len(places) == len(rows) else rows[places]


def drop_known_rows(
    rows: pl.DataFrame, known_ids: pl.Series | None, known_rows: pl.DataFrame | None, keys: Sequence[str] = EVENT_KEYS
) -> pl.DataFrame:
    """Return the rows that are none of the known events, in their order.

    `known_ids`: ids of known events, None = there are none. `known_rows`: the keys of known events, with event_id if
    they have one; None without timestamps.
    """
    with_id, without_id = split_by_event_id(rows.with_row_index("place"))
    if known_ids is not None and len(with_id):
        with_id = with_id.filter(~pl.col("event_id").is_in(known_ids.implode()))
    if known_rows is not None:
        with_id = _without_keys(with_id, split_by_event_id(known_rows)[1], keys)
        without_id = _without_keys(without_id, known_rows, keys)
    return rows[pl.concat([with_id["place"], without_id["place"]]).sort()]


def count_duplicates(log: Log) -> int:
    """Count the rows that `drop_duplicates` skips, without a copy of the log."""
    keys = _keys(log)
    if "event_id" in log.frame.columns:
        return len(log.frame) - len(_places_of_events(log.frame, log.has_clock, keys))
    if not log.has_clock:
        return 0
    distinct = log.frame.lazy().select(keys).unique().select(pl.len())
    return len(log.frame) - int(distinct.collect(engine="streaming").item())


def count_reused_ids(rows: pl.DataFrame, has_clock: bool) -> int:
    """Count the event ids of rows that differ in user, item or time. Only the first row of such an id counts."""
    if "event_id" not in rows.columns:
        return 0
    keys = EVENT_KEYS if has_clock else EVENT_KEYS[:2]
    distinct = rows.lazy().filter(pl.col("event_id").is_not_null()).select("event_id", *keys).unique()
    reused = distinct.group_by("event_id").len().filter(pl.col("len") > 1).select(pl.len())
    return int(reused.collect(engine="streaming").item())


def reused_ids_note(n_reused: int) -> str:
    """Say that event ids were used for different rows."""
    verb = "stands" if n_reused == 1 else "stand"
    return (
        f"{format_count(n_reused, 'event_id')} {verb} for rows with another user, item or time. Only the first row of "
        "an id counts. Check how the source makes its ids."
    )


def drop_duplicates(log: Log) -> Log:
    """Return the log with one row of each event only, and notes on skipped rows and reused ids.

    In a log with exposures (label 0), rows are the same event only if the label is the same too.
    """
    n_skipped = count_duplicates(log)
    if not n_skipped:
        return log
    frame = drop_duplicate_rows(log.frame, log.has_clock, _keys(log))
    notes = [f"Skipped {format_count(n_skipped, 'duplicate')} (same event_id, or same user, item and time)."]
    if n_reused := count_reused_ids(log.frame, log.has_clock):
        notes.append(reused_ids_note(n_reused))
    return replace(log, frame=frame, notes=(*log.notes, *notes))


def _places_of_events(rows: pl.DataFrame, has_clock: bool, keys: Sequence[str]) -> pl.Series:
    """Return the places of the rows that `drop_duplicate_rows` keeps, ascending."""
    columns = rows.select(*(keys if has_clock else ()), "event_id").with_row_index("place")
    with_id, without_id = split_by_event_id(columns)
    with_id = with_id.filter(pl.col("event_id").is_first_distinct())
    if has_clock:
        without_id = without_id.filter(pl.struct(keys).is_first_distinct())
        without_id = _without_keys(without_id, with_id, keys)
    return pl.concat([with_id["place"], without_id["place"]]).sort()


def _without_keys(rows: pl.DataFrame, others: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    """Return the rows whose key is the key of none of the other rows."""
    if not len(rows) or not len(others):
        return rows
    return rows.join(others.select(keys), on=list(keys), how="anti", nulls_equal=True, maintain_order="left")


def _keys(log: Log) -> Sequence[str]:
    """Return the keys of events. With exposures (label 0), the label is a key too."""
    has_exposures = "label" in log.frame.columns and bool((log.frame["label"] == 0).any())
    return (*EVENT_KEYS, "label") if has_exposures else EVENT_KEYS
