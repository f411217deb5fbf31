"""Blend: counting experts and one trained expert, combined by weights that are learned from past queries.

Each expert proposes its best items. These and the items of the user's history are the candidates. The features of a
candidate are its scores by all experts and statistics of the item and the history. A rule ranks the candidates
(`fit_rule`). Training queries are logged when events arrive, with the scores of the state before the events. They are
never recomputed, so they cannot leak the future. Until there is a rule, or while it ranks worse than the best expert,
that expert ranks alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.config import HISTORY_LENGTH, Count, check_options
from freshrec.data.batches import Targets, history_items, occurrence_numbers, split_chunks, targets_at
from freshrec.data.histories import insert_events
from freshrec.device import permutation, uniform
from freshrec.models.blend.experts import (
    EXPERT_NAMES,
    FEATURES,
    N_EXPERTS,
    POOLED,
    RANK_COLUMN,
    SHARE_COLUMN,
    Experts,
    Slots,
    extract_state_dict,
    flatten_state_dicts,
    set_window,
)
from freshrec.models.blend.features import is_repeat
from freshrec.models.blend.rule import (
    RULE,
    SCORE_SOURCES,
    QueryLog,
    Rule,
    cross_features,
    feature_scale,
    fit_correction,
    fit_listwise,
    is_significantly_better,
)
from freshrec.models.item_knn import ItemKNN
from freshrec.models.model_text import model_text
from freshrec.nn.forward_decay import window_size
from freshrec.nn.sparse import select_scores
from freshrec.random_streams import stream
from freshrec.types import Batch, Events, Histories


@dataclass(frozen=True)
class BlendSpec:
    """Options of the blend: the number of candidates, and the size of the query log."""

    items_per_expert: Count = 100  # Number of items that each expert proposes as candidates.
    length: Count = HISTORY_LENGTH  # Number of a user's most recent events that the model reads.
    max_queries: Count = 6000  # Maximum number of logged queries; the most recent ones are kept.
    queries_per_window: Count = 2000  # Queries to log per window of events; a window is a sixth of the base block.
    negatives_per_query: Count = 60  # Maximum number of candidates to log per query, in addition to the target.

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> Blend:
        """Return a model without users and items."""
        return Blend(self, seed)


@dataclass(frozen=True)
class PendingQueries:
    """Logged queries of the base block without scores of the trained expert, which was not trained yet.

    `has_target_B` marks the ranked queries whose target was a candidate. The other tensors hold only those.
    """

    has_target_B: Tensor
    users_Q: Tensor
    history_QT: Tensor
    items_QC: Tensor  # all candidates, because a share depends on all of them
    sampled_QC: Tensor  # positions of the logged candidates; the target comes first


@dataclass(frozen=True)
class Reason:
    """The contribution of one expert, or of one group of features, to the score of an item."""

    source: str
    rank: int | None  # by this source: among the items that the expert proposes, or among all candidates if trained
    contribution: float  # to ln(score), minus the mean over the user's candidates; positive = moves the item up
    history_item: int  # the history item that contributes most; 0 if unknown


class Blend:
    """A model that combines experts. Scores are probabilities over the user's candidates; other items score 0."""

    rule: Rule | None
    is_rule_suspended: bool  # the best expert ranked better than the rule, and ranks alone for now
    best_expert: int  # the expert with the highest ndcg@20 on the logged queries; it ranks alone if there is no rule

    __repr__ = model_text

    def __init__(self, spec: BlendSpec, seed: int) -> None:
        self.spec, self.seed, self.n_users, self.n_items = spec, seed, 0, 0
        self.experts = Experts(spec.items_per_expert, spec.length, seed)
        self.rule, self.is_rule_suspended, self.best_expert = None, False, 0
        self.is_trained_expert_dropped = False  # whether it added nothing to the others
        self.n_blocks = 0
        nothing = torch.zeros(0, spec.negatives_per_query + 1, len(FEATURES), dtype=torch.float16)
        self.query_log = QueryLog(nothing, nothing[..., 0] > 0, torch.zeros(0, N_EXPERTS + 1))
        self.pending_queries: list[PendingQueries] = []  # of the base block, until `score_pending_queries`

    def grow(self, n_users: int, n_items: int) -> None:
        """Add rows for new users and items."""
        self.experts.grow(n_users, n_items)
        self.n_users, self.n_items = n_users, n_items

    def absorb(self, events: Events, histories: Histories) -> None:
        """Log queries for some of these events, scored before the events are counted. Then count the events.

        The first events, the base block, are absorbed in two parts. The first part scores the queries of the second.
        """
        if not len(events):
            return
        parts, self.pending_queries = [events], []
        if is_base := not self.experts.window_events:
            window = window_size(len(events))
            set_window(self.experts, window)
            parts = [events[:-window], events[-window:]]
        for part in parts:
            histories_after, rows_E = insert_events(histories, part, self.n_users)
            targets = targets_at(histories_after, rows_E)
            if self.experts.item_statistics.n_events:
                self._log_queries(targets, is_base)
            self.experts.absorb(part, histories, targets)
            histories, self.n_blocks = histories_after, self.n_blocks + 1
        self.best_expert = self.query_log.best_expert()

    def _log_queries(self, targets: Targets, is_base: bool) -> None:
        """Log the candidates of a sample of the targets, with their features."""
        rng = stream(self.seed, "blend queries", self.n_blocks)
        targets = _sample_targets(targets, self.spec, self.experts, rng)
        logs = [self.query_log]
        for index_B in split_chunks(torch.arange(len(targets)), 256):
            batch_targets = targets[index_B]
            batch = Batch(batch_targets.users_N, history_items(batch_targets, self.spec.length))
            items_BC, x_BCF = self.experts.candidate_features(batch)
            has_target_B, sampled_QC, rows = _sample_queries(
                self.spec, self.rule, items_BC, x_BCF, batch_targets.items_N[:, None], rng
            )
            logs.append(rows)
            if is_base:
                queries = batch.users_B[has_target_B], batch.history_BT[has_target_B], items_BC[has_target_B]
                self.pending_queries.append(PendingQueries(has_target_B, *queries, sampled_QC))
        self.query_log = QueryLog.joined(logs).latest(self.spec.max_queries)

    def score_pending_queries(self) -> None:
        """Add scores of the trained expert to the pending queries. It must not have been trained on later events."""
        self.experts.invalidate_cache()
        x_QCF, ranks_PR = self.query_log.x_QCF.clone(), self.query_log.ranks_PR.clone()
        query = len(x_QCF) - sum(len(part.users_Q) for part in self.pending_queries)
        ranked = len(ranks_PR) - sum(len(part.has_target_B) for part in self.pending_queries)
        for part in self.pending_queries:
            user_vectors = self.experts.trained_user_vectors(Batch(part.users_Q, part.history_QT))
            features = self.experts.trained_features(part.items_QC, *user_vectors)
            rows, n = slice(query, query + len(part.users_Q)), part.sampled_QC.shape[1]
            share_QC, log_rank_QC = (value_QC.gather(1, part.sampled_QC) for value_QC in features)
            x_QCF[rows, :n, SHARE_COLUMN["pooled"]], x_QCF[rows, :n, RANK_COLUMN["pooled"]] = (
                share_QC.half(),
                log_rank_QC.half(),
            )
            rank_Q = log_rank_QC[:, 0].exp().round()
            at_P = ranked + part.has_target_B.nonzero()[:, 0]
            ranks_PR[at_P, POOLED] = torch.where(rank_Q > self.spec.items_per_expert, torch.inf, rank_Q)
            query, ranked = query + len(part.users_Q), ranked + len(part.has_target_B)
        self.query_log, self.pending_queries = replace(self.query_log, x_QCF=x_QCF, ranks_PR=ranks_PR), []
        self.best_expert = self.query_log.best_expert()

    def candidates(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Candidate items (B, C), padded with 0, and the probability that each is the next one; 0 means no opinion."""
        items_BC, x_BCF = self.experts.candidate_features(batch)
        return items_BC, self._candidate_probabilities(items_BC, x_BCF)

    @property
    def active_rule(self) -> Rule | None:
        """The rule that ranks candidates; None while the best expert ranks alone."""
        return None if self.is_rule_suspended else self.rule

    def _candidate_probabilities(self, items_BC: Tensor, x_BCF: Tensor) -> Tensor:
        if self.active_rule is None:
            share_BC = x_BCF[..., self.best_expert].exp() - self.experts.cache.share_floor
            return torch.where((items_BC > 0) & (share_BC > 1e-9), share_BC, 0.0)
        score_BC = self.active_rule.scores(x_BCF).masked_fill(items_BC == 0, -torch.inf)
        return score_BC.softmax(1).nan_to_num(0.0)

    def score(self, batch: Batch, items: Tensor) -> Tensor:
        """Probability of each item, shape (B, N); 0 for items that are no candidates."""
        items_BC, score_BC = self.candidates(batch)
        scores_BI = torch.zeros(len(batch), self.n_items + 1).scatter_(1, items_BC, score_BC)
        scores_BI[:, 0] = 0.0
        return select_scores(scores_BI, items)

    def explain(self, batch: Batch, item: int) -> list[Reason]:
        """Return the reasons for the score of `item`, largest contribution first, for a batch of one user.

        The contributions sum to ln(score) minus the mean of ln(score) over the user's candidates. While the best
        expert ranks alone, it is the only reason, with contribution 0. An item with score 0 has no reasons.
        """
        items_BC, x_BCF = self.experts.candidate_features(batch)
        is_candidate_C = self._candidate_probabilities(items_BC, x_BCF)[0] > 0
        if not bool((is_candidate_C & (items_BC[0] == item)).any()):
            return []
        items_C, x_CF = items_BC[0, items_BC[0] > 0], x_BCF[0, items_BC[0] > 0]
        position = int((items_C == item).int().argmax())
        ranks_N = x_CF[position, Slots.rank].exp().round().int().tolist()
        ranks = {name: rank for name, rank in zip(EXPERT_NAMES, ranks_N) if rank <= self.spec.items_per_expert}
        pairs = {name: counter for name, counter in self.experts.counters.items() if isinstance(counter, ItemKNN)}
        history_items = {name: counter.most_influential_item(batch, item) for name, counter in pairs.items()}
        contributions = {EXPERT_NAMES[self.best_expert]: 0.0}
        if self.active_rule is not None:
            contributions = dict(zip(SCORE_SOURCES, self.active_rule.contributions(x_CF)[position].tolist()))
        reasons = [
            Reason(name, ranks.get(name), contributions[name], history_items.get(name, 0)) for name in contributions
        ]
        return sorted(reasons, key=lambda reason: -reason.contribution)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the model has learned, as tensors by name."""
        numbers = [
            self.n_users,
            self.n_items,
            self.experts.window_events,
            self.n_blocks,
            self.best_expert,
            int(self.is_trained_expert_dropped),
        ]
        parts = {"experts": self.experts.state_dict(), "remembered": vars(self.query_log)}
        parts |= {} if self.rule is None else {"rule": vars(self.rule)}
        return {
            "numbers": torch.tensor(numbers),
            "overruled": torch.tensor(self.is_rule_suspended),
        } | flatten_state_dicts(parts)

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned.

        In files of version 0.1.0, popularity experts have their own windows and the Markov chain has none. They get
        the window of the blend and keep their counts.
        """
        *numbers, is_dropped = tensors["numbers"].tolist()
        self.n_users, self.n_items, window_events, self.n_blocks, self.best_expert = numbers
        self.is_trained_expert_dropped = bool(is_dropped)
        self.is_rule_suspended = bool(tensors.get("overruled", False))  # older files lack this key
        self.experts.load_state_dict(extract_state_dict(tensors, "experts"), self.n_users, self.n_items)
        set_window(self.experts, window_events)
        self.query_log = QueryLog(**extract_state_dict(tensors, "remembered"))
        rule = extract_state_dict(tensors, "rule")
        self.rule = Rule(**rule) if rule else None


def _sample_targets(targets: Targets, spec: BlendSpec, experts: Experts, source: torch.Generator) -> Targets:
    """Draw targets at random among the events of users with a history: one event per user, then a second one, ...

    The item must have earlier events, or be in the user's recent history. No expert proposes other items.
    """
    has_events_I = torch.from_numpy(experts.item_statistics.event_counts_I > 0)
    known_N = is_repeat(targets, spec.length) | has_events_I[targets.items_N]
    able_N = (targets.history_lengths(1) > 0) & known_N
    order_N = permutation(len(targets), source)
    order_N = order_N[able_N[order_N]]
    turn_N = occurrence_numbers(targets.users_N[order_N])
    share = min(1.0, spec.queries_per_window / experts.window_events)
    n_queries = min(spec.max_queries, round(share * len(targets)))
    return targets[order_N[turn_N.argsort(stable=True)[:n_queries]]]


def _sample_queries(
    spec: BlendSpec, rule: Rule | None, items_BC: Tensor, x_BCF: Tensor, target_B1: Tensor, rng: torch.Generator
) -> tuple[Tensor, Tensor, QueryLog]:
    """Return the rows to log: target and random candidates of each query, and the target's rank by each expert.

    Also returned: which queries have their target among the candidates (B,), and positions of the sample (Q, C).
    """
    is_target_BC, real_BC, n = items_BC == target_B1, items_BC > 0, spec.negatives_per_query + 1
    has_target_B = is_target_BC.any(1)
    draw_BC = uniform(real_BC.shape, rng) + 2.0 * ~real_BC - 2.0 * is_target_BC
    chosen_QC = draw_BC.argsort(1)[has_target_B, :n]
    x_QCF = x_BCF[has_target_B].gather(1, chosen_QC[..., None].expand(-1, -1, x_BCF.shape[2])).half()
    real_QC = real_BC[has_target_B].gather(1, chosen_QC)
    n_missing = n - real_QC.shape[1]
    target_BF = (x_BCF * is_target_BC[..., None]).sum(1)
    ranks_BR = torch.full((len(has_target_B), N_EXPERTS + 1), torch.inf)
    ranks_BR[has_target_B, :N_EXPERTS] = target_BF[has_target_B, Slots.rank].exp().round()
    ranks_BR[:, :N_EXPERTS][ranks_BR[:, :N_EXPERTS] > spec.items_per_expert] = torch.inf
    if rule is None:
        ranks_BR[:, RULE] = torch.nan
    else:
        score_BC = rule.scores(x_BCF).masked_fill(~real_BC, -torch.inf)
        own_B1 = score_BC.masked_fill(~is_target_BC, -torch.inf).amax(1, keepdim=True)
        ranks_BR[has_target_B, RULE] = 1.0 + (score_BC > own_B1).sum(1)[has_target_B]
    return (
        has_target_B,
        chosen_QC,
        QueryLog(F.pad(x_QCF, (0, 0, 0, n_missing)), F.pad(real_QC, (0, n_missing)), ranks_BR),
    )


MAX_JUDGED_QUERIES = 1000  # most recent queries on which the rule is compared with the best expert


def fit_rule(model: Blend, weight_decay: float = 20.0, min_queries: int = 40, n_epochs: int = 6) -> None:
    """Refit the weights that combine the experts, from the logged queries. Start from the previous weights.

    With fewer than `min_queries` queries there is no rule. The rule is suspended while the best expert ranks the most
    recent queries better, beyond chance (paired t-test of ndcg@20). The best expert then ranks alone. A suspended rule
    is still fitted and compared at every update, so it can return.
    """
    query_log, previous_rule = model.query_log, model.rule or Rule.initial(model.seed)
    if len(query_log.x_QCF) < min_queries:
        model.rule = None
        return
    value_PR = query_log.ndcg().astype(np.float64)
    value_JR = value_PR[~np.isnan(value_PR[:, RULE])][-MAX_JUDGED_QUERIES:]
    model.is_rule_suspended = is_significantly_better(value_JR[:, model.best_expert], value_JR[:, RULE])
    x_QCF = query_log.x_QCF.float()
    mean_F, std_F = feature_scale(x_QCF, query_log.real_QC)
    rule = replace(previous_rule, mean_F=mean_F, std_F=std_F)
    z_QCF = rule.standardize(x_QCF)
    z_QCG = cross_features(z_QCF)
    rule = replace(rule, weights_G=fit_listwise(z_QCG, query_log.real_QC, rule.weights_G, weight_decay))
    rng = stream(model.seed, "rule training", model.n_blocks)
    model.rule = fit_correction(rule, z_QCF, z_QCG @ rule.weights_G, query_log.real_QC, n_epochs, rng)
