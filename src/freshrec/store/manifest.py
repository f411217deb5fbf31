"""What a version says of itself, and the moves of the pointer to the live one."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from freshrec.version import __version__

FORMAT = 1
VersionKind = Literal["fit", "update", "no rows", "saved"]
MoveAction = Literal["fit", "update", "promote", "rollback", "save"]


def utc_now() -> str:
    """This moment, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class FileEntry(BaseModel):
    """What a file of a version must be."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    path: str = Field(pattern=r"^\w[\w.-]{0,99}(/\w[\w.-]{0,99})?$")  # in the version's folder
    sha256: str
    n_bytes: int


class Manifest(BaseModel):
    """What a version is, and how it came to be."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    id: int
    format: int = FORMAT  # of this manifest and its files; those before there was this line are of format 1
    parent: int | None = None  # the version that it was updated from
    kind: VersionKind
    made_at: str = Field(default_factory=utc_now)  # UTC
    batch: int | None = None  # of the log, that it has learnt from
    source: str = ""  # a hash of the bytes that were delivered
    recipe: dict[str, Any]  # model, strategy, their options, seed
    code: str = __version__  # of freshrec
    spans_seen: int
    sizes: dict[str, int]  # events, users, items
    held: int = 0  # the newest events, on which it was tested: the next update learns from them
    data: dict[str, Any] = {}  # what was delivered, and what was odd about it
    numbers: dict[str, float] = {}  # qualities, costs
    promoted: bool = True  # the gate's verdict
    goes_live: bool = True  # it passed, or was forced to: it is or was the live one, unless somebody died before
    reasons: list[str] = []  # why it was refused
    notes: list[str] = []
    files: dict[str, FileEntry] = {}

    @property
    def metric(self) -> str:
        """The metric by which the gate measured the version, such as "ndcg@20"; "" if it measured nothing."""
        names = (name.rpartition(" ") for name in self.numbers)
        return next((metric for metric, _, other in names if other in ("live", "popularity")), "")


class PointerMove(BaseModel):
    """One change of the live pointer."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    at: str
    action: MoveAction
    to: int
    reason: str = ""
