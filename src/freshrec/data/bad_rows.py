"""Bad rows of a log: the message that names them, and the quarantine file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import polars as pl

from freshrec.data.columns import ColumnFault
from freshrec.data.formats import SourceTable
from freshrec.data.reader_errors import as_log_error
from freshrec.errors import LogError
from freshrec.text_layout import format_count, to_printable


def first_faults(faults: Sequence[ColumnFault]) -> list[ColumnFault]:
    """Return the faults that occur. Each bad row is counted in its first fault only."""
    unique: list[ColumnFault] = []
    for fault in faults:
        rows = fault.rows.fill_null(False)
        for earlier in unique:
            rows = rows & ~earlier.rows
        unique += [replace(fault, rows=rows)] if rows.any() else []
    return unique


def fault_message(raw: pl.DataFrame, names: Mapping[str, str], faults: Sequence[ColumnFault], name: str) -> str:
    """Say how many rows are bad and why, with the first three rows of each fault."""
    messages = []
    for fault in faults:
        first = raw.filter(fault.rows).select("row", fault.column).head(3)
        if first[fault.column].dtype.is_temporal():  # Python has no years beyond 9999
            first = first.with_columns(pl.col(fault.column).cast(pl.String))
        shown = ", ".join(f"data row {row + 1:,}: {_format_value(value)}" for row, value in first.iter_rows())
        messages.append(
            f"{names[fault.column]} {fault.problem} in {format_count(int(fault.rows.sum()), 'row')} ({shown})"
        )
    n_bad = sum(fault.rows.sum() for fault in faults)
    advice = "".join(f" {fault.advice}" for fault in faults if fault.advice)
    return (
        f"{name}: {n_bad:,} of {format_count(len(raw), 'row')} cannot be used: {'; '.join(messages)}. "
        f"Fix them, or pass --quarantine FILE to continue without them.{advice}"
    )


def _format_value(value: object) -> str:
    """Format a value of a bad row for a message."""
    return "null" if value is None else to_printable(repr(value), 40)


def write_quarantine(raw: pl.DataFrame, faults: Sequence[ColumnFault], table: SourceTable, quarantine: Path) -> Path:
    """Write the bad rows, with all columns of the source and a column `reason`, to a .parquet or .csv file.

    An existing file stays as it is. Returns the path of the file: `quarantine`, or else the first free one of name-1,
    name-2, ...
    """
    reasons = pl.concat(
        raw.filter(fault.rows).select("row", reason=pl.lit(f"{fault.column} {fault.problem}")) for fault in faults
    )
    numbered = table.rows.with_row_index("row in the source").filter(
        pl.col("row in the source").is_in(reasons["row"].implode())
    )
    with as_log_error(table.name):
        rows = numbered.collect().join(reasons, left_on="row in the source", right_on="row", maintain_order="left")
    rows = rows.drop("row in the source")
    path = _free_path(quarantine)
    try:
        if path.suffix == ".parquet":
            rows.write_parquet(path)
        else:
            rows.write_csv(path)
    except (OSError, pl.exceptions.PolarsError) as problem:
        reason = str(problem)[:120]
        raise LogError(f"The bad rows cannot be written to {path} ({reason}). Choose another file.") from problem
    return path


def _free_path(path: Path) -> Path:
    candidates = (path.with_stem(f"{path.stem}-{n}") for n in count(1))
    return path if not os.path.lexists(path) else next(other for other in candidates if not os.path.lexists(other))
