"""A state on a block of events -> the rank of each target, and facts about the targets to slice by."""

from dataclasses import dataclass

import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.data.batches import history_items, impression_targets, split_chunks, targets_at
from freshrec.data.histories import append_events, impressions_of, insert_events
from freshrec.data.stored_interests import stored_interests_of
from freshrec.learn.click_quality import target_click_probabilities
from freshrec.nn.ranking import target_ranks, target_ranks_among
from freshrec.replay.recipe_schema import ReplayRecipe, Unseen
from freshrec.types import NEVER, TEST, Batch, ClickModel, Events, Histories, Model, Span, State


@dataclass(frozen=True)
class SpanBlock:
    """A piece of a span: measured on, then absorbed."""

    events: Events
    offset: int  # where it begins in its span
    n_users: int  # known once it is over
    n_items: int  # known before it


def split_into_blocks(span: Span, n_items: int, cadence: int) -> list[SpanBlock]:
    """The span in `cadence` blocks; `n_items` are known before it."""
    blocks, offset = [], 0
    for events in span.blocks(cadence):
        blocks.append(SpanBlock(events, offset, span.n_users, n_items))
        offset += len(events)
        n_items = max(n_items, int(events.items_E.max()) if len(events) else 0)
    return blocks


@dataclass(frozen=True)
class Queries:
    """Targets with the history before each: everything needed to rank them now, or again later."""

    users_N: Tensor
    histories_NT: Tensor  # int32, all own events before the target, those inside the span too
    items_N: Tensor  # the targets
    events_N: Tensor  # where each stands in its span
    heldout_N: Tensor  # bool: never joins training; forgetting is measured on those
    n_items: int  # items that may be recommended, when ranked again: those known at the time

    def __len__(self) -> int:
        return len(self.users_N)

    def __getitem__(self, index_N: Tensor) -> "Queries":
        users_N, histories_NT, items_N = self.users_N[index_N], self.histories_NT[index_N], self.items_N[index_N]
        return Queries(users_N, histories_NT, items_N, self.events_N[index_N], self.heldout_N[index_N], self.n_items)


@dataclass(frozen=True)
class QueryOptions:
    """Which events of a block become queries."""

    role: int = TEST
    min_history: int = ReplayRecipe.min_history  # own events a query needs
    n_sampled: int = 0  # sampled items that a target is ranked among; 0: all items
    unseen: Unseen = ReplayRecipe.unseen  # events of items new to all: ranked like others, or dropped


def make_queries(recent: Histories, block: SpanBlock, length: int, options: QueryOptions = QueryOptions()) -> Queries:
    """Queries for the events of one role; targets with too few own events before are left out."""
    events, places_E = block.events, torch.arange(len(block.events))
    if options.unseen == "drop":
        places_E = (events.items_E <= block.n_items).nonzero()[:, 0]
        events = events[places_E]
    histories, rows_E = insert_events(recent, events, block.n_users)
    at_N = (events.role_E == options.role).nonzero()[:, 0]
    targets = targets_at(histories, rows_E[at_N])
    has_history_N = targets.history_lengths(options.min_history) >= options.min_history
    at_N, targets = at_N[has_history_N], targets[has_history_N]
    history_NT = history_items(targets, length).int()
    heldout_N, events_N = events.train_at_E[at_N] == NEVER, places_E[at_N] + block.offset
    return Queries(targets.users_N, history_NT, events.items_E[at_N], events_N, heldout_N, block.n_items)


def rank_queries(
    state: State, queries: Queries, readout: str = "recent", n_sampled: int = 0, size: int = 256
) -> Tensor:
    """(N,) the rank of each target among the items known when the query was made, or among `n_sampled` of them."""
    stored_interests = stored_interests_of(state.model, state.interests, state.spans_seen)
    lengths_N = (queries.histories_NT > 0).sum(1)
    rank_N = torch.zeros(len(queries))
    for index in split_chunks(torch.argsort(lengths_N, stable=True), size):
        longest = int(lengths_N[index].max())
        history_BT = queries.histories_NT[index][:, queries.histories_NT.shape[1] - longest :].long()
        batch = Batch(queries.users_N[index], history_BT, categories_I=state.histories.categories_I)
        batch = batch if stored_interests is None else stored_interests.attach(batch)
        if n_sampled:
            rank_N[index] = _rank_among_sampled(state.model, batch, queries[index], readout, n_sampled)
        else:
            rank_N[index] = target_ranks(state.model, batch, queries.items_N[index], readout, queries.n_items)
    return rank_N


def _rank_among_sampled(model: Model, batch: Batch, queries: Queries, readout: str, n: int) -> Tensor:
    """Ranks among n sampled items; a target that nobody could have recommended is found by none."""
    rank_B = target_ranks_among(model, batch, queries.items_N, sample_negatives(queries, n), readout)
    return torch.where(queries.items_N <= queries.n_items, rank_B, torch.inf)


def sample_negatives(queries: Queries, n: int) -> Tensor:
    """(N, n) distinct items known then, neither the target nor in the history; 0 where 4 n draws do not give as many.

    Which are drawn depends on the place of the event in its span alone: all models and strategies face the same, but
    for what those with a longer history leave out.
    """
    # no named stream: published results are of these negatives
    key_ND = queries.events_N[:, None] * 1_000_003 + torch.arange(4 * n)
    items_ND = splitmix64(key_ND) % max(queries.n_items, 1) + 1
    is_target_ND = items_ND == queries.items_N[:, None]
    bad_ND = is_target_ND | _drawn_before(items_ND) | _is_among(items_ND, queries.histories_NT)
    first_Nn = bad_ND.byte().argsort(dim=1, stable=True)[:, :n]  # the good ones, in the order in which they were drawn
    return torch.where(bad_ND.gather(1, first_Nn), 0, items_ND.gather(1, first_Nn))


def _drawn_before(items_ND: Tensor) -> Tensor:
    """(N, D) bool: the same item stands further left in the row."""
    sorted_ND, order_ND = items_ND.sort(dim=1, stable=True)
    is_again_ND = F.pad(sorted_ND[:, 1:] == sorted_ND[:, :-1], (1, 0))
    return torch.zeros_like(is_again_ND).scatter_(1, order_ND, is_again_ND)


def _is_among(items_ND: Tensor, histories_NT: Tensor) -> Tensor:
    """(N, D) bool: the item is in the row's history. By binary search: comparing all with all takes N D T cells."""
    if not histories_NT.shape[1]:
        return torch.zeros_like(items_ND, dtype=torch.bool)
    own_NT = histories_NT.long().sort(1).values
    at_ND = torch.searchsorted(own_NT, items_ND).clamp(max=own_NT.shape[1] - 1)
    return own_NT.gather(1, at_ND) == items_ND


def splitmix64(keys: Tensor) -> Tensor:
    """Each int64 as another one of 0 .. 2^62 - 1, as good as random (splitmix64, wrapping around)."""
    z = keys + 0x1E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0x3F58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x14D049BB133111EB
    return (z ^ (z >> 31)) & (2**62 - 1)


def predict_clicks(state: State, block: SpanBlock, options: QueryOptions) -> pl.DataFrame:
    """How likely the model holds it that each labelled event of one role is taken: event, user, label, p."""
    events, model = block.events, state.model
    assert events.labels_E is not None and isinstance(model, ClickModel)
    at_N = ((events.role_E == options.role) & ~events.labels_E.isnan()).nonzero()[:, 0]
    targets = impression_targets(append_events(state.histories, events, block.n_users), impressions_of(events[at_N]))
    has_history_N = targets.history_lengths(options.min_history) >= options.min_history
    targets, at_N = targets[has_history_N], at_N[has_history_N]
    columns = {"event": at_N + block.offset, "user": targets.users_N, "label": events.labels_E[at_N]}
    columns["p"] = target_click_probabilities(model, targets)
    return pl.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
