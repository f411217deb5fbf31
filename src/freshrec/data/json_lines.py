"""Rows of JSON lines files."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from freshrec.data.columns import FLOAT_LIMITS


def scan_json_lines(path: Path) -> pl.LazyFrame:
    """Scan a JSON lines file. A column with floats is read as text, because a float has too few digits for some ids.

    The whole file decides the type of a column: later rows may hold text even if the first ones hold numbers.
    """
    rows = pl.scan_ndjson(path, infer_schema_length=None)
    schema = rows.collect_schema()
    floats = [name for name, kind in schema.items() if kind.is_float()]
    if not floats:
        return rows
    exact = pl.scan_ndjson(path, schema={**schema, **dict.fromkeys(floats, pl.String)})
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
