"""Interests kept between spans: recompute them from each user's events, add, trim and store them."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.data.batches import history_ends, history_items, mask_held_out, query_batches
from freshrec.data.histories import is_new_row, row_users
from freshrec.data.stored_interests import StoredInterests
from freshrec.nn.scoring import item_vectors, user_vectors
from freshrec.types import Histories, InterestModel, Interests

TrimFunction = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # (vectors, alive, old) -> (vectors, alive)


def active_users(histories: Histories) -> Tensor:
    """Return the users with events since the last update (N,), in ascending order."""
    cumulative_R = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(is_new_row(histories), 0)])
    n_U = cumulative_R[histories.offsets_U[1:]] - cumulative_R[histories.offsets_U[:-1]]
    return n_U.nonzero()[:, 0]


def update_interests(
    model: InterestModel,
    stored_interests: StoredInterests,
    histories: Histories,
    history: str,
    trim: TrimFunction | None = None,
) -> Interests:
    """Recompute the interests of active users with the new model. Those of other users do not change."""
    users_N = active_users(histories)
    # Held-out events are tested later, so interests must not depend on them.
    ends = mask_held_out(history_ends(histories, users_N, history))
    max_interests, n_dims = stored_interests.initial_KD.shape
    if len(users_N):
        max_interests = int(stored_interests.interest_counts(users_N).max())
    vectors_NKD = torch.zeros(len(users_N), max_interests, n_dims)
    alive_NK = torch.zeros(len(users_N), max_interests, dtype=torch.bool)
    used_NK = torch.zeros(len(users_N), max_interests, dtype=torch.bool)
    new_items_R = torch.where(is_new_row(histories), histories.items_R, 0)
    new_events = replace(ends, histories=replace(histories, items_R=new_items_R))
    for index_B, batch in query_batches(ends, model.spec.length, stored_interests):
        assert batch.alive_BK is not None and batch.old_BK is not None
        vectors_BKD, alive_BK = user_vectors(model, batch), batch.alive_BK
        if trim is not None:
            vectors_BKD, alive_BK = trim(vectors_BKD, alive_BK, batch.old_BK)
        k = alive_BK.shape[1]
        vectors_NKD[index_B, :k] = vectors_BKD
        alive_NK[index_B, :k] = alive_BK
        used_NK[index_B, :k] = _is_closest_interest(
            model, history_items(new_events[index_B], model.spec.length), vectors_BKD, alive_BK
        )
    return replace_interests(
        stored_interests.interests, users_N, vectors_NKD, alive_NK, used_NK, stored_interests.span, histories.n_users
    )


def _is_closest_interest(model: InterestModel, events_BT: Tensor, vectors_BKD: Tensor, alive_BK: Tensor) -> Tensor:
    """Whether each interest is the closest one to any event since the last update, shape (B, K). Item 0 is padding."""
    items_BTD = item_vectors(model)[events_BT]
    logits_BTK = torch.bmm(items_BTD, vectors_BKD.transpose(1, 2)).masked_fill(~alive_BK[:, None], -torch.inf)
    used_BK = torch.zeros(alive_BK.shape)
    used_BK.scatter_add_(1, logits_BTK.argmax(2), (events_BT > 0).float())
    return used_BK > 0


def interest_costs(interests: Interests) -> dict[str, float]:
    """Return the mean number of interests, and of their bytes, per user with interests."""
    n_users = max(1, int((interests.offsets_U.diff() > 0).sum()))
    n_bytes = sum(column.nbytes for column in (interests.vectors_SD, interests.born_S, interests.used_S))
    return {"mean_k": len(interests.vectors_SD) / n_users, "interest_bytes": n_bytes / n_users}


def replace_interests(
    interests: Interests,
    users_N: Tensor,
    vectors_NKD: Tensor,
    alive_NK: Tensor,
    used_NK: Tensor,
    span: int,
    n_users: int,
) -> Interests:
    """Replace the interests of `users_N` (ascending) by the alive ones in `vectors_NKD`, and grow to `n_users` users.

    The k-th interest of a user stays the k-th, so it keeps its span of birth.
    """
    counts_U = F.pad(interests.offsets_U.diff(), (0, n_users - interests.n_users))
    interests = replace(interests, offsets_U=_offsets(counts_U))
    is_existing_NK = alive_NK & (torch.arange(alive_NK.shape[1]) < counts_U[users_N][:, None])
    before_NK = interests.offsets_U[users_N][:, None] + torch.arange(alive_NK.shape[1])  # rows of existing interests
    born_NK = torch.full(alive_NK.shape, span, dtype=torch.int32)
    born_NK[is_existing_NK] = interests.born_S[before_NK[is_existing_NK]]
    last_used_NK = torch.full(alive_NK.shape, span, dtype=torch.int32)
    rests_NK = is_existing_NK & ~used_NK
    last_used_NK[rests_NK] = interests.used_S[before_NK[rests_NK]]
    counts_U = torch.zeros_like(counts_U).index_copy(0, users_N, alive_NK.sum(1))
    rewritten = Interests(vectors_NKD[alive_NK], _offsets(counts_U), born_NK[alive_NK], last_used_NK[alive_NK])
    is_rewritten_U = torch.zeros(n_users + 1, dtype=torch.bool).index_fill(0, users_N, True)
    return _merge(interests, ~is_rewritten_U[row_users(interests)], rewritten)


def add_interests(
    interests: Interests, users_N: Tensor, n_more: int, k_max: int, initial_KD: Tensor, span: int
) -> Interests:
    """Add up to `n_more` interests to each of `users_N`, starting from `initial_KD`, with at most `k_max` per user."""
    counts_U = interests.offsets_U.diff()
    extra_U = torch.zeros_like(counts_U)
    extra_U[users_N] = (k_max - counts_U[users_N]).clamp(0, n_more)
    offsets_U = _offsets(extra_U)
    owner_R = torch.repeat_interleave(torch.arange(len(extra_U)), extra_U)
    slot_R = counts_U[owner_R] + torch.arange(len(owner_R)) - offsets_U[owner_R]
    vectors_RD = initial_KD[slot_R.clamp(max=len(initial_KD) - 1)]
    span_R = torch.full((len(owner_R),), span, dtype=torch.int32)
    all_S = torch.ones(len(interests.vectors_SD), dtype=torch.bool)
    return _merge(interests, all_S, Interests(vectors_RD, offsets_U, span_R, span_R))


def _merge(interests: Interests, is_kept_S: Tensor, new: Interests) -> Interests:
    """Merge by user: the kept `interests` first, then the new ones (R). Both have the same number of users."""
    row_M = torch.cat([is_kept_S.nonzero()[:, 0], len(is_kept_S) + torch.arange(len(new.born_S))])
    owner_M = torch.cat([row_users(interests), row_users(new)])[row_M]
    row_M = row_M[owner_M.argsort(stable=True)]
    offsets_U = _offsets(torch.bincount(owner_M, minlength=interests.n_users + 1))
    vectors_MD = torch.cat([interests.vectors_SD, new.vectors_SD]).float()[row_M]
    born_M, used_M = torch.cat([interests.born_S, new.born_S])[row_M], torch.cat([interests.used_S, new.used_S])[row_M]
    return Interests(vectors_MD, offsets_U, born_M, used_M)


def _offsets(counts_U: Tensor) -> Tensor:
    """Start row of each user, then the end of the last user's rows, shape (U + 1,), from the counts per user."""
    return F.pad(counts_U.cumsum(0), (1, 0))
