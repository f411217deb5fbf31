"""The experts of a blend: the candidates that they propose for a user, and the features of each candidate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from freshrec.data.batches import Targets, close_gaps, split_chunks
from freshrec.models.blend.features import (
    ITEM_FEATURES,
    OWN_FEATURES,
    USER_FEATURES,
    ItemStatistics,
    own_history_features,
    user_features,
)
from freshrec.models.item_knn import ItemKNN, ItemKNNSpec
from freshrec.models.pooled import Pooled, PooledSpec
from freshrec.models.popularity import Popularity, PopularitySpec
from freshrec.models.repeat import Repeat, RepeatSpec
from freshrec.models.user_knn import UserKNNSpec
from freshrec.nn.sparse import (
    CandidateCells,
    Float32Array,
    Int64Array,
    ItemOccurrences,
    distinct_items,
    top_k_entries,
)
from freshrec.types import Batch, CountingModel, Events, Histories, StateDictModel

COUNTER_SPECS: dict[str, Any] = {
    "popularity": PopularitySpec(),
    "popularity-1": PopularitySpec(weighting="decay", half_life=1.0),
    "popularity-1/4": PopularitySpec(weighting="decay", half_life=1 / 4),
    "popularity-1/16": PopularitySpec(weighting="decay", half_life=1 / 16),
    "repeat-last": RepeatSpec(),
    "repeat-freq": RepeatSpec(order="freq"),
    "item-knn": ItemKNNSpec(),
    "markov": ItemKNNSpec(kind="markov"),
    "user-knn": UserKNNSpec(),
}
TRAINED_SPEC = PooledSpec()
EXPERT_NAMES = (*COUNTER_SPECS, "pooled")
N_EXPERTS = len(EXPERT_NAMES)
FEATURES = (
    *(f"share {name}" for name in EXPERT_NAMES),
    *(f"rank {name}" for name in EXPERT_NAMES),
    *OWN_FEATURES,
    *ITEM_FEATURES,
    *USER_FEATURES,
)


class Slots:
    """The columns of each group of features in `FEATURES`."""

    share = slice(0, N_EXPERTS)  # ln of the candidate's share of each expert's total score
    rank = slice(share.stop, share.stop + N_EXPERTS)  # ln of the candidate's rank by each expert
    own = slice(rank.stop, rank.stop + len(OWN_FEATURES))
    item = slice(own.stop, own.stop + len(ITEM_FEATURES))
    user = slice(item.stop, item.stop + len(USER_FEATURES))


SHARE_COLUMN = {name: FEATURES.index(f"share {name}") for name in EXPERT_NAMES}
RANK_COLUMN = {name: FEATURES.index(f"rank {name}") for name in EXPERT_NAMES}
POOLED = EXPERT_NAMES.index("pooled")  # the trained expert
POPULARITY_EXPERTS = [
    name for name, spec in COUNTER_SPECS.items() if isinstance(spec, PopularitySpec)
]  # their scores are the same for every user
# An item that an expert does not score gets a small share instead of 0. Over all known items, these shares sum to
# FLOOR_EVENTS.
FLOOR_EVENTS = 0.1
MAX_CELLS = 8_000_000  # users x items in memory at once
POOL_EXPERT = "popularity-1"
POOL_SIZE = 8192  # The trained expert proposes only items among the POOL_SIZE most popular ones by POOL_EXPERT.


class Expert(CountingModel, StateDictModel, Protocol):
    """A counting model as part of a blend."""


class SparseExpert(Expert, Protocol):
    """An expert that scores only a few items per user."""

    def sparse_scores(self, batch: Batch) -> Any:
        """Score of each item as a sparse matrix, shape (B, I + 1). A missing entry is 0 and means no opinion."""


@dataclass(frozen=True)
class ExpertCache:
    """Values that change only when the experts absorb events or are trained."""

    share_floor: float  # share of an item that an expert does not score
    repeat_rate: float  # share of all events that repeat an item of their user
    x_IF: Float32Array  # (I + 1, F) features of all items for a user without history
    log_rank_K: Tensor  # ln of ranks 1, 2, ...; the last entry is for items that an expert does not propose
    popular_items_P: Int64Array  # items that any popularity expert proposes, ascending
    pool_items_S: Tensor  # items that the trained expert may propose; it has learned all of them
    pool_vectors_SD: Tensor  # their vectors

    def top_of_pool(self, vectors_BD: Tensor, known_B: Tensor, k: int) -> Int64Array:
        """The k items of the pool that the trained expert scores highest (B, K); 0 for a user it cannot encode."""
        best_BK = (vectors_BD @ self.pool_vectors_SD.T).topk(min(k, len(self.pool_items_S))).indices
        items_BK: Int64Array = torch.where(known_B[:, None], self.pool_items_S[best_BK], 0).numpy()
        return items_BK

    def features_of(self, items_BC: Int64Array) -> Float32Array:
        """Features of the candidates for a user without history, shape (1 + B C, F), one row per `CandidateCells` cell.

        Row 0 receives the values of all other items. It is never read.
        """
        x_MF = np.empty((1 + items_BC.size, len(FEATURES)), np.float32)
        self.x_IF.take(items_BC.ravel(), axis=0, out=x_MF[1:], mode="clip")  # "raise" would copy first
        return x_MF


class Experts:
    """The counting experts and one trained expert.

    Each expert proposes its best items as candidates. Experts and item statistics supply the features of a candidate.
    """

    def __init__(self, items_per_expert: int, length: int, seed: int) -> None:
        self.items_per_expert, self.length, self.n_items = items_per_expert, length, 0
        self.counters: dict[str, Expert] = {name: counter.build(seed) for name, counter in COUNTER_SPECS.items()}
        self.trained_model: Pooled = TRAINED_SPEC.build(seed)  # the strategy trains it; before, it scores no item
        self.item_statistics = ItemStatistics.empty()
        self.window_events = 0  # unit of all ages: a sixth of the base block, in events; 0 until `set_window`
        self._cache: ExpertCache | None = None  # built at first use

    def grow(self, n_users: int, n_items: int) -> None:
        """Add rows for new users and items."""
        for expert in (*self.counters.values(), self.trained_model):
            expert.grow(n_users, n_items)
        self.item_statistics.grow(n_items)
        self.n_items, self._cache = n_items, None

    def absorb(self, events: Events, histories: Histories, targets: Targets) -> None:
        """Count the events. `targets` holds the same events with the histories before them."""
        for counter in self.counters.values():
            counter.absorb(events, histories)
        self.item_statistics.absorb(targets)
        self._cache = None

    def invalidate_cache(self) -> None:
        """Drop the cached values. Call this after training `trained_model`."""
        self._cache = None

    def trained_user_vectors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """User vectors of the trained expert (B, D), and whether it has learned any item of each history (B,)."""
        history_BT = batch.history_BT.numpy()
        trained_items_BT = np.where(self.trained_model.taken.steps_R.numpy().take(history_BT) > 0, history_BT, 0)
        known_BT = close_gaps(torch.from_numpy(trained_items_BT))
        vectors_BD = self.trained_model.user_vectors(Batch(batch.users_B, known_BT))[:, 0]
        return vectors_BD, torch.from_numpy((trained_items_BT > 0).any(1))

    def trained_features(self, items_BC: Tensor, vectors_BD: Tensor, known_B: Tensor) -> tuple[Tensor, Tensor]:
        """Log share and log rank of each candidate by the trained expert, shape (B, C) each.

        An item that the expert has not learned gets the lowest share and rank. So do all candidates of a user whose
        history it has not learned.
        """
        items, cache = self.trained_model.items, self.cache
        known_BC = torch.from_numpy(items.steps_R.numpy().take(items_BC.numpy()) > 0) & known_B[:, None]
        logit_BC = (items.weights[items_BC] @ vectors_BD[..., None])[..., 0].masked_fill_(~known_BC, -torch.inf)
        order_BC = logit_BC.argsort(dim=1, descending=True, stable=True)
        rank_BC = torch.empty_like(order_BC).scatter_(1, order_BC, torch.arange(order_BC.shape[1]).expand_as(order_BC))
        rank_BC = torch.where(known_BC, rank_BC, self.items_per_expert).clamp_(max=self.items_per_expert)  # from 0
        share_BC = logit_BC.softmax(1).nan_to_num_(0.0)
        return share_BC.add_(cache.share_floor).log_(), cache.log_rank_K[rank_BC]

    def candidate_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Candidate items (B, C), padded with 0, and their features (B, C, F)."""
        size = max(1, MAX_CELLS // (self.n_items + 1))
        parts = [self._chunk_features(batch, index_B) for index_B in split_chunks(torch.arange(len(batch)), size)]
        if len(parts) == 1:
            return torch.from_numpy(parts[0][0]), torch.from_numpy(parts[0][1])
        width = max((items_BC.shape[1] for items_BC, _ in parts), default=0)
        items_BC = np.zeros((len(batch), width), np.int64)
        x_BCF = np.zeros((len(batch), width, len(FEATURES)), np.float32)
        first = 0
        for part_BC, part_BCF in parts:
            rows = slice(first, first + len(part_BC))
            items_BC[rows, : part_BC.shape[1]], x_BCF[rows, : part_BC.shape[1]] = part_BC, part_BCF
            first += len(part_BC)
        return torch.from_numpy(items_BC), torch.from_numpy(x_BCF)

    def _chunk_features(self, batch: Batch, index_B: Tensor) -> tuple[Int64Array, Float32Array]:
        """`candidate_features` of the users at `index_B`."""
        history_BT = close_gaps(batch.history_BT[index_B])[:, -self.length :]
        batch, occurrences = Batch(batch.users_B[index_B], history_BT), ItemOccurrences.from_items(history_BT.numpy())
        scores = {
            name: _score_sparsely(counter, batch, occurrences)
            for name, counter in self.counters.items()
            if name not in POPULARITY_EXPERTS
        }
        top_items = {name: top_k_entries(scores_BI, self.items_per_expert)[0] for name, scores_BI in scores.items()}
        cache = self.cache
        trained_users = self.trained_user_vectors(batch) if len(cache.pool_items_S) else None
        pool_items = [] if trained_users is None else [cache.top_of_pool(*trained_users, self.items_per_expert)]
        popular_BP = np.broadcast_to(cache.popular_items_P, (len(batch), len(cache.popular_items_P)))
        items_BC = distinct_items(
            np.concatenate([history_BT.numpy(), popular_BP, *top_items.values(), *pool_items], axis=1)
        )
        cells = CandidateCells(items_BC, self.n_items + 1)
        x_MF = cache.features_of(items_BC)
        x_BCF = x_MF[1:].reshape(*items_BC.shape, len(FEATURES))
        self._write_counters(x_MF, cells, scores, top_items)
        if trained_users is not None:
            share_BC, rank_BC = self.trained_features(torch.from_numpy(items_BC), *trained_users)
            x_BCF[..., SHARE_COLUMN["pooled"]], x_BCF[..., RANK_COLUMN["pooled"]] = share_BC.numpy(), rank_BC.numpy()
        x_MF[cells.cells_BI[occurrences.row_W, occurrences.items_W], Slots.own] = own_history_features(occurrences)
        user_BF = user_features(occurrences, (history_BT.numpy() > 0).sum(1), cache.repeat_rate)
        x_BCF[..., Slots.user] = user_BF[:, None] * (items_BC > 0)[..., None]
        return items_BC, x_BCF

    def _write_counters(
        self, x_MF: Float32Array, cells: CandidateCells, scores: dict[str, Any], offers: dict[str, Int64Array]
    ) -> None:
        """Write the share of each candidate by each counting expert, and the rank of the items that it proposes."""
        log_rank_K, floor = np.log(np.arange(1, self.items_per_expert + 1, dtype=np.float32)), self.cache.share_floor
        for name, offered_BK in offers.items():
            cells_H, shares_H = cells.matching_cells(scores[name])
            x_MF[cells_H, SHARE_COLUMN[name]] = np.log(shares_H + floor)
            x_MF[cells.cells_of(offered_BK), RANK_COLUMN[name]] = log_rank_K[: offered_BK.shape[1]]

    @property
    def cache(self) -> ExpertCache:
        """The cached values; they are built at first use after a change."""
        if self._cache is None:
            self._cache = _build_cache(self)
        return self._cache

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors of all experts and item statistics, by name."""
        parts = {name: dict(counter.state_dict()) for name, counter in self.counters.items()}
        parts |= {"facts": self.item_statistics.state_dict(), "trained": dict(self.trained_model.state_dict())}
        parts |= {"moments": self.trained_model.moments}
        return flatten_state_dicts(parts)

    def load_state_dict(self, tensors: dict[str, Tensor], n_users: int, n_items: int) -> None:
        """Restore what `state_dict` returned."""
        self.grow(n_users, n_items)
        for name, counter in self.counters.items():
            counter.load_state_dict(extract_state_dict(tensors, name))
        self.item_statistics = ItemStatistics.from_state_dict(extract_state_dict(tensors, "facts"))
        self.trained_model.load_state_dict(extract_state_dict(tensors, "trained"))
        self.trained_model.moments = extract_state_dict(tensors, "moments")
        self._cache = None


def set_window(experts: Experts, window_events: int) -> None:
    """Set the window, in events, of every expert that measures age in windows.

    A counting model on its own derives the window from the first block that it absorbs. A blend absorbs the base block
    in two parts, so the first block would give a wrong window.
    """
    experts.window_events = window_events
    for counter in experts.counters.values():
        if isinstance(counter, Popularity | ItemKNN):
            counter.window_events = window_events


def _build_cache(experts: Experts) -> ExpertCache:
    floor = FLOOR_EVENTS / max(1, int((experts.item_statistics.event_counts_I > 0).sum()))
    x_IF, offers = np.zeros((experts.n_items + 1, len(FEATURES)), np.float32), []
    x_IF[:, Slots.share], x_IF[:, Slots.rank] = np.log(np.float32(floor)), np.log(experts.items_per_expert + 1)
    x_IF[:, SHARE_COLUMN["pooled"]] = np.log(floor)
    for name in POPULARITY_EXPERTS:
        counts_I = cast(Popularity, experts.counters[name]).counts_I.numpy()
        best_K = top_k_indices(counts_I, experts.items_per_expert)
        best_K = best_K[counts_I[best_K] > 0]
        x_IF[:, SHARE_COLUMN[name]] = np.log(counts_I / max(float(counts_I.sum()), 1e-9) + floor)
        x_IF[best_K, RANK_COLUMN[name]] = np.log(np.arange(1, len(best_K) + 1, dtype=np.float32))
        offers.append(best_K)
    x_IF[:, Slots.item] = experts.item_statistics.item_features(max(1, experts.window_events))
    recent_counts_I = cast(Popularity, experts.counters[POOL_EXPERT]).counts_I
    pool_S = torch.from_numpy(top_k_indices(recent_counts_I.numpy(), POOL_SIZE))
    pool_S = pool_S[recent_counts_I[pool_S].gt(0) & experts.trained_model.items.steps_R[pool_S].gt(0)]
    popular_P, pool_SD = np.unique(np.concatenate(offers)), experts.trained_model.items.weights[pool_S]
    log_rank_K = torch.arange(1, experts.items_per_expert + 2).log()
    return ExpertCache(floor, experts.item_statistics.repeat_rate, x_IF, log_rank_K, popular_P, pool_S, pool_SD)


def _score_sparsely(counter: Expert, batch: Batch, occurrences: ItemOccurrences) -> Any:
    return (
        counter.scores_of_occurrences(occurrences)
        if isinstance(counter, Repeat)
        else cast(SparseExpert, counter).sparse_scores(batch)
    )


def top_k_indices(values_I: NDArray[Any], k: int) -> Int64Array:
    """Indices of the k largest values, largest first, shape (K,). Ties keep their order."""
    if k < len(values_I):
        at_least = np.partition(values_I, len(values_I) - k)[len(values_I) - k]
        at_N = np.flatnonzero(values_I >= at_least)
    else:
        at_N = np.arange(len(values_I))
    largest_K: Int64Array = at_N[np.argsort(-values_I[at_N], kind="stable")[:k]]
    return largest_K


def flatten_state_dicts(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all parts, named `part.name`."""
    return {f"{part}.{name}": tensor for part, inner in parts.items() for name, tensor in inner.items()}


def extract_state_dict(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one part, without the prefix `name.`; the inverse of `flatten_state_dicts`."""
    return {key[len(name) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
