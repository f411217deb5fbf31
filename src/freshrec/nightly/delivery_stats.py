"""Statistics of a delivery, which the gate compares with those of earlier deliveries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from freshrec.data.catalog import Catalog
from freshrec.data.validate import DAY
from freshrec.errors import StateError
from freshrec.store.event_log import EventLog
from freshrec.store.versions import Store, version_chain

MIN_OTHER_ROWS = 50  # rows of other users that the most active user is compared with
SECOND, HOUR = 1_000_000, 3_600_000_000  # microseconds


@dataclass(frozen=True)
class DeliveryStats:
    """Statistics of the new rows of a delivery, stored as JSON. Shares are shares of these rows by default."""

    n_rows: int
    n_users: int
    n_items: int
    rows_per_user: float
    share_unknown_users: float  # rows of users who are new to the store
    share_unknown_items: float
    share_top_user: float  # rows of the most active user
    share_top_item: float
    share_doubled: float  # of all delivered rows: duplicates within the delivery
    share_known: float  # of all delivered rows: rows that are in the log already
    share_head: float | None  # rows on the popular items, which had half of the recent events; None: unknown
    # The fields below are None if the log has no timestamps. Those about earlier events are None in the first delivery.
    share_late: float | None  # rows older than the newest known event
    share_same_second: float | None  # of the users: the largest share with a row in the same second
    whole_days: bool | None  # all times are midnights, so the log is precise to the day only
    span_hours: float | None  # from the first row to the last
    gap_hours: float | None  # from the newest known event to the median row
    hole_hours: float | None  # the longest gap without rows, counted from the newest known event
    # The rows of the most active user, compared with earlier and other ones. None: too few other rows, or 0.1.0.
    top_user_past: float | None = None  # earlier events of the user, divided by these rows
    top_user_breadth: float | None = None  # different items per row, divided by the same of the others
    top_user_head: float | None = None  # share of rows on the popular items, divided by the same of the others
    # From the first log, to judge `share_unknown_users` while there are few deliveries. None: unknown, as in 0.1.0.
    share_new_users_first: float | None = None  # newest rows of the first log of users who had no earlier row in it


def compute_delivery_stats(
    frame: pl.DataFrame,
    known_users: Catalog,
    known_items: Catalog,
    has_clock: bool,
    newest_time: int | None,
    n_duplicates: int,
    n_known: int,
    head_ids: pl.Series | None = None,
    past_events: Callable[[Any], int] | None = None,
    share_new_users_first: float | None = None,
) -> DeliveryStats:
    """Compute the statistics of new rows, a `Log.frame` in time order.

    `newest_time`: time of the newest known event, in microseconds. `n_duplicates`, `n_known`: delivered rows that are
    not in `frame`, because they repeat a row of the delivery or one of the log. `head_ids`: the most popular items,
    which together had half of the recent events. `past_events`: the number of known events of a user.
    `share_new_users_first`: from the first log.
    """
    n_rows, n_users = len(frame), frame["user_id"].n_unique()
    n_delivered = max(1, n_rows + n_duplicates + n_known)
    if has_clock:
        n_duplicates += n_rows - len(frame.select("user_id", "item_id", "time").unique())
    times = frame["time"]
    has_times = has_clock and n_rows > 0
    newer_times = times.filter(times >= newest_time) if newest_time is not None else times
    seconds = frame.select("user_id", second=pl.col("time") // SECOND).unique()
    share_head = None
    if head_ids is not None and n_rows:
        share_head = int(frame["item_id"].is_in(head_ids.implode()).sum()) / n_rows
    return DeliveryStats(
        n_rows=n_rows,
        n_users=n_users,
        n_items=frame["item_id"].n_unique(),
        rows_per_user=n_rows / max(1, n_users),
        share_unknown_users=share_unknown(frame["user_id"], known_users),
        share_unknown_items=share_unknown(frame["item_id"], known_items),
        share_top_user=_max_count(frame["user_id"]) / max(1, n_rows),
        share_top_item=_max_count(frame["item_id"]) / max(1, n_rows),
        share_doubled=n_duplicates / n_delivered,
        share_known=n_known / n_delivered,
        share_head=share_head,
        share_late=1 - len(newer_times) / n_rows if has_times and newest_time is not None else None,
        share_same_second=_max_count(seconds["second"]) / n_users if has_times else None,
        whole_days=bool((times % DAY == 0).all()) if has_times else None,
        span_hours=(int(times[-1]) - int(times[0])) / HOUR if has_times else None,
        gap_hours=(int(times[n_rows // 2]) - newest_time) / HOUR if has_times and newest_time is not None else None,
        hole_hours=longest_gap(newer_times, newest_time) / HOUR if has_times else None,
        share_new_users_first=share_new_users_first,
        **_top_user_numbers(frame, head_ids, past_events),
    )


def _top_user_numbers(
    frame: pl.DataFrame, head_ids: pl.Series | None, past_events: Callable[[Any], int] | None
) -> dict[str, float]:
    """Compare the rows of the most active user with earlier ones and with those of the others."""
    if head_ids is None or past_events is None or not len(frame):
        return {}
    user_id = most_active_user(frame)
    is_top = frame["user_id"] == user_id
    parts = [frame.filter(is_top), frame.filter(~is_top)]
    if len(parts[1]) < MIN_OTHER_ROWS:
        return {}
    breadth, other_breadth = (part.select("user_id", "item_id").n_unique() / len(part) for part in parts)
    head, other_head = (int(part["item_id"].is_in(head_ids.implode()).sum()) / len(part) for part in parts)
    found = {"top_user_past": past_events(user_id) / len(parts[0]), "top_user_breadth": breadth / other_breadth}
    return found | ({"top_user_head": head / other_head} if other_head else {})


def most_active_user(frame: pl.DataFrame) -> Any:
    """Return the id of the user with the most rows."""
    counts = frame["user_id"].value_counts(name="n")
    return counts.sort("n", "user_id", descending=[True, False])["user_id"][0]


def share_of_new_users(frame: pl.DataFrame, share: float, min_rows: int) -> float | None:
    """Return the share of the newest rows whose users have no earlier row; None with fewer than 2 `min_rows` rows.

    It says whether users return. The newest rows are a `share` of all rows, at least `min_rows`.
    """
    n_newest = max(min_rows, round(share * len(frame)))
    if len(frame) < 2 * n_newest:
        return None
    earlier, newest = frame["user_id"][:-n_newest], frame["user_id"][-n_newest:]
    return 1 - int(newest.is_in(earlier.unique().implode()).sum()) / n_newest


def newest_time_before(store: Store, log: EventLog, batch: int) -> int | None:
    """Return the time of the newest event that was known when a batch was first learned.

    None if the log lacks that event, or if the manifest of the batch or of an earlier version is damaged or lost.
    """
    first = next((manifest for manifest in store.manifests() if manifest.batch == batch), None)
    if first is None:
        return None
    try:
        known = [batch for manifest in version_chain(store, first.parent) for batch in manifest.batches]
    except StateError:
        return None
    newest = log.batches().filter(pl.col("batch").is_in(known))["last"].max()
    return newest if isinstance(newest, int) else None


def share_unknown(ids: pl.Series, known: Catalog) -> float:
    """Return the share of ids that a catalog lacks."""
    return float((known.rows(ids) == 0).sum()) / max(1, len(ids))


def _max_count(values: pl.Series) -> int:
    """Return the count of the most frequent value."""
    return int(values.value_counts(name="n")["n"].to_numpy().max(initial=0))


def longest_gap(times: pl.Series, start: int | None) -> int:
    """Return the longest time between two consecutive rows, in microseconds."""
    times_T = times.to_numpy() if start is None else np.concatenate([[start], times.to_numpy()])
    return int(np.diff(times_T).max(initial=0))
