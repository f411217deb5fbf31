"""Warnings about texts that are taken as ids and may be mistakes: "nan", blanks at an end, decimals."""

from __future__ import annotations

import polars as pl

NULL_WORDS = r"(?i)^\s*(nan|nat|null|none|nil|na|n/a|#n/a|<na>|<null>|\(null\)|\(not set\)|undefined|unknown|\\n)\s*$"
BLANK_AT_AN_END = r"^\s|\s$"
DECIMAL = r"^-?[0-9]+\.0+$"
MIN_DECIMAL_SHARE = 0.5  # of the rows; a few decimals may be names, such as versions


def warn_about_ids(frame: pl.DataFrame) -> dict[str, str]:
    """Return one or more sentences by a stable code for each kind of suspicious ids in a `Log.frame`.

    They name no id of a person, because versions store them.
    """
    found: dict[str, str] = {}
    for name, noun in (("user_id", "user"), ("item_id", "item"), ("event_id", "event")):
        if name in frame.columns and frame.schema[name] == pl.String:
            found |= {f"{code} {name}": text for code, text in _warn_about_column(frame[name], noun).items()}
    return found


def _warn_about_column(column: pl.Series, noun: str) -> dict[str, str]:
    name, warnings = column.name, {}
    words = column.filter(column.str.contains(NULL_WORDS))
    if len(words):
        warnings["null-like"] = (
            f'{_share(words, column)} of the rows have the {name} "{words.mode().sort()[0].strip()}", or a similar '
            f"word for a missing value. All rows with the same word count as one {noun}. If values are missing, remove "
            "the rows or leave the fields empty."
        )
    padded = column.filter(column.str.contains(BLANK_AT_AN_END))
    if len(padded):
        warnings["padded"] = (
            f"{_share(padded, column)} of the rows have a blank at an end of the {name}. With and without the blank, "
            f"it is not the same {noun}. Remove the blanks if they mean nothing."
        )
    decimals = column.filter(column.str.contains(DECIMAL))
    if len(decimals) >= MIN_DECIMAL_SHARE * max(1, len(column)):
        warnings["decimals"] = (
            f"{_share(decimals, column)} of the rows have a {name} with a decimal point, such as 7.0, as text. "
            f"The number 7 in a later file is another {noun}. Convert the column to whole numbers if it holds numbers."
        )
    return warnings


def _share(part: pl.Series, whole: pl.Series) -> str:
    return f"{100 * len(part) / len(whole):.3g} %"
