"""Whether a new version takes the place of the live one: statistics of the day, limits, and a verdict with its reasons.

An update has seen what the live version has not, so it goes live unless something speaks against it: a day that looks
odd, a loss that is larger than tolerated and more than chance, a value that no live version had, forgetting.

What that is worth, where values vary from model to model as on real logs (tests/test_gate.py):
- An update as good as the live version is refused by each of the two comparisons, on the newest and on older events,
  in at most one of 200 nights, however few the users: on an ordinary day it goes live in 99 of 100.
- One that loses more than `max_undetected_loss`, a share of the live version's value, is refused in 95 of 100 nights.
  How much that is follows from the number of users and from how they differ: between two seeds of the blend 16 to 59 %
  with 500 users of a log, 12 to 18 % with 2,000. A note tells where it is large; below `min_users` nothing is compared.
- Nothing goes live because it looks better: no gain is asked for, so none can be chance.
- Losses within the tolerance add up, night after night, and are not noticed here: only a version of some weeks ago
  can show them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from statistics import NormalDist, median

import numpy as np

from freshrec.config import find_instance
from freshrec.nightly.delivery_stats import DeliveryStats
from freshrec.replay.metrics import Float64Array, parse_metric
from freshrec.replay.significance import CONFIDENCE_LEVEL, bootstrap_interval

DAYS_PER_OUTLIER = 14  # of so many days one is left out at either end, before the others say what is usual
MEAN_HIT_VALUE = 0.5  # what the hits of real models are worth on average: ndcg@20 from 0.4 to 0.6
NEAR_ZERO = 1e-9  # of a metric: nobody is answered
POWER_Z = NormalDist().inv_cdf(0.95)  # standard errors beyond a limit, by which it is passed in 95 of 100 samples
INTERVAL_Z = NormalDist().inv_cdf((1 + CONFIDENCE_LEVEL) / 2)  # of an interval, in standard errors


@dataclass(frozen=True)
class GateLimits:
    """What is accepted. Of 1,321 pieces of ten real logs, 4 hours to a week each, 98 % pass; 10 others end early."""

    metric: str = "ndcg@20"
    tolerance: float = 0.05  # loss on the newest events, of the live version's value; another seed moves it as much
    forgetting: float = 0.10  # the same on older events, which an update may weigh less
    false_alarm_rate: float = 0.0025  # how often a loss is seen where there is none
    min_users: int = 30  # with fewer, values are not compared: they would have to be all better or all worse
    max_undetected_loss: float = 0.30  # a note says so when larger losses could pass
    floor_share: float = 0.5  # of what three in four of the live versions before had on their newest events
    min_floor_versions: int = 3  # live versions before there is a floor

    n_recent_days: int = 28  # days that a day is compared with: four weekends
    min_earlier_days: int = 7  # days before which only the limits that are no comparisons hold: one weekend
    max_drop_factor: float = 1.75  # rows and users, times less than the least usual day; half of a steady day is caught
    max_growth_factor: float = 3.0  # rows, users, items, times more than the largest: logs grow; doubled rows are known
    max_shortening_factor: float = 1.3  # times less than the shortest usual day: the end is missing

    max_head_drop_factor: float = 2.0  # times fewer events on popular items than the least usual day: random clicks
    min_rows: int = 50  # with fewer, one user's and unknown shares are left to chance
    min_users_same_second: int = 20  # with fewer, it is no wonder if they share a second
    uninformative_share: float = 0.9  # a share that half of the days reach says nothing: every session is a new user
    max_rise: float = 0.25  # of a share over the largest usual one
    max_small_rise: float = 0.15  # of one user's share and of doubled rows
    # The shares below are too large for any log, unless it is known for them.
    max_share_top_user: float = 0.25  # a shop's largest customer of the day stays below, in 98 of 100
    max_share_top_item: float = 0.5
    max_share_unknown: float = 0.999  # users or items: another scheme of ids
    max_share_doubled: float = 0.2
    max_share_late: float = 0.5
    max_share_same_second: float = 0.5
    max_hole_hours: float = 60 * 24  # without earlier days: times are shifted, or in another unit
    max_usual_hole_hours: float = 14 * 24  # with them, or
    max_hole_factor: float = 10.0  # times the median hole; a shop's Christmas is 12 days, 7 times its weekend


def parse_limits(text: str) -> GateLimits:
    """Limits written as in "metric=hr@20:tolerance=0.1", the others as they are. OptionError for unknown ones."""
    limits = find_instance("gate", f"gate:{text}" if text else "gate", {"gate": GateLimits()})
    parse_metric(limits.metric)
    return limits


@dataclass(frozen=True, eq=False)
class HoldoutValues:
    """What challenger and live version reached, a value from 0 to 1 for each user, the same users for both."""

    challenger_U: Float64Array  # on the newest events, which neither has learnt from
    champion_U: Float64Array
    older_challenger_O: Float64Array  # on older ones that were held back
    older_champion_O: Float64Array
    earlier_values: Sequence[float] = ()  # what live versions before reached on their newest events, the oldest first

    def __post_init__(self) -> None:
        assert self.challenger_U.shape == self.champion_U.shape
        assert self.older_challenger_O.shape == self.older_champion_O.shape


@dataclass(frozen=True)
class Verdict:
    """Promoted exactly where there are no reasons against it; notes say what could not be judged, and why."""

    promoted: bool
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)


def find_anomalies(
    day: DeliveryStats, earlier: Sequence[DeliveryStats], limits: GateLimits = GateLimits()
) -> list[str]:
    """Sentences on what is out of the ordinary, against the days before, the oldest first.

    Leave out of `earlier` what was refused, or a week of bad days is usual. Where a log changed for good, let the next
    days pass by hand: after three the limits have moved.
    """
    if not day.n_rows:
        return [
            f"the day has no new rows ({_format_percent(day.share_known)} of the delivered ones were there already)."
        ]
    recent = earlier[-limits.n_recent_days :]
    return [
        *_count_anomalies(day, recent, limits),
        *_share_anomalies(day, recent, limits),
        *_time_anomalies(day, recent, limits),
    ]


def _count_anomalies(day: DeliveryStats, recent: Sequence[DeliveryStats], limits: GateLimits) -> list[str]:
    if len(recent) < limits.min_earlier_days:
        return []
    days = [*recent, day]
    return [
        *_outside_usual_range("rows", [d.n_rows for d in days], limits.max_drop_factor, limits.max_growth_factor),
        *_outside_usual_range("users", [d.n_users for d in days], limits.max_drop_factor, limits.max_growth_factor),
        *_outside_usual_range("items", [d.n_items for d in days], inf, limits.max_growth_factor),
    ]


def _outside_usual_range(label: str, values: Sequence[int], drop_factor: float, growth_factor: float) -> list[str]:
    *past, today = values
    least, most = _usual_range(past)
    if least / drop_factor <= today <= most * growth_factor:
        return []
    limit = f"fewer than {least / drop_factor:,.0f}" if today < least else f"more than {most * growth_factor:,.0f}"
    usual = f"the {len(past)} days before had {least:,.0f} to {most:,.0f} as a rule"
    return [f"the day has {today:,} {label}; {usual}, and {limit} are out of the ordinary."]


def _usual_range(values: Sequence[float]) -> tuple[float, float]:
    """Least and most, without one in DAYS_PER_OUTLIER at either end: some day was odd, and weekends are not."""
    ordered, n = sorted(values), len(values) // DAYS_PER_OUTLIER
    return ordered[n], ordered[-1 - n]


def _share_anomalies(day: DeliveryStats, recent: Sequence[DeliveryStats], limits: GateLimits) -> list[str]:
    days = [*recent, day]
    found = _above_usual_share(
        "of the delivered rows say what another says",
        [d.share_doubled for d in days],
        limits.max_share_doubled,
        limits.max_small_rise,
        limits,
    )
    if day.n_rows >= limits.min_rows:
        top_user, top_item = [d.share_top_user for d in days], [d.share_top_item for d in days]
        found += _above_usual_share(
            "of the rows are of one user", top_user, limits.max_share_top_user, limits.max_small_rise, limits
        )
        found += _above_usual_share(
            "of the rows are on one item", top_item, limits.max_share_top_item, limits.max_rise, limits
        )
        items = [d.share_unknown_items for d in days]
        found += _above_usual_share(
            "of the rows are on items not seen before", items, limits.max_share_unknown, limits.max_rise, limits
        )
    if day.n_rows >= limits.min_rows and recent:  # without a day before, users may be sessions
        users = [d.share_unknown_users for d in days]
        found += _above_usual_share(
            "of the rows are of users not seen before", users, limits.max_share_unknown, limits.max_rise, limits
        )
    heads = [d.share_head for d in recent if d.share_head is not None]
    if day.n_rows >= limits.min_rows and len(heads) >= limits.min_earlier_days and day.share_head is not None:
        least = _usual_range(heads)[0]
        if day.share_head < least / limits.max_head_drop_factor:
            found.append(
                f"{_format_percent(day.share_head)} of the rows are on items that had half of the attention lately; "
                f"on the {len(heads)} days before it was {_format_percent(least)} or more as a rule: are the clicks "
                "made up?"
            )
    if day.n_users >= limits.min_users_same_second and (recent or not day.whole_days):
        seconds = [d.share_same_second for d in days]
        found += _above_usual_share(
            "of the users have a row in one second", seconds, limits.max_share_same_second, limits.max_rise, limits
        )
    late = "of the rows are older than the newest one that was known"
    if day.gap_hours is not None and day.gap_hours < 0:
        late += f" (the middle row by {-day.gap_hours:,.0f} hours)"
    shares = [d.share_late for d in days]
    return found + _above_usual_share(late, shares, limits.max_share_late, limits.max_rise, limits)


def _above_usual_share(
    label: str, values: Sequence[float | None], max_share: float, max_rise: float, limits: GateLimits
) -> list[str]:
    """A share above `max_share`, or above what is usual by `max_rise`; what is usual passes in any case."""
    past, today = [value for value in values[:-1] if value is not None], values[-1]
    usual = _usual_range(past)[1] if past else 0.0
    limit = max([max_share, *past])
    if len(past) >= limits.min_earlier_days:
        limit = max(usual, min(usual + max_rise, max_share))
    if today is None or today <= limit or (past and median(past) >= limits.uninformative_share):
        return []
    before = f"; on the {len(past)} days before it was {_format_percent(usual)} at most as a rule" if past else ""
    return [f"{_format_percent(today)} {label}{before}; more than {_format_percent(limit)} is out of the ordinary."]


def _time_anomalies(day: DeliveryStats, recent: Sequence[DeliveryStats], limits: GateLimits) -> list[str]:
    found = []
    holes = [d.hole_hours for d in recent if d.hole_hours is not None]
    limit = limits.max_hole_hours
    if len(holes) >= limits.min_earlier_days:
        limit = max(limits.max_usual_hole_hours, limits.max_hole_factor * median(holes))
    if day.hole_hours is not None and day.hole_hours > limit:
        found.append(
            f"for {day.hole_hours:,.0f} hours before some row there is none; more than {limit:,.0f} are out of the "
            "ordinary: are the times in another unit, or shifted?"
        )
    spans = [d.span_hours for d in recent if d.span_hours is not None]
    if day.span_hours is not None and len(spans) >= limits.min_earlier_days:
        shortest = _usual_range(spans)[0]
        if day.span_hours < shortest / limits.max_shortening_factor:
            found.append(
                f"the day's rows span {day.span_hours:.3g} hours; those of the {len(spans)} days before spanned "
                f"{shortest:.3g} or more as a rule, and less than {shortest / limits.max_shortening_factor:.3g} is "
                "out of the ordinary: is the end missing?"
            )
    return found


def judge_challenger(
    day: DeliveryStats, earlier: Sequence[DeliveryStats], values: HoldoutValues, limits: GateLimits = GateLimits()
) -> Verdict:
    """Refused where the day looks odd, or where a value is no number, below the floor, or worse by more than accepted.

    On older events any loss is accepted of a version that is better on the newest ones, beyond chance: news forget.
    `numbers` holds, where they could be computed: the metric, the same followed by " live", "low" and "high", the ends
    of the 95 % interval of their difference, "unnoticed", "floor", and of the older events "older", "older_live" and
    "forgetting", what was lost.
    """
    reasons, notes = find_anomalies(day, earlier, limits), _missing_checks(day, earlier, limits)
    if broken := _invalid_values(values):
        return Verdict(False, (*reasons, *broken), tuple(notes))
    new_U, live_U = values.challenger_U, values.champion_U
    older_O, older_live_O = values.older_challenger_O, values.older_champion_O
    comparisons = [
        _compare("the newest events", new_U, live_U, limits.tolerance, limits),
        _check_floor(new_U, values.earlier_values, limits),
        _compare("older events", older_O, older_live_O, limits.forgetting, limits),
    ]
    newest, floor, older = (part.numbers for part in comparisons)
    named = {"new": limits.metric, "live": f"{limits.metric} live"}
    numbers = {named.get(name, name): value for name, value in newest.items()} | floor
    if older:
        numbers |= {"older": older["new"], "older_live": older["live"], "forgetting": older["live"] - older["new"]}
    if newest.get("low", 0.0) > 0:  # the world moves on: what is newer is liked instead
        accepted = "That is accepted for what it gains on the newest events."
        accepted_losses = [f"{reason} {accepted}" for reason in comparisons[2].reasons]
        comparisons[2] = Verdict(True, notes=(*comparisons[2].notes, *accepted_losses))
    reasons += [reason for part in comparisons for reason in part.reasons]
    notes += [note for part in comparisons for note in part.notes]
    return Verdict(not reasons, tuple(reasons), tuple(notes), numbers)


def _missing_checks(day: DeliveryStats, earlier: Sequence[DeliveryStats], limits: GateLimits) -> list[str]:
    found = []
    if len(earlier) < limits.min_earlier_days:
        n = len(earlier)
        found.append(
            f"{n} earlier days; rows, users and shares are compared with them from {limits.min_earlier_days} on."
        )
    if day.n_rows < limits.min_rows:
        found.append(f"{day.n_rows} rows are too few to judge the shares of users and items by.")
    return found


def _invalid_values(values: HoldoutValues) -> list[str]:
    """Metrics are numbers from 0 to 1."""
    found = []
    for label, values_U in (
        ("of the new version on the newest events", values.challenger_U),
        ("of the live version on the newest events", values.champion_U),
        ("of the new version on older events", values.older_challenger_O),
        ("of the live version on older events", values.older_champion_O),
        ("that live versions before had", np.asarray(values.earlier_values)),
    ):
        n_bad = int((~((values_U >= 0) & (values_U <= 1))).sum())  # NaN is neither
        if n_bad:
            found.append(f"{n_bad:,} of the {len(values_U):,} values {label} are no numbers from 0 to 1.")
    return found


def _compare(where: str, new_U: Float64Array, live_U: Float64Array, max_loss: float, limits: GateLimits) -> Verdict:
    """Refused if the mean lost more than accepted, and the loss is more than chance."""
    n_users = len(new_U)
    if not n_users:
        return Verdict(True, notes=(f"no user could be asked for {where}.",))
    new, live = float(new_U.mean()), float(live_U.mean())
    numbers = {"new": new, "live": live}
    values = f"{limits.metric} {new:.4f} against {live:.4f} of the live version on {n_users:,} users of {where}"
    if n_users < limits.min_users:
        return Verdict(True, (), (f"{values}: with fewer than {limits.min_users} they are not compared.",), numbers)
    change = new - live
    low, high = (float(end_M[0]) for end_M in bootstrap_interval((new_U - live_U)[:, None]))
    numbers |= {"low": low, "high": high}
    if live < NEAR_ZERO:
        return Verdict(True, (), (f"{values}: there is nothing to lose.",), numbers)
    z = NormalDist().inv_cdf(1 - limits.false_alarm_rate)
    detectable = [_detectable_loss(new_U - live_U, live_U, n_errors) for n_errors in (POWER_Z, z + POWER_Z)]
    numbers["unnoticed"] = min(1.0, max(max_loss + detectable[0], detectable[1]))
    if change < -max_loss * live and change + z / INTERVAL_Z * (high - change) < 0:
        interval = f"interval {_format_change(low / live)} to {_format_change(high / live)}"
        shown = f"{_format_change(change / live)}, {interval}"
        return Verdict(False, (f"{values}: {shown}; at most {_format_change(-max_loss)} is accepted.",), (), numbers)
    notes = []
    if numbers["unnoticed"] > limits.max_undetected_loss:
        n_differ = int((new_U != live_U).sum())
        differ = f"{n_differ:,} of {n_users:,} users see a difference"
        notes.append(f"{where}: {differ}, so a loss below {_format_percent(numbers['unnoticed'])} may pass for chance.")
    return Verdict(True, (), tuple(notes), numbers)


def _detectable_loss(differences_U: Float64Array, live_U: Float64Array, z: float) -> float:
    """The share L of the live version's mean m whose loss is z standard errors, if it means that a share L of the users
    gets nothing more: L m = z sqrt((var(differences) + L mean(live^2)) / U), solved for L.
    """
    mean, variance_factor = live_U.mean(), z**2 / len(live_U)
    b, c = variance_factor * (live_U**2).mean() / mean**2, variance_factor * differences_U.var() / mean**2
    return float((b + np.sqrt(b**2 + 4 * c)) / 2)


def _check_floor(new_U: Float64Array, earlier_values: Sequence[float], limits: GateLimits) -> Verdict:
    """Refused if even the upper end of the value's interval is below the floor: events at random fool both versions."""
    recent = earlier_values[-limits.n_recent_days :]
    if len(new_U) < limits.min_users:
        return Verdict(True)  # a note says so already
    if len(recent) < limits.min_floor_versions:
        note = f"{len(recent)} values of live versions before; {limits.min_floor_versions} make a floor."
        return Verdict(True, notes=(note,))
    usual = float(np.quantile(recent, 0.25))
    floor = limits.floor_share * usual
    # One user more with a hit: that n users had none proves no share of 0, but one below 3 / n.
    high = float(bootstrap_interval(np.append(new_U, MEAN_HIT_VALUE)[:, None])[1][0])
    if high >= floor:
        return Verdict(True, numbers={"floor": floor})
    mean = float(new_U.mean())
    value = f"{limits.metric} {mean:.4f} on {len(new_U):,} users of the newest events, {high:.4f} at best"
    before = f"three in four of {len(recent)} live versions before had {usual:.4f} or more"
    reason = f"{value}; {before}, and less than {floor:.4f} is refused: are the day's events made up?"
    return Verdict(False, (reason,), (), {"floor": floor})


def _format_percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _format_change(share: float) -> str:
    return f"{100 * share:+.3g} %"
