"""The files of a version: their entries in its manifest, and their damage."""

from __future__ import annotations

import os
from pathlib import Path

from freshrec.files import file_checksum, sync_folder
from freshrec.store.manifest import FileEntry, Manifest


def make_entries(
    written: Path, folder: Path, parent: Path | None = None, parent_manifest: Manifest | None = None
) -> dict[str, FileEntry]:
    """Return the entries of the files in `written`, after syncing them to the disk.

    `written` is `folder` or inside it. A file that equals that of the parent becomes a hard link to it.
    """
    files = {}
    for path in sorted(written.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        found = FileEntry(path=str(path.relative_to(folder)), sha256=file_checksum(path), n_bytes=path.stat().st_size)
        if parent is not None and parent_manifest is not None:
            entry = parent_manifest.files.get(path.name)
            if entry and entry.sha256 == found.sha256 and not file_damage(parent / entry.path, entry):
                _hard_link(parent / entry.path, path)
        files[path.name] = found
    sync_folder(written)
    return files


def _hard_link(source: Path, path: Path) -> None:
    """Replace `path` with a hard link to `source`, if the file system supports it."""
    link = path.with_name(f".{path.name}")
    try:
        os.link(source, link)
    except OSError:
        return
    link.replace(path)


def file_damage(path: Path, expected: FileEntry) -> list[str]:
    """Return a sentence about a file that differs from its entry; nothing if it is intact."""
    try:
        if not path.is_file():
            return [f"{path.name} is missing"]
        is_same = path.stat().st_size == expected.n_bytes and file_checksum(path) == expected.sha256
    except OSError as problem:
        return [f"{path.name} cannot be read: {problem.strerror}"]
    return [] if is_same else [f"{path.name} has changed"]
