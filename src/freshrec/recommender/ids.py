"""Translation of ids to rows: single ids, many ids, list requests, and the items of a category."""

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

Ids: TypeAlias = str | int | Sequence[str | int] | pl.Series  # one or several ids


def normalize_ids(name: str, ids: Ids, catalog: Catalog) -> pl.Series:
    """Return ids as a column of the catalog's type; "42" becomes 42 if the ids of the catalog are integers."""
    kind = catalog.frame["id"].dtype
    values = [ids] if isinstance(ids, str | int) else list(ids)
    try:
        column = pl.Series(name, values) if values else pl.Series(name, values, dtype=kind)
    except TypeError:
        raise LogError(f"{name} mixes numbers and text. Pass ids of one type.") from None
    if column.dtype != pl.String or kind != pl.Int64:
        return column
    numbers = column.cast(pl.Int64, strict=False)
    if numbers.null_count():
        wrong = column.filter(numbers.is_null())[0]
        raise LogError(f'{name} "{wrong[:60]}" is not an integer, but all ids of this log are. Pass an integer.')
    return numbers


def normalize_id(name: str, value: str | int, catalog: Catalog) -> str | int:
    """Return one id as the catalog's type. Raises LogError for an id of another type."""
    is_text = catalog.frame["id"].dtype == pl.String
    if is_text and not isinstance(value, str):
        raise LogError(f"{name} is a number, but the ids of this log are text. Send it as text.")
    if is_text or type(value) is int:
        return value
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 19:
        return int(value)  # a fast path for single ids
    found: str | int = normalize_ids(name, value, catalog)[0]
    return found


def known_item_rows(served: ServedState, ids: Ids) -> Tensor:
    """Return the rows of the known ids, ascending."""
    rows_M: Tensor = served.items.rows(normalize_ids("item_id", ids, served.items)).unique()
    return rows_M[rows_M > 0]


def category_item_rows(served: ServedState, category: str | int, allowed_M: Tensor | None) -> Tensor:
    """Return the item rows of a category, ascending, within `allowed_M` if given. Raises OptionError for no item."""
    if not (served.categories["category"] == str(category)).any():
        examples = (
            ", ".join(served.categories["category"].unique().sort().head(5)) or "none: the log has no category column"
        )
        raise OptionError(f'No item has the category "{str(category)[:60]}". Known categories: {examples}.')
    found = served.categories.filter(pl.col("category") == str(category))["item"].sort()
    rows_M = torch.from_numpy(found.to_numpy(writable=True))
    return rows_M if allowed_M is None else rows_M[torch.isin(rows_M, allowed_M)]


def require_rows(ids: pl.Series, catalog: Catalog) -> Tensor:
    """Return the rows of ids. Raises OptionError for an unknown id."""
    rows_N = catalog.rows(ids)
    if bool((rows_N == 0).any()):
        kind, name = ids.name.removesuffix("_id"), str(ids[int((rows_N == 0).int().argmax())])
        raise OptionError(f'There is no {kind} "{name[:60]}". Check the id.')
    return rows_N


def rows_of_pair(served: ServedState, user: str | int, item: str | int) -> tuple[Tensor, int]:
    """Return the row of a user, shape (1,), and the row of an item. Raises OptionError for an unknown id."""
    if not isinstance(user, str | int) or not isinstance(item, str | int):
        raise OptionError("`explain` takes one user id and one item id. Call it once per pair.")
    try:
        users, items = normalize_ids("user_id", user, served.users), normalize_ids("item_id", item, served.items)
    except LogError as problem:
        raise OptionError(str(problem)) from None  # the log is fine, the argument is not
    return require_rows(users, served.users), int(require_rows(items, served.items))


def column_tensor(found: pl.DataFrame, column: str = "item") -> Tensor:
    """Return a column of a frame as a tensor."""
    return torch.from_numpy(found[column].to_numpy(writable=True))


def id_tuple(ids: Ids) -> tuple[str | int, ...]:
    """Return one or several ids as a tuple."""
    return (ids,) if isinstance(ids, str | int) else tuple(ids)


def resolve_request(served: ServedState, request: ListRequest) -> ResolvedRequest:
    """Translate a list request to rows. Raises OptionError for an unknown category and LogError for a wrong id."""
    allow_M = None if request.allow is None else known_item_rows(served, request.allow)
    if request.category is not None:
        allow_M = category_item_rows(served, request.category, allow_M)
    deny_M = known_item_rows(served, request.deny) if request.deny else torch.zeros(0, dtype=torch.int64)
    return ResolvedRequest(request, allow_M, deny_M)
