"""Rows of JSON lines files: a row is one line with one object. Empty lines are no rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import polars as pl

from freshrec.data.text_faults import GZIP, UTF_8_BOM, check_text_file, first_bytes
from freshrec.errors import LogError
from freshrec.text_layout import to_printable


def open_json_lines(path: Path) -> pl.LazyFrame:
    """Scan a JSON lines file. Raises LogError for a line that is not one JSON object, with its number.

    The whole file decides the type of a column: later rows may hold text even if the first ones hold numbers.
    """
    check_text_file(path)
    has_mark, is_pattern = first_bytes(path) == UTF_8_BOM, any(letter in str(path) for letter in "*?[")
    source: Path | bytes = path
    if has_mark or is_pattern:  # the reader knows no marks, and takes such a path as a pattern
        content = path.read_bytes()
        source = (gzip.decompress(content) if content.startswith(GZIP) else content).removeprefix(UTF_8_BOM)
    try:
        rows = pl.scan_ndjson(source, infer_schema_length=None)
        rows.collect_schema()
    except (pl.exceptions.PolarsError, UnicodeError) as problem:
        raise (_bad_line_error(path) or problem) from None
    return rows


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
