"""Identities: an id of a user, item, event or category is an integer or a text. Every way in reads ids here.

The first log decides the type of each column, and later values are converted to it. No conversion loses a digit or
guesses. docs/decisions/018-identities-rows-moments.md has all rules, with examples.
"""

from __future__ import annotations

import operator
import re
from decimal import Decimal
from typing import Any, TypeAlias

import numpy as np
import polars as pl

from freshrec.data.columns import FLOAT_LIMITS, TEXT_TYPES, ColumnFault, has_value, to_whole_numbers
from freshrec.errors import LogError
from freshrec.text_layout import to_printable

IdType: TypeAlias = pl.DataType | type[pl.DataType]  # Int64, String, or Null: not decided yet

MAX_ID_BYTES = 1000  # of a text, in UTF-8
MIN_INTEGER_ID, MAX_INTEGER_ID = -(2**63), 2**63 - 1
MAX_DIGITS = 20  # of a 64-bit integer, with its sign
MAX_JSON_INTEGER = 2**53 - 1  # readers such as browsers round larger integers
CONTROL_CHARACTERS = r"\x00-\x1f\x7f-\x9f"

NUMERAL = r"^(0|-?[1-9][0-9]*)$"
DIGITS = r"^-?[0-9]+$"  # also 007
DECIMAL = r"^-?(0|[1-9][0-9]*)\.0*$"  # a whole number that a program has written as a float
EXPONENT = r"^-?[0-9](\.[0-9]+[eE]\+?|[eE]\+)[0-9]+$"  # a float such as 1.2345679E+18
NUMBER_LIKE = r"^-?[0-9][0-9.eE+]*$"  # all of the above, and more
BLANK_OR_CONTROL = rf"^\s*$|[{CONTROL_CHARACTERS}]"


def parse_id(value: object, kind: IdType, name: str = "The id") -> int | str:
    """Return one id as the type of a log's ids, `kind`. A text log takes every text as it stands.

    Integers may be of any type with `__index__`, such as `numpy.int64`; whole floats below 2^53 and decimals are
    integers too. Raises LogError, which names the id by `name`, for anything that is not exactly an id of that type.
    """
    if isinstance(value, str):
        if kind != pl.Int64:
            return _require_encodable(value, name)
        if re.fullmatch(NUMERAL, value) and len(value) <= MAX_DIGITS and _fits(int(value)):
            return int(value)
        raise LogError(f"{name} {_quote(value)} is not an integer, but all ids of this log are. {_advice(value)}")
    number = _whole_number(value)
    if number is None:
        is_number = isinstance(value, float | np.floating | Decimal)
        reason = "is not exactly a whole number" if is_number else "is neither text nor a whole number"
        raise LogError(f"{name} {_quote(str(value) if is_number else repr(value))} {reason}. Pass an integer or text.")
    if kind == pl.String:
        return str(number)
    if not _fits(number):
        raise LogError(f"{name} {number} has more than 64 bits. Pass an id of the log.")
    return number


def json_id(value: int | str) -> int | str:
    """Return an id as a JSON value: an integer beyond 2^53 becomes text, because many readers would round it."""
    return value if isinstance(value, str) or -MAX_JSON_INTEGER <= value <= MAX_JSON_INTEGER else str(value)


def check_new_text(value: str) -> str:
    """Return a text that may become an id. Raises ValueError for a blank, too long or unprintable one."""
    if not value.strip():
        raise ValueError("An id must not be blank.")
    if re.search(f"[{CONTROL_CHARACTERS}]", value):
        raise ValueError("An id must not have control characters, such as a tab or a newline.")
    if len(value.encode(errors="replace")) > MAX_ID_BYTES:
        raise ValueError(f"An id must not be longer than {MAX_ID_BYTES:,} bytes.")
    return value


def convert_ids(ids: pl.Series, kind: IdType) -> pl.Series:
    """Return ids as the type of a log's ids, `kind`. If it is Null, numbers become Int64 and texts stay texts.

    Raises LogError, which names the value, if one is not exactly an id of that type.
    """
    if ids.dtype == kind:
        return ids
    found = _convert_ids(ids, kind)
    if found.null_count() > ids.null_count():
        value = ids.filter(found.is_null() & ids.is_not_null())[0]
        parse_id(value, kind, ids.name)  # raises the error
        raise LogError(f"{ids.name} {_quote(str(value))} is no id of this log. Correct it.")
    return found


def _convert_ids(ids: pl.Series, kind: IdType) -> pl.Series:
    """Return ids as this type; null if a value is not exactly such an id."""
    if ids.dtype in TEXT_TYPES:
        text = ids.cast(pl.String)
        return text if kind != pl.Int64 else _parse_numerals(text)
    integers = to_whole_numbers(ids, "text or whole numbers")
    return integers.cast(pl.String) if kind == pl.String else integers.cast(pl.Int64, strict=False)


def read_id_column(
    column: pl.Series,
    kind: IdType | None = None,
    *,
    required: bool,
    infer_integers: bool,
    allow_mixed: bool = False,
) -> tuple[pl.Series, list[ColumnFault], list[str]]:
    """Read a column of ids. Returns Int64 or String with nulls for missing ids, the faults, and notes.

    - `kind`: Int64 or String if the type is known, from a store or by `:text`. None: the values decide.
    - `required`: a missing id is a fault.
    - `infer_integers`: without a `kind`, texts become integers if all of them are numerals.
    - `allow_mixed`: without a `kind`, a text column may hold both numerals and other text.

    Raises LogError for a column of another type, such as dates.
    """
    name, is_text = column.name, column.dtype in TEXT_TYPES
    notes: list[str] = []
    if not is_text:
        ids, faults = _read_numbers(column, kind, notes)
    else:
        text, faults = _read_texts(column.cast(pl.String))
        if kind == pl.Int64:
            ids = _parse_numerals(text, with_decimals=True)
            problem = "is not a whole number, but all ids of the log are"
            faults.append(ColumnFault(name, problem, ids.is_null() & text.is_not_null()))
            if text.str.contains(DECIMAL).any():
                notes.append(_decimal_note(name))
        elif kind == pl.String or not infer_integers:
            ids = text
        else:
            ids, found = _infer_type(text, allow_mixed, notes)
            faults += found
    if required:
        missing = text.is_null() if is_text else ~has_value(column)
        faults.append(ColumnFault(name, "is null or empty" if is_text else "is null", missing))
    return ids, faults, notes


def _read_numbers(column: pl.Series, kind: IdType | None, notes: list[str]) -> tuple[pl.Series, list[ColumnFault]]:
    """Read ids of a numeric type."""
    name, integers = column.name, to_whole_numbers(column, "text or whole numbers")
    unread = integers.is_null() & has_value(column)
    faults = []
    if unread.any() and (limit := FLOAT_LIMITS.get(column.dtype)):
        problem = f"is a float of at least 2^{limit.bit_length() - 1}, whose last digits may be lost"
        faults.append(ColumnFault(name, problem, unread & column.is_finite() & (column.abs() >= limit)))
    faults.append(ColumnFault(name, "is not a whole number", unread))
    ids = integers.cast(pl.String if kind == pl.String else pl.Int64, strict=False)
    too_large = integers.is_not_null() & ids.is_null()
    if not too_large.any():
        return ids, faults
    if kind is None:
        notes.append(_large_note(name))
        return integers.cast(pl.String), faults
    return ids, [*faults, ColumnFault(name, "is not a 64-bit whole number", too_large)]


def _read_texts(text: pl.Series) -> tuple[pl.Series, list[ColumnFault]]:
    """Read texts as they stand. Blank texts are missing."""
    name, size = text.name, text.str.len_bytes()
    faults = [ColumnFault(name, f"is longer than {MAX_ID_BYTES:,} bytes", size > MAX_ID_BYTES)]
    if text.str.contains(BLANK_OR_CONTROL).any():
        text = text.set(text.str.contains(r"^\s*$"), None)
        has_control = text.str.contains(f"[{CONTROL_CHARACTERS}]")
        faults.append(ColumnFault(name, "has a control character", has_control))
    return text, faults


def _infer_type(text: pl.Series, allow_mixed: bool, notes: list[str]) -> tuple[pl.Series, list[ColumnFault]]:
    """Decide whether a column of texts holds integers."""
    name, n_ids = text.name, len(text) - text.null_count()
    advice = f"(if intended, pass --columns {name}=NAME:text)"
    digits = text.str.contains(DIGITS)
    if not digits.any() and not text.str.contains(NUMBER_LIKE).any():
        return text, []
    has_padded = bool(text.str.contains(r"^-?0[0-9]+$|^-0$").any())
    if digits.sum() == n_ids:
        integers = text if has_padded else text.cast(pl.Int64, strict=False)
        if integers.null_count() == text.null_count():
            return integers, []
        notes.append(_large_note(name))
        return text, []
    exponents = text.str.contains(EXPONENT)
    faults = [ColumnFault(name, f"is a float in exponent form, whose digits may be lost {advice}", exponents)]
    decimals = text.str.contains(DECIMAL)
    numbers = digits | decimals if not has_padded else digits
    n_numbers = numbers.sum()
    if n_numbers == n_ids:
        notes.append(_decimal_note(name))
        integers = _parse_numerals(text, with_decimals=True)
        unread = integers.is_null()
        lost = ColumnFault(name, "is a float of at least 2^53, whose last digits may be lost", decimals & unread)
        return integers, [lost, ColumnFault(name, "is not a 64-bit whole number", digits & unread)]
    if n_numbers and not allow_mixed:
        rare, description = (
            (~numbers, "text, while most ids are whole numbers")
            if 2 * n_numbers >= n_ids
            else (numbers, "a number, while most ids are text")
        )
        faults.append(ColumnFault(name, f"is {description} {advice}", rare))
    return text, faults


def _parse_numerals(text: pl.Series, with_decimals: bool = False) -> pl.Series:
    """Return numerals as Int64, and with `with_decimals` also texts such as 7.0 below 2^53; null for other texts."""
    numerals = text.set(~text.str.contains(NUMERAL), None).cast(pl.Int64, strict=False)
    decimals = text.str.contains(DECIMAL)
    if not with_decimals or not decimals.any():
        return numerals
    whole = text.set(~decimals, None).str.replace(r"\.0*$", "").cast(pl.Int64, strict=False)
    return numerals.fill_null(whole.set(~whole.is_between(-MAX_JSON_INTEGER, MAX_JSON_INTEGER), None))


def _whole_number(value: Any) -> int | None:
    """Return a number as an integer; None for other values and for numbers that are not exactly whole."""
    if isinstance(value, bool | np.bool_):
        return None
    if isinstance(value, float | np.floating):
        is_exact = float(value).is_integer() and abs(value) < 2 ** (np.finfo(type(value)).nmant + 1)
        return int(value) if is_exact else None
    if isinstance(value, Decimal):
        return int(value) if value.is_finite() and value == value.to_integral_value() else None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _fits(number: int) -> bool:
    return MIN_INTEGER_ID <= number <= MAX_INTEGER_ID


def _require_encodable(text: str, name: str) -> str:
    """Return a text. Raises LogError if it is no Unicode, such as a broken byte of a command line."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise LogError(f"{name} {_quote(text)} is not valid text in UTF-8. Check the encoding.") from None
    return text


def _advice(text: str) -> str:
    """Suggest the integer that a text may mean."""
    meant = re.fullmatch(r"\s*([+-]?[0-9][0-9_]{0,20})(\.0*)?\s*", text)
    number = int(meant[1].replace("_", "")) if meant else None
    return f"Did you mean {number}?" if number is not None and _fits(number) else "Pass an integer."


def _quote(text: str) -> str:
    return f'"{to_printable(text, 60)}"'


def _decimal_note(name: str) -> str:
    return f"{name} holds decimals such as 7.0. They are read as the whole numbers that they are, such as 7."


def _large_note(name: str) -> str:
    return f"{name} holds whole numbers of more than 64 bits, so all its ids are text."
