"""Identities: the ids of users, items, events and categories, as integers or text."""

from __future__ import annotations

import polars as pl

from freshrec.data.columns import ColumnFault, has_value, to_integers, to_plain_type

MAX_ID_BYTES = 1000


def read_ids(
    column: pl.Series, *, required: bool, infer_integers: bool, allow_mixed: bool
) -> tuple[pl.Series, list[ColumnFault]]:
    """Read ids as Int64 or String.

    - `required`: a missing id is a fault.
    - `infer_integers`: a text column becomes Int64 if all its values are whole numbers without leading zeros.
    - `allow_mixed`: a text column may hold both numbers and other text.
    """
    name, ids = column.name, to_plain_type(column, "text or whole numbers")
    if ids.dtype != pl.String:
        ids = to_integers(ids)
        not_integer = ColumnFault(name, "is not a 64-bit whole number", ids.is_null() & has_value(column))
        return ids, [not_integer] + ([ColumnFault(name, "is null", ids.is_null())] if required else [])
    size = ids.str.len_bytes()
    ids = ids.set(size == 0, None)
    faults = [ColumnFault(name, f"is longer than {MAX_ID_BYTES:,} bytes", size > MAX_ID_BYTES)]
    faults += [ColumnFault(name, "is null or empty", ids.is_null())] if required else []
    if not infer_integers:
        return ids, faults
    digits = ids.str.contains(r"^-?[0-9]{1,18}$")
    n_digits, n_ids = digits.sum(), len(ids) - ids.null_count()
    if n_digits == n_ids:
        padded = ids.str.contains(r"^-?0[0-9]|^-0").any()
        return ids if padded else ids.cast(pl.Int64), faults
    if n_digits and not allow_mixed:
        rare, description = (
            (~digits, "text, while most ids are whole numbers")
            if 2 * n_digits >= n_ids
            else (digits, "a number, while most ids are text")
        )
        faults.append(ColumnFault(name, f"is {description} (if intended, pass --columns {name}=NAME:text)", rare))
    return ids, faults
