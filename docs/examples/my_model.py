"""A model of your own: a user's next item is one that others took within an hour of the user's last item.

Copy this file, change it, and name its options wherever freshrec takes the name of a model:

    export FRESHREC_IMPORT=my_model
    freshrec replay --world drift --models my_model:MyModelSpec:hours=2 --strategies absorb --out runs/model
    freshrec fit events.parquet --store my-model-shop --model my_model:MyModelSpec
    freshrec update tomorrow.parquet --store my-model-shop
    freshrec recommend u42 --store my-model-shop
    freshrec serve --store my-model-shop

Python looks for the module in the current folder too. A store holds what the model has learnt, not its code:
FRESHREC_IMPORT names the modules to import before a store is opened. In Python, write `import my_model` instead.

Names of tensors end in their dimensions: E events, R rows of the histories, U users, I items, B users of a batch,
T events of a user, N items to score. Users and items are rows 1, 2, ...; row 0 is padding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.config import Positive, check_options
from freshrec.data.histories import insert_events
from freshrec.nn.sparse import select_scores
from freshrec.types import Batch, Events, Histories

HOUR = 3_600_000_000  # microseconds, the unit of all times


@dataclass(frozen=True)
class MyModelSpec:
    """The options and their defaults."""

    hours: Positive = 1.0  # longest time between two events of a user whose items count as a pair

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> "MyModel":
        """A model without users and items. It draws no random numbers, so it needs no seed."""
        return MyModel(self)


class MyModel:
    """score(item) = how often any user took it directly before or after the user's last item, within some hours.

    The table of all pairs of items is dense, so this is for catalogs of up to some ten thousand items.
    """

    def __init__(self, spec: MyModelSpec) -> None:
        self.spec, self.n_users, self.n_items = spec, 0, 0
        self.counts_II = torch.zeros(1, 1)

    def grow(self, n_users: int, n_items: int) -> None:
        """Make room for new users and items."""
        n_new = n_items - self.n_items
        self.counts_II = F.pad(self.counts_II, (0, n_new, 0, n_new))
        self.n_users, self.n_items = n_users, n_items

    def absorb(self, events: Events, histories: Histories) -> None:
        """Learn from new events; `histories` holds each user's events before them, in time order."""
        merged, rows_E = insert_events(histories, events, self.n_users)  # all events, and the rows of the new ones
        rows_E = rows_E[rows_E > merged.offsets_U[events.users_E]]  # a user's first event follows nothing
        gaps_E = merged.times_R[rows_E] - merged.times_R[rows_E - 1]
        rows_E = rows_E[gaps_E <= self.spec.hours * HOUR]
        items_E, previous_E = merged.items_R[rows_E].long(), merged.items_R[rows_E - 1].long()
        for pair in ((previous_E, items_E), (items_E, previous_E)):
            self.counts_II.index_put_(pair, torch.tensor(1.0), accumulate=True)
        self.counts_II[0] = self.counts_II[:, 0] = 0.0  # a replay shows held-out events as item 0

    def score(self, batch: Batch, items: Tensor) -> Tensor:
        """(B, N) scores of `items`, which are (N,) or (B, N); higher is better, 0 is no opinion."""
        last_B = F.pad(batch.history_BT, (1, 0))[:, -1]  # the last item, or 0 where there is none
        return select_scores(self.counts_II[last_B], items)
