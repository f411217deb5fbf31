"""A model of one's own: what a user takes next is what others took within an hour of the user's last item.

Copy this file, change it, and name its instance wherever freshrec takes the name of a model:

    export FRESHREC_IMPORT=my_model
    freshrec replay --world drift --models my_model.MY_MODEL:hours=2 --strategies absorb
    freshrec fit events.parquet --store shop --model my_model.MY_MODEL
    freshrec recommend u42 --store shop

The module is found in the current folder, or where Python finds others. A store holds the model's numbers, not its
code: FRESHREC_IMPORT names the modules that commands, the server too, import before they open a store. In Python,
`import my_model` before `Recommender.load("shop")` does the same.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.config import Positive, check_options
from freshrec.data.histories import insert_events
from freshrec.nn.sparse import select_scores
from freshrec.types import Batch, Events, Histories

HOUR = 3_600_000_000  # microseconds


@dataclass(frozen=True)
class MyModelSpec:
    """The options, with their defaults; the command line finds them here."""

    hours: Positive = 1.0  # between two events of a user whose items count as a pair

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> "MyModel":
        """A model without users and items; it draws no random numbers, so that it needs no seed."""
        return MyModel(self)


class MyModel:
    """score(item) = how often it and the user's last item were taken in a row within some hours, by any user.

    The table of all pairs of items is dense: for catalogs of up to some ten thousand items.
    """

    def __init__(self, spec: MyModelSpec) -> None:
        self.spec, self.n_users, self.n_items = spec, 0, 0
        self.counts_II = torch.zeros(1, 1)  # by item rows, 1..n_items; row 0 is padding

    def grow(self, n_users: int, n_items: int) -> None:
        """Make room for new users and items."""
        more = n_items - self.n_items
        self.counts_II = F.pad(self.counts_II, (0, more, 0, more))
        self.n_users, self.n_items = n_users, n_items

    def absorb(self, events: Events, histories: Histories) -> None:
        """Count each new event's item with the item that its user took before; `histories` holds what came before."""
        after, rows_E = insert_events(
            histories, events, self.n_users
        )  # each user's events in time order, the new ones added
        rows_E = rows_E[rows_E > after.offsets_U[events.users_E]]  # those that are not their user's first one
        gaps_E = after.times_R[rows_E] - after.times_R[rows_E - 1]
        rows_E = rows_E[gaps_E <= self.spec.hours * HOUR]
        items_E, before_E = after.items_R[rows_E].long(), after.items_R[rows_E - 1].long()
        one = torch.ones(len(items_E))
        counts_II = self.counts_II.index_put((before_E, items_E), one, accumulate=True)
        self.counts_II = counts_II.index_put((items_E, before_E), one, accumulate=True)
        self.counts_II[0] = self.counts_II[:, 0] = 0.0  # events that are held out stand in histories as item 0

    def score(self, batch: Batch, items: Tensor) -> Tensor:
        """(B, N) of `items`, shared (N,) or each row's own (B, N); higher is better, and 0 is no opinion."""
        last_B = F.pad(batch.history_BT, (1, 0))[:, -1]  # the most recent item; 0 where the history is empty
        return select_scores(self.counts_II[last_B], items)


MY_MODEL = MyModelSpec()
