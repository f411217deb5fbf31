"""STAMP and STMP: session models that multiply a summary of the session with one of its last item.

After Liu et al., KDD 2018. STAMP summarises the session by attention to the last item, STMP by the mean. Differs from
the paper, as the authors' code does:

- Scores have no sigmoid before the softmax. Logits between 0 and 1 make a softmax over thousands of items almost flat.
- `add_mean_back` adds the mean of the session to the result of the attention.

Differs from the authors' code:

- Histories of different length share a batch, and padding is ignored.
- Both last layers have biases, as in the paper. They start at 0.
- Neither vectors nor gradients are clipped.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freshrec.config import HISTORY_LENGTH, Count, CountOrZero, Positive, check_options
from freshrec.nn.embedding_table import EmbeddingTable, lookup_many
from freshrec.nn.full_softmax import full_softmax_loss
from freshrec.nn.layers import sampled_logits, sampled_softmax_loss
from freshrec.random_streams import global_stream, stream_seed
from freshrec.types import Batch, Forward

WEIGHT_STD = 0.05  # initial standard deviation of the dense weights, as in the authors' code


@dataclass(frozen=True)
class STAMPSpec:
    """Options of STAMP and STMP. The defaults are the authors', except for `std`."""

    kind: Literal["stamp", "stmp"] = "stamp"  # Summary of the session: attention ("stamp") or mean ("stmp").
    add_mean_back: bool = True  # Whether the session mean is added to the result of attention; stamp only.
    d: Count = 100  # Dimensions of the user and item vectors.
    length: Count = HISTORY_LENGTH  # Number of most recent events per user that the model reads.
    lr: Positive = 0.003  # Learning rate of Adam.
    batch: Count = 512  # Targets per training step.
    negatives: Count = 512  # Random negative items per training step, shared by the batch; loss=sampled only.
    # With the authors' std of 0.002, products are so small that hr@20 is 0.06 after 8 epochs, instead of 0.35.
    std: Positive = 0.05  # Standard deviation of the random values that new vectors start with; the authors' is 0.002.
    categories: CountOrZero = 0  # Number of category embeddings added to the item embeddings; 0 = off.
    loss: Literal["sampled", "full"] = "full"  # Softmax over the negatives ("sampled") or over all items ("full").

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> "STAMP":
        """Return a new model without users and items."""
        return STAMP(self, seed)


class Attention(nn.Module):
    """a_t = w . sigmoid(W1 x_t + W2 x_last + W3 m + b), with m = mean of the session. The weights need not sum to 1."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.each = nn.Linear(d, d)
        self.last, self.mean = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.weigh = nn.Linear(d, 1, bias=False)

    def forward(self, items_BTD: Tensor, last_BD: Tensor, mean_BD: Tensor) -> Tensor:
        """Return the weights a_t, shape (B, T)."""
        same_BD = self.last(last_BD) + self.mean(mean_BD)
        weight_BT1: Tensor = self.weigh(torch.sigmoid(self.each(items_BTD) + same_BD[:, None]))
        return weight_BT1[..., 0]


class STAMP(nn.Module):
    """A `VectorModel` with K = 1: the score sum_d h_s h_t x_i is the inner product of x_i and the user vector h_s h_t.

    h_t = tanh(W_t x_last + b_t), and h_s = tanh(W_s m_a + b_s) with m_a = sum_t a_t x_t. In STMP, m_a is the mean of
    the session.
    """

    batch_format = "target"

    def __init__(self, spec: STAMPSpec, seed: int) -> None:
        super().__init__()
        self.spec, self.seed, self.n_users, self.n_items = spec, seed, 0, 0
        self.moments: dict[str, Tensor] = {}
        self.items = EmbeddingTable(spec.d, spec.std, stream_seed(seed, "items"), spec.categories)
        with global_stream(seed, "dense weights"):
            self.attention = Attention(spec.d) if spec.kind == "stamp" else None
            self.whole, self.last = nn.Linear(spec.d, spec.d), nn.Linear(spec.d, spec.d)
            for name, weight in self.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(weight)
                else:
                    nn.init.normal_(weight, std=WEIGHT_STD)

    def grow(self, n_users: int, n_items: int) -> None:
        """Add rows for new users and items."""
        self.n_users, self.n_items = n_users, n_items
        self.items.grow(n_items)

    def forward(self, batch: Batch) -> Forward:
        """Return the cross-entropy of the targets over all known items, or over the negatives."""
        assert batch.targets_BT is not None and batch.negatives_N is not None
        target_B, negative_N, history_BT = batch.targets_BT[:, 0], batch.negatives_N, batch.history_BT
        if self.spec.loss == "full":  # this loss changes every row of the table
            rows_RD = self.items.lookup_all()
            user_BD = self.encode(F.embedding(history_BT, rows_RD), batch)[:, 0]
            return Forward(full_softmax_loss(user_BD, rows_RD, target_B), user_BD[:, None], rows_RD=rows_RD)
        history_BTD, target_BD, negative_ND = lookup_many(self.items, history_BT, target_B, negative_N)
        user_BD = self.encode(history_BTD, batch)[:, 0]
        logits_BN = sampled_logits(user_BD, target_BD, negative_ND, target_B, negative_N)
        return Forward(sampled_softmax_loss(logits_BN), user_BD[:, None], target_BD, logits_BN)

    def encode(self, items_BTD: Tensor, batch: Batch) -> Tensor:
        """Return the user vectors (B, 1, D), with gradients, of histories whose items have the vectors `items_BTD`."""
        if batch.history_BT.shape[1] == 0:
            return torch.zeros(len(batch), 1, self.spec.d)
        real_BT1 = (batch.history_BT > 0).to(items_BTD.dtype)[..., None]
        items_BTD = items_BTD * real_BT1  # so that padding adds nothing to the sums
        last_BD = items_BTD[:, -1]
        mean_BD = items_BTD.sum(1) / real_BT1.sum(1).clamp(min=1)
        whole_BD = mean_BD
        if self.attention is not None:
            weight_BT = self.attention(items_BTD, last_BD, mean_BD)
            whole_BD = torch.bmm(weight_BT[:, None], items_BTD)[:, 0]
            if self.spec.add_mean_back:
                whole_BD = whole_BD + mean_BD
        user_BD = torch.tanh(self.whole(whole_BD)) * torch.tanh(self.last(last_BD))
        return (user_BD * real_BT1[:, -1])[:, None]
