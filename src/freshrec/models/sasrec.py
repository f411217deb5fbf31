"""SASRec: causal self-attention over the history; each position predicts the next item.

Differs from the paper:

- Negatives are shared by the batch, instead of one per position.
- The default loss is a softmax over the negatives. The paper's binary cross-entropy is loss="bce".
- Positions are counted from the end of the history, so that short histories need no padding to the full length.

ADER's variant is predict="last", loss="full": it learns from the last position only, by the softmax over all items.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from freshrec.config import HISTORY_LENGTH, Count, CountOrZero, Positive, Rate, check_options
from freshrec.errors import OptionError
from freshrec.nn.embedding_table import EmbeddingTable, lookup_many
from freshrec.nn.full_softmax import full_softmax_loss
from freshrec.nn.layers import bce_loss, sampled_logits, sampled_softmax_loss
from freshrec.random_streams import global_stream, stream_seed
from freshrec.types import Batch, Forward


@dataclass(frozen=True)
class SASRecSpec:
    """Options of SASRec."""

    d: Count = 64  # Dimensions of the user and item vectors.
    blocks: Count = 1  # Number of transformer blocks.
    heads: Count = 1  # Number of attention heads; d must be a multiple of it.
    dropout: Rate = 0.2  # Dropout rate of inputs, attention and feed-forward layers; 0 = off.
    length: Count = HISTORY_LENGTH  # Number of most recent events per user that the model reads.
    lr: Positive = 0.003  # Learning rate of Adam.
    batch: Count = 128  # Windows per training step, each with up to `length` targets.
    negatives: Count = 512  # Random negative items per training step, shared by the batch.
    std: Positive = 0.1  # Standard deviation of the random values that new vectors start with.
    categories: CountOrZero = 0  # Number of category embeddings added to the item embeddings; 0 = off.
    predict: Literal["each", "last"] = "each"  # Positions to predict from in training: "each", or the "last" one only.
    loss: Annotated[
        Literal["sampled", "full", "bce"],
        Field(description='Softmax over negatives ("sampled") or all items ("full"), or binary cross-entropy ("bce").'),
    ] = "sampled"

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> "SASRec":
        """Return a new model without users and items."""
        if self.d % self.heads:
            raise OptionError(f"d = {self.d} cannot be divided by heads = {self.heads}. Set d to a multiple of heads.")
        return SASRec(self, seed)


class TransformerBlock(nn.Module):
    """Self-attention, then a feed-forward layer.

    As in the authors' code, the residual connection adds the normalised query, not the input.
    """

    def __init__(self, spec: SASRecSpec) -> None:
        super().__init__()
        self.heads, self.dropout = spec.heads, spec.dropout
        self.query, self.key, self.value = (nn.Linear(spec.d, spec.d) for _ in range(3))
        self.inner, self.outer = nn.Linear(spec.d, spec.d), nn.Linear(spec.d, spec.d)
        self.before, self.between = nn.LayerNorm(spec.d, eps=1e-8), nn.LayerNorm(spec.d, eps=1e-8)

    def forward(self, x_BTD: Tensor, visible_B1TT: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D). Each position attends to the positions that are visible to it."""
        q_BTD = self.before(x_BTD)
        n_users, n_steps, d = x_BTD.shape

        def split(y_BTD: Tensor) -> Tensor:
            return y_BTD.view(n_users, n_steps, self.heads, -1).transpose(1, 2)

        drop = self.dropout if self.training else 0.0
        heads = split(self.query(q_BTD)), split(self.key(x_BTD)), split(self.value(x_BTD))
        mixed = F.scaled_dot_product_attention(*heads, attn_mask=visible_B1TT, dropout_p=drop)
        y_BTD = q_BTD + mixed.transpose(1, 2).reshape(n_users, n_steps, d)
        z_BTD: Tensor = self.between(y_BTD)
        inner_BTD = F.dropout(F.relu(self.inner(z_BTD)), drop, self.training)
        return z_BTD + F.dropout(self.outer(inner_BTD), drop, self.training)


class SASRec(nn.Module):
    """A `VectorModel` with K = 1."""

    def __init__(self, spec: SASRecSpec, seed: int) -> None:
        super().__init__()
        self.batch_format = "window" if spec.predict == "each" else "target"
        self.spec, self.seed, self.n_users, self.n_items = spec, seed, 0, 0
        self.moments: dict[str, Tensor] = {}
        self.items = EmbeddingTable(spec.d, spec.std, stream_seed(seed, "items"), spec.categories)
        with global_stream(seed, "dense weights"):
            self.positions_TD = nn.Parameter(torch.empty(spec.length, spec.d))
            nn.init.xavier_uniform_(self.positions_TD)
            self.blocks = nn.ModuleList(TransformerBlock(spec) for _ in range(spec.blocks))
            for layer in self.blocks.modules():
                if isinstance(layer, nn.Linear):  # as in the authors' code
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)
            self.last = nn.LayerNorm(spec.d, eps=1e-8)

    def grow(self, n_users: int, n_items: int) -> None:
        """Add rows for new users and items."""
        self.n_users, self.n_items = n_users, n_items
        self.items.grow(n_items)

    def forward(self, batch: Batch) -> Forward:
        """Return the loss over the positions that have a target, or of the last position."""
        assert batch.targets_BT is not None and batch.negatives_N is not None
        is_target_BT = batch.history_BT > 0
        if self.batch_format == "window":
            is_target_BT &= batch.targets_BT > 0
            target_B = batch.targets_BT[is_target_BT]
        else:
            is_target_BT[:, :-1] = False
            target_B = batch.targets_BT[is_target_BT[:, -1], 0]
        if self.spec.loss == "full":
            return self._full_softmax_forward(batch, is_target_BT, target_B)
        negative_N = batch.negatives_N
        history_BTD, target_BD, negative_ND = lookup_many(self.items, batch.history_BT, target_B, negative_N)
        user_BD = self._hidden_states(history_BTD, batch.history_BT > 0)[is_target_BT]
        logits_BN = sampled_logits(user_BD, target_BD, negative_ND, target_B, negative_N)
        loss = sampled_softmax_loss(logits_BN) if self.spec.loss == "sampled" else bce_loss(logits_BN)
        return Forward(loss, user_BD[:, None], target_BD, logits_BN)

    def _full_softmax_forward(self, batch: Batch, is_target_BT: Tensor, target_B: Tensor) -> Forward:
        """Return the cross-entropy over all known items, which changes every row of the table."""
        rows_RD = self.items.lookup_all()
        history_BTD = F.embedding(batch.history_BT, rows_RD)
        user_BD = self._hidden_states(history_BTD, batch.history_BT > 0)[is_target_BT]
        return Forward(full_softmax_loss(user_BD, rows_RD, target_B), user_BD[:, None], rows_RD=rows_RD)

    def _hidden_states(self, items_BTD: Tensor, real_BT: Tensor) -> Tensor:
        n_steps, drop = items_BTD.shape[1], self.spec.dropout if self.training else 0.0
        x_BTD = items_BTD * self.spec.d**0.5 + self.positions_TD[self.spec.length - n_steps :]
        x_BTD = F.dropout(x_BTD, drop, self.training) * real_BT[..., None]
        past_TT = torch.ones(n_steps, n_steps, dtype=torch.bool).tril()
        itself_TT = torch.eye(n_steps, dtype=torch.bool)  # padding attends to itself, else its softmax has no input
        visible_B1TT = (past_TT & (real_BT[:, None, :] | itself_TT))[:, None]
        for block in self.blocks:
            x_BTD = block(x_BTD, visible_B1TT) * real_BT[..., None]
        out: Tensor = self.last(x_BTD)
        return out

    def encode(self, items_BTD: Tensor, batch: Batch) -> Tensor:
        """Return the user vectors (B, 1, D), with gradients, of histories whose items have the vectors `items_BTD`."""
        if batch.history_BT.shape[1] == 0:
            return torch.zeros(len(batch), 1, self.spec.d)
        real_BT = batch.history_BT > 0
        return self._hidden_states(items_BTD, real_BT)[:, -1:] * real_BT[:, -1:, None]
