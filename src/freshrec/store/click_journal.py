"""The journal of clicks that a server has acknowledged and that no version has learned yet.

    store/clicks/17-4242-9d1f.open       one server appends to it: a line with a checksum per click, which is on the
                                         disk before the click is acknowledged
    store/clicks/17-4242-9d1f.closed     complete: an update reads it now, or the next one does
    store/clicks/17-4242-9d1f.taken-9    its clicks are in batch 9 of the event log
    store/clicks/17-4242-9d1f.known      clicks with an id that were known by user, item and time, so they were not
                                         stored. They are no events; a server knows their ids.

A name holds the time in ns, the process and the id of the store. A line without its end was never acknowledged. Every
other damaged line is an error. The last line of a closed file is the number of its clicks, so that a shortened file is
an error too. Files of stores without an id lack the id and that line. Files with other names are not part of the
journal. Appending to a file and closing it needs a lock on the file. All other changes need the lock of the store.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedRandom, FileIO
from pathlib import Path
from typing import NamedTuple

import polars as pl

from freshrec.data.duplicates import drop_duplicate_rows
from freshrec.errors import StateError
from freshrec.files import sync_folder, write_atomically
from freshrec.store.store_file import is_foreign, store_id

JOURNAL_FOLDER, OPEN_SUFFIX, CLOSED_SUFFIX, TAKEN_SUFFIX = "clicks", ".open", ".closed", ".taken-"
END_KEY = "clicks"  # in the last line of a closed file: the number of its clicks
KNOWN_SUFFIX = ".known"
FILE_NAME = re.compile(r"([0-9]{1,20})-[0-9]+(?:-([0-9a-f]{16}))?\.(?:open|closed|known|taken-([0-9]{1,9}))")
MAX_KNOWN_CLICKS = 100_000  # clicks that are kept for their ids; an update removes older ones


class Click(NamedTuple):
    """A user clicked an item."""

    user_id: int | str
    item_id: int | str
    time: int  # microseconds; time of acknowledgement if the log has no timestamps
    event_id: str | None = None
    category: str | None = None
    event: str | None = None

    @property
    def key(self) -> tuple[int | str, int | str, int]:
        """User, item and time. `data/duplicates.py` has the rule for clicks that are the same event."""
        return self[:3]


class ClickJournal:
    """The part of a store's journal that one server writes: new clicks, or with KNOWN_SUFFIX known ones."""

    def __init__(self, store: Path, suffix: str = OPEN_SUFFIX) -> None:
        self.folder, self.suffix = store / JOURNAL_FOLDER, suffix
        self._file: FileIO | None = None
        self._path = self.folder

    def append(self, clicks: Iterable[Click]) -> None:
        """Write clicks, and return when they are on the disk. Raises StateError if they cannot be written."""
        lines = b"".join(map(_encode_line, clicks))
        try:
            with self._locked_file() as file:
                before = os.fstat(file.fileno()).st_size
                try:
                    unwritten = memoryview(lines)
                    while unwritten:
                        unwritten = unwritten[file.write(unwritten) :]
                    os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), before)  # write all of them or none
                    raise
        except OSError as problem:
            self.close()
            raise StateError(
                f"The clicks cannot be written ({problem.strerror}). None was stored. Send them again."
            ) from problem

    def close(self) -> None:
        """Close the current file. The next click opens a new one."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @contextmanager
    def _locked_file(self) -> Iterator[FileIO]:
        """Lock the file to write to, so that no update closes it. Open a new one if an update has closed it."""
        while True:
            file = self._open_file()
            fcntl.flock(file, fcntl.LOCK_EX)
            if self._path.exists():
                break
            self.close()  # an update has closed it
        try:
            yield file
        finally:
            if not file.closed:
                fcntl.flock(file, fcntl.LOCK_UN)

    def _open_file(self) -> FileIO:
        if self._file is None:
            self.folder.mkdir(exist_ok=True)
            self._path = _new_path(self.folder, self.suffix)
            self._file = self._path.open("xb", buffering=0)
            sync_folder(self.folder)
        return self._file


@dataclass(frozen=True)
class JournalFile:
    """A file of the journal."""

    path: Path
    batch: int | None  # batch of the event log that holds its clicks; None = no batch yet
    clicks: list[Click]


def read_journal(store: Path) -> list[JournalFile]:
    """Read all files of the journal, oldest first. Raises StateError if one is damaged or belongs to another store."""
    found = []
    for path in journal_paths(store):
        try:
            found.append(read_file(path))
        except FileNotFoundError:
            return read_journal(store)  # an update has renamed or removed it in the meantime
    return found


def read_file(path: Path) -> JournalFile:
    """Read one file. Raises StateError if it is damaged or belongs to another store."""
    return JournalFile(path, batch_of(path), _read_clicks(path))


def close_journal(store: Path) -> list[JournalFile]:
    """Close all open files, and return those that are in no batch yet. Servers open new ones.

    The caller must hold the lock of the store.
    """
    for leftover in (store / JOURNAL_FOLDER).glob(".[0-9]*-*"):  # of a killed process
        leftover.unlink()
    for path in journal_paths(store):
        if path.name.endswith(OPEN_SUFFIX):
            with path.open("rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # waits until no line is half written
                _close_file(path, file)
    _sync_journal(store)
    return [file for file in read_journal(store) if file.batch is None and file.path.name.endswith(CLOSED_SUFFIX)]


def defer_clicks(files: Iterable[JournalFile], is_deferred: Callable[[Click], bool]) -> list[JournalFile]:
    """Return the closed files that hold no deferred clicks. Deferred clicks move to files that stay in the journal.

    A file with both kinds is replaced by two new ones. Both exist before the old one is deleted, so that no reader
    misses a click. A process that is killed in between leaves duplicates, which have the same identity.
    """
    found = []
    for file in files:
        ready = [click for click in file.clicks if not is_deferred(click)]
        deferred = [click for click in file.clicks if is_deferred(click)]
        if ready and deferred:
            _write_file(_new_path(file.path.parent, CLOSED_SUFFIX), deferred)
            first = _write_file(_new_path(file.path.parent, CLOSED_SUFFIX), ready)
            file.path.unlink()
            sync_folder(file.path.parent)
            found.append(JournalFile(first, None, ready))
        elif not deferred:
            found.append(file)
    return found


def mark_taken(files: Iterable[JournalFile], batch: int | None) -> None:
    """Record that the clicks of these files are in a batch. If `batch` is None, the log held them already."""
    for file in files:
        if batch is None:
            file.path.unlink()
        else:
            file.path.rename(file.path.with_name(f"{file.path.stem}{TAKEN_SUFFIX}{batch}"))
        sync_folder(file.path.parent)


def remove_learned_files(store: Path, last_batch: int) -> None:
    """Delete the files whose batch the live version has learned: those up to `last_batch`. Trim the known clicks."""
    for path in journal_paths(store):
        batch = batch_of(path)
        if batch is not None and batch <= last_batch:
            path.unlink()
    _rewrite_known_clicks(store, lambda clicks: clicks[-MAX_KNOWN_CLICKS:])
    _sync_journal(store)


def read_known_clicks(store: Path) -> list[Click]:
    """Read the clicks that were known by user, item and time, oldest first."""
    found = []
    for path in journal_paths(store, KNOWN_SUFFIX):
        try:
            found += _read_clicks(path)
        except FileNotFoundError:
            return read_known_clicks(store)  # an update or an erasure has replaced it in the meantime
    return found


def remember_known_clicks(store: Path, clicks: Sequence[Click]) -> None:
    """Remember the ids of clicks that are known by user, item and time. The caller must hold the lock of the store."""
    if clicks:
        _write_file(_new_path(store / JOURNAL_FOLDER, KNOWN_SUFFIX), clicks)


def erase_user_clicks(store: Path, user_id: int | str) -> int:
    """Delete the clicks of a user, and incomplete lines. Return the number of deleted clicks.

    The caller must hold the lock of the store.
    """
    n_erased = 0
    close_journal(store)
    for file in read_journal(store):
        remaining = [click for click in file.clicks if click.user_id != user_id]
        n_erased += len(file.clicks) - len(remaining)
        _write_file(file.path, remaining)
    _rewrite_known_clicks(store, lambda clicks: [click for click in clicks if click.user_id != user_id])
    _sync_journal(store)
    return n_erased


def clicks_to_frame(clicks: Collection[Click]) -> pl.DataFrame:
    """Return clicks as a `Log.frame`: in time order, without duplicates."""
    frame = pl.DataFrame(list(clicks), schema=list(Click._fields), orient="row", infer_schema_length=None)
    text = [pl.col(name).cast(pl.String) for name in ("event_id", "category", "event")]
    frame = drop_duplicate_rows(frame.with_columns(*text), has_clock=True)
    return frame.sort("time", maintain_order=True).select("user_id", "item_id", "time", "event", "category", "event_id")


def _rewrite_known_clicks(store: Path, select: Callable[[list[Click]], list[Click]]) -> None:
    """Replace the files of known clicks by one with some of them. Servers that write to one of them open new ones."""
    with ExitStack() as stack:
        paths, clicks = journal_paths(store, KNOWN_SUFFIX), list[Click]()
        for path in paths:
            fcntl.flock(stack.enter_context(path.open("rb")), fcntl.LOCK_EX)
            clicks += _read_clicks(path)
        selected = select(clicks)
        if len(selected) < len(clicks):
            if selected:
                _write_file(_new_path(store / JOURNAL_FOLDER, KNOWN_SUFFIX), selected)
            for path in paths:
                path.unlink()


def journal_paths(store: Path, suffix: str = "") -> list[Path]:
    """Return the files with a suffix, oldest first; by default all files of the journal but those of known clicks."""
    matches = {path: FILE_NAME.fullmatch(path.name) for path in _folder_content(store)}
    found = {
        path: int(match[1])
        for path, match in matches.items()
        if match and path.is_file() and (path.name.endswith(suffix) if suffix else path.suffix != KNOWN_SUFFIX)
    }
    return sorted(found, key=lambda path: (found[path], path.name))


def foreign_paths(store: Path) -> list[Path]:
    """Return what is in the folder of the journal and not part of it, without hidden files."""
    journal = {*journal_paths(store), *journal_paths(store, KNOWN_SUFFIX)}
    return sorted(path for path in _folder_content(store) if path not in journal and not path.name.startswith("."))


def batch_of(path: Path) -> int | None:
    """Return the batch of the event log that holds the clicks of a file; None = no batch yet."""
    match = FILE_NAME.fullmatch(path.name)
    return int(match[3]) if match and match[3] else None


def has_cut_line(path: Path) -> bool:
    """Whether the last line of a file has no end, because its server was killed. It was never acknowledged."""
    content = path.read_bytes()
    return bool(content) and not content.endswith(b"\n")


def _folder_content(store: Path) -> list[Path]:
    folder = store / JOURNAL_FOLDER
    try:
        return list(folder.iterdir()) if folder.is_dir() else []
    except OSError as problem:
        raise StateError(f"{folder} cannot be read ({problem.strerror}). Check its permissions.") from None


def _new_path(folder: Path, state: str) -> Path:
    owner = store_id(folder.parent)
    return folder / f"{time.time_ns()}-{os.getpid()}{'-' if owner else ''}{owner}{state}"


def _write_file(path: Path, clicks: Iterable[Click]) -> Path:
    """Write a closed file of the journal, completely or not at all, and return its path."""
    lines = list(map(_encode_line, clicks))
    end = [_encode_line({END_KEY: len(lines)})] if _has_owner(path) else []
    write_atomically(path, lambda temporary: temporary.write_bytes(b"".join([*lines, *end])))
    sync_folder(path.parent)
    return path


def _sync_journal(store: Path) -> None:
    if (store / JOURNAL_FOLDER).is_dir():
        sync_folder(store / JOURNAL_FOLDER)


def _close_file(path: Path, file: BufferedRandom) -> None:
    """Mark a file as complete, and rename it. The caller holds the lock of the file."""
    if _has_owner(path):
        clicks = _read_clicks(path)
        file.truncate(path.read_bytes().rfind(b"\n") + 1)  # a line without its end
        file.seek(0, os.SEEK_END)
        file.write(_encode_line({END_KEY: len(clicks)}))
        file.flush()
        os.fsync(file.fileno())
    path.rename(path.with_suffix(CLOSED_SUFFIX))


def _has_owner(path: Path) -> bool:
    """Whether the name of a file holds the id of its store."""
    match = FILE_NAME.fullmatch(path.name)
    return bool(match and match[2])


def _encode_line(record: Click | dict[str, int]) -> bytes:
    text = json.dumps(record).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _read_clicks(path: Path) -> list[Click]:
    """Read the complete lines of a file. Raises StateError if one is damaged or missing, or of another store."""
    match = FILE_NAME.fullmatch(path.name)
    if match and match[2] and is_foreign(match[2], path.parent.parent):
        raise StateError(f"{path} holds clicks of another store. Move the file to the folder of that store.")
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except PermissionError:
        raise StateError(f"{path} cannot be read. Check its permissions.") from None
    records = [_decode_line(path, nth, line) for nth, line in enumerate(lines, 1)]
    clicks = [record for record in records if isinstance(record, Click)]
    is_closed = bool(match and match[2]) and path.suffix not in (OPEN_SUFFIX, KNOWN_SUFFIX)
    if is_closed and (rest or not records or records[-1] != len(clicks)):
        raise StateError(f"{path} is incomplete: clicks at its end are missing. Restore the file from a backup.")
    return clicks


def _decode_line(path: Path, nth: int, line: bytes) -> Click | int:
    """Return the click in a line, or the number of clicks in the last line of a file."""
    if line[:9] != b"%08x " % zlib.crc32(line[9:]):
        raise StateError(
            f"Line {nth} of {path} is damaged. Restore the file from a backup, or move it out of the store: "
            "then its clicks are lost."
        )
    try:
        record = json.loads(line[9:])
        found = int(record[END_KEY]) if isinstance(record, dict) else Click(*record)
    except (ValueError, KeyError, TypeError, RecursionError):
        found = None
    if found is None or (isinstance(found, Click) and not _is_valid(found)):
        raise StateError(f"Line {nth} of {path} is not a click. Move the file out of the store.")
    return found


def _is_valid(click: Click) -> bool:
    """Whether the ids of a click are integers or texts, its time is an integer, and the rest is text or missing."""
    types = [type(value) for value in click]
    return {*types[:2]} <= {int, str} and types[2] is int and {*types[3:]} <= {str, type(None)}
