"""The experts of a blend: what they offer a user, and how they and the facts describe each candidate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from freshrec.data.batches import Targets, closed, in_parts
from freshrec.models.facts import ITEM, OWN, USER, Facts, of_own, of_users
from freshrec.models.pairs import PairsSpec
from freshrec.models.pooled import Pooled, PooledSpec
from freshrec.models.popularity import Popularity, PopularitySpec
from freshrec.models.repeat import Repeat, RepeatSpec
from freshrec.models.sparse import Cells, Floats, Ints, Runs, best, distinct
from freshrec.models.user_knn import UserKNNSpec
from freshrec.types import Batch, CountingModel, Events, Histories, StateDictModel

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
    *(f"share {name}" for name in EXPERTS),
    *(f"rank {name}" for name in EXPERTS),
    *OWN,
    *ITEM,
    *USER,
)


class Slots:
    """The columns of each group of FEATURES."""

    share = slice(0, N)  # ln of the share that each expert gives to a candidate
    rank = slice(share.stop, share.stop + N)  # ln of its place in each expert's opinion
    own = slice(rank.stop, rank.stop + len(OWN))
    item = slice(own.stop, own.stop + len(ITEM))
    user = slice(item.stop, item.stop + len(USER))


SHARE = {name: FEATURES.index(f"share {name}") for name in EXPERTS}
RANK = {name: FEATURES.index(f"rank {name}") for name in EXPERTS}
POOLED = EXPERTS.index("pooled")  # the trained expert
ALIKE = [name for name, spec in COUNTING.items() if isinstance(spec, PopularitySpec)]  # they think alike of all users
FLOOR = 0.1  # events' worth of probability, shared by all items, known, that an expert gives to those it is silent on
ENTRIES = 8_000_000  # users x items on one board
LATELY = "popularity-1"
SHELF = 8192  # items, those most taken lately (by LATELY), among which the trained expert looks for what it offers


class Expert(CountingModel, StateDictModel, Protocol):
    """A counting model as part of a blend."""


class Counter(Expert, Protocol):
    """It has an opinion of few items of each user."""

    def sparse(self, batch: Batch) -> Any:
        """(B, I + 1) scores as a sparse matrix; what is not in it is 0, which is no opinion."""


@dataclass(frozen=True)
class Settled:
    """What stays as it is until more is counted or learnt."""

    floor: float  # what an expert that is silent on an item is taken to think of it: a share
    mean: float  # of the facts
    x_IF: Floats  # (I + 1, F) features of all items for a user of whom nothing is known
    log_rank_K: Tensor  # of places 1, 2, ...; the last is that of what is not offered
    popular_P: Ints  # what any of the popularities offers, ascending
    shelf_S: Tensor  # what the trained expert may offer: items that it has learnt
    shelf_SD: Tensor  # their vectors

    def liked(self, vectors_BD: Tensor, known_B: Tensor, k: int) -> Ints:
        """(B, K) the items on the shelf that the trained expert likes best; 0 where it knows nothing of the user."""
        best_BK = (vectors_BD @ self.shelf_SD.T).topk(min(k, len(self.shelf_S))).indices
        liked_BK: Ints = torch.where(known_B[:, None], self.shelf_S[best_BK], 0).numpy()
        return liked_BK

    def features_of(self, items_BC: Ints) -> Floats:
        """(1 + B C, F) the features of the candidates for a user of whom nothing is known, a row for each of `Cells`.

        The first row is for what is said of other items; it is never read.
        """
        x_MF = np.empty((1 + items_BC.size, len(FEATURES)), np.float32)
        self.x_IF.take(items_BC.ravel(), axis=0, out=x_MF[1:], mode="clip")  # "raise" would copy first
        return x_MF


class Experts:
    """Counters, of which each offers its best items, and one that is trained. Together with facts they describe."""

    def __init__(self, offered: int, length: int, seed: int) -> None:
        self.offered, self.length, self.n_items = offered, length, 0
        self.counters: dict[str, Expert] = {name: counter.build(seed) for name, counter in COUNTING.items()}
        self.trained: Pooled = TRAINED.build(seed)  # by the strategy; until then it has no opinion
        self.facts = Facts.empty()
        self.window = 0  # events: a sixth of the first block; 0 until that is known. Ages of items are measured in it
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
        history_BT = batch.history_BT.numpy()
        learnt_BT = np.where(self.trained.taken.steps_R.numpy().take(history_BT) > 0, history_BT, 0)
        known_BT = closed(torch.from_numpy(learnt_BT))
        vectors_BD = self.trained.user_vectors(Batch(batch.users_B, known_BT))[:, 0]
        return vectors_BD, torch.from_numpy((learnt_BT > 0).any(1))

    def opinion(self, items_BC: Tensor, vectors_BD: Tensor, known_B: Tensor) -> tuple[Tensor, Tensor]:
        """What the trained expert thinks of the candidates: log share among them (B, C), and log rank.

        It is silent on items, and on histories, that it has not learnt.
        """
        items, settled = self.trained.items, self.settled
        known_BC = torch.from_numpy(items.steps_R.numpy().take(items_BC.numpy()) > 0) & known_B[:, None]
        logit_BC = (items.weights[items_BC] @ vectors_BD[..., None])[..., 0].masked_fill_(~known_BC, -torch.inf)
        order_BC = logit_BC.argsort(dim=1, descending=True, stable=True)
        rank_BC = torch.empty_like(order_BC).scatter_(1, order_BC, torch.arange(order_BC.shape[1]).expand_as(order_BC))
        rank_BC = torch.where(known_BC, rank_BC, self.offered).clamp_(max=self.offered)  # from 0
        share_BC = logit_BC.softmax(1).nan_to_num_(0.0)
        return share_BC.add_(settled.floor).log_(), settled.log_rank_K[rank_BC]

    def describe(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The candidates (B, C), 0 where a user has fewer, and their features (B, C, F)."""
        size = max(1, ENTRIES // (self.n_items + 1))
        parts = [self._described(batch, which) for which in in_parts(torch.arange(len(batch)), size)]
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

    def _described(self, batch: Batch, which: Tensor) -> tuple[Ints, Floats]:
        """`describe` of some users."""
        history_BT = closed(batch.history_BT[which])[:, -self.length :]
        batch, runs = Batch(batch.users_B[which], history_BT), Runs.of(history_BT.numpy())
        said = {name: _said(counter, batch, runs) for name, counter in self.counters.items() if name not in ALIKE}
        offers = {name: best(scores_BI, self.offered)[0] for name, scores_BI in said.items()}
        settled = self.settled
        asked = self.asked(batch) if len(settled.shelf_S) else None
        liked = [] if asked is None else [settled.liked(*asked, self.offered)]
        popular_BP = np.broadcast_to(settled.popular_P, (len(batch), len(settled.popular_P)))
        items_BC = distinct(np.concatenate([history_BT.numpy(), popular_BP, *offers.values(), *liked], axis=1))
        cells = Cells(items_BC, self.n_items + 1)
        x_MF = settled.features_of(items_BC)
        x_BCF = x_MF[1:].reshape(*items_BC.shape, len(FEATURES))
        self._write_counters(x_MF, cells, said, offers)
        if asked is not None:
            share_BC, rank_BC = self.opinion(torch.from_numpy(items_BC), *asked)
            x_BCF[..., SHARE["pooled"]], x_BCF[..., RANK["pooled"]] = share_BC.numpy(), rank_BC.numpy()
        x_MF[cells.cells_BI[runs.row_W, runs.items_W], Slots.own] = of_own(runs)
        user_BF = of_users(runs, (history_BT.numpy() > 0).sum(1), settled.mean)
        x_BCF[..., Slots.user] = user_BF[:, None] * (items_BC > 0)[..., None]
        return items_BC, x_BCF

    def _write_counters(self, x_MF: Floats, cells: Cells, said: dict[str, Any], offers: dict[str, Ints]) -> None:
        """What each counter thinks of the candidates, and the places of those that it offers, into their features."""
        log_rank_K, floor = np.log(np.arange(1, self.offered + 1, dtype=np.float32)), self.settled.floor
        for name, offered_BK in offers.items():
            cells_H, shares_H = cells.of(said[name])
            x_MF[cells_H, SHARE[name]] = np.log(shares_H + floor)
            x_MF[cells.at(offered_BK), RANK[name]] = log_rank_K[: offered_BK.shape[1]]

    @property
    def settled(self) -> Settled:
        """Made when first asked for, after something was counted or learnt."""
        if self._settled is None:
            self._settled = _settle(self)
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


def _settle(experts: Experts) -> Settled:
    floor = FLOOR / max(1, int((experts.facts.events_I > 0).sum()))
    x_IF, offers = np.zeros((experts.n_items + 1, len(FEATURES)), np.float32), []
    x_IF[:, Slots.share], x_IF[:, Slots.rank] = np.log(np.float32(floor)), np.log(experts.offered + 1)
    x_IF[:, SHARE["pooled"]] = np.log(floor)
    for name in ALIKE:
        counts_I = cast(Popularity, experts.counters[name]).counts_I.numpy()
        best_K = largest(counts_I, experts.offered)
        best_K = best_K[counts_I[best_K] > 0]
        x_IF[:, SHARE[name]] = np.log(counts_I / max(float(counts_I.sum()), 1e-9) + floor)
        x_IF[best_K, RANK[name]] = np.log(np.arange(1, len(best_K) + 1, dtype=np.float32))
        offers.append(best_K)
    x_IF[:, Slots.item] = experts.facts.of_items(max(1, experts.window))
    lately_I = cast(Popularity, experts.counters[LATELY]).counts_I
    shelf_S = torch.from_numpy(largest(lately_I.numpy(), SHELF))
    shelf_S = shelf_S[lately_I[shelf_S].gt(0) & experts.trained.items.steps_R[shelf_S].gt(0)]
    popular_P, shelf_SD = np.unique(np.concatenate(offers)), experts.trained.items.weights[shelf_S]
    log_rank_K = torch.arange(1, experts.offered + 2).log()
    return Settled(floor, experts.facts.mean, x_IF, log_rank_K, popular_P, shelf_S, shelf_SD)


def _said(counter: Expert, batch: Batch, runs: Runs) -> Any:
    return counter.of(runs) if isinstance(counter, Repeat) else cast(Counter, counter).sparse(batch)


def largest(values_I: NDArray[Any], k: int) -> Ints:
    """(K,) where the k largest values are, the largest first; of equal ones the first."""
    if k < len(values_I):
        at_least = np.partition(values_I, len(values_I) - k)[len(values_I) - k]
        at_N = np.flatnonzero(values_I >= at_least)
    else:
        at_N = np.arange(len(values_I))
    largest_K: Ints = at_N[np.argsort(-values_I[at_N], kind="stable")[:k]]
    return largest_K


def in_one(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all parts, by the part's name, a point, and their own."""
    return {f"{part}.{name}": tensor for part, inner in parts.items() for name, tensor in inner.items()}


def part_of(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The inverse of `in_one`, for one part: those whose names begin with `name` and a point, without it."""
    return {key[len(name) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
