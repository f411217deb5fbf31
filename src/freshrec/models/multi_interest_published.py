"""MIND and ComiRec as their own papers and code have them: interests are read from the history, and none is kept.

multi_interest.py has the same models as IMSR restates them. Here the number of interests is fixed, so that each may
have transforms of its own. Sources: Li and others, Multi-Interest Network with Dynamic Routing (CIKM 2019), without its
user profile, which a log does not have; Cen and others, Controllable Multi-Interest Framework (KDD 2020), with their
code, which has MIND too.

Symbols of the papers: e_n -> items_BTD, e^_n and e^_kn -> sent_BGTD, S and W_nk -> transform_TKDD, b_kn -> votes_BKT,
c_kn -> share_BKT, h_k -> vectors_BKD. K = G A: an item is sent G times, each time to A of the interests: once to all
of them, or to each through a transform of its own.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from freshrec.config import HISTORY_LENGTH, Count, CountOrZero, Positive, Weight, check_options
from freshrec.errors import OptionError
from freshrec.nn.embedding_table import EmbeddingTable, lookup_many
from freshrec.nn.layers import MASKED, attend, sampled_logits, sampled_softmax_loss, squash
from freshrec.random_streams import global_stream, stream_seed
from freshrec.types import Batch, Forward

HARD_POWER = 100.0  # from this power on, label attention takes the closest interest alone


@dataclass(frozen=True)
class PublishedInterestSpec:
    """Options of the original MIND, ComiRec-DR and ComiRec-SA.

    d, k, iterations, inner, and length and batch (Taobao's) are those of ComiRec's code. Differs from it: `lr`, `std`
    and `negatives` are this library's (its Adam at 0.001, with 10 negatives a row, runs for up to a million steps), and
    negatives are uniform, where its log-uniform ones by popularity are corrected by how often they are drawn. Its
    MIND attends hard and has a ReLU: power=100:relu=true.
    """

    extractor: Literal["routing", "attention"] = "routing"
    transform: Literal["shared", "interest", "position"] = "shared"  # one; one an interest; one a position and interest
    gain: Positive = 1.0  # of the transforms, which start as N(0, gain^2 / d); ComiRec-DR's code: N(0, 1), so sqrt(d)
    noise: Weight = 1.0  # std of the routing logits at the start; 0: they start at 0
    k: Count = 4
    k_log2: Literal["off", "n", "n+1"] = "off"  # a history of n items has no more than the floor of log2 of this
    iterations: Count = 3  # of the routing
    relu: bool = False  # a layer with a ReLU over each interest that is routed
    inner: Count = 4  # d_a / d of the self-attention
    power: Positive = 2.0  # p of the label attention, which MIND leaves open; 100 or more: the closest interest alone
    d: Count = 64
    length: Count = HISTORY_LENGTH  # history items looked at
    lr: Positive = 0.01
    batch: Count = 256
    negatives: Count = 512
    std: Positive = 0.1  # of new item vectors
    categories: CountOrZero = 0  # room for so many, of items; 0: they are not looked at

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> "PublishedInterestNet":
        """A model without users and items. OptionError where nothing would tell its interests apart."""
        if self.extractor == "routing" and self.transform == "shared" and self.k > 1 and not self.noise:
            raise OptionError(
                "with one shared transform and noise = 0 all interests stay the same; set noise above 0, "
                "or transform to interest or position."
            )
        return PublishedInterestNet(self, seed)


MIND_PUBLISHED = PublishedInterestSpec()
COMIREC_DR_PUBLISHED = PublishedInterestSpec(transform="position", noise=0.0, power=HARD_POWER)
COMIREC_SA_PUBLISHED = PublishedInterestSpec(extractor="attention", power=HARD_POWER)


def interest_mask(real_BT: Tensor, k: int, count: Literal["n", "n+1"]) -> Tensor:
    """(B, k) which interests a history has: the first max(1, min(k, floor log2 n)), n items it has, or those and one.

    MIND's paper has n, DeepMatch n + 1.
    """
    n_B1 = real_BT.sum(1, keepdim=True) + (count == "n+1")
    return (n_B1 >= 2.0 ** torch.arange(1, k + 1)) | (torch.arange(k) == 0)


def route_capsules(votes_BGTD: Tensor, logits_BKT: Tensor, real_BT: Tensor, iterations: int) -> Tensor:
    """h_k = squash(sum_n c_kn e^_kn), c_n = softmax over k of b_n, then b_kn += h_k . e^_kn; (B, K, D).

    Padding weighs 0 after the softmax. Gradients flow through e^ in the last iteration only; c is a constant.
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
    """Dynamic routing of items, each sent to the interests through a shared transform or their own.

    MIND draws new routing logits, N(0, 1) within two deviations, in every training pass. Differs from its code, which
    goes on drawing when it serves: served are constants, drawn once from the seed, a number for each position and
    interest. Positions count from the end of the history, where ComiRec's count from the oldest item kept.
    """

    def __init__(self, spec: PublishedInterestSpec) -> None:
        super().__init__()
        self.iterations, self.noise = spec.iterations, spec.noise
        n_places = spec.length if spec.transform == "position" else 1
        n_transforms = 1 if spec.transform == "shared" else spec.k
        start_TKDD = torch.randn(n_places, n_transforms, spec.d, spec.d) * (spec.gain / spec.d**0.5)
        self.transform_TKDD = nn.Parameter(start_TKDD)
        self.register_buffer("logits_KT", _fill_truncated_normal(torch.empty(spec.k, spec.length)))
        self.above = nn.Linear(spec.d, spec.d) if spec.relu else None
        if self.above is not None:
            _init_glorot(self.above)

    logits_KT: Tensor

    def forward(self, items_BTD: Tensor, real_BT: Tensor, alive_BK: Tensor | None, is_noisy: bool) -> Tensor:
        """(B, K, D); an interest that is not alive takes no part."""
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
    """h_k = sum_n a_kn e_n, a_k = softmax over n of w_k . tanh(W (e_n + p_n) + b): positions enter the weights alone.

    Differs from ComiRec's code: w_k has no bias, which the softmax would cancel; positions count from the end.
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
        """(B, K, D); 0 where there is nothing but padding."""
        placed_BTD = items_BTD + self.positions_TD[len(self.positions_TD) - items_BTD.shape[1] :]
        logits_BTK = self.queries(torch.tanh(self.inner(placed_BTD)))
        real_BT1 = real_BT[..., None]
        weights_BTK = torch.softmax(logits_BTK.masked_fill(real_BT1 == 0, MASKED), 1) * real_BT1
        return torch.bmm(weights_BTK.transpose(1, 2), items_BTD)


def _init_glorot(layer: nn.Linear) -> None:
    """As the authors' layers start: Glorot's uniform weights, biases of 0."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _fill_truncated_normal(empty: Tensor) -> Tensor:
    return nn.init.trunc_normal_(empty, a=-2.0, b=2.0)


class PublishedInterestNet(nn.Module):
    """MIND, ComiRec-DR and ComiRec-SA as published, as an `EncodingModel` with K > 1 vectors a user."""

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
        """Make room for new users and items."""
        self.n_users, self.n_items = n_users, n_items
        self.items.grow(n_items)

    def forward(self, batch: Batch) -> Forward:
        """Sampled softmax of the target under the label-aware mix of the user's interests."""
        assert batch.targets_BT is not None and batch.negatives_N is not None
        target_B, negative_N = batch.targets_BT[:, 0], batch.negatives_N
        history_BTD, target_BD, negatives_ND = lookup_many(self.items, batch.history_BT, target_B, negative_N)
        vectors_BKD, alive_BK = self._extract_interests(history_BTD, batch, self.training)
        mode = "hard" if self.spec.power >= HARD_POWER else "soft"
        user_BD = attend(vectors_BKD, target_BD, alive_BK, mode, self.spec.power)
        logits_BN = sampled_logits(user_BD, target_BD, negatives_ND, target_B, negative_N)
        return Forward(sampled_softmax_loss(logits_BN), vectors_BKD, target_BD, logits_BN)

    def _extract_interests(self, items_BTD: Tensor, batch: Batch, is_noisy: bool) -> tuple[Tensor, Tensor | None]:
        """(B, K, D) and which of them a user has; one that it lacks repeats the first, so that it cannot win."""
        real_BT, count = batch.history_BT > 0, self.spec.k_log2
        alive_BK = None if count == "off" else interest_mask(real_BT, self.spec.k, count)
        vectors_BKD: Tensor = self.extract(items_BTD, real_BT.float(), alive_BK, is_noisy)
        if alive_BK is not None:
            vectors_BKD = torch.where(alive_BK[..., None], vectors_BKD, vectors_BKD[:, :1])
        return vectors_BKD, alive_BK

    def encode(self, items_BTD: Tensor, batch: Batch) -> Tensor:
        """`user_vectors` of a history whose items have these vectors, with gradients."""
        return self._extract_interests(items_BTD, batch, is_noisy=False)[0]
