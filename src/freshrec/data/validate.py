"""Check a log before a model is trained on it: counts, shares, suggested spans, warnings."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from freshrec.data.duplicates import count_duplicates, count_reused_ids, reused_ids_note
from freshrec.data.id_warnings import warn_about_ids
from freshrec.data.log import Log
from freshrec.data.moments import format_time
from freshrec.forks import require_threads
from freshrec.text_layout import format_count

DAY = 86_400_000_000  # microseconds
MAX_SUGGESTED_SPANS = 6  # after the base block
MIN_SPAN_ROWS = 1000  # with fewer rows per span, strategies cannot be compared


@dataclass(frozen=True)
class LogReport:
    """Statistics of a log. Shares are fractions of its rows. None = unknown for this log."""

    rows: int
    users: int
    items: int
    first: str | None  # time of the first row, ISO 8601, UTC
    last: str | None  # time of the last row
    unit: str  # of the timestamps in the source
    duplicates: int | None  # rows with the event_id of another row; without event_ids: its user, item and time
    ties: float | None  # share of rows with the user and time of another row
    out_of_order: float  # share of rows that come after a later row in the source
    repeats: float  # share of rows that repeat an item of the same user
    exposures: float  # share of rows with label 0: shown, not clicked
    nulls: dict[str, int]  # column -> number of nulls, if there are any; see also `missing_timestamps`
    missing_timestamps: int  # rows without a timestamp, in a log with timestamps in other rows
    bad_rows: int  # rows in the quarantine file; not counted in `rows`
    periods: int | None  # number of periods
    suggested_by: str  # suggested rule: "period", "count-alpha" or "count"
    suggested_spans: int  # after the base block; 0 = the log cannot be split
    notes: tuple[str, ...]  # sentences about how the log was read
    warnings: tuple[str, ...]  # sentences about what is unusual


def validate_log(log: Log) -> LogReport:
    """Return the report of a log."""
    require_threads()
    frame, n_rows = log.frame, len(log.frame)
    by, spans = suggest_spans(log)
    n_duplicates = _count_duplicates(log)
    n_users, ties = frame["user_id"].n_unique(), _tied_share(log)
    exposures = float((frame["label"] <= 0).sum() or 0) / n_rows if "label" in frame.columns else 0.0
    warnings = (
        _warn_too_small(n_rows, n_users, spans),
        _warn_single_day_users(log),
        _warn_uneven_timeline(log),
        _warn_unseen_items(log, by, spans),
        _warn_outlying_times(log),
        _warn_future(log),
        _warn_ties(ties),
        _warn_duplicates(log, n_duplicates, exposures > 0),
        *warn_about_ids(frame).values(),
        reused_ids_note(n_reused) if (n_reused := count_reused_ids(log.frame, log.has_clock)) else None,
    )
    n_periods = frame["period"].n_unique() if "period" in frame.columns else None
    n_pairs = _n_distinct(frame, ["user_id", "item_id"])
    nulls = {name: n for name, n in frame.null_count().row(0, named=True).items() if n}
    return LogReport(
        rows=n_rows,
        users=n_users,
        items=frame["item_id"].n_unique(),
        first=format_time(frame["time"][0], "auto") if log.has_clock else None,
        last=format_time(frame["time"][-1], "auto") if log.has_clock else None,
        unit=log.unit,
        duplicates=n_duplicates,
        ties=ties,
        out_of_order=log.n_out_of_order / (n_rows + log.n_quarantined),
        repeats=1 - n_pairs / n_rows,
        exposures=exposures,
        nulls=nulls,
        missing_timestamps=log.n_missing_timestamps,
        bad_rows=log.n_quarantined,
        periods=n_periods,
        suggested_by=by,
        suggested_spans=spans,
        notes=log.notes,
        warnings=tuple(warning for warning in warnings if warning),
    )


validate = validate_log  # a former name


def suggest_spans(log: Log) -> tuple[str, int]:
    """Suggest a rule for splitting the log, and the number of spans after the base block.

    - With at least three periods: "period". The base block is the first period.
    - Otherwise the base block is half of the rows. On a steady log the rule is "count-alpha": the spans have equal
      length, like the days of a nightly job. A log is steady if each span has at least a third of an equal share.
    - Otherwise: "count".
    """
    frame = log.frame
    periods = frame["period"].drop_nulls().n_unique() if "period" in frame.columns else 0
    if periods >= 3:
        return "period", periods - 1
    n_times = int((frame["time"].diff() > 0).sum()) + 1
    n_spans = min(MAX_SUGGESTED_SPANS, max(1, len(frame) // 2 // MIN_SPAN_ROWS), n_times - 1)
    if not log.has_clock or n_spans == 0:
        return "count", n_spans
    later = frame["time"][len(frame) // 2 :]
    length = (int(later[-1]) - int(later[0])) // n_spans + 1
    rows = ((later - later[0]) // length).value_counts()["count"].to_list()
    is_steady = len(rows) == n_spans and min(rows) * n_spans * 3 >= len(later)
    return ("count-alpha" if is_steady else "count"), n_spans


def _n_distinct(frame: pl.DataFrame, columns: list[str]) -> int:
    """Count the distinct rows of some columns."""
    return int(frame.lazy().select(columns).unique().select(pl.len()).collect(engine="streaming").item())


def _count_duplicates(log: Log) -> int | None:
    """Count the rows that every other command skips as duplicates; None without timestamps and event_ids."""
    if not log.has_clock and "event_id" not in log.frame.columns:
        return None
    return count_duplicates(log)


def _tied_share(log: Log) -> float | None:
    """Share of rows with the user and time of another row; None without timestamps."""
    if not log.has_clock:
        return None
    tied_rows = log.frame.lazy().group_by("user_id", "time").len().filter(pl.col("len") > 1).select(pl.col("len").sum())
    return float(tied_rows.collect(engine="streaming").item()) / len(log.frame)


def _warn_single_day_users(log: Log) -> str | None:
    """Warn if most users have all rows on one day or in one period: they have no history when they are tested."""
    when = pl.col("time") // DAY if log.has_clock else pl.col("period")
    users_by_day = (
        log.frame.lazy()
        .group_by("user_id")
        .agg(when.min().alias("from"), when.max().alias("to"), n=pl.len())
        .filter(pl.col("n") > 1)
        .select(pl.len(), same=(pl.col("from") == pl.col("to")).sum())
        .collect(engine="streaming")
    )
    n_users, n_same = users_by_day.row(0)
    if 2 * n_same <= n_users:
        return None
    return (
        f"{format_percent(n_same / n_users)} of the users with more than one row have all rows "
        f"{'on one day' if log.has_clock else 'in one period'}. They have no history when a later span tests them. "
        "This is normal if user_id holds sessions."
    )


def _warn_uneven_timeline(log: Log) -> str | None:
    """Warn if one half of the time range is nearly empty: then spans of equal length are, too."""
    if not log.has_clock:
        return None
    time = log.frame["time"]
    middle = (time[0] + time[-1]) // 2
    early = int((time < middle).sum()) / len(time)
    minority = min(early, 1 - early)
    if minority >= 0.1 or time[0] == time[-1]:
        return None
    half = "first" if early < 0.5 else "second"
    return (
        f"The {half} half of the time range holds only {format_percent(minority)} of the rows. Use --by count or "
        "--by count-alpha, not --by time."
    )


def _warn_unseen_items(log: Log, by: str, n_spans: int) -> str | None:
    """Warn if most items of the last suggested span are new: no model can recommend them from earlier rows."""
    frame, half = log.frame, len(log.frame) // 2
    if n_spans == 0:
        return None
    if by == "period":
        last = pl.col("period") == pl.col("period").max()
    elif by == "count-alpha":
        start, stop = int(frame["time"][half]), int(frame["time"][-1])
        last = pl.col("time") > stop - (stop - start) // n_spans
    else:
        last = pl.int_range(pl.len()) >= len(frame) - max(1, half // n_spans)
    tested = frame.select("item_id", last=last)
    before, after = tested.filter(~pl.col("last")), tested.filter("last")
    n_seen = int(after["item_id"].is_in(before["item_id"].unique().implode()).sum())
    unseen = 1 - n_seen / max(1, len(after))
    if unseen <= 0.5:
        return None
    return (
        f"{format_percent(unseen)} of the rows in the last span are the first events of their item. No model can "
        "predict these items. Use shorter spans, or longer-lived items, such as categories."
    )


def _warn_outlying_times(log: Log) -> str | None:
    """Warn of a few rows that are separated by a gap longer than the rest of the log."""
    if not log.has_clock or len(log.frame) < 10:
        return None
    time = log.frame["time"]
    n_extreme = max(1, len(time) // 1000)
    gaps = time.diff()
    outliers: list[str] = []
    for edge, gap, rest in (
        ("before", gaps[1 : n_extreme + 1], time[-1] - time[n_extreme]),
        ("after", gaps[-n_extreme:], time[-n_extreme - 1] - time[0]),
    ):
        if (widest := gap.arg_max()) is not None and gap[widest] > max(rest, 2 * DAY):
            n = widest + 1 if edge == "before" else len(gap) - widest
            when = format_time(time[n] if edge == "before" else time[-n - 1], "auto")
            outliers.append(f"{format_count(n, 'row')} {edge} {when}")
    if not outliers:
        return None
    return (
        f"Outlying timestamps: {' and '.join(outliers)}, after a gap longer than the rest of the log. Check the clock "
        "of their source."
    )


def _warn_future(log: Log) -> str | None:
    """Warn if all rows lie in the future: `fit` and `update` refuse such a log."""
    if not log.future_text:
        return None
    return f"{log.future_text} fit and update refuse such a log. Check the unit of the timestamps."


def _warn_too_small(n_rows: int, n_users: int, n_spans: int) -> str | None:
    """Warn if the log is too small for a replay."""
    if n_spans == 0:
        return "All rows have the same time. The log cannot be split into spans."
    if n_users == 1:
        return "The log has a single user. No model can learn from other users."
    if n_rows < 2 * MIN_SPAN_ROWS:
        return f"{format_count(n_rows, 'row')} are too few to compare strategies. Use at least {2 * MIN_SPAN_ROWS:,}."
    return None


def _warn_ties(ties: float | None) -> str | None:
    """Warn if the timestamps do not order most rows of a user."""
    if ties is None or ties <= 0.5:
        return None
    return (
        f"{format_percent(ties)} of the rows share user and timestamp with another row. Their order in the source is "
        "used as the order of the events."
    )


def _warn_duplicates(log: Log, n_duplicates: int | None, has_exposures: bool) -> str | None:
    """Warn of rows that every other command skips."""
    if not n_duplicates:
        return None
    by_clock = "user, item, timestamp and label" if has_exposures else "user, item and timestamp"
    keys = ["event_id"] * ("event_id" in log.frame.columns) + [by_clock] * log.has_clock
    verb, share = "has" if n_duplicates == 1 else "have", format_percent(n_duplicates / len(log.frame))
    return (
        f"{format_count(n_duplicates, 'row')} ({share}) {verb} the {' or the '.join(keys)} of another row. "
        "Each event counts once: replay, fit, update and the Python API skip these duplicates."
    )


def format_percent(share: float) -> str:
    """Format a share as a percentage with one decimal: "99.7 %"."""
    return f"{100 * share:.1f} %"
