"""The experts of a blend: what they offer a user, and how they and the facts describe each candidate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from freshrec.data.batches import Targets, closed, in_parts
from freshrec.models.facts import ITEM, OWN, USER, Facts
from freshrec.models.pairs import PairsSpec
from freshrec.models.pooled import Pooled, PooledSpec
from freshrec.models.popularity import Popularity, PopularitySpec
from freshrec.models.repeat import RepeatSpec
from freshrec.models.sparse import Board, Floats, Ints, best, distinct, sums
from freshrec.models.user_knn import UserKNNSpec
from freshrec.types import Batch, Events, Histories, Model

COUNTING: dict[str, Any] = {
    "popularity": PopularitySpec(),
    "popularity-1": PopularitySpec(keep="decay", half_life=1.0),
    "popularity-1/4": PopularitySpec(keep="decay", half_life=1 / 4),
    "popularity-1/16": PopularitySpec(keep="decay", half_life=1 / 16),
    "repeat-last": RepeatSpec(),
    "repeat-freq": RepeatSpec(order="freq"),
    "item-knn": PairsSpec(),
    "markov": PairsSpec(kind="markov"),
    "user-knn": UserKNNSpec(),
}
TRAINED = PooledSpec()
EXPERTS = (*COUNTING, "pooled")
N = len(EXPERTS)
FEATURES = (
    *(f"share {name}" for name in EXPERTS), *(f"rank {name}" for name in EXPERTS), *OWN, *ITEM, *USER,
)  # fmt: skip
FLOOR = 0.1  # events' worth of probability, shared by all items, known, that an expert gives to those it is silent on
ENTRIES = 8_000_000  # users x items on one board
LATELY = "popularity-1"
SHELF = 8192  # items, those most taken lately (by LATELY), among which the trained expert looks for what it offers


class Counter(Model, Protocol):
    """It has an opinion of few items of each user."""

    def sparse(self, batch: Batch) -> Any:
        """(B, I + 1) scores as a sparse matrix; what is not in it is 0, which is no opinion."""


@dataclass(frozen=True)
class Settled:
    """What stays as it is until more is counted or learnt."""

    floor: float  # what an expert that is silent on an item is taken to think of it: a share
    popular: dict[str, tuple[Floats, Ints]]  # of each popularity (I + 1,) log shares, and the best items
    shelf_S: Tensor  # what the trained expert may offer: items that it has learnt
    shelf_SD: Tensor  # their vectors

    def liked(self, vectors_BD: Tensor, known_B: Tensor, k: int) -> Ints:
        """(B, K) the items on the shelf that the trained expert likes best; 0 where it knows nothing of the user."""
        best_BK = (vectors_BD @ self.shelf_SD.T).topk(min(k, len(self.shelf_S))).indices
        liked_BK: Ints = torch.where(known_B[:, None], self.shelf_S[best_BK], 0).numpy()
        return liked_BK


class Experts:
    """Counters, of which each offers its best items, and one that is trained. Together with facts they describe."""

    def __init__(self, offered: int, length: int, seed: int) -> None:
        self.offered, self.length, self.n_items = offered, length, 0
        self.counters: dict[str, Model] = {name: counter.build(seed) for name, counter in COUNTING.items()}
        self.trained: Pooled = TRAINED.build(seed)  # by the strategy; until then it has no opinion
        self.facts = Facts.empty()
        self._settled: Settled | None = None  # made when first asked

    def grow(self, n_users: int, n_items: int) -> None:
        """Make room for new users and items."""
        for expert in (*self.counters.values(), self.trained):
            expert.grow(n_users, n_items)
        self.facts.grow(n_items)
        self.n_items, self._settled = n_items, None

    def absorb(self, events: Events, histories: Histories, targets: Targets) -> None:
        """Count the events; `targets` are the same, in their histories."""
        for counter in self.counters.values():
            counter.absorb(events, histories)
        self.facts.absorb(targets)
        self._settled = None

    def unsettle(self) -> None:
        """To be called after `trained` has learnt."""
        self._settled = None

    def asked(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The trained expert's vectors of the users (B, D), and whether it has learnt any of their items (B,)."""
        history_BT = closed(torch.where(self.trained.taken.steps_R[batch.history_BT] > 0, batch.history_BT, 0))
        vectors_BD = self.trained.user_vectors(replace(batch, history_BT=history_BT))[:, 0]
        return vectors_BD, (history_BT > 0).any(1)

    def opinion(self, items_BC: Tensor, vectors_BD: Tensor, known_B: Tensor) -> tuple[Tensor, Tensor]:
        """What the trained expert thinks of the candidates: log share among them (B, C), and log rank.

        It is silent on items, and on histories, that it has not learnt.
        """
        items, silent = self.trained.items, self.offered + 1
        known_BC = (items.steps_R[items_BC] > 0) & known_B[:, None]
        logit_BC = (items.weights[items_BC] @ vectors_BD[..., None])[..., 0].masked_fill(~known_BC, -torch.inf)
        rank_BC = 1 + logit_BC.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        rank_BC = torch.where(known_BC, rank_BC, silent).clamp(max=silent)
        return (logit_BC.softmax(1).nan_to_num(0.0) + self.settled.floor).log(), rank_BC.log()

    def describe(self, batch: Batch, window: int) -> tuple[Tensor, Tensor]:
        """The candidates (B, C), 0 where a user has fewer, and their features (B, C, F).

        Ages of items are measured in windows of so many events.
        """
        size = max(1, ENTRIES // (self.n_items + 1))
        parts = [self._described(batch, which, window) for which in in_parts(torch.arange(len(batch)), size)]
        width = max((items_BC.shape[1] for items_BC, _ in parts), default=0)
        items_BC = np.zeros((len(batch), width), np.int64)
        x_BCF = np.zeros((len(batch), width, len(FEATURES)), np.float32)
        first = 0
        for part_BC, part_BCF in parts:
            rows = slice(first, first + len(part_BC))
            items_BC[rows, : part_BC.shape[1]], x_BCF[rows, : part_BC.shape[1]] = part_BC, part_BCF
            first += len(part_BC)
        return torch.from_numpy(items_BC), torch.from_numpy(x_BCF)

    def _described(self, batch: Batch, which: Tensor, window: int) -> tuple[Ints, Floats]:
        history_BT = closed(batch.history_BT[which])[:, -self.length :]
        batch, n = Batch(batch.users_B[which], history_BT), len(which)
        said = [self._said(name, batch) for name in self.counters]
        offered = [history_BT.numpy(), *(offered_BK for _, offered_BK in said)]
        asked = self.asked(batch) if len(self.settled.shelf_S) else None
        if asked is not None:
            offered.append(self.settled.liked(*asked, self.offered))
        items_BC = distinct(np.concatenate(offered, axis=1))
        board, columns = Board(n, self.n_items + 1), []
        for scores, _ in said:
            if isinstance(scores, np.ndarray):
                columns.append(scores[items_BC])
            else:
                share_BC = board.of(items_BC, scores) / np.maximum(sums(scores), 1e-9)[:, None]
                columns.append(np.log(share_BC + self.settled.floor))
        silent = np.full(items_BC.shape, np.log(self.settled.floor)), np.full(items_BC.shape, np.log(self.offered + 1))
        opinion = silent if asked is None else self.opinion(torch.from_numpy(items_BC), *asked)
        columns.append(np.asarray(opinion[0]))
        for _, offered_BK in said:
            place_K = np.arange(self.offered, self.offered - offered_BK.shape[1], -1)
            columns.append(np.log(self.offered + 1 - board.at(items_BC, offered_BK, place_K)))
        columns.append(np.asarray(opinion[1]))
        columns += self.facts.describe(items_BC, history_BT.numpy(), board, window)
        return items_BC, np.stack(columns, axis=2, dtype=np.float32)

    def _said(self, name: str, batch: Batch) -> tuple[Any, Ints]:
        """What a counter thinks, and its best items (B, K): its scores, or log shares (I + 1,) that all users have."""
        if name in self.settled.popular:
            log_share_I, best_K = self.settled.popular[name]
            return log_share_I, np.broadcast_to(best_K, (len(batch), len(best_K)))
        scores_BI = cast(Counter, self.counters[name]).sparse(batch)
        return scores_BI, best(scores_BI, self.offered)[0]

    @property
    def settled(self) -> Settled:
        """Made when first asked for, after something was counted or learnt."""
        if self._settled is None:
            floor = FLOOR / max(1, int((self.facts.events_I > 0).sum()))
            named = self.counters.items()
            counts = {name: counter.counts_I.numpy() for name, counter in named if isinstance(counter, Popularity)}
            popular = {name: _popular(counts_I, floor, self.offered) for name, counts_I in counts.items()}
            lately_I = counts[LATELY]
            shelf_S = torch.from_numpy(np.argsort(-lately_I, kind="stable")[:SHELF])
            shelf_S = shelf_S[torch.from_numpy(lately_I)[shelf_S].gt(0) & self.trained.items.steps_R[shelf_S].gt(0)]
            self._settled = Settled(floor, popular, shelf_S, self.trained.items.weights[shelf_S])
        return self._settled

    def state_dict(self) -> dict[str, Tensor]:
        """Everything they know."""
        parts = {name: dict(counter.state_dict()) for name, counter in self.counters.items()}
        parts |= {"facts": self.facts.state_dict(), "trained": dict(self.trained.state_dict())}
        parts |= {"moments": self.trained.moments}
        return in_one(parts)

    def load_state_dict(self, tensors: dict[str, Tensor], n_users: int, n_items: int) -> None:
        """The inverse of `state_dict`."""
        self.grow(n_users, n_items)
        for name, counter in self.counters.items():
            counter.load_state_dict(part_of(tensors, name))
        self.facts = Facts.load(part_of(tensors, "facts"))
        self.trained.load_state_dict(part_of(tensors, "trained"))
        self.trained.moments = part_of(tensors, "moments")
        self._settled = None


def _popular(counts_I: Floats, floor: float, k: int) -> tuple[Floats, Ints]:
    """Log shares of all items, and the best ones."""
    best_K = np.argsort(-counts_I, kind="stable")[:k]
    share_I = counts_I / max(float(counts_I.sum()), 1e-9)
    return np.log(share_I + floor), best_K[counts_I[best_K] > 0]


def in_one(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all parts, by the part's name, a point, and their own."""
    return {f"{part}.{name}": tensor for part, inner in parts.items() for name, tensor in inner.items()}


def part_of(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The inverse of `in_one`, for one part: those whose names begin with `name` and a point, without it."""
    return {key[len(name) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
