"""The blend's rule: weights and a correction, learned from remembered queries, and whether to trust it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import minimize
from torch import Tensor

from freshrec.data.batches import split_chunks
from freshrec.device import normal, permutation
from freshrec.models.blend.experts import (
    EXPERT_NAMES,
    FEATURES,
    N_EXPERTS,
    Slots,
)
from freshrec.models.blend.features import ITEM_FEATURES, OWN_FEATURES
from freshrec.nn.sparse import Float32Array
from freshrec.random_streams import stream

Float64Array = NDArray[np.float64]
SIGNIFICANCE_LEVEL = 0.05  # below it, being worse is no chance
WEAK_PENALTY = 1e-4  # of a penalty, a query
LEARNING_RATE, BATCH_SIZE = 3e-3, 128  # of the network's training; queries a step


def feature_scale(x_QCF: Tensor, real_QC: Tensor) -> tuple[Tensor, Tensor]:
    """(F,) means and deviations; infinite, which leaves a feature out, where the candidates of each query are alike.

    Facts about the user are so by nature, and stay: what they say, they say in products. Others are alike where an
    expert is silent: its floor moves with the number of items, which is no news of a candidate.
    """
    std_F, mean_F = torch.std_mean(x_QCF[real_QC], 0)
    mean_Q1F = (x_QCF * real_QC[..., None]).sum(1, keepdim=True) / real_QC.sum(1)[:, None, None]
    within_F = torch.std((x_QCF - mean_Q1F)[real_QC], 0)
    within_F[Slots.user] = std_F[Slots.user]
    return mean_F, torch.where(within_F < 1e-3, torch.inf, std_F)


def fit_correction(
    rule: Rule, z_QCF: Tensor, linear_QC: Tensor, real_QC: Tensor, n_epochs: int, rng: torch.Generator
) -> Rule:
    """The rule with its network trained on what the linear scores leave: AdamW, one cycle of learning rates."""
    if not n_epochs:
        return rule
    names = ("first_HF", "first_H", "second_HH", "second_H", "last_H")
    trained = replace(rule, **{name: getattr(rule, name).clone().requires_grad_(True) for name in names})
    adam = torch.optim.AdamW([getattr(trained, name) for name in names], lr=LEARNING_RATE, weight_decay=1e-2)
    n_steps = n_epochs * len(split_chunks(torch.arange(len(z_QCF)), BATCH_SIZE))
    cycle = torch.optim.lr_scheduler.OneCycleLR(adam, LEARNING_RATE, total_steps=n_steps)
    for _ in range(n_epochs):
        for index in split_chunks(permutation(len(z_QCF), rng), BATCH_SIZE):
            score_QC = linear_QC[index] + trained.correction(z_QCF[index])
            loss = -score_QC.masked_fill(~real_QC[index], -torch.inf).log_softmax(1)[:, 0].mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            cycle.step()
    return replace(trained, **{name: getattr(trained, name).detach() for name in names})


def is_significantly_better(first_P: Float64Array, second_P: Float64Array, level: float = SIGNIFICANCE_LEVEL) -> bool:
    """Whether the first values are larger on average than the others, which they are paired with, beyond chance."""
    difference_P = first_P - second_P
    if len(difference_P) < 2 or np.ptp(difference_P) < 1e-9:
        return len(difference_P) >= 2 and bool(difference_P[0] > 0)
    return bool(stats.ttest_1samp(difference_P, 0.0, alternative="greater").pvalue < level)


def feature_gain(query_log: QueryLog, columns: list[int]) -> tuple[float, float]:
    """What these features add: how much likelier the targets are with them, in nats, and the p-value of so much.

    Weights are learned from every other query, with and without the features, and compared on the rest; then the other
    way about (t-test). There is next to no penalty on them: features that repeat others would share it, and seem to add
    something.
    """
    x_QCF, halves = query_log.x_QCF.float(), (slice(0, None, 2), slice(1, None, 2))
    mean_F, std_F = feature_scale(x_QCF, query_log.real_QC)
    z_QCF = (x_QCF - mean_F) / std_F
    log_likelihoods: list[Float64Array] = []
    for without in ([], columns):
        z_QCF[..., without] = 0.0
        z_QCG, parts = cross_features(z_QCF), []
        for train_half, test_half in (halves, halves[::-1]):
            train_QCG, start_G = z_QCG[train_half], torch.zeros(z_QCG.shape[2])
            weights_G = fit_listwise(train_QCG, query_log.real_QC[train_half], start_G, WEAK_PENALTY * len(train_QCG))
            score_QC = (z_QCG[test_half] @ weights_G).masked_fill(~query_log.real_QC[test_half], -torch.inf)
            parts.append(score_QC.log_softmax(1)[:, 0])
        log_likelihoods.append(torch.cat(parts).double().numpy())
    gain_Q = log_likelihoods[0] - log_likelihoods[1]
    return float(gain_Q.mean()), float(stats.ttest_1samp(gain_Q, 0.0, alternative="greater").pvalue)


def fit_listwise(
    x_QCG: Tensor, real_QC: Tensor, initial_G: Tensor, weight_decay: float, max_steps: int = 100
) -> Tensor:
    """(G,) w that minimises -sum_q ln softmax_c(x_qc w) of the first candidate + decay |w|^2; by L-BFGS.

    The loss is convex: where it begins, `initial_G`, decides only how soon it is there. `real_QC`: what is no padding.
    """
    n_queries, n_candidates, n_features = x_QCG.shape
    weight_decay /= n_queries  # as the mean of the loss is what is computed
    x_NG, mask_QC = x_QCG.reshape(-1, n_features), torch.where(real_QC, 0.0, -torch.inf)

    def loss_and_gradient(w: Float64Array) -> tuple[float, Float64Array]:
        w_G = torch.from_numpy(w).float()
        score_QC = (x_NG @ w_G).view(n_queries, n_candidates) + mask_QC
        p_QC = score_QC.softmax(1)
        loss = float(-(score_QC.log_softmax(1)[:, 0]).mean() + weight_decay * (w_G @ w_G))
        p_QC[:, 0] -= 1.0
        slope_G = x_NG.T @ p_QC.reshape(-1) / n_queries + 2 * weight_decay * w_G
        return loss, slope_G.double().numpy()

    start = initial_G.double().numpy()
    result = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", options={"maxiter": max_steps})
    return torch.from_numpy(result.x).float()


HIDDEN_UNITS = 32
CROSSED = [FEATURES.index(name) for name in ("taken", "taken again", "takes again", "length")]  # in `cross_features`
RULE = N_EXPERTS  # the column of the rule, after those of the experts, in what is remembered of ranks
SCORE_SOURCES = (*EXPERT_NAMES, "own history", "item", "correction")  # of a score


@dataclass(frozen=True)
class QueryLog:
    """Queries as they were when their events arrived, the oldest first."""

    x_QCF: Tensor  # float16; those whose target was a candidate, which is the first
    real_QC: Tensor  # bool: not padding
    ranks_PR: Tensor  # float32: all queries: the rank of the target by each expert and by the rule; inf: not offered

    def ndcg(self) -> Float32Array:
        """(P, N + 1) ndcg@20 of each query, by each expert and by the rule; nan where there was no rule."""
        rank_PR = self.ranks_PR.numpy()
        value_PR: Float32Array = np.where(rank_PR > 20, 0.0, 1 / np.log2(1 + rank_PR))
        return value_PR

    def best_expert(self) -> int:
        """The expert that was best on average; the first one while there are no queries."""
        return int(self.ndcg()[:, :N_EXPERTS].mean(0).argmax()) if len(self.ranks_PR) else 0

    def latest(self, n: int) -> QueryLog:
        """Without the older ones."""
        return QueryLog(self.x_QCF[-n:], self.real_QC[-n:], self.ranks_PR[-n:])

    @staticmethod
    def joined(parts: list[QueryLog]) -> QueryLog:
        """One part after the other."""
        return QueryLog(
            torch.cat([part.x_QCF for part in parts]),
            torch.cat([part.real_QC for part in parts]),
            torch.cat([part.ranks_PR for part in parts]),
        )


@dataclass(frozen=True)
class Rule:
    """How candidates are ordered: readable weights of crossed features, and the correction of a small network.

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
    def initial(seed: int) -> Rule:
        """A rule that finds all candidates alike."""
        n, rng = len(FEATURES), stream(seed, "rule network")
        first_HF = normal((HIDDEN_UNITS, n), rng) / n**0.5
        second_HH = normal((HIDDEN_UNITS, HIDDEN_UNITS), rng) / HIDDEN_UNITS**0.5
        zeros_H, zeros_G = torch.zeros(HIDDEN_UNITS), torch.zeros(cross_features(torch.zeros(1, 1, n)).shape[2])
        return Rule(zeros_G, torch.zeros(n), torch.ones(n), first_HF, zeros_H, second_HH, zeros_H, zeros_H)

    def standardize(self, x_BCF: Tensor) -> Tensor:
        """(B, C, F) of mean 0 and deviation 1."""
        return (x_BCF - self.mean_F) / self.std_F

    def correction(self, z_BCF: Tensor) -> Tensor:
        """(B, C): what the network adds, from standardized features."""
        hidden_BCH = F.silu(F.linear(z_BCF.clamp(-5.0, 5.0), self.first_HF, self.first_H))
        return F.silu(F.linear(hidden_BCH, self.second_HH, self.second_H)) @ self.last_H

    def scores(self, x_BCF: Tensor) -> Tensor:
        """(B, C)"""
        z_BCF = self.standardize(x_BCF)
        return cross_features(z_BCF) @ self.weights_G + self.correction(z_BCF)

    def contributions(self, x_CF: Tensor) -> Tensor:
        """(C, S) what each of SCORE_SOURCES adds to the score of each of a user's candidates, above their mean."""
        z_1CF = self.standardize(x_CF)[None]
        terms_CG, correction_C = cross_features(z_1CF)[0] * self.weights_G, self.correction(z_1CF)[0]
        source_G = torch.tensor([SCORE_SOURCES.index(source) for source in cross_feature_sources()])
        points_CS = torch.zeros(len(x_CF), len(SCORE_SOURCES)).index_add(1, source_G, terms_CG)
        points_CS[:, SCORE_SOURCES.index("correction")] = correction_C
        return points_CS - points_CS.mean(0)


def cross_features(x_BCF: Tensor) -> Tensor:
    """(B, C, G): the features that differ between candidates, and products of them with those that do not.

    That is how trust in an expert comes to depend on how often a user repeats, and on how long the history is.
    """
    share, own_features = x_BCF[..., Slots.share], x_BCF[..., Slots.own]
    taken, repeat_rate, repeats, length = (x_BCF[..., column : column + 1] for column in CROSSED)
    products = [
        share * repeats,
        share * length,
        own_features * repeats,
        own_features * length,
        own_features * repeat_rate,
        taken * repeat_rate * repeats,
    ]
    return torch.cat([x_BCF[..., : Slots.user.start], *products], -1)


def cross_feature_sources() -> list[str]:
    """Which of SCORE_SOURCES each of the G crossed features speaks for."""
    own_sources = ["own history"] * len(OWN_FEATURES)
    return [
        *EXPERT_NAMES,
        *EXPERT_NAMES,
        *own_sources,
        *["item"] * len(ITEM_FEATURES),
        *EXPERT_NAMES,
        *EXPERT_NAMES,
        *own_sources,
        *own_sources,
        *own_sources,
        "own history",
    ]
