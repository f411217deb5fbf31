"""What a practitioner should know of a log before learning from it: counts, shares, suggested spans, warnings."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from freshrec.data.log import Log, format_time

DAY = 86_400_000_000  # microseconds
MAX_SUGGESTED_SPANS = 6  # after the base block
MIN_SPAN_ROWS = 1000  # fewer rows tell little about a way of updating


@dataclass(frozen=True)
class LogReport:
    """Facts of a log; shares are of its rows, None where the log cannot tell."""

    rows: int
    users: int
    items: int
    first: str | None  # ISO 8601, UTC
    last: str | None
    unit: str
    duplicates: int | None  # rows that say what another says: same event_id, else same user, item and time
    ties: float | None  # share of rows whose user has another row at the same time
    out_of_order: float  # share of rows that stood behind a later one in the source
    repeats: float  # share of rows whose user has had the item before
    exposures: float  # share of rows with label 0
    nulls: dict[str, int]  # column -> nulls, where there are any
    bad_rows: int  # set aside, not counted in `rows`
    periods: int | None
    suggested_by: str  # how to cut: "period", "count-alpha" or "count"
    suggested_spans: int  # after the base block; 0 where the log cannot be cut
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def validate_log(log: Log) -> LogReport:
    """The report of a log that could be read."""
    frame, n_rows = log.frame, len(log.frame)
    by, spans = suggest_spans(log)
    n_users, ties = frame["user_id"].n_unique(), _tied_share(log)
    exposures = float((frame["label"] <= 0).sum() or 0) / n_rows if "label" in frame.columns else 0.0
    warnings = (
        _warn_too_small(n_rows, n_users, spans),
        _warn_single_day_users(log),
        _warn_uneven_timeline(log),
        _warn_unseen_items(log, by, spans),
        _warn_outlying_times(log),
        _warn_ties(ties),
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
        duplicates=_count_duplicates(log),
        ties=ties,
        out_of_order=log.n_out_of_order / (n_rows + log.n_quarantined),
        repeats=1 - n_pairs / n_rows,
        exposures=exposures,
        nulls=nulls,
        bad_rows=log.n_quarantined,
        periods=n_periods,
        suggested_by=by,
        suggested_spans=spans,
        notes=log.notes,
        warnings=tuple(warning for warning in warnings if warning),
    )


def suggest_spans(log: Log) -> tuple[str, int]:
    """How to cut the log, and into how many spans after the base block, which is the first period or half the rows.

    By period where there are at least three. Otherwise by equal time ("count-alpha") if every span would hold at least
    a third of its share, as on a steady log, where spans are days or weeks of a nightly job; if not, by count.
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
    return int(frame.lazy().select(columns).unique().select(pl.len()).collect(engine="streaming").item())


def _count_duplicates(log: Log) -> int | None:
    if "event_id" in log.frame.columns:
        ids = log.frame["event_id"].drop_nulls()
        return len(ids) - ids.n_unique()
    return len(log.frame) - _n_distinct(log.frame, ["user_id", "item_id", "time"]) if log.has_clock else None


def _tied_share(log: Log) -> float | None:
    if not log.has_clock:
        return None
    tied_rows = log.frame.lazy().group_by("user_id", "time").len().filter(pl.col("len") > 1).select(pl.col("len").sum())
    return float(tied_rows.collect(engine="streaming").item()) / len(log.frame)


def _warn_single_day_users(log: Log) -> str | None:
    """Users whose rows all fall on one day, or in one period, have no past when they are tested."""
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
        f"{n_same / n_users:.0%} of the users with more than one row have all of them "
        f"{'on one day' if log.has_clock else 'in one period'}, so they have no past when a later span tests them (as "
        "it should be if a session stands as the user)"
    )


def _warn_uneven_timeline(log: Log) -> str | None:
    """Equal spans of time of a log that grew, or died, are mostly empty."""
    if not log.has_clock:
        return None
    time = log.frame["time"]
    middle = (time[0] + time[-1]) // 2
    early = int((time < middle).sum()) / len(time)
    minority_percent = 100 * min(early, 1 - early)
    if minority_percent >= 10 or time[0] == time[-1]:
        return None
    half = "earlier" if early < 0.5 else "later"
    return (
        f"the {half} half of the timeline holds {minority_percent:.2g} % of the rows, so cut by count or count-alpha, "
        "not by time"
    )


def _warn_unseen_items(log: Log, by: str, n_spans: int) -> str | None:
    """Items that no row before the last suggested span has: nothing that learns from clicks can recommend them."""
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
        f"{unseen:.0%} of the rows in the last span have an item that no earlier row has, so most test items would be "
        "unseen: take shorter spans, or recommend what lives longer (such as categories)"
    )


def _warn_outlying_times(log: Log) -> str | None:
    """A few rows behind a gap that is longer than all the rest of the timeline."""
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
            outliers.append(f"{n:,} {edge} {format_time(time[n] if edge == 'before' else time[-n - 1], 'auto')}")
    if not outliers:
        return None
    return (
        f"far-off timestamps: {' and '.join(outliers)}, beyond a gap longer than the rest of the log; check their clock"
    )


def _warn_too_small(n_rows: int, n_users: int, n_spans: int) -> str | None:
    if n_spans == 0:
        return "all rows have the same time: the log cannot be cut into spans"
    if n_users == 1:
        return "the log has a single user: nothing can be learnt from others"
    return f"{n_rows:,} rows are too few to tell ways of updating apart" if n_rows < 2 * MIN_SPAN_ROWS else None


def _warn_ties(ties: float | None) -> str | None:
    if ties is None or ties <= 0.5:
        return None
    return f"{ties:.0%} of the rows share their time with another row of their user, and keep the order of the source"
