"""Bad text files: the messages that name a line and a column."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import BinaryIO, cast

from freshrec.errors import LogError
from freshrec.text_layout import format_count, to_printable

ARCHIVES = {b"PK\x03\x04": "a zip archive", b"BZh": "a bzip2 file", b"\xfd7zXZ": "an xz file"}
GZIP, UTF_8_BOM = b"\x1f\x8b", b"\xef\xbb\xbf"
UTF_16_BOMS = (b"\xff\xfe", b"\xfe\xff")


def check_text_file(path: Path) -> None:
    """Raise LogError for an archive and for UTF-16."""
    with path.open("rb") as file:
        start = file.read(8)
    for magic, kind in ARCHIVES.items():
        if start.startswith(magic):
            raise LogError(f"{path.name} is {kind}. Unpack it, or compress it with gzip.")
    if first_bytes(path).startswith(UTF_16_BOMS):
        raise LogError(f"{path.name} is UTF-16. Save it as UTF-8.")


def first_bytes(path: Path) -> bytes:
    """Return the first 3 bytes of the text, unpacked."""
    with open_unpacked(path) as file:
        return file.read(3)


def open_unpacked(path: Path) -> BinaryIO:
    """Open a text file for reading bytes. A file that is packed with gzip is unpacked while it is read."""
    with path.open("rb") as file:
        is_packed = file.read(2) == GZIP
    return cast(BinaryIO, gzip.open(path)) if is_packed else path.open("rb")


def not_utf8_error(path: Path) -> LogError | None:
    """Return an error that names the first line that is not UTF-8; None if all of them are."""
    with open_unpacked(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as problem:
                shown = to_printable(repr(line[max(problem.start - 10, 0) : problem.end + 10]), 60)
                return LogError(
                    f"{path.name} is not UTF-8: line {number:,} holds the byte 0x{line[problem.start]:02x} ({shown}). "
                    "Save it as UTF-8."
                )
    return None


def describe_bad_record(text: str, number: int, separator: str, header: list[str]) -> str:
    """Say what is wrong with a record. `text` is its lines, `number` the number of the first one, from 1."""
    mark = re.escape(separator)
    field = re.compile(rf'"(?:[^"]|"")*"(?=[{mark}]|$)|[^"\n{mark}]*(?=[{mark}]|$)')
    place = n_fields = 0
    while found := field.match(text, place):
        n_fields, place = n_fields + 1, found.end() + 1
        if place > len(text):
            break
    if place <= len(text):
        name = to_printable(header[n_fields], 40) if n_fields < len(header) else f"number {n_fields + 1}"
        return (
            f"line {number:,} has a stray quotation mark in column {name}. Put the field between quotation marks and "
            "double those inside it, or save the log as Parquet."
        )
    last = number + text.count("\n")
    if n_fields != len(header):
        lines = f"line {number:,} has" if last == number else f"lines {number:,} to {last:,} have"
        return (
            f"{lines} {format_count(n_fields, 'field')}, but the header has {len(header)}. Correct "
            f"{'the line' if last == number else 'the lines'}, or remove what does not belong there."
        )
    return (
        f"a quotation mark opens in line {number:,} and closes in line {last:,}, but each of these lines is a row of "
        "its own. Double the marks that belong to the text, or save the log as Parquet."
    )
