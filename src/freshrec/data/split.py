"""Split a log into spans by the rules of a `SplitConfig`: starts of spans, tested events, time of training on them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from freshrec.data.catalog import Catalog
from freshrec.data.log import Log
from freshrec.data.moments import format_time, parse_microseconds
from freshrec.data.split_config import SplitConfig
from freshrec.errors import OptionError, SpanError
from freshrec.forks import require_threads
from freshrec.text_layout import format_count
from freshrec.types import NEVER, NEXT, NOW, TEST, TRAIN, VALID, Events, Span

TRAIN_AT = {"now": NOW, "next": NEXT, "never": NEVER}  # values of `heldout`
ROLES = {"train": TRAIN, "valid": VALID, "test": TEST}  # values of a log's split column

Int64Array = npt.NDArray[np.int64]
Int8Array = npt.NDArray[np.int8]


@dataclass(frozen=True, eq=False)
class LogSplit:
    """A log in spans. Span 0 is the base block. The catalogs hold every user and item of the log."""

    spans: tuple[Span, ...]
    user_catalog: Catalog
    item_catalog: Catalog
    notes: tuple[str, ...]  # sentences for readers of the results

    def fingerprint(self) -> str:
        """Return 64 hexadecimal digits that depend on every event and on the start of every span."""
        digest = hashlib.sha256()
        for span in self.spans:
            events = span.events
            digest.update(f"{span.index} {span.n_users} {span.n_items} {len(events)}".encode())
            for column in vars(events).values():
                digest.update(b"" if column is None else column.contiguous().numpy().tobytes())
        return digest.hexdigest()


def split_log(
    log: Log,
    config: SplitConfig | type[SplitConfig] | None = None,
    *,
    by: str | None = None,
    spans: int | None = None,
    alpha: float | None = None,
    dates: Sequence[str] | None = None,
    targets: str | None = None,
    heldout: str | None = None,
    min_events: int | None = None,
    forget_users: float | None = None,
    base_periods: int | None = None,
    sessions: bool | None = None,
    n_targets: int | None = None,
    seed: int = 0,
) -> LogSplit:
    """Split a log into a base block and later spans. Each event is in exactly one of them.

    `config` holds all options, and a keyword replaces one of its fields. `SplitConfig` explains them. `seed` is the
    seed of all random choices: targets = "three", `forget_users` and `n_targets`.

    Returns the spans, the catalogs of users and items, and notes. A note names each empty span. Raises OptionError for
    an invalid option and SpanError if the log cannot be split that way.

    Differs from the protocol of IMSR, which is clock-alpha with heldout = "never": a share alpha of the time range can
    hold as little as 3 % of the events. The rule count-alpha avoids that.
    """
    require_threads()
    keywords = {
        "by": by,
        "spans": spans,
        "alpha": alpha,
        "dates": None if dates is None else tuple(dates),
        "targets": targets,
        "heldout": heldout,
        "min_events": min_events,
        "forget_users": forget_users,
        "base_periods": base_periods,
        "sessions": sessions,
        "n_targets": n_targets,
    }
    if not isinstance(log, Log):
        raise OptionError("split_log takes the result of read_log. Write split_log(read_log(log)).")
    config = config() if isinstance(config, type) else config
    given: dict[str, Any] = {name: value for name, value in keywords.items() if value is not None}
    return _split(log, replace(config or SplitConfig(), **given), seed)


def _split(log: Log, config: SplitConfig, seed: int) -> LogSplit:
    """Split the log with complete options."""
    frame, notes = _select_events(log.frame, config.by, config.min_events)
    edges = _span_edges(frame, log.has_clock, config)
    if config.sessions:
        span_E = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
        frame = frame.with_columns(pl.concat_str("user_id", pl.lit("@"), pl.Series(span_E)).alias("user_id"))
    user_catalog, item_catalog, sizes = _build_catalogs(frame, edges)
    users_E, items_E = user_catalog.rows(frame["user_id"]), item_catalog.rows(frame["item_id"])
    times_E = torch.from_numpy(frame["time"].to_numpy(writable=True))
    split_E = _roles_from_column(frame) if config.targets == "split" else None
    labels_E, categories_E = _labels(frame), _category_rows(frame)
    is_forget_user_U = _select_users(len(user_catalog), config.forget_users, seed)
    spans = []
    # no named streams here and in `_select_users`: published results use these users and targets
    for t, (a, b) in enumerate(zip(edges, edges[1:])):
        users, rng = users_E[a:b].numpy(), np.random.default_rng((seed % 2**64, t))
        tail = _last_event_roles(users, sizes[t][0]) if t > 0 else np.full(b - a, TRAIN, np.int8)
        role = held = tail if split_E is None else split_E[a:b]
        if config.targets == "three" and t > 0:
            role = held = _three_target_roles(tail, users, sizes[t - 1][0], rng)
        elif config.targets == "all" and t > 0:
            role = np.full(b - a, TEST, np.int8)
        later = NOW if config.targets == "all" else TRAIN_AT[config.heldout]
        train_at = np.where(held == TRAIN, NOW, np.where(is_forget_user_U[users], NEVER, later)).astype(np.int8)
        role = _limit_test_targets(role, users, config.n_targets, rng) if config.n_targets else role
        columns = users_E[a:b], items_E[a:b], times_E[a:b], torch.from_numpy(role), torch.from_numpy(train_at)
        events = Events(*columns, *(None if column is None else column[a:b] for column in (labels_E, categories_E)))
        spans.append(Span(t, events, *sizes[t], _span_name(frame[a:b], a, config.by, log.has_clock)))
    notes += [f"Span {span.index} has no events." for span in spans if len(span.events) == 0]
    notes += ["The log has a single user."] if len(user_catalog) == 1 else []
    notes += [log.future_text] if log.future_text else []
    return LogSplit(tuple(spans), user_catalog, item_catalog, tuple(notes))


def describe_spans(log_split: LogSplit) -> pl.DataFrame:
    """Describe each span: span, name, events, users, items, new_users, new_items, targets, seen_share.

    `targets` is the number of TEST events. `seen_share` is the share of them whose item occurred in an earlier span:
    the highest hit rate that a model of the earlier spans can reach. It is null in the base block and without targets.
    """
    rows = []
    for span, before in zip(log_split.spans, (None, *log_split.spans)):
        events = span.events
        known_users, known_items = (before.n_users, before.n_items) if before else (0, 0)
        test_items = events.items_E[events.role_E == TEST]
        has_seen_share = before is not None and len(test_items) > 0
        rows.append(
            {
                "span": span.index,
                "name": span.name,
                "events": len(events),
                "users": int(torch.bincount(events.users_E).count_nonzero()),
                "items": int(torch.bincount(events.items_E).count_nonzero()),
                "new_users": span.n_users - known_users,
                "new_items": span.n_items - known_items,
                "targets": len(test_items),
                "seen_share": float((test_items <= known_items).double().mean()) if has_seen_share else None,
            }
        )
    return pl.DataFrame(rows, schema_overrides={"seen_share": pl.Float64})


def _select_events(frame: pl.DataFrame, by: str, min_events: int) -> tuple[pl.DataFrame, list[str]]:
    """Return the events to split, in the order of the rule, and notes."""
    notes = []
    if min_events > 1:
        n_users, n_events = frame["user_id"].n_unique(), len(frame)
        frame = frame.filter(pl.len().over("user_id") >= min_events)
        n_left_out = n_users - frame["user_id"].n_unique()
        notes.append(
            f"Left out {format_count(n_left_out, 'user')} with fewer than {min_events} "
            f"events in the whole log ({format_count(n_events - len(frame), 'event')}). This choice uses the future."
        )
    if len(frame) == 0:
        raise SpanError("No events are left to split. Check the log, the event types and min_events.")
    if by == "period":
        if "period" not in frame.columns or frame["period"].null_count():
            raise SpanError("--by period needs a period in every row. Pass --columns period=NAME, or use --by count.")
        if not frame["period"].is_sorted():
            frame = frame.sort("period", maintain_order=True)
            notes.append("Some periods overlap in time. The period decides.")
    return frame, notes


def _span_edges(frame: pl.DataFrame, has_clock: bool, config: SplitConfig) -> list[int]:
    """Return the bounds of the spans: span t is edges[t] : edges[t + 1]. Raises SpanError for an empty base block."""
    times, by = frame["time"].to_numpy(), config.by
    if by == "period":
        inner = _period_starts(frame["period"].to_numpy(), config.spans, config.base_periods)
    elif by != "count" and not has_clock:
        raise SpanError(f"--by {by} needs timestamps, and this log has none. Use --by count or --by period.")
    elif by == "dates":
        inner = np.searchsorted(times, _parse_dates(config.dates))
    else:
        inner = _rule_starts(times, by, config.spans, config.alpha)
    edges = [0, *inner.tolist(), len(frame)]
    if edges[1] == 0:
        raise SpanError("The base block would be empty. Start the first span after the first event.")
    return edges


def _rule_starts(times: Int64Array, by: str, spans: int, alpha: float) -> Int64Array:
    """Return the positions where spans 1, 2, ... start, for the rules by count and by time."""
    time_starts = np.flatnonzero(np.diff(times)) + 1
    if not len(time_starts):
        raise SpanError("All events of the log have the same time, so it cannot be split. Check its timestamps.")
    if len(time_starts) < spans:
        raise SpanError(
            f"The log has {len(time_starts) + 1:,} distinct times, too few for a base block and {spans} spans. "
            f"Use at most {len(time_starts)} spans."
        )
    first, stop = int(times[0]), int(times[-1]) + 1
    if by == "count":
        return _nearest(time_starts, len(times) * (alpha + (1 - alpha) * np.arange(spans) / spans))
    if by == "time":
        bounds = [first + (stop - first) * t // (spans + 1) for t in range(1, spans + 1)]
        return np.searchsorted(times, bounds)
    if by == "count-alpha":
        base_stop = int(times[_nearest(time_starts, np.array([alpha * len(times)]))[0]])
    else:
        base_stop = first + ceil(alpha * (stop - first))
    return np.searchsorted(times, [base_stop + (stop - base_stop) * t // spans for t in range(spans)])


def _nearest(allowed: Int64Array, positions: npt.NDArray[np.float64]) -> Int64Array:
    """Return the nearest of the `allowed` for each of the `positions`, without repeats. Both are in ascending order."""
    right = np.searchsorted(allowed, positions).clip(max=len(allowed) - 1)
    left = (right - 1).clip(min=0)
    chosen = np.where(positions - allowed[left] <= allowed[right] - positions, left, right)
    order = np.arange(len(positions))
    chosen = np.maximum.accumulate(chosen - order) + order
    return allowed[np.minimum(chosen, len(allowed) - len(positions) + order)]


def _period_starts(periods_E: Int64Array, spans: int, base_periods: int) -> Int64Array:
    """Return the positions where spans 1, 2, ... start, for the rule by period."""
    later = np.unique(periods_E)[base_periods:]
    if len(later) == 0:
        n = "a single period" if base_periods == 1 else f"no more than {base_periods} periods"
        raise SpanError(f"The log has {n}, so there is nothing after the base block. Use --by count.")
    groups = np.array_split(later, min(spans, len(later)))
    return np.searchsorted(periods_E, [group[0] for group in groups])


def _parse_dates(dates: Sequence[str]) -> list[int]:
    """Return the dates as microseconds since 1970. Raises OptionError if they are not in ascending order."""
    found = [parse_microseconds(date, "--dates") for date in dates]
    if any(a >= b for a, b in zip(found, found[1:])):
        raise OptionError(
            f"The dates {', '.join(dates)} are not in ascending order. List each date once, the earliest first."
        )
    return found


def _build_catalogs(frame: pl.DataFrame, edges: list[int]) -> tuple[Catalog, Catalog, list[tuple[int, int]]]:
    """Return both catalogs at the end of the log, and (n_users, n_items) at the end of each span."""
    users, items, sizes = Catalog.empty(), Catalog.empty(), []
    for t, (a, b) in enumerate(zip(edges, edges[1:])):
        users = users.extend(frame["user_id"][a:b], t)
        items = items.extend(frame["item_id"][a:b], t)
        sizes.append((len(users), len(items)))
    return users, items, sizes


def _roles_from_column(frame: pl.DataFrame) -> Int8Array:
    """Return the roles that the split column of the log gives."""
    if "split" not in frame.columns:
        raise SpanError(
            'targets = "split" needs a split column. Name it with --columns split=NAME, or use targets = "last".'
        )
    role = frame["split"].replace_strict(ROLES, default=None, return_dtype=pl.Int8)
    if role.null_count():
        n = format_count(role.null_count(), "row")
        raise SpanError(f"The split column has values other than {', '.join(ROLES)} in {n}. Correct them.")
    return role.to_numpy(writable=True)


def _labels(frame: pl.DataFrame) -> torch.Tensor | None:
    """Return labels: 1 = clicked, 0 = shown but not clicked, nan = unknown. None if the log has no exposures."""
    if "label" not in frame.columns or not (frame["label"] <= 0).any():
        return None
    labels = (frame["label"] > 0).cast(pl.Float32).fill_null(float("nan"))
    return torch.from_numpy(labels.to_numpy(writable=True))


def _category_rows(frame: pl.DataFrame) -> torch.Tensor | None:
    """Return the category row of each event, numbered in order of appearance; 0 = no category."""
    if "category" not in frame.columns:
        return None
    known = frame["category"].drop_nulls()
    categories_E = torch.zeros(len(frame), dtype=torch.int32)
    has_category_E = torch.from_numpy(frame["category"].is_not_null().to_numpy(writable=True))
    categories_E[has_category_E] = Catalog.empty().extend(known, 0).rows(known).int()
    return categories_E


def _select_users(n_users: int, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Select the user rows 0..n_users whose hash of (seed, row) is below `share`. No user depends on another."""
    z = np.arange(n_users + 1, dtype=np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # splitmix64
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53 < share


def _last_event_roles(users_E: Int64Array, n_users: int) -> Int8Array:
    """Return TEST for each user's last event, VALID for the one before it, TRAIN for the rest."""
    role_E = np.full(len(users_E), TRAIN, np.int8)
    for role in (TEST, VALID):
        unassigned_E = np.flatnonzero(role_E == TRAIN)
        last_U = np.full(n_users + 1, -1)
        last_U[users_E[unassigned_E]] = unassigned_E  # the last assignment to a user wins
        role_E[last_U[last_U >= 0]] = role
    return role_E


def _three_target_roles(tail_E: Int8Array, users_E: Int64Array, n_before: int, rng: np.random.Generator) -> Int8Array:
    """Return TEST for each user's last event and two random others, TRAIN for the rest.

    The first event of a user is never one of the two. `n_before` is the number of users of earlier spans.
    """
    is_eligible_E = tail_E != TEST
    first_E = np.unique(users_E, return_index=True)[1]
    is_eligible_E[first_E[users_E[first_E] > n_before]] = False
    others_E = rng.permutation(np.flatnonzero(is_eligible_E))
    others_E = others_E[np.argsort(users_E[others_E], kind="stable")]
    drawn = users_E[others_E]
    is_drawn = np.ones(len(drawn), np.bool_)
    is_drawn[2:] = drawn[2:] != drawn[:-2]
    role_E = np.where(tail_E == TEST, tail_E, np.int8(TRAIN))
    role_E[others_E[is_drawn]] = TEST
    return role_E


def _limit_test_targets(role_E: Int8Array, users_E: Int64Array, n: int, rng: np.random.Generator) -> Int8Array:
    """Keep the TEST events of random users, one user after the other, until there are `n`. The others become TRAIN."""
    users_X = users_E[role_E == TEST]
    users_U, at_X, n_U = np.unique(users_X, return_inverse=True, return_counts=True)
    order_U = rng.permutation(len(users_U))
    before_U = np.empty(len(users_U), np.int64)
    before_U[order_U] = np.cumsum(n_U[order_U]) - n_U[order_U]
    role_E = role_E.copy()
    role_E[np.flatnonzero(role_E == TEST)[before_U[at_X] >= n]] = TRAIN
    return role_E


def _span_name(events: pl.DataFrame, n_before: int, by: str, has_clock: bool) -> str:
    """Name a span by its days, periods or event numbers."""
    if len(events) == 0:
        return "no events"
    if by == "period":
        first, last = events["period"][0], events["period"][-1]
        return f"period {first}" if first == last else f"periods {first} to {last}"
    if not has_clock:
        return f"events {n_before + 1:,} to {n_before + len(events):,}"
    (start_day, start), (stop_day, stop) = (format_time(events["time"][i])[:16].split("T") for i in (0, -1))
    return f"{start_day} to {stop_day}" if start_day != stop_day else f"{start_day} {start} to {stop}"
