"""Item-kNN: recommends items that occur near the user's recent items in other histories. The strongest baseline.

kind="cosine" is item-kNN without a limit on the number of neighbours. kind="markov" follows the order of events, and
old pairs count less.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from scipy import sparse
from torch import Tensor

from freshrec.config import HISTORY_LENGTH, Count, check_options
from freshrec.data.batches import close_gaps
from freshrec.models.model_text import model_text
from freshrec.nn.forward_decay import ForwardDecay, window_size
from freshrec.nn.sparse import (
    BoolArray,
    Float32Array,
    Float64Array,
    Int32Array,
    build_csr,
    offsets_from_counts,
    select_scores,
)
from freshrec.types import Batch, Events, Histories

CHUNK_EVENTS = 200_000  # events whose pairs are in memory at once (4 million pairs with a window of 20)


@dataclass(frozen=True)
class CooccurrenceRule:
    """Constants of one kind of item-kNN, for counting pairs and for building a query from a history."""

    pair_window: int  # two events of a user make a pair if they are at most this many events apart
    weighs_by_gap: bool  # whether a pair weighs 1 / (events apart) instead of 1
    is_directed: bool  # whether a pair counts in the order of events only
    window_decay: float  # weight of a pair that is one window old; 1 = no decay
    query_items: int  # number of most recent history items in a query
    position_decay: float  # weight of a query item = this, to the power of its age in events


COSINE = CooccurrenceRule(
    pair_window=20, weighs_by_gap=False, is_directed=False, window_decay=1.0, query_items=20, position_decay=0.85
)
MARKOV = CooccurrenceRule(
    pair_window=3, weighs_by_gap=True, is_directed=True, window_decay=0.8, query_items=5, position_decay=0.5
)
PRIOR_EVENTS = 10.0  # events added to the count of every item, so that rare items do not win by chance


@dataclass(frozen=True)
class ItemKNNSpec:
    """Options of item-kNN."""

    kind: Annotated[
        Literal["cosine", "markov"],
        Field(description='"cosine" of co-occurrence counts; "markov" = counts of transitions in order, with decay.'),
    ] = "cosine"
    length: Count = HISTORY_LENGTH  # Number of most recent events per user that the model reads.

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> ItemKNN:
        """Return a new model without users and items. The seed is not used."""
        return ItemKNN(self)


class ItemKNN:
    """score(item) = sum over recent items a of decay^age(a) idf(a) pairs(a, item) / sqrt((d_a + 10) (d_item + 10)).

    Here d is the number of events of an item, and idf(a) = log(1 + all events / (1 + d_a)).

    A Markov chain sums decay^age(a) pairs(a, item) / (10 + d_a), where d_a is the sum of pairs(a, .). A pair weighs
    0.8^(age / window): its age is the number of events absorbed after its later event. A window is a sixth of the base
    block, which is the first block absorbed. Except for rounding, the counts do not depend on how later events are cut
    into blocks.

    An item also pairs with itself, so that repeats are learned. Without these pairs, hr@20 of item-kNN is 0.018 lower
    on the UCI retail log and 0.005 lower on Taobao, and higher on no log.
    """

    __repr__ = model_text

    def __init__(self, spec: ItemKNNSpec) -> None:
        self.spec = spec
        self.rule = MARKOV if spec.kind == "markov" else COSINE
        self.n_users = 0
        self.n_items = 0
        self.last_counted_item = 0  # largest item row that was counted; queries leave out later items
        self.item_mass_I = np.zeros(1, dtype=np.float32)  # d, in the units of `clock`
        self.pair_counts_II: Any = sparse.csr_array((1, 1), dtype=np.float32)
        self.window_events = 0  # 0 until the base block is absorbed; a caller that absorbs it in parts sets this first
        self.clock = ForwardDecay()  # of the stored pairs and d; not advanced without decay
        self._cached_weights: tuple[Float32Array, Float32Array] | None = None  # computed on first use

    def __deepcopy__(self, memo: dict[int, Any]) -> ItemKNN:
        """Return a shallow copy: arrays are replaced, never changed in place."""
        return copy.copy(self)

    def grow(self, n_users: int, n_items: int) -> None:
        """Add rows for new users and items, without events and pairs."""
        self.item_mass_I = np.append(self.item_mass_I, np.zeros(n_items - self.n_items, dtype=np.float32))
        self._cached_weights = None
        old = self.pair_counts_II
        indptr = np.append(old.indptr, np.full(n_items - self.n_items, old.indptr[-1]))
        self.pair_counts_II = sparse.csr_array((old.data, old.indices, indptr), shape=(n_items + 1, n_items + 1))
        self.n_users, self.n_items = n_users, n_items

    def absorb(self, events: Events, histories: Histories) -> None:
        """Count every pair whose later event is new. The earlier event may be in the user's history."""
        if len(events) == 0:
            return
        order = np.argsort(events.users_E.numpy(), kind="stable")
        users, items = (ids_E.numpy()[order].astype(np.int32) for ids_E in (events.users_E, events.items_E))
        clock, weights_E, scale = self.clock, np.ones(len(order)), 1.0
        if self.rule.window_decay < 1:
            self.window_events = self.window_events or window_size(len(events))
            clock, weights_E, scale = self.clock.advance(len(events), _half_life(self.rule, self.window_events))
            weights_E = weights_E[order]
        parts: list[Any] = []
        for part in _split_between_users(users, CHUNK_EVENTS):
            parts.append(self._count_pairs(users[part], items[part], weights_E[part], histories))
            # parts of similar size are added, else each new part costs a pass over all earlier ones
            while len(parts) > 1 and parts[-2].nnz <= 2 * parts[-1].nnz:
                parts[-2:] = [parts[-2] + parts[-1]]
        while len(parts) > 1:
            parts[-2:] = [parts[-2] + parts[-1]]
        pairs_II = (self.pair_counts_II if scale == 1 else self.pair_counts_II * np.float32(scale)) + parts[0]
        if scale != 1:
            pairs_II.eliminate_zeros()  # pairs that are too old for single precision
        self.pair_counts_II, self.clock, self._cached_weights = pairs_II, clock, None
        self.last_counted_item = max(self.last_counted_item, int(items.max()))
        if self.rule.is_directed:
            self.item_mass_I = pairs_II.sum(axis=1)
        else:
            self.item_mass_I = self.item_mass_I + np.bincount(items, minlength=self.n_items + 1).astype(np.float32)

    def _count_pairs(self, users: Int32Array, items: Int32Array, weights: Float64Array, histories: Histories) -> Any:
        """Return the pairs of the users' new events as a sparse (I, I) matrix with sorted columns."""
        before_users, before_items = _recent_events(np.unique(users), histories, self.rule.pair_window)
        order = np.argsort(np.append(before_users, users), kind="stable")  # each user's old events, then the new ones
        is_new_P = order >= len(before_users)
        users_P, items_P = np.append(before_users, users)[order], np.append(before_items, items)[order]
        if self.rule.is_directed:
            weights_P = np.append(np.zeros(len(before_users)), weights)[order]
            return _count_successions(users_P, items_P, is_new_P, weights_P, self.rule, self.n_items + 1)
        return _count_cooccurrences(users_P, items_P, is_new_P, self.rule.pair_window, self.n_items + 1)

    def sparse_scores(self, batch: Batch) -> Any:
        """Return the scores as a sparse matrix (B, I + 1)."""
        scores_BI = self._query_weights(batch) @ self.pair_counts_II
        if not self.rule.is_directed:
            np.divide(scores_BI.data, self._item_weights()[1].take(scores_BI.indices), out=scores_BI.data)
        return scores_BI

    def most_influential_item(self, batch: Batch, item: int) -> int:
        """Return the item of the history event that adds most to the score of `item`, for a batch of one; 0 = none.

        On ties, it is the oldest event.
        """
        past_item, value = max(event_contributions(self, batch, item), key=lambda pair: pair[1], default=(0, 0.0))
        return past_item if value > 0 else 0

    def score(self, batch: Batch, items: Tensor) -> Tensor:
        """Return the scores (B, N) of `items`, from the recent items of each row's history."""
        return select_scores(torch.from_numpy(self.sparse_scores(batch).toarray()), items)

    def _query_weights(self, batch: Batch) -> Any:
        """Return the weights of the recent items as a sparse matrix (B, I + 1)."""
        history_BT = batch.history_BT
        if history_BT.shape[1] and history_BT.numpy().max(initial=0) > self.last_counted_item:
            history_BT = close_gaps(torch.where(history_BT <= self.last_counted_item, history_BT, 0))
        recent_BT = history_BT[:, -self.rule.query_items :].numpy()
        age_T = np.arange(recent_BT.shape[1] - 1, -1, -1)
        weight_BT = (self._item_weights()[0].take(recent_BT) * self.rule.position_decay**age_T).astype(np.float32)
        offsets_B = np.arange(len(batch) + 1) * recent_BT.shape[1]
        return build_csr(weight_BT.ravel(), recent_BT.ravel(), offsets_B, self.n_items + 1)

    def _item_weights(self) -> tuple[Float32Array, Float32Array]:
        """Return the weight of a query item before decay (0 for padding), and sqrt(d + 10), both of shape (I + 1,)."""
        if self._cached_weights is None:
            root_I: Any = np.sqrt(self.item_mass_I + PRIOR_EVENTS)
            weight_I: Any
            if self.rule.is_directed:
                half_life = _half_life(self.rule, max(1, self.window_events))
                weight_I = 1 / (self.item_mass_I + PRIOR_EVENTS / self.clock.factor(half_life))  # = factor / (10 + d)
            else:
                weight_I = np.log1p(self.item_mass_I.sum() / (1 + self.item_mass_I)) / root_I
            weight_I[0] = 0.0
            self._cached_weights = weight_I, root_I
        return self._cached_weights

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that the model has learned, as tensors by name."""
        arrays = {"mass_I": self.item_mass_I, "counts": self.pair_counts_II.data, "later": self.pair_counts_II.indices}
        arrays |= {
            "offsets_I": self.pair_counts_II.indptr,
            "sizes": np.array([self.n_users, self.n_items, self.last_counted_item]),
        }
        if self.rule.window_decay < 1:
            arrays["clock"] = np.array([self.window_events, self.clock.n_events, self.clock.shift])
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Load what `state_dict` returned.

        A Markov chain that version 0.1.0 saved has no clock. Its counts are then used as they are, and their ages start
        now. The window is a sixth of the number of events behind the counts (`_estimate_window`); a blend sets its own.
        """
        self.n_users, self.n_items, self.last_counted_item = tensors["sizes"].tolist()
        self.item_mass_I, self._cached_weights = tensors["mass_I"].numpy(), None
        columns = tuple(tensors[name].numpy() for name in ("counts", "later", "offsets_I"))
        self.pair_counts_II = sparse.csr_array(columns, shape=(self.n_items + 1, self.n_items + 1))
        if self.rule.window_decay < 1:
            missing = torch.tensor([_estimate_window(self.rule, float(self.item_mass_I.sum())), 0, 0])
            self.window_events, n_events, shift = tensors.get("clock", missing).tolist()
            self.clock = ForwardDecay(n_events, shift)


def event_contributions(model: ItemKNN, batch: Batch, item: int) -> list[tuple[int, float]]:
    """Return each query event's item and its addend of the score of `item`, for a batch of one, oldest first."""
    query_BI = model._query_weights(batch)
    weighted_T = query_BI.data * model.pair_counts_II[query_BI.indices][:, [item]].toarray()[:, 0]
    root = 1.0 if model.rule.is_directed else float(model._item_weights()[1][item])
    return list(zip(query_BI.indices.tolist(), (weighted_T.astype(np.float64) / root).tolist()))


def _half_life(rule: CooccurrenceRule, window_events: int) -> float:
    """Return the number of events after which a pair has half its weight."""
    return window_events * math.log(0.5) / math.log(rule.window_decay)


def _estimate_window(rule: CooccurrenceRule, mass: float) -> int:
    """Estimate the window, in events, from the sum of all counts; 0 if nothing is counted.

    An event makes pairs that weigh 1 + 1/2 + 1/3 with the three events before it. So the window is about a sixth of
    the base block if no block followed. Each block multiplies older counts by 0.8, so that after many blocks the window
    is 5/6 of a block.
    """
    each = sum(1 / gap if rule.weighs_by_gap else 1 for gap in range(1, rule.pair_window + 1))
    return window_size(round(mass / each)) if mass > 0 else 0


def _count_successions(
    users_P: Int32Array,
    items_P: Int32Array,
    is_new_P: BoolArray,
    weights_P: Float64Array,
    rule: CooccurrenceRule,
    n: int,
) -> Any:
    """Return the weighted number of times that one item follows another, as a sparse (n, n) matrix.

    The later event of a pair is new. The events P are sorted by user. A pair has the weight of its later event,
    divided by the gap if `rule.weighs_by_gap`.
    """
    earlier, later, weights = [], [], []
    for gap in range(1, rule.pair_window + 1):
        is_pair = is_new_P[gap:] & (users_P[gap:] == users_P[:-gap]) & (items_P[:-gap] > 0)  # row 0 is a held-out event
        earlier.append(items_P[:-gap][is_pair])
        later.append(items_P[gap:][is_pair])
        weight_N = weights_P[gap:][is_pair] * (1 / gap if rule.weighs_by_gap else 1)
        weights.append(weight_N.astype(np.float32))
    ends = np.concatenate(earlier), np.concatenate(later)
    return sparse.coo_array((np.concatenate(weights), ends), shape=(n, n)).tocsr()


def _count_cooccurrences(users_P: Int32Array, items_P: Int32Array, is_new_P: BoolArray, window: int, n: int) -> Any:
    """Return how often two items occur near each other, in either order, as a sparse (n, n) matrix.

    The later event of a pair is new. The counts are the product of two matrices: the item of each event, and the items
    of the new events that follow it. Transposing sorts the columns in a quarter of the time of sorting. The counts are
    whole numbers, so the order of summation does not matter.
    """
    starts = np.flatnonzero(np.diff(users_P, prepend=-1))
    n_each, n_new = np.diff(starts, append=len(users_P)), np.add.reduceat(is_new_P, starts, dtype=np.int64)
    next_P, ends_P = np.arange(1, len(users_P) + 1), np.repeat(starts + n_each, n_each)
    first_P = np.maximum(next_P, ends_P - np.repeat(n_new, n_each))
    n_P = np.maximum(np.minimum(next_P + window, ends_P) - first_P, 0)
    n_P[items_P == 0] = 0  # a held-out event
    offsets_P = offsets_from_counts(n_P)
    following_items_E = items_P[np.arange(offsets_P[-1]) + np.repeat(first_P - offsets_P[:-1], n_P)]
    following_items_PI = build_csr(np.ones(len(following_items_E), np.float32), following_items_E, offsets_P, n)
    event_item_PI = build_csr(np.ones(len(items_P), np.float32), items_P, np.arange(len(items_P) + 1), n)
    transposed_II = (event_item_PI.T.tocsr() @ following_items_PI).T.tocsr()
    return transposed_II.T.tocsr() + transposed_II


def _split_between_users(users: Int32Array, n_events: int) -> list[slice]:
    """Cut sorted users into slices of about `n_events` events, without splitting a user."""
    starts = np.append(np.flatnonzero(np.diff(users, prepend=-1)), len(users))
    cuts = starts[np.searchsorted(starts, np.arange(0, len(users), n_events))]
    edges = np.append(cuts, len(users))
    return [slice(a, b) for a, b in zip(edges, edges[1:]) if a < b]


def _recent_events(users: Int32Array, histories: Histories, n: int) -> tuple[Int32Array, Int32Array]:
    """Return the users and items of the last `n` events in each of these users' histories, oldest first."""
    users = users[users <= histories.n_users]
    starts, ends = histories.offsets_U.numpy()[users], histories.offsets_U.numpy()[users + 1]
    n_each = np.minimum(ends - starts, n)
    rows = np.repeat(ends - np.cumsum(n_each), n_each) + np.arange(n_each.sum())
    return np.repeat(users, n_each), histories.items_R.numpy()[rows]
