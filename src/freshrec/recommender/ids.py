"""Translation of ids to rows: single ids, many ids, list requests, and the items of a category."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from freshrec.data.catalog import Catalog
from freshrec.data.identities import convert_ids, parse_id
from freshrec.errors import LogError, OptionError
from freshrec.recommender.list_request import ListRequest
from freshrec.recommender.lists import ResolvedRequest
from freshrec.recommender.served_state import ServedState

Ids: TypeAlias = str | int | Sequence[str | int] | pl.Series | NDArray[Any]  # one or several ids


def normalize_ids(name: str, ids: Ids, catalog: Catalog) -> pl.Series:
    """Return ids as a column of the catalog's type; numbers and text may be mixed.

    Raises LogError, with the value, for what is not exactly an id of that type, as `parse_id` does.
    """
    kind = catalog.frame["id"].dtype
    if isinstance(ids, pl.Series):
        return convert_ids(ids.alias(name), kind)
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "iufU":
        return convert_ids(pl.Series(name, np.atleast_1d(ids)), kind)
    values = id_tuple(ids)
    try:
        if set(map(type, values)) <= {int} or set(map(type, values)) <= {str}:
            return convert_ids(pl.Series(name, values, dtype=None if values else kind), kind)
    except (TypeError, OverflowError, UnicodeEncodeError):
        pass  # `parse_id` names the value
    return pl.Series(name, [parse_id(value, kind, name) for value in values])


def normalize_id(name: str, value: object, catalog: Catalog) -> str | int:
    """Return one id as the catalog's type. Raises LogError for what is not exactly an id of that type."""
    return parse_id(value, catalog.frame["id"].dtype, name)


def known_item_rows(served: ServedState, ids: Ids) -> Tensor:
    """Return the rows of the known ids, ascending."""
    rows_M: Tensor = served.items.rows(normalize_ids("item_id", ids, served.items)).unique()
    return rows_M[rows_M > 0]


def category_item_rows(served: ServedState, category: str | int, allowed_M: Tensor | None) -> Tensor:
    """Return the item rows of a category, ascending, within `allowed_M` if given. Raises OptionError for no item."""
    category = str(parse_id(category, pl.String, "The category"))
    if not (served.categories["category"] == category).any():
        examples = (
            ", ".join(served.categories["category"].unique().sort().head(5)) or "none: the log has no category column"
        )
        raise OptionError(f'No item has the category "{category[:60]}". Known categories: {examples}.')
    found = served.categories.filter(pl.col("category") == category)["item"].sort()
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
    if not _is_single(user) or not _is_single(item):
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
    return (ids,) if _is_single(ids) else tuple(ids)  # type: ignore[arg-type, return-value]


def _is_single(ids: object) -> bool:
    """Whether this is one id, and not several. Bytes are one value, which `parse_id` refuses."""
    if isinstance(ids, np.ndarray | Tensor):
        return ids.ndim == 0
    return isinstance(ids, str | bytes | bytearray | memoryview) or not isinstance(ids, Iterable)


def resolve_request(served: ServedState, request: ListRequest) -> ResolvedRequest:
    """Translate a list request to rows. Raises OptionError for an unknown category and LogError for a wrong id."""
    allow_M = None if request.allow is None else known_item_rows(served, request.allow)
    if request.category is not None:
        allow_M = category_item_rows(served, request.category, allow_M)
    deny_M = known_item_rows(served, request.deny) if request.deny else torch.zeros(0, dtype=torch.int64)
    return ResolvedRequest(request, allow_M, deny_M)
