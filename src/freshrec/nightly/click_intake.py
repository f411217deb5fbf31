"""Merge the clicks that a server has accepted into a delivery, so that an update learns each of them once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import polars as pl

from freshrec.data.duplicates import EVENT_KEYS, drop_known_rows
from freshrec.data.log import Log
from freshrec.nightly.challenger import earlier_stats
from freshrec.nightly.deferral import batches_of
from freshrec.nightly.gate import find_anomalies
from freshrec.nightly.job import NightlyJob, interaction_rows, match_types, refused_batches
from freshrec.store import click_journal
from freshrec.store.event_log import AppendResult
from freshrec.store.manifest import CLICKS_SUFFIX
from freshrec.store.versions import version_chain


def append_with_clicks(job: NightlyJob, log: Log | None, source: str) -> AppendResult | None:
    """Append a delivery, if there is one, together with all clicks that are in no batch yet.

    A click that is also a row of the delivery is stored once, so the gate sees no duplicates. A click that is newer
    than the whole delivery waits for the next one. Otherwise most rows of the next delivery would be late.

    If the file and the clicks look unusual together, they become two batches, so that the gate judges them apart. So a
    flood of clicks does not keep the rows of the file out.

    If the process is killed between the log and the journal, the next run recognises the clicks as known events. The
    ids of clicks that are not stored, because their events are known without an id, are remembered in the journal.
    Returns None if there are no clicks and no delivery.
    """
    files = click_journal.close_journal(job.store.folder)
    if log is not None and job.bundle.read_options.has_clock:
        files = click_journal.defer_clicks(files, _is_later_click(log, files))
    clicks = click_journal.clicks_to_frame([click for file in files for click in file.clicks]) if files else None
    if clicks is None or not len(clicks):
        click_journal.mark_taken(files, None)
        return None if log is None else job.append_delivery(log, source)
    repeated, earlier_batches = None, set(job.log.batches()["batch"])
    if log is not None and (job.log.batches()["source"] == source).any():
        repeated, log = job.append_delivery(log, source), None
    if log is None:
        names = "".join(f"{file.path.name}\n" for file in files)
        source = f"clicks {hashlib.sha256(names.encode()).hexdigest()}"
        result = of_clicks = job.append_delivery(_as_log(job, clicks), source)
    elif _is_unusual(job, delivery := merge_clicks(log, clicks)):
        of_file = job.append_delivery(log, source)
        of_clicks = job.append_delivery(_as_log(job, clicks), source + CLICKS_SUFFIX)
        result = _in_all(of_file, of_clicks)
    else:
        result = of_clicks = job.append_delivery(delivery, source)
    _remember_lost_ids(job, files, earlier_batches)
    click_journal.mark_taken(files, of_clicks.batch or of_clicks.repeated_batch)
    return repeated if repeated is not None and not result.n_appended else result


def _is_unusual(job: NightlyJob, log: Log) -> bool:
    """Whether the gate finds anomalies in the new rows of a delivery. Raises LogError as `append_delivery`."""
    frame = interaction_rows(match_types(log, job.bundle).frame)
    batches = set(job.log.batches()["batch"]) - set(refused_batches(job.store))
    new, earlier = job.log.rows_not_in(frame, batches), earlier_stats(version_chain(job.store))
    return len(new) > 0 and bool(find_anomalies(job.champion().delivery_stats(new), earlier, job.limits))


def _as_log(job: NightlyJob, clicks: pl.DataFrame) -> Log:
    """Return clicks as a log. Without timestamps, they are numbered."""
    has_clock = job.bundle.read_options.has_clock
    rows = clicks if has_clock else clicks.with_columns(time=pl.int_range(pl.len(), dtype=pl.Int64))
    return Log(rows, has_clock, "us")


def _in_all(of_file: AppendResult, of_clicks: AppendResult) -> AppendResult:
    """Return the numbers of rows of a file, and of clicks that are judged apart."""
    return replace(
        of_file,
        n_rows=of_file.n_rows + of_clicks.n_rows,
        n_duplicates=of_file.n_duplicates + of_clicks.n_duplicates,
        n_known=of_file.n_known + of_clicks.n_known,
        n_separate=of_file.n_separate + of_clicks.n_appended + of_clicks.n_separate,
    )


def count_waiting_clicks(job: NightlyJob) -> int:
    """Return the number of clicks that are in no batch of the log."""
    return sum(len(file.clicks) for file in click_journal.read_journal(job.store.folder) if file.batch is None)


def _is_later_click(log: Log, files: list[click_journal.JournalFile]) -> Callable[[click_journal.Click], bool]:
    """Return a function that tests whether a click is newer than all rows of the log and not one of them."""
    newest: Any = log.frame["time"].max()
    rows = set[str]()
    if "event_id" in log.frame.columns:
        ids = [click.event_id for file in files for click in file.clicks if click.event_id is not None]
        column = log.frame["event_id"].cast(pl.String)
        rows = set(column.filter(column.is_in(pl.Series(ids, dtype=pl.String).implode())))
    return lambda click: click.time > newest and click.event_id not in rows


def merge_clicks(log: Log, clicks: pl.DataFrame) -> Log:
    """Return the rows of a log and the clicks that are not among them, in time order.

    A row without an id gets the id of its click, so that the click stays known.
    """
    frame = log.frame
    if "event_id" in frame.columns:
        frame = frame.with_columns(pl.col("event_id").cast(pl.String))
        clicks = drop_known_rows(clicks, frame["event_id"], None)
    if log.has_clock:
        frame = _with_ids_of_clicks(frame, clicks)
        clicks = drop_known_rows(clicks, frame["event_id"] if "event_id" in frame.columns else None, frame)
    else:
        clicks = clicks.with_columns(time=pl.int_range(pl.len(), dtype=pl.Int64) + len(frame))
    frame = frame.with_columns(pl.col("category").cast(pl.String)) if "category" in frame.columns else frame
    return replace(log, frame=pl.concat([frame, clicks], how="diagonal").sort("time", maintain_order=True))


def _with_ids_of_clicks(frame: pl.DataFrame, clicks: pl.DataFrame) -> pl.DataFrame:
    """Return the rows; those without an event_id get that of the first click with their user, item and time."""
    ids = clicks.drop_nulls("event_id").unique(EVENT_KEYS, keep="first", maintain_order=True)
    ids = ids.select(*EVENT_KEYS, of_click="event_id")
    found = frame.join(ids, on=EVENT_KEYS, how="left", maintain_order="left")
    if not found["of_click"].count():
        return frame
    own = pl.col("event_id") if "event_id" in frame.columns else pl.lit(None, pl.String)
    return found.with_columns(event_id=pl.coalesce(own, "of_click")).drop("of_click")


def _remember_lost_ids(job: NightlyJob, files: list[click_journal.JournalFile], earlier_batches: set[int]) -> None:
    """Remember the ids of clicks that the append has left out, because their events are known without an id."""
    named = [click for file in files for click in file.clicks if click.event_id is not None]
    batches = sorted(set(job.log.batches()["batch"]) - earlier_batches)
    rows = job.log.read(batches) if named and batches else pl.DataFrame()
    stored = set(rows["event_id"]) if "event_id" in rows.columns else set()
    click_journal.remember_known_clicks(job.store.folder, [click for click in named if click.event_id not in stored])


def remove_learned_clicks(job: NightlyJob) -> None:
    """Delete the journal files of clicks in batches up to the live version's."""
    click_journal.remove_learned_files(job.store.folder, max(batches_of(version_chain(job.store)), default=0))
