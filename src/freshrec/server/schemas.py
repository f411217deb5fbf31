"""Schemas of requests and responses. FastAPI makes the OpenAPI document from them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictFloat, StrictInt
from pydantic_core import PydanticCustomError

from freshrec.data.identities import (
    MAX_ID_BYTES,
    MAX_INTEGER_ID,
    MIN_INTEGER_ID,
    check_new_text,
    json_id,
)
from freshrec.recommender.list_request import DEFAULTS, ListRequest, help_of, lower_bound

MAX_K, MAX_USERS, MAX_EVENTS, MAX_IDS, MAX_DIVERSITY = 500, 256, 1000, 1000, 1e6
MAX_ID_LENGTH = MAX_ID_BYTES  # an id of a log may have so many bytes, so at most so many characters


def _refuse_boolean(value: Any) -> Any:
    """Raise an error for true and false, which pydantic would take as the numbers 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("not_a_number", "Input should be a number, not true or false")
    return value


ShortText = Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH)]
IntegerId = Annotated[int, Field(ge=MIN_INTEGER_ID, le=MAX_INTEGER_ID, strict=True)]
Id = IntegerId | ShortText
NewText = Annotated[ShortText, AfterValidator(check_new_text)]
NewId = IntegerId | NewText  # of a click, whose user and item may be new
IdList = Annotated[list[Id], Field(max_length=MAX_IDS)]

# The fields of `ListRequest`, with its bounds and with limits that keep a single request cheap.
ListLength = Annotated[
    int, Field(ge=lower_bound("k"), le=MAX_K, description=help_of("k")), BeforeValidator(_refuse_boolean)
]
Seen = Annotated[bool, Field(description=help_of("exclude_seen"))]
Allowed = Annotated[IdList | None, Field(description=help_of("allow"))]
Denied = Annotated[IdList, Field(description=help_of("deny"))]
Category = Annotated[Id | None, Field(description=help_of("category"))]
DiversityWeight = Annotated[
    float,
    Field(ge=lower_bound("diversity"), le=MAX_DIVERSITY, allow_inf_nan=False, description=help_of("diversity")),
    BeforeValidator(_refuse_boolean),
]


def _body(example: dict[str, Any]) -> ConfigDict:
    """Return the configuration of the body of a request: no other fields, and an example for the API page."""
    return ConfigDict(extra="forbid", json_schema_extra={"examples": [example]})


class RecommendRequest(BaseModel):
    """Users and the options of their lists. The options are the fields of `ListRequest`."""

    model_config = _body({"users": ["user-1", "user-2"], "k": 5, "deny": ["item-9"]})
    users: Annotated[list[Id], Field(min_length=1, max_length=MAX_USERS, description="Ids of the users.")]
    k: ListLength = DEFAULTS.k
    exclude_seen: Seen = DEFAULTS.exclude_seen
    allow: Allowed = None
    deny: Denied = []
    category: Category = None
    diversity: DiversityWeight = DEFAULTS.diversity

    def to_request(self) -> ListRequest:
        """Return the options of the lists."""
        allow = None if self.allow is None else tuple(self.allow)
        return ListRequest(self.k, self.exclude_seen, allow, tuple(self.deny), self.category, self.diversity)


class ClickIn(BaseModel):
    """A click, or any other event that the log counts."""

    model_config = _body({"user_id": "user-1", "item_id": "item-5"})
    user_id: Annotated[NewId, Field(description="Id of the user. A new id is allowed.")]
    item_id: Annotated[NewId, Field(description="Id of the item. A new id is allowed.")]
    timestamp: Annotated[
        StrictInt | StrictFloat | ShortText | None,
        Field(
            description="Time of the click: ISO 8601, or a number since 1970 (seconds, milliseconds, microseconds or "
            "nanoseconds). Default: now."
        ),
    ] = None
    event_id: Annotated[NewId | None, Field(description="Id of the click. A repeated id is counted once.")] = None
    category: Annotated[NewId | None, Field(description="Category of the item.")] = None
    event: Annotated[NewText | None, Field(description="Event type, for a log with several types.")] = None


class ClicksRequest(BaseModel):
    """Clicks to store."""

    model_config = _body(
        {
            "events": [
                {"user_id": "user-1", "item_id": "item-5"},
                {"user_id": "user-2", "item_id": "item-8", "timestamp": "2025-01-31T18:30:00Z", "event_id": "click-17"},
            ]
        }
    )
    events: Annotated[list[ClickIn], Field(min_length=1, max_length=MAX_EVENTS, description="The clicks.")]


class RollbackRequest(BaseModel):
    """The version to go back to."""

    model_config = _body({"version": 3, "reason": "The lists looked wrong."})
    version: Annotated[int, Field(ge=1, le=2**31, strict=True, description="Number of an earlier version.")]
    reason: Annotated[
        str, Field(max_length=500, description="Reason, stored in the history. Required for a refused version.")
    ] = ""


VersionNumber = Annotated[int, Field(description="Version that the answer was computed from.")]
SentId = Annotated[int | str, AfterValidator(json_id)]  # a number beyond 2^53 is sent as text
UserId = Annotated[SentId, Field(description="Id of the user; text if it is a number beyond 2^53.")]
ItemId = Annotated[SentId, Field(description="Id of the item; text if it is a number beyond 2^53.")]
ListFallback = Annotated[
    str | None, Field(description="Why some or all items are popular items; null if the model chose all of them.")
]


class RankedItem(BaseModel):
    """An item of a list."""

    item_id: ItemId
    score: Annotated[float, Field(description="Score of the model; higher is better. Not comparable between users.")]
    rank: Annotated[int, Field(description="Place in the list, from 1.")]
    fallback: Annotated[
        str | None, Field(description="Why this is a popular item; null if the model chose the item.")
    ] = None


RankedItems = Annotated[list[RankedItem], Field(description="Items, best first.")]


class UserList(BaseModel):
    """The list of one user."""

    user_id: UserId
    items: RankedItems
    fallback: ListFallback = None


class RecommendResponse(BaseModel):
    """The list of one user, and the version that it comes from."""

    version: VersionNumber
    user_id: UserId
    items: RankedItems
    fallback: ListFallback = None


class BatchRecommendResponse(BaseModel):
    """The lists of several users, all from one version."""

    version: VersionNumber
    lists: Annotated[list[UserList], Field(description="One list per user, in the order of the request.")]


class SimilarResponse(BaseModel):
    """The items that are most similar to one item."""

    version: VersionNumber
    item_id: ItemId
    items: RankedItems
    fallback: ListFallback = None


class ClickAcknowledgement(BaseModel):
    """The result of one click. A new click is stored on disk."""

    event_id: Annotated[str | None, Field(description="Id of the click, as sent.")]
    timestamp: Annotated[int, Field(description="Time of the click, in microseconds since 1970 (UTC).")]
    known: Annotated[bool, Field(description="Whether the same event was received or learned before.")]
    folded: Annotated[bool, Field(description="Whether the click is in the user's history and changes lists now.")]
    why: Annotated[str | None, Field(description="Why the click does not change lists; null if it does.")] = None


class ClicksResponse(BaseModel):
    """The results of all clicks of a request."""

    version: VersionNumber
    accepted: Annotated[int, Field(description="Number of new clicks.")]
    known: Annotated[int, Field(description="Number of clicks that were received or learned before.")]
    events: Annotated[list[ClickAcknowledgement], Field(description="One result per click, in the order sent.")]


class PastEvent(BaseModel):
    """An event of a user."""

    item_id: ItemId
    at: Annotated[SentId, Field(description="Time, ISO 8601 (UTC); a sequence number in a log without timestamps.")]


class InterestCard(BaseModel):
    """One interest of a user."""

    title: Annotated[str, Field(description="Name of the interest.")]
    items: RankedItems
    events: Annotated[list[PastEvent], Field(description="Events of the user that belong to the interest.")]
    born_span: Annotated[int | None, Field(description="Span in which the interest was created.")] = None
    used_span: Annotated[int | None, Field(description="Last span with an event that belongs to it.")] = None


class UserProfile(BaseModel):
    """The profile of a user."""

    version: VersionNumber
    user_id: UserId
    n_events: Annotated[int, Field(description="Number of stored events of the user.")]
    n_fresh: Annotated[int, Field(description="Number of these events that are clicks since the version was made.")]
    first_span: Annotated[int | None, Field(description="Span of the user's first event.")]
    last_span: Annotated[int | None, Field(description="Span of the user's last event.")]
    events: Annotated[list[PastEvent], Field(description="The 30 most recent events, newest last.")]
    interests: Annotated[list[InterestCard], Field(description="Interests, each with items and events.")]
    kind: Annotated[str, Field(description="Kind of interests, which depends on the model.")]


class ListChanges(BaseModel):
    """The differences between a user's list and that of the parent version."""

    version: VersionNumber
    before: Annotated[int, Field(description="Number of the parent version.")]
    came: Annotated[list[RankedItem], Field(description="Items that only the new list has.")]
    left: Annotated[list[RankedItem], Field(description="Items that only the old list had.")]
    moved: Annotated[
        list[dict[str, Any]],
        Field(description="Items with another rank: `item_id`, `rank` now, and rank before (`was`)."),
    ]
    interests: Annotated[
        list[int | None],
        Field(description="Number of interests before and now; null if the version does not know the user."),
    ]


class ExplanationReason(BaseModel):
    """One reason for an item."""

    source: Annotated[str, Field(description="Source of the reason, such as an expert of the blend or an interest.")]
    place: Annotated[int | None, Field(description="Rank of the item in the list of this source, from 1.")] = None
    points: Annotated[float | None, Field(description="Score that this source gives the item; higher is better.")] = (
        None
    )
    because: Annotated[
        SentId | None, Field(description="Past item of the user that contributes most; null if unknown.")
    ] = None


class ExplanationResponse(BaseModel):
    """The reasons why a user is offered an item."""

    version: VersionNumber
    user_id: UserId
    item_id: ItemId
    offered: Annotated[bool, Field(description="Whether the model offers the item to the user.")]
    reasons: Annotated[list[ExplanationReason], Field(description="Reasons, largest contribution first.")]


class VersionInfo(BaseModel):
    """The live version."""

    version: VersionNumber
    parent: Annotated[int | None, Field(description="Version from which this one was updated; null for the first.")]
    kind: Annotated[str, Field(description="How the version was made: `fit`, `update`, `no rows` or `saved`.")]
    made_at: Annotated[str, Field(description="Time when the version was made, ISO 8601 (UTC).")]
    live_since: Annotated[str, Field(description="Time when this server began to serve it, ISO 8601 (UTC).")]
    model: Annotated[str, Field(description="Name of the model.")]
    strategy: Annotated[str, Field(description="Name of the strategy.")]
    sizes: Annotated[dict[str, int], Field(description="Numbers of users, items and events.")]
    numbers: Annotated[dict[str, float], Field(description="Measured quality and costs, by name.")]
    promoted: Annotated[bool, Field(description="Whether the gate promoted the version.")]
    reasons: Annotated[list[str], Field(description="Why the gate refused the version; empty if it did not.")]
    notes: Annotated[list[str], Field(description="Further remarks of the gate.")]
    newest_event: Annotated[
        str | int | None, Field(description="Time of the newest event that lists use, including clicks.")
    ]
    search: Annotated[dict[str, Any], Field(description="Search method, the reason for it, and its recall.")]
    has_token: Annotated[
        bool, Field(description="Whether the server has a token. Rolling back and erasing a user need one.")
    ]


class ErrorDetail(BaseModel):
    """An error."""

    detail: Annotated[str, Field(description="What is wrong, and what to do.")]
