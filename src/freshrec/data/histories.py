"""Functions on histories, the events of each user in time order: append, mark as trained, filter."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from freshrec.types import DEFERRED, DUE, HELD_OUT, NEVER, TRAINED, Events, Histories, Impressions, Interests


def append_events(histories: Histories, events: Events, n_users: int) -> Histories:
    """Append newer `events` to the rows of each user.

    An event with a label also becomes an impression. It becomes a row only if it is a click (label 1).
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
    """Concatenate blocks of events."""
    columns = (list(parts) for parts in zip(*(vars(block).values() for block in blocks)))
    columns_of_all: list[Any] = [None if parts[0] is None else torch.cat(parts) for parts in columns]
    return Events(*columns_of_all)


def impressions_of(events: Events) -> Impressions:
    """Return events with labels as impressions to train on."""
    assert events.labels_E is not None
    return Impressions(events.users_E, events.items_E, events.times_E, events.labels_E, events.train_at_E + 1)


def _item_categories(known_I: Tensor | None, events: Events) -> Tensor | None:
    """Category of each item, shape (I,). An item keeps its first category."""
    if events.categories_E is None:
        return known_I
    known_I = torch.zeros(1, dtype=torch.int32) if known_I is None else known_I
    n_items = max(len(known_I), int(events.items_E.max()) + 1 if len(events) else 0)
    known_I = torch.cat([known_I, torch.zeros(n_items - len(known_I), dtype=torch.int32)])
    new_I = torch.zeros(n_items, dtype=torch.int32)
    # flipped, so that the first event of an item is written last
    new_I[events.items_E.flip(0)] = events.categories_E.flip(0)
    return torch.where(known_I > 0, known_I, new_I)


def insert_events(histories: Histories, events: Events, n_users: int) -> tuple[Histories, Tensor]:
    """Append events as `append_events` does. Also returns the row of each event, shape (E,)."""
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
    due_E = events.train_at_E + 1  # NOW -> DUE, NEXT -> DEFERRED, NEVER -> HELD_OUT
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
    """Sum of the counts before each user, shape (U,)."""
    return torch.cumsum(counts_U, 0) - counts_U


def row_users(store: Histories | Interests) -> Tensor:
    """User of each row, shape (R,), or of each interest, shape (S,)."""
    return torch.repeat_interleave(torch.arange(store.n_users + 1), store.offsets_U.diff())


def offsets_after_filter(store: Histories | Interests, is_kept: Tensor) -> Tensor:
    """Return the users' offsets when only some rows, or interests, are kept."""
    offsets_U = torch.zeros_like(store.offsets_U)
    torch.cumsum(torch.bincount(row_users(store)[is_kept], minlength=store.n_users + 1), 0, out=offsets_U[1:])
    return offsets_U


def is_new_row(histories: Histories) -> Tensor:
    """Whether each row is new since the last update and may be trained on, now or later, shape (R,)."""
    return (histories.due_R == DUE) | (histories.due_R == DEFERRED)


def mark_trained(histories: Histories, n_recent: int) -> Histories:
    """Mark due rows as trained and deferred rows as due, at the end of an update.

    Keeps the last `n_recent` rows of each user, and every row that is still to be trained on.
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
    """Mark deferred rows as due."""
    due_R = torch.where(histories.due_R == DEFERRED, DUE, histories.due_R)
    impressions = histories.impressions
    if impressions is not None:
        impressions = replace(impressions, due_E=torch.full_like(impressions.due_E, DUE))
    return replace(histories, due_R=due_R, impressions=impressions)


def filter_rows(histories: Histories, is_kept_R: Tensor) -> Histories:
    """Keep some rows."""
    columns = histories.items_R[is_kept_R], histories.times_R[is_kept_R], histories.due_R[is_kept_R]
    return Histories(
        offsets_after_filter(histories, is_kept_R), *columns, histories.impressions, histories.categories_I
    )


def filter_interests(interests: Interests, is_kept_S: Tensor) -> Interests:
    """Keep some interests."""
    columns = interests.born_S[is_kept_S], interests.used_S[is_kept_S]
    return Interests(interests.vectors_SD[is_kept_S], offsets_after_filter(interests, is_kept_S), *columns)
