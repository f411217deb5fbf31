"""Blend: experts that count, joined by weights learned from what each of them said before an event happened.

Each expert offers its best items; these and the user's own are the candidates. A candidate is described by what every
expert thinks of it, and by facts about item and history; a linear rule orders them (`learn.listwise.refit`). What is
learnt from is written down when events arrive, from the state before them, and never made again: it cannot know the
future. Until there is a rule, or while it does worse, the best expert speaks alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.data.batches import Targets, closed, histories_before, in_parts, place, random_source, targets_at
from freshrec.models.facts import ITEM, OWN, USER, Facts
from freshrec.models.pairs import PairsSpec
from freshrec.models.popularity import Popularity, PopularitySpec
from freshrec.models.repeat import RepeatSpec
from freshrec.models.sparse import Board, Floats, Ints, best, distinct, picked
from freshrec.models.user_knn import UserKNNSpec
from freshrec.options import Count, check_options
from freshrec.types import Batch, Events, Histories, Model

EXPERTS: dict[str, Any] = {
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
N = len(EXPERTS)
FEATURES = (
    *(f"share {name}" for name in EXPERTS), *(f"rank {name}" for name in EXPERTS), *OWN, *ITEM, *USER,
)  # fmt: skip
FLOOR = 0.1  # events' worth of probability, shared by all items, known, that an expert gives to those it is silent on
ENTRIES = 8_000_000  # users x items on one board
REMEMBER, CORRECT = 1401, 1402  # tell the random numbers from others
HIDDEN = 32


@runtime_checkable
class Expert(Model, Protocol):
    """A counter that has an opinion of few items of each user."""

    def sparse(self, batch: Batch) -> Any:
        """(B, I + 1) scores as a sparse matrix; what is not in it is 0, which is no opinion."""


@dataclass(frozen=True)
class BlendSpec:
    """How many candidates, and how much is remembered to learn from."""

    offered: Count = 100  # items by each expert
    length: Count = 50  # history items looked at
    remembered: Count = 6000  # queries, the latest
    per_window: Count = 2000  # queries remembered of a sixth of the base block, and in proportion of what comes later
    others: Count = 60  # candidates remembered with a query, beside the target

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> Blend:
        """A model without users and items."""
        return Blend(self, seed)


@dataclass(frozen=True)
class Remembered:
    """Queries as they were when their events arrived, the oldest first."""

    x_QCF: Tensor  # float16; those whose target was a candidate, which is the first
    real_QC: Tensor  # bool: not padding
    ranks_PR: Tensor  # float32: all queries: the rank of the target by each expert and by the rule; inf: not offered

    def ndcg(self) -> Floats:
        """(P, N + 1) ndcg@20 of each query, by each expert and by the rule; nan where there was no rule."""
        rank_PR = self.ranks_PR.numpy()
        value_PR: Floats = np.where(rank_PR > 20, 0.0, 1 / np.log2(1 + rank_PR))
        return value_PR

    def latest(self, n: int) -> Remembered:
        """Without the older ones."""
        return Remembered(*(column[-n:] for column in vars(self).values()))


@dataclass(frozen=True)
class Rule:
    """How candidates are ordered: weights of `crossed` features, which can be read, and a small network's correction.

    Features are standardised first. H: the network's hidden units, in two layers.
    """

    weights_G: Tensor
    mean_F: Tensor
    std_F: Tensor
    first_HF: Tensor
    first_H: Tensor
    second_HH: Tensor
    second_H: Tensor
    last_H: Tensor

    @staticmethod
    def start(seed: int) -> Rule:
        """A rule that finds all candidates alike."""
        n, source = len(FEATURES), random_source(seed, CORRECT)
        first_HF = torch.randn(HIDDEN, n, generator=source) / n**0.5
        second_HH = torch.randn(HIDDEN, HIDDEN, generator=source) / HIDDEN**0.5
        nothing_H, all_alike_G = torch.zeros(HIDDEN), torch.zeros(crossed(torch.zeros(1, 1, n)).shape[2])
        return Rule(all_alike_G, torch.zeros(n), torch.ones(n), first_HF, nothing_H, second_HH, nothing_H, nothing_H)

    def standard(self, x_BCF: Tensor) -> Tensor:
        """(B, C, F) of mean 0 and deviation 1."""
        return (x_BCF - self.mean_F) / self.std_F

    def correction(self, z_BCF: Tensor) -> Tensor:
        """(B, C): what the network adds, from `standard` features."""
        hidden_BCH = F.silu(F.linear(z_BCF.clamp(-5.0, 5.0), self.first_HF, self.first_H))
        return F.silu(F.linear(hidden_BCH, self.second_HH, self.second_H)) @ self.last_H

    def scores(self, x_BCF: Tensor) -> Tensor:
        """(B, C)"""
        z_BCF = self.standard(x_BCF)
        return crossed(z_BCF) @ self.weights_G + self.correction(z_BCF)


class Blend:
    """A model without gradients. Scores are probabilities over the user's candidates; 0 for other items."""

    rule: Rule | None
    trusted: int  # the expert that was best on what is remembered: it speaks where there is no rule

    def __init__(self, spec: BlendSpec, seed: int) -> None:
        self.spec, self.seed, self.n_users, self.n_items = spec, seed, 0, 0
        self.experts: dict[str, Model] = {name: expert.build(seed) for name, expert in EXPERTS.items()}
        self.facts, self.rule, self.trusted = Facts.empty(), None, 0
        self.window = self.n_blocks = 0  # events in a window: a sixth of the first block
        nothing = torch.zeros(0, spec.others + 1, len(FEATURES), dtype=torch.float16)
        self.remembered = Remembered(nothing, nothing[..., 0] > 0, torch.zeros(0, N + 1))
        self._best: dict[str, Ints] = {}  # the popular items, found when first asked

    def grow(self, n_users: int, n_items: int) -> None:
        """Make room for new users and items."""
        for expert in self.experts.values():
            expert.grow(n_users, n_items)
        self.facts.grow(n_items)
        self.n_users, self.n_items = n_users, n_items

    def absorb(self, events: Events, histories: Histories) -> None:
        """Remember what was said of some of these events before they came, then count them.

        The first events, the base block, come in two parts, so that there is something to learn from at once.
        """
        if not len(events):
            return
        parts = [events]
        if not self.window:
            self.window = max(1, round(len(events) / 6))
            parts = [events[: -self.window], events[-self.window :]]
        for part in parts:
            after, rows_E = place(histories, part, self.n_users)
            targets = targets_at(after, rows_E)
            if self.facts.clock:
                self._remember(targets)
            for expert in self.experts.values():
                expert.absorb(part, histories)
            self._best = {}
            self.facts.absorb(targets)
            histories, self.n_blocks = after, self.n_blocks + 1
        if len(self.remembered.ranks_PR):
            self.trusted = int(self.remembered.ndcg()[:, :N].mean(0).argmax())

    def _remember(self, targets: Targets) -> None:
        """Ask for some of the targets, and write down what the candidates looked like."""
        source = random_source(self.seed, REMEMBER, self.n_blocks)
        able_N = (targets.lengths(1) > 0) & (self.facts.known(targets.items_N) > 0)
        order_N = torch.randperm(len(targets), generator=source)
        order_N = order_N[able_N[order_N]]
        share = min(1.0, self.spec.per_window / self.window)
        wanted = min(self.spec.remembered, round(share * len(targets)))
        by_turn_N = torch.argsort(_turns(targets.users_N[order_N]), stable=True)  # one event of each user, then another
        targets = targets[order_N[by_turn_N[:wanted]]]
        kept = [self.remembered]
        for which in in_parts(torch.arange(len(targets)), 256):
            part = targets[which]
            items_BC, x_BCF = self.describe(Batch(part.users_N, histories_before(part, self.spec.length)))
            kept.append(_written(self.spec, self.rule, items_BC, x_BCF, part.items_N[:, None], source))
        columns = zip(*(vars(rows).values() for rows in kept))
        self.remembered = Remembered(*(torch.cat(column) for column in columns)).latest(self.spec.remembered)

    def describe(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The candidates (B, C), 0 where a user has fewer, and their features (B, C, F)."""
        size = max(1, ENTRIES // (self.n_items + 1))
        parts = [self._described(batch, which) for which in in_parts(torch.arange(len(batch)), size)]
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
        history_BT = closed(self.facts.known(batch.history_BT[which][:, -self.spec.length :]))
        batch, n = Batch(batch.users_B[which], history_BT), len(which)
        said = [self._said(name, batch) for name in self.experts]
        items_BC = distinct(np.concatenate([history_BT.numpy(), *(offered_BK for _, offered_BK in said)], axis=1))
        board, floor, columns = Board(n, self.n_items + 1), self._floor, []
        for scores, _ in said:
            if isinstance(scores, np.ndarray):
                share_BC = scores[items_BC] / max(float(scores.sum()), 1e-9)
            else:
                share_BC = board.of(items_BC, scores) / np.maximum(np.asarray(scores.sum(1)), 1e-9)[:, None]
            columns.append(np.log(share_BC + floor))
        for _, offered_BK in said:
            place_K = np.arange(self.spec.offered, self.spec.offered - offered_BK.shape[1], -1)
            columns.append(np.log(self.spec.offered + 1 - board.at(items_BC, offered_BK, place_K)))
        columns += self.facts.describe(items_BC, history_BT.numpy(), board, self.window)
        return items_BC, np.stack(columns, axis=2, dtype=np.float32)

    def _said(self, name: str, batch: Batch) -> tuple[Any, Ints]:
        """What an expert thinks: its scores, an array where they are the same for all, and its best items (B, K)."""
        expert = self.experts[name]
        if isinstance(expert, Expert):
            scores_BI = expert.sparse(batch)
            return scores_BI, best(scores_BI, self.spec.offered)[0]
        assert isinstance(expert, Popularity)
        score_I = expert.counts_I.numpy()
        if name not in self._best:
            best_K = np.argsort(-score_I, kind="stable")[: self.spec.offered]
            self._best[name] = best_K[score_I[best_K] > 0]
        return score_I, np.broadcast_to(self._best[name], (len(batch), len(self._best[name])))

    @property
    def _floor(self) -> float:
        return FLOOR / max(1, int((self.facts.events_I > 0).sum()))

    def candidates(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, C) items, 0 where a user has fewer, and how likely each is the next among them; 0 is no opinion."""
        items_BC, x_BCF = self.describe(batch)
        if self.rule is None:
            share_BC = x_BCF[..., self.trusted].exp() - self._floor
            return items_BC, torch.where((items_BC > 0) & (share_BC > 1e-9), share_BC, 0.0)
        score_BC = self.rule.scores(x_BCF).masked_fill(items_BC == 0, -torch.inf)
        return items_BC, score_BC.softmax(1).nan_to_num(0.0)

    def score(self, batch: Batch, items: Tensor) -> Tensor:
        """(B, N) of the items that are candidates; 0 of others."""
        items_BC, score_BC = self.candidates(batch)
        scores_BI = torch.zeros(len(batch), self.n_items + 1).scatter_(1, items_BC, score_BC)
        scores_BI[:, 0] = 0.0
        return picked(scores_BI, items)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the model knows."""
        numbers = [self.n_users, self.n_items, self.window, self.n_blocks, self.trusted]
        parts: dict[str, dict[str, Tensor]] = {"facts": self.facts.state_dict(), "remembered": vars(self.remembered)}
        parts |= {f"experts.{name}": dict(expert.state_dict()) for name, expert in self.experts.items()}
        parts |= {} if self.rule is None else {"rule": vars(self.rule)}
        tensors = {f"{part}.{name}": tensor for part, inner in parts.items() for name, tensor in inner.items()}
        return {"numbers": torch.tensor(numbers)} | tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self.n_users, self.n_items, self.window, self.n_blocks, self.trusted = tensors["numbers"].tolist()

        def part(name: str) -> dict[str, Tensor]:
            return {key[len(name) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}

        self.facts, self.remembered = Facts.load(part("facts")), Remembered(**part("remembered"))
        self.rule = Rule(**part("rule")) if part("rule") else None
        for name, expert in self.experts.items():
            expert.load_state_dict(part(f"experts.{name}"))
        self._best = {}


def _written(
    spec: BlendSpec, rule: Rule | None, items_BC: Tensor, x_BCF: Tensor, target_B1: Tensor, source: torch.Generator
) -> Remembered:
    """Of the queries whose target was offered, it and other candidates, drawn at random; of all queries the ranks."""
    is_target_BC, real_BC, n = items_BC == target_B1, items_BC > 0, spec.others + 1
    found_B = is_target_BC.any(1)
    draw_BC = torch.rand(real_BC.shape, generator=source) + 2.0 * ~real_BC - 2.0 * is_target_BC
    chosen_BC = draw_BC.argsort(1)[:, :n]
    x_QCF = x_BCF.gather(1, chosen_BC[..., None].expand(-1, -1, x_BCF.shape[2]))[found_B].half()
    real_QC = real_BC.gather(1, chosen_BC)[found_B]
    short = n - real_QC.shape[1]
    target_BF = (x_BCF * is_target_BC[..., None]).sum(1)
    ranks_BR = torch.full((len(found_B), N + 1), torch.inf)
    ranks_BR[found_B, :N] = target_BF[found_B, N : 2 * N].exp().round()
    ranks_BR[:, :N][ranks_BR[:, :N] > spec.offered] = torch.inf
    if rule is None:
        ranks_BR[:, N] = torch.nan
    else:
        score_BC = rule.scores(x_BCF).masked_fill(~real_BC, -torch.inf)
        own_B1 = score_BC.masked_fill(~is_target_BC, -torch.inf).amax(1, keepdim=True)
        ranks_BR[found_B, N] = 1.0 + (score_BC > own_B1).sum(1)[found_B]
    return Remembered(F.pad(x_QCF, (0, 0, 0, short)), F.pad(real_QC, (0, short)), ranks_BR)


def _turns(users_N: Tensor) -> Tensor:
    """(N,) how many earlier rows are of the same user."""
    order_N = torch.argsort(users_N, stable=True)
    sorted_N, at_N = users_N[order_N], torch.arange(len(users_N))
    starts_N = torch.ones(len(users_N), dtype=torch.bool)
    starts_N[1:] = sorted_N[1:] != sorted_N[:-1]
    turn_N = at_N - torch.where(starts_N, at_N, 0).cummax(0).values if len(at_N) else at_N
    return torch.empty_like(at_N).index_copy(0, order_N, turn_N)


def crossed(x_BCF: Tensor) -> Tensor:
    """(B, C, G): the features that differ between candidates, and products of them with those that do not.

    That is how trust in an expert comes to depend on how often a user repeats, and on how long the history is.
    """
    own, item = 2 * N, 2 * N + len(OWN)
    share, mine, again = x_BCF[..., :N], x_BCF[..., own:item], x_BCF[..., item : item + 1]
    user = len(FEATURES) - len(USER)
    repeats, length = x_BCF[..., user : user + 1], x_BCF[..., user + 1 :]
    products = [share * repeats, share * length, mine * repeats, mine * length, mine * again]
    return torch.cat([x_BCF[..., :user], *products, mine[..., :1] * again * repeats], -1)
