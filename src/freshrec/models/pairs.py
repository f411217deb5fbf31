"""Pairs: users are offered items that stand near their recent items in other users' histories. The strongest control.

kind = "cosine" is item-kNN without a limit on the number of neighbours; kind = "markov" follows the order of events.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from freshrec.data.batches import closed
from freshrec.models.sparse import Floats, csr, picked
from freshrec.options import Count, check_options
from freshrec.types import Batch, Events, Histories

Rows = NDArray[np.int32]
CHUNK = 200_000  # events whose pairs are in memory at once (4 million pairs of a window of 20)


@dataclass(frozen=True)
class Kind:
    """The constants of one way of counting and asking."""

    window: int  # two events of a user make a pair when at most this many events apart
    by_gap: bool  # a pair weighs 1 / (events apart), not 1
    directed: bool  # count only what comes after
    keep: float  # share of the old counts that each absorbed block leaves
    recent: int  # the items of the history that are asked
    fading: float  # weight of an item in the question, to the power of its age in events


COSINE = Kind(window=20, by_gap=False, directed=False, keep=1.0, recent=20, fading=0.85)
MARKOV = Kind(window=3, by_gap=True, directed=True, keep=0.8, recent=5, fading=0.5)
PRIOR = 10.0  # events added to every item's count, so that rare items do not win by chance


@dataclass(frozen=True)
class PairsSpec:
    """Item-kNN by cosine, or a Markov chain with gaps."""

    kind: Literal["cosine", "markov"] = "cosine"
    length: Count = 50  # history items looked at

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> Pairs:
        """A model without users and items; it has no randomness."""
        return Pairs(self)


class Pairs:
    """score(item) = sum over recent items a of fading^age(a) idf(a) pairs(a, item) / sqrt((d_a + 10) (d_item + 10)).

    d = the number of events of an item, idf(a) = log(1 + all events / (1 + d_a)). A Markov chain sums
    fading^age(a) pairs(a, item) / (10 + d_a) instead, with d_a = the sum of pairs(a, .).
    An item pairs with itself too, which is how repeats are learned: item-kNN without it loses 1.8 points of hr@20 on
    the UCI retail log and 0.5 on Taobao, and gains nowhere.
    """

    def __init__(self, spec: PairsSpec) -> None:
        self.spec = spec
        self.kind = MARKOV if spec.kind == "markov" else COSINE
        self.n_users = 0
        self.n_items = 0
        self.n_counted = 0  # items up to this row have been counted; later ones take no place in a question
        self.mass_I = np.zeros(1, dtype=np.float32)  # d
        self.pairs_II: Any = sparse.csr_array((1, 1), dtype=np.float32)  # never changed in place
        self._weights: tuple[Floats, Floats] | None = None  # made of `mass_I` when first asked

    def grow(self, n_users: int, n_items: int) -> None:
        """New items start without events and pairs."""
        self.mass_I = np.append(self.mass_I, np.zeros(n_items - self.n_items, dtype=np.float32))
        self._weights = None
        old = self.pairs_II
        indptr = np.append(old.indptr, np.full(n_items - self.n_items, old.indptr[-1]))
        self.pairs_II = sparse.csr_array((old.data, old.indices, indptr), shape=(n_items + 1, n_items + 1))
        self.n_users, self.n_items = n_users, n_items

    def absorb(self, events: Events, histories: Histories) -> None:
        """Count every pair whose later event is new; the earlier one may be an old event of the same user."""
        if len(events) == 0:
            return
        pairs_II = self.pairs_II * np.float32(self.kind.keep)
        order = np.argsort(events.users_E.numpy(), kind="stable")
        users, items = (ids_E.numpy()[order].astype(np.int32) for ids_E in (events.users_E, events.items_E))
        for part in _whole_users(users, CHUNK):
            pairs_II = pairs_II + self._count(users[part], items[part], histories)
        self.pairs_II, self.n_counted, self._weights = pairs_II, max(self.n_counted, int(items.max())), None
        if self.kind.directed:
            self.mass_I = pairs_II.sum(axis=1)
        else:
            self.mass_I = self.mass_I + np.bincount(items, minlength=self.n_items + 1).astype(np.float32)

    def _count(self, users: Rows, items: Rows, histories: Histories) -> Any:
        """The pairs of the given users' new events, as a sparse (I, I) matrix."""
        before_users, before_items = _latest(np.unique(users), histories, self.kind.window)
        users, items = np.append(before_users, users), np.append(before_items, items)
        new = np.arange(len(users)) >= len(before_users)
        order = np.argsort(users, kind="stable")  # each user's old events, then the new ones
        users, items, new = users[order], items[order], new[order]
        earlier, later, weights = [], [], []
        for gap in range(1, self.kind.window + 1):
            pair = new[gap:] & (users[gap:] == users[:-gap]) & (items[:-gap] > 0)  # row 0: an event kept secret
            earlier.append(items[:-gap][pair])
            later.append(items[gap:][pair])
            weights.append(np.full(pair.sum(), 1 / gap if self.kind.by_gap else 1, dtype=np.float32))
        ends = np.concatenate(earlier), np.concatenate(later)
        counts_II = sparse.coo_array((np.concatenate(weights), ends), shape=self.pairs_II.shape).tocsr()
        return counts_II if self.kind.directed else counts_II + counts_II.T

    def sparse(self, batch: Batch) -> Any:
        """(B, I + 1) scores as a sparse matrix."""
        scores_BI = self._question(batch) @ self.pairs_II
        if not self.kind.directed:
            np.divide(scores_BI.data, self._weighed()[1].take(scores_BI.indices), out=scores_BI.data)
        return scores_BI

    def because(self, batch: Batch, item: int) -> int:
        """The history item of a batch of one that speaks most for `item`; 0 where none does."""
        asked_BI = self._question(batch)
        says_T = asked_BI.data * self.pairs_II[asked_BI.indices][:, [item]].toarray()[:, 0]
        return int(asked_BI.indices[says_T.argmax()]) if len(says_T) and says_T.max() > 0 else 0

    def score(self, batch: Batch, items: Tensor) -> Tensor:
        """(B, N): from the recent items of each row's own history."""
        return picked(torch.from_numpy(self.sparse(batch).toarray()), items)

    def _question(self, batch: Batch) -> Any:
        """The weights of the recent items, as a sparse (B, I) matrix."""
        history_BT = batch.history_BT
        if history_BT.shape[1] and history_BT.numpy().max(initial=0) > self.n_counted:
            history_BT = closed(torch.where(history_BT <= self.n_counted, history_BT, 0))
        recent_BT = history_BT[:, -self.kind.recent :].numpy()
        age_T = np.arange(recent_BT.shape[1] - 1, -1, -1)
        weight_BT = (self._weighed()[0].take(recent_BT) * self.kind.fading**age_T).astype(np.float32)
        offsets_B = np.arange(len(batch) + 1) * recent_BT.shape[1]
        return csr(weight_BT.ravel(), recent_BT.ravel(), offsets_B, self.n_items + 1)

    def _weighed(self) -> tuple[Floats, Floats]:
        """(I + 1,) what an item in the question weighs before it fades, 0 for padding, and sqrt(d + 10)."""
        if self._weights is None:
            root_I: Floats = np.sqrt(self.mass_I + PRIOR)
            weight_I: Floats = 1 / (self.mass_I + PRIOR)
            if not self.kind.directed:
                weight_I = np.log1p(self.mass_I.sum() / (1 + self.mass_I)) / root_I
            weight_I[0] = 0.0
            self._weights = weight_I, root_I
        return self._weights

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the model knows."""
        arrays = {"mass_I": self.mass_I, "counts": self.pairs_II.data, "later": self.pairs_II.indices}
        arrays |= {"offsets_I": self.pairs_II.indptr, "sizes": np.array([self.n_users, self.n_items, self.n_counted])}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self.n_users, self.n_items, self.n_counted = tensors["sizes"].tolist()
        self.mass_I, self._weights = tensors["mass_I"].numpy(), None
        columns = tuple(tensors[name].numpy() for name in ("counts", "later", "offsets_I"))
        self.pairs_II = sparse.csr_array(columns, shape=(self.n_items + 1, self.n_items + 1))


def _whole_users(users: Rows, n_events: int) -> list[slice]:
    """Cuts sorted users into parts of about `n_events`, never inside a user."""
    starts = np.append(np.flatnonzero(np.diff(users, prepend=-1)), len(users))
    cuts = starts[np.searchsorted(starts, np.arange(0, len(users), n_events))]
    edges = np.append(cuts, len(users))
    return [slice(a, b) for a, b in zip(edges, edges[1:]) if a < b]


def _latest(users: Rows, histories: Histories, n: int) -> tuple[Rows, Rows]:
    """Users and items of the last `n` events in each of these users' histories, oldest first."""
    users = users[users <= histories.n_users]
    starts, ends = histories.offsets_U.numpy()[users], histories.offsets_U.numpy()[users + 1]
    n_each = np.minimum(ends - starts, n)
    rows = np.repeat(ends - np.cumsum(n_each), n_each) + np.arange(n_each.sum())
    return np.repeat(users, n_each), histories.items_R.numpy()[rows]
