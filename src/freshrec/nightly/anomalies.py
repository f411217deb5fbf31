"""Anomalies of a delivery, compared with earlier ones: one or two sentences for each."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from statistics import median
from typing import TYPE_CHECKING

from freshrec.nightly.delivery_stats import DeliveryStats
from freshrec.nightly.notes import count_of, format_percent

if TYPE_CHECKING:
    from freshrec.nightly.gate import GateLimits

DAYS_PER_OUTLIER = 14  # one delivery in 14 is ignored at either end of the usual range


def amount_anomalies(day: DeliveryStats, earlier: Sequence[DeliveryStats], limits: GateLimits) -> list[str]:
    """Report unusual numbers of rows, users and items, and a delivery that covers too short a time."""
    recent = earlier[-limits.n_recent_days :]
    if len(recent) < limits.min_earlier_days or not day.n_rows:
        return []
    days = [*recent, day]
    return [
        *_outside_usual_range("row", [d.n_rows for d in days], limits.max_drop_factor, limits.max_growth_factor),
        *_outside_usual_range("user", [d.n_users for d in days], limits.max_drop_factor, limits.max_growth_factor),
        *_outside_usual_range("item", [d.n_items for d in days], inf, limits.max_growth_factor),
        *(_short_span(day, recent, limits) if not _has_equal_times(day, limits) else []),
    ]


def _outside_usual_range(unit: str, values: Sequence[int], drop_factor: float, growth_factor: float) -> list[str]:
    *past, today = values
    least, most = _usual_range(past)
    if least / drop_factor <= today <= most * growth_factor:
        return []
    limit = f"Fewer than {least / drop_factor:,.0f}" if today < least else f"More than {most * growth_factor:,.0f}"
    usual = f"{_earlier_deliveries(len(past))} usually had {least:,.0f} to {most:,.0f}."
    return [f"The delivery has {count_of(today, unit)}. {usual} {limit} is unusual."]


def _earlier_deliveries(n: int) -> str:
    return f"The previous {n} deliveries" if n > 1 else "The previous delivery"


def _usual_range(values: Sequence[float]) -> tuple[float, float]:
    """Minimum and maximum without one value in DAYS_PER_OUTLIER at either end, which may be outliers."""
    ordered, n = sorted(values), len(values) // DAYS_PER_OUTLIER
    return ordered[n], ordered[-1 - n]


def share_anomalies(day: DeliveryStats, recent: Sequence[DeliveryStats], limits: GateLimits) -> list[str]:
    """Report unusual shares: duplicates, single users and items, equal times, late rows."""
    days = [*recent, day]

    def check(label: str, shares: Sequence[float | None], max_share: float, max_rise: float) -> list[str]:
        return _above_usual_share(label, shares, max_share, max_rise, limits)

    small, large = limits.max_small_rise, limits.max_rise
    found = check(
        "of the delivered rows are duplicates", [d.share_doubled for d in days], limits.max_share_doubled, small
    )
    if day.n_rows >= limits.min_rows:
        top_item = [d.share_top_item for d in days]
        found += top_user_anomalies(day, recent, limits)
        found += check("of the rows belong to one item", top_item, limits.max_share_top_item, large)
    if day.n_users >= limits.min_users_same_second and (recent or not day.whole_days):
        seconds = [d.share_same_second for d in days]
        found += check("of the users have an event in the same second", seconds, limits.max_share_same_second, large)
    if _has_equal_times(day, limits):
        found += _short_span(day, recent, limits)
    late = "of the rows are older than the newest known event"
    if day.gap_hours is not None and day.gap_hours < 0:
        late += f" (the median row by {-day.gap_hours:,.0f} hours)"
    late_rows = check(late, [d.share_late for d in days], limits.max_share_late, large)
    return found + [f"{anomaly} Learn the files oldest first." for anomaly in late_rows]


def top_user_anomalies(day: DeliveryStats, recent: Sequence[DeliveryStats], limits: GateLimits) -> list[str]:
    """Report a user with too many rows, unless it is a large customer."""
    label, shares = "of the rows belong to one user", [d.share_top_user for d in (*recent, day)]
    if day.n_rows < limits.min_rows or _is_large_customer(day, limits):
        return []
    return _above_usual_share(label, shares, limits.max_share_top_user, limits.max_small_rise, limits)


def _is_large_customer(day: DeliveryStats, limits: GateLimits) -> bool:
    """Whether the most active user was active before, and chooses different and popular items as the others do.

    A bot clicks on few items many times, or on items that nobody else wants, or has no past.
    """
    if day.top_user_past is None or day.top_user_breadth is None or day.top_user_head is None:
        return False
    return day.top_user_past >= limits.min_past and min(day.top_user_breadth, day.top_user_head) >= limits.min_likeness


def population_anomalies(day: DeliveryStats, recent: Sequence[DeliveryStats], limits: GateLimits) -> list[str]:
    """Report too many unknown users and items, and too few rows on the popular items."""
    return [*unknown_id_anomalies(day, recent, limits), *head_anomalies(day, recent, limits)]


def unknown_id_anomalies(day: DeliveryStats, recent: Sequence[DeliveryStats], limits: GateLimits) -> list[str]:
    """Report too many rows of unknown users, or on unknown items."""
    if day.n_rows < limits.min_rows:
        return []
    label, shares = "of the rows have an unknown item id", [d.share_unknown_items for d in (*recent, day)]
    of_items = _above_usual_share(label, shares, limits.max_share_unknown, limits.max_rise, limits)
    return [*of_items, *_unknown_user_anomalies(day, recent, limits)]


def _unknown_user_anomalies(day: DeliveryStats, recent: Sequence[DeliveryStats], limits: GateLimits) -> list[str]:
    """Report too many rows of unknown users. The first log shows whether users return; ids of sessions do not."""
    first, limit = day.share_new_users_first, limits.max_share_unknown
    if first is None and not recent:
        return []
    label, shares = "of the rows have an unknown user id", [d.share_unknown_users for d in (*recent, day)]
    if first is None or len(recent) >= limits.min_earlier_days:
        return _above_usual_share(label, shares, limit, limits.max_rise, limits)
    limit = max([min(limit, first + limits.max_first_rise * (1 - first)), *shares[:-1]])
    if first >= limits.uninformative_share or day.share_unknown_users <= limit:
        return []
    return [
        f"{format_percent(day.share_unknown_users)} {label}. In the newest rows of the first log, "
        f"{format_percent(first)} belonged to new users. More than {format_percent(limit)} is unusual. "
        "Check whether the ids have changed."
    ]


def head_anomalies(day: DeliveryStats, recent: Sequence[DeliveryStats], limits: GateLimits) -> list[str]:
    """Report too few rows on the popular items."""
    heads = [d.share_head for d in recent if d.share_head is not None]
    if day.n_rows < limits.min_rows or len(heads) < limits.min_earlier_days or day.share_head is None:
        return []
    least = _usual_range(heads)[0]
    limit = least / limits.max_head_drop_factor
    if day.share_head >= limit:
        return []
    from scipy.stats import binomtest  # slow to import, and rarely needed

    share, least_share = (min(max(value, 0.0), 1.0) for value in (day.share_head, limit))
    n_head = round(share * day.n_rows)
    if binomtest(n_head, day.n_rows, least_share, alternative="less").pvalue >= limits.false_alarm_rate:
        return []  # few rows: the share may be low by chance
    return [
        f"{format_percent(day.share_head)} of the rows are on the popular items, which had half of the recent events. "
        f"In the previous {len(heads)} deliveries it was usually {format_percent(least)} or more. "
        "Check whether the events are genuine."
    ]


def _above_usual_share(
    label: str, values: Sequence[float | None], max_share: float, max_rise: float, limits: GateLimits
) -> list[str]:
    """Report a share above `max_share`, or above the usual share by more than `max_rise`. A usual share passes."""
    past, today = [value for value in values[:-1] if value is not None], values[-1]
    usual = _usual_range(past)[1] if past else 0.0
    limit = max([max_share, *past])
    if len(past) >= limits.min_earlier_days:
        limit = max(usual, min(usual + max_rise, max_share))
    if today is None or today <= limit or (past and median(past) >= limits.uninformative_share):
        return []
    often = f"at most {format_percent(usual)}" if usual else "0 %"
    before = f" In the previous {len(past)} deliveries it was {'usually ' if any(past) else ''}{often}."
    if len(past) < 2:
        before = f" In the previous delivery it was {format_percent(usual)}." if past else ""
    return [f"{format_percent(today)} {label}.{before} More than {format_percent(limit)} is unusual."]


def gap_anomalies(day: DeliveryStats, recent: Sequence[DeliveryStats], limits: GateLimits) -> list[str]:
    """Report a long gap between rows."""
    holes = [d.hole_hours for d in recent if d.hole_hours is not None]
    limit = limits.max_hole_hours
    if len(holes) >= limits.min_earlier_days:
        limit = max(limits.max_usual_hole_hours, limits.max_hole_factor * median(holes))
    if day.hole_hours is None or day.hole_hours <= limit:
        return []
    return [
        f"There are no rows for {day.hole_hours:,.0f} hours in a row. More than {limit:,.0f} hours is unusual. "
        "Check the unit and the offset of the timestamps."
    ]


def _has_equal_times(day: DeliveryStats, limits: GateLimits) -> bool:
    """Whether many rows have the same time. That is no short day but a wrong clock."""
    return day.span_hours == 0 and day.n_rows >= limits.min_rows


def _short_span(day: DeliveryStats, recent: Sequence[DeliveryStats], limits: GateLimits) -> list[str]:
    spans = [d.span_hours for d in recent if d.span_hours is not None]
    if day.span_hours is None or len(spans) < limits.min_earlier_days:
        return []
    shortest = _usual_range(spans)[0]
    if day.span_hours >= shortest / limits.max_shortening_factor:
        return []
    return [
        f"The rows cover {day.span_hours:.3g} hours. {_earlier_deliveries(len(spans))} usually covered at "
        f"least {shortest:.3g} hours. Less than {shortest / limits.max_shortening_factor:.3g} hours is "
        "unusual. Check whether the end is missing."
    ]
