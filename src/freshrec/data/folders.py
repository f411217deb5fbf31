"""Rows of Parquet files, of folders of them, and of Delta tables."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import polars as pl

from freshrec.errors import LogError
from freshrec.text_layout import format_count, to_printable

PARQUET_ENDINGS = (".parquet", ".pq")
OTHER_LOG_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".csv.gz", ".tsv.gz", ".jsonl.gz", ".ndjson.gz")
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # how Hive and Spark write a null in the name of a folder
NUMERAL = re.compile(r"0|-?[1-9][0-9]{0,17}")
PATH_COLUMN = "path of the part"


@dataclass(frozen=True)
class Part:
    """A file of a log, and the columns that its folders or its table hold instead of the file."""

    path: Path
    values: Mapping[str, str | int | None] = field(default_factory=dict)


def list_parts(path: Path) -> tuple[list[Part], list[str]]:
    """Return the files that make up the log at `path`, and notes about files that are ignored.

    `path` is a file, a folder of Parquet files or a Delta table. Raises LogError if it is none of them.
    """
    if not path.exists():
        raise LogError(f"There is no file {path}. Check the path.")
    _refuse_part_of_table(path)
    if path.is_dir():
        return (_delta_parts(path), []) if (path / "_delta_log").is_dir() else _folder_parts(path)
    if not path.is_file():
        raise LogError(f"{path} is not a regular file. Save the log to a file first.")
    if not path.stat().st_size:
        raise LogError(f"{path.name} is an empty file. A log needs at least one row.")
    return [Part(path)], []


def _table_kind(folder: Path) -> str | None:
    """Return the kind of table that a folder holds."""
    if (folder / "_delta_log").is_dir():
        return "Delta"
    if (folder / ".hoodie").is_dir():
        return "Hudi"
    return "Iceberg" if any((folder / "metadata").glob("*.metadata.json")) else None


def _refuse_part_of_table(path: Path) -> None:
    """Raise LogError for a Parquet file or a folder inside a table: it may hold rows that the table has deleted."""
    if path.is_dir() and (kind := _table_kind(path)) in ("Hudi", "Iceberg"):
        raise LogError(f"{path.name} is a table of {kind}, which is not supported. Export its current rows as Parquet.")
    if not path.is_dir() and not path.name.lower().endswith(PARQUET_ENDINGS):
        return
    for parent in path.absolute().parents:
        if kind := _table_kind(parent):
            raise LogError(f"{path.name} is a part of the {kind} table {parent}. Pass the whole table.")


def _folder_parts(folder: Path) -> tuple[list[Part], list[str]]:
    files, ignored, seen = list[Path](), list[str](), set[str]()
    for root, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in seen:  # a link to a folder above or beside it
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        folders.sort()
        current = Path(root)
        if current != folder and (kind := _table_kind(current)):
            raise LogError(f"{folder.name} holds the {kind} table {current.relative_to(folder)}. Pass that folder.")
        for file in (current / name for name in names):
            place = file.relative_to(folder)
            is_parquet = file.name.lower().endswith(PARQUET_ENDINGS)
            if any(_is_hidden(part) for part in place.parts):
                ignored += [str(place)] if is_parquet else []
            elif is_parquet:
                files.append(file)
            elif file.name.lower().endswith(OTHER_LOG_ENDINGS):
                raise LogError(
                    f"{folder.name} holds {place} beside .parquet files, or instead of them. A folder may hold "
                    ".parquet files only. Pass the file itself."
                )
    if not files:
        raise LogError(f"{folder.name} is a folder without .parquet files. Pass a file, or a folder that has some.")
    notes = []
    if ignored:
        shown = ", ".join(to_printable(name, 60) for name in sorted(ignored)[:3])
        notes.append(f"Ignored {format_count(len(ignored), 'file')} with a name that starts with . or _ ({shown}).")
    return _with_folder_values(folder, sorted(files)), notes


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def _with_folder_values(folder: Path, files: Sequence[Path]) -> list[Part]:
    """Read columns from names of folders such as event=buy. A column of numerals holds integers."""
    found: list[dict[str, str | int | None]] = []
    for file in files:
        pairs = (part.partition("=") for part in file.relative_to(folder).parts[:-1] if "=" in part)
        values = {unquote(name): unquote(value) for name, _, value in pairs if name}
        found.append({name: None if value in ("", NO_VALUE) else value for name, value in values.items()})
    for name in {name for values in found for name in values}:
        known = [str(part[name]) for part in found if part.get(name) is not None]
        if all(NUMERAL.fullmatch(value) for value in known):
            for part in found:
                if part.get(name) is not None:
                    part[name] = int(part[name])  # type: ignore[arg-type]
    return [Part(file, values) for file, values in zip(files, found)]


def _delta_parts(folder: Path) -> list[Part]:
    """Return the files of the current version of a Delta table."""
    from deltalake import DeltaTable  # here, because servers read no tables
    from deltalake.exceptions import DeltaError

    with tempfile.TemporaryDirectory() as place:  # deltalake misreads paths with blanks, # and ?
        copy = Path(place) / "_delta_log"
        copy.mkdir()
        for file in (folder / "_delta_log").iterdir():
            (copy / file.name).symlink_to(file.absolute(), target_is_directory=file.is_dir())
        try:
            table = DeltaTable(place)
            files = pl.DataFrame(table.get_add_actions(flatten=True))
            has_deletions = len(pl.DataFrame(table.deletion_vectors())) > 0
            has_mapping = table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none"
        except (DeltaError, pl.exceptions.PolarsError, OSError, ValueError) as problem:
            reason = to_printable(str(problem).split("\n")[0], 120).rstrip(".")
            raise LogError(
                f"{folder.name} is a Delta table that cannot be read ({reason}). Export it as Parquet."
            ) from None
    if has_deletions or has_mapping:
        feature = "deletion vectors" if has_deletions else "column mapping"
        raise LogError(
            f"{folder.name} is a Delta table with {feature}, which freshrec cannot read. Export its current rows as "
            "Parquet."
        )
    if not len(files):
        raise LogError(f"{folder.name} is a Delta table without rows. A log needs at least one.")
    names = [name for name in files.columns if name.startswith("partition.")]
    parts = []
    for row in files.sort("path").iter_rows(named=True):
        if "://" in row["path"]:
            raise LogError(f"{folder.name} is a Delta table with files elsewhere. Export its current rows as Parquet.")
        values = {name.removeprefix("partition."): row[name] for name in names}
        parts.append(Part(folder / unquote(row["path"]), values))
    return parts


def scan_parts(parts: Sequence[Part], folder: Path) -> tuple[pl.LazyFrame, dict[str, str]]:
    """Scan Parquet files that may lack columns of other ones.

    Also returns the columns whose types differ between files, with a sentence for each. They are not in the frame.
    Raises LogError for an empty or incomplete file.
    """
    columns: dict[str, tuple[pl.DataType, Part]] = {}
    problems: dict[str, str] = {}
    for part in parts:
        _check_complete(part.path)
        for name, kind in _schema(part.path).items():
            known, first = columns.get(name, (kind, part))
            common = _common_type(known, kind)
            columns[name] = (known if common is None else common, first)
            if common is None and name not in problems:
                files = [str(file.path.relative_to(folder)) for file in (first, part)]
                problems[name] = (
                    f'Column "{name}" has the type {known} in {files[0]} and {kind} in {files[1]}. '
                    "Write all files with one type."
                )
    schema = {name: kind for name, (kind, _) in columns.items() if name not in problems}
    own_values = pl.DataFrame(
        [{PATH_COLUMN: str(part.path), **part.values} for part in parts], infer_schema_length=None
    )
    own_values = own_values.drop(set(columns) & set(own_values.columns))  # a file knows better than its folder
    rows = pl.scan_parquet(
        [part.path for part in parts],
        schema=schema,
        glob=False,
        hive_partitioning=False,
        cast_options=pl.ScanCastOptions(integer_cast="upcast", float_cast="upcast"),
        missing_columns="insert",
        extra_columns="ignore",
        include_file_paths=PATH_COLUMN if own_values.width > 1 else None,
    )
    if own_values.width > 1:
        rows = rows.join(own_values.lazy(), on=PATH_COLUMN, how="left", maintain_order="left").drop(PATH_COLUMN)
    return rows, problems


def _schema(file: Path) -> pl.Schema:
    return pl.scan_parquet(file, glob=False, hive_partitioning=False).collect_schema()


def _check_complete(file: Path) -> None:
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        raise LogError(f"{file.name} is missing, or a link to a missing file. Copy it again.") from None
    if not size:
        raise LogError(f"{file.name} is an empty file. Copy it again, or remove it.")
    with file.open("rb") as opened:
        start = opened.read(4)
        opened.seek(max(size - 4, 0))
        if not start == opened.read(4) == b"PAR1":
            raise LogError(
                f"{file.name} is not a complete Parquet file: its first or last bytes are missing. Copy it again."
            )


def _common_type(first: pl.DataType, other: pl.DataType) -> pl.DataType | None:
    """Return a type that holds the values of both types exactly; None if there is none."""
    if first == other or other == pl.Null:
        return first
    if first == pl.Null:
        return other
    if first.is_integer() and other.is_integer() and pl.UInt64 not in (first, other):
        return pl.Int64()
    return pl.Float64() if first.is_float() and other.is_float() else None
