"""Sign all files of a store: for the first time, with another key, or after a change without the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from freshrec.errors import SignatureError
from freshrec.store.checksummed_json import read_signed, write_checksummed
from freshrec.store.event_log import EventLog
from freshrec.store.log_files import CHECKSUM_FILE, LOG_FOLDER
from freshrec.store.signing import SigningKey, read_key
from freshrec.store.store_file import STORE_FILE, new_id
from freshrec.store.versions import MANIFEST_FILE, MOVES_FILE, Store, open_store, version_folder


def signed_files(store: Store) -> list[Path]:
    """Return the files that have signatures in a signed store. They hold the checksums of all others but clicks."""
    log = store.folder / LOG_FOLDER / CHECKSUM_FILE
    manifests = [version_folder(store, number) / MANIFEST_FILE for number in store.version_numbers()]
    return [store.folder / STORE_FILE, store.folder / MOVES_FILE, *([log] if log.exists() else []), *manifests]


def sign_store(
    folder: Path, key_file: Path, old_key_file: Path | None = None, unverified: bool = False, wait_s: float = 0.0
) -> dict[str, Any]:
    """Sign every file of a store with a key. Return the id of the key, and the files that had no signature of it.

    A file that is signed already needs a valid signature of this key or of the old one. In a signed store, a file
    without a signature is an error too. `unverified` accepts both. Raises SignatureError for such a file, OptionError
    for an invalid key, and StateError for a damaged file. An interrupted call can be repeated.
    """
    store, key = open_store(folder), read_key(key_file, folder)
    old_key = None if old_key_file is None else read_key(old_key_file, folder)
    with store.locked(wait_s):
        files = signed_files(store)
        signers = {path: read_signed(path)[1] for path in files}
        if any(signers.values()) and not unverified:
            for path in files:
                _require_signature(path, signers[path], key, old_key)
        owner = read_signed(files[0])[0].get("id") or new_id()
        for path in files:
            if path.name == CHECKSUM_FILE:
                EventLog(path.parent, key).sign()
            else:
                write_checksummed(_with_owner(read_signed(path)[0], path, owner), path, key)
    return {"key": key.id, "signed": [str(path) for path in files if signers[path] != key.id]}


def _require_signature(path: Path, signer: str, key: SigningKey, old_key: SigningKey | None) -> None:
    """Raise SignatureError unless a file has a valid signature of one of the keys."""
    used = old_key if old_key is not None and signer == old_key.id else key
    try:
        read_signed(path, used)
        if path.name == CHECKSUM_FILE:
            EventLog(path.parent, used).batches()  # a commit without a checksum is not signed either
    except SignatureError as problem:
        advice = "Pass --old-sign-key-file, or --unverified to sign it in spite of this"
        raise SignatureError(f"{str(problem).partition('. ')[0]}. {advice}.") from None


def _with_owner(content: Any, path: Path, owner: str) -> Any:
    """Return the content of a file with the id of its store, so that its signature is not valid in another store."""
    if path.name == STORE_FILE:
        return content | {"id": owner}
    if path.name == MOVES_FILE:
        return [move | {"store": owner} for move in content]
    return content | {"store": owner}
