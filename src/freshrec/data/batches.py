"""Histories kept per user, and the batches cut from them: padded windows, targets, shared negatives.

All randomness comes from (seed, span). Nothing here loops over users or events.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freshrec.data.carried import Carried
from freshrec.device import permutation
from freshrec.errors import OptionError
from freshrec.types import DONE, DUE, LATER, NEVER, SECRET, Batch, Events, Histories, Interests, Shown

STEPS, SMALLEST = 50, 16  # of an epoch: no fewer steps, unless a batch would have fewer rows


def append(histories: Histories, events: Events, n_users: int) -> Histories:
    """`histories` with `events`, which are newer, at the end of each user's rows.

    Where the events have labels, only what was taken becomes a row, and what has a label waits among those shown.
    """
    if events.labels_E is None:
        return place(histories, events, n_users)[0]
    known_E = ~events.labels_E.isnan()
    both = place(histories, events[~known_E | (events.labels_E > 0)], n_users)[0]
    due_R = torch.where(both.due_R == SECRET, SECRET, DONE).to(torch.int8)
    shown = shown_of(events[known_E & (events.joins_E != NEVER)])
    if histories.shown is not None:
        old_and_new = zip(vars(histories.shown).values(), vars(shown).values())
        shown = Shown(*(torch.cat(pair) for pair in old_and_new))
    return replace(both, due_R=due_R, shown=shown, kinds_I=_kinds(histories.kinds_I, events))


def joined_events(blocks: Sequence[Events]) -> Events:
    """All events of these blocks, one block after the other."""
    columns = (list(parts) for parts in zip(*(vars(block).values() for block in blocks)))
    whole: list[Any] = [None if parts[0] is None else torch.cat(parts) for parts in columns]
    return Events(*whole)


def shown_of(events: Events) -> Shown:
    """Events with labels, as what is to be trained on."""
    assert events.labels_E is not None
    return Shown(events.users_E, events.items_E, events.times_E, events.labels_E, events.joins_E + 1)


def _kinds(old_I: Tensor | None, events: Events) -> Tensor | None:
    """The category of each item known so far; an item keeps the first that it had."""
    if events.kinds_E is None:
        return old_I
    old_I = torch.zeros(1, dtype=torch.int32) if old_I is None else old_I
    n_items = max(len(old_I), int(events.items_E.max()) + 1 if len(events) else 0)
    old_I = torch.cat([old_I, torch.zeros(n_items - len(old_I), dtype=torch.int32)])
    new_I = torch.zeros(n_items, dtype=torch.int32)
    new_I[events.items_E.flip(0)] = events.kinds_E.flip(0)  # the last of those written stays: the first event's
    return torch.where(old_I > 0, old_I, new_I)


def place(histories: Histories, events: Events, n_users: int) -> tuple[Histories, Tensor]:
    """`append`, and the row (E,) that each event got."""
    old_U = torch.zeros(n_users + 1, dtype=torch.int64)
    old_U[: histories.n_users + 1] = histories.offsets_U.diff()
    new_U = torch.bincount(events.users_E, minlength=n_users + 1)
    offsets_U = torch.zeros(n_users + 2, dtype=torch.int64)
    torch.cumsum(old_U + new_U, 0, out=offsets_U[1:])
    by_user = torch.argsort(events.users_E, stable=True)
    to_old = torch.arange(len(histories.items_R)) + torch.repeat_interleave(offsets_U[:-1] - _starts(old_U), old_U)
    to_new = torch.arange(len(events)) + torch.repeat_interleave(offsets_U[:-1] + old_U - _starts(new_U), new_U)

    def merged(old_R: Tensor, new_E: Tensor) -> Tensor:
        out = torch.empty(len(old_R) + len(new_E), dtype=old_R.dtype)
        out[to_old] = old_R
        out[to_new] = new_E[by_user].to(old_R.dtype)
        return out

    rows_E = torch.empty(len(events), dtype=torch.int64)
    rows_E[by_user] = to_new
    due_E = events.joins_E + 1  # NOW -> DUE, NEXT -> LATER, NEVER -> SECRET
    both = Histories(
        offsets_U,
        merged(histories.items_R, events.items_E),
        merged(histories.times_R, events.times_E),
        merged(histories.due_R, due_E),
        histories.shown,
        _kinds(histories.kinds_I, events),
    )
    return both, rows_E


def _starts(counts_U: Tensor) -> Tensor:
    return torch.cumsum(counts_U, 0) - counts_U


def owners(of: Histories | Interests) -> Tensor:
    """The user of each row (R,), or of each interest (S,)."""
    return torch.repeat_interleave(torch.arange(of.n_users + 1), of.offsets_U.diff())


def offsets_where(of: Histories | Interests, stays: Tensor) -> Tensor:
    """The offsets of the users without the other rows, or interests."""
    offsets_U = torch.zeros_like(of.offsets_U)
    torch.cumsum(torch.bincount(owners(of)[stays], minlength=of.n_users + 1), 0, out=offsets_U[1:])
    return offsets_U


def fresh_rows(histories: Histories) -> Tensor:
    """(R,) whether a row came since the last update, and may be learnt from now or later."""
    return (histories.due_R == DUE) | (histories.due_R == LATER)


def settle(histories: Histories, keep: int) -> Histories:
    """What an update leaves: due rows are done, held-back ones are due next.

    Each user's last `keep` rows stay, and every row that is still to be trained on.
    """
    ends_R = torch.repeat_interleave(histories.offsets_U[1:], histories.offsets_U.diff())
    stays_R = (torch.arange(len(histories.items_R)) >= ends_R - keep) | (histories.due_R == LATER)
    due_R = histories.due_R.clone()
    due_R[histories.due_R == DUE] = DONE
    due_R[histories.due_R == LATER] = DUE
    shown = histories.shown
    if shown is not None:
        shown = shown[shown.due_E == LATER]
        shown = replace(shown, due_E=torch.full_like(shown.due_E, DUE))
    return rows_where(replace(histories, due_R=due_R, shown=shown), stays_R)


def released(histories: Histories) -> Histories:
    """`histories` in which what was held back is due."""
    due_R = torch.where(histories.due_R == LATER, DUE, histories.due_R)
    shown = histories.shown
    if shown is not None:
        shown = replace(shown, due_E=torch.full_like(shown.due_E, DUE))
    return replace(histories, due_R=due_R, shown=shown)


def rows_where(histories: Histories, stays_R: Tensor) -> Histories:
    """`histories` without the other rows."""
    columns = histories.items_R[stays_R], histories.times_R[stays_R], histories.due_R[stays_R]
    return Histories(offsets_where(histories, stays_R), *columns, histories.shown, histories.kinds_I)


def interests_where(users: Interests, stays_S: Tensor) -> Interests:
    """`users` without the other interests."""
    columns = users.born_S[stays_S], users.used_S[stays_S]
    return Interests(users.vectors_SD[stays_S], offsets_where(users, stays_S), *columns)


@dataclass(frozen=True)
class Targets:
    """Rows of `histories` to predict, each with the first row it may look back to.

    Where a log says what was shown, a target is no row: `rows_N` then is the end of the history it looks back on.
    """

    histories: Histories
    rows_N: Tensor
    users_N: Tensor
    from_N: Tensor
    shown_N: Tensor | None = None  # the items, where they are not those of the rows
    labels_N: Tensor | None = None  # whether each was taken; None: all were

    def __len__(self) -> int:
        return len(self.rows_N)

    def __getitem__(self, which: Tensor) -> "Targets":
        histories, *columns = vars(self).values()
        part: list[Any] = [None if column is None else column[which] for column in columns]
        return Targets(histories, *part)

    @property
    def items_N(self) -> Tensor:
        """(N,) the items to predict."""
        return self.histories.items_R[self.rows_N].long() if self.shown_N is None else self.shown_N

    def lengths(self, limit: int) -> Tensor:
        """How many history items each target has (N,), at most `limit`."""
        return (self.rows_N - self.from_N).clamp(max=limit)


def targets_at(histories: Histories, rows_N: Tensor, history: str = "recent") -> Targets:
    """Targets at given rows. `history` = "recent" looks back over all kept rows, "span" over this update's only."""
    users_R = owners(histories)
    users_N = users_R[rows_N]
    from_N = histories.offsets_U[users_N]
    if history == "span":
        fresh_R = fresh_rows(histories)
        first_U = torch.full((histories.n_users + 1,), len(users_R))
        rows_R = torch.arange(len(users_R))
        first_U.scatter_reduce_(0, users_R[fresh_R], rows_R[fresh_R], "amin")
        from_N = torch.maximum(from_N, torch.minimum(first_U[users_N], rows_N))
    return Targets(histories, rows_N, users_N, from_N)


def due_targets(histories: Histories, history: str = "recent") -> Targets:
    """The targets an update trains on. OptionError for a history of this span only, where the log has labels."""
    if histories.shown is not None:
        if history != "recent":
            raise OptionError('on a log with labels, histories go across spans; use fit.history = "recent".')
        return shown_targets(histories, histories.shown[histories.shown.due_E == DUE])
    return targets_at(histories, (histories.due_R == DUE).nonzero()[:, 0], history)


def shown_targets(histories: Histories, shown: Shown) -> Targets:
    """What was shown, each with what its user had taken strictly earlier."""
    is_row = np.concatenate([np.zeros(len(shown), bool), np.ones(len(histories.items_R), bool)])
    times = torch.cat([shown.times_E, histories.times_R]).cpu().numpy()
    users = torch.cat([shown.users_E, owners(histories)]).cpu().numpy()
    order = np.lexsort((is_row, times, users))
    n_before = np.empty(len(order), np.int64)
    n_before[order] = np.cumsum(is_row[order])
    rows_N = torch.as_tensor(n_before[: len(shown)])  # rows are in the order of user and time themselves
    return Targets(histories, rows_N, shown.users_E, histories.offsets_U[shown.users_E], shown.items_E, shown.labels_E)


def ends_of(histories: Histories, users_N: Tensor, history: str) -> Targets:
    """The end of each user's history, as a target that looks back on all of it (or on this span's rows alone)."""
    ends_N = histories.offsets_U[users_N + 1]
    if history == "recent":
        return Targets(histories, ends_N, users_N, histories.offsets_U[users_N])
    return Targets(histories, ends_N, users_N, targets_at(histories, ends_N - 1, history).from_N)


def histories_before(targets: Targets, length: int) -> Tensor:
    """(N, T) item rows before each target, most recent last, 0 where there is none."""
    n_longest = int(targets.lengths(length).max()) if len(targets) else 0
    at_NT = targets.rows_N[:, None] + torch.arange(-n_longest, 0)
    inside_NT = at_NT >= targets.from_N[:, None]
    return targets.histories.items_R[at_NT.clamp_(min=0)].long().mul_(inside_NT)


def closed(history_BT: Tensor) -> Tensor:
    """The histories without gaps: padding first, then the items in their order."""
    is_item_BT = (history_BT > 0).byte()
    if history_BT.shape[1] < 2 or bool((is_item_BT[:, 1:] >= is_item_BT[:, :-1]).all()):
        return history_BT
    return history_BT.gather(1, is_item_BT.argsort(dim=1, stable=True))


def without_secrets(targets: Targets) -> Targets:
    """The targets with secret rows as padding: training must not see them, not even as history."""
    items_R = torch.where(targets.histories.due_R == SECRET, 0, targets.histories.items_R)
    return replace(targets, histories=replace(targets.histories, items_R=items_R))


def turns_of(users_N: Tensor) -> Tensor:
    """(N,) how many earlier rows are of the same user."""
    order_N = torch.argsort(users_N, stable=True)
    sorted_N, at_N = users_N[order_N], torch.arange(len(users_N))
    starts_N = torch.ones(len(users_N), dtype=torch.bool)
    starts_N[1:] = sorted_N[1:] != sorted_N[:-1]
    turn_N = at_N - torch.where(starts_N, at_N, 0).cummax(0).values if len(at_N) else at_N
    return torch.empty_like(at_N).index_copy(0, order_N, turn_N)


def random_source(*numbers: int) -> torch.Generator:
    """A generator that depends on all the numbers (seed, span, ...) and on nothing else."""
    state = 0x9E3779B97F4A7C15
    for n in numbers:
        state = ((state ^ (n & 0xFFFFFFFF)) * 0xBF58476D1CE4E5B9) % 2**64
        state ^= state >> 31
    return torch.Generator().manual_seed(state % 2**63)


def in_parts(order_N: Tensor, size: int) -> list[Tensor]:
    """`order_N` in pieces of `size`; no piece at all, rather than an empty one, where there is nothing."""
    return list(order_N.split(size)) if len(order_N) else []


def smaller(size: int, n_rows: int) -> int:
    """`size`, or less where few rows would make few steps: an epoch has STEPS of them, of at least SMALLEST rows.

    A batch that suits a large log leaves 8 steps an epoch on a thousand users: such a model never gets trained.
    """
    return min(size, max(SMALLEST, n_rows // STEPS))


def shuffled(key_N: Tensor, size: int, source: torch.Generator) -> list[Tensor]:
    """Indices in batches of at most `size`: like keys (history lengths) side by side, in random order otherwise."""
    mixed_N = permutation(len(key_N), source)
    by_key_N = mixed_N[torch.argsort(key_N[mixed_N], stable=True)]
    batches = in_parts(by_key_N, size)
    return [batches[i] for i in permutation(len(batches), source).tolist()]


def target_batches(
    targets: Targets, size: int, length: int, source: torch.Generator, carried: Carried | None = None, least: int = 1
) -> Iterator[Batch]:
    """One epoch, a row per target with the history before it; targets with less than `least` of it are left out."""
    targets = without_secrets(targets[targets.lengths(length) >= least])
    key_N = targets.lengths(length)
    if carried is not None:
        key_N = key_N + (length + 1) * carried.counts(targets.users_N)  # rows with as many interests side by side
    for which in shuffled(key_N, smaller(size, len(key_N)), source):
        part = targets[which]
        history_BT = closed(histories_before(part, length))
        if least and not bool((has_item_B := history_BT[:, -1] > 0).all()):  # else nothing but secrets
            part, history_BT = part[has_item_B], history_BT[has_item_B]
            if not len(part):
                continue
        batch = Batch(
            part.users_N, history_BT, part.items_N[:, None], labels_B=part.labels_N, kinds_I=part.histories.kinds_I
        )
        yield batch if carried is None else carried.join(batch)


def pair_batches(targets: Targets, size: int, source: torch.Generator) -> Iterator[Batch]:
    """One epoch, a row per target without history."""
    for which in in_parts(permutation(len(targets), source), smaller(size, len(targets))):
        part = targets[which]
        history_B0 = torch.zeros(len(part), 0, dtype=torch.int64)
        yield Batch(part.users_N, history_B0, part.items_N[:, None], labels_B=part.labels_N)


def window_batches(targets: Targets, size: int, length: int, source: torch.Generator) -> Iterator[Batch]:
    """One epoch, a row per window of at most `length` events with a target after each position that is one.

    A user's windows are cut back to back from the last target, so each target is in exactly one. A target right after a
    secret row is left out: the position that should predict it is padding.
    """
    targets = without_secrets(targets)
    targets = targets[targets.histories.due_R[(targets.rows_N - 1).clamp(min=0)] != SECRET]
    windows = _windows(targets, length)
    wanted_R = torch.zeros(len(targets.histories.items_R), dtype=torch.bool)
    wanted_R[targets.rows_N] = True
    for which in shuffled(windows.lengths(length), smaller(size, len(windows)), source):
        part = windows[which]
        history_BT = histories_before(part, length)
        at_BT = part.rows_N[:, None] + torch.arange(-history_BT.shape[1], 0) + 1
        inside_BT = at_BT > part.from_N[:, None]
        at_BT = at_BT.clamp_(min=0)
        yield Batch(part.users_N, history_BT, targets.histories.items_R[at_BT] * (inside_BT & wanted_R[at_BT]))


def _windows(targets: Targets, length: int) -> Targets:
    """The last target of each window, looking back no further than the window's own first event."""
    targets = targets[targets.lengths(1) > 0]
    last_U = torch.zeros(targets.histories.n_users + 1, dtype=torch.int64)
    last_U.scatter_reduce_(0, targets.users_N, targets.rows_N, "amax")
    nth_N = (last_U[targets.users_N] - targets.rows_N) // length
    key_N = targets.users_N * (int(nth_N.max()) + 1 if len(nth_N) else 1) + nth_N
    _, window_N = torch.unique(key_N, return_inverse=True)
    n_windows = int(window_N.max()) + 1 if len(window_N) else 0
    rows_W = torch.zeros(n_windows, dtype=torch.int64).scatter_reduce_(0, window_N, targets.rows_N, "amax")
    users_W = torch.zeros(n_windows, dtype=torch.int64).scatter_(0, window_N, targets.users_N)
    first_N = torch.maximum(targets.from_N, last_U[targets.users_N] - (nth_N + 1) * length)
    from_W = torch.zeros(n_windows, dtype=torch.int64).scatter_(0, window_N, first_N)
    return Targets(targets.histories, rows_W, users_W, from_W)


def query_batches(
    targets: Targets, length: int, carried: Carried | None = None, size: int = 256
) -> Iterator[tuple[Tensor, Batch]]:
    """Queries in the order of their history length: (indices into `targets`, batch with all own events before it)."""
    for which in in_parts(torch.argsort(targets.lengths(length), stable=True), size):
        part = targets[which]
        batch = Batch(part.users_N, histories_before(part, length), kinds_I=targets.histories.kinds_I)
        yield which, batch if carried is None else carried.join(batch)
