"""Reading of new events: with the options of the first log, checked, and encoded as rows of the catalogs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import polars as pl
import torch

from freshrec.data.catalog import Catalog
from freshrec.data.duplicates import EVENT_KEYS, drop_duplicates, drop_known_rows
from freshrec.data.identities import IdType
from freshrec.data.log import Log, keep_positives, read_log
from freshrec.data.moments import format_time
from freshrec.data.ratings import WEIGHT_DROPPED
from freshrec.deprecation import warn_caller
from freshrec.errors import LogError
from freshrec.recommender.served_state import ServedState
from freshrec.types import Events

if TYPE_CHECKING:
    import pandas as pd


LogSource: TypeAlias = "str | Path | pl.DataFrame | pd.DataFrame"


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading logs: the arguments of `fit`, stored so that updates read their files in the same way."""

    columns: dict[str, str] = field(default_factory=dict)  # Column of each field, such as user_id -> customer.
    format: str | None = None  # Name of the log format; None = detect it.
    events: tuple[str, ...] = ()  # Event types to read; empty = all.
    has_clock: bool = True  # Whether the log of `fit` had timestamps. New events must have them too.
    separator: str | None = None  # Separator of text files; None = by the ending of the file.
    min_rating: float | None = None  # Lowest rating of the rows to read; None = all rows.
    time_format: str | None = None  # Format of the timestamps, such as %d.%m.%Y; None = ISO 8601 or numbers.


def read_with_options(
    source: LogSource,
    options: ReadOptions,
    *,
    id_types: Mapping[str, IdType] | None = None,
    drop_weight: bool = False,
    quarantine: Path | None = None,
    allow_missing_events: bool = False,
) -> Log:
    """Read a log with the stored options. The other arguments are those of `read_log`, which raises the errors."""
    return read_log(
        source,
        columns=options.columns,
        format=options.format,
        events=options.events,
        separator=options.separator,
        min_rating=options.min_rating,
        time_format=options.time_format,
        id_types=id_types,
        drop_weight=drop_weight,
        quarantine=quarantine,
        allow_missing_events=allow_missing_events,
    )


def read_interactions(
    source: LogSource,
    options: ReadOptions,
    id_types: Mapping[str, IdType] | None = None,
    drop_weight: bool = False,
) -> Log:
    """Read the positive events of a log, each once; exposures (label 0) are dropped. Raises LogError for a bad log.

    `id_types`: types of the ids of earlier events (`known_id_types`). A column `weight` of a frame, or of any log with
    `drop_weight`, is ignored with a UserWarning.
    """
    drop_weight = drop_weight or not isinstance(source, str | Path)
    log = read_with_options(source, options, id_types=id_types, drop_weight=drop_weight)
    if WEIGHT_DROPPED in log.notes:
        warn_caller(f"{WEIGHT_DROPPED} Pass min_rating to fit, or drop the column.", UserWarning)
    refuse_future(log)
    return drop_duplicates(keep_positives(log))


def refuse_future(log: Log) -> None:
    """Raise LogError if all events lie in the future: after learning them, every real event would be late."""
    if log.future_text:
        raise LogError(f"{log.future_text} Check their unit, and the clock of this computer.")


def known_id_types(served: ServedState) -> dict[str, IdType]:
    """Return the types of the ids that a recommender knows, to read further events with."""
    catalogs = {"user_id": served.users, "item_id": served.items}
    types = {name: catalog.frame["id"].dtype for name, catalog in catalogs.items()}
    return {name: kind for name, kind in types.items() if kind != pl.Null}


def read_new_events(source: LogSource, options: ReadOptions, served: ServedState) -> Log:
    """Read a log that continues the learned events. Raises LogError for older rows.

    Rows of the newest learned moment that are learned already are left out, so there may be none. Without timestamps,
    the new rows follow the learned ones.
    """
    log = read_interactions(source, options, known_id_types(served), drop_weight=True)
    log, newest = match_clock(log, options), served.newest_time
    assert newest is not None  # a fitted recommender has events
    if not log.has_clock:
        return replace(log, frame=log.frame.with_columns(pl.col("time") + newest + 1))
    times_E = log.frame["time"]
    n_late = int((times_E < newest).sum())
    if n_late:
        first, last = format_time(times_E[0])[:19], format_time(newest)[:19]  # without the time zone
        raise LogError(
            f"{n_late:,} of {len(times_E):,} rows are older than {last}, the newest event so far; the oldest is of "
            f"{first}. Drop the older rows, or fit again on all events."
        )
    if int(times_E[0]) > newest:
        return log
    # a version keeps no event ids, so the key decides
    learned = _rows_at(served, newest).cast({name: log.frame.schema[name] for name in EVENT_KEYS}, strict=False)
    return replace(log, frame=drop_known_rows(log.frame, None, learned))


def _rows_at(served: ServedState, moment: int) -> pl.DataFrame:
    """Return user_id, item_id and time of the learned events of a moment."""
    histories = served.counts.histories
    rows_N = (histories.times_R == moment).nonzero()[:, 0]
    users_N = torch.searchsorted(histories.offsets_U, rows_N, right=True) - 1
    columns = {"user_id": served.users.ids(users_N), "item_id": served.items.ids(histories.items_R[rows_N].long())}
    return pl.DataFrame(columns).with_columns(time=pl.lit(moment, pl.Int64))


def match_clock(log: Log, options: ReadOptions) -> Log:
    """Drop the timestamps of new events if the log of `fit` had none; their order stays.

    Raises LogError if the log of `fit` had timestamps and the new events have none.
    """
    if options.has_clock and not log.has_clock:
        raise LogError("The log of `fit` had timestamps, but the new events have none. Add a timestamp column.")
    if options.has_clock or not log.has_clock:
        return log
    return replace(log, frame=log.frame.with_columns(time=pl.int_range(pl.len(), dtype=pl.Int64)), has_clock=False)


@dataclass(frozen=True, eq=False)
class EncodedEvents:
    """The events of a log as rows, with the catalogs and categories after them."""

    events: Events
    users: Catalog
    items: Catalog
    categories: pl.DataFrame  # item (a row) and its most recent category


def encode_events(served: ServedState, frame: pl.DataFrame) -> EncodedEvents:
    """Encode the frame of a log. Known ids keep their rows, new ids get the next ones."""
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
