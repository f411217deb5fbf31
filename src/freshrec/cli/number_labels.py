"""The label, section, unit and direction of every number that a version's manifest can hold.

`freshrec status`, `diff` and `history --long` print numbers with these labels. JSON output keeps the keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from freshrec.disk_names import COST_KEYS

SECTIONS = ("new events", "quality", "time", "training")  # in the order in which they are printed
HIGHER = "0 to 1, higher is better"


class NumberLabel(NamedTuple):
    """Section, label, unit and explanation of a number."""

    section: str  # one of SECTIONS
    label: str
    unit: str  # a key of `format_quantity`
    explanation: str = ""


def _new(label: str, explanation: str = "") -> NumberLabel:
    return NumberLabel("new events", label, "count", explanation)


def _quality(label: str, explanation: str, unit: str = "fraction") -> NumberLabel:
    return NumberLabel("quality", label, unit, explanation)


def _time(label: str, explanation: str = "", unit: str = "CPU-s") -> NumberLabel:
    return NumberLabel("time", label, unit, explanation)


def _training(label: str, unit: str, explanation: str = "") -> NumberLabel:
    return NumberLabel("training", label, unit, explanation)


LABELS: dict[str, NumberLabel] = {
    # events of the update
    "new_events": _new("new events", "received by this update"),
    "new_users": _new("new users"),
    "new_items": _new("new items"),
    "late": _new("late events", "older than the newest event known before"),
    "gained_interests": _new("users who gained an interest"),
    "lost_interests": _new("users who lost an interest"),
    # measurements of the gate; the parent was the live version at that time
    "low": _quality("difference, lower end", "95 % interval of this minus its parent", "change"),
    "high": _quality("difference, upper end", "positive = better than the parent", "change"),
    "asked": _quality("queries", "held-out events that were tested", "count"),
    "unnoticed": _quality("smallest loss noticed", "of its parent's quality; 95 % certain", "loss"),
    "floor": _quality("floor", "a version is refused below it"),
    "older": _quality("older events, this version", f"same metric, {HIGHER}"),
    "older_live": _quality("older events, its parent", "same queries, higher is better"),
    "forgetting": _quality("forgetting", "on older events, positive = lost", "change"),
    "full_gain": _quality("gain of a full retrain", "over the update; positive = better", "change"),
    "full_low": _quality("gain, lower end", "95 % interval", "change"),
    "full_high": _quality("gain, upper end", "95 % interval", "change"),
    # times
    "wait_s": _time("total time", "reading, learning and measuring", "s"),
    "update_s": _time("learning", "", "s"),
    "update_cpu_s": _time("learning, processor time", "all threads together"),
    "full_s": _time("a full retrain", "estimated, unless this update tried one", "s"),
    "train_cpu_s": _time("gradient training"),
    "extract_cpu_s": _time("computing users' interests"),
    "refit_cpu_s": _time("fitting the blend's weights"),
    "lr_choice_cpu_s": _time("choosing the learning rate"),
    "epoch_choice_cpu_s": _time("choosing the number of epochs"),
    "choose_cpu_s": _time("choosing past events to replay"),
    "remember_cpu_s": _time("choosing exemplars"),
    "fisher_cpu_s": _time("estimating weight importance", "Fisher information"),
    "generator_cpu_s": _time("training the weight generator"),
    "transfer_cpu_s": _time("training the transfer network"),
    "detect_cpu_s": _time("detecting new interests"),
    "rehearsal_cpu_s": _time("choosing settings", "by simulated updates"),
    "absorb_cpu_s": _time("counting events"),
    "tune_cpu_s": _time("tuning"),
    # training
    "rows_read": _training("events trained on", "count", "replayed ones included"),
    "epochs": _training("epochs", "count", "fixed, or chosen on held-out events"),
    "stopped_by_patience": _training("epochs stopped by patience", "fraction", "share of trainings"),
    "stopped_by_minimum": _training("epochs raised to the minimum", "fraction", "share of trainings"),
    "stopped_by_maximum": _training("epochs stopped by the maximum", "fraction", "share of trainings"),
    "mean_k": _training("interests per user", "number", "mean over users who have any"),
    "interest_bytes": _training("size of interests per user", "bytes", "mean over users who have any"),
    "trained_worth": _training("gain of the trained expert", "number", "nats per query, higher is better"),
    "trained_worth_p": _training("p-value of that gain", "number", "below 0.05 = beyond chance"),
    "lr_factor": _training("learning-rate factor", "number", "chosen on held-out events; 0 = none"),
    "lr_scale": _training("learning-rate factor, updates", "number", "chosen by simulated updates"),
    "current_negatives": _training("negatives from new events only", "count", "1 = yes, 0 = no"),
    "replay_share": _training("share of past events replayed", "number", "0 to 1"),
    "average_epochs": _training("weights averaged over epochs", "count", "1 = yes, 0 = no"),
    "nid_rate": _training("users with new interests", "fraction", "share of the users with new events"),
    "tuned_to": _training("option chosen by tuning", "count", "its position in the list"),
}
METRIC_SUFFIXES = {  # of a metric's name, such as "ndcg@20 live"
    "": ("this version", f"{HIGHER}; newest events"),
    " live": ("its parent", "the live version then; same queries"),
    " popularity": ("popularity", "baseline without personal lists"),
}


class NumberRow(NamedTuple):
    """A number as it is printed."""

    section: str
    label: str
    value: str
    explanation: str


def label_of(key: str) -> NumberLabel:
    """Return the label of a key in a manifest's numbers. The key may be a current or a former name.

    A custom strategy may report numbers that are not in the table. Their label is the key in words.
    """
    key = COST_KEYS.get(key, key)
    if key in LABELS:
        return LABELS[key]
    if metric := re.fullmatch(r"([\w-]+@\d+(?: among \d+ sampled)?)( live| popularity|)", key):
        version, explanation = METRIC_SUFFIXES[metric[2]]
        return _quality(f"{metric[1]}, {version}", explanation)
    if percentile := re.fullmatch(r"kl_p(\d\d)", key):
        explanation = f"{int(percentile[1])} % of the users are below"
        return _training(f"puzzlement, percentile {int(percentile[1])}", "number", explanation)
    if key.endswith("_s"):
        unit = "CPU-s" if key.endswith("_cpu_s") else "s"
        return _time(key.removesuffix("_s").removesuffix("_cpu").replace("_", " "), "reported by the strategy", unit)
    return _training(key.replace("_", " "), "number", "reported by the strategy")


def is_labelled(key: str) -> bool:
    """Whether the table holds the key, or a metric or percentile of that form."""
    return "reported by the strategy" not in label_of(key).explanation


def ordered_keys(keys: Iterable[str]) -> list[str]:
    """The keys by section, in the order of the table; metrics come first and unknown keys last."""
    places = {key: place for place, key in enumerate(LABELS)}

    def order(key: str) -> tuple[int, int]:
        place = places.get(COST_KEYS.get(key, key), -1 if "@" in key else len(places))
        return SECTIONS.index(label_of(key).section), place

    return sorted(keys, key=order)


def number_rows(numbers: Mapping[str, float]) -> list[NumberRow]:
    """The numbers of a manifest with their labels, in the order in which they are printed."""
    labels = {key: label_of(key) for key in ordered_keys(numbers)}
    return [
        NumberRow(found.section, found.label, format_quantity(numbers[key], found.unit), found.explanation)
        for key, found in labels.items()
    ]


def format_quantity(value: float, unit: str) -> str:
    """A number with its unit: qualities and their differences with 4 digits, differences with their sign."""
    match unit:
        case "fraction":
            return f"{value:.4f}"
        case "change":
            return f"{value:+.4f}"
        case "loss":
            return f"{100 * value:.3g} %" if value < 1 else "none"
        case "count":
            return f"{value:,.0f}"
        case "bytes":
            return format_bytes(value)
        case "s" | "CPU-s":
            return f"{value:,.1f} {unit}" if value >= 0.1 else f"{value:.2g} {unit}"
    return f"{value:,.4g}"


def format_bytes(n_bytes: float) -> str:
    """A size in bytes, kB, MB or GB (powers of 1000)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:,.1f} {unit}"
    return f"{n_bytes:,.0f} bytes"
