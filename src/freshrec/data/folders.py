"""Rows of Parquet files and of folders of them."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from freshrec.errors import LogError


def scan_parquet(files: list[Path]) -> pl.LazyFrame:
    for part in files:
        with part.open("rb") as file:
            start = file.read(4)
            file.seek(max(part.stat().st_size - 4, 0))
            is_complete = start == file.read(4) == b"PAR1"
        if not is_complete:
            raise LogError(
                f"{part.name} is not a complete Parquet file: its first or last bytes are missing. Copy it again."
            )
    casts = pl.ScanCastOptions(integer_cast="upcast")
    return pl.scan_parquet(files, hive_partitioning=False, cast_options=casts, extra_columns="ignore")
