"""Clicks that a server took become part of a delivery: an update learns them once, wherever else they arrive."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import polars as pl

from freshrec.data.log import Log
from freshrec.nightly.job import Job, batches_of
from freshrec.store import clicks as journal
from freshrec.store.eventlog import Taken
from freshrec.store.rows import KEYS
from freshrec.store.versions import chain_of


def deliver(job: Job, log: Log | None, source: str) -> Taken | None:
    """Append a delivery, if there is one, and all clicks that are in no batch yet; None: there was nothing at all.

    A click that is in the delivery too is that row: the gate sees one day, not two, and nothing doubled. One that is
    newer than all of the delivery waits for the next: learnt now, it would make most of that one's rows late. Somebody
    who dies between the batch and the journal leaves clicks that the log knows by their identity.
    """
    waiting = journal.close(job.store.folder)
    if log is not None and job.contents.reading.has_clock:
        waiting = journal.put_off(waiting, _not_yet(log, waiting))
    clicks = journal.frame_of([click for file in waiting for click in file.clicks]) if waiting else None
    if clicks is None or not len(clicks):
        journal.taken(waiting, None)
        return None if log is None else job.deliver(log, source)
    told = None
    if log is not None and (job.log.batches()["source"] == source).any():
        told, log = job.deliver(log, source), None
    has_clock = job.contents.reading.has_clock
    if log is None:
        names = "".join(f"{file.path.name}\n" for file in waiting)
        alone = clicks if has_clock else clicks.with_columns(time=pl.int_range(pl.len(), dtype=pl.Int64))
        both, source = Log(alone, has_clock, "us"), f"clicks {hashlib.sha256(names.encode()).hexdigest()}"
    else:
        both = with_clicks(log, clicks)
    found = job.deliver(both, source)
    journal.taken(waiting, found.batch or found.again)
    return told if told is not None and not found.kept else found


def waiting(job: Job) -> int:
    """How many clicks are in no batch of the log."""
    return sum(len(file.clicks) for file in journal.written(job.store.folder) if file.batch is None)


def _not_yet(log: Log, files: list[journal.Written]) -> Callable[[journal.Click], bool]:
    """Whether a click is newer than a log, and not a row of it."""
    newest: Any = log.frame["time"].max()
    rows = set[str]()
    if "event_id" in log.frame.columns:
        ids = [click.event_id for file in files for click in file.clicks if click.event_id is not None]
        column = log.frame["event_id"].cast(pl.String)
        rows = set(column.filter(column.is_in(pl.Series(ids, dtype=pl.String).implode())))
    return lambda click: click.time > newest and click.event_id not in rows


def with_clicks(log: Log, clicks: pl.DataFrame) -> Log:
    """A log and the clicks that are not in it, in time order."""
    frame = log.frame
    named = "event_id" in frame.columns
    if named:
        frame = frame.with_columns(pl.col("event_id").cast(pl.String))
        clicks = clicks.join(frame.select("event_id").drop_nulls(), on="event_id", how="anti")
    if log.has_clock:
        # a row may lack the id that its click has
        rows = frame.filter(pl.col("event_id").is_null()) if named else frame
        clicks = clicks.join(rows.select(KEYS), on=list(KEYS), how="anti", maintain_order="left")
    else:
        clicks = clicks.with_columns(time=pl.int_range(pl.len(), dtype=pl.Int64) + len(frame))
    frame = frame.with_columns(pl.col("category").cast(pl.String)) if "category" in frame.columns else frame
    return replace(log, frame=pl.concat([frame, clicks], how="diagonal").sort("time", maintain_order=True))


def settle(job: Job) -> None:
    """Remove the clicks that the live version has learnt, or that it has passed over."""
    journal.forget(job.store.folder, max(batches_of(chain_of(job.store)), default=0))
