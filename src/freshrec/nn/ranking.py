"""Ranks of targets and best items over all items, in blocks, without a dense (users, items) matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.data.batches import close_gaps, split_chunks
from freshrec.device import prefers_blocks
from freshrec.errors import TrainingError
from freshrec.nn.layers import max_inner_product
from freshrec.nn.scoring import item_vectors, score_items, user_vectors
from freshrec.nn.sparse import distinct_items
from freshrec.types import Batch, CandidateModel, Model, TrainedModel, VectorModel

USER_BLOCK, ITEM_BLOCK = 64, 2048  # fastest blocks in measurements: two thirds of the peak speed of a matrix product
MAX_SEARCHED_ITEMS = 8 * ITEM_BLOCK  # for more items per user, scoring all items is faster than a search
READOUTS = ("recent", "stored", "both")
# (vectors_BKD, n_B) -> item rows (B, C) and their scores: at least the n best items that the search found, without
# duplicates, padded with 0
VectorSearch = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Exclusions:
    """Item rows that the users of a batch must not get: some for all users, some for one user each.

    Each user needs as much memory as it has excluded items. One user with many does not slow down the others.
    """

    shared_M: Tensor  # for all users, without duplicates
    users_E: Tensor  # positions in the batch
    items_E: Tensor  # the excluded item of each of these users

    @staticmethod
    def from_padded(items_BM: Tensor) -> Exclusions:
        """Return the exclusions of a matrix with one row per user, padded with 0."""
        users_E, columns_E = items_BM.nonzero(as_tuple=True)
        return Exclusions(torch.zeros(0, dtype=torch.int64), users_E, items_BM[users_E, columns_E].long())

    def select_users(self, is_kept_B: Tensor) -> Exclusions:
        """Return the exclusions of a part of the batch."""
        is_kept_E = is_kept_B[self.users_E]
        position_B = is_kept_B.cumsum(0) - 1
        return Exclusions(self.shared_M, position_B[self.users_E[is_kept_E]], self.items_E[is_kept_E])

    def count(self, n_users: int, n_items: int) -> Tensor:
        """Return the number of items from 1..n_items that each user must not get, shape (B,)."""
        shared_M = self.shared_M[self.shared_M <= n_items]
        is_counted_E = (self.items_E > 0) & (self.items_E <= n_items) & ~torch.isin(self.items_E, shared_M)
        users_E = _pair_keys(self.users_E, self.items_E)[is_counted_E].unique() >> 32
        return torch.bincount(users_E, minlength=n_users) + len(shared_M)

    def contain(self, items_BC: Tensor) -> Tensor:
        """Return whether each item of each user is excluded, shape (B, C)."""
        is_excluded_BC = torch.isin(items_BC, self.shared_M)
        if not len(self.items_E):
            return is_excluded_BC
        key_E = _pair_keys(self.users_E, self.items_E).sort().values
        key_BC = _pair_keys(torch.arange(len(items_BC))[:, None], items_BC)
        at_BC = torch.searchsorted(key_E, key_BC).clamp(max=len(key_E) - 1)
        return is_excluded_BC | (key_E[at_BC] == key_BC)

    def mask_scores(self, score_BN: Tensor, items_N: Tensor) -> Tensor:
        """Return scores of some items (ascending rows), with -inf for excluded ones."""
        at_M, is_found_M = _find_items(items_N, self.shared_M)
        at_E, is_found_E = _find_items(items_N, self.items_E)
        score_BN = score_BN.clone()
        score_BN[:, at_M[is_found_M]] = -torch.inf
        score_BN[self.users_E[is_found_E], at_E[is_found_E]] = -torch.inf
        return score_BN


def _pair_keys(users: Tensor, items: Tensor) -> Tensor:
    """Return one integer per pair of a user and an item."""
    return (users << 32) + items


def _find_items(items_N: Tensor, items_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return the position of each wanted item among ascending rows, and whether it is there, shape (E,) each."""
    at_E = torch.searchsorted(items_N, items_E).clamp(max=len(items_N) - 1)
    return at_E, items_N[at_E] == items_E


def query_vectors(model: VectorModel, batch: Batch, readout: str = "recent") -> Tensor:
    """Return the vectors (B, K, D) that represent the users.

    `readout`: "recent" computes interests from the recent history, "stored" uses the stored ones, "both" uses all.
    """
    recent_BKD = user_vectors(model, batch)
    if readout == "recent" or batch.interests_BKD is None or batch.alive_BK is None or batch.old_BK is None:
        return recent_BKD
    first_B1D = batch.interests_BKD[:, :1]
    stored_BKD = torch.where(batch.alive_BK[..., None], batch.interests_BKD, first_B1D)
    known_B11 = batch.old_BK.any(1)[:, None, None]  # new users have no stored interests
    stored_BKD = torch.where(known_B11, stored_BKD, recent_BKD)
    return stored_BKD if readout == "stored" else torch.cat([stored_BKD, recent_BKD], 1)


def target_ranks(
    model: Model, batch: Batch, target_B: Tensor, readout: str = "recent", n_items: int | None = None
) -> Tensor:
    """Return the rank of each target among items 1..n_items, shape (B,), where 1 = best.

    A tie adds half a rank, and an unknown target has rank inf. `n_items`: default and maximum are the items of the
    model. Counting models also rank a user's own items that no other user has; trained models have no vectors
    of them. Raises TrainingError if a score is not finite.
    """
    n_items = model.n_items if n_items is None else min(n_items, model.n_items)
    batch = drop_unknown_items(model, batch)
    new_items_BN = torch.zeros(len(batch), 0, dtype=torch.int64)
    if not isinstance(model, TrainedModel):
        new_items_BN = _new_history_items(batch, n_items)
    known_B = (target_B <= n_items) | (new_items_BN == target_B[:, None]).any(1)
    target_B = torch.where(known_B, target_B, 0)
    rank_B = torch.ones(len(target_B))
    size = USER_BLOCK if prefers_blocks(target_B) else max(len(target_B), 1)
    for users in torch.arange(len(target_B)).split(size):
        rank_B[users] += _count_ahead(
            model, _select_users(batch, users), target_B[users], readout, n_items, new_items_BN[users]
        )
    return torch.where(known_B, rank_B, torch.inf)


def target_ranks_among(
    model: Model, batch: Batch, target_B: Tensor, others_BN: Tensor, readout: str = "recent"
) -> Tensor:
    """Return the rank of each target among itself and some other items, shape (B,), where 1 = best.

    A tie adds half a rank, and an unknown target has rank inf. `others_BN` is padded with 0. Raises TrainingError if a
    score is not finite.
    """
    known_B = target_B <= model.n_items
    others_BN = torch.where(others_BN <= model.n_items, others_BN, 0)
    items_BN = torch.cat([torch.where(known_B, target_B, 0)[:, None], others_BN], 1)
    batch = drop_unknown_items(model, batch)
    if isinstance(model, VectorModel):
        score_BN = max_inner_product(query_vectors(model, batch, readout), item_vectors(model)[items_BN])
    else:
        score_BN = score_items(model, batch, items_BN)
    _check_finite(score_BN)
    target_B1, score_BN = score_BN[:, :1], score_BN[:, 1:]
    ahead_BN = (score_BN > target_B1).float() + 0.5 * (score_BN == target_B1)
    return torch.where(known_B, 1 + (ahead_BN * (others_BN > 0)).sum(1), torch.inf)


def drop_unknown_items(model: Model, batch: Batch) -> Batch:
    """Return `batch` without history items that the model does not know yet. The other items close the gaps."""
    history_BT = batch.history_BT
    if history_BT.numel() and int(history_BT.max()) > model.n_items:
        history_BT = torch.where(history_BT <= model.n_items, history_BT, 0)
    history_BT = close_gaps(history_BT)
    return batch if history_BT is batch.history_BT else replace(batch, history_BT=history_BT)


def _new_history_items(batch: Batch, n_items: int) -> Tensor:
    """Return the distinct items of each history above n_items, padded with 0, shape (B, N)."""
    return torch.from_numpy(distinct_items(torch.where(batch.history_BT > n_items, batch.history_BT, 0).numpy()))


def _select_users(batch: Batch, index: Tensor) -> Batch:
    interest_columns = (batch.interests_BKD, batch.alive_BK, batch.old_BK)
    interests, alive, old = (None if x is None else x[index] for x in interest_columns)
    users_B, history_BT = batch.users_B[index], batch.history_BT[index]
    return Batch(
        users_B, history_BT, interests_BKD=interests, alive_BK=alive, old_BK=old, categories_I=batch.categories_I
    )


def _count_ahead(
    model: Model, batch: Batch, target_B: Tensor, readout: str, n_items: int, new_items_BN: Tensor
) -> Tensor:
    """Count the items ahead of each target, among 1..n_items and the user's new items. Ties count half."""
    if isinstance(model, CandidateModel):
        return _count_ahead_of_candidates(*model.candidates(batch), target_B, n_items, new_items_BN)
    ahead_B = torch.zeros(len(batch))
    vectors_BKD = query_vectors(model, batch, readout) if isinstance(model, VectorModel) else None
    items_ID = item_vectors(model) if isinstance(model, VectorModel) else None
    if vectors_BKD is not None and items_ID is not None:
        target_B1 = max_inner_product(vectors_BKD, items_ID[target_B][:, None])
    else:
        target_B1 = score_items(model, batch, target_B[:, None])
    in_blocks = isinstance(model, TrainedModel) and prefers_blocks(target_B)
    block = ITEM_BLOCK if in_blocks else max(n_items, 1)  # the sparse scores of counting models are computed once
    blocks = [torch.arange(first, min(first + block, n_items + 1)) for first in range(1, n_items + 1, block)]
    if new_items_BN.shape[1]:
        blocks.append(torch.where(new_items_BN > 0, new_items_BN, target_B[:, None]))  # padding: never ahead of itself
    for items_N in blocks:
        if vectors_BKD is not None and items_ID is not None:
            score_BN = max_inner_product(vectors_BKD, items_ID[items_N[0] : items_N[-1] + 1])
        else:
            score_BN = score_items(model, batch, items_N)
        _check_finite(score_BN)
        other_BN = items_N != target_B[:, None]  # the target's own score may differ in the last bit between blocks
        ahead_B += ((score_BN > target_B1) & other_BN).sum(1) + 0.5 * ((score_BN == target_B1) & other_BN).sum(1)
    return ahead_B


def _count_ahead_of_candidates(
    items_BC: Tensor, score_BC: Tensor, target_B: Tensor, n_items: int, new_items_BN: Tensor
) -> Tensor:
    _check_finite(score_BC)
    is_allowed_BC = (items_BC > 0) & (items_BC <= n_items)
    if new_items_BN.shape[1]:
        is_own_BC = (items_BC[..., None] == new_items_BN[:, None]).any(2)
        is_allowed_BC = is_allowed_BC | (is_own_BC & (items_BC > 0))
    score_BC = torch.where(is_allowed_BC, score_BC, 0.0)
    is_target_BC = items_BC == target_B[:, None]
    target_B1 = (score_BC * is_target_BC).sum(1, keepdim=True)
    ahead_B, tied_B = (score_BC > target_B1).sum(1), ((score_BC == target_B1) & ~is_target_BC & (score_BC > 0)).sum(1)
    others_B = n_items + (new_items_BN > 0).sum(1) - 1
    unscored_B = torch.where(target_B1[:, 0] > 0, 0, others_B - (score_BC > 0).sum(1))  # items without a score
    return ahead_B + 0.5 * (tied_B + unscored_B)


def top_k(
    model: Model,
    batch: Batch,
    k: int,
    excluded: Exclusions | None = None,
    allowed_N: Tensor | None = None,
    search: VectorSearch | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the best k items and their scores, (B, k) each, best first. Missing items have the score -inf.

    The score of an excluded item is -inf. `allowed_N`: the item rows to choose from, ascending; default: all.
    `search`: approximate search for a vector model. Only the items that it finds are scored, unless a user would get
    fewer than k or has many excluded items. Raises TrainingError if a score is not finite.
    """
    batch = drop_unknown_items(model, batch)
    if search is not None and allowed_N is None:  # first, because isinstance takes as long as the vectors
        return _top_k_by_search(cast(VectorModel, model), batch, k, excluded, search)
    if isinstance(model, CandidateModel):
        return _top_k_of_candidates(*model.candidates(batch), k, excluded, allowed_N)
    allowed_N = torch.arange(1, model.n_items + 1) if allowed_N is None else allowed_N[allowed_N <= model.n_items]
    if isinstance(model, VectorModel):
        return top_k_exact(item_vectors(model), user_vectors(model, batch), k, excluded, allowed_N)
    if isinstance(model, TrainedModel) or not len(allowed_N):
        return _top_k_by_score(lambda items_N: score_items(model, batch, items_N), len(batch), k, excluded, allowed_N)
    all_BN = score_items(model, batch, allowed_N)  # a counting model computes all scores, even if asked for one

    def score(items_N: Tensor) -> Tensor:
        first = int(torch.searchsorted(allowed_N, items_N[0]))
        return all_BN[:, first : first + len(items_N)]

    return _top_k_by_score(score, len(batch), k, excluded, allowed_N)


def _top_k_by_score(
    score: Callable[[Tensor], Tensor], n_users: int, k: int, excluded: Exclusions | None, allowed_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the best k of some items and their scores, computed in blocks of items."""
    best_items, best_scores = torch.zeros(n_users, 0, dtype=torch.int64), torch.zeros(n_users, 0)
    for items_N in split_chunks(allowed_N, 8 * ITEM_BLOCK):
        score_BN = score(items_N)
        _check_finite(score_BN)
        if excluded is not None:
            score_BN = excluded.mask_scores(score_BN, items_N)
        scores_BK, at_BK = score_BN.topk(min(k, len(items_N)))
        best_items = torch.cat([best_items, items_N[at_BK]], 1)
        best_scores, order = torch.cat([best_scores, scores_BK], 1).topk(min(k, best_items.shape[1]))
        best_items = best_items.gather(1, order)
    return best_items, best_scores


def top_k_exact(
    items_ID: Tensor, vectors_BKD: Tensor, k: int, excluded: Exclusions | None, allowed_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the best k of some items (ascending rows) by max_k h_k e_i, and their scores; -inf if excluded."""

    def score(items_N: Tensor) -> Tensor:
        first, last = int(items_N[0]), int(items_N[-1])
        rows_ND = items_ID[first : last + 1] if last - first + 1 == len(items_N) else items_ID[items_N]
        return max_inner_product(vectors_BKD, rows_ND)

    return _top_k_by_score(score, len(vectors_BKD), k, excluded, allowed_N)


@torch.inference_mode()
def _top_k_by_search(
    model: VectorModel, batch: Batch, k: int, excluded: Exclusions | None, search: VectorSearch
) -> tuple[Tensor, Tensor]:
    """Return the best k items of a search.

    Users for whom it finds too few, or would have to find too many, get the best of all items.
    """
    vectors_BKD = user_vectors(model, batch)
    excluded = Exclusions.from_padded(torch.zeros(0, 0)) if excluded is None else excluded
    n_excluded_B = excluded.count(len(batch), model.n_items)
    is_too_many_B = k + n_excluded_B > MAX_SEARCHED_ITEMS
    candidates_BC, score_BC = search(vectors_BKD, torch.where(is_too_many_B, 1, k + n_excluded_B))
    items_BK, score_BK = _top_k_of_candidates(candidates_BC, score_BC, k, excluded, None)
    is_incomplete_B = torch.isfinite(score_BK).sum(1) < (model.n_items - n_excluded_B).clamp(max=k)
    is_incomplete_B |= is_too_many_B
    if bool(is_incomplete_B.any()):
        all_N, excluded = torch.arange(1, model.n_items + 1), excluded.select_users(is_incomplete_B)
        exact = top_k_exact(item_vectors(model), vectors_BKD[is_incomplete_B], k, excluded, all_N)
        items_BK, score_BK = _pad_columns(items_BK, 0, k), _pad_columns(score_BK, -torch.inf, k)
        items_BK[is_incomplete_B, : exact[0].shape[1]], score_BK[is_incomplete_B, : exact[1].shape[1]] = exact
    return items_BK, score_BK


def _pad_columns(values_BC: Tensor, fill_value: float, k: int) -> Tensor:
    """Return `values_BC` with columns of `fill_value` added on the right, shape (B, k)."""
    return F.pad(values_BC, (0, k - values_BC.shape[1]), value=fill_value)


def _top_k_of_candidates(
    items_BC: Tensor, score_BC: Tensor, k: int, excluded: Exclusions | None, allowed_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check_finite(score_BC)
    is_excluded_BC = items_BC == 0
    if excluded is not None:
        is_excluded_BC |= excluded.contain(items_BC)
    if allowed_N is not None:
        is_excluded_BC = is_excluded_BC | ~torch.isin(items_BC, allowed_N)
    # A stable sort puts the first candidate first among equal scores. The order of `topk` depends on the width of the
    # rows, and so on the other users of the batch.
    score_BC = score_BC.masked_fill(is_excluded_BC, -torch.inf)
    best_BC, order_BC = score_BC.sort(dim=1, descending=True, stable=True)
    return items_BC.gather(1, order_BC[:, :k]), best_BC[:, :k]


def _check_finite(scores: Tensor) -> None:
    """Raise TrainingError if a score is not finite: a NaN must never look like a hit."""
    if not bool(torch.isfinite(scores).all()):
        raise TrainingError("A score is not finite, because the model diverged. Lower its lr and train again.")
