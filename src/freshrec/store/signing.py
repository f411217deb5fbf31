"""Signatures of the JSON files of a store: HMAC-SHA256 with a key that only the owners of the store have.

A checksum detects damage. A signature also detects a change by somebody without the key. docs/security.md says what it
covers.
"""

from __future__ import annotations

import hmac
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_IRWXO, S_IWGRP
from typing import Any

from freshrec.errors import OptionError, SignatureError

MIN_KEY_BYTES, MAX_KEY_BYTES = 32, 4096


@dataclass(frozen=True)
class SigningKey:
    """A secret key. Its id may be published: it names the key and does not reveal it."""

    secret: bytes = field(repr=False)

    @property
    def id(self) -> str:
        """The id of the key: 16 hexadecimal digits."""
        return self._digest(b"freshrec key id")[:16]

    def sign(self, content: Any, name: str) -> dict[str, str]:
        """Return the signature of the JSON content of a file with this name."""
        return {"key": self.id, "hmac": self._digest(_message(content, name))}

    def verify(self, signature: Any, content: Any, path: Path) -> None:
        """Raise SignatureError unless `signature` is that of `content` with this key."""
        if not isinstance(signature, dict):
            raise unsigned_error(path)
        if signature.get("key") != self.id:
            other = str(signature.get("key"))[:16]
            raise SignatureError(f"{path} is signed with the key {other}, not {self.id}. Pass the right key file.")
        found = str(signature.get("hmac")).encode()
        if not hmac.compare_digest(found, self._digest(_message(content, path.name)).encode()):
            raise SignatureError(f"{path} was changed by somebody without the key. Restore it from a backup.")

    def _digest(self, message: bytes) -> str:
        return hmac.new(self.secret, message, "sha256").hexdigest()


def unsigned_error(path: Path) -> SignatureError:
    """Return the error for a file without a signature."""
    return SignatureError(f"{path} is not signed. Check who wrote it, then see `freshrec sign --help`.")


def read_key(path: Path, store: Path) -> SigningKey:
    """Read the key of a store from a file, without whitespace at its ends.

    Raises OptionError if the file cannot be read, if others can read or change it, if it is in the folder `store`, or
    if the key is too short.
    """
    if path.resolve().is_relative_to(store.resolve()):
        raise OptionError(f"The key file {path} is inside the store, and would be copied with it. Move it elsewhere.")
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            secret = file.read(MAX_KEY_BYTES + 1).strip()
    except OSError as problem:
        raise OptionError(
            f"The key file {path} cannot be read ({problem.strerror}). Check the path and its permissions."
        ) from None
    if mode & (S_IRWXO | S_IWGRP):
        raise OptionError(f"Other users can read or change the key file {path}. Run `chmod 600` on it.")
    if not MIN_KEY_BYTES <= len(secret) <= MAX_KEY_BYTES:
        raise OptionError(
            f"The key in {path} has {len(secret)} bytes. It needs {MIN_KEY_BYTES} to {MAX_KEY_BYTES}. "
            f"Make one with `openssl rand -hex 32`."
        )
    if len(set(secret)) < 8:
        raise OptionError(f"The key in {path} repeats few characters. Make one with `openssl rand -hex 32`.")
    return SigningKey(secret)


def _message(content: Any, name: str) -> bytes:
    """Return what is signed. The name is part of it, so that one file cannot take the place of another."""
    return f"freshrec 1\n{name}\n{json.dumps(content, sort_keys=True)}".encode()
