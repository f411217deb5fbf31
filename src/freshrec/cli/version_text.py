"""Versions in words: a labelled block after `fit` and `update`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freshrec.store.manifest import METRIC_KEY
from freshrec.text_layout import format_count
from freshrec.user_modules import ALLOW_IMPORT

if TYPE_CHECKING:
    from freshrec.store.manifest import Manifest

Lines = list[tuple[str, str]]  # label and text


def verdict_sentence(version: Manifest, is_deferred: bool = False) -> str:
    """State whether a version is live. `is_deferred`: whether the next update learns the events of a refused one."""
    name, parent = f"Version {version.id}", f"version {version.parent}"
    retry = "" if version.retry_of is None else f"retry of version {version.retry_of}"
    origin = f"updated from {parent}" + (f", {retry}" if retry else "")
    if version.kind == "no rows":
        return f"{name} is live. It is a copy of {parent}, because there were no new events."
    if version.promoted:
        return f"{name} is live ({origin})."
    if version.goes_live:
        return f"{name} is live because of --force, although the gate refused it ({origin})."
    refused = f"{name}{f' ({retry})' if retry else ''} was refused; {parent} stays live."
    return f"{refused} The next update tries its events again." if is_deferred else refused


def retry_command(version: Manifest, store: Path) -> str:
    """Return the command that learns the events of a version again. A version that the gate refused needs --force."""
    force = "" if version.promoted else ' --force --reason "..."'
    return f"freshrec update --retry {version.id}{force} --store {shlex.quote(str(store))}"


def update_lines(version: Manifest) -> Lines:
    """Describe an update: its events, its quality compared with the previous live version, and its time."""
    numbers = version.numbers
    if not numbers:
        return []
    lines: Lines = [("New", _size_text(version))] if "new_events" in numbers else []
    lines += _quality_lines(version)
    if "forgetting" in numbers:
        users = _compared_users(version)[1]
        measured = f" ({format_count(users, 'user')})" if users else ""
        text = f"{numbers['forgetting']:+.4f} {_gate_metric(version)} on older events{measured}; positive = lost"
        lines.append(("Forgetting", text.replace("  ", " ")))
    if "full_gain" in numbers:
        verdict = "it was taken" if numbers["full_gain"] >= 0 else "the update was kept"
        interval = f"95 % interval {numbers.get('full_low', 0.0):+.4f} to {numbers.get('full_high', 0.0):+.4f}"
        text = (
            f"{_gate_metric(version)} {numbers['full_gain']:+.4f} (positive = the full retrain is better; {interval})"
        )
        lines.append(("Retrain", f"{text.strip()}; {verdict}"))
    return [*lines, ("Time", _time_text(numbers))]


def fit_lines(version: Manifest, times: str, skipped: Sequence[str]) -> Lines:
    """Describe what `fit` read and measured. `times`: the dates of the first and last event, if known."""
    numbers, lines = version.numbers, list[tuple[str, str]]()
    read = ", ".join(f"{version.sizes[name]:,} {name}" for name in ("events", "users", "items"))
    lines.append(("Read", "; ".join([read, *([times] if times else []), *skipped])))
    metric = next((name.removesuffix(" popularity") for name in numbers if name.endswith(" popularity")), "")
    if metric:
        queries = format_count(int(numbers["asked"]), "held-out query", "held-out queries")
        values = f"{metric} {numbers[metric]:.4f}, popularity baseline {numbers[f'{metric} popularity']:.4f}"
        lines.append(("Quality", f"{values} (higher is better; {queries})"))
    return [*lines, ("Time", f"{numbers.get('wait_s', 0.0):.1f} s")]


def next_commands(store: Path, user_id: Any, modules: Sequence[str] = ()) -> list[str]:
    """Return the commands to type after `fit`. They allow the import of `modules`."""
    folder, user = shlex.quote(str(store)), shlex.quote(str(user_id))
    folder += "".join(f" {ALLOW_IMPORT} {module}" for module in modules)
    user = f"-- {user}" if user.startswith("-") else user
    return [f"freshrec update NEW-EVENTS --store {folder}", f"freshrec recommend --store {folder} {user}"]


def _size_text(version: Manifest) -> str:
    numbers = version.numbers
    new = "" if version.kind == "fit" else "new "
    counts = [("new_events", "event"), ("new_users", f"{new}user"), ("new_items", f"{new}item")]
    parts = [format_count(int(numbers[key]), noun) for key, noun in counts if key in numbers]
    for key, verb in (("gained_interests", "gained"), ("lost_interests", "lost")):
        if numbers.get(key):
            parts.append(f"{format_count(int(numbers[key]), 'user')} {verb} an interest")
    return ", ".join(parts)


def _time_text(numbers: dict[str, float]) -> str:
    if "full_gain" in numbers:
        return f"{numbers.get('wait_s', 0.0):.1f} s, {numbers['full_s']:.1f} s of it for the full retrain"
    full = f" (estimate for a full retrain: {numbers['full_s']:.0f} s)" if "full_s" in numbers else ""
    return f"{numbers.get('wait_s', 0.0):.1f} s{full}"


def _quality_lines(version: Manifest) -> Lines:
    """Return the metric of a version and of its parent. With enough users, also return their difference."""
    numbers, metric = version.numbers, _metric_of(version.numbers)
    if not metric:
        return []
    users = _compared_users(version)[0]
    text = f"{metric} {numbers[metric]:.4f}, version {version.parent} {numbers[f'{metric} live']:.4f}"
    measured = [f"{format_count(users, 'user')} in the newest events"] if users else []
    if users and "low" not in numbers:
        measured = [f"only {format_count(users, 'user')} in the newest events, too few to compare"]
    lines = [("Quality", f"{text} ({'; '.join(['higher is better', *measured])})")]
    if "low" in numbers:
        change = numbers[metric] - numbers[f"{metric} live"]
        lines.append(("Difference", f"{change:+.4f} (95 % interval {numbers['low']:+.4f} to {numbers['high']:+.4f})"))
    return lines


def _metric_of(numbers: dict[str, float]) -> str:
    """Return the metric by which the gate compared two versions, or ""."""
    return next((name.removesuffix(" live") for name in numbers if name.endswith(" live")), "")


def _gate_metric(version: Manifest) -> str:
    """Return the metric of the gate, also if the newest events were not measured; "" in such versions of 0.1.0."""
    return _metric_of(version.numbers) or str(version.data.get(METRIC_KEY, ""))


def _compared_users(version: Manifest) -> tuple[int, int]:
    """Return the numbers of users measured on the newest and on older events; 0 = unknown (versions of 0.1.0)."""
    newest, older = version.data.get("compared_users", (0, 0))
    return int(newest), int(older)
