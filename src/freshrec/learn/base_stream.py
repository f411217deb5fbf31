"""The base block as a stream of parts, for networks and settings that are learned before the first span."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from freshrec.data.batches import Targets, due_targets, targets_at
from freshrec.data.histories import filter_rows, row_users
from freshrec.types import DUE, HELD_OUT, TRAINED, Events, Histories, Span


def base_stream(histories: Histories, n: int) -> Iterator[tuple[Histories, Span]]:
    """Yield a base from the first third of `n` parts of the base block, then a span for each other part.

    Each span comes with the histories at its time, which hold its events. The parts are numbered -n to -1, so that no
    random number is drawn twice.
    """
    part_R, part_E = _part_numbers(histories, n)
    n_base, no_events = max(1, n // 3), Events.trainable(torch.zeros(0), torch.zeros(0))
    for last_part in range(n_base - 1, n):
        first_due_part = 0 if last_part < n_base else last_part  # earlier parts count as trained on
        is_trained_R = (part_R < first_due_part) & (histories.due_R != HELD_OUT)
        recent = replace(histories, due_R=torch.where(is_trained_R, TRAINED, histories.due_R))
        seen_items = histories.items_R[part_R <= last_part].long()
        if histories.impressions is not None:
            seen_items = torch.cat([seen_items, histories.impressions.items_E[part_E <= last_part]])
            recent = replace(
                recent, impressions=histories.impressions[(part_E >= first_due_part) & (part_E <= last_part)]
            )
        n_items = int(seen_items.max()) if len(seen_items) else 0
        yield filter_rows(recent, part_R <= last_part), Span(last_part - n, no_events, histories.n_users, n_items)


def _part_numbers(histories: Histories, n: int) -> tuple[Tensor, Tensor]:
    """Part 0 .. n - 1 of each row (R,) and of each exposure (E,), if the log has exposures."""
    if histories.impressions is None:
        return part_numbers(histories, n), torch.zeros(0, dtype=torch.int64)
    times_E = histories.impressions.times_E
    edges = times_E.sort().values[[len(times_E) * i // n for i in range(1, n)]] if len(times_E) else times_E
    return torch.searchsorted(edges, histories.times_R, right=True), torch.searchsorted(edges, times_E, right=True)


def split_last_sixth(histories: Histories) -> tuple[Targets, Targets]:
    """Split the due targets into those before the last sixth and those in it."""
    if histories.impressions is not None:
        due = due_targets(histories)
        late_N = histories.impressions.times_E >= histories.impressions.times_E.sort().values[len(due) * 5 // 6 :][:1]
        return due[~late_N], due[late_N]
    late_R, due_R = is_in_last_sixth(histories), histories.due_R == DUE
    parts = [targets_at(histories, rows_R.nonzero()[:, 0]) for rows_R in (due_R & ~late_R, due_R & late_R)]
    return parts[0], parts[1]


def is_in_last_sixth(histories: Histories) -> Tensor:
    """Whether each row is in the last sixth, shape (R,)."""
    return part_numbers(histories, 6) == 5


def part_numbers(histories: Histories, n: int) -> Tensor:
    """Part 0 .. n - 1 of each row, shape (R,): equal parts by time, or of each user's rows.

    Without timestamps, logs are often sorted by user. The last part by time would then hold other users. In that case,
    the rows of each user are divided.
    """
    times_R = histories.times_R
    if not len(times_R):
        return torch.zeros(0, dtype=torch.int64)
    edges = times_R.sort().values[[len(times_R) * i // n for i in range(1, n)]]
    part_R = torch.searchsorted(edges, times_R, right=True)
    users_R, late_R = row_users(histories), part_R == n - 1
    late_users = users_R[late_R].unique()
    if torch.isin(late_users, users_R[~late_R]).float().mean() > 0.2:
        return part_R
    sizes_U = histories.offsets_U.diff()
    place_R = torch.arange(len(times_R)) - histories.offsets_U[users_R]
    edges_UN = sizes_U[:, None] * torch.arange(1, n) // n
    return (place_R[:, None] >= edges_UN[users_R]).sum(1)
