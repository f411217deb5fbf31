"""Rows of JSON lines files: a row is one line with one object. Empty lines are no rows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import polars as pl

from freshrec.data.columns import FLOAT_LIMITS
from freshrec.data.text_faults import UTF_8_BOM, check_text_file, first_bytes, open_unpacked
from freshrec.errors import LogError, NoRowsError
from freshrec.text_layout import to_printable

OBJECT_LINE = r"^\x{feff}?\s*(?:\{.*)?$"
LARGE_FLOAT = r":\s*-?[0-9]+(?:[0-9]{15}\.|(?:\.[0-9]+)?[eE])"  # at least 16 digits and a point, or an exponent


def open_json_lines(path: Path) -> pl.LazyFrame:
    """Scan a JSON lines file. Raises LogError for a line that is not one JSON object, with its number.

    The whole file decides the type of a column: later rows may hold text even if the first ones hold numbers. A column
    with floats is read as text, because a float has too few digits for some ids.
    """
    check_text_file(path)
    has_large_floats = _check_lines(path)
    has_mark, is_pattern = first_bytes(path) == UTF_8_BOM, any(letter in str(path) for letter in "*?[")
    source: Path | bytes = path
    if has_mark or is_pattern:  # the reader knows no marks, and takes such a path as a pattern
        with open_unpacked(path) as file:
            source = file.read().removeprefix(UTF_8_BOM)
    try:
        rows = pl.scan_ndjson(source, infer_schema_length=None)
        schema = rows.collect_schema()
    except (pl.exceptions.PolarsError, UnicodeError) as problem:
        raise (_bad_line_error(path) or problem) from None
    floats = [name for name, kind in schema.items() if kind.is_float()]
    texts = [name for name, kind in schema.items() if has_large_floats and kind == pl.String]
    if not floats and not texts:
        return rows
    exact = pl.scan_ndjson(source, schema={**schema, **dict.fromkeys(floats, pl.String)})
    return exact.with_columns(_mark_rounded(pl.col(name)) for name in (*floats, *texts)).with_columns(
        pl.col(name).replace("-0", "0")
        for name in floats  # the reader prints -0.0 as -0
    )


def _check_lines(path: Path) -> bool:
    """Return whether a line may hold a float beyond 2^53. Raises LogError for a line without an object."""
    line = pl.col("line")
    try:
        lines = pl.scan_lines(path, name="line", glob=False)
        counts = lines.select(
            other=(~line.str.contains(OBJECT_LINE)).sum(),
            full=line.str.contains("{", literal=True).sum(),
            large=line.str.contains(LARGE_FLOAT).sum(),
        )
        n_other, n_full, n_large = counts.collect(engine="streaming").row(0)
    except (pl.exceptions.PolarsError, UnicodeError) as problem:
        raise (_bad_line_error(path) or problem) from None
    if n_other and (error := _bad_line_error(path)):
        raise error
    if not n_full:
        raise NoRowsError(f"{path.name} has no rows. A log needs at least one.")
    return bool(n_large)


def _mark_rounded(text: pl.Expr) -> pl.Expr:
    """Append ".0" to large numbers that may have been floats.

    The reader prints 1234567890123456789.0 as 1234567890123456800. These are the digits of the float, and then zeros.
    """
    number = text.cast(pl.Float64, strict=False).abs()
    digits = text.str.strip_prefix("-").str.strip_chars_end("0")
    float_digits = number.cast(pl.String).str.split("e").list.first().str.replace(".", "", literal=True)
    is_rounded = (number >= FLOAT_LIMITS[pl.Float64]) & (digits == float_digits.str.strip_chars_end("0"))
    return pl.when(is_rounded).then(text + ".0").otherwise(text).alias(text.meta.output_name())


def _bad_line_error(path: Path) -> LogError | None:
    """Return an error that names the first line that is not one JSON object; None if all of them are."""
    with open_unpacked(path) as file:
        for number, line in enumerate(file, 1):
            content = line.removeprefix(UTF_8_BOM) if number == 1 else line
            try:
                found = (
                    json.loads(content, parse_constant=_refuse, parse_float=_finite_float) if content.strip() else {}
                )
                reason = "" if isinstance(found, dict) else "it holds no JSON object"
            except UnicodeDecodeError:
                reason = "it is not UTF-8"
            except ValueError as problem:
                reason = str(problem)
            if reason:
                kind = "is a JSON array" if content.lstrip().startswith(b"[") else f"cannot be read in line {number:,}"
                shown = to_printable(reason, 80)
                return LogError(f"{path.name} {kind} ({shown}). Write one JSON object in each line.")
    return None


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _finite_float(text: str) -> float:
    if math.isinf(float(text)):
        raise ValueError(f"{text} is too large for a number")
    return float(text)
