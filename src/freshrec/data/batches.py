"""Histories kept per user, and the batches cut from them: padded windows, targets, shared negatives.

All randomness comes from (seed, span). Nothing here loops over users or events.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freshrec.data.stored_interests import StoredInterests
from freshrec.device import permutation
from freshrec.errors import OptionError
from freshrec.types import DEFERRED, DUE, HELD_OUT, NEVER, TRAINED, Batch, Events, Histories, Impressions, Interests

MIN_STEPS, MIN_BATCH_ROWS = 50, 16  # of an epoch: no fewer steps, unless a batch would have fewer rows


def append_events(histories: Histories, events: Events, n_users: int) -> Histories:
    """`histories` with `events`, which are newer, at the end of each user's rows.

    Where the events have labels, only what was taken becomes a row, and what has a label waits among those shown.
    """
    if events.labels_E is None:
        return insert_events(histories, events, n_users)[0]
    known_E = ~events.labels_E.isnan()
    merged = insert_events(histories, events[~known_E | (events.labels_E > 0)], n_users)[0]
    due_R = torch.where(merged.due_R == HELD_OUT, HELD_OUT, TRAINED).to(torch.int8)
    impressions = impressions_of(events[known_E & (events.train_at_E != NEVER)])
    if histories.impressions is not None:
        old_and_new = zip(vars(histories.impressions).values(), vars(impressions).values())
        impressions = Impressions(*(torch.cat(pair) for pair in old_and_new))
    return replace(
        merged, due_R=due_R, impressions=impressions, categories_I=_item_categories(histories.categories_I, events)
    )


def concat_events(blocks: Sequence[Events]) -> Events:
    """All events of these blocks, one block after the other."""
    columns = (list(parts) for parts in zip(*(vars(block).values() for block in blocks)))
    columns_of_all: list[Any] = [None if parts[0] is None else torch.cat(parts) for parts in columns]
    return Events(*columns_of_all)


def impressions_of(events: Events) -> Impressions:
    """Events with labels, as what is to be trained on."""
    assert events.labels_E is not None
    return Impressions(events.users_E, events.items_E, events.times_E, events.labels_E, events.train_at_E + 1)


def _item_categories(known_I: Tensor | None, events: Events) -> Tensor | None:
    """The category of each item known so far; an item keeps the first that it had."""
    if events.categories_E is None:
        return known_I
    known_I = torch.zeros(1, dtype=torch.int32) if known_I is None else known_I
    n_items = max(len(known_I), int(events.items_E.max()) + 1 if len(events) else 0)
    known_I = torch.cat([known_I, torch.zeros(n_items - len(known_I), dtype=torch.int32)])
    new_I = torch.zeros(n_items, dtype=torch.int32)
    new_I[events.items_E.flip(0)] = events.categories_E.flip(0)  # the last of those written stays: the first event's
    return torch.where(known_I > 0, known_I, new_I)


def insert_events(histories: Histories, events: Events, n_users: int) -> tuple[Histories, Tensor]:
    """`append`, and the row (E,) that each event got."""
    old_U = torch.zeros(n_users + 1, dtype=torch.int64)
    old_U[: histories.n_users + 1] = histories.offsets_U.diff()
    new_U = torch.bincount(events.users_E, minlength=n_users + 1)
    offsets_U = torch.zeros(n_users + 2, dtype=torch.int64)
    torch.cumsum(old_U + new_U, 0, out=offsets_U[1:])
    by_user = torch.argsort(events.users_E, stable=True)
    old_positions = torch.arange(len(histories.items_R)) + torch.repeat_interleave(
        offsets_U[:-1] - _offsets_before(old_U), old_U
    )
    new_positions = torch.arange(len(events)) + torch.repeat_interleave(
        offsets_U[:-1] + old_U - _offsets_before(new_U), new_U
    )

    def merge_columns(old_R: Tensor, new_E: Tensor) -> Tensor:
        out = torch.empty(len(old_R) + len(new_E), dtype=old_R.dtype)
        out[old_positions] = old_R
        out[new_positions] = new_E[by_user].to(old_R.dtype)
        return out

    rows_E = torch.empty(len(events), dtype=torch.int64)
    rows_E[by_user] = new_positions
    due_E = events.train_at_E + 1  # NOW -> DUE, NEXT -> LATER, NEVER -> SECRET
    merged_histories = Histories(
        offsets_U,
        merge_columns(histories.items_R, events.items_E),
        merge_columns(histories.times_R, events.times_E),
        merge_columns(histories.due_R, due_E),
        histories.impressions,
        _item_categories(histories.categories_I, events),
    )
    return merged_histories, rows_E


def _offsets_before(counts_U: Tensor) -> Tensor:
    return torch.cumsum(counts_U, 0) - counts_U


def row_users(store: Histories | Interests) -> Tensor:
    """The user of each row (R,), or of each interest (S,)."""
    return torch.repeat_interleave(torch.arange(store.n_users + 1), store.offsets_U.diff())


def offsets_after_filter(store: Histories | Interests, is_kept: Tensor) -> Tensor:
    """The offsets of the users without the other rows, or interests."""
    offsets_U = torch.zeros_like(store.offsets_U)
    torch.cumsum(torch.bincount(row_users(store)[is_kept], minlength=store.n_users + 1), 0, out=offsets_U[1:])
    return offsets_U


def is_new_row(histories: Histories) -> Tensor:
    """(R,) whether a row came since the last update, and may be learnt from now or later."""
    return (histories.due_R == DUE) | (histories.due_R == DEFERRED)


def mark_trained(histories: Histories, n_recent: int) -> Histories:
    """What an update leaves: due rows are done, held-back ones are due next.

    Each user's last `keep` rows stay, and every row that is still to be trained on.
    """
    ends_R = torch.repeat_interleave(histories.offsets_U[1:], histories.offsets_U.diff())
    is_kept_R = (torch.arange(len(histories.items_R)) >= ends_R - n_recent) | (histories.due_R == DEFERRED)
    due_R = histories.due_R.clone()
    due_R[histories.due_R == DUE] = TRAINED
    due_R[histories.due_R == DEFERRED] = DUE
    impressions = histories.impressions
    if impressions is not None:
        impressions = impressions[impressions.due_E == DEFERRED]
        impressions = replace(impressions, due_E=torch.full_like(impressions.due_E, DUE))
    return filter_rows(replace(histories, due_R=due_R, impressions=impressions), is_kept_R)


def release_deferred(histories: Histories) -> Histories:
    """`histories` in which what was held back is due."""
    due_R = torch.where(histories.due_R == DEFERRED, DUE, histories.due_R)
    impressions = histories.impressions
    if impressions is not None:
        impressions = replace(impressions, due_E=torch.full_like(impressions.due_E, DUE))
    return replace(histories, due_R=due_R, impressions=impressions)


def filter_rows(histories: Histories, is_kept_R: Tensor) -> Histories:
    """`histories` without the other rows."""
    columns = histories.items_R[is_kept_R], histories.times_R[is_kept_R], histories.due_R[is_kept_R]
    return Histories(
        offsets_after_filter(histories, is_kept_R), *columns, histories.impressions, histories.categories_I
    )


def filter_interests(interests: Interests, is_kept_S: Tensor) -> Interests:
    """`users` without the other interests."""
    columns = interests.born_S[is_kept_S], interests.used_S[is_kept_S]
    return Interests(interests.vectors_SD[is_kept_S], offsets_after_filter(interests, is_kept_S), *columns)


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
        return (
            self.histories.items_R[self.rows_N].long() if self.impression_items_N is None else self.impression_items_N
        )

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
    """The targets with secret rows as padding: training must not see them, not even as history."""
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


def make_rng(*numbers: int) -> torch.Generator:
    """A generator that depends on all the numbers (seed, span, ...) and on nothing else."""
    state = 0x9E3779B97F4A7C15
    for n in numbers:
        state = ((state ^ (n & 0xFFFFFFFF)) * 0xBF58476D1CE4E5B9) % 2**64
        state ^= state >> 31
    return torch.Generator().manual_seed(state % 2**63)


def split_chunks(order_N: Tensor, size: int) -> list[Tensor]:
    """`order_N` in pieces of `size`; no piece at all, rather than an empty one, where there is nothing."""
    return list(order_N.split(size)) if len(order_N) else []


def limit_batch_size(size: int, n_rows: int) -> int:
    """`size`, or less where few rows would make few steps: an epoch has STEPS of them, of at least SMALLEST rows.

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
    """One epoch, a row per target with the history before it; targets with less than `least` of it are left out."""
    targets = mask_held_out(targets[targets.history_lengths(length) >= min_history])
    key_N = targets.history_lengths(length)
    if stored_interests is not None:
        key_N = key_N + (length + 1) * stored_interests.interest_counts(
            targets.users_N
        )  # rows with as many interests side by side
    for index_B in shuffle_by_length(key_N, limit_batch_size(size, len(key_N)), rng):
        batch_targets = targets[index_B]
        history_BT = close_gaps(history_items(batch_targets, length))
        if min_history and not bool((has_item_B := history_BT[:, -1] > 0).all()):  # else nothing but secrets
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
    secret row is left out: the position that should predict it is padding.
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
        yield Batch(
            batch_windows.users_N, history_BT, targets.histories.items_R[at_BT] * (inside_BT & is_target_R[at_BT])
        )


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
    from_W = torch.zeros(n_windows, dtype=torch.int64).scatter_(0, window_N, first_N)
    return Targets(targets.histories, rows_W, users_W, from_W)


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
