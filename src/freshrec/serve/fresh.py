"""What users did since a version was made, folded into their histories when they ask: nothing is trained for it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from freshrec.data.batches import Targets, ends_of
from freshrec.types import Histories

Click = tuple[int, int]  # time, and the row of the item


@dataclass(frozen=True, eq=False)
class Fresh:
    """Clicks by the row of their user. A user's clicks are replaced whole, so that whoever reads sees all or none."""

    clicks: dict[int, tuple[Click, ...]] = field(default_factory=dict)
    newcomers: dict[int | str, int] = field(default_factory=dict)  # ids that the catalog lacks, and their rows after it
    gone: set[int] = field(default_factory=set)  # rows of users who are being erased
    given: list[int] = field(default_factory=lambda: [0])  # the last row that a newcomer got

    def newcomer(self, user: int | str, n_users: int) -> int:
        """The row of somebody who is in no version; no row is given twice."""
        self.given[0] = self.newcomers[user] = 1 + max(n_users, self.given[0])
        return self.newcomers[user]

    def add(self, user: int, time: int, item: int) -> None:
        """Fold in a click."""
        self.clicks[user] = (*self.clicks.get(user, ()), (time, item))


def asked_of(histories: Histories, fresh: Fresh, users_N: Tensor) -> Targets:
    """The end of each user's history, with all that came since in its place by time."""
    users = users_N.tolist()
    if not any(user in fresh.clicks or user > histories.n_users for user in users):
        return ends_of(histories, users_N, "recent")
    items, times, ends = [histories.items_R[:0]], [histories.times_R[:0]], [0]
    for user in users:
        known = user <= histories.n_users
        rows = slice(*histories.offsets_U[user : user + 2].tolist()) if known else slice(0)
        new = fresh.clicks.get(user, ())
        items_T = torch.cat([histories.items_R[rows], torch.tensor([item for _, item in new], dtype=torch.int32)])
        times_T = torch.cat([histories.times_R[rows], torch.tensor([time for time, _ in new], dtype=torch.int64)])
        order_T = times_T.argsort(stable=True) if new else torch.arange(len(times_T))
        items.append(items_T[order_T])
        times.append(times_T[order_T])
        ends.append(ends[-1] + len(items_T))
    items_R = torch.cat(items)
    own = replace(
        histories, items_R=items_R, times_R=torch.cat(times), due_R=torch.zeros(len(items_R), dtype=torch.int8)
    )
    ends_N = torch.tensor(ends)
    return Targets(own, ends_N[1:], users_N, ends_N[:-1])
