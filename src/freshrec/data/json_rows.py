"""Rows of JSON lines files: a row is one line with one object. Empty lines are no rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import polars as pl

from freshrec.data.columns import FLOAT_LIMITS
from freshrec.data.text_faults import GZIP, UTF_8_BOM, check_text_file, first_bytes
from freshrec.errors import LogError
from freshrec.text_layout import to_printable


def open_json_lines(path: Path) -> pl.LazyFrame:
    """Scan a JSON lines file. Raises LogError for a line that is not one JSON object, with its number.

    The whole file decides the type of a column: later rows may hold text even if the first ones hold numbers. A column
    with floats is read as text, because a float has too few digits for some ids.
    """
    check_text_file(path)
    has_mark, is_pattern = first_bytes(path) == UTF_8_BOM, any(letter in str(path) for letter in "*?[")
    source: Path | bytes = path
    if has_mark or is_pattern:  # the reader knows no marks, and takes such a path as a pattern
        content = path.read_bytes()
        source = (gzip.decompress(content) if content.startswith(GZIP) else content).removeprefix(UTF_8_BOM)
    try:
        rows = pl.scan_ndjson(source, infer_schema_length=None)
        schema = rows.collect_schema()
    except (pl.exceptions.PolarsError, UnicodeError) as problem:
        raise (_bad_line_error(path) or problem) from None
    floats = [name for name, kind in schema.items() if kind.is_float()]
    if not floats:
        return rows
    exact = pl.scan_ndjson(source, schema={**schema, **dict.fromkeys(floats, pl.String)})
    return exact.with_columns(_mark_rounded(pl.col(name)) for name in floats)


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
    with path.open("rb") as file:
        is_packed = file.read(2) == GZIP
    with gzip.open(path) if is_packed else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            content = line.removeprefix(UTF_8_BOM) if number == 1 else line
            try:
                found = json.loads(content) if content.strip() else {}
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
