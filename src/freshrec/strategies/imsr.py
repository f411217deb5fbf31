"""IMSR: keep a user's interests (retainer), detect new ones (detector), drop redundant ones (trimmer).

Symbols of the paper: h_k -> vectors_BKD, h_k^{t-1} -> interests_BKD (stored), e_a -> target_BD, e_i -> items_NTD,
K_u -> alive_BK.sum(1), delta K -> new, U_p -> puzzled_N, c_1 -> c1, c_2 -> c2, M_exist -> vectors_BKD[old_BK].
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.config import CountOrZero, Positive, Weight, check_options
from freshrec.data.batches import due_targets
from freshrec.data.histories import row_users
from freshrec.data.stored_interests import StoredInterests, pad_interests, stored_interests_of
from freshrec.errors import OptionError
from freshrec.learn.fit import CostMeter, FitConfig, finish_update, fit_base_block, fit_model, grown_copy
from freshrec.learn.interest_budget import InterestBudget
from freshrec.learn.interest_store import add_interests
from freshrec.nn.layers import MASKED
from freshrec.nn.scoring import item_vectors
from freshrec.types import DUE, Batch, Forward, Histories, InterestModel, Interests, Span, State


def sigmoid_distillation(new_BK: Tensor, stored_BK: Tensor, old_BK: Tensor, tau: float = 1.0) -> Tensor:
    """mean over the batch of sum_{k old} CE(sigma(h_k^t e_a / tau), sigma(h_k^{t-1} e_a / tau)) [IMSR eq. 10].

    `new_BK` and `stored_BK` are the logits of the student and the teacher. No gradient reaches the teacher.
    """
    teacher_BK = torch.sigmoid(stored_BK.detach() / tau)
    loss_BK = F.binary_cross_entropy_with_logits(new_BK / tau, teacher_BK, reduction="none")
    return (loss_BK * old_BK).sum() / max(len(new_BK), 1)


def softmax_distillation(new_BK: Tensor, stored_BK: Tensor, old_BK: Tensor, tau: float = 2.0) -> Tensor:
    """-sum_k p'_k ln p_k over the old interests, p = softmax(logits / tau), mean over the batch."""
    teacher_BK = torch.softmax((stored_BK.detach() / tau).masked_fill(~old_BK, MASKED), 1)
    student_BK = torch.log_softmax((new_BK / tau).masked_fill(~old_BK, MASKED), 1)
    loss_B = -(teacher_BK * student_BK).sum(1) * old_BK.any(1)
    return loss_B.sum() / max(len(new_BK), 1)


@dataclass(frozen=True)
class Retainer:
    """The existing-interests retainer: a loss that keeps old interests close to the stored ones.

    Values of `form`: "sigmoid" is the paper's. "distance" (DIR) is the squared Euclidean distance. "kd1" is a softmax
    over a user's interests, as in LwF. "kd2" is kd1 on cosines / 0.1. "kd3" is kd1, weighted against the model's loss
    by the share of old interests, as in BiC. The paper gives no formulas for kd1 to kd3, so they are our readings.

    The target item's vector gets no gradient from the retainer. Moving the item would lower this loss without retaining
    an interest. Detaching it doubled the measured gain.
    """

    form: Literal["sigmoid", "distance", "kd1", "kd2", "kd3"] = "sigmoid"  # Loss between new and stored interests.
    weight: Weight = 0.1  # Weight of the retainer in the loss.
    tau: Positive = 1.0  # Temperature of the sigmoids. For form = "sigmoid" only.

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(self, batch: Batch, forward: Forward) -> Tensor:
        """Return the scalar to add to the loss."""
        assert forward.vectors_BKD is not None and forward.target_BD is not None
        assert batch.interests_BKD is not None and batch.old_BK is not None and batch.alive_BK is not None
        new_BKD, stored_BKD, old_BK = forward.vectors_BKD, batch.interests_BKD, batch.old_BK
        if self.form == "distance":
            distance_BK = ((new_BKD - stored_BKD) ** 2).sum(2)
            return self.weight * (distance_BK * old_BK).sum() / len(batch)
        target_BD1 = forward.target_BD.detach()[..., None]
        if self.form == "kd2":
            new_BKD, stored_BKD = F.normalize(new_BKD, dim=2), F.normalize(stored_BKD, dim=2)
            target_BD1 = F.normalize(target_BD1, dim=1)
        new_BK, stored_BK = torch.bmm(new_BKD, target_BD1)[..., 0], torch.bmm(stored_BKD, target_BD1)[..., 0]
        if self.form == "sigmoid":
            return self.weight * sigmoid_distillation(new_BK, stored_BK, old_BK, self.tau)
        if self.form == "kd1":
            return self.weight * softmax_distillation(new_BK, stored_BK, old_BK)
        if self.form == "kd2":
            return self.weight * softmax_distillation(new_BK, stored_BK, old_BK, tau=0.1)
        share = float(old_BK.sum() / batch.alive_BK.sum())  # kd3: mu of (1 - mu) L_SS + mu KD1
        share = min(1.0, self.weight * share)
        return share * (softmax_distillation(new_BK, stored_BK, old_BK) - forward.loss)


def divergence(logits_NK: Tensor, alive_NK: Tensor) -> Tensor:
    """KL(uniform || p) = ln sum_k e^{e_i h_k} - mean_k e_i h_k - ln K >= 0 over a user's interests [IMSR eq. 12]."""
    n_N = alive_NK.sum(-1).clamp(min=1)
    sum_N = torch.logsumexp(logits_NK.masked_fill(~alive_NK, -torch.inf), -1)
    return sum_N - (logits_NK * alive_NK).sum(-1) / n_N - n_N.log()


def puzzlement(logits_NK: Tensor, alive_NK: Tensor) -> Tensor:
    """P(i) = mean_k e_i h_k - ln sum_k e^{e_i h_k} + ln K = -KL <= 0 [IMSR eq. 13]."""
    return -divergence(logits_NK, alive_NK)


def is_puzzled(mean_N: Tensor, n_interests_N: Tensor, form: str, c1: float) -> Tensor:
    """Whether a user's mean puzzlement exceeds c_1, shape (N,) [IMSR eq. 14].

    As printed, P > c_1 > 0 can never hold, because P <= 0. `form` is the scale of c_1:

    - "geo": exp(P) / K, the geometric mean of p(h_k | e_i). The paper's range 0.02 to 0.12 works on this scale.
    - "exp": exp(P). The slides' range 0.4 to 0.6 works on this scale.
    - "kl": KL < c_1.
    - "quantile": the share c_1 of active users with the largest P.
    """
    if form == "geo":
        return mean_N.exp() / n_interests_N > c1
    if form == "exp":
        return mean_N.exp() > c1
    if form == "kl":
        return -mean_N < c1
    if form == "quantile":
        if not len(mean_N):
            return torch.zeros(0, dtype=torch.bool)
        return mean_N > torch.quantile(mean_N, 1 - c1)
    raise OptionError(f'detect.form cannot be "{form}". Use geo, exp, kl or quantile.')


@dataclass(frozen=True)
class Detector:
    """The new-interests detector: selects the users whose new events the previous model explains poorly."""

    form: Literal["geo", "exp", "kl", "quantile"] = "quantile"  # Scale of c1. "quantile" suits any item vectors.
    c1: float = 0.15  # Threshold of the puzzlement. For "quantile", the share of active users selected.
    new: CountOrZero = 3  # Number of interests added to a selected user (delta K).

    def __post_init__(self) -> None:
        check_options(self)

    def find_puzzled_users(
        self, model: InterestModel, interests: Interests, histories: Histories, n_known_items: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the users with high puzzlement, all rated users, and the mean KL of each rated user.

        Items that the previous model has not seen (rows above `n_known_items`) are ignored. Their vectors are
        untrained, so every user would look puzzled. Users with fewer than 2 events are not rated.
        """
        rows_N = ((histories.due_R == DUE) & (histories.items_R <= n_known_items)).nonzero()[:, 0]
        users_N = row_users(histories)[rows_N]
        counts_U = interests.offsets_U.diff()
        stored_N = (users_N <= interests.n_users) & (counts_U[users_N.clamp(max=interests.n_users)] > 0)
        rows_N, users_N = rows_N[stored_N], users_N[stored_N]
        kl_N = torch.zeros(len(rows_N))
        for part in torch.arange(len(rows_N)).split(8192):
            vectors_NKD, alive_NK, _ = pad_interests(interests, users_N[part], model.initial_interests(1))
            items_ND = item_vectors(model)[histories.items_R[rows_N[part]].long()]
            kl_N[part] = divergence(torch.bmm(vectors_NKD, items_ND[..., None])[..., 0], alive_NK)
        total_U = torch.zeros(histories.n_users + 1).index_add_(0, users_N, kl_N)
        n_U = torch.bincount(users_N, minlength=histories.n_users + 1)
        rated_U = (n_U >= 2).nonzero()[:, 0]
        mean_kl = total_U[rated_U] / n_U[rated_U]
        return rated_U[is_puzzled(-mean_kl, counts_U[rated_U], self.form, self.c1)], rated_U, mean_kl


def residual(vectors_BKD: Tensor, alive_BK: Tensor, old_BK: Tensor) -> Tensor:
    """h - M (M^T M)^+ M^T h: new interests minus their projection on the span of the old ones [IMSR eq. 16].

    Differs from the paper: (M M^T)^{-1} does not exist, because the rank K is below d. With the pseudo-inverse, it is
    this projection. Old interests are returned unchanged, and get no gradient from this function.
    """
    is_new_BK = alive_BK & ~old_BK & old_BK.any(1, keepdim=True)
    if not bool(is_new_BK.any()):
        return vectors_BKD
    basis_BKD = _orthonormal_basis(vectors_BKD.detach(), old_BK)
    inside_BKD = torch.bmm(torch.bmm(vectors_BKD, basis_BKD.transpose(1, 2)), basis_BKD)
    return torch.where(is_new_BK[..., None], vectors_BKD - inside_BKD, vectors_BKD)


def _orthonormal_basis(vectors_BKD: Tensor, is_used_BK: Tensor) -> Tensor:
    """Orthonormal basis of the used rows, shape (B, K, D), by Gram-Schmidt for all users at once.

    Unused rows become 0, and so do rows that depend linearly on earlier ones. A plain QR would invent directions for
    them. A batched pseudo-inverse would cost as much as the whole training step.
    """
    basis_BKD = torch.zeros_like(vectors_BKD)
    for k in range(vectors_BKD.shape[1]):
        row_B1D = F.normalize(vectors_BKD[:, k : k + 1], dim=2)
        for _ in range(2):  # twice is enough in float32
            row_B1D = row_B1D - torch.bmm(torch.bmm(row_B1D, basis_BKD.transpose(1, 2)), basis_BKD)
        norm_B11 = row_B1D.norm(dim=2, keepdim=True)
        independent_B11 = (norm_B11 > 1e-4) & is_used_BK[:, k, None, None]
        basis_BKD[:, k : k + 1] = torch.where(independent_B11, row_B1D / norm_B11.clamp(min=1e-9), 0.0)
    return basis_BKD


def is_trivial(residual_BKD: Tensor, c2: float, scale_B: Tensor | float = 1.0) -> Tensor:
    """||residual of an interest|| < c_2, in units of `scale_B`, shape (B, K) [IMSR eq. 17].

    Differs from the paper, which prints the norm of the projection. That would drop the most novel interests.
    """
    norm_BK: Tensor = residual_BKD.norm(dim=2)
    return norm_BK < (torch.as_tensor(scale_B) * c2)[..., None]


@dataclass(frozen=True)
class Trimmer:
    """The projection-based trimmer: makes new interests orthogonal to the old ones, and drops short residuals.

    The norm of a residual is relative by default, because routing shortens interests and self-attention does not.
    """

    c2: float = 0.3  # Norm of the residual below which a new interest is dropped.
    last_only: bool = False  # Drop only the last interests. The strategy sets it for models with ordered interests.
    relative: bool = True  # Measure the norm relative to the mean norm of the user's old interests.

    def __call__(self, vectors_BKD: Tensor, alive_BK: Tensor, old_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the interests (B, K, D) and which are kept (B, K). Old interests and those of new users always are."""
        residual_BKD = residual(vectors_BKD, alive_BK, old_BK)
        candidate_BK = alive_BK & ~old_BK & old_BK.any(1, keepdim=True)
        norm_BK = vectors_BKD.norm(dim=2) * old_BK
        scale_B: Tensor | float = norm_BK.sum(1) / old_BK.sum(1).clamp(min=1) if self.relative else 1.0
        is_kept_BK = alive_BK & ~(candidate_BK & is_trivial(residual_BKD, self.c2, scale_B))
        if self.last_only:
            is_kept_BK = is_kept_BK.flip(1).cummax(1).values.flip(1) & alive_BK
        return residual_BKD, is_kept_BK


@dataclass(frozen=True)
class IMSR:
    """Fine-tuning with three parts: retainer, detector and trimmer. Each can be left out.

    `upkeep` is not in the paper.
    """

    retain: Retainer | None = Retainer()  # The existing-interests retainer.
    detect: Detector | None = Detector()  # The new-interests detector.
    trim: Trimmer | None = Trimmer()  # The projection-based trimmer.
    fit: FitConfig = FitConfig()  # Training options of the model.
    upkeep: InterestBudget = InterestBudget()  # Limits of the stored interests.

    def update(self, state: State, span: Span) -> State:
        """Detect new interests, train with the retainer, trim, and apply the budget of stored interests."""
        if state.spans_seen == 0:
            return self.upkeep(fit_base_block(state, span, self.fit))
        model = grown_copy(state, span)
        assert isinstance(model, InterestModel)
        targets = due_targets(state.histories, self.fit.history)
        meter = CostMeter({"rows_read": float(len(targets))})
        stored_interests = stored_interests_of(model, state.interests, span.index)
        assert stored_interests is not None
        if self.detect is not None:
            stored_interests = self._add_new_interests(model, stored_interests, state, meter)
        trim = replace(self.trim, last_only=model.has_ordered_interests) if self.trim and self.detect else None
        terms = [self.retain] if self.retain is not None else []
        project = residual if trim is not None else None
        key = (state.seed, span.index)
        fit_model(model, targets, self.fit, key, meter, stored_interests=stored_interests, terms=terms, project=project)
        return self.upkeep(finish_update(state, model, stored_interests, self.fit.history, meter, trim))

    def _add_new_interests(
        self, model: InterestModel, stored_interests: StoredInterests, state: State, meter: CostMeter
    ) -> StoredInterests:
        assert self.detect is not None
        started_at = time.process_time()
        puzzled_N, _, kl_N = self.detect.find_puzzled_users(
            model, stored_interests.interests, state.histories, state.model.n_items
        )
        starts_KD = model.initial_interests(model.spec.k_max)
        interests = add_interests(
            stored_interests.interests, puzzled_N, self.detect.new, model.spec.k_max, starts_KD, stored_interests.span
        )
        meter.add_time("detect_cpu_s", started_at)
        meter.costs["nid_rate"] = len(puzzled_N) / max(len(kl_N), 1)
        for q in (0.05, 0.25, 0.5, 0.75, 0.95):
            meter.costs[f"kl_p{round(100 * q):02d}"] = float(kl_N.quantile(q)) if len(kl_N) else math.nan
        return replace(stored_interests, interests=interests)
