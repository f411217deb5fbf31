"""Garbage collection: delete the files of versions that nobody goes back to. Their manifests stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from stat import S_ISREG

from freshrec.errors import StateError
from freshrec.store.manifest import Manifest
from freshrec.store.versions import (
    COLLECTED_FILE,
    MANIFEST_FILE,
    Store,
    is_collected,
    remove_path,
    translate_write_errors,
    version_folder,
)


def collect_garbage(store: Store, keep: int) -> list[int]:
    """Delete the files of old and refused versions, and return the numbers of these versions.

    These versions keep their files:
    - the live version, and a version that the next `update` makes live, because an earlier run was interrupted;
    - the `keep` versions that were live most recently, also if they were refused or rolled back since;
    - the `keep` nearest ancestors of the live version, to which `rollback` goes;
    - a version whose manifest cannot be read: you may have a backup of the manifest.

    Without rollbacks, the second and the third group are the same. A damaged version is kept, but does not count.
    """
    numbers_to_keep = _numbers_to_keep(store, keep)
    collected_numbers = [
        manifest.id
        for manifest in store.manifests()
        if manifest.id not in numbers_to_keep and not is_collected(store, manifest.id)
    ]
    for number in store.version_numbers():
        if number in collected_numbers or is_collected(store, number):
            delete_files(store, number)
    return collected_numbers


def delete_files(store: Store, number: int) -> None:
    """Delete the files of a version. Its manifest stays."""
    folder = version_folder(store, number)
    with translate_write_errors(folder):
        (folder / COLLECTED_FILE).touch()
        for path in folder.iterdir():
            if path.name not in (COLLECTED_FILE, MANIFEST_FILE):
                remove_path(path)


def disk_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder. A file that several versions share counts once."""
    sizes = {}
    for path in folder.rglob("*"):
        try:
            found = path.lstat()
        except FileNotFoundError:  # an update or a server has removed it
            continue
        if S_ISREG(found.st_mode):
            sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())


def _numbers_to_keep(store: Store, keep: int) -> set[int]:
    """Return the numbers of the versions that garbage collection does not touch."""
    live, moves = store.live, store.moves()
    versions = {manifest.id: manifest for manifest in store.manifests()}
    last_live_first = list(dict.fromkeys(move.to for move in reversed(moves)))
    passed = [manifest for manifest in reversed(versions.values()) if manifest.goes_live]
    never_live = [manifest for manifest in passed if manifest.id not in last_live_first]  # the run was interrupted
    candidates = [*last_live_first[1:], *(manifest.id for manifest in never_live)]
    return {
        live,
        *(manifest.id for manifest in never_live if manifest.parent == live),
        *_first_intact(store, candidates, keep),
        *_first_intact(store, _ancestors(versions, live), keep),
    }


def _ancestors(versions: dict[int, Manifest], number: int) -> Iterator[int]:
    """Yield the parent of a version, its parent, and so on, until one cannot be read."""
    while number in versions and (parent := versions[number].parent) is not None:
        yield (number := parent)


def _first_intact(store: Store, numbers: Iterable[int], n: int) -> list[int]:
    """Return the first versions, until `n` of them can be made live. The damaged ones before them are returned too."""
    found, n_intact = list[int](), 0
    for number in numbers:
        if n_intact == n:
            break
        found.append(number)
        n_intact += _is_intact(store, number)
    return found


def _is_intact(store: Store, number: int) -> bool:
    """Whether a version can be made live: its manifest can be read, and its files exist and are unchanged."""
    try:
        return not store.find_damage(number)
    except StateError:
        return False
