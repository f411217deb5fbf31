"""The data behind lists: a state, its catalogs, item categories and popular items."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import polars as pl
import torch
from torch import Tensor

from freshrec.data.catalog import Catalog
from freshrec.data.histories import append_events
from freshrec.data.stored_interests import StoredInterests, stored_interests_of
from freshrec.models.absorb import grow_items
from freshrec.nn.ranking import VectorSearch
from freshrec.nn.scoring import item_vectors
from freshrec.recommender.click_overlay import ClickOverlay
from freshrec.recommender.diversity import item_categories
from freshrec.types import Events, State, TrainedModel


def _empty_categories() -> pl.DataFrame:
    return pl.DataFrame(schema={"item": pl.Int64, "category": pl.String})


def _empty_events() -> Events:
    return Events.trainable(*torch.zeros(2, 0, dtype=torch.int64))


@dataclass(frozen=True, eq=False)
class ServedState:
    """All data that answers depend on. It is replaced as a whole."""

    state: State  # the model, and the data for its next update
    counts: State  # popularity, for unknown users; its histories are complete, to exclude all seen items
    users: Catalog
    items: Catalog
    categories: pl.DataFrame = field(default_factory=_empty_categories)  # item (a row), category
    pending: Events = field(default_factory=_empty_events)  # events that the model has not learned yet; not in `state`
    overlay: ClickOverlay = field(default_factory=ClickOverlay)  # clicks newer than all of that, in no history
    search: VectorSearch | None = None  # over item vectors; None = score all items

    @property
    def newest_time(self) -> int | None:
        """Time of the newest event; None without events."""
        times_R = self.counts.histories.times_R
        return int(times_R.max()) if len(times_R) else None

    @cached_property
    def current_state(self) -> State:
        """The state with the pending events in its histories."""
        if not len(self.pending):
            return self.state
        recent = append_events(self.state.histories, self.pending, len(self.users))
        return grow_items(replace(self.state, histories=recent), len(self.items))

    @cached_property
    def stored_interests(self) -> StoredInterests | None:
        """Stored interests for the batches of `current_state`."""
        state = self.current_state
        return stored_interests_of(state.model, state.interests, state.spans_seen)

    @cached_property
    def is_counting(self) -> bool:
        """Whether the model is a counting model, for which score 0 means no opinion."""
        return not isinstance(self.state.model, TrainedModel)

    @property
    def serving_copy(self) -> "ServedState":
        """A copy that gives the same answers with less memory, by sharing equal histories. It cannot be updated."""
        state, counts = self.current_state, self.counts
        model_histories, all_histories = state.histories, counts.histories
        columns = ("offsets_U", "items_R", "times_R")  # `due_R` matters for training only
        if all(torch.equal(getattr(model_histories, name), getattr(all_histories, name)) for name in columns):
            counts = replace(counts, histories=model_histories)  # true until a history is truncated
        return replace(self, state=state, counts=counts, pending=_empty_events())

    def n_seen(self, users_N: Tensor) -> Tensor:
        """Return the number of past events of each user row, without clicks of the overlay, shape (N,)."""
        histories = self.counts.histories
        is_known_N = users_N <= histories.n_users
        first_N = torch.where(is_known_N, users_N, 0)
        return histories.offsets_U[first_N + 1] - histories.offsets_U[first_N]

    @cached_property
    def item_norms_I(self) -> Tensor:
        """Norm of each item vector by row, at least 1e-12."""
        lengths_I: Tensor = item_vectors(self.state.model).norm(dim=1)
        return lengths_I.clamp(min=1e-12)

    @cached_property
    def categories_I(self) -> Tensor:
        """Category number of each item by row; 0 = none. Raises OptionError if no item has a category."""
        return item_categories(self.categories, len(self.items))
