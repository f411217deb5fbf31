"""A budget for stored interests: retire unused ones, merge the most similar ones, store 16-bit numbers."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.config import CountOrZero, Weight, check_options
from freshrec.data.batches import split_chunks
from freshrec.data.histories import filter_interests, row_users
from freshrec.learn.interest_store import interest_costs
from freshrec.types import Interests, State

USER_BLOCK = 8192  # users whose pairs of interests are compared at the same time


@dataclass(frozen=True)
class InterestBudget:
    """Limits of all stored interests, applied after each update. The defaults limit nothing.

    Without limits, the number of interests only grows, because the paper drops new interests but never old ones.

    `retire` drops interests that were closest to no new event for this many spans. The spans are counted back from the
    last span with events of the user, so an absent user loses nothing. `megabytes` merges the most similar pairs of a
    user until all interests fit, but leaves each user one. `fp16` affects storage only. Computations use 32 bits.
    """

    retire: CountOrZero = 0  # Spans without use after which an interest is dropped. 0 = never.
    megabytes: Weight = 0.0  # Memory limit of all interests in MB. Similar ones are merged. 0 = no limit.
    fp16: bool = False  # Store interests as 16-bit floats.

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(self, state: State) -> State:
        """Return `state` with its interests within the budget."""
        interests, ordered = state.interests, state.model.has_ordered_interests
        assert interests is not None
        if self.retire:
            interests = retire_interests(interests, self.retire, ordered)
        if self.megabytes:
            n_bytes = (2 if self.fp16 else 4) * interests.vectors_SD.shape[1]  # of one interest
            n_bytes += interests.born_S.itemsize + interests.used_S.itemsize
            interests = merge_interests(interests, int(self.megabytes * 1e6 / n_bytes), ordered)
        if self.fp16:
            interests = replace(interests, vectors_SD=interests.vectors_SD.half())
        return replace(state, interests=interests, costs=state.costs | interest_costs(interests))


def retire_interests(interests: Interests, n_spans: int, ordered: bool) -> Interests:
    """Drop interests last used `n_spans` or more spans before the user's most recently used one.

    Ordered interests are dropped from the end only: see `InterestModel.has_ordered_interests`.
    """
    user_S = row_users(interests)
    latest_U = torch.zeros(interests.n_users + 1, dtype=torch.int32)
    latest_U.scatter_reduce_(0, user_S, interests.used_S, "amax")
    is_kept_S = latest_U[user_S] - interests.used_S < n_spans
    if ordered:
        rows_S = torch.arange(len(user_S))
        last_U = torch.zeros(interests.n_users + 1, dtype=torch.int64)
        last_U.scatter_reduce_(0, user_S[is_kept_S], rows_S[is_kept_S], "amax")
        is_kept_S = rows_S <= last_U[user_S]
    return filter_interests(interests, is_kept_S)


def merge_interests(interests: Interests, max_interests: int, ordered: bool) -> Interests:
    """Average the most similar pairs within a user, until `max_interests` are left or each user has one.

    An average takes the earlier birth and the later use of its two parts. Of ordered interests, only the last one is
    merged into another.
    """
    while (n_over := len(interests.vectors_SD) - max_interests) > 0:
        several_N = (interests.offsets_U.diff() > 1).nonzero()[:, 0]
        if not len(several_N):
            break
        pairs = [_closest_pairs(interests, users_N, ordered) for users_N in split_chunks(several_N, USER_BLOCK)]
        into_N, from_N, cosine_N = (torch.cat(columns) for columns in zip(*pairs))
        merged_pairs_N = cosine_N.argsort(descending=True, stable=True)[:n_over]
        into_N, from_N = into_N[merged_pairs_N], from_N[merged_pairs_N]
        vectors_SD, born_S, used_S = interests.vectors_SD.clone(), interests.born_S.clone(), interests.used_S.clone()
        vectors_SD[into_N] = (vectors_SD[into_N] + vectors_SD[from_N]) / 2
        born_S[into_N] = torch.minimum(born_S[into_N], born_S[from_N])
        used_S[into_N] = torch.maximum(used_S[into_N], used_S[from_N])
        is_kept_S = torch.ones(len(born_S), dtype=torch.bool)
        is_kept_S[from_N] = False
        interests = filter_interests(Interests(vectors_SD, interests.offsets_U, born_S, used_S), is_kept_S)
    return interests


def _closest_pairs(interests: Interests, users_N: Tensor, ordered: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (N,) and (N,) of each user's two most similar interests, the later one second, and their cosine (N,)."""
    start_N = interests.offsets_U[users_N]
    n_N = interests.offsets_U[users_N + 1] - start_N
    slot_K = torch.arange(int(n_N.max()))
    alive_NK = slot_K < n_N[:, None]
    vectors_NKD = interests.vectors_SD[torch.where(alive_NK, start_N[:, None] + slot_K, start_N[:, None])]
    vectors_NKD = F.normalize(vectors_NKD.float(), dim=2)
    cosine_NKK = torch.bmm(vectors_NKD, vectors_NKD.transpose(1, 2))
    pairs_NKK = (slot_K[:, None] < slot_K) & alive_NK[:, None]
    if ordered:
        pairs_NKK = pairs_NKK & (slot_K == n_N[:, None, None] - 1)
    best = cosine_NKK.masked_fill(~pairs_NKK, -torch.inf).flatten(1).max(1)
    n_slots = len(slot_K)
    return start_N + best.indices // n_slots, start_N + best.indices % n_slots, best.values
