"""The journal of clicks that a server has acknowledged, until a version has learnt from them.

    store/clicks/17-4242.open        written by one server, a line per click, each with a checksum; on the disk before
                                     the click is acknowledged
    store/clicks/17-4242.closed      no longer written: an update is taking it, or has left it for the next one
    store/clicks/17-4242.taken-9     its clicks are in batch 9 of the log

A line that is not whole was never acknowledged. Whoever adds to a file or closes it holds a lock on it; whoever changes
anything else here holds the store's.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import polars as pl

from freshrec.errors import StateError
from freshrec.files import sync_folder, write_atomically

JOURNAL_FOLDER, OPEN_SUFFIX, CLOSED_SUFFIX, TAKEN_SUFFIX = "clicks", ".open", ".closed", ".taken-"


class Click(NamedTuple):
    """Somebody took something."""

    user_id: int | str
    item_id: int | str
    time: int  # microseconds; where the log has no clock, when it was acknowledged
    event_id: str | None = None
    category: str | None = None
    event: str | None = None

    @property
    def identity(self) -> tuple[int | str, ...]:
        """What makes it the same click as another one."""
        return (self.event_id,) if self.event_id is not None else (self.user_id, self.item_id, self.time)


class ClickJournal:
    """What one server writes into a store's journal."""

    def __init__(self, store: Path) -> None:
        self.folder = store / JOURNAL_FOLDER
        self._file: FileIO | None = None
        self._path = self.folder

    def append(self, clicks: Iterable[Click]) -> None:
        """Write clicks, and return once they are on the disk. StateError where they are not."""
        lines = b"".join(map(_encode_click, clicks))
        try:
            with self._locked_file() as file:
                before = os.fstat(file.fileno()).st_size
                try:
                    unwritten = memoryview(lines)
                    while unwritten:
                        unwritten = unwritten[file.write(unwritten) :]
                    os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), before)  # none of them, rather than some
                    raise
        except OSError as problem:
            self.close()
            raise StateError(
                f"the clicks cannot be written ({problem.strerror}); none was taken: send them again."
            ) from problem

    def close(self) -> None:
        """Nothing more is written to the file of now."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @contextmanager
    def _locked_file(self) -> Iterator[FileIO]:
        """The file to write to, which nobody closes meanwhile; a new one where it was closed."""
        while True:
            file = self._open_file()
            fcntl.flock(file, fcntl.LOCK_EX)
            if self._path.exists():
                break
            self.close()  # an update has taken it
        try:
            yield file
        finally:
            if not file.closed:
                fcntl.flock(file, fcntl.LOCK_UN)

    def _open_file(self) -> FileIO:
        if self._file is None:
            self.folder.mkdir(exist_ok=True)
            self._path = _new_path(self.folder, OPEN_SUFFIX)
            self._file = self._path.open("xb", buffering=0)
            sync_folder(self.folder)
        return self._file


@dataclass(frozen=True)
class JournalFile:
    """A file of the journal."""

    path: Path
    batch: int | None  # of the log, that has its clicks
    clicks: list[Click]


def read_journal(store: Path) -> list[JournalFile]:
    """All files of the journal, the oldest first."""
    found = []
    for path in _journal_paths(store):
        batch = path.name.partition(TAKEN_SUFFIX)[2]
        try:
            found.append(JournalFile(path, int(batch) if batch else None, _read_clicks(path)))
        except FileNotFoundError:
            return read_journal(store)  # an update has renamed or removed it meanwhile
    return found


def close_journal(store: Path) -> list[JournalFile]:
    """The files that no batch has yet; servers begin new ones. Whoever calls holds the store's lock."""
    for leftover in (store / JOURNAL_FOLDER).glob(".*"):  # of somebody who died
        leftover.unlink()
    for path in _journal_paths(store):
        if path.name.endswith(OPEN_SUFFIX):
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # nobody is in the middle of a line
                path.rename(path.with_suffix(CLOSED_SUFFIX))
    _sync_journal(store)
    return [file for file in read_journal(store) if file.batch is None and file.path.name.endswith(CLOSED_SUFFIX)]


def defer_clicks(files: Iterable[JournalFile], is_deferred: Callable[[Click], bool]) -> list[JournalFile]:
    """Closed files without the clicks that wait; these lie in files of their own, which no batch has.

    A file whose clicks part is replaced by two new ones, so that nobody who reads misses any. Whoever dies between
    leaves some in two files, which are the same clicks.
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
    """The clicks of these files are in a batch; None: they were in the log already."""
    for file in files:
        if batch is None:
            file.path.unlink()
        else:
            file.path.rename(file.path.with_name(f"{file.path.stem}{TAKEN_SUFFIX}{batch}"))
        sync_folder(file.path.parent)


def remove_learnt_files(store: Path, last_batch: int) -> None:
    """Remove the files whose batch is at most the last that the live version has met."""
    for path in _journal_paths(store):
        batch = path.name.partition(TAKEN_SUFFIX)[2]
        if batch and int(batch) <= last_batch:
            path.unlink()
    _sync_journal(store)


def erase_user_clicks(store: Path, user_id: int | str) -> int:
    """Remove a user's clicks, and what is not whole; how many there were. Whoever calls holds the store's lock."""
    n_erased = 0
    close_journal(store)
    for file in read_journal(store):
        remaining = [click for click in file.clicks if click.user_id != user_id]
        n_erased += len(file.clicks) - len(remaining)
        _write_file(file.path, remaining)
    _sync_journal(store)
    return n_erased


def clicks_to_frame(clicks: Collection[Click]) -> pl.DataFrame:
    """Clicks in the form of a `Log.frame`, in time order, each once."""
    unique_clicks = {click.identity: click for click in reversed(list(clicks))}
    rows = sorted(unique_clicks.values(), key=lambda click: click.time)
    frame = pl.DataFrame(rows, schema=list(Click._fields), orient="row", infer_schema_length=None)
    text = [pl.col(name).cast(pl.String) for name in ("event_id", "category", "event")]
    return frame.with_columns(*text).select("user_id", "item_id", "time", "event", "category", "event_id")


def _journal_paths(store: Path) -> list[Path]:
    folder = store / JOURNAL_FOLDER
    found = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.partition("-")[0]))


def _new_path(folder: Path, state: str) -> Path:
    return folder / f"{time.time_ns()}-{os.getpid()}{state}"


def _write_file(path: Path, clicks: Iterable[Click]) -> Path:
    """A file of the journal, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_bytes(b"".join(map(_encode_click, clicks))))
    sync_folder(path.parent)
    return path


def _sync_journal(store: Path) -> None:
    if (store / JOURNAL_FOLDER).is_dir():
        sync_folder(store / JOURNAL_FOLDER)


def _encode_click(click: Click) -> bytes:
    text = json.dumps(click).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _read_clicks(path: Path) -> list[Click]:
    """The clicks of a file, without what follows the last whole line. StateError where it is damaged before that."""
    *lines, _ = path.read_bytes().split(b"\n")
    good = [line[:8] == b"%08x" % zlib.crc32(line[9:]) for line in lines]
    wrong = good.index(False) if False in good else len(lines)
    if True in good[wrong:]:
        raise StateError(f"line {wrong + 1} of {path} is not as it was written; restore the file from a backup.")
    return [Click(*json.loads(line[9:])) for line in lines[:wrong]]
