"""Caser: the last few items as an image, whose columns and rows are read by filters, beside a vector of the user.

After Tang and Wang, WSDM 2018. Differs from the paper: a row of a batch has one target, where the paper's have the next
three; negatives are shared by the batch, and may be items that the user took elsewhere; the softmax over them is the
default, the paper's binary cross-entropy is loss="bce"; weight decay reaches the rows of the batch only.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
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
    """Options of Caser; the defaults are the authors', but for the loss, `negatives` and `lr`."""

    d: Count = 50
    length: Count = 5  # the image's height: how many items are looked at
    vertical: CountOrZero = 4  # filters, each a weighted sum of the items
    horizontal: CountOrZero = 16  # filters for each number of items in a row, from 1 to `length`
    personal: bool = True  # a vector for each user
    dropout: Rate = 0.5
    lr: Positive = 0.003  # with the authors' 0.001, hr@20 on Amazon Beauty is 3.2 % after 4 epochs; with this, 4.9 %
    batch: Count = 512
    negatives: Count = 512  # the authors have 3 for each target
    std: Positive = 0.02  # of all vectors, 1 / d; biases start at 0
    categories: CountOrZero = 0  # room for so many, of items; 0: they are not looked at
    weight_decay: Weight = 1e-6  # of the weights, as half a sum of squares in the loss
    loss: Literal["sampled", "full", "bce"] = "sampled"  # softmax over the negatives or all items; yes or no to each

    def __post_init__(self) -> None:
        check_options(self)
        if not self.vertical and not self.horizontal:
            raise OptionError("Caser without any filter reads no history; set vertical or horizontal above 0.")

    def build(self, seed: int) -> "Caser":
        """A model without users and items."""
        return Caser(self, seed)


class Caser(nn.Module):
    """A `VectorModel` with K = 1: (z, p_u, 1) by (w_i, b_i), z read from the history and p_u the user's own vector.

    An item has two vectors: as what was taken, and as what may be next, whose last number is its bias.
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
        """Make room for new users and items; nobody is inclined to a new item."""
        self.taken.grow(n_items)
        self.items.grow(n_items)
        self.items.weights[self.n_items + 1 :, -1] = 0.0
        if self.users is not None:
            self.users.grow(n_users)
        self.n_users, self.n_items = n_users, n_items

    def forward(self, batch: Batch) -> Forward:
        """The loss of the target, and weight decay."""
        assert batch.targets_BT is not None and batch.negatives_N is not None
        target_B, negative_N = batch.targets_BT[:, 0], batch.negatives_N
        image_BT = self._image(batch.history_BT)
        history_BTD = self.taken.lookup(image_BT)
        own_BD = None if self.users is None else self.users.lookup(batch.users_B)
        user_BD = self._user_vector(history_BTD, image_BT, own_BD)
        if self.spec.loss == "full":  # it moves every row of the table
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
        """(B, length) the last items, with padding before them where there are fewer."""
        recent_BT = history_BT[:, -self.spec.length :]
        return F.pad(recent_BT, (self.spec.length - recent_BT.shape[1], 0))

    def _user_vector(self, taken_BTD: Tensor, image_BT: Tensor, own_BD: Tensor | None) -> Tensor:
        """(B, E) the user's vector, as wide as an item's."""
        image_BTD = taken_BTD * (image_BT > 0)[..., None]
        places = ((self.spec.d * (n + 1), filters) for n, filters in enumerate(self.horizontal))
        # half the time of a convolution: the items at each place of a filter are a stretch of the flattened image
        filter_outputs = [
            F.relu(filters(image_BTD.flatten(1).unfold(1, n, self.spec.d)).amax(1)) for n, filters in places
        ]
        if self.vertical is not None:
            filter_outputs.append(self.vertical(image_BTD.transpose(1, 2)).flatten(1))
        features = F.dropout(torch.cat(filter_outputs, 1), self.spec.dropout, self.training)
        convolved_BD = F.relu(self.join(features))
        own = [] if own_BD is None else [own_BD]
        return torch.cat([convolved_BD, *own, torch.ones(len(image_BT), 1)], 1)

    def _weight_decay_loss(self, *parts: Tensor | None) -> Tensor:
        """weight_decay / 2 sum w^2, over the dense weights and the rows of the batch, as often as they are in it."""
        weights = [*self.parameters(), *(part for part in parts if part is not None)]
        return self.spec.weight_decay / 2 * torch.stack([(weight * weight).sum() for weight in weights]).sum()

    def user_vectors(self, batch: Batch) -> Tensor:
        """(B, 1, E); of who is not known yet, without a vector of its own."""
        image_BT = self._image(batch.history_BT)
        with torch.no_grad():
            own_BD = None
            if self.users is not None:
                own_BD = self.users.weights[torch.where(batch.users_B <= self.n_users, batch.users_B, 0)]
            return self._user_vector(embed(self.taken, image_BT), image_BT, own_BD)[:, None]
