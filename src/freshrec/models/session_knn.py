"""Session-kNN: sessions are offered what the sessions most like them hold. SKNN, S-SKNN, V-SKNN and STAN are options.

A session is a user row, as the protocols of sessions number them; its update is an index update. The methods are those
of Ludewig and Jannach (2018) and, for STAN, of Garg et al. (2019); the defaults those of the library session-rec.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from freshrec.config import HISTORY_LENGTH, Count, CountOrZero, Weight, check_options
from freshrec.data.batches import close_gaps
from freshrec.nn.sparse import Float64Array, Int64Array, pack_keys, select_scores, unpack_keys
from freshrec.types import Batch, Events, Histories

DAY = 86_400_000_000  # microseconds
MAX_AGE = 60.0  # ages end here, in units of lambda2: exp(-60) leaves single precision room for the other factors
NO_TIME = np.iinfo(np.int64).min


@dataclass(frozen=True)
class SKNNSpec:
    """Which sessions are neighbours, and what each of them says. All factors multiply; the defaults leave them out.

    Position p counts from 1 in a query of |s| events; of an item that comes again, the last position counts.
    """

    k: Count = 100  # neighbours
    sample: Count = 1000  # of the sessions that share an item, the latest so many are compared
    length: Count = HISTORY_LENGTH  # last events of a session that are looked at
    last_n: CountOrZero = 0  # only sessions with events in the latest so many blocks that were absorbed; 0: all
    similarity: Literal["cosine", "vec"] = "cosine"
    # What a shared item adds to the similarity: 1, p/|s|, 1 - (|s| - p)/10, 1/log10(|s| - p + 1.7), (p/|s|)^2
    weights: Literal["same", "div", "linear", "log", "quadratic"] = "same"
    # What a neighbour's say is times, with p of the latest shared item and step = |s| - p + 1:
    # 1, p/|s|, 1/step, 1 - step/10, 1/log10(step + 1.7), 1/step^2
    decay: Literal["same", "place", "div", "linear", "log", "quadratic"] = "same"
    idf: Weight = 0.0  # an item's score is times 1 + idf ln(sessions / sessions with the item)
    # STAN's three, of which 0 leaves its factor out:
    lambda1: Weight = 0.0  # weights are times exp((p - |s|) / lambda1)
    lambda2: Weight = 0.0  # similarities are times exp(-age of the session / lambda2)
    lambda3: Weight = 0.0  # a neighbour's items are times exp(-distance from its latest shared item / lambda3)
    # lambda2 is in days of the session's last time, or in blocks since it was last absorbed. Without a clock times are
    # the order of events, which is next to nothing in days: no session fades there unless ages are in blocks.
    ages: Literal["days", "blocks"] = "days"

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> SessionKNN:
        """A model without users and items; it has no randomness."""
        return SessionKNN(self)


SKNN = SKNNSpec()
S_SKNN = SKNNSpec(decay="place")
V_SKNN = SKNNSpec(similarity="vec", weights="div", decay="div")
STAN = SKNNSpec(sample=5000, lambda1=1.02, lambda2=5.0, lambda3=2.05)


class SessionKNN:
    """score(item) = the sum, over the k sessions n most like the query s that have the item, of sim(s, n) and factors.

    sim = sum of w_i over the shared items / (sqrt(sum of w_i^2 over s) sqrt(|n|)), or / |s| for "vec"; each item counts
    once. Only the `sample` latest sessions that share an item are compared. Similarities are told apart in single
    precision; of equal ones the later session comes first. The query's own items keep their scores. A batch says not
    when it asks: now is the newest time that was absorbed, which is the same factor in all scores. Items of the query
    that no session has take no place in it.

    Differs from session-rec: its cosine multiplies by sqrt(|s|) where it should divide, which orders alike; its linear
    factors go below 0, or end with the tenth position from the start, where these end at 0; its supports count events,
    not sessions; a session is no neighbour of its own.
    """

    def __init__(self, spec: SKNNSpec) -> None:
        self.spec = spec
        self.n_users = 0
        self.n_items = 0
        self.offsets_U = np.zeros(2, dtype=np.int64)  # user u owns items_R[offsets_U[u] : offsets_U[u + 1]]
        self.items_R = np.zeros(0, dtype=np.int32)  # the last events of each user, the latest last
        self.last_time_U = np.full(1, NO_TIME)  # of the last event
        self.last_block_U = np.zeros(1, dtype=np.int64)  # in which block of events a user came last
        self._index: SessionIndex | None = None  # made of the above when first asked

    def grow(self, n_users: int, n_items: int) -> None:
        """New users start without events."""
        more = (0, n_users - self.n_users)
        self.offsets_U = np.pad(self.offsets_U, more, "edge")
        self.last_time_U = np.pad(self.last_time_U, more, constant_values=NO_TIME)
        self.last_block_U = np.pad(self.last_block_U, more)
        self.n_users, self.n_items = n_users, n_items
        self._index = None

    def absorb(self, events: Events, histories: Histories) -> None:
        """Append to the last events of their users."""
        users_E = events.users_E.numpy()
        owner_R = np.append(self._event_users(), users_E)
        order_R = np.argsort(owner_R, kind="stable")  # each user's old events, then the new ones
        self._store_recent(owner_R[order_R], np.append(self.items_R, events.items_E.numpy().astype(np.int32))[order_R])
        last_time_U, last_block_U = self.last_time_U.copy(), self.last_block_U.copy()  # copies of the model share these
        np.maximum.at(last_time_U, users_E, events.times_E.numpy())
        last_block_U[users_E] = last_block_U.max() + 1
        self.last_time_U, self.last_block_U = last_time_U, last_block_U

    def erase_user(self, user: int) -> None:
        """The user in this row has taken nothing."""
        owner_R = self._event_users()
        self._store_recent(owner_R[owner_R != user], self.items_R[owner_R != user])
        self.last_time_U, self.last_block_U = self.last_time_U.copy(), self.last_block_U.copy()
        self.last_time_U[user], self.last_block_U[user] = NO_TIME, 0

    def _event_users(self) -> Int64Array:
        return np.repeat(np.arange(self.n_users + 1), np.diff(self.offsets_U))

    def _store_recent(self, user_R: Int64Array, items_R: NDArray[np.int32]) -> None:
        """Of these events, by user, the last ones of each."""
        n_U = np.bincount(user_R, minlength=self.n_users + 1)
        is_kept_R = np.arange(len(user_R)) >= np.cumsum(n_U)[user_R] - self.spec.length
        self.items_R = items_R[is_kept_R]
        self.offsets_U = np.append(0, np.cumsum(np.minimum(n_U, self.spec.length)))
        self._index = None

    def sparse_scores(self, batch: Batch) -> Any:
        """(B, I + 1) scores, as a sparse matrix."""
        if self._index is None:
            self._index = self._build_index()
        query = build_session_query(batch, self._index, self.spec)
        return score_neighbours(query, find_neighbours(query, self._index, self.spec), self._index, self.spec)

    def score(self, batch: Batch, items: Tensor) -> Tensor:
        """(B, N): from each row's own history."""
        return select_scores(torch.from_numpy(self.sparse_scores(batch).toarray()), items)

    def candidates(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The items of the neighbours (B, C), 0 where a row has fewer, and their scores."""
        scores_BI = self.sparse_scores(batch)
        n_B = np.diff(scores_BI.indptr)
        is_candidate_BC = np.arange(n_B.max(initial=0)) < n_B[:, None]
        items_BC, score_BC = np.zeros(is_candidate_BC.shape, np.int64), np.zeros(is_candidate_BC.shape, np.float32)
        items_BC[is_candidate_BC], score_BC[is_candidate_BC] = scores_BI.indices, scores_BI.data
        return torch.from_numpy(items_BC), torch.from_numpy(score_BC)

    def _build_index(self) -> SessionIndex:
        n_U, oldest = np.diff(self.offsets_U), self.last_block_U.max() - self.spec.last_n if self.spec.last_n else 0
        user_S = np.flatnonzero((n_U > 0) & (self.last_block_U > oldest))
        order_S = np.argsort(self.last_time_U[user_S], kind="stable")[::-1]  # of equal times, the later row first
        user_S = user_S[order_S]
        session_U = np.full(len(n_U), len(user_S), dtype=np.int64)
        session_U[user_S] = np.arange(len(user_S))
        owner_R = self._event_users()
        last_E = last_positions(session_U[owner_R] * (self.n_items + 1) + self.items_R)
        last_E = last_E[session_U[owner_R[last_E]] < len(user_S)]
        owner_E, items_E = owner_R[last_E], self.items_R[last_E].astype(np.int64)
        offsets_S = np.append(0, np.cumsum(np.bincount(session_U[owner_E], minlength=len(user_S))))
        positions_E = last_E - self.offsets_U[owner_E]
        time_S = self.last_block_U[user_S].astype(np.float64)
        if self.spec.ages == "days":
            time_S = self.last_time_U[user_S] / DAY
        return build_session_index(user_S, time_S, offsets_S, items_E, positions_E, self.n_items, self.spec)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the model knows."""
        arrays = {"sizes": np.array([self.n_users, self.n_items]), "offsets_U": self.offsets_U}
        arrays |= {"items_R": self.items_R, "time_U": self.last_time_U, "turn_U": self.last_block_U}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self.n_users, self.n_items = tensors["sizes"].tolist()
        self.offsets_U, self.items_R = tensors["offsets_U"].numpy(), tensors["items_R"].numpy()
        self.last_time_U, self.last_block_U = tensors["time_U"].numpy(), tensors["turn_U"].numpy()
        self._index = None


@dataclass(frozen=True)
class SessionIndex:
    """The sessions S, the latest first, and their distinct items E, session by session."""

    user_S: Int64Array
    offsets_S: Int64Array  # session s owns entries offsets_S[s] : offsets_S[s + 1]
    items_E: Int64Array
    positions_E: Int64Array  # the last position of the item in its session
    recency_S: Float64Array  # exp(-age / lambda2)
    item_sessions_IS: Any  # (I + 1, S) sparse ones: the latest sessions of each item, as many as can ever be compared
    is_indexed_I: NDArray[np.bool_]  # whether any session has the item
    idf_I: Float64Array  # 1 + idf ln(sessions / sessions with the item)


def build_session_index(
    user_S: Int64Array,
    time_S: Float64Array,
    offsets_S: Int64Array,
    items_E: Int64Array,
    positions_E: Int64Array,
    n_items: int,
    spec: SKNNSpec,
) -> SessionIndex:
    """The index of these sessions, the latest first; `time_S`: in the unit of lambda2."""
    parts = np.ones(len(items_E)), items_E, offsets_S
    columns = sparse.csr_array(parts, shape=(len(user_S), n_items + 1)).tocsc()
    n_I = np.diff(columns.indptr)
    # A session among the `sample` latest of all that share an item is among the `sample` latest of each of its items;
    # one more, as the query itself may stand in between.
    is_kept_E = np.arange(columns.nnz) - np.repeat(columns.indptr[:-1], n_I) <= spec.sample
    offsets_I = np.append(0, np.cumsum(np.minimum(n_I, spec.sample + 1)))
    item_sessions = columns.data[is_kept_E], columns.indices[is_kept_E], offsets_I
    item_sessions_IS = sparse.csr_array(item_sessions, shape=(n_items + 1, len(user_S)))
    recency_S, idf_I = np.ones(len(user_S)), np.ones(n_items + 1)
    if spec.lambda2:
        recency_S = np.exp(-np.minimum((time_S.max(initial=-np.inf) - time_S) / spec.lambda2, MAX_AGE))
    if spec.idf:
        idf_I += spec.idf * np.log(np.maximum(len(user_S), 1) / np.maximum(n_I, 1))
    return SessionIndex(user_S, offsets_S, items_E, positions_E, recency_S, item_sessions_IS, n_I > 0, idf_I)


@dataclass(frozen=True)
class SessionQuery:
    """The distinct items Q of each row of a batch, by row and item, at their last positions."""

    users_B: Int64Array
    n_events_B: Int64Array  # of items that some session has, the repeated ones too
    row_Q: Int64Array
    items_Q: Int64Array
    positions_Q: Int64Array  # the first event of a row is at 1

    def find_positions(self, row_F: Int64Array, items_F: Int64Array, n_columns: int) -> Int64Array:
        """(F,) where each row has an item; 0 where it has not."""
        key_Q, key_F = self.row_Q * n_columns + self.items_Q, row_F * n_columns + items_F
        at_F = np.minimum(np.searchsorted(key_Q, key_F), len(key_Q) - 1)
        positions_F: Int64Array = np.where(key_Q[at_F] == key_F, self.positions_Q[at_F], 0)
        return positions_F


def build_session_query(batch: Batch, index: SessionIndex, spec: SKNNSpec) -> SessionQuery:
    """The last items of each row, as far as a session has them."""
    n_columns = len(index.is_indexed_I)
    known_BT = torch.where(batch.history_BT < n_columns, batch.history_BT, 0)
    known_BT = torch.where(torch.from_numpy(index.is_indexed_I)[known_BT], known_BT, 0)
    items_BT = close_gaps(known_BT)[:, -spec.length :].numpy()
    n_events_B = (items_BT > 0).sum(1)
    row_R, column_R = items_BT.nonzero()
    last_Q = last_positions(row_R * n_columns + items_BT[row_R, column_R])
    row_Q, column_Q = row_R[last_Q], column_R[last_Q]
    positions_Q = column_Q + 1 - (items_BT.shape[1] - n_events_B)[row_Q]
    return SessionQuery(batch.users_B.numpy(), n_events_B, row_Q, items_BT[row_Q, column_Q], positions_Q)


@dataclass(frozen=True)
class Neighbours:
    """The sessions N most like each row of a batch, by row, the most similar first."""

    row_N: Int64Array
    session_N: Int64Array
    sim_N: Float64Array


def find_neighbours(query: SessionQuery, index: SessionIndex, spec: SKNNSpec) -> Neighbours:
    """The k sessions most like each row, of the latest ones that share an item with it."""
    n_rows, weight_Q = len(query.users_B), query_item_weights(query, spec)
    n_B = np.bincount(query.row_Q, minlength=n_rows)
    parts = weight_Q, query.items_Q, np.append(0, np.cumsum(n_B))
    sims_BS = sparse.csr_array(parts, shape=(n_rows, len(index.is_indexed_I))) @ index.item_sessions_IS
    sims_BS.sort_indices()  # the latest session first
    row_N, session_N = np.repeat(np.arange(n_rows), np.diff(sims_BS.indptr)), sims_BS.indices.astype(np.int64)
    is_kept_N = index.user_S[session_N] != query.users_B[row_N]
    is_kept_N[is_kept_N] = positions_in_row(row_N[is_kept_N], n_rows) < spec.sample
    row_N, session_N = row_N[is_kept_N], session_N[is_kept_N]
    sim_N = sims_BS.data[is_kept_N] * index.recency_S[session_N]
    if spec.similarity == "cosine":
        sim_N /= np.sqrt(np.bincount(query.row_Q, weight_Q**2, n_rows)[row_N] * np.diff(index.offsets_S)[session_N])
    else:
        sim_N /= n_B[row_N]
    best_N = top_k_per_row(row_N, sim_N, n_rows, spec.k)
    return Neighbours(row_N[best_N], session_N[best_N], sim_N[best_N])


def query_item_weights(query: SessionQuery, spec: SKNNSpec) -> Float64Array:
    """(Q,) what each item of a query adds to the similarity of the sessions that share it: w."""
    n_events_Q = query.n_events_B[query.row_Q]
    distance_Q, relative_position_Q = n_events_Q - query.positions_Q, query.positions_Q / n_events_Q
    weight_Q: Float64Array = np.ones(len(distance_Q))
    match spec.weights:
        case "div":
            weight_Q = relative_position_Q
        case "linear":
            weight_Q = np.maximum(1 - distance_Q / 10, 0)
        case "log":
            weight_Q = 1 / np.log10(distance_Q + 1.7)
        case "quadratic":
            weight_Q = relative_position_Q**2
    return weight_Q * np.exp(-distance_Q / spec.lambda1) if spec.lambda1 else weight_Q


def neighbour_decay(positions_N: Int64Array, n_events_N: Int64Array, spec: SKNNSpec) -> Float64Array:
    """(N,) what each neighbour's say is times, by where in the query the latest shared item stands."""
    step_N = n_events_N - positions_N + 1
    decay_N: Float64Array = np.ones(len(step_N))
    match spec.decay:
        case "place":
            decay_N = positions_N / n_events_N
        case "div":
            decay_N = 1 / step_N
        case "linear":
            decay_N = np.maximum(1 - step_N / 10, 0)
        case "log":
            decay_N = 1 / np.log10(step_N + 1.7)
        case "quadratic":
            decay_N = 1 / step_N**2
    return decay_N


def score_neighbours(query: SessionQuery, neighbours: Neighbours, index: SessionIndex, spec: SKNNSpec) -> Any:
    """(B, I + 1) sparse: what the neighbours say of their items F, added up."""
    n_rows, n_columns, n_N = len(query.users_B), len(index.is_indexed_I), np.diff(index.offsets_S)[neighbours.session_N]
    first_N = np.cumsum(n_N) - n_N
    at_F = np.repeat(index.offsets_S[neighbours.session_N] - first_N, n_N) + np.arange(n_N.sum())
    items_F, positions_F = index.items_E[at_F], index.positions_E[at_F]
    query_positions_F = query.find_positions(np.repeat(neighbours.row_N, n_N), items_F, n_columns)
    latest_shared_N = np.maximum.reduceat(query_positions_F, first_N)  # where in the query the latest shared item is
    decay_N = neighbour_decay(latest_shared_N, query.n_events_B[neighbours.row_N], spec)
    score_F = np.repeat(neighbours.sim_N * decay_N, n_N) * index.idf_I[items_F]
    if spec.lambda3:
        latest_N = np.maximum.reduceat(np.where(query_positions_F > 0, positions_F, 0), first_N)  # and in the neighbour
        score_F *= np.exp(-np.abs(positions_F - np.repeat(latest_N, n_N)) / spec.lambda3)
    score_NI = sparse.csr_array((score_F, items_F, np.append(first_N, len(at_F))), shape=(len(n_N), n_columns))
    offsets_B = np.append(0, np.cumsum(np.bincount(neighbours.row_N, minlength=n_rows)))
    row_neighbours_BN = sparse.csr_array((np.ones(len(n_N)), np.arange(len(n_N)), offsets_B), shape=(n_rows, len(n_N)))
    return (row_neighbours_BN @ score_NI).astype(np.float32)


def last_positions(key_R: Int64Array) -> Int64Array:
    """(N,) where each key stands last, in the order of the keys, none of which is negative."""
    order_R = np.argsort(key_R, kind="stable")
    last_N: Int64Array = order_R[np.diff(key_R[order_R], append=-1) != 0]
    return last_N


def positions_in_row(row_N: Int64Array, n_rows: int) -> Int64Array:
    """(N,) how many entries of the same row stand before each; `row_N` is sorted."""
    n_B = np.bincount(row_N, minlength=n_rows)
    position_N: Int64Array = np.arange(len(row_N)) - (np.cumsum(n_B) - n_B)[row_N]
    return position_N


def top_k_per_row(row_N: Int64Array, value_N: Float64Array, n_rows: int, k: int) -> Int64Array:
    """Where the k largest positive values of each row stand, by row, the largest first; of equal ones the first.

    They are compared in single precision: the last bits of a sum say in which order it was made.
    """
    n_B, position_N = np.bincount(row_N, minlength=n_rows), positions_in_row(row_N, n_rows)
    key_BW = np.zeros((n_rows, int(n_B.max(initial=0))), np.int64)
    key_BW[row_N, position_N] = np.maximum(pack_keys(value_N, position_N), 0)  # a value of 0 is none
    best_BK = torch.from_numpy(key_BW).topk(min(k, key_BW.shape[1])).values.numpy()
    at_BK = (np.cumsum(n_B) - n_B)[:, None] + unpack_keys(best_BK)[0]
    indices_N: Int64Array = at_BK[best_BK > 0]
    return indices_N
