"""Caser: convolutions over the vectors of the last few items, combined with a vector of the user.

After Tang and Wang, WSDM 2018. Differs from the paper:

- A training row has one target. The paper uses the next three items.
- Negatives are shared by the batch. They may include items from other events of the user.
- The default loss is a softmax over the negatives. The paper's binary cross-entropy is loss="bce".
- In the embedding tables, weight decay reaches only the rows of the batch.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from freshrec.config import Count, CountOrZero, Positive, Rate, Weight, check_options
from freshrec.errors import OptionError
from freshrec.nn.embedding_table import EmbeddingTable, embed
from freshrec.nn.full_softmax import full_softmax_loss
from freshrec.nn.layers import bce_loss, sampled_logits, sampled_softmax_loss
from freshrec.random_streams import global_stream, stream_seed
from freshrec.types import Batch, Forward


@dataclass(frozen=True)
class CaserSpec:
    """Options of Caser. The defaults are the authors', except for the loss, `negatives` and `lr`."""

    d: Count = 50  # Dimensions of the vectors of users and of history items.
    length: Count = 5  # Number of most recent items that the filters read.
    vertical: CountOrZero = 4  # Number of vertical filters, each a weighted sum of the items; 0 = none.
    horizontal: CountOrZero = 16  # Number of horizontal filters for each height from 1 to `length` items; 0 = none.
    personal: bool = True  # Whether each user has a learned vector too.
    dropout: Rate = 0.5  # Share of the filter outputs that training drops; 0 = off.
    # After 4 epochs on Amazon Beauty, hr@20 is 0.049 with this lr, and 0.032 with the authors' 0.001.
    lr: Positive = 0.003  # Learning rate of Adam; the authors' is 0.001.
    batch: Count = 512  # Targets per training step.
    negatives: Count = 512  # Random negative items per training step, shared by the batch (authors: 3 per target).
    std: Positive = 0.02  # Standard deviation of the random values that new vectors start with; the default is 1 / d.
    categories: CountOrZero = 0  # Number of category embeddings added to the item embeddings; 0 = off.
    weight_decay: Weight = 1e-6  # Weight of half the sum of squared weights in the loss; 0 = off.
    loss: Annotated[
        Literal["sampled", "full", "bce"],
        Field(description='Softmax over negatives ("sampled") or all items ("full"), or binary cross-entropy ("bce").'),
    ] = "sampled"

    def __post_init__(self) -> None:
        check_options(self)
        if not self.vertical and not self.horizontal:
            raise OptionError("caser has no filters, so it cannot read a history. Set vertical or horizontal above 0.")

    def build(self, seed: int) -> "Caser":
        """Return a new model without users and items."""
        return Caser(self, seed)


class Caser(nn.Module):
    """A `VectorModel` with K = 1. The score is the inner product of (z, p_u, 1) and (w_i, b_i).

    The filters compute z from the history, and p_u is the learned vector of the user. An item has two vectors: one as
    a history item, and one as a candidate. The last number of the second one is the item's bias.
    """

    batch_format = "target"

    def __init__(self, spec: CaserSpec, seed: int) -> None:
        super().__init__()
        self.spec, self.seed, self.n_users, self.n_items = spec, seed, 0, 0
        self.moments: dict[str, Tensor] = {}
        width = spec.d * (2 if spec.personal else 1) + 1
        self.taken = EmbeddingTable(spec.d, spec.std, stream_seed(seed, "taken"), spec.categories)
        self.items = EmbeddingTable(width, spec.std, stream_seed(seed, "items"), spec.categories)
        self.users = EmbeddingTable(spec.d, spec.std, stream_seed(seed, "users")) if spec.personal else None
        with global_stream(seed, "dense weights"):
            self.vertical = nn.Linear(spec.length, spec.vertical) if spec.vertical else None
            heights = range(1, spec.length + 1) if spec.horizontal else ()
            self.horizontal = nn.ModuleList(nn.Linear(height * spec.d, spec.horizontal) for height in heights)
            self.join = nn.Linear(spec.vertical * spec.d + spec.horizontal * spec.length, spec.d)

    def grow(self, n_users: int, n_items: int) -> None:
        """Add rows for new users and items. The bias of a new item starts at 0."""
        self.taken.grow(n_items)
        self.items.grow(n_items)
        self.items.weights[self.n_items + 1 :, -1] = 0.0
        if self.users is not None:
            self.users.grow(n_users)
        self.n_users, self.n_items = n_users, n_items

    def forward(self, batch: Batch) -> Forward:
        """Return the loss of the targets plus the weight decay."""
        assert batch.targets_BT is not None and batch.negatives_N is not None
        target_B, negative_N = batch.targets_BT[:, 0], batch.negatives_N
        image_BT = self._image(batch.history_BT)
        history_BTD = self.taken.lookup(image_BT)
        own_BD = None if self.users is None else self.users.lookup(batch.users_B)
        user_BD = self._user_vector(history_BTD, image_BT, own_BD)
        if self.spec.loss == "full":  # this loss changes every row of the table
            rows_RD = self.items.lookup_all()
            loss = full_softmax_loss(user_BD, rows_RD, target_B) + self._weight_decay_loss(history_BTD, own_BD, rows_RD)
            return Forward(loss, user_BD[:, None], rows_RD=rows_RD)
        candidates_ND = self.items.lookup(torch.cat([target_B, negative_N]))
        target_BD, negative_ND = candidates_ND.split([len(target_B), len(negative_N)])
        logits_BN = sampled_logits(user_BD, target_BD, negative_ND, target_B, negative_N)
        loss = sampled_softmax_loss(logits_BN) if self.spec.loss == "sampled" else bce_loss(logits_BN)
        return Forward(
            loss + self._weight_decay_loss(history_BTD, own_BD, candidates_ND), user_BD[:, None], target_BD, logits_BN
        )

    def _image(self, history_BT: Tensor) -> Tensor:
        """Return the last items, shape (B, length), padded with 0 on the left."""
        recent_BT = history_BT[:, -self.spec.length :]
        return F.pad(recent_BT, (self.spec.length - recent_BT.shape[1], 0))

    def _user_vector(self, taken_BTD: Tensor, image_BT: Tensor, own_BD: Tensor | None) -> Tensor:
        """Return the user vectors (B, E), as wide as the item vectors."""
        image_BTD = taken_BTD * (image_BT > 0)[..., None]
        # A filter's input is a contiguous slice of the flattened image. This takes half the time of a convolution.
        widths = ((self.spec.d * (n + 1), filters) for n, filters in enumerate(self.horizontal))
        filter_outputs = [
            F.relu(filters(image_BTD.flatten(1).unfold(1, width, self.spec.d)).amax(1)) for width, filters in widths
        ]
        if self.vertical is not None:
            filter_outputs.append(self.vertical(image_BTD.transpose(1, 2)).flatten(1))
        features = F.dropout(torch.cat(filter_outputs, 1), self.spec.dropout, self.training)
        convolved_BD = F.relu(self.join(features))
        own = [] if own_BD is None else [own_BD]
        return torch.cat([convolved_BD, *own, torch.ones(len(image_BT), 1)], 1)

    def _weight_decay_loss(self, *parts: Tensor | None) -> Tensor:
        """weight_decay / 2 sum w^2 over the dense weights and the vectors in the batch.

        A vector that occurs several times in the batch counts each time.
        """
        weights = [*self.parameters(), *(part for part in parts if part is not None)]
        return self.spec.weight_decay / 2 * torch.stack([(weight * weight).sum() for weight in weights]).sum()

    def user_vectors(self, batch: Batch) -> Tensor:
        """Return the user vectors (B, 1, E). The part p_u of an unknown user is 0."""
        image_BT = self._image(batch.history_BT)
        with torch.no_grad():
            own_BD = None
            if self.users is not None:
                own_BD = self.users.weights[torch.where(batch.users_B <= self.n_users, batch.users_B, 0)]
            return self._user_vector(embed(self.taken, image_BT), image_BT, own_BD)[:, None]
