"""MIND and ComiRec as restated in the IMSR paper: several interests per user, by routing or self-attention.

Symbols of the paper: e_i -> items_BTD, W -> transform_DD, h_k -> vectors_BKD, c_ik -> share_BTK, W_1 -> inner_AD,
W_u -> queries_KA. The options of each model are in mind.py and comirec.py.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from freshrec.config import HISTORY_LENGTH, Count, CountOrZero, Positive, Weight, check_options
from freshrec.device import normal
from freshrec.errors import OptionError
from freshrec.nn.embedding_table import EmbeddingTable, lookup_many
from freshrec.nn.layers import MASKED, attend, sampled_logits, sampled_softmax_loss, squash
from freshrec.random_streams import stream, stream_seed
from freshrec.types import Batch, Forward


@dataclass(frozen=True)
class InterestSpec:
    """Options of MIND, ComiRec-DR and ComiRec-SA.

    The defaults were chosen on validation targets (docs/diary.md). The paper has attention="soft".
    """

    extractor: Annotated[
        Literal["routing", "attention"],
        Field(description='Extraction of interests: "routing" (MIND, ComiRec-DR) or self-"attention" (ComiRec-SA).'),
    ] = "routing"
    k: Count = 4  # Number of interests of a new user; at most k_max.
    k_max: Count = 12  # Maximum number of interests per user.
    d: Count = 64  # Dimensions of the user and item vectors.
    attention: Literal["hard", "soft"] = "hard"  # Interests that a target trains: the closest ("hard") or all ("soft").
    power: Positive = 1.0  # Exponent of the logits of soft attention (p in MIND); 1 = no change.
    noise: Weight = 0.0  # Standard deviation of noise on the routing logits of new users in training; 0 = off.
    iterations: Count = 3  # Number of routing iterations.
    recency: bool = True  # Whether routing weights decay with the age of the item, at a learned rate.
    inner: Count = 1  # Width of the self-attention, as a multiple of d; ComiRec has 4, which takes 4 times as long.
    length: Count = HISTORY_LENGTH  # Number of most recent events per user that the model reads.
    lr: Positive = 0.015  # Learning rate of Adam.
    batch: Count = 256  # Targets per training step.
    negatives: Count = 512  # Random negative items per training step, shared by the batch.
    std: Positive = 0.1  # Standard deviation of the random values that new vectors start with.
    categories: CountOrZero = 0  # Number of category embeddings added to the item embeddings; 0 = off.

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> "InterestNet":
        """Return a new model without users and items. Raises OptionError if k is above k_max."""
        if self.k > self.k_max:
            raise OptionError(f"k = {self.k} is above k_max = {self.k_max}. Set a smaller k or a larger k_max.")
        return InterestNet(self, seed)


@dataclass(frozen=True)
class InitialInterests:
    """Starting points of the extraction: the stored interests of a user, or the initial ones."""

    vectors_BKD: Tensor
    alive_BK: Tensor | None  # None = all
    is_newcomer_B: Tensor | None  # whether a user has no stored interests; None = no user


class DynamicRouting(nn.Module):
    """Behaviour-to-interest dynamic routing with one shared transform, starting from each user's stored interests.

    Differs from the paper: the votes of an item are a softmax over the interests. Routing does not start from zeros,
    because all interests would stay identical with one shared transform. Only the last iteration has gradients.
    """

    def __init__(self, d: int, iterations: int, noise: float, recency: bool) -> None:
        super().__init__()
        self.iterations, self.noise = iterations, noise
        self.transform_DD = nn.Parameter(torch.eye(d))
        self.log_fading = nn.Parameter(torch.tensor(-3.0)) if recency else None

    has_ordered_interests = False

    def forward(self, items_BTD: Tensor, real_BT1: Tensor, start: InitialInterests) -> Tensor:
        """h_k = squash(sum_i c_ik W e_i), c_i = softmax over k of the summed votes W e_i . h_k [IMSR eq. 4].

        W e_i [IMSR eq. 3] is not computed itself: W is applied to the K interests, not to the T items.
        """
        W = self.transform_DD
        real_B1T = real_BT1.transpose(1, 2)
        if self.log_fading is not None:
            age_T = torch.arange(items_BTD.shape[1] - 1, -1, -1)
            real_B1T = real_B1T * torch.exp(-self.log_fading.exp() * age_T)
        with torch.no_grad():  # softmax over the middle dimension is 10 times as fast as over a short last one
            votes_BKT = torch.bmm(start.vectors_BKD @ W, items_BTD.transpose(1, 2))
            if self.noise and self.training:
                noise_BKT = self.noise * torch.randn_like(votes_BKT)
                if start.is_newcomer_B is not None:
                    noise_BKT = noise_BKT * start.is_newcomer_B[:, None, None]
                votes_BKT += noise_BKT
            if start.alive_BK is not None:
                votes_BKT.masked_fill_(~start.alive_BK[..., None], MASKED)
            for i in range(self.iterations):
                share_BKT = torch.softmax(votes_BKT, 1)
                if i < self.iterations - 1:
                    vectors_BKD = squash(torch.bmm(share_BKT * real_B1T, items_BTD) @ W.t())
                    votes_BKT = torch.baddbmm(votes_BKT, vectors_BKD @ W, items_BTD.transpose(1, 2))
        return squash(torch.bmm(share_BKT * real_B1T, items_BTD) @ W.t())


class SelfAttention(nn.Module):
    """Interests as attention-weighted sums of the items, with one learned query per interest.

    Differs from the paper: all users share W_u, because queries per user would need d_a K floats for every user.
    Positions enter the weights, and padding is masked.
    """

    def __init__(self, d: int, d_inner: int, k_max: int, length: int, rng: torch.Generator) -> None:
        super().__init__()
        self.positions_TD = nn.Parameter(0.02 * normal((length, d), rng))
        self.inner_AD = nn.Parameter(normal((d_inner, d), rng) / d**0.5)
        self.queries_KA = nn.Parameter(normal((k_max, d_inner), rng) / d_inner**0.5)

    has_ordered_interests = True

    def forward(self, items_BTD: Tensor, real_BT1: Tensor, start: InitialInterests) -> Tensor:
        """H = A E with A = softmax over items of W_u^T tanh(W_1 E) [IMSR eq. 8]."""
        n_items, n_interests = items_BTD.shape[1], start.vectors_BKD.shape[1]
        placed_BTD = items_BTD + self.positions_TD[len(self.positions_TD) - n_items :]
        logits_BTK = torch.tanh(placed_BTD @ self.inner_AD.t()) @ self.queries_KA[:n_interests].t()
        weights_BTK = torch.softmax(logits_BTK.masked_fill(real_BT1 == 0, MASKED), 1) * real_BT1
        vectors_BKD = torch.bmm(weights_BTK.transpose(1, 2), items_BTD)
        return vectors_BKD if start.alive_BK is None else vectors_BKD * start.alive_BK[..., None]


class InterestNet(nn.Module):
    """MIND, ComiRec-DR and ComiRec-SA, as an `InterestModel`."""

    batch_format = "target"

    def __init__(self, spec: InterestSpec, seed: int) -> None:
        super().__init__()
        self.spec, self.seed, self.n_users, self.n_items = spec, seed, 0, 0
        self.moments: dict[str, Tensor] = {}
        self.items = EmbeddingTable(spec.d, spec.std, stream_seed(seed, "items"), spec.categories)
        self.extract: nn.Module
        if spec.extractor == "routing":
            self.extract = DynamicRouting(spec.d, spec.iterations, spec.noise, spec.recency)
        else:
            rng = stream(seed, "self-attention")
            self.extract = SelfAttention(spec.d, spec.inner * spec.d, spec.k_max, spec.length, rng)
        # random directions with a norm below 1: with norm sqrt(d), new interests would attract every item
        self.register_buffer("starts_KD", squash(normal((spec.k_max, spec.d), stream(seed, "initial interests"))))

    starts_KD: Tensor

    def grow(self, n_users: int, n_items: int) -> None:
        """Add rows for new users and items."""
        self.n_users, self.n_items = n_users, n_items
        self.items.grow(n_items)

    def initial_interests(self, n: int) -> Tensor:
        """Return the starting points (n, D) of the first n interests of a new user."""
        return self.starts_KD[:n]

    def forward(self, batch: Batch) -> Forward:
        """Return the sampled softmax loss of the targets, with label-aware attention over the interests."""
        assert batch.targets_BT is not None and batch.negatives_N is not None
        target_B, negative_N = batch.targets_BT[:, 0], batch.negatives_N
        history_BTD, target_BD, negatives_ND = lookup_many(self.items, batch.history_BT, target_B, negative_N)
        vectors_BKD = self._extract_interests(history_BTD, batch)
        if batch.project is not None and batch.alive_BK is not None and batch.old_BK is not None:
            vectors_BKD = batch.project(vectors_BKD, batch.alive_BK, batch.old_BK)
        user_BD = attend(vectors_BKD, target_BD, batch.alive_BK, self.spec.attention, self.spec.power)
        logits_BN = sampled_logits(user_BD, target_BD, negatives_ND, target_B, negative_N)
        return Forward(sampled_softmax_loss(logits_BN), vectors_BKD, target_BD, logits_BN)

    def _extract_interests(self, items_BTD: Tensor, batch: Batch) -> Tensor:
        stored_BKD, alive_BK = batch.interests_BKD, batch.alive_BK
        if stored_BKD is None:
            stored_BKD = self.initial_interests(self.spec.k).expand(len(batch), -1, -1)
        if alive_BK is not None and bool(alive_BK.all()):
            alive_BK = None
        newcomer_B = None if batch.old_BK is None else ~batch.old_BK.any(1)
        start = InitialInterests(stored_BKD, alive_BK, newcomer_B)
        vectors: Tensor = self.extract(items_BTD, (batch.history_BT > 0)[..., None].float(), start)
        return vectors

    @property
    def has_ordered_interests(self) -> bool:
        """Whether only the last interests of a user may be removed."""
        return bool(self.extract.has_ordered_interests)

    def encode(self, items_BTD: Tensor, batch: Batch) -> Tensor:
        """Return the user vectors (B, K, D), with gradients, of histories whose items have the vectors `items_BTD`."""
        vectors_BKD = self._extract_interests(items_BTD, batch)
        if batch.alive_BK is None:
            return vectors_BKD
        return torch.where(batch.alive_BK[..., None], vectors_BKD, vectors_BKD[:, :1])
