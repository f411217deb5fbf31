"""Schemas of requests and responses, from which the OpenAPI document is made."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from freshrec.recommender.list_request import DEFAULTS, ListRequest, help_of, lower_bound

MAX_K, MAX_USERS, MAX_EVENTS, MAX_IDS, MAX_DIVERSITY = 500, 256, 1000, 1000, 1e6
MAX_ID_LENGTH = 256
ID_PATTERN = r"^[^\x00-\x1f\x7f]*$"  # an id is one line
MIN_INT_ID, MAX_INT_ID = -(2**63), 2**63 - 1  # of ids that are numbers

ShortText = Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH, pattern=ID_PATTERN)]
Id = Annotated[int, Field(ge=MIN_INT_ID, le=MAX_INT_ID, strict=True)] | ShortText
IdList = Annotated[list[Id], Field(max_length=MAX_IDS)]

# The fields of `ListRequest`: its bounds, and the limits of a server, which must not work for one request too long.
ListLength = Annotated[int, Field(ge=lower_bound("k"), le=MAX_K, description=help_of("k"))]
Seen = Annotated[bool, Field(description=help_of("exclude_seen"))]
Allowed = Annotated[IdList | None, Field(description=help_of("allow"))]
Denied = Annotated[IdList, Field(description=help_of("deny"))]
Category = Annotated[ShortText | None, Field(description=help_of("category"))]
DiversityWeight = Annotated[
    float,
    Field(ge=lower_bound("diversity"), le=MAX_DIVERSITY, allow_inf_nan=False, description=help_of("diversity")),
]


class RecommendRequest(BaseModel):
    """A batch of users, and what their lists may hold: the fields of `ListRequest`."""

    model_config = ConfigDict(extra="forbid")
    users: Annotated[list[Id], Field(min_length=1, max_length=MAX_USERS)]
    k: ListLength = DEFAULTS.k
    exclude_seen: Seen = DEFAULTS.exclude_seen
    allow: Allowed = None
    deny: Denied = []
    category: Category = None
    diversity: DiversityWeight = DEFAULTS.diversity

    def to_request(self) -> ListRequest:
        """The options of the lists."""
        allow = None if self.allow is None else _unify_id_types(self.allow)
        return ListRequest(self.k, self.exclude_seen, allow, _unify_id_types(self.deny), self.category, self.diversity)


def _unify_id_types(ids: list[int | str]) -> tuple[int | str, ...]:
    """The ids, all of them as text where one is."""
    return tuple(ids) if all(isinstance(value, int) for value in ids) else tuple(map(str, ids))


class ClickIn(BaseModel):
    """A click, or whatever the log counts as taking an item."""

    model_config = ConfigDict(extra="forbid")
    user_id: Id
    item_id: Id
    timestamp: datetime | None = None  # seconds or milliseconds since 1970, or ISO 8601; now unless given
    event_id: Id | None = None
    category: Id | None = None
    event: ShortText | None = None


class ClicksRequest(BaseModel):
    """Clicks, which change their users' lists at once."""

    model_config = ConfigDict(extra="forbid")
    events: Annotated[list[ClickIn], Field(min_length=1, max_length=MAX_EVENTS)]


class RollbackRequest(BaseModel):
    """Which version is to be live, and why."""

    model_config = ConfigDict(extra="forbid")
    version: Annotated[int, Field(ge=1, le=2**31, strict=True)]
    reason: Annotated[str, Field(max_length=500)] = ""


class RankedItem(BaseModel):
    """An item of a list."""

    item_id: int | str
    score: float
    rank: int
    fallback: str | None = None  # why the item is there, where the model did not choose it


class UserList(BaseModel):
    """A user's list."""

    user_id: int | str
    items: list[RankedItem]
    fallback: str | None = None  # why some of the items were not chosen by the model, or all


class RecommendResponse(BaseModel):
    """A user's list, and the version that made it."""

    version: int
    user_id: int | str
    items: list[RankedItem]
    fallback: str | None = None


class BatchRecommendResponse(BaseModel):
    """Lists of several users, all of one version."""

    version: int
    lists: list[UserList]


class SimilarResponse(BaseModel):
    """The items most like one."""

    version: int
    item_id: int | str
    items: list[RankedItem]
    fallback: str | None = None


class ClickAcknowledgement(BaseModel):
    """What became of a click: it is on the disk, and in its user's history if `folded`."""

    event_id: str | None
    timestamp: int  # microseconds since 1970
    known: bool  # it had been taken before
    folded: bool
    why: str | None = None  # it is not folded in


class ClicksResponse(BaseModel):
    """What became of clicks."""

    version: int
    accepted: int
    known: int
    events: list[ClickAcknowledgement]


class PastEvent(BaseModel):
    """Something that a user took."""

    item_id: int | str
    at: str | int


class InterestCard(BaseModel):
    """What a user is interested in."""

    title: str
    items: list[RankedItem]
    events: list[PastEvent]
    born_span: int | None = None
    used_span: int | None = None


class UserProfile(BaseModel):
    """What is known of a user."""

    version: int
    user_id: int | str
    n_events: int
    n_fresh: int  # of these, events that no version has yet
    first_span: int | None
    last_span: int | None
    events: list[PastEvent]
    interests: list[InterestCard]
    kind: str  # of the interests, in words


class ListChanges(BaseModel):
    """How a user's list differs from that of the version before."""

    version: int
    before: int
    came: list[RankedItem]
    left: list[RankedItem]
    moved: list[dict[str, Any]]
    interests: list[int | None]


class ExplanationReason(BaseModel):
    """Something that speaks for an item."""

    source: str
    place: int | None = None
    points: float | None = None
    because: int | str | None = None


class ExplanationResponse(BaseModel):
    """Why a user is offered an item."""

    version: int
    user_id: int | str
    item_id: int | str
    offered: bool
    reasons: list[ExplanationReason]


class VersionInfo(BaseModel):
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


class ErrorDetail(BaseModel):
    """One sentence."""

    detail: str
