"""MIND and ComiRec as originally published: interests are computed from the history and not stored.

multi_interest.py has the same models as restated in the IMSR paper. Here the number of interests is fixed, so that each
interest may have its own transforms. Sources:

- Li and others, Multi-Interest Network with Dynamic Routing (CIKM 2019), without the user profile, which a log lacks.
- Cen and others, Controllable Multi-Interest Framework (KDD 2020), with their code, which also contains MIND.

Symbols of the papers: e_n -> items_BTD, e^_n and e^_kn -> votes_BGTD, S and W_nk -> transform_TKDD,
b_kn -> logits_BKT, c_kn -> share_BKT, h_k -> vectors_BKD. K = G A: G transforms, each for A interests. Either one
transform serves all interests, or each interest has its own.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from freshrec.config import HISTORY_LENGTH, Count, CountOrZero, Positive, Weight, check_options
from freshrec.errors import OptionError
from freshrec.nn.embedding_table import EmbeddingTable, lookup_many
from freshrec.nn.layers import MASKED, attend, sampled_logits, sampled_softmax_loss, squash
from freshrec.random_streams import global_stream, stream_seed
from freshrec.types import Batch, Forward

HARD_POWER = 100.0  # from this power on, label attention uses the closest interest only


@dataclass(frozen=True)
class PublishedInterestSpec:
    """Options of the original MIND, ComiRec-DR and ComiRec-SA.

    The defaults of d, k, iterations, inner, length and batch are those of ComiRec's code (for Taobao). Differs from it:

    - `lr`, `std` and `negatives` are this library's. Their code runs Adam at 0.001 for up to a million steps, with 10
      negatives per row.
    - Negatives are uniform. Theirs are log-uniform by popularity, with a correction for the sampling probability.
    - Their MIND has hard attention and a ReLU: power=100:relu=true.
    """

    extractor: Annotated[
        Literal["routing", "attention"],
        Field(description='Extraction of interests: "routing" (MIND, ComiRec-DR) or self-"attention" (ComiRec-SA).'),
    ] = "routing"
    transform: Annotated[
        Literal["shared", "interest", "position"],
        Field(description='Routing transforms: one "shared", one per "interest", or one per "position" and interest.'),
    ] = "shared"
    gain: Positive = 1.0  # Initial std of the transforms, in units of 1 / sqrt(d); ComiRec-DR's code has sqrt(d).
    noise: Weight = 1.0  # Standard deviation of the initial routing logits; 0 = they start at 0.
    k: Count = 4  # Number of interests per user.
    k_log2: Annotated[
        Literal["off", "n", "n+1"],
        Field(description='Limit of interests for n history items: "off", or the floor of log2 of "n" or "n+1".'),
    ] = "off"
    iterations: Count = 3  # Number of routing iterations.
    relu: bool = False  # Whether a linear layer with a ReLU follows the routing.
    inner: Count = 4  # Width of the self-attention, as a multiple of d.
    power: Positive = 2.0  # Exponent of the label attention (p in MIND); 100 or more = the closest interest only.
    d: Count = 64  # Dimensions of the user and item vectors.
    length: Count = HISTORY_LENGTH  # Number of most recent events per user that the model reads.
    lr: Positive = 0.01  # Learning rate of Adam.
    batch: Count = 256  # Targets per training step.
    negatives: Count = 512  # Random negative items per training step, shared by the batch.
    std: Positive = 0.1  # Standard deviation of the random values that new vectors start with.
    categories: CountOrZero = 0  # Number of category embeddings added to the item embeddings; 0 = off.

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> "PublishedInterestNet":
        """Return a new model without users and items. Raises OptionError if all its interests would stay the same."""
        if self.extractor == "routing" and self.transform == "shared" and self.k > 1 and not self.noise:
            raise OptionError(
                "With transform=shared and noise=0, all interests stay the same. Set noise above 0, or set "
                "transform=interest or transform=position."
            )
        return PublishedInterestNet(self, seed)


MIND_PUBLISHED = PublishedInterestSpec()
COMIREC_DR_PUBLISHED = PublishedInterestSpec(transform="position", noise=0.0, power=HARD_POWER)
COMIREC_SA_PUBLISHED = PublishedInterestSpec(extractor="attention", power=HARD_POWER)


def interest_mask(real_BT: Tensor, k: int, count: Literal["n", "n+1"]) -> Tensor:
    """Mask of the first max(1, min(k, floor log2 n)) interests, shape (B, k), for a history of n items.

    MIND's paper uses n, and DeepMatch uses n + 1 instead.
    """
    n_B1 = real_BT.sum(1, keepdim=True) + (count == "n+1")
    return (n_B1 >= 2.0 ** torch.arange(1, k + 1)) | (torch.arange(k) == 0)


def route_capsules(votes_BGTD: Tensor, logits_BKT: Tensor, real_BT: Tensor, iterations: int) -> Tensor:
    """h_k = squash(sum_n c_kn e^_kn), c_n = softmax over k of b_n, then b_kn += h_k . e^_kn; (B, K, D).

    Padding has weight 0 after the softmax. Gradients flow through e^ in the last iteration only; c is a constant.
    """
    n_users, n_groups, n_steps, d = votes_BGTD.shape
    n_interests, detached_votes_BGTD = logits_BKT.shape[1], votes_BGTD.detach()
    for i in range(iterations):
        share_BKT = torch.softmax(logits_BKT, 1) * real_BT[:, None]
        share_BGAT = share_BKT.reshape(n_users, n_groups, n_interests // n_groups, n_steps)
        is_last = i == iterations - 1
        vectors_BGAD = squash(share_BGAT @ (votes_BGTD if is_last else detached_votes_BGTD))
        if not is_last:
            logits_BKT = logits_BKT + (vectors_BGAD @ detached_votes_BGTD.mT).reshape(logits_BKT.shape)
    return vectors_BGAD.reshape(n_users, n_interests, d)


class CapsuleRouting(nn.Module):
    """Dynamic routing of items to interests, through one shared transform or several.

    MIND draws new routing logits in every training pass: N(0, 1), truncated at two standard deviations. Its code also
    draws them when it serves. Differs from it: serving uses constants per position and interest, drawn once from the
    seed. Positions count from the end of the history; ComiRec counts from the oldest item.
    """

    def __init__(self, spec: PublishedInterestSpec) -> None:
        super().__init__()
        self.iterations, self.noise = spec.iterations, spec.noise
        n_positions = spec.length if spec.transform == "position" else 1
        n_transforms = 1 if spec.transform == "shared" else spec.k
        start_TKDD = torch.randn(n_positions, n_transforms, spec.d, spec.d) * (spec.gain / spec.d**0.5)
        self.transform_TKDD = nn.Parameter(start_TKDD)
        self.register_buffer("logits_KT", _fill_truncated_normal(torch.empty(spec.k, spec.length)))
        self.above = nn.Linear(spec.d, spec.d) if spec.relu else None
        if self.above is not None:
            _init_glorot(self.above)

    logits_KT: Tensor

    def forward(self, items_BTD: Tensor, real_BT: Tensor, alive_BK: Tensor | None, is_noisy: bool) -> Tensor:
        """Return the interests (B, K, D). Interests that are not alive are left out of the routing."""
        logits_KT = self.logits_KT[:, self.logits_KT.shape[1] - items_BTD.shape[1] :]
        if len(self.transform_TKDD) == 1:
            votes_BGTD = torch.einsum("btd,gcd->bgtc", items_BTD, self.transform_TKDD[0])
        else:
            transform_TKDD = self.transform_TKDD[len(self.transform_TKDD) - items_BTD.shape[1] :]
            votes_BGTD = torch.einsum("btd,tgcd->bgtc", items_BTD, transform_TKDD)
        logits_BKT = logits_KT.expand(len(items_BTD), -1, -1)
        if is_noisy and self.noise:
            logits_BKT = _fill_truncated_normal(torch.empty(logits_BKT.shape))
        logits_BKT = self.noise * logits_BKT
        if alive_BK is not None:
            logits_BKT = logits_BKT.masked_fill(~alive_BK[..., None], MASKED)
        vectors_BKD = route_capsules(votes_BGTD.contiguous(), logits_BKT, real_BT, self.iterations)
        return vectors_BKD if self.above is None else torch.relu(self.above(vectors_BKD))


class PublishedSelfAttention(nn.Module):
    """h_k = sum_n a_kn e_n, with a_k = softmax over n of w_k . tanh(W (e_n + p_n) + b).

    Positions p_n enter the weights only. Differs from ComiRec's code: w_k has no bias, because the softmax would cancel
    it. Positions count from the end of the history.
    """

    def __init__(self, spec: PublishedInterestSpec) -> None:
        super().__init__()
        self.positions_TD = nn.Parameter(torch.empty(spec.length, spec.d))
        nn.init.xavier_uniform_(self.positions_TD)
        self.inner = nn.Linear(spec.d, spec.inner * spec.d)
        self.queries = nn.Linear(spec.inner * spec.d, spec.k, bias=False)
        _init_glorot(self.inner)
        _init_glorot(self.queries)

    def forward(self, items_BTD: Tensor, real_BT: Tensor, alive_BK: Tensor | None, is_noisy: bool) -> Tensor:
        """Return the interests (B, K, D); 0 for a history without items."""
        placed_BTD = items_BTD + self.positions_TD[len(self.positions_TD) - items_BTD.shape[1] :]
        logits_BTK = self.queries(torch.tanh(self.inner(placed_BTD)))
        real_BT1 = real_BT[..., None]
        weights_BTK = torch.softmax(logits_BTK.masked_fill(real_BT1 == 0, MASKED), 1) * real_BT1
        return torch.bmm(weights_BTK.transpose(1, 2), items_BTD)


def _init_glorot(layer: nn.Linear) -> None:
    """Initialise as the authors do: Glorot's uniform weights, biases of 0."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _fill_truncated_normal(empty: Tensor) -> Tensor:
    return nn.init.trunc_normal_(empty, a=-2.0, b=2.0)


class PublishedInterestNet(nn.Module):
    """MIND, ComiRec-DR and ComiRec-SA as published: an `EncodingModel` with K vectors per user."""

    batch_format = "target"

    def __init__(self, spec: PublishedInterestSpec, seed: int) -> None:
        super().__init__()
        self.spec, self.seed, self.n_users, self.n_items = spec, seed, 0, 0
        self.moments: dict[str, Tensor] = {}
        self.items = EmbeddingTable(spec.d, spec.std, stream_seed(seed, "items"), spec.categories)
        with global_stream(seed, "dense weights"):
            self.extract: nn.Module = (
                CapsuleRouting(spec) if spec.extractor == "routing" else PublishedSelfAttention(spec)
            )

    def grow(self, n_users: int, n_items: int) -> None:
        """Add rows for new users and items."""
        self.n_users, self.n_items = n_users, n_items
        self.items.grow(n_items)

    def forward(self, batch: Batch) -> Forward:
        """Return the sampled softmax loss of the targets, with label-aware attention over the interests."""
        assert batch.targets_BT is not None and batch.negatives_N is not None
        target_B, negative_N = batch.targets_BT[:, 0], batch.negatives_N
        history_BTD, target_BD, negatives_ND = lookup_many(self.items, batch.history_BT, target_B, negative_N)
        vectors_BKD, alive_BK = self._extract_interests(history_BTD, batch, self.training)
        mode = "hard" if self.spec.power >= HARD_POWER else "soft"
        user_BD = attend(vectors_BKD, target_BD, alive_BK, mode, self.spec.power)
        logits_BN = sampled_logits(user_BD, target_BD, negatives_ND, target_B, negative_N)
        return Forward(sampled_softmax_loss(logits_BN), vectors_BKD, target_BD, logits_BN)

    def _extract_interests(self, items_BTD: Tensor, batch: Batch, is_noisy: bool) -> tuple[Tensor, Tensor | None]:
        """Return the interests (B, K, D), and a mask of those that a user has.

        The others repeat the first interest, so that they change no score.
        """
        real_BT, count = batch.history_BT > 0, self.spec.k_log2
        alive_BK = None if count == "off" else interest_mask(real_BT, self.spec.k, count)
        vectors_BKD: Tensor = self.extract(items_BTD, real_BT.float(), alive_BK, is_noisy)
        if alive_BK is not None:
            vectors_BKD = torch.where(alive_BK[..., None], vectors_BKD, vectors_BKD[:, :1])
        return vectors_BKD, alive_BK

    def encode(self, items_BTD: Tensor, batch: Batch) -> Tensor:
        """Return the user vectors (B, K, D), with gradients, of histories whose items have the vectors `items_BTD`."""
        return self._extract_interests(items_BTD, batch, is_noisy=False)[0]
