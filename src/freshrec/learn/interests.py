"""Interests that outlive a span: read again from each user's events, expanded, trimmed, written back."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from freshrec.data.batches import (
    ends_of,
    fresh_rows,
    histories_before,
    owners,
    query_batches,
    without_secrets,
)
from freshrec.data.carried import Carried
from freshrec.models.scoring import item_vectors, user_vectors
from freshrec.types import Histories, InterestModel, Interests

Trim = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # (vectors, alive, old) -> (vectors, alive)


def active_users(histories: Histories) -> Tensor:
    """Users with events since the last update (N,), ascending."""
    counted_R = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(fresh_rows(histories), 0)])
    n_U = counted_R[histories.offsets_U[1:]] - counted_R[histories.offsets_U[:-1]]
    return n_U.nonzero()[:, 0]


def reread(
    model: InterestModel, carried: Carried, histories: Histories, history: str, trim: Trim | None = None
) -> Interests:
    """Interests of the users active since the last update, read by the new model; those of others as they were."""
    users_N = active_users(histories)
    ends = without_secrets(ends_of(histories, users_N, history))  # or they would help to answer for themselves later
    n_most = int(carried.counts(users_N).max()) if len(users_N) else len(carried.slots_KD)
    vectors_NKD = torch.zeros(len(users_N), n_most, carried.slots_KD.shape[1])
    alive_NK = torch.zeros(len(users_N), n_most, dtype=torch.bool)
    used_NK = torch.zeros(len(users_N), n_most, dtype=torch.bool)
    fresh_R = torch.where(fresh_rows(histories), histories.items_R, 0)
    fresh = replace(ends, histories=replace(histories, items_R=fresh_R))
    for which, batch in query_batches(ends, model.spec.length, carried):
        assert batch.alive_BK is not None and batch.old_BK is not None
        vectors_BKD, alive_BK = user_vectors(model, batch), batch.alive_BK
        if trim is not None:
            vectors_BKD, alive_BK = trim(vectors_BKD, alive_BK, batch.old_BK)
        k = alive_BK.shape[1]
        vectors_NKD[which, :k] = vectors_BKD
        alive_NK[which, :k] = alive_BK
        used_NK[which, :k] = _closest(model, histories_before(fresh[which], model.spec.length), vectors_BKD, alive_BK)
    return write(carried.users, users_N, vectors_NKD, alive_NK, used_NK, carried.span, histories.n_users)


def _closest(model: InterestModel, events_BT: Tensor, vectors_BKD: Tensor, alive_BK: Tensor) -> Tensor:
    """(B, K) whether an interest is the closest one of some event since the last update; 0 is none."""
    items_BTD = item_vectors(model)[events_BT]
    logits_BTK = torch.bmm(items_BTD, vectors_BKD.transpose(1, 2)).masked_fill(~alive_BK[:, None], -torch.inf)
    used_BK = torch.zeros(alive_BK.shape)
    used_BK.scatter_add_(1, logits_BTK.argmax(2), (events_BT > 0).float())
    return used_BK > 0


def costs_of(users: Interests) -> dict[str, float]:
    """How many interests, and how many bytes of them, a user has who has any."""
    n_users = max(1, int((users.offsets_U.diff() > 0).sum()))
    n_bytes = sum(column.nbytes for column in (users.vectors_SD, users.born_S, users.used_S))
    return {"mean_k": len(users.vectors_SD) / n_users, "interest_bytes": n_bytes / n_users}


def write(
    users: Interests, users_N: Tensor, vectors_NKD: Tensor, alive_NK: Tensor, used_NK: Tensor, span: int, n_users: int
) -> Interests:
    """`users` with the interests of `users_N` replaced; the k-th stays the k-th, so its span of birth is kept."""
    old_U = torch.zeros(n_users + 1, dtype=torch.int64)
    old_U[: users.n_users + 1] = users.offsets_U.diff()
    new_U = old_U.clone()
    new_U[users_N] = alive_NK.sum(1)
    offsets_U = torch.zeros(n_users + 2, dtype=torch.int64)
    torch.cumsum(new_U, 0, out=offsets_U[1:])
    n_rows = int(offsets_U[-1])
    vectors_SD = torch.zeros(n_rows, vectors_NKD.shape[2])
    born_S, used_S = torch.full((n_rows,), span, dtype=torch.int16), torch.full((n_rows,), span, dtype=torch.int16)

    rewritten_U = torch.zeros(n_users + 1, dtype=torch.bool)
    rewritten_U[users_N] = True
    owner_S = owners(users)
    stays_S = ~rewritten_U[owner_S]
    starts_U = torch.cumsum(old_U, 0) - old_U
    to_S = torch.arange(len(owner_S)) - starts_U[owner_S] + offsets_U[owner_S]
    vectors_SD[to_S[stays_S]] = users.vectors_SD[stays_S].float()
    born_S[to_S[stays_S]], used_S[to_S[stays_S]] = users.born_S[stays_S], users.used_S[stays_S]

    nth_NK = torch.arange(alive_NK.shape[1]).expand(len(users_N), -1)  # the place it had before trimming
    at_NK = offsets_U[users_N][:, None] + torch.cumsum(alive_NK, 1) - 1
    had_NK = alive_NK & (nth_NK < old_U[users_N][:, None])
    from_S = (starts_U[users_N][:, None] + nth_NK)[had_NK]
    born_S[at_NK[had_NK]] = users.born_S[from_S]
    used_S[at_NK[had_NK]] = torch.where(used_NK[had_NK], used_S[at_NK[had_NK]], users.used_S[from_S])
    vectors_SD[at_NK[alive_NK]] = vectors_NKD[alive_NK]
    return Interests(vectors_SD, offsets_U, born_S, used_S)


def expand(users: Interests, users_N: Tensor, n_more: int, k_max: int, starts_KD: Tensor, span: int) -> Interests:
    """`users` with `n_more` interests added to each of `users_N`, at most `k_max` a user, starting from their slots."""
    counts_U = users.offsets_U.diff()
    extra_U = torch.zeros_like(counts_U)
    extra_U[users_N] = (k_max - counts_U[users_N]).clamp(0, n_more)
    offsets_U = torch.zeros_like(users.offsets_U)
    torch.cumsum(counts_U + extra_U, 0, out=offsets_U[1:])
    owner_S = torch.repeat_interleave(torch.arange(len(counts_U)), counts_U + extra_U)
    nth_S = torch.arange(len(owner_S)) - offsets_U[owner_S]
    kept_S = nth_S < counts_U[owner_S]
    vectors_SD = starts_KD[nth_S.clamp(max=len(starts_KD) - 1)]
    vectors_SD[kept_S] = users.vectors_SD.float()
    born_S = torch.full((len(owner_S),), span, dtype=torch.int16)
    used_S = born_S.clone()
    born_S[kept_S], used_S[kept_S] = users.born_S, users.used_S
    return Interests(vectors_SD, offsets_U, born_S, used_S)
