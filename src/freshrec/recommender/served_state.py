"""What lists are made from: a state, the ids of its rows, item categories and popular items."""

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
    """What every answer is made of, and what changes together."""

    state: State  # the model, and what its next update needs
    counts: (
        State  # popularity, for strangers; its histories are never truncated, so it knows all items that a user has had
    )
    users: Catalog
    items: Catalog
    categories: pl.DataFrame = field(default_factory=_empty_categories)  # item (a row), category
    pending: Events = field(default_factory=_empty_events)  # newer than what the model has learnt; not in `state`
    overlay: ClickOverlay = field(default_factory=ClickOverlay)  # newer than all of that; in no history either
    search: VectorSearch | None = None  # in the model's item vectors; None: all of them are scored

    @property
    def newest_time(self) -> int | None:
        """The largest time of any event known; None where there is none."""
        times_R = self.counts.histories.times_R
        return int(times_R.max()) if len(times_R) else None

    @cached_property
    def current_state(self) -> State:
        """The state in whose histories the pending events are: users are seen as they are now."""
        if not len(self.pending):
            return self.state
        recent = append_events(self.state.histories, self.pending, len(self.users))
        return grow_items(replace(self.state, histories=recent), len(self.items))

    @cached_property
    def stored_interests(self) -> StoredInterests | None:
        """What travels with the batches of `current_state`."""
        state = self.current_state
        return stored_interests_of(state.model, state.interests, state.spans_seen)

    @cached_property
    def is_counting(self) -> bool:
        """Whether a score of 0 is no opinion."""
        return not isinstance(self.state.model, TrainedModel)

    @property
    def serving_copy(self) -> "ServedState":
        """The same answers from less memory: nothing is pending, and equal histories are one. It cannot be updated."""
        state, counts = self.current_state, self.counts
        model_histories, all_histories = state.histories, counts.histories
        columns = ("offsets_U", "items_R", "times_R")  # what is due concerns those who learn
        if all(torch.equal(getattr(model_histories, name), getattr(all_histories, name)) for name in columns):
            counts = replace(counts, histories=model_histories)  # as long as no history was truncated
        return replace(self, state=state, counts=counts, pending=_empty_events())

    @cached_property
    def item_norms_I(self) -> Tensor:
        """The length of each item's vector, at least a little, from item 0."""
        lengths_I: Tensor = item_vectors(self.state.model).norm(dim=1)
        return lengths_I.clamp(min=1e-12)

    @cached_property
    def categories_I(self) -> Tensor:
        """The number of each item's category, from item 0; 0: none. OptionError where no item has one."""
        return item_categories(self.categories, len(self.items))
