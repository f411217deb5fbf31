"""Ranked lists of items for users: pure functions over rows. The caller translates ids."""

from collections.abc import Iterator
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from freshrec.data.batches import MAX_BATCH_VALUES, flat_history_items, query_batches, split_by_cost, split_chunks
from freshrec.errors import IncompatibleError
from freshrec.models.blend.model import Blend
from freshrec.models.item_knn import ItemKNN
from freshrec.nn.ranking import MAX_SEARCHED_ITEMS, Exclusions, drop_unknown_items, top_k
from freshrec.nn.scoring import history_length, item_vectors, user_vectors
from freshrec.recommender.click_overlay import current_targets
from freshrec.recommender.diversity import N_EXTRA_CANDIDATES, diversify
from freshrec.recommender.list_request import ListRequest
from freshrec.recommender.served_state import ServedState
from freshrec.types import Batch, VectorModel

USERS_PER_BATCH = 256  # users per batch of lists, or fewer if the batch would take too much memory
VALUES_PER_CANDIDATE, VALUES_PER_SEEN_ITEM = 6, 4  # memory of a batch, in the unit of `MAX_BATCH_VALUES`
UNKNOWN_USER, NO_MORE_ITEMS = "unknown user", "no more items with a score"
FALLBACK_REASONS = (None, UNKNOWN_USER, NO_MORE_ITEMS)  # why an item is in a list; None = the model chose it


@dataclass(frozen=True, eq=False)
class ResolvedRequest:
    """A list request with item rows instead of ids, built by `ids.resolve_request`."""

    request: ListRequest
    allow_M: Tensor | None  # only these item rows, ascending; the request's category is applied already
    deny_M: Tensor  # never these item rows

    def n_candidates(self, n_items: int) -> int:
        """Return the number of best items among which the list is chosen."""
        return min(self.request.k + (N_EXTRA_CANDIDATES if self.request.diversity else 0), n_items)

    def list_length(self, n_items: int) -> int:
        """Return `k`, or the number of items that the filters leave if it is smaller."""
        if self.allow_M is None:
            return min(self.request.k, n_items - len(self.deny_M))
        return min(self.request.k, int((~torch.isin(self.allow_M, self.deny_M)).sum()))


@dataclass(frozen=True, eq=False)
class RankedLists:
    """Lists of N users, best item first. A shorter list is padded with item 0 and score -inf."""

    items_NK: Tensor  # int32
    scores_NK: Tensor
    fallback_NK: Tensor  # int8, index into FALLBACK_REASONS of each item

    @staticmethod
    def empty(n_users: int, k: int) -> "RankedLists":
        """Return empty lists."""
        items_NK = torch.zeros(n_users, k, dtype=torch.int32)
        return RankedLists(items_NK, torch.full((n_users, k), -torch.inf), torch.zeros_like(items_NK, dtype=torch.int8))

    def set_items(self, index_N: Tensor, items_BC: Tensor, scores_BC: Tensor) -> None:
        """Set the lists of the users at `index_N` to the best items that the model found."""
        n = min(self.items_NK.shape[1], items_BC.shape[1])
        self.scores_NK[index_N, :n] = scores_BC[:, :n]
        self.items_NK[index_N, :n] = torch.where(scores_BC[:, :n] > -torch.inf, items_BC[:, :n], 0).int()

    def append_fallback(self, index_N: Tensor, fallback_lists: "RankedLists", reason: int) -> None:
        """Append the items of `fallback_lists` that a list does not hold yet."""
        items_BK = self.items_NK[index_N]
        sorted_BK = items_BK.sort(1).values  # a lookup in sorted rows, because a list may hold all items
        at_BK = torch.searchsorted(sorted_BK, fallback_lists.items_NK).clamp(max=sorted_BK.shape[1] - 1)
        repeated_BK = sorted_BK.gather(1, at_BK) == fallback_lists.items_NK
        items_BC = torch.cat([items_BK, fallback_lists.items_NK.masked_fill(repeated_BK, 0)], 1)
        scores_BC = torch.cat([self.scores_NK[index_N], fallback_lists.scores_NK], 1)
        fallback_BC = torch.cat([self.fallback_NK[index_N], torch.full_like(fallback_lists.fallback_NK, reason)], 1)
        order_BK = (items_BC == 0).byte().argsort(dim=1, stable=True)[:, : items_BK.shape[1]]
        self.items_NK[index_N] = items_BC.gather(1, order_BK)
        self.scores_NK[index_N] = scores_BC.gather(1, order_BK)
        self.fallback_NK[index_N] = fallback_BC.gather(1, order_BK)


def top_items(served: ServedState, users_N: Tensor, request: ResolvedRequest) -> pl.DataFrame:
    """Return the lists as a frame: nth (index into `users_N`), item (row), score, rank (from 1), fallback."""
    lists = make_lists(served, users_N, request)
    size = max(1, MAX_BATCH_VALUES // (VALUES_PER_CANDIDATE * max(1, lists.items_NK.shape[1])))
    return pl.concat([_listed_items(lists, index_B) for index_B in torch.arange(len(users_N)).split(size)])


def _listed_items(lists: RankedLists, index_B: Tensor) -> pl.DataFrame:
    """Return the lists at `index_B` as `top_items` does."""
    row_L, at_L = lists.items_NK[index_B].nonzero(as_tuple=True)
    nth_L = index_B[row_L]
    columns = {
        "nth": nth_L.numpy(),
        "item": lists.items_NK[nth_L, at_L].long().numpy(),
        "score": lists.scores_NK[nth_L, at_L].numpy(),
        "rank": (at_L + 1).numpy(),
        "fallback": pl.Series(FALLBACK_REASONS, dtype=pl.String).gather(lists.fallback_NK[nth_L, at_L].long().numpy()),
    }
    return pl.DataFrame(columns)


def make_lists(served: ServedState, users_N: Tensor, request: ResolvedRequest) -> RankedLists:
    """Make the lists of user rows. Row 0 is an unknown user.

    Popular items fill the list of an unknown user. They also complete a list if a counting model scores too few items.
    The score of such an item is its popularity. Users are processed in batches, whose memory `MAX_BATCH_VALUES` limits.
    """
    lists = RankedLists.empty(len(users_N), request.list_length(len(served.items)))
    _fill_from_model(served, users_N, request, lists)
    short_N = (lists.items_NK == 0).any(1)
    for reason, index_N in ((UNKNOWN_USER, users_N == 0), (NO_MORE_ITEMS, short_N & (users_N > 0))):
        for index_C in split_chunks(index_N.nonzero()[:, 0], USERS_PER_BATCH):
            cost_C = _values_per_list(served, users_N[index_C], request, len(served.items))
            for index_B in split_by_cost(index_C, cost_C, MAX_BATCH_VALUES):
                fallback_lists = _popular_lists(served, users_N[index_B], request)
                lists.append_fallback(index_B, fallback_lists, FALLBACK_REASONS.index(reason))
    return lists


def _values_per_list(served: ServedState, users_N: Tensor, request: ResolvedRequest, n_scored: int) -> Tensor:
    """Return the memory that the list of each user takes while it is made, shape (N,), as a number of values."""
    cost = n_scored + VALUES_PER_CANDIDATE * request.n_candidates(len(served.items))
    return cost + VALUES_PER_SEEN_ITEM * served.n_seen(users_N) if request.request.exclude_seen else users_N * 0 + cost


def _fill_from_model(served: ServedState, users_N: Tensor, request: ResolvedRequest, lists: RankedLists) -> None:
    state, nth_N = served.current_state, users_N.nonzero()[:, 0]
    targets = current_targets(state.histories, served.overlay, users_N[nth_N])
    n_items = len(served.items)
    n_scored = min(n_items, MAX_SEARCHED_ITEMS) if isinstance(state.model, VectorModel) else n_items
    cost_N = _values_per_list(served, users_N[nth_N], request, n_scored)
    interests, length = served.stored_interests, history_length(state.model)
    for index, batch in query_batches(targets, length, interests, USERS_PER_BATCH, cost_N):
        excluded = _exclusions(served, batch.users_B, request)
        k = request.n_candidates(n_items)
        items_BC, scores_BC = top_k(state.model, batch, k, excluded, request.allow_M, served.search)
        if served.is_counting:
            scores_BC = scores_BC.masked_fill(scores_BC <= 0, -torch.inf)
        lists.set_items(nth_N[index], *_diversify_if_requested(served, items_BC, scores_BC, request))


def user_vector_batches(served: ServedState, users_N: Tensor) -> Iterator[tuple[Tensor, Batch, Tensor]]:
    """Yield batches of users with their current vectors: index into `users_N`, batch, vectors (B, K, D)."""
    model = served.current_state.model
    assert isinstance(model, VectorModel)
    targets = current_targets(served.current_state.histories, served.overlay, users_N)
    for index, batch in query_batches(targets, history_length(model), served.stored_interests, USERS_PER_BATCH):
        batch = drop_unknown_items(model, batch)
        yield index, batch, user_vectors(model, batch)


def user_batch(served: ServedState, user_1: Tensor) -> Batch:
    """Return the batch of one user with the current history."""
    model = served.current_state.model
    targets = current_targets(served.current_state.histories, served.overlay, user_1)
    [(_, batch)] = query_batches(targets, history_length(model), served.stored_interests)
    return drop_unknown_items(model, batch)


def _popular_lists(served: ServedState, users_B: Tensor, request: ResolvedRequest) -> RankedLists:
    batch = Batch(users_B, torch.zeros(len(users_B), 0, dtype=torch.int64))
    excluded, n_items = _exclusions(served, users_B, request), len(served.items)
    items_BC, scores_BC = top_k(served.counts.model, batch, request.n_candidates(n_items), excluded, request.allow_M)
    lists = RankedLists.empty(len(users_B), request.list_length(n_items))
    lists.set_items(torch.arange(len(users_B)), *_diversify_if_requested(served, items_BC, scores_BC, request))
    return lists


def _diversify_if_requested(
    served: ServedState, items_BC: Tensor, scores_BC: Tensor, request: ResolvedRequest
) -> tuple[Tensor, Tensor]:
    """Choose a diverse list (B, k) among the candidates. Return them unchanged if `diversity` is 0."""
    diversity = request.request.diversity
    if not diversity:
        return items_BC, scores_BC
    return diversify(items_BC, scores_BC, served.categories_I[items_BC], request.request.k, diversity)


def _exclusions(served: ServedState, users_B: Tensor, request: ResolvedRequest) -> Exclusions:
    """Return the item rows to leave out for each user: denied ones, and those of past events."""
    known_N = users_B.nonzero()[:, 0] if request.request.exclude_seen else users_B[:0]
    targets = current_targets(served.counts.histories, served.overlay, users_B[known_N])
    index_E, items_E = flat_history_items(targets)
    return Exclusions(request.deny_M, known_N[index_E], items_E)


def similar_items(served: ServedState, items_N: Tensor, k: int) -> pl.DataFrame:
    """Return the k most similar items of each item row in `items_N` as a frame: nth, item, score, rank.

    The score is the cosine of item vectors. For item-knn, markov and the blend, it is the item-kNN score for a user
    whose only event is the item. Raises IncompatibleError for other models.
    """
    model = served.state.model
    model = model.experts.counters["item-knn"] if isinstance(model, Blend) else model
    known_N = (items_N <= model.n_items).nonzero()[:, 0]  # the model has not learned the others yet
    found = [_lists_frame(known_N[:0], torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0))]
    k = min(k, model.n_items)
    size = MAX_BATCH_VALUES // (model.n_items + VALUES_PER_CANDIDATE * k + 1)
    for index in known_N.split(max(1, min(size, USERS_PER_BATCH // 8))):
        items_B1 = items_N[index][:, None]
        if isinstance(model, VectorModel):
            scores_BI = item_vectors(model)[items_B1[:, 0]] @ item_vectors(model).T
            scores_BI /= served.item_norms_I * served.item_norms_I[items_B1]
            scores_BI.scatter_(1, items_B1, -torch.inf)[:, 0] = -torch.inf
            scores_BK, items_BK = scores_BI.topk(k)
        elif isinstance(model, ItemKNN):
            batch = Batch(torch.zeros(len(index), dtype=torch.int64), items_B1)
            items_BK, scores_BK = top_k(model, batch, k, Exclusions.from_padded(items_B1))
            scores_BK = scores_BK.masked_fill(scores_BK <= 0, -torch.inf)
        else:
            raise IncompatibleError(
                "This model has no item similarities. Use item-knn, blend, or a model with item vectors such as sasrec."
            )
        found.append(_lists_frame(index, items_BK, scores_BK))
    return pl.concat(found)


def _lists_frame(nth_B: Tensor, items_BK: Tensor, scores_BK: Tensor) -> pl.DataFrame:
    """Return one row per item, in the order of the lists, without items of score -inf, which end a list."""
    columns = {
        "nth": nth_B[:, None].expand_as(items_BK).reshape(-1).numpy(),
        "item": items_BK.reshape(-1).numpy(),
        "score": scores_BK.reshape(-1).numpy(),
        "rank": torch.arange(1, items_BK.shape[1] + 1).expand_as(items_BK).reshape(-1).numpy(),
    }
    return pl.DataFrame(columns).filter(pl.col("score") > -float("inf"))
