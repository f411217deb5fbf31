"""Plain text for people: aligned rows, wrapped sentences, moments, counts and ids."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from datetime import UTC, datetime

WIDTH = 100  # columns of a line


def align_rows(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Return rows of cells as lines with aligned columns. The columns in `right` are aligned to the right.

    Rows may have fewer cells than others. The last cell of a row may be wider than its column, unless it is in `right`.
    No line ends with spaces.
    """
    widths = [0] * max(map(len, rows), default=0)
    for row in rows:
        for i, cell in enumerate(row):
            if i in right or i < len(row) - 1:
                widths[i] = max(widths[i], len(cell))
    lines = []
    for row in rows:
        padded = enumerate(zip(row, widths))
        cells = [cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in padded]
        lines.append("  ".join(cells).rstrip())
    return lines


def wrap_lines(text: str, width: int = WIDTH, first: str = "", rest: str = "") -> list[str]:
    """Wrap a text at `width` columns. `first` and `rest`: indents. A word longer than a line stays whole."""
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def bullet(label: str, sentence: str) -> list[str]:
    """Return a sentence after its label, indented, and wrapped at WIDTH columns."""
    return wrap_lines(sentence, first=f"  {label} ", rest="    ")


def format_moment(moment: str) -> str:
    """Return a time of a manifest (ISO 8601) in UTC, to the minute: "2025-06-01 04:15"."""
    try:
        return datetime.fromisoformat(moment).astimezone(UTC).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError):  # unreadable, or before year 1 in UTC
        return moment


def format_count(n: int, noun: str, plural: str = "") -> str:
    """Format a number with its noun: "0 rows", "1 row", "1,200 deliveries"."""
    return f"{n:,} {noun if n == 1 else plural or f'{noun}s'}"


def to_printable(text: str, length: int) -> str:
    """Return at most `length` characters of `text`; unprintable ones become "?"."""
    cleaned = "".join(letter if letter.isprintable() else "?" for letter in text[: length + 1])
    return cleaned if len(cleaned) <= length else cleaned[: length - 3] + "..."


def printable_id(value: str | int) -> str:
    """Return an id on one line: unchanged if it is printable, else as a Python literal with quotes and escapes."""
    text = str(value)
    return text if text.isprintable() else repr(text)
