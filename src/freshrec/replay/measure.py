"""Rank the targets of a block of events with the model of a state, and predict clicks."""

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
    """A part of a span: the model is tested on it, then absorbs it."""

    events: Events
    offset: int  # position of its first event in the span
    n_users: int  # users known after it
    n_items: int  # items known before it


def split_into_blocks(span: Span, n_items: int, cadence: int) -> list[SpanBlock]:
    """Split a span into `cadence` blocks; `n_items` is the number of items known before the span."""
    blocks, offset = [], 0
    for events in span.blocks(cadence):
        blocks.append(SpanBlock(events, offset, span.n_users, n_items))
        offset += len(events)
        n_items = max(n_items, int(events.items_E.max()) if len(events) else 0)
    return blocks


@dataclass(frozen=True)
class Queries:
    """Targets with the history before each: everything needed to rank them now and later."""

    users_N: Tensor
    histories_NT: Tensor  # int32, the user's last events before the target, including those in the same span
    items_N: Tensor  # the targets
    events_N: Tensor  # position of each target in its span
    heldout_N: Tensor  # bool: the target never joins training; forgetting is measured on these
    n_items: int  # number of items known when the queries were made; later rankings use the same items

    def __len__(self) -> int:
        return len(self.users_N)

    def __getitem__(self, index_N: Tensor) -> "Queries":
        users_N, histories_NT, items_N = self.users_N[index_N], self.histories_NT[index_N], self.items_N[index_N]
        return Queries(users_N, histories_NT, items_N, self.events_N[index_N], self.heldout_N[index_N], self.n_items)


@dataclass(frozen=True)
class QueryOptions:
    """Options for making queries from the events of a block, and for the candidates of a query."""

    role: int = TEST  # role of the events that become queries: TEST or VALID
    min_history: int = ReplayRecipe.min_history  # events that a user needs before a target
    n_sampled: int = 0  # number of sampled items that a target is ranked among; 0 = all items
    unseen: Unseen = ReplayRecipe.unseen  # targets whose items no model has seen: ranked as a miss, or dropped


def make_queries(recent: Histories, block: SpanBlock, length: int, options: QueryOptions = QueryOptions()) -> Queries:
    """Make queries of the events of one role; targets with too short a history are left out."""
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
    """Rank of each target, shape (N,), among the items known when the query was made, or `n_sampled` of them."""
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
    """Ranks among n sampled items, shape (B,); infinite for a target that was not known when the query was made."""
    rank_B = target_ranks_among(model, batch, queries.items_N, sample_negatives(queries, n), readout)
    return torch.where(queries.items_N <= queries.n_items, rank_B, torch.inf)


def sample_negatives(queries: Queries, n: int) -> Tensor:
    """Draw distinct known items, shape (N, n), without the target and the history; 0 where 4 n draws are not enough.

    The draw depends only on the position of the event in its span. All models and strategies face the same negatives,
    except for those that a longer history excludes.
    """
    # no named stream: the published results use these negatives
    key_ND = queries.events_N[:, None] * 1_000_003 + torch.arange(4 * n)
    items_ND = splitmix64(key_ND) % max(queries.n_items, 1) + 1
    is_target_ND = items_ND == queries.items_N[:, None]
    bad_ND = is_target_ND | _drawn_before(items_ND) | _is_among(items_ND, queries.histories_NT)
    first_Nn = bad_ND.byte().argsort(dim=1, stable=True)[:, :n]  # the valid ones, in the order of the draw
    return torch.where(bad_ND.gather(1, first_Nn), 0, items_ND.gather(1, first_Nn))


def _drawn_before(items_ND: Tensor) -> Tensor:
    """Whether the same item occurs earlier in the row, shape (N, D)."""
    sorted_ND, order_ND = items_ND.sort(dim=1, stable=True)
    is_again_ND = F.pad(sorted_ND[:, 1:] == sorted_ND[:, :-1], (1, 0))
    return torch.zeros_like(is_again_ND).scatter_(1, order_ND, is_again_ND)


def _is_among(items_ND: Tensor, histories_NT: Tensor) -> Tensor:
    """Whether the item is in the row's history, shape (N, D). A binary search avoids an (N, D, T) comparison."""
    if not histories_NT.shape[1]:
        return torch.zeros_like(items_ND, dtype=torch.bool)
    own_NT = histories_NT.long().sort(1).values
    at_ND = torch.searchsorted(own_NT, items_ND).clamp(max=own_NT.shape[1] - 1)
    return own_NT.gather(1, at_ND) == items_ND


def splitmix64(keys: Tensor) -> Tensor:
    """Hash each int64 to a number from 0 to 2^62 - 1 (splitmix64 with wrap-around)."""
    z = keys + 0x1E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0x3F58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x14D049BB133111EB
    return (z ^ (z >> 31)) & (2**62 - 1)


def predict_clicks(state: State, block: SpanBlock, options: QueryOptions) -> pl.DataFrame:
    """Predicted click probability of each labelled event of one role, with columns event, user, label, p."""
    events, model = block.events, state.model
    assert events.labels_E is not None and isinstance(model, ClickModel)
    at_N = ((events.role_E == options.role) & ~events.labels_E.isnan()).nonzero()[:, 0]
    targets = impression_targets(append_events(state.histories, events, block.n_users), impressions_of(events[at_N]))
    has_history_N = targets.history_lengths(options.min_history) >= options.min_history
    targets, at_N = targets[has_history_N], at_N[has_history_N]
    columns = {"event": at_N + block.offset, "user": targets.users_N, "label": events.labels_E[at_N]}
    columns["p"] = target_click_probabilities(model, targets)
    return pl.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
