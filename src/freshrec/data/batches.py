"""Batches for training and queries, cut from the users' histories: padded windows and targets.

All randomness comes from the generator that the caller passes. No function loops over users or events.
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

MAX_BATCH_VALUES = 2**23  # values per batch of queries that are in memory at once: about 200 MB
MIN_STEPS, MIN_BATCH_ROWS = 50, 16  # an epoch has at least 50 steps, as long as a batch keeps at least 16 rows


@dataclass(frozen=True)
class Targets:
    """Rows of `histories` to predict, each with the first row of its own history.

    In a log with exposures, a target is not a row. Then `rows_N` is the end of the history before the target.
    """

    histories: Histories
    rows_N: Tensor
    users_N: Tensor
    first_row_N: Tensor
    impression_items_N: Tensor | None = None  # items of exposures; None: the items of the rows
    labels_N: Tensor | None = None  # 1 = clicked, 0 = not; None: no exposures

    def __len__(self) -> int:
        return len(self.rows_N)

    def __getitem__(self, index: Tensor) -> "Targets":
        histories, *columns = vars(self).values()
        part: list[Any] = [None if column is None else column[index] for column in columns]
        return Targets(histories, *part)

    @property
    def items_N(self) -> Tensor:
        """Items to predict, shape (N,)."""
        if self.impression_items_N is not None:
            return self.impression_items_N
        return self.histories.items_R[self.rows_N].long()

    def history_lengths(self, limit: int) -> Tensor:
        """Number of history items of each target, at most `limit`, shape (N,)."""
        return (self.rows_N - self.first_row_N).clamp(max=limit)


def targets_at(histories: Histories, rows_N: Tensor, history: str = "recent") -> Targets:
    """Return targets at given rows. Their histories are all stored rows ("recent") or this update's rows ("span")."""
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
    """Return the targets that an update trains on. Raises OptionError for history = "span" on a log with labels."""
    if histories.impressions is not None:
        if history != "recent":
            raise OptionError('fit.history = "span" does not work on a log with exposures. Use fit.history = "recent".')
        return impression_targets(histories, histories.impressions[histories.impressions.due_E == DUE])
    return targets_at(histories, (histories.due_R == DUE).nonzero()[:, 0], history)


def impression_targets(histories: Histories, impressions: Impressions) -> Targets:
    """Return exposures as targets. The history of each is its user's strictly earlier events."""
    is_row = np.concatenate([np.zeros(len(impressions), bool), np.ones(len(histories.items_R), bool)])
    times = torch.cat([impressions.times_E, histories.times_R]).cpu().numpy()
    users = torch.cat([impressions.users_E, row_users(histories)]).cpu().numpy()
    order = np.lexsort((is_row, times, users))
    n_before = np.empty(len(order), np.int64)
    n_before[order] = np.cumsum(is_row[order])
    rows_N = torch.as_tensor(n_before[: len(impressions)])  # rows are already sorted by user and time
    return Targets(
        histories,
        rows_N,
        impressions.users_E,
        histories.offsets_U[impressions.users_E],
        impressions.items_E,
        impressions.labels_E,
    )


def history_ends(histories: Histories, users_N: Tensor, history: str) -> Targets:
    """Return the end of each user's history as a target, with the whole history or only this span's rows before it."""
    ends_N = histories.offsets_U[users_N + 1]
    if history == "recent":
        return Targets(histories, ends_N, users_N, histories.offsets_U[users_N])
    return Targets(histories, ends_N, users_N, targets_at(histories, ends_N - 1, history).first_row_N)


def history_items(targets: Targets, length: int) -> Tensor:
    """Item rows before each target, shape (N, T), most recent last, padded with 0 on the left."""
    n_longest = int(targets.history_lengths(length).max()) if len(targets) else 0
    at_NT = targets.rows_N[:, None] + torch.arange(-n_longest, 0)
    inside_NT = at_NT >= targets.first_row_N[:, None]
    return targets.histories.items_R[at_NT.clamp_(min=0)].long().mul_(inside_NT)


def flat_history_items(targets: Targets) -> tuple[Tensor, Tensor]:
    """Return all item rows before each target without padding: index of the target (E,), item row (E,)."""
    n_N = targets.rows_N - targets.first_row_N
    index_E = torch.repeat_interleave(n_N)
    row_E = torch.arange(len(index_E)) + (targets.first_row_N - n_N.cumsum(0) + n_N)[index_E]
    return index_E, targets.histories.items_R[row_E].long()


def close_gaps(history_BT: Tensor) -> Tensor:
    """Move the padding of each history to the front. The items keep their order."""
    is_item_BT = (history_BT > 0).byte()
    if history_BT.shape[1] < 2 or bool((is_item_BT[:, 1:] >= is_item_BT[:, :-1]).all()):
        return history_BT
    return history_BT.gather(1, is_item_BT.argsort(dim=1, stable=True))


def mask_held_out(targets: Targets) -> Targets:
    """Replace held-out rows by padding: training must not see them, not even in a history."""
    items_R = torch.where(targets.histories.due_R == HELD_OUT, 0, targets.histories.items_R)
    return replace(targets, histories=replace(targets.histories, items_R=items_R))


def occurrence_numbers(users_N: Tensor) -> Tensor:
    """Number of earlier rows of the same user, shape (N,)."""
    order_N = torch.argsort(users_N, stable=True)
    sorted_N, at_N = users_N[order_N], torch.arange(len(users_N))
    starts_N = torch.ones(len(users_N), dtype=torch.bool)
    starts_N[1:] = sorted_N[1:] != sorted_N[:-1]
    number_N = at_N - torch.where(starts_N, at_N, 0).cummax(0).values if len(at_N) else at_N
    return torch.empty_like(at_N).index_copy(0, order_N, number_N)


def split_chunks(order_N: Tensor, size: int) -> list[Tensor]:
    """Split `order_N` into chunks of `size`. An empty input gives no chunk."""
    return list(order_N.split(size)) if len(order_N) else []


def split_by_cost(order_N: Tensor, cost_N: Tensor, budget: int) -> list[Tensor]:
    """Split `order_N` into consecutive chunks.

    The costs of a chunk sum to at most `budget`, plus the cost of its last entry. Without entries there is no chunk.
    """
    chunk_N = (cost_N.cumsum(0) - cost_N) // budget
    return list(order_N.split(torch.unique_consecutive(chunk_N, return_counts=True)[1].tolist()))


def limit_batch_size(size: int, n_rows: int) -> int:
    """Return `size`, or less if an epoch would have fewer than MIN_STEPS steps; never less than MIN_BATCH_ROWS.

    A batch size for large logs leaves 8 steps per epoch for a thousand users, too few to train a model.
    """
    return min(size, max(MIN_BATCH_ROWS, n_rows // MIN_STEPS))


def shuffle_by_length(length_N: Tensor, size: int, rng: torch.Generator) -> list[Tensor]:
    """Shuffle indices into batches of at most `size`. The rows of a batch have similar history lengths."""
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
    """Yield one epoch with a row per target and its history. Targets with less than `min_history` are left out."""
    targets = mask_held_out(targets[targets.history_lengths(length) >= min_history])
    key_N = targets.history_lengths(length)
    if stored_interests is not None:
        # rows of a batch also have the same number of interests
        key_N = key_N + (length + 1) * stored_interests.interest_counts(targets.users_N)
    for index_B in shuffle_by_length(key_N, limit_batch_size(size, len(key_N)), rng):
        batch_targets = targets[index_B]
        history_BT = close_gaps(history_items(batch_targets, length))
        if min_history and not bool((has_item_B := history_BT[:, -1] > 0).all()):  # the others have held-out rows only
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
    """Yield one epoch with a row per target, without histories."""
    for index_B in split_chunks(permutation(len(targets), rng), limit_batch_size(size, len(targets))):
        batch_targets = targets[index_B]
        history_B0 = torch.zeros(len(batch_targets), 0, dtype=torch.int64)
        yield Batch(batch_targets.users_N, history_B0, batch_targets.items_N[:, None], labels_B=batch_targets.labels_N)


def window_batches(targets: Targets, size: int, length: int, rng: torch.Generator) -> Iterator[Batch]:
    """Yield one epoch with a row per window of at most `length` events, with a target after each position.

    The windows of a user are cut backwards from the last target, so each target is in exactly one. A target right after
    a held-out row is left out, because the position that would predict it is padding.
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
    """Return the last target of each window, with a history that starts at the window's first event."""
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
    targets: Targets,
    length: int,
    stored_interests: StoredInterests | None = None,
    size: int = 256,
    cost_N: Tensor | None = None,
) -> Iterator[tuple[Tensor, Batch]]:
    """Yield (indices into `targets`, batch of queries), sorted by history length.

    `cost_N`: memory that the answer to each query takes, as a number of values. A batch that would take more than
    `MAX_BATCH_VALUES` is split.
    """
    batches = split_chunks(torch.argsort(targets.history_lengths(length), stable=True), size)
    if cost_N is not None:
        batches = [part for index_B in batches for part in split_by_cost(index_B, cost_N[index_B], MAX_BATCH_VALUES)]
    for index_B in batches:
        batch_targets = targets[index_B]
        batch = Batch(
            batch_targets.users_N, history_items(batch_targets, length), categories_I=targets.histories.categories_I
        )
        yield index_B, batch if stored_interests is None else stored_interests.attach(batch)
