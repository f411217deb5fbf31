"""Whether the event log is the one that a version was made with. It reads one small file, however long the log is."""

from __future__ import annotations

from pathlib import Path

from freshrec.errors import StateError
from freshrec.files import file_checksum
from freshrec.store.log_files import COMMIT_FOLDER, LOG_FOLDER, commit_path
from freshrec.store.manifest import Manifest
from freshrec.store.versions import Store
from freshrec.text_layout import format_count


def require_same_log(store: Store) -> None:
    """Raise StateError if the event log contradicts the live version: it is missing, older, or of another store."""
    if contradiction := find_contradiction(store.folder / LOG_FOLDER, store.manifest(store.live)):
        raise StateError(contradiction)


def find_contradiction(folder: Path, manifest: Manifest) -> str:
    """Return a sentence if the event log in `folder` contradicts a version; "" if not, or if that is not known."""
    expected = manifest.log
    if expected is None:
        return ""
    rows, batches = format_count(expected.rows, "row"), format_count(expected.batch, "batch", "batches")
    known = f"version {manifest.id} knows {rows} in {batches}"
    if not (folder / COMMIT_FOLDER).is_dir():
        return f"The event log {folder} is missing, but {known}. Restore it from a backup."
    path = commit_path(folder, expected.commit)
    if not path.exists():
        return f"The event log {folder} is older than version {manifest.id}: {known}. Restore a newer backup."
    if file_checksum(path) != expected.sha256:
        return (
            f"The event log {folder} does not belong to version {manifest.id}: {path.name} differs. "
            "Restore the log and the versions from the same backup."
        )
    return ""
