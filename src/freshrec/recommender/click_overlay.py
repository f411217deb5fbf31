"""Clicks that arrived after a version was made. They are merged into histories at request time, without training."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from freshrec.data.batches import Targets, history_ends
from freshrec.types import Histories

OverlayClick = tuple[int, int]  # time, item row


@dataclass(frozen=True, eq=False)
class ClickOverlay:
    """Clicks by user row. Lists only grow, so concurrent readers see each click or not, and never half of one."""

    clicks: dict[int, list[OverlayClick]] = field(default_factory=dict)
    new_users: dict[int | str, int] = field(default_factory=dict)  # ids that are not in the catalog -> their rows
    last_new_row: list[int] = field(default_factory=lambda: [0])  # the last row that a new user got

    def add_user(self, user: int | str, n_users: int) -> int:
        """Return a row for a user that no version has. A row is never reused."""
        self.last_new_row[0] = self.new_users[user] = 1 + max(n_users, self.last_new_row[0])
        return self.new_users[user]

    def add_click(self, user: int, time: int, item: int) -> None:
        """Add a click."""
        self.clicks.setdefault(user, []).append((time, item))


def current_targets(histories: Histories, overlay: ClickOverlay, users_N: Tensor) -> Targets:
    """The end of each user's history, with the clicks of the overlay merged in by time."""
    users = users_N.tolist()
    if not any(user in overlay.clicks or user > histories.n_users for user in users):
        return history_ends(histories, users_N, "recent")
    items, times, ends = [histories.items_R[:0]], [histories.times_R[:0]], [0]
    for user in users:
        is_known = user <= histories.n_users
        rows = slice(*histories.offsets_U[user : user + 2].tolist()) if is_known else slice(0)
        clicks = overlay.clicks.get(user, [])[:]  # later clicks are not in this copy
        items_T = torch.cat([histories.items_R[rows], torch.tensor([item for _, item in clicks], dtype=torch.int32)])
        times_T = torch.cat([histories.times_R[rows], torch.tensor([time for time, _ in clicks], dtype=torch.int64)])
        order_T = times_T.argsort(stable=True) if clicks else torch.arange(len(times_T))
        items.append(items_T[order_T])
        times.append(times_T[order_T])
        ends.append(ends[-1] + len(items_T))
    items_R = torch.cat(items)
    due_R = torch.zeros(len(items_R), dtype=torch.int8)
    merged = replace(histories, items_R=items_R, times_R=torch.cat(times), due_R=due_R)
    ends_N = torch.tensor(ends)
    return Targets(merged, ends_N[1:], users_N, ends_N[:-1])
