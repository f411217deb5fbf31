"""Histories kept per user, and the batches cut from them: padded windows, targets, shared negatives.

All randomness comes from (seed, span). Nothing here loops over users or events.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freshrec.data.histories import is_new_row, row_users
from freshrec.data.stored_interests import StoredInterests
from freshrec.device import permutation
from freshrec.errors import OptionError
from freshrec.types import DUE, HELD_OUT, Batch, Histories, Impressions

MIN_STEPS, MIN_BATCH_ROWS = 50, 16  # of an epoch: no fewer steps, unless a batch would have fewer rows


@dataclass(frozen=True)
class Targets:
    """Rows of `histories` to predict, each with the first row it may look back to.

    Where a log says what was shown, a target is no row: `rows_N` then is the end of the history it looks back on.
    """

    histories: Histories
    rows_N: Tensor
    users_N: Tensor
    first_row_N: Tensor
    impression_items_N: Tensor | None = None  # the items, where they are not those of the rows
    labels_N: Tensor | None = None  # whether each was taken; None: all were

    def __len__(self) -> int:
        return len(self.rows_N)

    def __getitem__(self, index: Tensor) -> "Targets":
        histories, *columns = vars(self).values()
        part: list[Any] = [None if column is None else column[index] for column in columns]
        return Targets(histories, *part)

    @property
    def items_N(self) -> Tensor:
        """(N,) the items to predict."""
        if self.impression_items_N is not None:
            return self.impression_items_N
        return self.histories.items_R[self.rows_N].long()

    def history_lengths(self, limit: int) -> Tensor:
        """How many history items each target has (N,), at most `limit`."""
        return (self.rows_N - self.first_row_N).clamp(max=limit)


def targets_at(histories: Histories, rows_N: Tensor, history: str = "recent") -> Targets:
    """Targets at given rows. `history` = "recent" looks back over all kept rows, "span" over this update's only."""
    users_R = row_users(histories)
    users_N = users_R[rows_N]
    first_row_N = histories.offsets_U[users_N]
    if history == "span":
        is_new_R = is_new_row(histories)
        first_U = torch.full((histories.n_users + 1,), len(users_R))
        rows_R = torch.arange(len(users_R))
        first_U.scatter_reduce_(0, users_R[is_new_R], rows_R[is_new_R], "amin")
        first_row_N = torch.maximum(first_row_N, torch.minimum(first_U[users_N], rows_N))
    return Targets(histories, rows_N, users_N, first_row_N)


def due_targets(histories: Histories, history: str = "recent") -> Targets:
    """The targets an update trains on. OptionError for a history of this span only, where the log has labels."""
    if histories.impressions is not None:
        if history != "recent":
            raise OptionError('on a log with labels, histories go across spans; use fit.history = "recent".')
        return impression_targets(histories, histories.impressions[histories.impressions.due_E == DUE])
    return targets_at(histories, (histories.due_R == DUE).nonzero()[:, 0], history)


def impression_targets(histories: Histories, impressions: Impressions) -> Targets:
    """What was shown, each with what its user had taken strictly earlier."""
    is_row = np.concatenate([np.zeros(len(impressions), bool), np.ones(len(histories.items_R), bool)])
    times = torch.cat([impressions.times_E, histories.times_R]).cpu().numpy()
    users = torch.cat([impressions.users_E, row_users(histories)]).cpu().numpy()
    order = np.lexsort((is_row, times, users))
    n_before = np.empty(len(order), np.int64)
    n_before[order] = np.cumsum(is_row[order])
    rows_N = torch.as_tensor(n_before[: len(impressions)])  # rows are in the order of user and time themselves
    return Targets(
        histories,
        rows_N,
        impressions.users_E,
        histories.offsets_U[impressions.users_E],
        impressions.items_E,
        impressions.labels_E,
    )


def history_ends(histories: Histories, users_N: Tensor, history: str) -> Targets:
    """The end of each user's history, as a target that looks back on all of it (or on this span's rows alone)."""
    ends_N = histories.offsets_U[users_N + 1]
    if history == "recent":
        return Targets(histories, ends_N, users_N, histories.offsets_U[users_N])
    return Targets(histories, ends_N, users_N, targets_at(histories, ends_N - 1, history).first_row_N)


def history_items(targets: Targets, length: int) -> Tensor:
    """(N, T) item rows before each target, most recent last, 0 where there is none."""
    n_longest = int(targets.history_lengths(length).max()) if len(targets) else 0
    at_NT = targets.rows_N[:, None] + torch.arange(-n_longest, 0)
    inside_NT = at_NT >= targets.first_row_N[:, None]
    return targets.histories.items_R[at_NT.clamp_(min=0)].long().mul_(inside_NT)


def close_gaps(history_BT: Tensor) -> Tensor:
    """The histories without gaps: padding first, then the items in their order."""
    is_item_BT = (history_BT > 0).byte()
    if history_BT.shape[1] < 2 or bool((is_item_BT[:, 1:] >= is_item_BT[:, :-1]).all()):
        return history_BT
    return history_BT.gather(1, is_item_BT.argsort(dim=1, stable=True))


def mask_held_out(targets: Targets) -> Targets:
    """The targets with held-out rows as padding: training must not see them, not even as history."""
    items_R = torch.where(targets.histories.due_R == HELD_OUT, 0, targets.histories.items_R)
    return replace(targets, histories=replace(targets.histories, items_R=items_R))


def occurrence_numbers(users_N: Tensor) -> Tensor:
    """(N,) how many earlier rows are of the same user."""
    order_N = torch.argsort(users_N, stable=True)
    sorted_N, at_N = users_N[order_N], torch.arange(len(users_N))
    starts_N = torch.ones(len(users_N), dtype=torch.bool)
    starts_N[1:] = sorted_N[1:] != sorted_N[:-1]
    number_N = at_N - torch.where(starts_N, at_N, 0).cummax(0).values if len(at_N) else at_N
    return torch.empty_like(at_N).index_copy(0, order_N, number_N)


def split_chunks(order_N: Tensor, size: int) -> list[Tensor]:
    """`order_N` in pieces of `size`; no piece at all, rather than an empty one, where there is nothing."""
    return list(order_N.split(size)) if len(order_N) else []


def limit_batch_size(size: int, n_rows: int) -> int:
    """`size`, or less where few rows would make few steps: an epoch has MIN_STEPS, of at least MIN_BATCH_ROWS.

    A batch that suits a large log leaves 8 steps an epoch on a thousand users: such a model never gets trained.
    """
    return min(size, max(MIN_BATCH_ROWS, n_rows // MIN_STEPS))


def shuffle_by_length(length_N: Tensor, size: int, rng: torch.Generator) -> list[Tensor]:
    """Indices in batches of at most `size`: like keys (history lengths) side by side, in random order otherwise."""
    shuffled_N = permutation(len(length_N), rng)
    by_length_N = shuffled_N[torch.argsort(length_N[shuffled_N], stable=True)]
    batches = split_chunks(by_length_N, size)
    return [batches[i] for i in permutation(len(batches), rng).tolist()]


def target_batches(
    targets: Targets,
    size: int,
    length: int,
    rng: torch.Generator,
    stored_interests: StoredInterests | None = None,
    min_history: int = 1,
) -> Iterator[Batch]:
    """One epoch, a row per target with the history before it; those with less than `min_history` are left out."""
    targets = mask_held_out(targets[targets.history_lengths(length) >= min_history])
    key_N = targets.history_lengths(length)
    if stored_interests is not None:
        # rows with equally many interests side by side
        key_N = key_N + (length + 1) * stored_interests.interest_counts(targets.users_N)
    for index_B in shuffle_by_length(key_N, limit_batch_size(size, len(key_N)), rng):
        batch_targets = targets[index_B]
        history_BT = close_gaps(history_items(batch_targets, length))
        if min_history and not bool((has_item_B := history_BT[:, -1] > 0).all()):  # else nothing but held-out rows
            batch_targets, history_BT = batch_targets[has_item_B], history_BT[has_item_B]
            if not len(batch_targets):
                continue
        batch = Batch(
            batch_targets.users_N,
            history_BT,
            batch_targets.items_N[:, None],
            labels_B=batch_targets.labels_N,
            categories_I=batch_targets.histories.categories_I,
        )
        yield batch if stored_interests is None else stored_interests.attach(batch)


def pair_batches(targets: Targets, size: int, rng: torch.Generator) -> Iterator[Batch]:
    """One epoch, a row per target without history."""
    for index_B in split_chunks(permutation(len(targets), rng), limit_batch_size(size, len(targets))):
        batch_targets = targets[index_B]
        history_B0 = torch.zeros(len(batch_targets), 0, dtype=torch.int64)
        yield Batch(batch_targets.users_N, history_B0, batch_targets.items_N[:, None], labels_B=batch_targets.labels_N)


def window_batches(targets: Targets, size: int, length: int, rng: torch.Generator) -> Iterator[Batch]:
    """One epoch, a row per window of at most `length` events with a target after each position that is one.

    A user's windows are cut back to back from the last target, so each target is in exactly one. A target right after a
    held-out row is left out: the position that should predict it is padding.
    """
    targets = mask_held_out(targets)
    targets = targets[targets.histories.due_R[(targets.rows_N - 1).clamp(min=0)] != HELD_OUT]
    windows = _cut_windows(targets, length)
    is_target_R = torch.zeros(len(targets.histories.items_R), dtype=torch.bool)
    is_target_R[targets.rows_N] = True
    for index_B in shuffle_by_length(windows.history_lengths(length), limit_batch_size(size, len(windows)), rng):
        batch_windows = windows[index_B]
        history_BT = history_items(batch_windows, length)
        at_BT = batch_windows.rows_N[:, None] + torch.arange(-history_BT.shape[1], 0) + 1
        inside_BT = at_BT > batch_windows.first_row_N[:, None]
        at_BT = at_BT.clamp_(min=0)
        targets_BT = targets.histories.items_R[at_BT] * (inside_BT & is_target_R[at_BT])
        yield Batch(batch_windows.users_N, history_BT, targets_BT)


def _cut_windows(targets: Targets, length: int) -> Targets:
    """The last target of each window, looking back no further than the window's own first event."""
    targets = targets[targets.history_lengths(1) > 0]
    last_U = torch.zeros(targets.histories.n_users + 1, dtype=torch.int64)
    last_U.scatter_reduce_(0, targets.users_N, targets.rows_N, "amax")
    nth_N = (last_U[targets.users_N] - targets.rows_N) // length
    key_N = targets.users_N * (int(nth_N.max()) + 1 if len(nth_N) else 1) + nth_N
    _, window_N = torch.unique(key_N, return_inverse=True)
    n_windows = int(window_N.max()) + 1 if len(window_N) else 0
    rows_W = torch.zeros(n_windows, dtype=torch.int64).scatter_reduce_(0, window_N, targets.rows_N, "amax")
    users_W = torch.zeros(n_windows, dtype=torch.int64).scatter_(0, window_N, targets.users_N)
    first_N = torch.maximum(targets.first_row_N, last_U[targets.users_N] - (nth_N + 1) * length)
    first_row_W = torch.zeros(n_windows, dtype=torch.int64).scatter_(0, window_N, first_N)
    return Targets(targets.histories, rows_W, users_W, first_row_W)


def query_batches(
    targets: Targets, length: int, stored_interests: StoredInterests | None = None, size: int = 256
) -> Iterator[tuple[Tensor, Batch]]:
    """Queries in the order of their history length: (indices into `targets`, batch with all own events before it)."""
    for index_B in split_chunks(torch.argsort(targets.history_lengths(length), stable=True), size):
        batch_targets = targets[index_B]
        batch = Batch(
            batch_targets.users_N, history_items(batch_targets, length), categories_I=targets.histories.categories_I
        )
        yield index_B, batch if stored_interests is None else stored_interests.attach(batch)
