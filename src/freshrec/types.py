"""The types everything else speaks: events, spans, histories, batches, models, states, strategies.

Dimension letters end a tensor's name: E events, R rows of a history store, B batch, T history, N candidates, I items,
U users, K interests, S = sum of K over users, D vector. Users and items are named by *rows* (1, 2, ...; 0 is padding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

SEQUENCE_FORMATS = ("window", "session-parallel")  # batches of models that learn at each position of a history
TRAIN, VALID, TEST = 0, 1, 2  # Events.role_E: what an event is for
NOW, NEXT, NEVER = 0, 1, 2  # Events.train_at_E: the update that may train on it
TRAINED, DUE, DEFERRED, HELD_OUT = 0, 1, 2, 3  # Histories.due_R: trained on; at this update; at the next one; never


@dataclass(frozen=True)
class Events:
    """Interactions in time order, as columns of equal length E."""

    users_E: Tensor  # int64, user rows
    items_E: Tensor  # int64, item rows
    times_E: Tensor  # int64, microseconds, or the order of the events where the log has no clock
    role_E: Tensor  # int8, TRAIN, VALID or TEST
    train_at_E: Tensor  # int8, NOW, NEXT or NEVER: which update may train on the event
    labels_E: Tensor | None = None  # float32: 1 taken, 0 shown and not taken, nan not known; None: all are taken
    categories_E: Tensor | None = None  # int32, category rows of the items, 0 = none

    def __len__(self) -> int:
        return len(self.users_E)

    def __getitem__(self, index: Tensor | slice) -> Events:
        columns: list[Any] = [None if column is None else column[index] for column in vars(self).values()]
        return Events(*columns)

    def to(self, device: torch.device) -> Events:
        """The same on another device."""
        columns: list[Any] = [None if column is None else column.to(device) for column in vars(self).values()]
        return Events(*columns)

    @staticmethod
    def trainable(users_E: Tensor, items_E: Tensor, times_E: Tensor | None = None) -> Events:
        """Events that may all be trained on at once; times count up where none are given."""
        zeros = torch.zeros(len(users_E), dtype=torch.int8)
        times_E = torch.arange(len(users_E)) if times_E is None else times_E
        return Events(users_E.long(), items_E.long(), times_E.long(), zeros, zeros)


@dataclass(frozen=True)
class Span:
    """One slice of the log. Others call it window, fold, experience, task, period or block."""

    index: int
    events: Events
    n_users: int  # users and items known once this span is over
    n_items: int
    name: str = ""  # for people: "2014-03-01 to 2014-03-14"

    def blocks(self, cadence: int) -> list[Events]:
        """The span's events in `cadence` consecutive pieces of nearly equal count."""
        edges = [round(i * len(self.events) / cadence) for i in range(cadence + 1)]
        return [self.events[a:b] for a, b in zip(edges, edges[1:])]


@dataclass(frozen=True)
class Impressions:
    """What users were shown, in time order: where a log has such rows, these are what is trained on."""

    users_E: Tensor  # int64
    items_E: Tensor  # int64
    times_E: Tensor  # int64
    labels_E: Tensor  # float32, 1 taken, 0 not
    due_E: Tensor  # int8: DUE or DEFERRED

    def __len__(self) -> int:
        return len(self.users_E)

    def __getitem__(self, index: Tensor) -> Impressions:
        return Impressions(*(column[index] for column in vars(self).values()))


@dataclass(frozen=True)
class Histories:
    """Each user's events in time order: user u owns rows offsets_U[u] : offsets_U[u + 1]; user 0, the padding, none.

    Rows are what users took. Where the log also says what they were shown, `impressions` holds what is still to
    be trained on, and no row is due.
    """

    offsets_U: Tensor  # int64, n_users + 2 entries
    items_R: Tensor  # int32
    times_R: Tensor  # int64
    due_R: Tensor  # int8: TRAINED, DUE, DEFERRED or HELD_OUT
    impressions: Impressions | None = None
    categories_I: Tensor | None = None  # int32, the category row of each item, from item 0; None: the log has none

    @property
    def n_users(self) -> int:
        return len(self.offsets_U) - 2

    @staticmethod
    def empty() -> Histories:
        return Histories(
            torch.zeros(2, dtype=torch.int64),
            torch.zeros(0, dtype=torch.int32),
            torch.zeros(0, dtype=torch.int64),
            torch.zeros(0, dtype=torch.int8),
        )


@dataclass(frozen=True)
class Interests:
    """Per-user vectors that outlive a span.

    User u owns rows offsets_U[u] : offsets_U[u + 1], none before its first update.
    """

    vectors_SD: Tensor  # float32, or float16 where the strategy halves them
    offsets_U: Tensor  # int64, n_users + 2 entries
    born_S: Tensor  # int16, the span that created the interest
    used_S: Tensor  # int16, the last span in which it was the closest interest of an event of that span

    @property
    def n_users(self) -> int:
        return len(self.offsets_U) - 2

    @staticmethod
    def empty(n_dims: int) -> Interests:
        none = torch.zeros(0, dtype=torch.int16)
        return Interests(torch.zeros(0, n_dims), torch.zeros(2, dtype=torch.int64), none, none.clone())


@dataclass(frozen=True)
class SessionLanes:
    """The lane of each row of a session-parallel batch, and the state in which the model reads the row."""

    lane_B: Tensor
    is_first_B: Tensor  # bool: a session begins; else it is that of the lane's last row
    n_lanes: int
    states: tuple[Tensor, ...] | None = None  # (B, H) of each layer before the row; None: all zero


@dataclass(frozen=True)
class Batch:
    """What a model sees. What a user carries between spans travels in the batch."""

    users_B: Tensor
    history_BT: Tensor  # item rows, most recent last, padded with 0 on the left
    targets_BT: Tensor | None = None  # next item after each position, 0 = not a target; (B, 1) for one target a row
    negatives_N: Tensor | None = None  # item rows shared by the batch
    interests_BKD: Tensor | None = None  # stored interests, zero where not alive
    alive_BK: Tensor | None = None  # bool: the interests this user has, new ones included
    old_BK: Tensor | None = None  # bool: those it had before this span
    labels_B: Tensor | None = None  # float32: whether the target was taken; None: all are
    categories_I: Tensor | None = None  # the category of each item, where the log has them
    lanes: SessionLanes | None = None  # the rows go on where earlier batches ended
    project: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # (vectors_BKD, alive_BK, old_BK) -> vectors_BKD

    def __len__(self) -> int:
        return len(self.users_B)


@dataclass(frozen=True)
class Forward:
    """One training pass: the loss, and what extra terms may look at."""

    loss: Tensor  # scalar
    vectors_BKD: Tensor | None = None
    target_BD: Tensor | None = None
    logits_BN: Tensor | None = None  # of each target's candidates, itself among them
    rows_RD: Tensor | None = None  # the item vectors, where the candidates are all items
    states: tuple[Tensor, ...] | None = None  # (B, H) of each layer after each row, where the batch has lanes


@runtime_checkable
class Model(Protocol):
    """What all models have in common. Sizes count real users and items: rows 1..n_users and 1..n_items."""

    n_users: int
    n_items: int

    @property
    def spec(self) -> Any:
        """The options it was built with."""

    def grow(self, n_users: int, n_items: int) -> None:
        """Make room for new users and items; old rows are untouched."""


@runtime_checkable
class ScoringModel(Model, Protocol):
    """A model that computes its scores itself. Those of a vector model are inner products (`nn.scoring`)."""

    def score(self, batch: Batch, items: Tensor) -> Tensor:
        """Scores (B, N) of `items`, shared (N,) or each row's own (B, N); higher is better."""


@runtime_checkable
class CountingModel(ScoringModel, Protocol):
    """A model that learns from each event at once, without gradients."""

    def absorb(self, events: Events, histories: Histories) -> None:
        """Learn from `events`, which are new; `histories` holds each user's events before them."""


@runtime_checkable
class StateDictModel(Model, Protocol):
    """A model that chooses what is saved of it. Of a counting model without these methods, all attributes are."""

    def state_dict(self) -> dict[str, Any]:
        """All that the model has learnt, as tensors by name."""

    def load_state_dict(self, tensors: dict[str, Any], /) -> object:
        """The inverse of `state_dict`, on a model of the same spec and sizes."""


@runtime_checkable
class SeededModel(Model, Protocol):
    """A model that draws random numbers, and keeps the seed that it was built with."""

    seed: int


@runtime_checkable
class CandidateModel(CountingModel, Protocol):
    """A model that looks at a few items of each user only; it has no opinion of the others."""

    def candidates(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Items (B, C), 0 where a user has fewer, and their scores; no opinion is 0, as in `score`."""


@runtime_checkable
class ErasableModel(Model, Protocol):
    """A model that remembers what each user took."""

    def erase_user(self, user: int) -> None:
        """The user in this row has taken nothing."""


@runtime_checkable
class TrainedModel(Model, Protocol):
    """A model that learns by gradients: an `nn.Module`, of which training uses the methods at the end."""

    # How batches are cut: a row per "target" with its history, per "window" of targets, per "pair" without a history,
    # per "click" (a labelled target and the history there is), or "session-parallel" (one event per session a step).
    batch_format: str
    seed: int
    moments: dict[str, Tensor]  # the optimiser's memory of the dense weights; tables carry their own

    def forward(self, batch: Batch) -> Forward:
        """The training loss of a batch with targets and negatives."""

    def __call__(self, batch: Batch) -> Forward:
        """`forward`."""

    def train(self) -> object:
        """From now on, `forward` is noisy where the model wants it to be (dropout)."""

    def eval(self) -> object:
        """From now on, nothing is noisy."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Itself and its parts by name, tables among them."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The dense weights; tables are not among them."""


@runtime_checkable
class ClickModel(TrainedModel, ScoringModel, Protocol):
    """A model whose score is the log-odds that the user takes the item: it can learn from what was not taken."""

    def click_probabilities(self, batch: Batch, items: Tensor) -> Tensor:
        """How likely the user takes each item, shaped as `score`."""


@runtime_checkable
class EncodingModel(TrainedModel, Protocol):
    """A vector model through which gradients can be had of the scores of all items at once."""

    def encode(self, items_BTD: Tensor, batch: Batch) -> Tensor:
        """(B, K, D) the users' vectors, read from a history whose items have these vectors, with gradients."""


@runtime_checkable
class UserVectorModel(TrainedModel, Protocol):
    """A vector model that computes the users' vectors in a way of its own, not by `encode` of the item vectors."""

    def user_vectors(self, batch: Batch) -> Tensor:
        """(B, K, D), without gradients."""


# A model whose score is the largest inner product of an item vector with one of the user's vectors. The
# `EmbeddingTable` of its item vectors is named "items"; `nn.scoring` computes vectors and scores.
VectorModel = EncodingModel | UserVectorModel


@runtime_checkable
class InterestModel(EncodingModel, Protocol):
    """A model with several interests a user, kept between spans."""

    @property
    def has_ordered_interests(self) -> bool:
        """Whether the k-th interest is the k-th of something learnt, so that only a user's last ones may be dropped."""

    def initial_interests(self, n: int) -> Tensor:
        """(n, D): where the interests of a newcomer, and new interests of anybody, start."""


@runtime_checkable
class ModelSpec(Protocol):
    """The options of a model, with their defaults; a frozen dataclass."""

    def build(self, seed: int) -> Model:
        """A model without users and items."""


@runtime_checkable
class HistorySpec(Protocol):
    """The options of a model that says how many of a user's last events are kept for it to read."""

    @property
    def length(self) -> int:
        """Events a user."""


@dataclass(frozen=True)
class State:
    """All that is needed to serve now and to update next time."""

    model: Any  # a Model; what is served
    seed: int = 0
    spans_seen: int = 0
    histories: Histories = field(default_factory=Histories.empty)
    interests: Interests | None = None
    base_epochs: int = 0  # how many epochs the base block needed; a full retrain uses as many
    memory: Any = None  # whatever the strategy keeps: a tree of tensors and dataclasses
    costs: dict[str, float] = field(default_factory=dict)  # what the last update measured of itself
    shared_base: State | None = None  # the base block's state, where another strategy has already trained the same one


@runtime_checkable
class Strategy(Protocol):
    """One pure function from a state and a span to the next state."""

    def update(self, state: State, span: Span) -> State:
        """`state` is left as it was; `state.histories` already holds the span's events, marked as due."""


LossTerm = Callable[[Batch, Forward], Tensor]  # an extra scalar added to the loss
