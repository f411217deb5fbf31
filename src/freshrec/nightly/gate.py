"""The gate: decide whether a new version replaces the live one, from statistics of the delivery and two comparisons.

A new version has learned events that the live one has not, so it is promoted unless the gate finds a reason against it.
There are four kinds of reasons. The delivery is unusual. The loss on the newest events exceeds both the tolerance and
chance. The quality is far below that of earlier versions. The loss on older events is too large. The cause of a refusal
decides what becomes of the events (`nightly/deferral.py`).

Guarantees of the gate on real logs, where quality varies from model to model (tests/test_gate.py):

- Each of the two comparisons refuses an equally good update in at most one of 200 nights, for any number of users.
  On ordinary deliveries such an update is promoted in 99 of 100 nights.
- An update that loses more than `max_undetected_loss` (a share of the live quality) is refused in 95 of 100 nights.
  The share that can be detected depends on the number of users and on how much they differ. Between two seeds of the
  blend it is 16 to 59 % with 500 users, and 12 to 18 % with 2,000. A note warns if it is large.
  With fewer than `min_users` users the versions are not compared.
- No gain is required, so no version is promoted because of a gain by chance.
- Losses within the tolerance can add up over many nights. The gate does not notice this. To notice it, compare with a
  version that is some weeks old (`freshrec diff`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np

from freshrec.config import find_instance
from freshrec.nightly.anomalies import (
    amount_anomalies,
    gap_anomalies,
    head_anomalies,
    population_anomalies,
    share_anomalies,
    unknown_id_anomalies,
)
from freshrec.nightly.delivery_stats import DeliveryStats
from freshrec.nightly.notes import Note, count_of, format_percent
from freshrec.replay.metrics import Float64Array, parse_metric
from freshrec.replay.significance import CONFIDENCE_LEVEL, bootstrap_interval

MEAN_HIT_VALUE = 0.5  # mean value of a hit in real models: 0.4 to 0.6 for ndcg@20
NEAR_ZERO = 1e-9  # a smaller mean metric counts as 0
POWER_Z = NormalDist().inv_cdf(0.95)  # standard errors beyond a limit that 95 of 100 samples exceed
INTERVAL_Z = NormalDist().inv_cdf((1 + CONFIDENCE_LEVEL) / 2)  # half width of an interval, in standard errors


@dataclass(frozen=True)
class GateLimits:
    """Limits of the gate. Of 1,321 ordinary deliveries of ten real logs, 4 hours to a week long, 98 % pass."""

    metric: str = "ndcg@20"  # Metric by which versions are compared; higher is better.
    tolerance: float = 0.05  # Accepted loss on the newest events, as a share of the live version's quality.
    forgetting: float = 0.10  # Accepted loss on older events, as a share of the live version's quality.
    false_alarm_rate: float = 0.0025  # Probability that a comparison refuses an equally good version (one-sided).
    min_users: int = 30  # With fewer users, versions are not compared.
    max_undetected_loss: float = 0.30  # A note warns if a larger loss could go unnoticed; share of the live quality.
    floor_share: float = 0.5  # Lowest accepted quality, as a share of the lower quartile of earlier live versions.
    min_floor_versions: int = 3  # Earlier live versions that the check of the lowest quality needs.

    max_refused_in_a_row: int = 3  # Loss of quality, or new ids, that so many deliveries in a row show are accepted.
    min_recurrence: float = 0.1  # Refused rows with unknown ids are learned once this share of the ids came again.
    max_spoiled_updates: int = 3  # A deferred delivery that spoils so many updates is set aside.

    n_recent_days: int = 28  # Number of earlier deliveries that a delivery is compared with; 28 days have 4 weekends.
    min_earlier_days: int = 7  # With fewer earlier deliveries, a delivery is not compared with them.
    max_drop_factor: float = 1.75  # Lowest usual number of rows (or users) divided by this is the lowest accepted one.
    max_growth_factor: float = 3.0  # Highest usual number of rows, users or items times this is the highest accepted.
    max_shortening_factor: float = 1.3  # Shortest usual time span divided by this is the shortest accepted one.

    max_head_drop_factor: float = 2.0  # Lowest usual share of popular items divided by this is the lowest accepted one.
    min_rows: int = 50  # With fewer rows, shares of users and items are not checked.
    min_users_same_second: int = 20  # With fewer users, the share with events in the same second is not checked.
    uninformative_share: float = 0.9  # A share whose usual (median) value is this high is not checked.
    max_rise: float = 0.25  # Accepted rise of a share over its usual maximum, in absolute terms.
    max_small_rise: float = 0.15  # The same for duplicates and for the most active user.
    max_first_rise: float = 0.75  # With few deliveries: accepted rise of unknown users; share of the possible one.
    # The limits below hold in any log, unless earlier deliveries show that a larger share is usual there.
    max_share_top_user: float = 0.25  # Highest accepted share of rows of one user; 98 % of shop days stay below.
    # A user above it passes if it is known and its items are like those of the others.
    min_past: float = 1 / 3  # Lowest number of earlier events of such a user, relative to the new ones.
    min_likeness: float = 0.5  # Lowest share of different and of popular items of such a user, relative to the others.
    separate: bool = True  # Whether the rows of such a user are judged apart from the rest of the delivery.
    max_share_top_item: float = 0.5  # Highest accepted share of rows of one item.
    max_share_unknown: float = 0.999  # Highest accepted share of rows with unknown ids; more suggests other ids.
    max_share_doubled: float = 0.2  # Highest accepted share of duplicates.
    max_share_late: float = 0.5  # Highest accepted share of late rows.
    max_share_same_second: float = 0.5  # Highest accepted share of users with an event in the same second.
    max_hole_hours: float = 60 * 24  # Longest accepted gap between rows, in hours, while the log is short.
    max_usual_hole_hours: float = 14 * 24  # Longest accepted gap, in hours, once there are enough earlier deliveries.
    max_hole_factor: float = 10.0  # Also accepted: the median gap times this. A shop's Christmas takes 7.


def parse_limits(text: str) -> GateLimits:
    """Return the limits written in `text`, such as "metric=hr@20:tolerance=0.1"; the others keep their defaults.

    Raises OptionError for an unknown limit, value or metric.
    """
    limits = find_instance("gate", f"gate:{text}" if text else "gate", {"gate": GateLimits()})
    parse_metric(limits.metric)
    return limits


@dataclass(frozen=True, eq=False)
class HoldoutValues:
    """The metric of challenger and live version, from 0 to 1, for each user; both have the same users."""

    challenger_U: Float64Array  # on the newest events, which neither version has learned
    champion_U: Float64Array
    older_challenger_O: Float64Array  # on older held-out events
    older_champion_O: Float64Array
    earlier_values: Sequence[float] = ()  # mean metric of earlier live versions on their newest events, oldest first
    no_newest_reason: str = ""  # why no event of the delivery is held out; "" = some are

    @property
    def n_users(self) -> list[int]:
        """The numbers of users on the newest and on older events."""
        return [len(self.challenger_U), len(self.older_challenger_O)]

    def __post_init__(self) -> None:
        assert self.challenger_U.shape == self.champion_U.shape
        assert self.older_challenger_O.shape == self.older_champion_O.shape


Cause = Literal["quality", "amount", "floor", "ids", "head", "gap", "content", "error"]  # see `nightly/deferral.py`


@dataclass(frozen=True)
class Verdict:
    """The result of the gate: promoted if there are no reasons against it. Notes say what could not be checked."""

    promoted: bool
    reasons: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)
    causes: frozenset[Cause] = frozenset()  # the kinds of the reasons


class HoldoutEvents(NamedTuple):
    """Words for the held-out events of a comparison."""

    kind: str  # part of the codes of notes
    name: str
    missing: str  # why there may be none


NEWEST = HoldoutEvents("newest", "the newest events", "no user in them has an earlier event")
OLDER = HoldoutEvents("older", "older events", "none are held out yet")


def find_anomalies(
    day: DeliveryStats, earlier: Sequence[DeliveryStats], limits: GateLimits = GateLimits()
) -> list[str]:
    """Describe the anomalies of a delivery, compared with earlier ones (oldest first).

    Pass only deliveries that were promoted, so that a week of bad data does not become normal. If a log changes
    permanently, promote the next deliveries with --force. After three of them, the limits have adapted.
    """
    recent = earlier[-limits.n_recent_days :]
    return [
        *amount_anomalies(day, recent, limits),
        *content_anomalies(day, recent, limits),
        *gap_anomalies(day, recent, limits),
        *population_anomalies(day, recent, limits),
    ]


def content_anomalies(day: DeliveryStats, earlier: Sequence[DeliveryStats], limits: GateLimits) -> list[str]:
    """Describe what looks wrong in a delivery, whatever its size: bots, duplicates, equal and late times."""
    if not day.n_rows:
        known = f" {format_percent(day.share_known)} of its rows are already in the log." if day.share_known else ""
        return [f"The delivery has no new rows.{known}"]
    return share_anomalies(day, earlier, limits)


def judge_challenger(
    day: DeliveryStats,
    earlier: Sequence[DeliveryStats],
    values: HoldoutValues,
    limits: GateLimits = GateLimits(),
    is_amount_usual: bool = False,
) -> Verdict:
    """Return the verdict on a challenger. With `is_amount_usual`, the size of the delivery is accepted.

    It is refused if the delivery is unusual, if a value is not a metric, if the newest events show a value below the
    floor, or if a comparison shows too large a loss. A loss on older events is accepted if the challenger is better on
    the newest ones, beyond chance: tastes change, and the newest events matter more.

    `numbers` holds what could be computed. On the newest events: the metric of the challenger (under the metric's
    name) and of the live version ("<metric> live"); "low" and "high", the 95 % interval of their difference;
    "unnoticed", the relative loss that could go unnoticed; "floor". On older events: "older", "older_live", and
    "forgetting", the live value minus the new one (positive = lost).
    """
    notes = _missing_checks(day, earlier, limits)
    of_day = _anomalies_by_cause(day, earlier, limits)
    if is_amount_usual:
        why = "This is accepted because the previous delivery was unusual too."
        notes += [Note("accepted-amount", f"{anomaly} {why}") for anomaly in of_day["amount"]]
        of_day["amount"] = []
    if broken := _invalid_values(values):
        return _verdict(of_day | {"error": broken}, notes, {})
    new_U, live_U = values.challenger_U, values.champion_U
    older_O, older_live_O = values.older_challenger_O, values.older_champion_O
    newest_events = NEWEST._replace(missing=values.no_newest_reason or NEWEST.missing)
    comparisons = [
        _compare(newest_events, new_U, live_U, limits.tolerance, limits),
        _check_floor(new_U, values.earlier_values, limits),
        _compare(OLDER, older_O, older_live_O, limits.forgetting, limits),
    ]
    newest, floor, older = (part.numbers for part in comparisons)
    named = {"new": limits.metric, "live": f"{limits.metric} live"}
    numbers = {named.get(name, name): value for name, value in newest.items()} | floor
    if older:
        numbers |= {"older": older["new"], "older_live": older["live"], "forgetting": older["live"] - older["new"]}
    if newest.get("low", 0.0) > 0:
        accepted = "This loss is accepted because the new version is better on the newest events, beyond chance."
        accepted_losses = [Note("accepted-loss", f"{reason} {accepted}") for reason in comparisons[2].reasons]
        comparisons[2] = Verdict(True, notes=(*comparisons[2].notes, *accepted_losses))
    notes += [note for part in comparisons for note in part.notes]
    loss, below_floor, forgotten = (list(part.reasons) for part in comparisons)
    quality = [*loss, *forgotten]
    return _verdict(of_day | {"quality": quality, "floor": below_floor}, notes, numbers)


def judge_failure(
    error: str, day: DeliveryStats, earlier: Sequence[DeliveryStats], limits: GateLimits = GateLimits()
) -> Verdict:
    """Return the verdict on a delivery on which training failed. `error`: the reason for the failure."""
    failure: dict[Cause, list[str]] = {"error": [error]}
    return _verdict(failure | _anomalies_by_cause(day, earlier, limits), (), {})


def _anomalies_by_cause(
    day: DeliveryStats, earlier: Sequence[DeliveryStats], limits: GateLimits
) -> dict[Cause, list[str]]:
    recent = earlier[-limits.n_recent_days :]
    return {
        "amount": amount_anomalies(day, recent, limits),
        "content": content_anomalies(day, recent, limits),
        "gap": gap_anomalies(day, recent, limits),
        "ids": unknown_id_anomalies(day, recent, limits),
        "head": head_anomalies(day, recent, limits),
    }


def _verdict(reasons: dict[Cause, list[str]], notes: Sequence[Note], numbers: dict[str, float]) -> Verdict:
    """Return the verdict that follows from the reasons of each kind."""
    texts = tuple(text for of_kind in reasons.values() for text in of_kind)
    causes = frozenset(cause for cause, of_kind in reasons.items() if of_kind)
    return Verdict(not texts, texts, tuple(notes), numbers, causes)


def _missing_checks(day: DeliveryStats, earlier: Sequence[DeliveryStats], limits: GateLimits) -> list[Note]:
    found = []
    if len(earlier) < limits.min_earlier_days:
        text = (
            f"The store has {count_of(len(earlier), 'earlier delivery', 'earlier deliveries')}. "
            f"Numbers of rows and users are compared with earlier deliveries once there are {limits.min_earlier_days}."
        )
        found.append(Note("few-deliveries", text))
    if day.n_rows < limits.min_rows:
        text = (
            f"The delivery has only {count_of(day.n_rows, 'row')}. "
            f"The shares of single users and items are checked from {limits.min_rows} rows on."
        )
        found.append(Note("few-rows", text))
    first = day.share_new_users_first
    is_unjudged = not earlier if first is None else day.n_rows < limits.min_rows and first < limits.uninformative_share
    if is_unjudged and day.share_unknown_users > limits.max_share_unknown:
        text = (
            f"{format_percent(day.share_unknown_users)} of the rows have an unknown user id. Too little is known to "
            "judge this. Check whether the ids have changed."
        )
        found.append(Note("unknown-users", text))
    return found


def _invalid_values(values: HoldoutValues) -> list[str]:
    """Report values that are not numbers from 0 to 1."""
    found = []
    for label, values_U in (
        ("of the new version on the newest events", values.challenger_U),
        ("of the live version on the newest events", values.champion_U),
        ("of the new version on older events", values.older_challenger_O),
        ("of the live version on older events", values.older_champion_O),
        ("of earlier live versions", np.asarray(values.earlier_values)),
    ):
        n_bad = int((~((values_U >= 0) & (values_U <= 1))).sum())  # NaN is neither
        if n_bad:
            verb = "is not a number" if n_bad == 1 else "are not numbers"
            found.append(f"{n_bad:,} of the {len(values_U):,} values {label} {verb} from 0 to 1.")
    return found


def _compare(
    events: HoldoutEvents, new_U: Float64Array, live_U: Float64Array, max_loss: float, limits: GateLimits
) -> Verdict:
    """Refuse if the mean fell by more than `max_loss` (a share of the live value), and by more than chance."""
    n_users, metric = len(new_U), limits.metric
    if not n_users:
        text = f"The versions were not compared on {events.name}, because {events.missing}."
        return Verdict(True, notes=(Note(f"no-users-{events.kind}", text),))
    new, live = float(new_U.mean()), float(live_U.mean())
    numbers = {"new": new, "live": live}
    if n_users < limits.min_users:
        text = (
            f"On {events.name}, {metric} could be measured for {count_of(n_users, 'user')} only. "
            f"The versions are compared from {limits.min_users} users on."
        )
        return Verdict(True, (), (Note(f"few-users-{events.kind}", text),), numbers)
    change = new - live
    low, high = (float(end_M[0]) for end_M in bootstrap_interval((new_U - live_U)[:, None]))
    numbers |= {"low": low, "high": high}
    if live < NEAR_ZERO:
        text = f"On {events.name}, {metric} of the live version is 0 ({n_users:,} users), so nothing can be lost."
        return Verdict(True, (), (Note(f"zero-{events.kind}", text),), numbers)
    z = NormalDist().inv_cdf(1 - limits.false_alarm_rate)
    detectable = [_detectable_loss(new_U - live_U, live_U, n_errors) for n_errors in (POWER_Z, z + POWER_Z)]
    numbers["unnoticed"] = min(1.0, max(max_loss + detectable[0], detectable[1]))
    if change < -max_loss * live and change + z / INTERVAL_Z * (high - change) < 0:
        interval = f"95 % interval {_format_change(low / live)} to {_format_change(high / live)}"
        reason = (
            f"On {events.name}, {metric} is {new:.4f} instead of {live:.4f} ({n_users:,} users): "
            f"{_format_change(change / live)}, {interval}. The limit is a loss of {format_percent(max_loss)}."
        )
        return Verdict(False, (reason,), (), numbers)
    notes = []
    if numbers["unnoticed"] > limits.max_undetected_loss:
        n_differ = int((new_U != live_U).sum())
        level = format_percent(limits.false_alarm_rate)
        loss = f"a loss of up to {format_percent(numbers['unnoticed'])}" if numbers["unnoticed"] < 1 else "any loss"
        text = (
            f"On {events.name}, {metric} differs from that of the live version for {n_differ:,} of {n_users:,} users. "
            f"With so few users, {loss} could go unnoticed at the gate's {level} level."
        )
        notes.append(Note(f"weak-test-{events.kind}", text))
    return Verdict(True, (), tuple(notes), numbers)


def _detectable_loss(differences_U: Float64Array, live_U: Float64Array, z: float) -> float:
    """Smallest detectable relative loss L, which solves L m = z sqrt((var(differences) + L mean(live^2)) / U).

    m is the live version's mean. A loss of L means that a share L of the users have a metric of 0.
    """
    mean, variance_factor = live_U.mean(), z**2 / len(live_U)
    b, c = variance_factor * (live_U**2).mean() / mean**2, variance_factor * differences_U.var() / mean**2
    return float((b + np.sqrt(b**2 + 4 * c)) / 2)


def quality_floor(earlier_values: Sequence[float], limits: GateLimits) -> float | None:
    """Return the lowest accepted quality: a share of the lower quartile of recent versions. None with too few."""
    recent = earlier_values[-limits.n_recent_days :]
    return limits.floor_share * float(np.quantile(recent, 0.25)) if len(recent) >= limits.min_floor_versions else None


def _check_floor(new_U: Float64Array, earlier_values: Sequence[float], limits: GateLimits) -> Verdict:
    """Refuse if even the upper end of the metric's interval is below the floor: random events mislead both versions."""
    recent, floor = earlier_values[-limits.n_recent_days :], quality_floor(earlier_values, limits)
    if len(new_U) < limits.min_users:
        return Verdict(True)  # the comparison adds a note already
    if floor is None:
        text = (
            f"{limits.metric} is known for {count_of(len(recent), 'earlier live version')}. "
            f"From {limits.min_floor_versions} on, an unusually low value is refused."
        )
        return Verdict(True, notes=(Note("no-floor", text),))
    # Add one user with a hit. If n users have none, the true share need not be 0, but is below 3 / n.
    high = float(bootstrap_interval(np.append(new_U, MEAN_HIT_VALUE)[:, None])[1][0])
    if high >= floor:
        return Verdict(True, numbers={"floor": floor})
    mean = float(new_U.mean())
    reason = (
        f"On the newest events, {limits.metric} is {mean:.4f} ({len(new_U):,} users; 95 % interval up to {high:.4f}). "
        f"Three in four of the last {len(recent)} live versions reached {floor / limits.floor_share:.4f}. "
        f"Less than {floor:.4f} is refused. Check whether the events are genuine."
    )
    return Verdict(False, (reason,), (), {"floor": floor})


def _format_change(share: float) -> str:
    return f"{100 * share:+.3g} %"
