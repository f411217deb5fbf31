"""New events as users deliver them, read like the first log and encoded as rows of the catalogs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import polars as pl
import torch

from freshrec.data.catalog import Catalog
from freshrec.data.log import Log, format_time, keep_positives, read_log
from freshrec.errors import LogError
from freshrec.recommender.served_state import ServedState
from freshrec.types import Events

if TYPE_CHECKING:
    import pandas as pd


LogSource: TypeAlias = "str | Path | pl.DataFrame | pd.DataFrame"


@dataclass(frozen=True)
class ReadOptions:
    """How logs are read: the arguments of `read_log` given to `fit`, kept for the updates."""

    columns: dict[str, str] = field(default_factory=dict)
    format: str | None = None
    events: tuple[str, ...] = ()
    has_clock: bool = True  # whether the log of `fit` had one; new events must have one too, or none


def read_interactions(source: LogSource, options: ReadOptions) -> Log:
    """What was taken in a log. LogError where it is not one."""
    return keep_positives(read_log(source, columns=options.columns, format=options.format, events=options.events))


def read_new_events(source: LogSource, options: ReadOptions, served: ServedState) -> Log:
    """A log that continues what has been learnt. LogError where rows are older; without a clock, they follow it."""
    log, newest = match_clock(read_interactions(source, options), options), served.newest_time
    assert newest is not None  # whoever was fitted has events
    if not log.has_clock:
        return replace(log, frame=log.frame.with_columns(pl.col("time") + newest + 1))
    times_E = log.frame["time"]
    n_late = int((times_E < newest).sum())
    if n_late:
        first, last = format_time(times_E[0])[:19], format_time(newest)[:19]  # without the zone
        raise LogError(
            f"{n_late:,} of {len(times_E):,} rows (the first of {first}) are older than {last}, the newest row learnt; "
            "an update needs newer rows: drop the older ones, or fit again on all."
        )
    return log


def match_clock(log: Log, options: ReadOptions) -> Log:
    """New events as the log of `fit` was: without a clock where that had none, their order is that of their times.

    LogError where that had a clock and they have none.
    """
    if options.has_clock and not log.has_clock:
        raise LogError("the log that was fitted had a clock and the new events have none; give them their timestamps.")
    if options.has_clock or not log.has_clock:
        return log
    return replace(log, frame=log.frame.with_columns(time=pl.int_range(pl.len(), dtype=pl.Int64)), has_clock=False)


@dataclass(frozen=True, eq=False)
class EncodedEvents:
    """The events of a log in rows, and what is known of ids once they are over."""

    events: Events
    users: Catalog
    items: Catalog
    categories: pl.DataFrame  # item (a row), category: the last that it was given


def encode_events(served: ServedState, frame: pl.DataFrame) -> EncodedEvents:
    """A log's frame in rows: those of ids that are known stay as they are."""
    span = served.state.spans_seen
    users, items = served.users.extend(frame["user_id"], span), served.items.extend(frame["item_id"], span)
    times_E = torch.from_numpy(frame["time"].to_numpy(writable=True))
    events = Events.trainable(users.rows(frame["user_id"]), items.rows(frame["item_id"]), times_E)
    categories = served.categories
    if "category" in frame.columns:
        column = frame["category"].cast(pl.String)
        new_categories = pl.DataFrame({"item": events.items_E.numpy(), "category": column}).drop_nulls()
        categories = pl.concat([categories, new_categories]).unique("item", keep="last", maintain_order=True)
    return EncodedEvents(events, users, items, categories)
