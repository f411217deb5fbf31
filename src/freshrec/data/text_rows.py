"""Rows of CSV and TSV files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl


def scan_text(path: Path, separator: str = ",", names: Sequence[str] | None = None) -> pl.LazyFrame:
    """Scan a text file with all columns as text. `names` are the columns of a file without a header.

    Types that are inferred from the first rows may fail later, or turn the id 007 into 7.
    """
    return pl.scan_csv(
        path, separator=separator, has_header=names is None, new_columns=names, infer_schema=False, glob=False
    )
