"""Ids of the log and rows of the catalogs: one or many ids, list requests, items of a category."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import polars as pl
import torch
from torch import Tensor

from freshrec.data.catalog import Catalog
from freshrec.errors import LogError, OptionError
from freshrec.recommender.list_request import ListRequest
from freshrec.recommender.lists import ResolvedRequest
from freshrec.recommender.served_state import ServedState

Ids: TypeAlias = str | int | Sequence[str | int] | pl.Series  # one id or many


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


def category_item_rows(served: ServedState, category: str | int, allowed_M: Tensor | None) -> Tensor:
    """Ascending rows of the items of a category, among `allowed_M` if given. OptionError for an unknown category."""
    if not (served.categories["category"] == str(category)).any():
        examples = (
            ", ".join(served.categories["category"].unique().sort().head(5)) or "none: the log has no such column"
        )
        raise OptionError(f'no item has the category "{str(category)[:60]}"; known ones are {examples}.')
    found = served.categories.filter(pl.col("category") == str(category))["item"].sort()
    rows_M = torch.from_numpy(found.to_numpy(writable=True))
    return rows_M if allowed_M is None else rows_M[torch.isin(rows_M, allowed_M)]


def require_rows(ids: pl.Series, catalog: Catalog) -> Tensor:
    """Rows of ids that must be known. OptionError where one is not."""
    rows_N = catalog.rows(ids)
    if bool((rows_N == 0).any()):
        kind, name = ids.name.removesuffix("_id"), str(ids[int((rows_N == 0).int().argmax())])
        raise OptionError(f'{kind} "{name[:60]}" has never occurred in an event; ask for one that has.')
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
