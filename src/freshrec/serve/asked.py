"""What may be asked over HTTP, and what is answered: the shapes, from which the OpenAPI document is made."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from freshrec.serve.list_request import DEFAULTS, ListRequest, help_of, lower_bound

MOST_K, MOST_USERS, MOST_EVENTS, MOST_IDS, MOST_PENALTY = 500, 256, 1000, 1000, 1e6
ID_LENGTH = 256
PLAIN = r"^[^\x00-\x1f\x7f]*$"  # an id is one line
LEAST, GREATEST = -(2**63), 2**63 - 1  # of ids that are numbers

Text = Annotated[str, Field(min_length=1, max_length=ID_LENGTH, pattern=PLAIN)]
Id = Annotated[int, Field(ge=LEAST, le=GREATEST, strict=True)] | Text
Ids = Annotated[list[Id], Field(max_length=MOST_IDS)]

# The fields of `ListRequest`: its bounds, and the limits of a server, which must not work for one request too long.
Many = Annotated[int, Field(ge=lower_bound("k"), le=MOST_K, description=help_of("k"))]
Seen = Annotated[bool, Field(description=help_of("exclude_seen"))]
Allowed = Annotated[Ids | None, Field(description=help_of("allow"))]
Denied = Annotated[Ids, Field(description=help_of("deny"))]
Category = Annotated[Text | None, Field(description=help_of("category"))]
Penalty = Annotated[
    float,
    Field(ge=lower_bound("diversity"), le=MOST_PENALTY, allow_inf_nan=False, description=help_of("diversity")),
]


class Asked(BaseModel):
    """A batch of users, and what their lists may hold: the fields of `ListRequest`."""

    model_config = ConfigDict(extra="forbid")
    users: Annotated[list[Id], Field(min_length=1, max_length=MOST_USERS)]
    k: Many = DEFAULTS.k
    exclude_seen: Seen = DEFAULTS.exclude_seen
    allow: Allowed = None
    deny: Denied = []
    category: Category = None
    diversity: Penalty = DEFAULTS.diversity

    def to_request(self) -> ListRequest:
        """The options of the lists."""
        allow = None if self.allow is None else _of_one_kind(self.allow)
        return ListRequest(self.k, self.exclude_seen, allow, _of_one_kind(self.deny), self.category, self.diversity)


def _of_one_kind(ids: list[int | str]) -> tuple[int | str, ...]:
    """The ids, all of them as text where one is."""
    return tuple(ids) if all(isinstance(one, int) for one in ids) else tuple(map(str, ids))


class Happened(BaseModel):
    """A click, or whatever the log counts as taking an item."""

    model_config = ConfigDict(extra="forbid")
    user_id: Id
    item_id: Id
    timestamp: datetime | None = None  # seconds or milliseconds since 1970, or ISO 8601; now unless given
    event_id: Id | None = None
    category: Id | None = None
    event: Text | None = None


class Clicks(BaseModel):
    """Clicks, which change their users' lists at once."""

    model_config = ConfigDict(extra="forbid")
    events: Annotated[list[Happened], Field(min_length=1, max_length=MOST_EVENTS)]


class Move(BaseModel):
    """Which version is to be live, and why."""

    model_config = ConfigDict(extra="forbid")
    version: Annotated[int, Field(ge=1, le=2**31, strict=True)]
    reason: Annotated[str, Field(max_length=500)] = ""


class Item(BaseModel):
    """An item of a list."""

    item_id: int | str
    score: float
    rank: int
    fallback: str | None = None  # why the item is there, where the model did not choose it


class Listed(BaseModel):
    """A user's list."""

    user_id: int | str
    items: list[Item]
    fallback: str | None = None  # why some of the items were not chosen by the model, or all


class Recommended(BaseModel):
    """A user's list, and the version that made it."""

    version: int
    user_id: int | str
    items: list[Item]
    fallback: str | None = None


class Batch(BaseModel):
    """Lists of several users, all of one version."""

    version: int
    lists: list[Listed]


class Similar(BaseModel):
    """The items most like one."""

    version: int
    item_id: int | str
    items: list[Item]
    fallback: str | None = None


class Acknowledged(BaseModel):
    """What became of a click: it is on the disk, and in its user's history if `folded`."""

    event_id: str | None
    timestamp: int  # microseconds since 1970
    known: bool  # it had been taken before
    folded: bool
    why: str | None = None  # it is not folded in


class Taken(BaseModel):
    """What became of clicks."""

    version: int
    accepted: int
    known: int
    events: list[Acknowledged]


class Past(BaseModel):
    """Something that a user took."""

    item_id: int | str
    at: str | int


class Interest(BaseModel):
    """What a user is interested in."""

    title: str
    items: list[Item]
    events: list[Past]
    born_span: int | None = None
    used_span: int | None = None


class Person(BaseModel):
    """What is known of a user."""

    version: int
    user_id: int | str
    n_events: int
    n_fresh: int  # of these, events that no version has yet
    first_span: int | None
    last_span: int | None
    events: list[Past]
    interests: list[Interest]
    kind: str  # of the interests, in words


class Changed(BaseModel):
    """How a user's list differs from that of the version before."""

    version: int
    before: int
    came: list[Item]
    left: list[Item]
    moved: list[dict[str, Any]]
    interests: list[int | None]


class Reason(BaseModel):
    """Something that speaks for an item."""

    source: str
    place: int | None = None
    points: float | None = None
    because: int | str | None = None


class Explained(BaseModel):
    """Why a user is offered an item."""

    version: int
    user_id: int | str
    item_id: int | str
    offered: bool
    reasons: list[Reason]


class About(BaseModel):
    """The live version."""

    version: int
    parent: int | None
    kind: str
    made_at: str
    live_since: str
    model: str
    strategy: str
    sizes: dict[str, int]
    numbers: dict[str, float]
    promoted: bool
    reasons: list[str]
    notes: list[str]
    newest_event: str | int | None
    search: dict[str, Any]
    has_token: bool  # whether this server lets somebody with its token roll back and erase


class Said(BaseModel):
    """One sentence."""

    detail: str
