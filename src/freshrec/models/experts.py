"""The experts of a blend: what they offer a user, and how they and the facts describe each candidate."""

from __future__ import annotations

from dataclasses import replace
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
from freshrec.models.sparse import Board, Floats, Ints, best, distinct
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


class Counter(Model, Protocol):
    """It has an opinion of few items of each user."""

    def sparse(self, batch: Batch) -> Any:
        """(B, I + 1) scores as a sparse matrix; what is not in it is 0, which is no opinion."""


class Experts:
    """Counters, of which each offers its best items, and one that is trained. Together with facts they describe."""

    def __init__(self, offered: int, length: int, seed: int) -> None:
        self.offered, self.length, self.n_items = offered, length, 0
        self.counters: dict[str, Model] = {name: counter.build(seed) for name, counter in COUNTING.items()}
        self.trained: Pooled = TRAINED.build(seed)  # by the strategy; until then it has no opinion
        self.facts = Facts.empty()
        self._best: dict[str, Ints] = {}  # the popular items, found when first asked

    def grow(self, n_users: int, n_items: int) -> None:
        """Make room for new users and items."""
        for expert in (*self.counters.values(), self.trained):
            expert.grow(n_users, n_items)
        self.facts.grow(n_items)
        self.n_items = n_items

    def absorb(self, events: Events, histories: Histories, targets: Targets) -> None:
        """Count the events; `targets` are the same, in their histories."""
        for counter in self.counters.values():
            counter.absorb(events, histories)
        self._best = {}
        self.facts.absorb(targets)

    @property
    def is_trained(self) -> bool:
        """Whether the trained expert has learnt anything."""
        return bool(self.trained.items.steps_R.any())

    def logits(self, batch: Batch) -> Tensor:
        """(B, I + 1) what the trained expert thinks; -inf of items, and of histories, that it has not learnt."""
        if not self.is_trained:
            return torch.full((len(batch), self.n_items + 1), -torch.inf)
        learnt_I, taken_I = self.trained.items.steps_R > 0, self.trained.taken.steps_R > 0
        history_BT = closed(torch.where(taken_I[batch.history_BT], batch.history_BT, 0))
        vectors_BD = self.trained.user_vectors(replace(batch, history_BT=history_BT))[:, 0]
        known_BI = learnt_I & (history_BT > 0).any(1)[:, None]
        return (vectors_BD @ self.trained.items.weights.T).masked_fill_(~known_BI, -torch.inf)

    def opinion(self, items_BC: Tensor, logit_BI: Tensor) -> tuple[Tensor, Tensor]:
        """What the trained expert thinks of the candidates: log share among them (B, C), and log rank."""
        logit_BC = logit_BI.gather(1, items_BC)
        known_BC = logit_BC > -torch.inf
        rank_BC = 1 + logit_BC.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        rank_BC = torch.where(known_BC, rank_BC, self.offered + 1).clamp(max=self.offered + 1)
        return (logit_BC.softmax(1).nan_to_num(0.0) + self.floor).log(), rank_BC.log()

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
        history_BT = closed(self.facts.known(batch.history_BT[which][:, -self.length :]))
        batch, n = Batch(batch.users_B[which], history_BT), len(which)
        said = [self._said(name, batch) for name in self.counters]
        logit_BI = self.logits(batch)
        top = logit_BI.topk(min(self.offered, self.n_items))
        liked_BK = torch.where(top.values > -torch.inf, top.indices, 0).numpy()
        offered = [history_BT.numpy(), *(offered_BK for _, offered_BK in said), liked_BK]
        items_BC = distinct(np.concatenate(offered, axis=1))
        board, floor, columns = Board(n, self.n_items + 1), self.floor, []
        for scores, _ in said:
            if isinstance(scores, np.ndarray):
                share_BC = scores[items_BC] / max(float(scores.sum()), 1e-9)
            else:
                share_BC = board.of(items_BC, scores) / np.maximum(np.asarray(scores.sum(1)), 1e-9)[:, None]
            columns.append(np.log(share_BC + floor))
        shares_BC, ranks_BC = self.opinion(torch.from_numpy(items_BC), logit_BI)
        columns.append(shares_BC.numpy())
        for _, offered_BK in said:
            place_K = np.arange(self.offered, self.offered - offered_BK.shape[1], -1)
            columns.append(np.log(self.offered + 1 - board.at(items_BC, offered_BK, place_K)))
        columns.append(ranks_BC.numpy())
        columns += self.facts.describe(items_BC, history_BT.numpy(), board, window)
        return items_BC, np.stack(columns, axis=2, dtype=np.float32)

    def _said(self, name: str, batch: Batch) -> tuple[Any, Ints]:
        """What a counter thinks: its scores, an array where they are the same for all, and its best items (B, K)."""
        counter = self.counters[name]
        if not isinstance(counter, Popularity):
            scores_BI = cast(Counter, counter).sparse(batch)
            return scores_BI, best(scores_BI, self.offered)[0]
        score_I = counter.counts_I.numpy()
        if name not in self._best:
            best_K = np.argsort(-score_I, kind="stable")[: self.offered]
            self._best[name] = best_K[score_I[best_K] > 0]
        return score_I, np.broadcast_to(self._best[name], (len(batch), len(self._best[name])))

    @property
    def floor(self) -> float:
        """What an expert that is silent on an item is taken to think of it: a share."""
        return FLOOR / max(1, int((self.facts.events_I > 0).sum()))

    def state_dict(self) -> dict[str, Tensor]:
        """Everything they know."""
        parts = {name: dict(counter.state_dict()) for name, counter in self.counters.items()}
        parts |= {"facts": self.facts.state_dict(), "trained": dict(self.trained.state_dict())}
        parts |= {"moments": self.trained.moments}
        return {f"{part}.{name}": tensor for part, inner in parts.items() for name, tensor in inner.items()}

    def load_state_dict(self, tensors: dict[str, Tensor], n_users: int, n_items: int) -> None:
        """The inverse of `state_dict`."""
        self.grow(n_users, n_items)
        for name, counter in self.counters.items():
            counter.load_state_dict(part_of(tensors, name))
        self.facts = Facts.load(part_of(tensors, "facts"))
        self.trained.load_state_dict(part_of(tensors, "trained"))
        self.trained.moments = part_of(tensors, "moments")
        self._best = {}


def part_of(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Those whose names begin with `name` and a point, without it."""
    return {key[len(name) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
