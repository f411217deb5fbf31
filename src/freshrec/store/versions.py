"""Versions of a recommender on disk, and the pointer to the live version.

    store/
      store.json          marks the folder as a store, and holds its format
      live.json           every change of the live version; the last entry is the live one
      log/                every event, in the order of delivery (store.event_log)
      versions/7/         manifest.json, and the files whose checksums it holds
      lock                held by the process that changes the store

A version is written to a temporary folder, and renamed when all its files are on the disk. So it exists completely or
not at all. It never changes afterwards, with two exceptions: erasing a user rewrites its files, and garbage collection
deletes them and keeps the manifest.
"""

from __future__ import annotations

import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError

from freshrec.disk_names import current_move
from freshrec.errors import BusyError, OptionError, SignatureError, StateError
from freshrec.files import sync_folder
from freshrec.store.checksummed_json import read_checksummed, write_checksummed
from freshrec.store.manifest import (
    Manifest,
    MoveAction,
    PointerMove,
    VersionKind,
    read_manifest,
    utc_now,
)
from freshrec.store.signing import SigningKey, read_key
from freshrec.store.store_file import STORE_FILE, is_foreign, read_store_file, store_id, write_store_file
from freshrec.store.version_files import file_damage, make_entries

MANIFEST_FILE, MOVES_FILE, COLLECTED_FILE = "manifest.json", "live.json", "collected"
VERSION_NAME = re.compile(r"[1-9][0-9]{0,8}")  # of the folder of a version; others are not part of the store
TEMPORARY_NAME = re.compile(r"\.[1-9][0-9]{0,8}")  # of the folder of an unfinished version
REBUILT_REASON = "rebuilt from its manifest"  # of a change of the live version whose record was damaged
LEGACY_FILE = "recommender.json"  # in a folder that Recommender.save wrote before stores existed


@dataclass(frozen=True)
class Store:
    """A folder of versions. Hold `locked` while you change anything.

    With a key, all that is written is signed, and a file without the signature of this key is an error.
    """

    folder: Path
    key: SigningKey | None = None

    @contextmanager
    def locked(self, wait_s: float = 0.0) -> Iterator[None]:
        """Lock the store against changes by other processes. Raises BusyError after waiting `wait_s` seconds."""
        lock = FileLock(self.folder / "lock", timeout=wait_s)
        with translate_write_errors(self.folder):
            try:
                lock.acquire()
            except Timeout:
                raise BusyError(
                    f"Another process is changing {self.folder}. To wait for it, pass --wait 10m."
                ) from None
        try:
            _remove_leftovers(self)
            yield
        finally:
            lock.release()

    def manifests(self) -> list[Manifest]:
        """Return all readable manifests, oldest first. Raises SignatureError for a wrong signature."""
        found = []
        for number in self.version_numbers():
            try:
                found.append(self.manifest(number))
            except SignatureError:
                raise
            except StateError:
                continue  # `freshrec doctor` reports it
        return found

    def version_numbers(self) -> list[int]:
        """Return the numbers of all versions, ascending."""
        try:
            # a link is no version: deleting its files would delete files outside the store
            names = [path.name for path in (self.folder / "versions").iterdir() if not path.is_symlink()]
        except OSError as problem:
            raise StateError(
                f"{self.folder / 'versions'} cannot be read ({problem.strerror}). Restore it from a backup."
            ) from None
        return sorted(int(name) for name in names if VERSION_NAME.fullmatch(name))

    @property
    def next_number(self) -> int:
        """The number of the next version. A number that was live once is not used again, even if its folder is lost."""
        try:
            once_live = [move.to for move in self.moves()]
        except StateError:
            once_live = []  # the record is damaged
        return max([*self.version_numbers(), *once_live], default=0) + 1

    def manifest(self, number: int) -> Manifest:
        """Return the manifest of a version. Raises StateError if it does not exist or is damaged."""
        path = version_folder(self, number) / MANIFEST_FILE
        if not path.parent.is_dir():
            raise StateError(
                f"There is no version {number} in {self.folder}. See `freshrec history {store_option(self.folder)}`."
            )
        found = read_manifest(path, number, self.key)
        if is_foreign(found.store, self.folder):
            raise StateError(f"{path} belongs to another store. Restore versions/{number} from a backup of this one.")
        return found

    def moves(self) -> list[PointerMove]:
        """Return every change of the live version, oldest first. Raises StateError if the record is damaged."""
        path, command = self.folder / MOVES_FILE, f"freshrec promote N {store_option(self.folder)}"
        try:
            found = [PointerMove.model_validate(current_move(move)) for move in read_checksummed(path, self.key)]
        except SignatureError:
            raise
        except (ValidationError, TypeError, StateError):
            found = None
        if found is None or any(is_foreign(owner, self.folder) for owner in {move.store for move in found}):
            fault = "is missing or was changed by another program" if found is None else "belongs to another store"
            raise StateError(f"{path} {fault}. Restore it from a backup, or choose a live version with `{command}`.")
        return found

    @property
    def live(self) -> int:
        """The number of the live version. Raises StateError if there is none yet."""
        moves = self.moves()
        if not moves:
            raise StateError(
                f"No version of {self.folder} is live yet. "
                f"Choose one with `freshrec promote N {store_option(self.folder)}`."
            )
        return moves[-1].to

    def move_pointer(self, number: int, action: MoveAction, reason: str = "") -> None:
        """Make a version the live one, after verifying all its files."""
        self.verified_files(number)
        try:
            moves = self.moves()
        except SignatureError:
            raise
        except StateError:
            moves = _moves_from_manifests(self)  # rebuild a damaged record
        moves.append(PointerMove(at=utc_now(), action=action, to=number, reason=reason, store=store_id(self.folder)))
        with translate_write_errors(self.folder):
            write_checksummed([move.model_dump() for move in moves], self.folder / MOVES_FILE, self.key)

    def write_version(self, manifest: Manifest, save: Callable[[Path], object]) -> Manifest:
        """Write a new version. `save` writes its files into a folder. `move_pointer` makes it the live one."""
        folder, parent, parent_manifest = version_folder(self, manifest.id), None, None
        temporary = folder.with_name(f".{manifest.id}")
        if manifest.parent is not None:
            parent, parent_manifest = version_folder(self, manifest.parent), self.manifest(manifest.parent)
        try:
            with translate_write_errors(folder):
                temporary.mkdir()
                save(temporary)
                files = make_entries(temporary, temporary, parent, parent_manifest)
                manifest = manifest.model_copy(update={"files": files, "store": store_id(self.folder)})
                write_checksummed(manifest.model_dump(), temporary / MANIFEST_FILE, self.key)
                temporary.rename(folder)
                sync_folder(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # frees the space if the disk is full
        return manifest

    def rewrite_version(self, number: int, save: Callable[[Path], object]) -> Manifest:
        """Replace the files of a version for good. `save` writes the new ones into a folder."""
        manifest, folder = self.manifest(number), version_folder(self, number)
        with translate_write_errors(folder):
            temporary = Path(tempfile.mkdtemp(prefix="files-", dir=folder))
            save(temporary)
            manifest = manifest.model_copy(update={"files": make_entries(temporary, folder)})
            replace_manifest(self, manifest)
            _remove_unlisted(folder, manifest)
        return manifest

    def verified_files(self, number: int) -> dict[str, Path]:
        """Return the files of a version by name, after checking their checksums.

        Raises StateError if one is damaged. The message names the last version that is not.
        """
        manifest = self.manifest(number)
        found = self.find_damage(number)
        if found and self.manifest(number) != manifest:  # another process has rewritten it in the meantime
            return self.verified_files(number)
        if found:
            raise StateError(
                f"Version {number} of {self.folder} is damaged ({found[0]}). {_recovery_hint(self, number)}"
            )
        return {name: version_folder(self, number) / file.path for name, file in self.manifest(number).files.items()}

    def find_damage(self, number: int) -> list[str]:
        """Return a sentence about each damaged file of a version. Raises StateError if the files were deleted."""
        folder, manifest = version_folder(self, number), self.manifest(number)
        if is_collected(self, number):
            raise StateError(f"The files of version {number} were deleted by `freshrec gc`. Choose another version.")
        return [wrong for file in manifest.files.values() for wrong in file_damage(folder / file.path, file)]


def replace_manifest(store: Store, manifest: Manifest) -> None:
    """Write the manifest of an existing version again."""
    with translate_write_errors(store.folder):
        write_checksummed(manifest.model_dump(), version_folder(store, manifest.id) / MANIFEST_FILE, store.key)


def store_option(folder: Path) -> str:
    """Return the option that names a store, to be pasted into a command."""
    return f"--store {shlex.quote(str(folder))}"


def version_chain(store: Store, number: int | None = None) -> list[Manifest]:
    """Return a version (default: the live one) and its ancestors, oldest first. Raises StateError if one is damaged."""
    found = [store.manifest(store.live if number is None else number)]
    while (parent := found[0].parent) is not None:
        try:
            found.insert(0, store.manifest(parent))
        except StateError as problem:
            raise StateError(
                f"An ancestor of the live version cannot be read: {problem} {_recovery_hint(store, parent)}"
            ) from None
    return found


@contextmanager
def create_store(folder: Path, sign_key_file: Path | None = None) -> Iterator[Store]:
    """Create a store. It appears in `folder` when the block ends. Raises OptionError if the folder is not empty.

    If a key is given, the store is signed. Raises OptionError for an invalid key.
    """
    key = None if sign_key_file is None else read_key(sign_key_file, folder)
    if (folder / STORE_FILE).exists():
        raise OptionError(f"{folder} already holds a store. Use `freshrec update`, or choose another folder.")
    folder = folder.resolve()
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise OptionError(f"{folder} is not empty. Choose a new folder.")
    temporary = folder.with_name(f".{folder.name}.new")
    lock = FileLock(temporary.with_suffix(".lock"), timeout=0)
    with translate_write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise BusyError(f"Another process is creating the store {folder}. Wait for it.") from None
    try:
        with translate_write_errors(folder):
            shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
            (temporary / "versions").mkdir(parents=True)
            write_checksummed([], temporary / MOVES_FILE, key)
            write_store_file(temporary, key)
        yield Store(temporary, key)
        with translate_write_errors(folder):
            temporary.rename(folder)
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def open_store(folder: Path, sign_key_file: Path | None = None) -> Store:
    """Open the store in a folder. Raises StateError if there is none, or if its format is unknown.

    If a key is given, its signatures are required. Raises OptionError for an invalid key.
    """
    if (folder / LEGACY_FILE).exists():
        raise StateError(
            f"{folder} is not a store but an older save. Convert it in Python: Recommender.load(folder).save(NEW)."
        )
    if not (folder / STORE_FILE).exists():
        raise StateError(f"There is no store in {folder}. Create one with `freshrec fit LOG {store_option(folder)}`.")
    key = None if sign_key_file is None else read_key(sign_key_file, folder)
    read_store_file(folder, key)
    return Store(folder, key)


def is_collected(store: Store, number: int) -> bool:
    """Whether the files of a version were deleted."""
    return (version_folder(store, number) / COLLECTED_FILE).exists()


def _moves_from_manifests(store: Store) -> list[PointerMove]:
    """Rebuild the changes of the live version from the manifests, for a damaged record."""
    actions: dict[VersionKind, MoveAction] = {"fit": "fit", "update": "update", "no rows": "update", "saved": "save"}
    live = [manifest for manifest in store.manifests() if manifest.goes_live]
    return [PointerMove(at=m.made_at, action=actions[m.kind], to=m.id, reason=REBUILT_REASON) for m in live]


def _remove_leftovers(store: Store) -> None:
    """Remove the temporary files of killed processes."""
    with translate_write_errors(store.folder):
        is_linked = (store.folder / "versions").is_symlink()  # then it may hold hidden files of other programs
        hidden = [
            path for path in store.folder.glob("versions/.*") if TEMPORARY_NAME.fullmatch(path.name) or not is_linked
        ]
        for leftover in (*hidden, *store.folder.glob(".*.json.*")):
            remove_path(leftover)
        for manifest in store.manifests():
            _remove_unlisted(version_folder(store, manifest.id), manifest)


def _remove_unlisted(folder: Path, manifest: Manifest) -> None:
    """Remove everything from a version's folder that its manifest does not list."""
    listed = {MANIFEST_FILE, COLLECTED_FILE, *(Path(file.path).parts[0] for file in manifest.files.values())}
    for path in folder.iterdir():
        if path.name not in listed:
            remove_path(path)


def remove_path(path: Path) -> None:
    """Remove a file, or a folder with all its files."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def version_folder(store: Store, number: int) -> Path:
    """Return the folder of a version."""
    return store.folder / "versions" / str(number)


@contextmanager
def translate_write_errors(path: Path) -> Iterator[None]:
    """Raise a StateError when the system refuses to write to `path`."""
    try:
        yield
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise StateError(
            f"{path} cannot be written ({reason}). The live version has not changed. "
            "Check free disk space and permissions."
        ) from problem


def _recovery_hint(store: Store, number: int) -> str:
    """Return what to do about a damaged version."""
    for other in reversed([n for n in store.version_numbers() if n < number]):
        try:
            if store.manifest(other).promoted and not store.find_damage(other):
                return f"Roll back with `freshrec rollback {other} --reason damage {store_option(store.folder)}`."
        except StateError:
            continue
    return "All earlier versions are damaged too. Run `freshrec fit` again on your log."
