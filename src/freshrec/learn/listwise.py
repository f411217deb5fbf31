"""The blend's rule: weights and a correction, learned from remembered queries, and whether to trust it."""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import minimize
from torch import Tensor

from freshrec.data.batches import in_parts, random_source
from freshrec.device import permutation
from freshrec.models.blend import CORRECT, RULE, Blend, Remembered, Rule, crossed
from freshrec.models.experts import Slots

Floats = NDArray[np.float64]
LEVEL = 0.05  # below it, being worse is no chance
LATEST = 1000  # queries by which a rule is judged
LITTLE = 1e-4  # of a penalty, a query
RATE, BATCH = 3e-3, 128  # of the network's training; queries a step


def refit(model: Blend, decay: float = 20.0, least: int = 40, n_epochs: int = 6) -> None:
    """Learn the rule again from what is remembered, beginning with the last one.

    There is none with fewer than `least` queries to learn from. While the rule has ordered the latest queries worse
    than the best expert, beyond chance (t-test of the differences in ndcg@20), that expert speaks alone; the rule goes
    on being learnt and judged, so that it can come back.
    """
    kept, last = model.remembered, model.rule or Rule.start(model.seed)
    if len(kept.x_QCF) < least:
        model.rule = None
        return
    value_PR = kept.ndcg().astype(np.float64)
    value_JR = value_PR[~np.isnan(value_PR[:, RULE])][-LATEST:]
    model.overruled = better(value_JR[:, model.trusted], value_JR[:, RULE])
    x_QCF = kept.x_QCF.float()
    mean_F, std_F = scale_of(x_QCF, kept.real_QC)
    rule = replace(last, mean_F=mean_F, std_F=std_F)
    z_QCF = rule.standard(x_QCF)
    z_QCG = crossed(z_QCF)
    rule = replace(rule, weights_G=fit_listwise(z_QCG, kept.real_QC, rule.weights_G, decay))
    source = random_source(model.seed, CORRECT, model.n_blocks)
    model.rule = corrected(rule, z_QCF, z_QCG @ rule.weights_G, kept.real_QC, n_epochs, source)


def scale_of(x_QCF: Tensor, real_QC: Tensor) -> tuple[Tensor, Tensor]:
    """(F,) means and deviations; infinite, which leaves a feature out, where the candidates of each query are alike.

    Facts about the user are so by nature, and stay: what they say, they say in products. Others are alike where an
    expert is silent: its floor moves with the number of items, which is no news of a candidate.
    """
    std_F, mean_F = torch.std_mean(x_QCF[real_QC], 0)
    mean_Q1F = (x_QCF * real_QC[..., None]).sum(1, keepdim=True) / real_QC.sum(1)[:, None, None]
    within_F = torch.std((x_QCF - mean_Q1F)[real_QC], 0)
    within_F[Slots.user] = std_F[Slots.user]
    return mean_F, torch.where(within_F < 1e-3, torch.inf, std_F)


def corrected(
    rule: Rule, z_QCF: Tensor, linear_QC: Tensor, real_QC: Tensor, n_epochs: int, source: torch.Generator
) -> Rule:
    """The rule with its network trained on what the linear scores leave: AdamW, one cycle of learning rates."""
    if not n_epochs:
        return rule
    names = ("first_HF", "first_H", "second_HH", "second_H", "last_H")
    trained = replace(rule, **{name: getattr(rule, name).clone().requires_grad_(True) for name in names})
    adam = torch.optim.AdamW([getattr(trained, name) for name in names], lr=RATE, weight_decay=1e-2)
    n_steps = n_epochs * len(in_parts(torch.arange(len(z_QCF)), BATCH))
    cycle = torch.optim.lr_scheduler.OneCycleLR(adam, RATE, total_steps=n_steps)
    for _ in range(n_epochs):
        for which in in_parts(permutation(len(z_QCF), source), BATCH):
            score_QC = linear_QC[which] + trained.correction(z_QCF[which])
            loss = -score_QC.masked_fill(~real_QC[which], -torch.inf).log_softmax(1)[:, 0].mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            cycle.step()
    return replace(trained, **{name: getattr(trained, name).detach() for name in names})


def better(mine_P: Floats, theirs_P: Floats, level: float = LEVEL) -> bool:
    """Whether the first values are larger on average than the others, which they are paired with, beyond chance."""
    more_P = mine_P - theirs_P
    if len(more_P) < 2 or np.ptp(more_P) < 1e-9:
        return len(more_P) >= 2 and bool(more_P[0] > 0)
    return bool(stats.ttest_1samp(more_P, 0.0, alternative="greater").pvalue < level)


def worth(kept: Remembered, columns: list[int]) -> tuple[float, float]:
    """What these features add: how much likelier the targets are with them, in nats, and the p-value of so much.

    Weights are learned from every other query, with and without the features, and compared on the rest; then the other
    way about (t-test). There is next to no penalty on them: features that repeat others would share it, and seem to add
    something.
    """
    x_QCF, halves = kept.x_QCF.float(), (slice(0, None, 2), slice(1, None, 2))
    mean_F, std_F = scale_of(x_QCF, kept.real_QC)
    z_QCF = (x_QCF - mean_F) / std_F
    likely: list[Floats] = []
    for without in ([], columns):
        z_QCF[..., without] = 0.0
        z_QCG, parts = crossed(z_QCF), []
        for learnt, judged in (halves, halves[::-1]):
            learnt_QCG, start_G = z_QCG[learnt], torch.zeros(z_QCG.shape[2])
            weights_G = fit_listwise(learnt_QCG, kept.real_QC[learnt], start_G, LITTLE * len(learnt_QCG))
            score_QC = (z_QCG[judged] @ weights_G).masked_fill(~kept.real_QC[judged], -torch.inf)
            parts.append(score_QC.log_softmax(1)[:, 0])
        likely.append(torch.cat(parts).double().numpy())
    more_Q = likely[0] - likely[1]
    return float(more_Q.mean()), float(stats.ttest_1samp(more_Q, 0.0, alternative="greater").pvalue)


def fit_listwise(x_QCG: Tensor, real_QC: Tensor, start_G: Tensor, decay: float, max_steps: int = 100) -> Tensor:
    """(G,) w that minimises -sum_q ln softmax_c(x_qc w) of the first candidate + decay |w|^2; by L-BFGS.

    The loss is convex: where it begins, `start_G`, decides only how soon it is there. `real_QC`: what is no padding.
    """
    n_queries, n_candidates, n_features = x_QCG.shape
    decay /= n_queries  # as the mean of the loss is what is computed
    x_NG, mask_QC = x_QCG.reshape(-1, n_features), torch.where(real_QC, 0.0, -torch.inf)

    def loss_and_slope(w: Floats) -> tuple[float, Floats]:
        w_G = torch.from_numpy(w).float()
        score_QC = (x_NG @ w_G).view(n_queries, n_candidates) + mask_QC
        p_QC = score_QC.softmax(1)
        loss = float(-(score_QC.log_softmax(1)[:, 0]).mean() + decay * (w_G @ w_G))
        p_QC[:, 0] -= 1.0
        slope_G = x_NG.T @ p_QC.reshape(-1) / n_queries + 2 * decay * w_G
        return loss, slope_G.double().numpy()

    start = start_G.double().numpy()
    found = minimize(loss_and_slope, start, jac=True, method="L-BFGS-B", options={"maxiter": max_steps})
    return torch.from_numpy(found.x).float()
