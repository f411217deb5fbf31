"""Columns of a source: which of them are ours, and their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from freshrec.data.formats import SourceTable
from freshrec.data.reader_errors import as_log_error
from freshrec.errors import LogError, OptionError, close_name, list_names, unknown_name_error
from freshrec.text_layout import to_printable

# Our columns -> names that a source may use for them, the most specific one first. `seq` counts through the whole log,
# `position` only within a session.
COLUMN_ALIASES = {
    "user_id": ("user_id", "session_id"),
    "item_id": ("item_id",),
    "timestamp": ("timestamp", "time"),
    "period": ("period",),
    "order": ("order", "seq", "position"),
    "event": ("event",),
    "category": ("category", "category_id"),
    "weight": ("weight",),
    "rating": ("rating",),
    "label": ("label",),
    "split": ("split",),
    "event_id": ("event_id",),
}


def map_columns(table: SourceTable, columns: Mapping[str, str]) -> tuple[dict[str, str], set[str]]:
    """Return our names -> the names in the source, and the columns whose ids are declared as text."""
    with as_log_error(table.name):
        found = list(dict.fromkeys([*table.rows.collect_schema().names(), *table.problems]))
    names: dict[str, str] = {}
    text_columns: set[str] = set()
    for name, source_name in columns.items():
        if name not in COLUMN_ALIASES:
            raise unknown_name_error("column", name, COLUMN_ALIASES)
        if source_name not in found and source_name.endswith(":text"):
            source_name = source_name.removesuffix(":text")
            text_columns.add(name)
        if source_name not in found:
            raise LogError(
                f'{table.name} has no column "{source_name}". Its columns are {_format_names(found)}. '
                f"Correct --columns {name}=NAME."
            )
        names[name] = source_name
    for name, aliases in COLUMN_ALIASES.items():
        present = [alias for alias in aliases if alias in found and alias not in names.values()]
        if name not in names and present:
            names[name] = present[0]
    duplicated = [source_name for source_name in names.values() if f"{source_name}_duplicated_0" in found]
    if duplicated:
        raise LogError(f'{table.name} has several columns "{duplicated[0]}". Rename or remove all but one.')
    unusable = [source_name for source_name in names.values() if source_name in table.problems]
    if unusable:
        raise LogError(table.problems[unusable[0]])
    missing = [name for name in ("user_id", "item_id") if name not in names]
    missing += [] if names.keys() & {"timestamp", "period"} else ["timestamp"]
    if missing:
        raise LogError(
            f"{table.name} has no column {' and no column '.join(missing)}. Its columns are {_format_names(found)}. "
            f"Pass --columns {missing[0]}=NAME, or --format NAME for a public data set."
        )
    if "period" not in names:
        names.pop("order", None)
    return names, text_columns


def _format_names(names: Sequence[str]) -> str:
    """List column names for a message; at most 20 of them."""
    shown = ", ".join(to_printable(name, 40) for name in names[:20]) or "none"
    return shown + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def collect_columns(
    table: SourceTable, names: Mapping[str, str], events: Sequence[str], allow_missing_events: bool
) -> pl.DataFrame:
    """Read the columns that we know, with our names and the types of the source. `row` is the row number from 0."""
    rows = table.rows.select(pl.col(source_name).alias(name) for name, source_name in names.items()).with_row_index(
        "row"
    )
    if events and "event" not in names:
        raise LogError(f"{table.name} has no column event, which --events needs. Pass --columns event=NAME.")
    with as_log_error(table.name):
        if not events:
            return rows.collect()
        event_type = pl.col("event").cast(pl.String)
        raw = rows.filter(event_type.is_in(list(events))).collect()
        missing = set() if allow_missing_events else set(events) - set(raw["event"].cast(pl.String).unique())
        found = rows.select(event_type.unique()).collect()["event"].drop_nulls().to_list() if missing else []
    if missing:
        close = close_name(min(missing), found)
        question = f'Did you mean "{close}"? ' if close else ""
        raise OptionError(
            f'There is no event type "{min(missing)[:60]}" in {table.name}. {question}Its types: {list_names(found)}.'
        )
    return raw
