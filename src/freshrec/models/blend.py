"""Blend: experts that count and one that is trained, joined by weights learned from what each said beforehand.

Each counter offers its best items; these and the user's own are the candidates. A candidate is described by what every
expert thinks of it, and by facts about item and history; a rule orders them (`learn.listwise.refit`). What is learnt
from is written down when events arrive, from the state before them, and never made again: it cannot know the future.
Until there is a rule, or while it does worse, the best expert speaks alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.config import HISTORY_LENGTH, Count, check_options
from freshrec.data.batches import Targets, histories_before, in_parts, place, random_source, targets_at, turns_of
from freshrec.device import normal, permutation, uniform
from freshrec.models.experts import EXPERTS, FEATURES, POOLED, RANK, SHARE, Experts, N, Slots, in_one, part_of
from freshrec.models.facts import ITEM, OWN, among_last
from freshrec.models.pairs import Pairs
from freshrec.models.sparse import Floats, picked
from freshrec.types import Batch, Events, Histories

REMEMBER, CORRECT = 1401, 1402  # tell the random numbers from others
HIDDEN = 32
CROSSED = [FEATURES.index(name) for name in ("taken", "taken again", "takes again", "length")]  # in `crossed`
RULE = N  # the column of the rule, after those of the experts, in what is remembered of ranks
SOURCES = (*EXPERTS, "own history", "item", "correction")  # of a score


@dataclass(frozen=True)
class BlendSpec:
    """How many candidates, and how much is remembered to learn from."""

    offered: Count = 100  # items by each expert
    length: Count = HISTORY_LENGTH  # history items looked at
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

    def best(self) -> int:
        """The expert that was best on average; the first one while there are no queries."""
        return int(self.ndcg()[:, :N].mean(0).argmax()) if len(self.ranks_PR) else 0

    def latest(self, n: int) -> Remembered:
        """Without the older ones."""
        return Remembered(self.x_QCF[-n:], self.real_QC[-n:], self.ranks_PR[-n:])

    @staticmethod
    def joined(parts: list[Remembered]) -> Remembered:
        """One part after the other."""
        return Remembered(
            torch.cat([part.x_QCF for part in parts]),
            torch.cat([part.real_QC for part in parts]),
            torch.cat([part.ranks_PR for part in parts]),
        )


@dataclass(frozen=True)
class Waiting:
    """Remembered queries that the trained expert was not asked about, as there was none yet.

    `found_B` says which of the queries, as they are ranked, had their target among the candidates: only these are here.
    """

    found_B: Tensor
    users_Q: Tensor
    history_QT: Tensor
    items_QC: Tensor  # all candidates: an opinion is one among them
    kept_QC: Tensor  # the places of those that are remembered, the target's first


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
        first_HF = normal((HIDDEN, n), source) / n**0.5
        second_HH = normal((HIDDEN, HIDDEN), source) / HIDDEN**0.5
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

    def points(self, x_CF: Tensor) -> Tensor:
        """(C, S) what each of SOURCES adds to the score of each of a user's candidates, above their mean."""
        z_1CF = self.standard(x_CF)[None]
        adds_CG, correction_C = crossed(z_1CF)[0] * self.weights_G, self.correction(z_1CF)[0]
        source_G = torch.tensor([SOURCES.index(source) for source in sources_of_crossed()])
        points_CS = torch.zeros(len(x_CF), len(SOURCES)).index_add(1, source_G, adds_CG)
        points_CS[:, SOURCES.index("correction")] = correction_C
        return points_CS - points_CS.mean(0)


@dataclass(frozen=True)
class Reason:
    """What one expert, or one kind of fact, says for an item, and how much that counts."""

    source: str
    place: int | None  # of the item among those that the expert offers, or among all candidates if it is trained
    points: float  # of the score's logarithm, above the user's candidates on average; of all reasons they add up
    because: int  # the history item that speaks most for it; 0 where that is not known


class Blend:
    """A model of experts. Scores are probabilities over the user's candidates; 0 for other items."""

    rule: Rule | None
    overruled: bool  # the rule, by the trusted expert, which was better: it speaks alone while the rule is judged on
    trusted: int  # the expert that was best on what is remembered: it speaks where there is no rule

    def __init__(self, spec: BlendSpec, seed: int) -> None:
        self.spec, self.seed, self.n_users, self.n_items = spec, seed, 0, 0
        self.experts = Experts(spec.offered, spec.length, seed)
        self.rule, self.overruled, self.trusted = None, False, 0
        self.given_up = False  # the trained expert: it added nothing to the others
        self.n_blocks = 0
        nothing = torch.zeros(0, spec.others + 1, len(FEATURES), dtype=torch.float16)
        self.remembered = Remembered(nothing, nothing[..., 0] > 0, torch.zeros(0, N + 1))
        self.waiting: list[Waiting] = []  # those of the base block, until `hear_trained`

    def grow(self, n_users: int, n_items: int) -> None:
        """Make room for new users and items."""
        self.experts.grow(n_users, n_items)
        self.n_users, self.n_items = n_users, n_items

    def absorb(self, events: Events, histories: Histories) -> None:
        """Remember what was said of some of these events before they came, then count them.

        The first events, the base block, come in two parts, so that there is something to learn from at once.
        """
        if not len(events):
            return
        parts, self.waiting = [events], []
        if is_base := not self.experts.window:
            self.experts.window = window = max(1, round(len(events) / 6))
            parts = [events[:-window], events[-window:]]
        for part in parts:
            after, rows_E = place(histories, part, self.n_users)
            targets = targets_at(after, rows_E)
            if self.experts.facts.clock:
                self._remember(targets, is_base)
            self.experts.absorb(part, histories, targets)
            histories, self.n_blocks = after, self.n_blocks + 1
        self.trusted = self.remembered.best()

    def _remember(self, targets: Targets, is_base: bool) -> None:
        """Ask for some of the targets, and write down what the candidates looked like."""
        source = random_source(self.seed, REMEMBER, self.n_blocks)
        targets = _chosen(targets, self.spec, self.experts, source)
        kept = [self.remembered]
        for which in in_parts(torch.arange(len(targets)), 256):
            part = targets[which]
            batch = Batch(part.users_N, histories_before(part, self.spec.length))
            items_BC, x_BCF = self.experts.describe(batch)
            found_B, kept_QC, rows = _written(self.spec, self.rule, items_BC, x_BCF, part.items_N[:, None], source)
            kept.append(rows)
            if is_base:
                queries = batch.users_B[found_B], batch.history_BT[found_B], items_BC[found_B]
                self.waiting.append(Waiting(found_B, *queries, kept_QC))
        self.remembered = Remembered.joined(kept).latest(self.spec.remembered)

    def hear_trained(self) -> None:
        """Add the opinion of the trained expert to what waits for it; it must not have learnt from what came later."""
        self.experts.unsettle()
        x_QCF, ranks_PR = self.remembered.x_QCF.clone(), self.remembered.ranks_PR.clone()
        query = len(x_QCF) - sum(len(part.users_Q) for part in self.waiting)
        ranked = len(ranks_PR) - sum(len(part.found_B) for part in self.waiting)
        for part in self.waiting:
            asked = self.experts.asked(Batch(part.users_Q, part.history_QT))
            opinion = self.experts.opinion(part.items_QC, *asked)
            rows, n = slice(query, query + len(part.users_Q)), part.kept_QC.shape[1]
            share_QC, log_rank_QC = (value_QC.gather(1, part.kept_QC) for value_QC in opinion)
            x_QCF[rows, :n, SHARE["pooled"]], x_QCF[rows, :n, RANK["pooled"]] = share_QC.half(), log_rank_QC.half()
            rank_Q = log_rank_QC[:, 0].exp().round()
            at_P = ranked + part.found_B.nonzero()[:, 0]
            ranks_PR[at_P, POOLED] = torch.where(rank_Q > self.spec.offered, torch.inf, rank_Q)
            query, ranked = query + len(part.users_Q), ranked + len(part.found_B)
        self.remembered, self.waiting = replace(self.remembered, x_QCF=x_QCF, ranks_PR=ranks_PR), []
        self.trusted = self.remembered.best()

    def candidates(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, C) items, 0 where a user has fewer, and how likely each is the next among them; 0 is no opinion."""
        items_BC, x_BCF = self.experts.describe(batch)
        return items_BC, self._likely(items_BC, x_BCF)

    @property
    def ruling(self) -> Rule | None:
        """What orders candidates; None while the trusted expert does."""
        return None if self.overruled else self.rule

    def _likely(self, items_BC: Tensor, x_BCF: Tensor) -> Tensor:
        if self.ruling is None:
            share_BC = x_BCF[..., self.trusted].exp() - self.experts.settled.floor
            return torch.where((items_BC > 0) & (share_BC > 1e-9), share_BC, 0.0)
        score_BC = self.ruling.scores(x_BCF).masked_fill(items_BC == 0, -torch.inf)
        return score_BC.softmax(1).nan_to_num(0.0)

    def score(self, batch: Batch, items: Tensor) -> Tensor:
        """(B, N) of the items that are candidates; 0 of others."""
        items_BC, score_BC = self.candidates(batch)
        scores_BI = torch.zeros(len(batch), self.n_items + 1).scatter_(1, items_BC, score_BC)
        scores_BI[:, 0] = 0.0
        return picked(scores_BI, items)

    def explain(self, batch: Batch, item: int) -> list[Reason]:
        """Why a batch of one user is offered `item`, the weightiest reason first; none where it is not.

        Where the trusted expert speaks alone, it is the only reason.
        """
        items_BC, x_BCF = self.experts.describe(batch)
        offered_C = self._likely(items_BC, x_BCF)[0] > 0
        if not bool((offered_C & (items_BC[0] == item)).any()):
            return []
        items_C, x_CF = items_BC[0, items_BC[0] > 0], x_BCF[0, items_BC[0] > 0]
        at = int((items_C == item).int().argmax())
        ranks_N = x_CF[at, Slots.rank].exp().round().int().tolist()
        places = {name: rank for name, rank in zip(EXPERTS, ranks_N) if rank <= self.spec.offered}
        pairs = {name: counter for name, counter in self.experts.counters.items() if isinstance(counter, Pairs)}
        because = {name: counter.because(batch, item) for name, counter in pairs.items()}
        points = {EXPERTS[self.trusted]: 0.0}
        if self.ruling is not None:
            points = dict(zip(SOURCES, self.ruling.points(x_CF)[at].tolist()))
        reasons = [Reason(name, places.get(name), points[name], because.get(name, 0)) for name in points]
        return sorted(reasons, key=lambda reason: -reason.points)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the model knows."""
        numbers = [self.n_users, self.n_items, self.experts.window, self.n_blocks, self.trusted, int(self.given_up)]
        parts = {"experts": self.experts.state_dict(), "remembered": vars(self.remembered)}
        parts |= {} if self.rule is None else {"rule": vars(self.rule)}
        return {"numbers": torch.tensor(numbers), "overruled": torch.tensor(self.overruled)} | in_one(parts)

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        *numbers, given_up = tensors["numbers"].tolist()
        self.n_users, self.n_items, self.experts.window, self.n_blocks, self.trusted = numbers
        self.given_up = bool(given_up)
        self.overruled = bool(tensors.get("overruled", False))  # what was saved earlier had no overruled rules
        self.experts.load_state_dict(part_of(tensors, "experts"), self.n_users, self.n_items)
        self.remembered = Remembered(**part_of(tensors, "remembered"))
        rule = part_of(tensors, "rule")
        self.rule = Rule(**rule) if rule else None


def _chosen(targets: Targets, spec: BlendSpec, experts: Experts, source: torch.Generator) -> Targets:
    """The targets to ask for, drawn at random: one event of each user, then another, of users with a history.

    Only items that somebody, or the user lately, took before: no expert offers others.
    """
    has_events_I = torch.from_numpy(experts.facts.events_I > 0)
    known_N = among_last(targets, spec.length) | has_events_I[targets.items_N]
    able_N = (targets.lengths(1) > 0) & known_N
    order_N = permutation(len(targets), source)
    order_N = order_N[able_N[order_N]]
    turn_N = turns_of(targets.users_N[order_N])
    share = min(1.0, spec.per_window / experts.window)
    wanted = min(spec.remembered, round(share * len(targets)))
    return targets[order_N[turn_N.argsort(stable=True)[:wanted]]]


def _written(
    spec: BlendSpec, rule: Rule | None, items_BC: Tensor, x_BCF: Tensor, target_B1: Tensor, source: torch.Generator
) -> tuple[Tensor, Tensor, Remembered]:
    """Of the queries whose target was offered, it and other candidates, drawn at random; of all queries the ranks.

    Which queries those are (B,), and the places (Q, C) of what was drawn.
    """
    is_target_BC, real_BC, n = items_BC == target_B1, items_BC > 0, spec.others + 1
    found_B = is_target_BC.any(1)
    draw_BC = uniform(real_BC.shape, source) + 2.0 * ~real_BC - 2.0 * is_target_BC
    chosen_QC = draw_BC.argsort(1)[found_B, :n]
    x_QCF = x_BCF[found_B].gather(1, chosen_QC[..., None].expand(-1, -1, x_BCF.shape[2])).half()
    real_QC = real_BC[found_B].gather(1, chosen_QC)
    short = n - real_QC.shape[1]
    target_BF = (x_BCF * is_target_BC[..., None]).sum(1)
    ranks_BR = torch.full((len(found_B), N + 1), torch.inf)
    ranks_BR[found_B, :N] = target_BF[found_B, Slots.rank].exp().round()
    ranks_BR[:, :N][ranks_BR[:, :N] > spec.offered] = torch.inf
    if rule is None:
        ranks_BR[:, RULE] = torch.nan
    else:
        score_BC = rule.scores(x_BCF).masked_fill(~real_BC, -torch.inf)
        own_B1 = score_BC.masked_fill(~is_target_BC, -torch.inf).amax(1, keepdim=True)
        ranks_BR[found_B, RULE] = 1.0 + (score_BC > own_B1).sum(1)[found_B]
    return found_B, chosen_QC, Remembered(F.pad(x_QCF, (0, 0, 0, short)), F.pad(real_QC, (0, short)), ranks_BR)


def crossed(x_BCF: Tensor) -> Tensor:
    """(B, C, G): the features that differ between candidates, and products of them with those that do not.

    That is how trust in an expert comes to depend on how often a user repeats, and on how long the history is.
    """
    share, mine = x_BCF[..., Slots.share], x_BCF[..., Slots.own]
    taken, again, repeats, length = (x_BCF[..., column : column + 1] for column in CROSSED)
    products = [share * repeats, share * length, mine * repeats, mine * length, mine * again, taken * again * repeats]
    return torch.cat([x_BCF[..., : Slots.user.start], *products], -1)


def sources_of_crossed() -> list[str]:
    """Which of SOURCES each of the G crossed features speaks for."""
    mine = ["own history"] * len(OWN)
    return [*EXPERTS, *EXPERTS, *mine, *["item"] * len(ITEM), *EXPERTS, *EXPERTS, *mine, *mine, *mine, "own history"]
