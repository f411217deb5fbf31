"""A custom model: it recommends items that other users took within an hour of the user's last item.

Copy this file, change it, and use the name of its options class wherever freshrec takes a model:

    export FRESHREC_IMPORT=my_model
    freshrec replay --world drift --models my_model:MyModelSpec:hours=2 --strategies absorb --out runs/model
    freshrec fit events.parquet --store my-model-shop --model my_model:MyModelSpec
    freshrec update tomorrow.parquet --store my-model-shop
    freshrec recommend u42 --store my-model-shop
    freshrec serve --store my-model-shop

The current folder is searched for the module too. A store holds what the model has learned, but not its code. So
FRESHREC_IMPORT names the modules to import before a store is opened. The option `--allow-import my_model` does
the same for one command. In Python, write `import my_model` instead.

Tensor names end in their dimensions: E events, R history rows, U users, I items, B users of a batch, T events of a
user, N items to score. Users and items are rows 1, 2, and so on. Row 0 is padding.
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

    hours: Positive = 1.0  # Maximum time between two events of a user that count as a pair, in hours.

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> "MyModel":
        """Return a model without users and items. It draws no random numbers, so the seed is not used."""
        return MyModel(self)


class MyModel:
    """score(item) = how often it came directly before or after the user's last item, within `hours`, for any user.

    The table of item pairs is dense, so this suits catalogs of up to about ten thousand items.
    """

    def __init__(self, spec: MyModelSpec) -> None:
        self.spec, self.n_users, self.n_items = spec, 0, 0
        self.counts_II = torch.zeros(1, 1)

    def grow(self, n_users: int, n_items: int) -> None:
        """Add rows for new users and items."""
        n_new = n_items - self.n_items
        self.counts_II = F.pad(self.counts_II, (0, n_new, 0, n_new))
        self.n_users, self.n_items = n_users, n_items

    def absorb(self, events: Events, histories: Histories) -> None:
        """Learn from new events. `histories` holds each user's earlier events in time order."""
        merged, rows_E = insert_events(histories, events, self.n_users)  # all events, and the rows of the new ones
        rows_E = rows_E[rows_E > merged.offsets_U[events.users_E]]  # without first events of users
        gaps_E = merged.times_R[rows_E] - merged.times_R[rows_E - 1]
        rows_E = rows_E[gaps_E <= self.spec.hours * HOUR]
        items_E, previous_E = merged.items_R[rows_E].long(), merged.items_R[rows_E - 1].long()
        for pair in ((previous_E, items_E), (items_E, previous_E)):
            self.counts_II.index_put_(pair, torch.tensor(1.0), accumulate=True)
        self.counts_II[0] = self.counts_II[:, 0] = 0.0  # in a replay, held-out events appear as item 0

    def score(self, batch: Batch, items: Tensor) -> Tensor:
        """Scores of `items`, which are (N,) or (B, N), as (B, N). Higher is better. 0 = no opinion."""
        last_B = F.pad(batch.history_BT, (1, 0))[:, -1]  # the last item, or 0 without a history
        return select_scores(self.counts_II[last_B], items)
