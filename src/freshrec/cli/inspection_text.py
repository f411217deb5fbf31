"""Text of `freshrec status` and `freshrec diff`: sections of labelled numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from freshrec.cli.number_labels import SECTIONS, format_bytes, format_quantity, label_of, number_rows, ordered_keys
from freshrec.text_layout import align_rows, bullet, format_count, format_moment

Row = tuple[str, ...]  # label, value, explanation
MIN_USERS = 30  # the gate does not compare versions on fewer users either
KINDS = {
    "fit": "first version",
    "update": "made by an update",
    "no rows": "made by an update without new events",
    "saved": "saved from Python",
}


def status_lines(found: dict[str, Any]) -> list[str]:
    """Return the text of `freshrec status`: live version, store, waiting events, quality, time, training, notes."""
    rows = number_rows(found["numbers"])
    by_section = {section: [tuple(row[1:]) for row in rows if row.section == section] for section in SECTIONS}
    sections: dict[str, Sequence[Row]] = {
        "Live version": [*_live_rows(found), *by_section["new events"]],
        "Store": _store_rows(found),
        "Waiting": _waiting_rows(found),
        "Quality of the live version, measured when it was made": by_section["quality"],
        "Time of its update": by_section["time"],
        "Training in its update": by_section["training"],
    }
    notes = [line for note in found["notes"] for line in bullet("-", note)]
    if "last_full" in found["plan"]:
        notes += bullet("- Last full retrain:", found["plan"]["last_full"])
    return [*_section_lines(sections), *(["", "Notes", *notes] if notes else [])]


def _live_rows(found: dict[str, Any]) -> list[Row]:
    newest = found["newest_event"]
    return [
        ("version", str(found["live"]), KINDS.get(found["kind"], found["kind"])),
        ("made", f"{format_moment(found['made_at'])} UTC"),
        ("model", found["model"]),
        ("strategy of updates", found["strategy"]),
        ("events", f"{found['events']:,}", "including held-out events"),
        ("held-out events", f"{found['held']:,}", "its newest; the next update learns them"),
        ("users", f"{found['users']:,}", ""),
        ("items", f"{found['items']:,}", ""),
        *([("newest event", f"{format_moment(newest)} UTC", "that it knows")] if newest else []),
        ("size", format_bytes(found["bytes"]), f"{format_bytes(found['bytes_per_user'])} per user"),
    ]


def _store_rows(found: dict[str, Any]) -> list[Row]:
    deleted = len(found["versions_deleted"])
    deliveries = format_count(found["log_deliveries"], "delivery", "deliveries")
    events = f"{format_count(found['log_different_events'], 'different event')} in {deliveries}"
    return [
        ("versions", f"{found['versions']:,}", f"{deleted:,} with deleted files"),
        ("size of all versions", format_bytes(found["versions_bytes"]), "shared files count once"),
        ("size of the event log", format_bytes(found["log_bytes"])),
        ("rows of the event log", f"{found['log_events']:,}", events),
        ("size of the store", format_bytes(found["total_bytes"]), "everything in its folder"),
    ]


def _waiting_rows(found: dict[str, Any]) -> list[Row]:
    batches, deferred, with_new_ids = found["batches_waiting"], found["deferred"], found["with_new_ids"]
    others = [number for number in found["refused_not_learned"] if number not in {*deferred, *with_new_ids}]
    rows = [
        ("deliveries", f"{len(batches):,}", "in the event log; `update` learns them"),
        ("clicks", f"{found['clicks_waiting']:,}", "from servers; the next update learns them"),
    ]
    refused = [
        (deferred, "the next update learns their events"),
        (with_new_ids, "learned if later deliveries confirm them"),
    ]
    rows += [("refused deliveries", _short_list(numbers), fate) for numbers, fate in refused if numbers]
    rows.append(("refused deliveries", _short_list(others) or "none", "only `update --retry` learns their events"))
    return [*rows, *_retrain_rows(found["plan"])]


def _retrain_rows(plan: dict[str, Any]) -> list[Row]:
    """Return when the next full retrain is due. Only `update --full-every` tries one."""
    since, interval = plan["updates_since_full"], plan["next_full_after"]
    left = max(0, interval - since)
    return [
        ("updates since a full retrain", f"{since:,}", "or since one was tried"),
        ("updates until the next one", f"{left:,}", "only with `update --full-every auto`; 0 = due"),
    ]


def _short_list(numbers: Sequence[int], n_shown: int = 8) -> str:
    shown = ", ".join(map(str, numbers[-n_shown:]))
    return shown if len(numbers) <= n_shown else f"{len(numbers)}, last {numbers[-1]}"


def _section_lines(sections: dict[str, Sequence[Row]]) -> list[str]:
    """Return the lines of each section below its heading. All sections have the same column widths."""
    filled = {heading: rows for heading, rows in sections.items() if rows}
    aligned = iter(align_rows([row for rows in filled.values() for row in rows]))
    lines: list[str] = []
    for heading, rows in filled.items():
        lines += ["", heading, *(f"  {next(aligned)}" for _ in rows)]
    return lines[1:]


def diff_lines(found: dict[str, Any]) -> list[str]:
    """Return the text of `freshrec diff`: quality on the same queries, then the recorded numbers of each version."""
    first, second = found["versions"]
    lines = [f"Quality on the same queries: version {first} and version {second}"]
    lines += _same_query_lines(found["same_queries"], first, second)
    lines += ["", *_shared_lines(found), ""]
    heads = ("", f"version {first}", f"version {second}")
    sizes = [(f"{name} known", *(_count(value) for value in pair)) for name, pair in found["sizes"].items()]
    recorded = list(_recorded_rows(found["numbers"]))
    options = [(f"option {key}", *map(str, pair)) for key, pair in found["recipe"].items()]
    table = [heads, *sizes, *recorded]
    lines += ["Recorded when each version was made. Do not compare quality: it was measured on different days."]
    lines += [f"  {line}" for line in align_rows(table, right={1, 2})]
    if options:
        lines += ["", "Different options", *(f"  {line}" for line in align_rows([heads, *options]))]
    return lines


def _same_query_lines(same: dict[str, Any], first: int, second: int) -> list[str]:
    if "reason" in same:
        return [f"  {same['reason']}"]
    metric, (value, other) = same["metric"], same["values"]
    interval = f"95 % interval {same['low']:+.4f} to {same['high']:+.4f}"
    users = "1 user" if same["users"] == 1 else f"{same['users']:,} users"
    better = f"positive = version {second} is better"
    rows = [
        (f"{metric} of version {first}", format_quantity(value, "fraction"), "0 to 1, higher is better"),
        (f"{metric} of version {second}", format_quantity(other, "fraction"), "same queries"),
        ("difference", format_quantity(same["difference"], "change"), f"{better}; {interval}"),
        ("queries", f"{same['queries']:,}", f"of {users}: held-out events that neither version has learned"),
    ]
    return [f"  {line}" for line in align_rows(rows)] + [f"  {_conclusion(same, first, second)}"]


def _conclusion(same: dict[str, Any], first: int, second: int) -> str:
    if same["users"] < MIN_USERS:
        return f"With fewer than {MIN_USERS} users the difference says little."
    if same["low"] == same["high"] == 0:
        return "Both versions are equally good on these queries."
    if same["low"] <= 0 <= same["high"]:
        return "The interval includes 0: the difference may be due to chance."
    better = second if same["difference"] > 0 else first
    return f"The interval does not include 0: version {better} is better on these queries."


def _shared_lines(found: dict[str, Any]) -> list[str]:
    if found["shared"] is None:
        return ["Their lists cannot be compared either."]
    share = f"{100 * found['shared']:.0f} % of their items"
    if found["users"] == 1:
        return [f"The top-{found['list']} lists of 1 sampled user share {share}."]
    return [f"The top-{found['list']} lists of {found['users']:,} sampled users share {share}."]


def _recorded_rows(numbers: dict[str, list[float | None]]) -> Iterable[Row]:
    """A row for each number: its label with unit and direction, and its two values."""
    for key in ordered_keys(numbers):
        _, label, unit, explanation = label_of(key)
        yield (label, *("" if value is None else format_quantity(value, unit) for value in numbers[key]), explanation)


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
