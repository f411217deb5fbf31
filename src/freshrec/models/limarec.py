"""LimaRec-style: several interests per user, each with its own query to causal linear attention over the history.

After Wu et al., "Rethinking Lifelong Sequential Recommendation with Incremental Multi-Interest Attention". We had only
the abstract and the summary in the IMSR paper: a state that each event updates, several interests, and no recurrent
network. The rest is our own design. The model is meant to be trained on the base block and then frozen, while the
interests follow new events. Differs from the paper:

- A user's state is computed from the last `length` events, not carried for life. Within that length both are equal.
- There is one layer. Every position is trained to predict the next item, by sampled softmax.
- Items that arrive after the first training start at 0. Histories skip them until they are trained.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freshrec.config import Count, CountOrZero, Positive, Rate, check_options
from freshrec.nn.embedding_table import EmbeddingTable, grow_with_zeros, lookup_many
from freshrec.nn.layers import attend, has_vector, sampled_logits, sampled_softmax_loss
from freshrec.random_streams import global_stream, stream_seed
from freshrec.types import Batch, Forward

EPS = 1e-9  # makes 0 / 0 = 0 for a history without items


@dataclass(frozen=True)
class LimaRecSpec:
    """Options of the LimaRec-style model."""

    k: Count = 4  # Number of interests per user.
    d: Count = 64  # Dimensions of the user and item vectors.
    attention: Literal["hard", "soft"] = "soft"  # Interests that a target trains: the closest ("hard") or all ("soft").
    decay: Rate = 0.0  # Share of the attention state that each new event removes; 0 = off.
    length: Count = 100  # Number of most recent events per user that the model reads.
    lr: Positive = 0.003  # Learning rate of Adam; as good as 0.001, in half the epochs.
    batch: Count = 128  # Windows per training step, each with up to `length` targets.
    negatives: Count = 512  # Random negative items per training step, shared by the batch.
    std: Positive = 0.1  # Standard deviation of the random values that new vectors start with.
    categories: CountOrZero = 0  # Number of category embeddings added to the item embeddings; 0 = off.

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> "LimaRec":
        """Return a new model without users and items."""
        return LimaRec(self, seed)


def linear_attention(queries_BPKD: Tensor, keys_BTD: Tensor, values_BTD: Tensor, weights_BPT: Tensor) -> Tensor:
    """o = sum_s w_s phi(q) phi(k_s) v_s / sum_s w_s phi(q) phi(k_s), with phi = elu + 1; shape (B, P, K, D).

    There are K queries q at each of P positions. The result equals phi(q) S / phi(q) z with the running sums
    S = sum_s w_s phi(k_s) v_s^T and z = sum_s w_s phi(k_s). It needs no (D, D) matrix for each position.
    """
    n_queries = queries_BPKD.shape[1:3]
    kernel_BNT = (F.elu(queries_BPKD) + 1).flatten(1, 2) @ (F.elu(keys_BTD) + 1).transpose(1, 2)
    kernel_BPKT = kernel_BNT.unflatten(1, n_queries) * weights_BPT[:, :, None]
    sums_BPKD = (kernel_BPKT.flatten(1, 2) @ values_BTD).unflatten(1, n_queries)
    out: Tensor = sums_BPKD / (kernel_BPKT.sum(3, keepdim=True) + EPS)
    return out


class LinearAttentionLayer(nn.Module):
    """Linear attention with K query maps, then a feed-forward layer.

    Each is followed by a residual connection and a layer norm, which all interests share.
    """

    def __init__(self, k: int, d: int) -> None:
        super().__init__()
        self.k = k
        self.query = nn.Linear(d, k * d)
        self.key, self.value = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.inner, self.outer = nn.Linear(d, d), nn.Linear(d, d)
        self.between, self.last = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, query_items_BPD: Tensor, items_BTD: Tensor, weights_BPT: Tensor) -> Tensor:
        """Return the interests (B, P, K, D) at P positions, from their item vectors and the weights of all items."""
        queries_BPKD = self.query(query_items_BPD).unflatten(2, (self.k, -1))
        attended_BPKD = linear_attention(queries_BPKD, self.key(items_BTD), self.value(items_BTD), weights_BPT)
        y_BPKD = self.between(query_items_BPD[:, :, None] + attended_BPKD)
        out: Tensor = self.last(y_BPKD + self.outer(F.relu(self.inner(y_BPKD))))
        return out


class LimaRec(nn.Module):
    """An `EncodingModel` with K interests per user. No strategy stores them between spans."""

    batch_format = "window"

    def __init__(self, spec: LimaRecSpec, seed: int) -> None:
        super().__init__()
        self.spec, self.seed, self.n_users, self.n_items = spec, seed, 0, 0
        self.moments: dict[str, Tensor] = {}
        self.items = EmbeddingTable(spec.d, spec.std, stream_seed(seed, "items"), spec.categories)
        with global_stream(seed, "dense weights"):
            self.layer = LinearAttentionLayer(spec.k, spec.d)

    def grow(self, n_users: int, n_items: int) -> None:
        """Add rows for new users and items. The vector of a later item stays 0 until it is trained."""
        self.n_users, self.n_items = n_users, n_items
        grow_with_zeros(self.items, n_items)

    def forward(self, batch: Batch) -> Forward:
        """Return the sampled softmax loss over all positions with a target, with label-aware attention."""
        assert batch.targets_BT is not None and batch.negatives_N is not None
        real_BT, negative_N = batch.history_BT > 0, batch.negatives_N
        is_target_BT = real_BT & (batch.targets_BT > 0)
        target_B = batch.targets_BT[is_target_BT]
        items_BTD, target_BD, negative_ND = lookup_many(self.items, batch.history_BT, target_B, negative_N)
        weights_BTT = self._decay_weights(real_BT.cumsum(1), real_BT).tril()
        vectors_BKD = self.layer(items_BTD, items_BTD, weights_BTT)[is_target_BT]
        user_BD = attend(vectors_BKD, target_BD, None, self.spec.attention)
        logits_BN = sampled_logits(user_BD, target_BD, negative_ND, target_B, negative_N)
        return Forward(sampled_softmax_loss(logits_BN), vectors_BKD, target_BD, logits_BN)

    def _decay_weights(self, event_number_BP: Tensor, real_BT: Tensor) -> Tensor:
        """(1 - decay)^(number of later events) of each item, seen from P positions; shape (B, P, T).

        `event_number_BP` is the number of the user's events up to and including a position.
        """
        age_BPT = event_number_BP[:, :, None] - real_BT.cumsum(1)[:, None]
        weights_BPT: Tensor = (1 - self.spec.decay) ** age_BPT.clamp(min=0)
        return weights_BPT * real_BT[:, None]

    def encode(self, items_BTD: Tensor, batch: Batch) -> Tensor:
        """Return the user vectors (B, K, D), with gradients, of histories whose items have the vectors `items_BTD`."""
        n_steps = batch.history_BT.shape[1]
        if n_steps == 0:
            return torch.zeros(len(batch), self.spec.k, self.spec.d)
        real_BT = has_vector(items_BTD, batch.history_BT)
        last_B1D = (real_BT * torch.arange(1, n_steps + 1)).argmax(1)[:, None, None].expand(-1, 1, self.spec.d)
        weights_B1T = self._decay_weights(real_BT.sum(1, keepdim=True), real_BT)
        vectors_B1KD = self.layer(items_BTD.gather(1, last_B1D), items_BTD, weights_B1T)
        vectors_BKD: Tensor = vectors_B1KD[:, 0] * real_BT.any(1)[:, None, None]
        return vectors_BKD
