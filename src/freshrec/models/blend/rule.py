"""The rule of a blend: weights and a neural correction that are learned from logged queries, and tests of their use."""

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
SIGNIFICANCE_LEVEL = 0.05  # a p-value below it is beyond chance
WEAK_PENALTY = 1e-4  # weight decay per query
LEARNING_RATE, BATCH_SIZE = 3e-3, 128  # for training the network; queries per step


def feature_scale(x_QCF: Tensor, real_QC: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature, shape (F,) each.

    The deviation is infinite, which removes the feature, if all candidates of each query share one value. This happens
    if an expert scores no item. Its share is then a floor that depends on the number of items only. User features
    are kept: they are the same for all candidates by design and act through products with other features.
    """
    std_F, mean_F = torch.std_mean(x_QCF[real_QC], 0)
    mean_Q1F = (x_QCF * real_QC[..., None]).sum(1, keepdim=True) / real_QC.sum(1)[:, None, None]
    within_F = torch.std((x_QCF - mean_Q1F)[real_QC], 0)
    within_F[Slots.user] = std_F[Slots.user]
    return mean_F, torch.where(within_F < 1e-3, torch.inf, std_F)


def fit_correction(
    rule: Rule, z_QCF: Tensor, linear_QC: Tensor, real_QC: Tensor, n_epochs: int, rng: torch.Generator
) -> Rule:
    """Train the network of the rule on the residual of the linear scores, with AdamW and a one-cycle schedule."""
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
    """Whether the mean of the first values exceeds that of the second, beyond chance (paired one-sided t-test)."""
    difference_P = first_P - second_P
    if len(difference_P) < 2 or np.ptp(difference_P) < 1e-9:
        return len(difference_P) >= 2 and bool(difference_P[0] > 0)
    return bool(stats.ttest_1samp(difference_P, 0.0, alternative="greater").pvalue < level)


def feature_gain(query_log: QueryLog, columns: list[int]) -> tuple[float, float]:
    """Gain in log-likelihood of the targets from these features, in nats per query, and its one-sided p-value.

    Weights are fitted on every other query, with and without the features, and compared on the remaining queries. Then
    the halves swap roles. Weight decay is almost 0 here. With more of it, a copy of another feature would appear to
    help, because the two copies would share the penalty.
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
    """argmin_w -sum_q ln softmax_c(x_qc w)[first candidate] + decay |w|^2, shape (G,), by L-BFGS.

    The loss is convex, so the start `initial_G` affects only the number of steps. `real_QC` is False for padding.
    """
    n_queries, n_candidates, n_features = x_QCG.shape
    weight_decay /= n_queries  # because the loss below is a mean over queries
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
CROSSED = [FEATURES.index(name) for name in ("in history", "item repeat rate", "user repeat rate", "length")]
RULE = N_EXPERTS  # column of the rule in `QueryLog.ranks_PR`, after those of the experts
SCORE_SOURCES = (*EXPERT_NAMES, "own history", "item", "correction")  # sources of a score


@dataclass(frozen=True)
class QueryLog:
    """Queries as they were when their events arrived, oldest first."""

    x_QCF: Tensor  # float16, queries whose target was a candidate; the target is the first one
    real_QC: Tensor  # bool, False for padding
    ranks_PR: Tensor  # float32, all queries: rank of the target by each expert and by the rule; inf = not proposed

    def ndcg(self) -> Float32Array:
        """ndcg@20 of each query by each expert and by the rule, shape (P, N + 1); nan if there was no rule."""
        rank_PR = self.ranks_PR.numpy()
        value_PR: Float32Array = np.where(rank_PR > 20, 0.0, 1 / np.log2(1 + rank_PR))
        return value_PR

    def best_expert(self) -> int:
        """Index of the expert with the highest mean ndcg@20; 0 while there are no queries."""
        return int(self.ndcg()[:, :N_EXPERTS].mean(0).argmax()) if len(self.ranks_PR) else 0

    def latest(self, n: int) -> QueryLog:
        """Keep only the `n` most recent queries."""
        return QueryLog(self.x_QCF[-n:], self.real_QC[-n:], self.ranks_PR[-n:])

    @staticmethod
    def joined(parts: list[QueryLog]) -> QueryLog:
        """Concatenate query logs."""
        return QueryLog(
            torch.cat([part.x_QCF for part in parts]),
            torch.cat([part.real_QC for part in parts]),
            torch.cat([part.ranks_PR for part in parts]),
        )


@dataclass(frozen=True)
class Rule:
    """score = cross_features(z) w + network(z), with standardised features z.

    The weights w can be read as contributions. The network has two hidden layers of H units.
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
        """Return a rule that gives every candidate the same score."""
        n, rng = len(FEATURES), stream(seed, "rule network")
        first_HF = normal((HIDDEN_UNITS, n), rng) / n**0.5
        second_HH = normal((HIDDEN_UNITS, HIDDEN_UNITS), rng) / HIDDEN_UNITS**0.5
        zeros_H, zeros_G = torch.zeros(HIDDEN_UNITS), torch.zeros(cross_features(torch.zeros(1, 1, n)).shape[2])
        return Rule(zeros_G, torch.zeros(n), torch.ones(n), first_HF, zeros_H, second_HH, zeros_H, zeros_H)

    def standardize(self, x_BCF: Tensor) -> Tensor:
        """(x - mean) / deviation, shape (B, C, F)."""
        return (x_BCF - self.mean_F) / self.std_F

    def correction(self, z_BCF: Tensor) -> Tensor:
        """Output of the network for standardised features, shape (B, C)."""
        hidden_BCH = F.silu(F.linear(z_BCF.clamp(-5.0, 5.0), self.first_HF, self.first_H))
        return F.silu(F.linear(hidden_BCH, self.second_HH, self.second_H)) @ self.last_H

    def scores(self, x_BCF: Tensor) -> Tensor:
        """Score of each candidate, shape (B, C); higher is better."""
        z_BCF = self.standardize(x_BCF)
        return cross_features(z_BCF) @ self.weights_G + self.correction(z_BCF)

    def contributions(self, x_CF: Tensor) -> Tensor:
        """Contribution of each of SCORE_SOURCES to the score of each candidate, minus their mean, shape (C, S)."""
        z_1CF = self.standardize(x_CF)[None]
        terms_CG, correction_C = cross_features(z_1CF)[0] * self.weights_G, self.correction(z_1CF)[0]
        source_G = torch.tensor([SCORE_SOURCES.index(source) for source in cross_feature_sources()])
        points_CS = torch.zeros(len(x_CF), len(SCORE_SOURCES)).index_add(1, source_G, terms_CG)
        points_CS[:, SCORE_SOURCES.index("correction")] = correction_C
        return points_CS - points_CS.mean(0)


def cross_features(x_BCF: Tensor) -> Tensor:
    """Features that differ between candidates, and their products with user features, shape (B, C, G).

    Through the products, the weight of an expert depends on the user's repeat rate and history length.
    """
    share, own_features = x_BCF[..., Slots.share], x_BCF[..., Slots.own]
    in_history, item_repeats, user_repeats, length = (x_BCF[..., column : column + 1] for column in CROSSED)
    products = [
        share * user_repeats,
        share * length,
        own_features * user_repeats,
        own_features * length,
        own_features * item_repeats,
        in_history * item_repeats * user_repeats,
    ]
    return torch.cat([x_BCF[..., : Slots.user.start], *products], -1)


def cross_feature_sources() -> list[str]:
    """The entry of SCORE_SOURCES that each of the G crossed features belongs to."""
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
