"""Histories kept per user, and the batches cut from them: padded windows, targets, shared negatives.

All randomness comes from (seed, span). Nothing here loops over users or events.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from freshrec.types import DONE, DUE, LATER, SECRET, Batch, Events, Histories, Interests

STEPS, SMALLEST = 50, 16  # of an epoch: no fewer steps, unless a batch would have fewer rows


def append(histories: Histories, events: Events, n_users: int) -> Histories:
    """`histories` with `events`, which are newer, at the end of each user's rows."""
    return place(histories, events, n_users)[0]


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
    )
    return both, rows_E


def _starts(counts_U: Tensor) -> Tensor:
    return torch.cumsum(counts_U, 0) - counts_U


def owners(histories: Histories) -> Tensor:
    """The user of each row (R,)."""
    return torch.repeat_interleave(torch.arange(histories.n_users + 1), histories.offsets_U.diff())


def settle(histories: Histories, keep: int) -> Histories:
    """What an update leaves: due rows are done, held-back ones are due next.

    Each user's last `keep` rows stay, and every row that is still to be trained on.
    """
    ends_R = torch.repeat_interleave(histories.offsets_U[1:], histories.offsets_U.diff())
    stays_R = (torch.arange(len(histories.items_R)) >= ends_R - keep) | (histories.due_R == LATER)
    due_R = histories.due_R.clone()
    due_R[histories.due_R == DUE] = DONE
    due_R[histories.due_R == LATER] = DUE
    offsets_U = torch.zeros_like(histories.offsets_U)
    n_stay_U = torch.bincount(owners(histories)[stays_R], minlength=histories.n_users + 1)
    torch.cumsum(n_stay_U, 0, out=offsets_U[1:])
    return Histories(offsets_U, histories.items_R[stays_R], histories.times_R[stays_R], due_R[stays_R])


@dataclass(frozen=True)
class Targets:
    """Rows of `histories` to predict, each with the first row it may look back to."""

    histories: Histories
    rows_N: Tensor
    users_N: Tensor
    from_N: Tensor

    def __len__(self) -> int:
        return len(self.rows_N)

    def __getitem__(self, which: Tensor) -> "Targets":
        return Targets(self.histories, self.rows_N[which], self.users_N[which], self.from_N[which])

    def lengths(self, limit: int) -> Tensor:
        """How many history items each target has (N,), at most `limit`."""
        return (self.rows_N - self.from_N).clamp(max=limit)


def targets_at(histories: Histories, rows_N: Tensor, history: str = "recent") -> Targets:
    """Targets at given rows. `history` = "recent" looks back over all kept rows, "span" over this update's only."""
    users_R = owners(histories)
    users_N = users_R[rows_N]
    from_N = histories.offsets_U[users_N]
    if history == "span":
        fresh_R = (histories.due_R == DUE) | (histories.due_R == LATER)
        first_U = torch.full((histories.n_users + 1,), len(users_R))
        rows_R = torch.arange(len(users_R))
        first_U.scatter_reduce_(0, users_R[fresh_R], rows_R[fresh_R], "amin")
        from_N = torch.maximum(from_N, torch.minimum(first_U[users_N], rows_N))
    return Targets(histories, rows_N, users_N, from_N)


def due_targets(histories: Histories, history: str = "recent") -> Targets:
    """The targets an update trains on."""
    return targets_at(histories, (histories.due_R == DUE).nonzero()[:, 0], history)


def histories_before(targets: Targets, length: int) -> Tensor:
    """(N, T) item rows before each target, most recent last, 0 where there is none."""
    n_longest = int(targets.lengths(length).max()) if len(targets) else 0
    at_NT = targets.rows_N[:, None] + torch.arange(-n_longest, 0)
    inside_NT = at_NT >= targets.from_N[:, None]
    return targets.histories.items_R[at_NT.clamp_(min=0)].long().mul_(inside_NT)


def without_secrets(targets: Targets) -> Targets:
    """The targets with secret rows as padding: training must not see them, not even as history."""
    items_R = torch.where(targets.histories.due_R == SECRET, 0, targets.histories.items_R)
    return replace(targets, histories=replace(targets.histories, items_R=items_R))


def pad_interests(users: Interests, users_B: Tensor, slots_KD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stored interests of some users: (B, K, D) vectors, (B, K) alive, (B, K) span of birth; newcomers get the slots.

    K is the largest number of interests in the batch. A newcomer's interests count as born in span 32767: not yet.
    """
    known_B = torch.where(users_B <= users.n_users, users_B, 0)
    start_B = users.offsets_U[known_B]
    n_B = users.offsets_U[known_B + 1] - start_B
    is_new_B = n_B == 0
    n_B = torch.where(is_new_B, len(slots_KD), n_B)
    slot_K = torch.arange(int(n_B.max()) if len(n_B) else 1)
    alive_BK = slot_K < n_B[:, None]
    stored_BK = alive_BK & ~is_new_B[:, None]
    row_BK = torch.where(stored_BK, start_B[:, None] + slot_K, 0)
    vectors_BKD = torch.zeros(*alive_BK.shape, slots_KD.shape[1])
    born_BK = torch.full(alive_BK.shape, 32767, dtype=torch.int16)
    if len(users.vectors_SD):
        vectors_BKD = users.vectors_SD[row_BK] * stored_BK[..., None]
        born_BK = torch.where(stored_BK, users.born_S[row_BK], born_BK)
    if bool(is_new_B.any()):
        vectors_BKD[is_new_B, : len(slots_KD)] = slots_KD
    return vectors_BKD, alive_BK, born_BK


@dataclass(frozen=True)
class Carried:
    """What travels with a batch of an interest model: stored interests, newcomers' slots, the span being learnt."""

    users: Interests
    slots_KD: Tensor
    span: int

    def join(self, batch: Batch) -> Batch:
        """`batch` with each user's interests: which are alive, which are older than this span."""
        vectors_BKD, alive_BK, born_BK = pad_interests(self.users, batch.users_B, self.slots_KD)
        return replace(batch, interests_BKD=vectors_BKD, alive_BK=alive_BK, old_BK=born_BK < self.span)

    def counts(self, users_N: Tensor) -> Tensor:
        """How many interests each user has (N,)."""
        known_N = torch.where(users_N <= self.users.n_users, users_N, 0)
        n_N = self.users.offsets_U[known_N + 1] - self.users.offsets_U[known_N]
        return torch.where(n_N == 0, len(self.slots_KD), n_N)


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
    mixed_N = torch.randperm(len(key_N), generator=source)
    by_key_N = mixed_N[torch.argsort(key_N[mixed_N], stable=True)]
    batches = in_parts(by_key_N, smaller(size, len(key_N)))
    return [batches[i] for i in torch.randperm(len(batches), generator=source).tolist()]


def target_batches(
    targets: Targets, size: int, length: int, source: torch.Generator, carried: Carried | None = None
) -> Iterator[Batch]:
    """One epoch, a row per target with the history before it; targets without any history are left out."""
    targets = without_secrets(targets[targets.lengths(length) > 0])
    key_N = targets.lengths(length)
    if carried is not None:
        key_N = key_N + (length + 1) * carried.counts(targets.users_N)  # rows with as many interests side by side
    for which in shuffled(key_N, size, source):
        part = targets[which]
        history_BT = histories_before(part, length)
        item_B1 = targets.histories.items_R[part.rows_N][:, None].long()
        batch = Batch(part.users_N, history_BT, item_B1)
        yield batch if carried is None else carried.join(batch)


def pair_batches(targets: Targets, size: int, source: torch.Generator) -> Iterator[Batch]:
    """One epoch, a row per target without history."""
    for which in in_parts(torch.randperm(len(targets), generator=source), smaller(size, len(targets))):
        part = targets[which]
        item_B1 = targets.histories.items_R[part.rows_N][:, None].long()
        yield Batch(part.users_N, torch.zeros(len(part), 0, dtype=torch.int64), item_B1)


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
    for which in shuffled(windows.lengths(length), size, source):
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
        batch = Batch(part.users_N, histories_before(part, length))
        yield which, batch if carried is None else carried.join(batch)
