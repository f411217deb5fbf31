"""The manifest of a version, and the changes of the live version."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from freshrec.disk_names import current_manifest
from freshrec.errors import StateError
from freshrec.store.checksummed_json import read_checksummed
from freshrec.store.signing import SigningKey
from freshrec.version import __version__

FORMAT = 1
METRIC_KEY = "metric"  # in a manifest's "data": the metric of the gate
RETRY_KEY = "retry_of"  # in a manifest's "data": the version whose events `update --retry` learned again
DEFERRED_KEY = "deferred"  # in a manifest's "data": refused batches that it learned besides its own
DEFERRED_DAYS_KEY = "deferred_days"  # in a manifest's "data": the statistics of these batches, as of its own
CAUSES_KEY = "causes"  # in a manifest's "data": the causes of its refusal
BLAMED_KEY = "blamed"  # in a manifest's "data": deferred batches that were tried with it, and without which it passed
DATA_TYPES: dict[str, Any] = {
    RETRY_KEY: int,
    DEFERRED_KEY: list[int],
    DEFERRED_DAYS_KEY: list[dict[str, Any]],
    CAUSES_KEY: list[str],
    BLAMED_KEY: list[int],
}
SEPARATE_SUFFIX = ", rows of one user"  # end of the source of a batch that was separated from its delivery
CLICKS_SUFFIX = ", clicks"  # after the source of a file: clicks of the same night, judged apart from the file
VersionKind = Literal["fit", "update", "no rows", "saved"]
MoveAction = Literal["fit", "update", "promote", "rollback", "save"]


def utc_now() -> str:
    """The current time in UTC, to the second, as ISO 8601 text."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class FileEntry(BaseModel):
    """Path, checksum and size of a file of a version."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    path: str = Field(pattern=r"^\w[\w.-]{0,99}(/\w[\w.-]{0,99})?$")  # relative to the version's folder
    sha256: str
    n_bytes: int


class LogFingerprint(BaseModel):
    """The event log when a version was made. A later log still has the same commit, because commits never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    id: str  # of the log; a copy has the same
    commit: int = Field(ge=0)  # number of the newest commit
    sha256: str  # of the file of this commit
    batch: int  # the newest batch
    rows: int  # in all batches


class Manifest(BaseModel):
    """Description of a version: its origin, contents, quality, and the verdict of the gate."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    id: int
    format: int = FORMAT  # of this manifest and its files; older manifests without this key have format 1
    parent: int | None = None  # the version that it was updated from
    kind: VersionKind
    made_at: str = Field(default_factory=utc_now)  # UTC
    batch: int | None = None  # batch of the event log that it learned
    source: str = ""  # hash of the delivered bytes
    recipe: dict[str, Any]  # model, strategy, their options, seed
    code: str = __version__  # version of freshrec
    spans_seen: int
    sizes: dict[str, int]  # events, users, items
    held: int = 0  # number of newest events that are held out to test it; the next update learns them
    data: dict[str, Any] = {}  # statistics of the delivery
    numbers: dict[str, float] = {}  # qualities and costs; freshrec.cli.number_labels explains each key
    promoted: bool = True  # verdict of the gate
    goes_live: bool = True  # it passed or was forced; it is live or was live, unless the update was interrupted
    reasons: list[str] = []  # why the gate refused it
    notes: list[str] = []
    files: dict[str, FileEntry] = {}
    store: str = ""  # id of its store; "" if the version was made before stores had ids
    log: LogFingerprint | None = None  # None if it was made before manifests had this key, or without a log

    @field_validator("data")
    @classmethod
    def _check_data(cls, data: dict[str, Any]) -> dict[str, Any]:
        for key in DATA_TYPES.keys() & data.keys():
            try:
                TypeAdapter(DATA_TYPES[key]).validate_python(data[key], strict=True)
            except ValidationError:
                raise ValueError(f'"{key}" has an invalid value') from None
        return data

    @property
    def is_separate(self) -> bool:
        """Whether its batch was separated from its delivery: the rows of a suspicious user, or clicks."""
        return self.source.endswith((SEPARATE_SUFFIX, CLICKS_SUFFIX))

    @property
    def batches(self) -> list[int]:
        """The batches of the event log that it learned: its own, and refused ones that the gate deferred."""
        own = [] if self.batch is None else [self.batch]
        return [*self.data.get(DEFERRED_KEY, []), *own]

    @property
    def metric(self) -> str:
        """The metric by which the gate measured the version, such as "ndcg@20"; "" if it measured nothing."""
        names = (name.rpartition(" ") for name in self.numbers)
        return next((metric for metric, _, other in names if other in ("live", "popularity")), "")

    @property
    def retry_of(self) -> int | None:
        """The version whose events `update --retry` learned again, if this is one of its versions."""
        return self.data.get(RETRY_KEY)


class PointerMove(BaseModel):
    """One change of the live version."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    at: str
    action: MoveAction
    to: int
    reason: str = ""
    store: str = ""  # id of the store; "" if the move was made before stores had ids


def read_manifest(path: Path, number: int, key: SigningKey | None = None) -> Manifest:
    """Return the manifest of a version from its file. Raises StateError if it is missing or damaged.

    Raises SignatureError if it lacks the signature of a given key.

    A file that has not changed is parsed only once.
    """
    try:
        state = path.stat()
    except OSError:
        return _parse_manifest(path, number, key, 0, 0, 0)  # raises StateError
    return _parse_manifest(path, number, key, state.st_ino, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=10_000)
def _parse_manifest(
    path: Path, number: int, key: SigningKey | None, inode: int, changed_ns: int, n_bytes: int
) -> Manifest:
    """Parse a manifest. The last three arguments change with the content of the file."""
    content = read_checksummed(path, key)
    if isinstance(content, dict) and content.get("format", FORMAT) not in range(1, FORMAT + 1):
        raise StateError(f"{path} has a format that this freshrec does not know. Upgrade freshrec.")
    try:
        found = Manifest.model_validate(current_manifest(content))
    except ValidationError as problem:
        wrong = problem.errors()[0]
        raise StateError(
            f"{path} is not a valid manifest ({wrong['loc']}: {wrong['msg']}). Roll back to another version."
        ) from None
    if found.id != number or (found.parent or 0) >= number:
        raise StateError(f"{path} is the manifest of version {found.id}. Roll back to another version.")
    return found
