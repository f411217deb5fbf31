"""Ratings: they select the rows of a log, and nothing else. No model uses them as weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite

import polars as pl

from freshrec.data.columns import ColumnFault, read_numbers
from freshrec.errors import LogError, NoRowsError, OptionError
from freshrec.text_layout import format_count

WEIGHT_DROPPED = "Column weight is not used, because no model uses weights."


def choose_rating(
    names: Mapping[str, str], min_rating: float | None, drop_weight: bool, table: str
) -> tuple[dict[str, str], list[str]]:
    """Return the columns to read, our name -> name in the source, and notes about a rating that is not used.

    The rating is column `rating`, or else column `weight`. Without `min_rating`, it is not read. A weight is refused
    (LogError) unless `drop_weight`.
    """
    others = {name: source for name, source in names.items() if name not in ("rating", "weight")}
    if min_rating is not None:
        if not isfinite(min_rating):
            raise OptionError(f"--min-rating is {min_rating}, which is no finite number. Use a number such as 4.")
        rating = names.get("rating", names.get("weight"))
        if rating is None:
            raise LogError(f"{table} has no column rating, which --min-rating needs. Pass --columns rating=NAME.")
        return others | {"rating": rating}, []
    if "weight" in names:
        if not drop_weight:
            weight = names["weight"]
            raise LogError(
                f'{table} has a column "{weight}", but no model uses weights. Pass --min-rating X to keep the rows '
                f"with at least X, or --columns rating={weight} to read all rows alike."
            )
        return others, [WEIGHT_DROPPED]
    if "rating" in names:
        return others, [f'Column "{names["rating"]}" is not used. --min-rating X keeps only the rows with at least X.']
    return others, []


def keep_ratings(rows: pl.DataFrame, min_rating: float, table: str) -> tuple[pl.DataFrame, list[ColumnFault], str]:
    """Return the rows with a rating of at least `min_rating`, the faults of these rows, and a note.

    A row without a readable rating is bad, because nobody can say whether it belongs to the log. Raises NoRowsError if
    no row is left.
    """
    ratings, faults = read_numbers(rows["rating"], integers_only=False)
    missing = ratings.is_null()
    is_kept = missing | (ratings >= min_rating).fill_null(value=False)
    kept = rows.filter(is_kept)
    if not len(kept):
        raise NoRowsError(
            f"{table} has no row with a rating of at least {min_rating:g}. The highest is {ratings.max()!r}."
        )
    faults.append(ColumnFault("rating", "is null", missing))
    found = [replace(fault, rows=fault.rows.filter(is_kept)) for fault in faults]
    n_left_out = len(rows) - len(kept)
    return kept, found, f"Left out {format_count(n_left_out, 'row')} with a rating below {min_rating:g}."
