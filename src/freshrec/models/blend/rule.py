"""The blend's rule: weights and a correction, learned from remembered queries, and whether to trust it."""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import minimize
from torch import Tensor

from freshrec.data.batches import make_rng, split_chunks
from freshrec.device import permutation
from freshrec.models.blend.experts import Slots
from freshrec.models.blend.model import CORRECTION_STREAM, RULE, Blend, QueryLog, Rule, cross_features

Float64Array = NDArray[np.float64]
SIGNIFICANCE_LEVEL = 0.05  # below it, being worse is no chance
MAX_JUDGED_QUERIES = 1000  # queries by which a rule is judged
WEAK_PENALTY = 1e-4  # of a penalty, a query
LEARNING_RATE, BATCH_SIZE = 3e-3, 128  # of the network's training; queries a step


def fit_rule(model: Blend, weight_decay: float = 20.0, min_queries: int = 40, n_epochs: int = 6) -> None:
    """Learn the rule again from what is remembered, beginning with the last one.

    There is none with fewer than `least` queries to learn from. While the rule has ordered the latest queries worse
    than the best expert, beyond chance (t-test of the differences in ndcg@20), that expert speaks alone; the rule goes
    on being learnt and judged, so that it can come back.
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
    rng = make_rng(model.seed, CORRECTION_STREAM, model.n_blocks)
    model.rule = fit_correction(rule, z_QCF, z_QCG @ rule.weights_G, query_log.real_QC, n_epochs, rng)


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
        for which in split_chunks(permutation(len(z_QCF), rng), BATCH_SIZE):
            score_QC = linear_QC[which] + trained.correction(z_QCF[which])
            loss = -score_QC.masked_fill(~real_QC[which], -torch.inf).log_softmax(1)[:, 0].mean()
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

    The loss is convex: where it begins, `start_G`, decides only how soon it is there. `real_QC`: what is no padding.
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
