"""Logs as they come, into rows: what `fit` and `update` read, and ids that somebody asks about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import polars as pl
import torch
from torch import Tensor

from freshrec.data.catalog import Catalog
from freshrec.data.log import Log, format_time, keep_positives, read_log
from freshrec.errors import LogError, OptionError
from freshrec.recommender.list_request import ListRequest
from freshrec.recommender.lists import ResolvedRequest, ServedState
from freshrec.types import Events

if TYPE_CHECKING:
    import pandas as pd

LogSource: TypeAlias = "str | Path | pl.DataFrame | pd.DataFrame"
Ids: TypeAlias = str | int | Sequence[str | int] | pl.Series  # one id or many


@dataclass(frozen=True)
class ReadOptions:
    """How logs are read: the arguments of `read_log` given to `fit`, kept for the updates."""

    columns: dict[str, str] = field(default_factory=dict)
    format: str | None = None
    events: tuple[str, ...] = ()
    has_clock: bool = True  # whether the log of `fit` had one; new events must be alike


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


def normalize_ids(name: str, ids: Ids, catalog: Catalog) -> pl.Series:
    """One or many ids as a column of the catalog's kind; "42" is read as 42 where the catalog holds integers."""
    kind = catalog.frame["id"].dtype
    values = [ids] if isinstance(ids, str | int) else list(ids)
    try:
        column = pl.Series(name, values) if values else pl.Series(name, values, dtype=kind)
    except TypeError:
        raise LogError(f"{name} mixes numbers and text; ids are all of one kind.") from None
    if column.dtype != pl.String or kind != pl.Int64:
        return column
    numbers = column.cast(pl.Int64, strict=False)
    if numbers.null_count():
        wrong = column.filter(numbers.is_null())[0]
        raise LogError(f'{name} "{wrong[:60]}" is not an integer, as all ids of this log are; give one that is.')
    return numbers


def normalize_id(name: str, value: str | int, catalog: Catalog) -> str | int:
    """One id as the catalog has them. LogError where it is of another kind."""
    is_text = catalog.frame["id"].dtype == pl.String
    if is_text and not isinstance(value, str):
        raise LogError(f"{name} is a number, and the ids of this log are text; send it as text.")
    if is_text or type(value) is int:
        return value
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 19:
        return int(value)  # what follows is for many
    found: str | int = normalize_ids(name, value, catalog)[0]
    return found


def known_item_rows(served: ServedState, ids: Ids) -> Tensor:
    """Ascending rows of the ids that are known."""
    rows_M: Tensor = served.items.rows(normalize_ids("item_id", ids, served.items)).unique()
    return rows_M[rows_M > 0]


def category_item_rows(served: ServedState, category: str | int, among_M: Tensor | None) -> Tensor:
    """Ascending rows of the items of a category, or of those among some rows. OptionError for one that is not known."""
    if not (served.categories["category"] == str(category)).any():
        some = ", ".join(served.categories["category"].unique().sort().head(5)) or "none: the log has no such column"
        raise OptionError(f'no item has the category "{str(category)[:60]}"; known ones are {some}.')
    found = served.categories.filter(pl.col("category") == str(category))["item"].sort()
    rows_M = torch.from_numpy(found.to_numpy(writable=True))
    return rows_M if among_M is None else rows_M[torch.isin(rows_M, among_M)]


def require_rows(ids: pl.Series, catalog: Catalog) -> Tensor:
    """Rows of ids that must be known. OptionError where one is not."""
    rows_N = catalog.rows(ids)
    if bool((rows_N == 0).any()):
        what, name = ids.name.removesuffix("_id"), str(ids[int((rows_N == 0).int().argmax())])
        raise OptionError(f'{what} "{name[:60]}" has never occurred in an event; ask for one that has.')
    return rows_N


def column_tensor(found: pl.DataFrame, column: str = "item") -> Tensor:
    """A column of rows as a tensor."""
    return torch.from_numpy(found[column].to_numpy(writable=True))


def id_tuple(ids: Ids) -> tuple[str | int, ...]:
    """One or many ids as a tuple."""
    return (ids,) if isinstance(ids, str | int) else tuple(ids)


def resolve_request(served: ServedState, request: ListRequest) -> ResolvedRequest:
    """A list request with its items as rows. OptionError for an unknown category; LogError for what cannot be an id."""
    allow_M = None if request.allow is None else known_item_rows(served, request.allow)
    if request.category is not None:
        allow_M = category_item_rows(served, request.category, allow_M)
    deny_M = known_item_rows(served, request.deny) if request.deny else torch.zeros(0, dtype=torch.int64)
    return ResolvedRequest(request, allow_M, deny_M)
