"""GRU4Rec: a recurrent network reads the history; its output at each position predicts the next item.

After the code that Hidasi and others released (2016 to 2018; PyTorch port, 2023). That code trains on several sessions
in parallel and moves each one event ahead per step: steps="session-parallel". Differs from it:

- By default, a step trains on windows with a target after each position, so that there are fewer and larger steps. The
  gradient goes back through the whole window, or through one step with bptt="one".
- With steps="session-parallel", an update does not read the events before its own.
- The optimiser is Adam, not Adagrad with momentum. Losses are means, not sums.
- A negative that equals the target is ignored. An item's score has no bias.
- The input is an item's vector, never one-hot.
- Only some of the batch's own targets serve as negatives.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from freshrec.config import HISTORY_LENGTH, Count, CountOrZero, Positive, Rate, Weight, check_options
from freshrec.errors import OptionError
from freshrec.nn.embedding_table import EmbeddingTable, embedding_matrix, lookup_many
from freshrec.nn.layers import MASKED, sampled_logits, sampled_softmax_loss
from freshrec.random_streams import global_stream, stream_seed
from freshrec.types import Batch, Forward, SessionLanes

Loss = Literal["xe", "bpr", "top1", "bpr-max", "top1-max"]


@dataclass(frozen=True)
class GRU4RecSpec:
    """Options of GRU4Rec.

    The authors use for DIGINETICA: d=512, drop_in=0.5, drop_out=0.3, negatives=2048, batch_negatives=127, alpha=0.3,
    loss="bpr-max", bpreg=0.9. For YOOCHOOSE: d=480, drop_out=0.2, batch_negatives=47, alpha=0.2, logq=1, loss="xe".
    """

    d: Count = 64  # Dimensions of the user and item vectors.
    hidden: CountOrZero = 0  # Units per layer; 0 = d. If they differ from d, a linear layer maps the output to d.
    layers: Count = 1  # Number of GRU layers.
    embeddings: Annotated[
        Literal["constrained", "separate"],
        Field(description='"constrained" = an item has one vector, for input and output; "separate" = one for each.'),
    ] = "constrained"
    drop_in: Rate = 0.2  # Dropout rate of the input vectors; 0 = off.
    drop_out: Rate = 0.2  # Dropout rate of each layer's output; 0 = off.
    steps: Annotated[
        Literal["windows", "session-parallel"],
        Field(
            description='What a step trains on: whole "windows", or one event of each of several sessions '
            '("session-parallel").'
        ),
    ] = "windows"
    bptt: Literal["all", "one"] = "all"  # Steps that the gradient goes back with steps=windows: "all" or "one".
    length: Count = HISTORY_LENGTH  # Number of most recent events per user that the model reads.
    lr: Positive = 0.006  # Learning rate of Adam.
    batch: Count = 64  # Windows per training step, or parallel sessions.
    negatives: Count = 512  # Random negative items per training step, shared by the batch.
    batch_negatives: CountOrZero = 64  # Number of the batch's own targets that also serve as negatives; 0 = none.
    alpha: Weight = 0.3  # Exponent of popularity in the sampling of negatives; 0 = uniform, 1 = by popularity.
    logq: Weight = 0.0  # Multiple of ln P(item is drawn) that is subtracted from its score; 0 = off; loss=xe only.
    loss: Annotated[
        Loss,
        Field(
            description='Ranking loss "bpr", "top1", "bpr-max" or "top1-max", or "xe" = cross-entropy over the target '
            "and the negatives."
        ),
    ] = "bpr-max"
    bpreg: Weight = 0.9  # Weight of the squared scores of negatives in the loss; 0 = off; loss=bpr-max only.
    elu: Weight = 1.0  # Alpha of the ELU that is applied to scores; 0 = off; loss=bpr-max only.
    std: Positive = 0.04  # Standard deviation of the random values that new vectors start with.
    categories: CountOrZero = 0  # Number of category embeddings added to the item embeddings; 0 = off.

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> "GRU4Rec":
        """Return a new model without users and items."""
        if self.logq and self.loss != "xe":
            raise OptionError(f"logq works with loss=xe only, not with loss={self.loss}. Set loss=xe or logq=0.")
        return GRU4Rec(self, seed)


# Losses. Arguments: scores of the target (B,), scores of the negatives (B, N), and which negatives are not the target.


def bpr(score_B: Tensor, negative_BN: Tensor, is_other_BN: Tensor) -> Tensor:
    """-1/N sum_j ln sigma(r - r_j); mean over B."""
    return _masked_mean(-F.logsigmoid(score_B[:, None] - negative_BN), is_other_BN)


def top1(score_B: Tensor, negative_BN: Tensor, is_other_BN: Tensor) -> Tensor:
    """1/N sum_j sigma(r_j - r) + sigma(r_j^2); mean over B."""
    return _masked_mean(_top1(score_B, negative_BN), is_other_BN)


def top1_max(score_B: Tensor, negative_BN: Tensor, is_other_BN: Tensor) -> Tensor:
    """sum_j w_j (sigma(r_j - r) + sigma(r_j^2)), with w = softmax of the negatives' scores; mean over B."""
    weight_BN = _log_shares(negative_BN, is_other_BN).exp() * is_other_BN
    return (weight_BN * _top1(score_B, negative_BN)).sum(1).mean()


def bpr_max(score_B: Tensor, negative_BN: Tensor, is_other_BN: Tensor, bpreg: float, elu: float = 0.0) -> Tensor:
    """-ln sum_j w_j sigma(r - r_j) + bpreg sum_j w_j r_j^2, with w = softmax of the negatives' scores; mean over B.

    `elu`: alpha of the ELU that is applied to all scores first: r < 0 becomes alpha (e^r - 1). 0 = off.
    """
    if elu:
        score_B, negative_BN = F.elu(score_B, elu), F.elu(negative_BN, elu)
    log_BN = _log_shares(negative_BN, is_other_BN)
    log_win_B = torch.logsumexp(log_BN + F.logsigmoid(score_B[:, None] - negative_BN), 1)
    square_B = (log_BN.exp() * is_other_BN * negative_BN.square()).sum(1)
    return (bpreg * square_B - log_win_B).mean()


def ranking_loss(spec: GRU4RecSpec, logits_BN: Tensor, is_other_BN: Tensor) -> Tensor:
    """Return the loss that `spec` names. Column 0 of the logits is the target; the others are negatives."""
    score_B, negative_BN = logits_BN[:, 0], logits_BN[:, 1:]
    if spec.loss == "xe":
        return sampled_softmax_loss(logits_BN)
    if spec.loss == "bpr-max":
        return bpr_max(score_B, negative_BN, is_other_BN, spec.bpreg, spec.elu)
    return {"bpr": bpr, "top1": top1, "top1-max": top1_max}[spec.loss](score_B, negative_BN, is_other_BN)


def _top1(score_B: Tensor, negative_BN: Tensor) -> Tensor:
    return torch.sigmoid(negative_BN - score_B[:, None]) + torch.sigmoid(negative_BN.square())


def _log_shares(negative_BN: Tensor, is_other_BN: Tensor) -> Tensor:
    """Return ln of the softmax over the negatives, shape (B, N)."""
    return torch.log_softmax(negative_BN.masked_fill(~is_other_BN, MASKED), 1)


def _masked_mean(value_BN: Tensor, is_other_BN: Tensor) -> Tensor:
    return ((value_BN * is_other_BN).sum(1) / is_other_BN.sum(1).clamp(min=1)).mean()


# Negatives.


def popularity_distribution(counts_I: Tensor, alpha: float) -> Tensor:
    """P(i) = n_i^alpha / sum_j n_j^alpha, where n_i is the count of item i."""
    power_I = counts_I.float() ** alpha
    return power_I / power_I.sum(dtype=torch.float64)


def smoothed_popularity(counts_I: Tensor, alpha: float) -> Tensor:
    """Return `popularity_distribution` of the items 1, 2, ..., shape (I,).

    All counts are raised by 1, so that every item can be drawn.
    """
    return popularity_distribution(counts_I[1:] + 1, alpha)


def sample_by_quantile(probability_I: Tensor, quantiles_N: Tensor) -> Tensor:
    """Invert the cumulative distribution: return the items, counted from 0, at these quantiles in [0, 1)."""
    edges_I = probability_I.cumsum(0, dtype=torch.float64)
    return torch.searchsorted(edges_I, quantiles_N * edges_I[-1], right=True).clamp_(max=len(probability_I) - 1)


class GRU4Rec(nn.Module):
    """A `VectorModel` with K = 1, and a `NegativeSampler`."""

    counts_I: Tensor  # (n_items + 1,) number of times each item was a training target

    def __init__(self, spec: GRU4RecSpec, seed: int) -> None:
        super().__init__()
        self.batch_format = "window" if spec.steps == "windows" else "session-parallel"
        self.spec, self.seed, self.n_users, self.n_items = spec, seed, 0, 0
        self.moments: dict[str, Tensor] = {}
        self.items = EmbeddingTable(spec.d, spec.std, stream_seed(seed, "items"), spec.categories)
        self.taken: EmbeddingTable | None = None  # input vectors, if they differ from the output vectors
        if spec.embeddings == "separate":
            self.taken = EmbeddingTable(spec.d, spec.std, stream_seed(seed, "taken"), spec.categories)
        self.register_buffer("counts_I", torch.zeros(1, dtype=torch.int64))
        hidden = spec.hidden or spec.d
        with global_stream(seed, "dense weights"):
            sizes = [spec.d] + [hidden] * spec.layers
            self.layers = nn.ModuleList(nn.GRU(n, m, batch_first=True) for n, m in zip(sizes, sizes[1:]))
            self.last = nn.Linear(hidden, spec.d) if hidden != spec.d else None
            for name, weights in self.named_parameters():
                if "bias" in name:
                    nn.init.zeros_(weights)
                else:
                    for part in weights.detach().split(hidden if "layers" in name else spec.d):  # each gate on its own
                        nn.init.xavier_uniform_(part)

    def grow(self, n_users: int, n_items: int) -> None:
        """Add rows for new users and items."""
        self.counts_I = F.pad(self.counts_I, (0, n_items - self.n_items))
        self.n_users, self.n_items = n_users, n_items
        self.items.grow(n_items)
        if self.taken is not None:
            self.taken.grow(n_items)

    def forward(self, batch: Batch) -> Forward:
        """Return the mean loss over the positions that have a target."""
        assert batch.targets_BT is not None and batch.negatives_N is not None
        is_target_BT = (batch.history_BT > 0) & (batch.targets_BT > 0)
        target_B = batch.targets_BT[is_target_BT]
        n_batch_negatives = min(self.spec.batch_negatives, len(target_B))
        batch_negative_N = target_B[torch.linspace(0, len(target_B) - 1, n_batch_negatives).long()]
        negative_N = torch.cat([batch.negatives_N, batch_negative_N])
        if self.taken is None:
            history_BTD, target_BD, negative_ND = lookup_many(self.items, batch.history_BT, target_B, negative_N)
        else:
            history_BTD = self.taken.lookup(batch.history_BT)
            target_BD, negative_ND = lookup_many(self.items, target_B, negative_N)
        states = None
        if batch.lanes is None:
            user_BD = self._outputs(history_BTD, batch.history_BT > 0)[is_target_BT]
        else:
            user_BD, states = read_next(self, history_BTD[:, 0], batch.lanes)
        logits_BN = sampled_logits(user_BD, target_BD, negative_ND, target_B, negative_N)
        if self.spec.logq:
            log_BN = self._log_probabilities(target_B, negative_N, n_batch_negatives)
            loss = sampled_softmax_loss(logits_BN - log_BN)
        else:
            loss = ranking_loss(self.spec, logits_BN, target_B[:, None] != negative_N)
        return Forward(loss, user_BD[:, None], target_BD, logits_BN, states=states)

    def draw_negatives(self, batch: Batch) -> Tensor:
        """Count the targets, then draw N items by popularity, one from each of N equal quantile ranges.

        With alpha = 0, return the uniform negatives of the batch.
        """
        assert batch.targets_BT is not None and batch.negatives_N is not None
        target_B = batch.targets_BT[(batch.history_BT > 0) & (batch.targets_BT > 0)]
        self.counts_I += torch.bincount(target_B, minlength=len(self.counts_I))
        if not self.spec.alpha:
            return batch.negatives_N
        n = len(batch.negatives_N)
        quantiles_N = (torch.arange(n) + torch.rand(n, dtype=torch.float64)) / n
        return 1 + sample_by_quantile(smoothed_popularity(self.counts_I, self.spec.alpha), quantiles_N)

    def _log_probabilities(self, target_B: Tensor, negative_N: Tensor, n_batch_negatives: int) -> Tensor:
        """Return logq ln P of the target and the negatives, shape (B, 1 + N).

        P is the popularity of an item. For sampled negatives, it is popularity to the power alpha.
        """
        target_log_I = smoothed_popularity(self.counts_I, 1.0).log()
        sampled_log_I = smoothed_popularity(self.counts_I, self.spec.alpha).log()
        sampled_N, targets_N = negative_N.split([len(negative_N) - n_batch_negatives, n_batch_negatives])
        log_N = torch.cat([sampled_log_I[sampled_N - 1], target_log_I[targets_N - 1]])
        log_BN = torch.cat([target_log_I[target_B - 1, None], log_N.expand(len(target_B), -1)], 1)
        return self.spec.logq * log_BN.float()

    def _outputs(self, items_BTD: Tensor, real_BT: Tensor) -> Tensor:
        """Return the output at each position, (B, T, D). Padding repeats the output of the event before it."""
        drop_in, drop_out = (self.spec.drop_in, self.spec.drop_out) if self.training else (0.0, 0.0)
        order_BT = torch.argsort(~real_BT, dim=1, stable=True)  # padding goes last, where it affects no output
        x_BTH = items_BTD.gather(1, order_BT[..., None].expand_as(items_BTD))
        x_BTH = F.dropout(x_BTH, drop_in, self.training)
        for layer in self.layers:
            x_BTH = F.dropout(self._layer_states(layer, x_BTH), drop_out, self.training)
        if self.last is not None:
            x_BTH = self.last(x_BTH)
        position_BT = (real_BT.cumsum(1) - 1).clamp(min=0)
        return x_BTH.gather(1, position_BT[..., None].expand_as(x_BTH))

    def _layer_states(self, layer: nn.Module, x_BTH: Tensor) -> Tensor:
        """Return the states of one layer after each event, shape (B, T, H). The initial state is 0."""
        start_1BH = (x_BTH[:, :1, :1] * 0).transpose(0, 1).expand(-1, -1, self.spec.hidden or self.spec.d)
        if self.spec.bptt == "all" or not self.training:
            states_BTH: Tensor = layer(x_BTH, start_1BH.contiguous())[0]
            return states_BTH
        with torch.no_grad():
            before_BTH = layer(x_BTH, start_1BH.contiguous())[0]
        before_BTH = torch.cat([start_1BH.transpose(0, 1).detach(), before_BTH[:, :-1]], 1)
        steps_N1H: Tensor = layer(x_BTH.flatten(0, 1)[:, None], before_BTH.flatten(0, 1)[None])[0]
        return steps_N1H.view(*x_BTH.shape[:2], -1)

    def encode(self, items_BTD: Tensor, batch: Batch) -> Tensor:
        """Return the user vectors (B, 1, D), with gradients, of histories whose items have the vectors `items_BTD`.

        With embeddings="separate", `items_BTD` is ignored, and gradients reach the input vectors of the step.
        """
        if batch.history_BT.shape[1] == 0:
            return torch.zeros(len(batch), 1, self.spec.d)
        if self.taken is not None:
            table = embedding_matrix(self.taken) if self.taken.leaf is None else self.taken.full_matrix()
            items_BTD = F.embedding(batch.history_BT, table)
        real_BT = batch.history_BT > 0
        return self._outputs(items_BTD, real_BT)[:, -1:] * real_BT.any(1)[:, None, None]


def read_next(model: GRU4Rec, items_BD: Tensor, lanes: SessionLanes) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Advance each session by one event. Return the outputs (B, D) and the new states (B, H) of the layers.

    No gradient reaches earlier steps.
    """
    spec = model.spec
    drop_in, drop_out = (spec.drop_in, spec.drop_out) if model.training else (0.0, 0.0)
    before = lanes.states or (torch.zeros(len(items_BD), spec.hidden or spec.d),) * spec.layers
    after = []
    x_BH = F.dropout(items_BD, drop_in, model.training)
    for layer, before_BH in zip(model.layers, before):
        x_BH = layer(x_BH[:, None], before_BH[None])[0][:, 0]
        after.append(x_BH.detach())
        x_BH = F.dropout(x_BH, drop_out, model.training)
    return x_BH if model.last is None else model.last(x_BH), tuple(after)
