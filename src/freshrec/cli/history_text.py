"""Text of `freshrec history`: one line per version, or every number, reason and change with --long."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from freshrec.cli.number_labels import format_quantity, number_rows
from freshrec.text_layout import WIDTH, align_rows, bullet, format_moment

if TYPE_CHECKING:
    from freshrec.store.manifest import Manifest, PointerMove
    from freshrec.store.versions import Store

MIN_REASON_WIDTH = 20
# the start of a reason of the gate, and its short form
SHORT_FORMS = (
    (r"On the newest events, (.+?) is \S+ instead of .*?: (\S+ %), ", r"newest events: \1 \2"),
    (r"On older events, (.+?) is \S+ instead of .*?: (\S+ %), ", r"forgot: \1 \2"),
    (r"On the newest events, (.+?) is (\S+) \(", r"below the floor: \1 \2"),
    (r"(\S+ %) of the rows are older than the newest known event", r"\1 late rows"),
    (r"(\S+ %) of the rows belong to one (user|item)\.", r"\1 of the rows: one \2"),
    (r"(\S+ %) of the rows have an unknown (user|item) id", r"\1 of the rows: unknown \2s"),
    (r"(\S+ %) of the rows are on the popular items", r"\1 of the rows: popular items"),
    (r"(\S+ %) of the users have an event in the same second", r"\1 of the users: same second"),
    (r"(\S+ %) of the delivered rows are duplicates", r"\1 duplicates"),
    (r"There are no rows for (\S+) hours", r"\1 h without rows"),
    (r"The rows cover (\S+) hours", r"only \1 h covered"),
    (r"The delivery has (\S+) (row|user|item)(s?)\..*Fewer than", r"only \1 \2\3"),
    (r"The delivery has (\S+) (row|user|item)(s?)\..*More than", r"\1 \2\3, too many"),
    (r"The delivery has no new rows", "no new rows"),
)
STATES = {
    "live": "is served now",
    "was live": "its events are part of the live version",
    "rolled back": "was live; its events are not part of the live version",
    "refused": "did not pass the gate, was never live",
    "waiting": "passed, but the update was interrupted; the next one makes it live",
    "damaged": "its manifest cannot be read; see `freshrec doctor`",
}


@dataclass(frozen=True)
class VersionState:
    """State of a version, as `freshrec history` prints it."""

    state: str  # a key of STATES
    is_deleted: bool = False  # whether its files were deleted
    reason: str = ""  # why it was refused, rolled back or made live by force


def version_states(store: Store) -> dict[int, VersionState]:
    """Return the state of each version of a store."""
    from freshrec.store.versions import is_collected

    versions, moves = {manifest.id: manifest for manifest in store.manifests()}, store.moves()
    ancestors = _ancestors(versions, moves[-1].to if moves else None)
    drop_reasons, found = _drop_reasons(versions, moves), {}
    for number in store.version_numbers():
        if number not in versions:
            found[number] = VersionState("damaged", reason=STATES["damaged"])
            continue
        state, reason = _state_of(versions[number], moves, ancestors, drop_reasons.get(number, ""))
        found[number] = VersionState(state, is_collected(store, number), reason)
    return found


def _drop_reasons(versions: Mapping[int, Manifest], moves: Sequence[PointerMove]) -> dict[int, str]:
    """Return the reason of the last rollback that dropped each version. A rollback drops all versions after its target.

    `promote` drops versions too, if they are not ancestors of the version that it makes live.
    """
    reasons = dict[int, str]()
    for before, move in pairwise(moves):
        target = versions.get(move.to)
        if target is not None and target.parent == before.to:  # an update drops nothing
            continue
        dropped = _ancestors(versions, before.to) - _ancestors(versions, move.to)
        reasons |= dict.fromkeys(dropped, move.reason)
    return reasons


def _ancestors(versions: Mapping[int, Manifest], number: int | None) -> set[int]:
    """Return the numbers of a version and of its ancestors, up to the first one whose manifest is damaged."""
    found = set[int]()
    while number is not None and number in versions and number not in found:
        found.add(number)
        number = versions[number].parent
    return found


def _state_of(
    version: Manifest, moves: Sequence[PointerMove], ancestors: set[int], drop_reason: str
) -> tuple[str, str]:
    """Return the state of a version and the reason for it."""
    own_moves = [move for move in moves if move.to == version.id]
    # A later rollback to a forced version has a reason that is about other versions.
    forcing = [move for move in own_moves if move.action != "rollback"][-1:] or own_moves[:1]
    by_force = "" if version.promoted or not forcing else forcing[0].reason
    reason = f"by force: {by_force}" if by_force else "no new events" if version.kind == "no rows" else ""
    if moves and moves[-1].to == version.id:
        return "live", reason
    if version.id in ancestors:
        return "was live", reason
    if own_moves:
        return "rolled back", drop_reason
    return ("waiting", reason) if version.goes_live else ("refused", " ".join(version.reasons))


def history_lines(versions: Sequence[Manifest], states: Mapping[int, VersionState]) -> list[str]:
    """Return a table with one line per version, oldest first, at most 100 columns wide."""
    if not versions:
        return []
    metrics = Counter(version.metric for version in versions if version.metric)
    metric = metrics.most_common(1)[0][0] if metrics else "ndcg@20"
    rows = [_history_row(version, states[version.id], metric) for version in versions]
    heads = [("", "", "", "new", "new", metric), ("no.", "made (UTC)", "state", "events", "users", "   new   live")]
    table = align_rows([*heads, *rows], right={0, 3, 4})
    length = max(map(len, table))
    room = max(MIN_REASON_WIDTH, WIDTH - length - 2)
    reasons = ["", "reason", *(state_reason(version, states[version.id], room) for version in versions)]
    lines = [f"{line:<{length}}  {reason}".rstrip() for line, reason in zip(table, reasons)]
    lines += [f"{metric} of the new version and of its parent, on the same queries: 0 to 1, higher is better."]
    if any(version.parent is not None and not version.metric for version in versions):
        lines += [f"Blank: {metric} could not be measured, for example without new events or with late events only."]
    if any(states[version.id].is_deleted for version in versions):
        lines += ["* The files of this version were deleted. It cannot be made live."]
    if others := [str(version.id) for version in versions if version.metric not in ("", metric)]:
        lines += [f"Versions measured by another metric: {', '.join(others)}. See --long."]
    return lines


def _history_row(version: Manifest, state: VersionState, metric: str) -> tuple[str, ...]:
    numbers, sizes = version.numbers, version.sizes
    first = version.kind in ("fit", "saved")
    counts = [sizes.get(name) if first else numbers.get(f"new_{name}") for name in ("events", "users")]
    qualities = [numbers.get(name) for name in (metric, f"{metric} live")]
    return (
        str(version.id),
        format_moment(version.made_at),
        state.state + "*" * state.is_deleted,
        *("" if n is None else format_quantity(n, "count") for n in counts),
        " ".join("" if value is None else format_quantity(value, "fraction") for value in qualities).rstrip(),
    )


def state_reason(version: Manifest, state: VersionState, width: int) -> str:
    """Return in short why a version has its state. A retry also names the version that it repeats."""
    prefix = "" if version.retry_of is None else f"retry of {version.retry_of}"
    between = "; " if prefix and state.reason else ""
    room = width - len(prefix + between)
    text = short_reason(state.reason, room)
    if state.state == "refused":
        forms = [short_form(reason) for reason in version.reasons]
        joined = ["; ".join(forms[:n]) for n in range(len(forms), 0, -1)]
        text = next((some for some in joined if len(some) <= room), short_reason("".join(forms[:1]), room))
    return prefix + between + text


def short_form(reason: str) -> str:
    """Return the short form of a reason of the gate. A reason without one is cut to its first clause."""
    for pattern, template in SHORT_FORMS:
        if found := re.match(pattern, reason):
            return found.expand(template)
    return short_reason(reason, len(reason))


def short_reason(reason: str, width: int) -> str:
    """Return the first clause of a reason. A long one is cut before its last two words: "71.4 % of ... one user"."""
    clause = re.split(r"; |: (?!by force)|\. |\.$", reason)[0] if not reason.startswith("by force") else reason
    if len(clause) <= width:
        return clause
    end = " ".join(["...", *clause.split()[-2:]])
    start = clause[: max(0, width - len(end))].rpartition(" ")[0]
    return f"{start} {end}"[:width]


def long_lines(versions: Sequence[Manifest], states: Mapping[int, VersionState]) -> list[str]:
    """Return every number, reason and note of each version."""
    lines = []
    for version in versions:
        state = states[version.id]
        parent = "" if version.parent is None else f", updated from version {version.parent}"
        retry = "" if version.retry_of is None else f", retry of version {version.retry_of}"
        deleted = "; its files were deleted" if state.is_deleted else ""
        lines += [f"Version {version.id}: {state.state} ({STATES[state.state]}){deleted}"]
        lines += [f"  made {format_moment(version.made_at)} UTC{parent}{retry}, with freshrec {version.code}"]
        sizes = ", ".join(f"{n:,} {name}" for name, n in version.sizes.items())
        lines += [f"  model {version.recipe['model']}, strategy {version.recipe.get('strategy', '')}, knows {sizes}"]
        lines += [f"  {line}" for line in align_rows([row[1:] for row in number_rows(version.numbers)], right={1})]
        if state.reason and state.state != "refused":
            lines += bullet("reason:", state.reason)
        for reason in version.reasons:
            lines += bullet("refused:", reason)
        for note in version.notes:
            lines += bullet("note:", note)
        lines += [""]
    return lines


def move_lines(moves: Sequence[PointerMove]) -> list[str]:
    """Return every change of the live version, oldest first."""
    if not moves:
        return []
    rows = [(format_moment(move.at), move.action, f"version {move.to}", move.reason) for move in moves]
    heads = ("at (UTC)", "command", "made live", "reason")
    return ["Changes of the live version", *(f"  {line}" for line in align_rows([heads, *rows]))]
