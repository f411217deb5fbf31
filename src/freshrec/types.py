"""The shared types: events, spans, histories, batches, models, states, strategies.

The name of a tensor ends in its dimensions. E: events. R: rows of the histories. B: batch. T: history. N: candidates.
I: items. U: users. K: interests of a user. S: interests of all users. D: vector.

Users and items are identified by *rows* 1, 2, ...; row 0 is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

SEQUENCE_FORMATS = ("window", "session-parallel")  # formats with a target at each position of a history
TRAIN, VALID, TEST = 0, 1, 2  # Events.role_E: the use of an event
NOW, NEXT, NEVER = 0, 1, 2  # Events.train_at_E: which update may train on it
TRAINED, DUE, DEFERRED, HELD_OUT = 0, 1, 2, 3  # Histories.due_R: trained; train now, next, never


@dataclass(frozen=True)
class Events:
    """Interactions in time order, as columns of equal length E."""

    users_E: Tensor  # int64, user rows
    items_E: Tensor  # int64, item rows
    times_E: Tensor  # int64, microseconds since 1970; 0, 1, 2, ... in a log without timestamps
    role_E: Tensor  # int8, TRAIN, VALID or TEST
    train_at_E: Tensor  # int8, NOW, NEXT or NEVER: which update may train on the event
    labels_E: Tensor | None = None  # float32: 1 = clicked, 0 = shown but not clicked, nan = unknown; None: no exposures
    categories_E: Tensor | None = None  # int32, category rows of the items, 0 = none

    def __len__(self) -> int:
        return len(self.users_E)

    def __getitem__(self, index: Tensor | slice) -> Events:
        columns: list[Any] = [None if column is None else column[index] for column in vars(self).values()]
        return Events(*columns)

    def to(self, device: torch.device) -> Events:
        """Return the same events on another device."""
        columns: list[Any] = [None if column is None else column.to(device) for column in vars(self).values()]
        return Events(*columns)

    @staticmethod
    def trainable(users_E: Tensor, items_E: Tensor, times_E: Tensor | None = None) -> Events:
        """Return events that may all be trained on now. Default times: 0, 1, 2, ..."""
        zeros = torch.zeros(len(users_E), dtype=torch.int8)
        times_E = torch.arange(len(users_E)) if times_E is None else times_E
        return Events(users_E.long(), items_E.long(), times_E.long(), zeros, zeros)


@dataclass(frozen=True)
class Span:
    """A consecutive part of the log. Other names for it are window, fold, experience, task, period and block."""

    index: int  # 0 = base block
    events: Events
    n_users: int  # number of users known at the end of the span
    n_items: int  # number of items known at the end of the span
    name: str = ""  # such as "2014-03-01 to 2014-03-14"

    def blocks(self, cadence: int) -> list[Events]:
        """Split the events into `cadence` consecutive blocks of nearly equal size."""
        edges = [round(i * len(self.events) / cadence) for i in range(cadence + 1)]
        return [self.events[a:b] for a, b in zip(edges, edges[1:])]


@dataclass(frozen=True)
class Impressions:
    """Exposures in time order. In a log with exposures, models are trained on these."""

    users_E: Tensor  # int64
    items_E: Tensor  # int64
    times_E: Tensor  # int64
    labels_E: Tensor  # float32: 1 = clicked, 0 = not
    due_E: Tensor  # int8: DUE or DEFERRED

    def __len__(self) -> int:
        return len(self.users_E)

    def __getitem__(self, index: Tensor) -> Impressions:
        return Impressions(*(column[index] for column in vars(self).values()))


@dataclass(frozen=True)
class Histories:
    """Each user's events in time order. User u owns rows offsets_U[u] : offsets_U[u + 1]; user 0 is padding.

    A row is one event. In a log with exposures, `impressions` holds the exposures that are still to be trained on. No
    row is then due.
    """

    offsets_U: Tensor  # int64, n_users + 2 entries
    items_R: Tensor  # int32
    times_R: Tensor  # int64
    due_R: Tensor  # int8: TRAINED, DUE, DEFERRED or HELD_OUT
    impressions: Impressions | None = None
    categories_I: Tensor | None = None  # int32, category row of each item, from item row 0; None: no categories

    @property
    def n_users(self) -> int:
        return len(self.offsets_U) - 2

    @staticmethod
    def empty() -> Histories:
        """Return histories without users."""
        return Histories(
            torch.zeros(2, dtype=torch.int64),
            torch.zeros(0, dtype=torch.int32),
            torch.zeros(0, dtype=torch.int64),
            torch.zeros(0, dtype=torch.int8),
        )


@dataclass(frozen=True)
class Interests:
    """Interest vectors of users, kept between spans.

    User u owns rows offsets_U[u] : offsets_U[u + 1], and none before its first update.
    """

    vectors_SD: Tensor  # float32, or float16 if the strategy stores fp16
    offsets_U: Tensor  # int64, n_users + 2 entries
    born_S: Tensor  # int32, span in which the interest was created
    used_S: Tensor  # int32, last span in which it was the closest interest to an event

    @property
    def n_users(self) -> int:
        return len(self.offsets_U) - 2

    @staticmethod
    def empty(n_dims: int) -> Interests:
        """Return no interests, with vectors of `n_dims` dimensions."""
        none = torch.zeros(0, dtype=torch.int32)
        return Interests(torch.zeros(0, n_dims), torch.zeros(2, dtype=torch.int64), none, none.clone())


@dataclass(frozen=True)
class SessionLanes:
    """The lane of each row of a session-parallel batch, and the hidden states before the row."""

    lane_B: Tensor
    is_first_B: Tensor  # bool: a session starts; else the session of the lane's last row continues
    n_lanes: int
    states: tuple[Tensor, ...] | None = None  # (B, H) for each layer, before the row; None: all zero


@dataclass(frozen=True)
class Batch:
    """The input of a model, including the interests that are stored between spans."""

    users_B: Tensor
    history_BT: Tensor  # item rows, most recent last, padded with 0 on the left
    targets_BT: Tensor | None = None  # item after each position, 0 = no target; (B, 1) for one target per row
    negatives_N: Tensor | None = None  # item rows, shared by the batch and by all models that read it
    interests_BKD: Tensor | None = None  # stored interests; 0 where not alive
    alive_BK: Tensor | None = None  # bool: interests that the user has, including new ones
    old_BK: Tensor | None = None  # bool: interests that the user had before this span
    labels_B: Tensor | None = None  # float32: 1 = the target was clicked, 0 = not; None: no exposures
    categories_I: Tensor | None = None  # category row of each item; None: no categories
    lanes: SessionLanes | None = None  # the rows continue sessions of earlier batches
    project: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # (vectors_BKD, alive_BK, old_BK) -> vectors_BKD

    def __len__(self) -> int:
        return len(self.users_B)


@dataclass(frozen=True)
class Forward:
    """The result of a training pass: the loss, and values for extra loss terms."""

    loss: Tensor  # scalar
    vectors_BKD: Tensor | None = None
    target_BD: Tensor | None = None
    logits_BN: Tensor | None = None  # logits of the candidates of each target, including the target
    rows_RD: Tensor | None = None  # item vectors, if all items are candidates
    states: tuple[Tensor, ...] | None = None  # (B, H) for each layer, after the row, if the batch has lanes


@runtime_checkable
class Model(Protocol):
    """The interface of all models. Sizes count real users and items: rows 1..n_users and 1..n_items."""

    n_users: int
    n_items: int

    @property
    def spec(self) -> Any:
        """The options that the model was built with."""

    def grow(self, n_users: int, n_items: int) -> None:
        """Add rows for new users and items. Old rows stay unchanged."""


@runtime_checkable
class ScoringModel(Model, Protocol):
    """A model that computes its own scores. Scores of a vector model are inner products (`nn.scoring`)."""

    def score(self, batch: Batch, items: Tensor) -> Tensor:
        """Score of each item for each user, shape (B, N); higher is better. `items`: (N,), or (B, N) if they differ."""


@runtime_checkable
class CountingModel(ScoringModel, Protocol):
    """A model that learns from each event at once, without gradients."""

    def absorb(self, events: Events, histories: Histories) -> None:
        """Learn from new `events`. `histories` holds each user's events before them."""


@runtime_checkable
class StateDictModel(Model, Protocol):
    """A model that chooses the data to save. Without these methods, all attributes of a counting model are saved."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that the model has learned, as tensors by name."""

    def load_state_dict(self, tensors: dict[str, Any], /) -> object:
        """Restore what `state_dict` returned, in a model with the same spec and sizes."""


@runtime_checkable
class SeededModel(Model, Protocol):
    """A model that draws random numbers and keeps its seed."""

    seed: int


@runtime_checkable
class CandidateModel(CountingModel, Protocol):
    """A model that scores only a few items per user."""

    def candidates(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the items that have a score, shape (B, C), padded with 0, and their scores. All others score 0."""


@runtime_checkable
class ErasableModel(Model, Protocol):
    """A model that stores events by user."""

    def erase_user(self, user: int) -> None:
        """Delete all events of the user in this row."""


@runtime_checkable
class TrainedModel(Model, Protocol):
    """A model that is trained by gradient descent: an `nn.Module` with these attributes and methods."""

    # What a row of a batch is:
    # - "target": a target with its history
    # - "window": a window of events, with a target after each
    # - "pair": a target without a history
    # - "click": a labelled target with its history, which may be empty
    # - "session-parallel": one event of a session
    batch_format: str
    seed: int
    moments: dict[str, Tensor]  # optimiser state of the dense weights; embedding tables keep their own

    def forward(self, batch: Batch) -> Forward:
        """Compute the training loss of a batch with targets and negatives."""

    def __call__(self, batch: Batch) -> Forward:
        """Call `forward`."""

    def train(self) -> object:
        """Switch to training mode: dropout is on."""

    def eval(self) -> object:
        """Switch to evaluation mode: dropout is off."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the model and its parts by name, including embedding tables."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the dense weights by name, without embedding tables."""


@runtime_checkable
class NegativeSampler(Protocol):
    """A trained model that chooses the negatives of its batches. Its `forward` draws none."""

    def draw_negatives(self, batch: Batch) -> Tensor:
        """Item rows (N,) to train the batch against. `batch.negatives_N` holds N items that were drawn uniformly."""


@runtime_checkable
class ClickModel(TrainedModel, ScoringModel, Protocol):
    """A model whose score is the log-odds of a click on the item. It also learns from exposures without a click."""

    def click_probabilities(self, batch: Batch, items: Tensor) -> Tensor:
        """Probability that the user clicks each item, shaped like `score`."""


@runtime_checkable
class EncodingModel(TrainedModel, Protocol):
    """A vector model that computes user vectors from item vectors, with gradients."""

    def encode(self, items_BTD: Tensor, batch: Batch) -> Tensor:
        """User vectors, shape (B, K, D), computed with gradients from the item vectors of the histories."""


@runtime_checkable
class UserVectorModel(TrainedModel, Protocol):
    """A vector model that computes user vectors in another way than `encode`."""

    def user_vectors(self, batch: Batch) -> Tensor:
        """User vectors, shape (B, K, D), without gradients."""


# A model whose score is the largest inner product of the item vector with one of the user's vectors. Its item vectors
# are in an `EmbeddingTable` named "items". `nn.scoring` computes vectors and scores.
VectorModel = EncodingModel | UserVectorModel


@runtime_checkable
class InterestModel(EncodingModel, Protocol):
    """A model with several interests per user, which are kept between spans."""

    @property
    def has_ordered_interests(self) -> bool:
        """Whether interests are tied to learned positions, so that only a user's last ones may be dropped."""

    def initial_interests(self, n: int) -> Tensor:
        """Return the initial vectors of new interests, shape (n, D)."""


@runtime_checkable
class ModelSpec(Protocol):
    """The options of a model and their defaults, as a frozen dataclass."""

    def build(self, seed: int) -> Model:
        """Build a model without users and items."""


@runtime_checkable
class HistorySpec(Protocol):
    """The options of a model that limits the length of histories."""

    @property
    def length(self) -> int:
        """Number of most recent events per user."""


@dataclass(frozen=True)
class State:
    """Everything that serving and the next update need."""

    model: Any  # a Model
    seed: int = 0
    spans_seen: int = 0  # number of spans that the state has learned, including the base block
    histories: Histories = field(default_factory=Histories.empty)
    interests: Interests | None = None
    base_epochs: int = 0  # epochs of the base block
    memory: Any = None  # the memory of the strategy, a tree of tensors and dataclasses
    costs: dict[str, float] = field(default_factory=dict)  # costs of the last update, by name
    shared_base: State | None = None  # state after the base block, if another strategy trained the same one


@runtime_checkable
class Strategy(Protocol):
    """A pure function from a state and a span to the next state."""

    def update(self, state: State, span: Span) -> State:
        """Return the next state. `state` stays unchanged.

        `state.histories` already holds the span's events, marked as due.
        """


LossTerm = Callable[[Batch, Forward], Tensor]  # a scalar that is added to the loss
