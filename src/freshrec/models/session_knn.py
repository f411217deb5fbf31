"""Session-kNN: recommends the items of the most similar sessions. SKNN, S-SKNN, V-SKNN and STAN are sets of options.

A session is a user row, because session-based evaluation numbers sessions like users. An update only changes the index.
The methods are those of Ludewig and Jannach (2018) and, for STAN, of Garg et al. (2019). The defaults are those of the
library session-rec.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy import sparse
from torch import Tensor

from freshrec.config import HISTORY_LENGTH, Count, CountOrZero, Weight, check_options
from freshrec.data.batches import close_gaps
from freshrec.models.model_text import model_text
from freshrec.nn.sparse import Float64Array, Int64Array, pack_keys, select_scores, unpack_keys
from freshrec.types import Batch, Events, Histories

DAY = 86_400_000_000  # microseconds
MAX_AGE = 60.0  # largest age, in units of lambda2: exp(-60) times all other factors is above 0 in single precision
NO_TIME = np.iinfo(np.int64).min


@dataclass(frozen=True)
class SKNNSpec:
    """Options of session-kNN: the choice of neighbour sessions and their weights.

    All factors multiply, and the defaults switch them off. The query, which is the current session, has n events. They
    have the positions p = 1, ..., n. An item that occurs several times has its last position.
    """

    k: Count = 100  # Number of nearest sessions that contribute to the scores.
    sample: Count = 1000  # Number of most recent sessions with a shared item that are compared.
    length: Count = HISTORY_LENGTH  # Number of most recent events per session that the model reads.
    last_n: CountOrZero = 0  # Only sessions with events in this number of last blocks are compared; 0 = all.
    similarity: Annotated[
        Literal["cosine", "vec"],
        Field(
            description='"cosine" = weighted cosine; "vec" = sum of the weights of shared items, '
            "divided by the number of items in the query."
        ),
    ] = "cosine"
    weights: Annotated[
        Literal["same", "div", "linear", "log", "quadratic"],
        Field(
            description='Weight of a shared item at position p of n: "same" = 1, "div" = p/n, '
            '"linear" = 1-(n-p)/10, "log" = 1/log10(n-p+1.7), "quadratic" = (p/n)^2.'
        ),
    ] = "same"
    decay: Annotated[
        Literal["same", "place", "div", "linear", "log", "quadratic"],
        Field(
            description='Factor of a neighbour whose last shared item is at p of n, with s = n-p+1: "same" = 1, '
            '"place" = p/n, "div" = 1/s, "linear" = 1-s/10, "log" = 1/log10(s+1.7), "quadratic" = 1/s^2.'
        ),
    ] = "same"
    idf: Weight = 0.0  # Scores are multiplied by 1 + idf ln(sessions / sessions with the item); 0 = off.
    # The next three are STAN's factors.
    lambda1: Weight = 0.0  # Weights of shared items are multiplied by exp((p - n) / lambda1); 0 = off.
    lambda2: Weight = 0.0  # Similarities are multiplied by exp(-age of the session / lambda2); 0 = off.
    lambda3: Weight = 0.0  # Scores are multiplied by exp(-distance to the last shared item / lambda3); 0 = off.
    # The age of a session is the time, or the number of blocks, since its last event. In a log without timestamps,
    # times are the order of events. Ages in days are then close to 0, and no session decays: use blocks there. A block
    # is the events of one `absorb`. So ages in blocks, and `last_n`, depend on how often the model absorbs events.
    ages: Literal["days", "blocks"] = "days"  # Unit of lambda2: "days", or "blocks" of absorbed events.

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> SessionKNN:
        """Return a new model without users and items. The seed is not used."""
        return SessionKNN(self)


SKNN = SKNNSpec()
S_SKNN = SKNNSpec(decay="place")
V_SKNN = SKNNSpec(similarity="vec", weights="div", decay="div")
STAN = SKNNSpec(sample=5000, lambda1=1.02, lambda2=5.0, lambda3=2.05)


class SessionKNN:
    """score(item) = sum over the k nearest sessions t with the item of sim(s, t) times all factors, for the query s.

    sim(s, t) = sum of w_i over the shared items / (sqrt(sum of w_i^2 over s) sqrt(|t|)). With similarity="vec" the
    divisor is |s|. Each item counts once. Only the `sample` most recent sessions that share an item are compared.
    Similarities are compared in single precision; of equal ones, the later session comes first. The query's own items
    keep their scores. A batch has no time, so ages end at the newest absorbed event. That choice changes all scores by
    the same factor. Items of the query that no session has are removed from it.

    Differs from session-rec:

    - Its cosine multiplies by sqrt(|s|) where it should divide, which gives the same order.
    - Its linear factors go below 0, or end with the tenth position from the start. Here they end at 0.
    - Its item supports count events, not sessions.
    - Here, a session is never its own neighbour.
    """

    __repr__ = model_text

    def __init__(self, spec: SKNNSpec) -> None:
        self.spec = spec
        self.n_users = 0
        self.n_items = 0
        self.offsets_U = np.zeros(2, dtype=np.int64)  # user u owns items_R[offsets_U[u] : offsets_U[u + 1]]
        self.items_R = np.zeros(0, dtype=np.int32)  # the last events of each user, oldest first
        self.last_time_U = np.full(1, NO_TIME)  # time of the last event
        self.last_block_U = np.zeros(1, dtype=np.int64)  # number of the last block with an event of the user; 0 = none
        self._index: SessionIndex | None = None  # computed on first use

    def grow(self, n_users: int, n_items: int) -> None:
        """Add rows for new users and items, without events."""
        more = (0, n_users - self.n_users)
        self.offsets_U = np.pad(self.offsets_U, more, "edge")
        self.last_time_U = np.pad(self.last_time_U, more, constant_values=NO_TIME)
        self.last_block_U = np.pad(self.last_block_U, more)
        self.n_users, self.n_items = n_users, n_items
        self._index = None

    def absorb(self, events: Events, histories: Histories) -> None:
        """Append the events to the last events of their users."""
        users_E = events.users_E.numpy()
        owner_R = np.append(self._event_users(), users_E)
        order_R = np.argsort(owner_R, kind="stable")  # each user's old events, then the new ones
        self._store_recent(owner_R[order_R], np.append(self.items_R, events.items_E.numpy().astype(np.int32))[order_R])
        last_time_U, last_block_U = self.last_time_U.copy(), self.last_block_U.copy()  # copies of the model share these
        np.maximum.at(last_time_U, users_E, events.times_E.numpy())
        last_block_U[users_E] = last_block_U.max() + 1
        self.last_time_U, self.last_block_U = last_time_U, last_block_U

    def erase_user(self, user: int) -> None:
        """Delete all events of the user in this row."""
        owner_R = self._event_users()
        self._store_recent(owner_R[owner_R != user], self.items_R[owner_R != user])
        self.last_time_U, self.last_block_U = self.last_time_U.copy(), self.last_block_U.copy()
        self.last_time_U[user], self.last_block_U[user] = NO_TIME, 0

    def _event_users(self) -> Int64Array:
        return np.repeat(np.arange(self.n_users + 1), np.diff(self.offsets_U))

    def _store_recent(self, user_R: Int64Array, items_R: NDArray[np.int32]) -> None:
        """Store the last `length` events of each user. The given events are sorted by user."""
        n_U = np.bincount(user_R, minlength=self.n_users + 1)
        is_kept_R = np.arange(len(user_R)) >= np.cumsum(n_U)[user_R] - self.spec.length
        self.items_R = items_R[is_kept_R]
        self.offsets_U = np.append(0, np.cumsum(np.minimum(n_U, self.spec.length)))
        self._index = None

    def sparse_scores(self, batch: Batch) -> Any:
        """Return the scores as a sparse matrix (B, I + 1)."""
        if self._index is None:
            self._index = self._build_index()
        query = build_session_query(batch, self._index, self.spec)
        return score_neighbours(query, find_neighbours(query, self._index, self.spec), self._index, self.spec)

    def score(self, batch: Batch, items: Tensor) -> Tensor:
        """Return the scores (B, N) of `items`, from each row's history."""
        return select_scores(torch.from_numpy(self.sparse_scores(batch).toarray()), items)

    def candidates(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the items of the neighbours (B, C), padded with 0, and their scores (B, C)."""
        scores_BI = self.sparse_scores(batch)
        scores_BI.sort_indices()  # of equal scores, the smaller item row comes first
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
        """Return everything that the model has learned, as tensors by name."""
        arrays = {"sizes": np.array([self.n_users, self.n_items]), "offsets_U": self.offsets_U}
        arrays |= {"items_R": self.items_R, "time_U": self.last_time_U, "turn_U": self.last_block_U}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        self.n_users, self.n_items = tensors["sizes"].tolist()
        self.offsets_U, self.items_R = tensors["offsets_U"].numpy(), tensors["items_R"].numpy()
        self.last_time_U, self.last_block_U = tensors["time_U"].numpy(), tensors["turn_U"].numpy()
        self._index = None


@dataclass(frozen=True)
class SessionIndex:
    """The sessions S, most recent first, and their distinct items E, session by session."""

    user_S: Int64Array
    offsets_S: Int64Array  # session s owns entries offsets_S[s] : offsets_S[s + 1]
    items_E: Int64Array
    positions_E: Int64Array  # the last position of the item in its session
    recency_S: Float64Array  # exp(-age / lambda2)
    item_sessions_IS: Any  # (I + 1, S) sparse ones: sessions of each item, the most recent that may be compared
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
    """Build the index of these sessions, which are sorted most recent first. `time_S` is in the unit of lambda2."""
    parts = np.ones(len(items_E)), items_E, offsets_S
    columns = sparse.csr_array(parts, shape=(len(user_S), n_items + 1)).tocsc()
    n_I = np.diff(columns.indptr)
    # A session that is among the `sample` most recent with any shared item is also among the `sample` most recent of
    # each shared item. One more is kept, because the query itself may be among them.
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
    """The distinct items Q of each row of a batch, sorted by row and item, with their last positions."""

    users_B: Int64Array
    n_events_B: Int64Array  # number of events whose item is in some session, including repeats
    row_Q: Int64Array
    items_Q: Int64Array
    positions_Q: Int64Array  # 1 = the first event of the row

    def find_positions(self, row_F: Int64Array, items_F: Int64Array, n_columns: int) -> Int64Array:
        """Return the position of each item in the query of its row, shape (F,); 0 = not in it."""
        key_Q, key_F = self.row_Q * n_columns + self.items_Q, row_F * n_columns + items_F
        at_F = np.minimum(np.searchsorted(key_Q, key_F), len(key_Q) - 1)
        positions_F: Int64Array = np.where(key_Q[at_F] == key_F, self.positions_Q[at_F], 0)
        return positions_F


def build_session_query(batch: Batch, index: SessionIndex, spec: SKNNSpec) -> SessionQuery:
    """Build the queries from the last items of each row. Items that no session has are left out."""
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
    """The nearest sessions N of each row of a batch, sorted by row, most similar first."""

    row_N: Int64Array
    session_N: Int64Array
    sim_N: Float64Array


def find_neighbours(query: SessionQuery, index: SessionIndex, spec: SKNNSpec) -> Neighbours:
    """Find the k nearest sessions of each row, among the most recent ones that share an item with it."""
    n_rows, weight_Q = len(query.users_B), query_item_weights(query, spec)
    n_B = np.bincount(query.row_Q, minlength=n_rows)
    parts = weight_Q, query.items_Q, np.append(0, np.cumsum(n_B))
    sims_BS = sparse.csr_array(parts, shape=(n_rows, len(index.is_indexed_I))) @ index.item_sessions_IS
    sims_BS.sort_indices()  # most recent session first
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
    """Return the weight w of each query item in the similarities, shape (Q,)."""
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
    """Return the factor of each neighbour, (N,), from the position of its last shared item in the query."""
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
    """Sum the contributions of all neighbours to their items F, as a sparse matrix (B, I + 1)."""
    n_rows, n_columns, n_N = len(query.users_B), len(index.is_indexed_I), np.diff(index.offsets_S)[neighbours.session_N]
    first_N = np.cumsum(n_N) - n_N
    at_F = np.repeat(index.offsets_S[neighbours.session_N] - first_N, n_N) + np.arange(n_N.sum())
    items_F, positions_F = index.items_E[at_F], index.positions_E[at_F]
    query_positions_F = query.find_positions(np.repeat(neighbours.row_N, n_N), items_F, n_columns)
    latest_shared_N = np.maximum.reduceat(query_positions_F, first_N)  # position of the last shared item in the query
    decay_N = neighbour_decay(latest_shared_N, query.n_events_B[neighbours.row_N], spec)
    score_F = np.repeat(neighbours.sim_N * decay_N, n_N) * index.idf_I[items_F]
    if spec.lambda3:
        latest_N = np.maximum.reduceat(np.where(query_positions_F > 0, positions_F, 0), first_N)  # in the neighbour
        score_F *= np.exp(-np.abs(positions_F - np.repeat(latest_N, n_N)) / spec.lambda3)
    score_NI = sparse.csr_array((score_F, items_F, np.append(first_N, len(at_F))), shape=(len(n_N), n_columns))
    offsets_B = np.append(0, np.cumsum(np.bincount(neighbours.row_N, minlength=n_rows)))
    row_neighbours_BN = sparse.csr_array((np.ones(len(n_N)), np.arange(len(n_N)), offsets_B), shape=(n_rows, len(n_N)))
    return (row_neighbours_BN @ score_NI).astype(np.float32)


def last_positions(key_R: Int64Array) -> Int64Array:
    """Return the index of the last occurrence of each key, (N,), sorted by key. Keys are at least 0."""
    order_R = np.argsort(key_R, kind="stable")
    last_N: Int64Array = order_R[np.diff(key_R[order_R], append=-1) != 0]
    return last_N


def positions_in_row(row_N: Int64Array, n_rows: int) -> Int64Array:
    """Return the number of entries of the same row before each entry, shape (N,). `row_N` is sorted."""
    n_B = np.bincount(row_N, minlength=n_rows)
    position_N: Int64Array = np.arange(len(row_N)) - (np.cumsum(n_B) - n_B)[row_N]
    return position_N


def top_k_per_row(row_N: Int64Array, value_N: Float64Array, n_rows: int, k: int) -> Int64Array:
    """Return the indices of the k largest positive values of each row, largest first; of equal values, the first.

    Values are compared in single precision, because the last bits of a sum depend on the order of summation.
    """
    n_B, position_N = np.bincount(row_N, minlength=n_rows), positions_in_row(row_N, n_rows)
    key_BW = np.zeros((n_rows, int(n_B.max(initial=0))), np.int64)
    key_BW[row_N, position_N] = np.maximum(pack_keys(value_N, position_N), 0)  # a value of 0 is left out
    best_BK = torch.from_numpy(key_BW).topk(min(k, key_BW.shape[1])).values.numpy()
    at_BK = (np.cumsum(n_B) - n_B)[:, None] + unpack_keys(best_BK)[0]
    indices_N: Int64Array = at_BK[best_BK > 0]
    return indices_N
