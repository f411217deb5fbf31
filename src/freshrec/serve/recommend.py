"""From what is served and users to ranked items: pure functions of rows; ids are translated by the caller."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import polars as pl
import torch
from torch import Tensor

from freshrec.config import Weight, check_options
from freshrec.data.batches import append, histories_before, in_parts, query_batches
from freshrec.data.carried import Carried, carried_by
from freshrec.data.catalog import Catalog
from freshrec.errors import IncompatibleError
from freshrec.models.blend import Blend
from freshrec.models.counted import told
from freshrec.models.pairs import Pairs
from freshrec.models.ranking import Search, known, top
from freshrec.serve.diverse import CANDIDATES, diversified, kinds_of
from freshrec.serve.fresh import Fresh, asked_of
from freshrec.types import Batch, Events, State, TrainedModel, VectorModel

SIZE = 256  # users asked at once
UNKNOWN, EXHAUSTED = "unknown user", "no more items with a score"
WHY = (None, UNKNOWN, EXHAUSTED)  # an item is in a list; None: the model chose it


def _no_categories() -> pl.DataFrame:
    return pl.DataFrame(schema={"item": pl.Int64, "category": pl.String})


def _none() -> Events:
    return Events.of(*torch.zeros(2, 0, dtype=torch.int64))


@dataclass(frozen=True, eq=False)
class Served:
    """What every answer is made of, and what changes together."""

    state: State  # the model, and what its next update needs
    counts: State  # popularity, for strangers; its `recent` is never cut, so it knows all items that a user has had
    users: Catalog
    items: Catalog
    categories: pl.DataFrame = field(default_factory=_no_categories)  # item (a row), category
    pending: Events = field(default_factory=_none)  # newer than what the model has learnt; in no history of `state`
    fresh: Fresh = field(default_factory=Fresh)  # newer than all of that; in no history either
    search: Search | None = None  # in the model's item vectors; None: all of them are scored

    @property
    def newest_time(self) -> int | None:
        """The largest time of any event known; None where there is none."""
        times_R = self.counts.recent.times_R
        return int(times_R.max()) if len(times_R) else None

    @cached_property
    def now(self) -> State:
        """The state in whose histories the pending events are: users are asked about as they are now."""
        if not len(self.pending):
            return self.state
        recent = append(self.state.recent, self.pending, len(self.users))
        return told(replace(self.state, recent=recent), len(self.items))

    @cached_property
    def carried(self) -> Carried | None:
        """What travels with the batches of `now`."""
        return carried_by(self.now.model, self.now.users, self.now.spans_seen)

    @cached_property
    def counts_only(self) -> bool:
        """Whether a score of 0 is no opinion."""
        return not isinstance(self.state.model, TrainedModel)

    @property
    def settled(self) -> "Served":
        """The same answers from less memory: nothing is pending, and equal histories are one. It cannot be updated."""
        state, counts = self.now, self.counts
        mine, all_R = state.recent, counts.recent
        columns = ("offsets_U", "items_R", "times_R")  # what is due concerns those who learn
        if all(torch.equal(getattr(mine, name), getattr(all_R, name)) for name in columns):
            counts = replace(counts, recent=mine)  # as long as no history was cut
        return replace(self, state=state, counts=counts, pending=_none())

    @cached_property
    def norms_I(self) -> Tensor:
        """The length of each item's vector, at least a little, from item 0."""
        lengths_I: Tensor = self.state.model.item_vectors().norm(dim=1)
        return lengths_I.clamp(min=1e-12)

    @cached_property
    def kinds_I(self) -> Tensor:
        """The number of each item's category, from item 0; 0: none. OptionError where no item has one."""
        return kinds_of(self.categories, len(self.items))


@dataclass(frozen=True)
class Wanted:
    """What a list may hold."""

    k: int = 10  # items, at most
    filter_seen: bool = True  # leave out all that the user has had
    allow_M: Tensor | None = None  # only these item rows, ascending
    deny_M: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # none of these item rows
    diversity: Weight = 0.0  # what each item of a category costs the next one of it, in units of the score

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def n_candidates(self) -> int:
        """How many of the best items the list is made of."""
        return self.k + CANDIDATES if self.diversity else self.k


@dataclass(frozen=True, eq=False)
class Lists:
    """The lists of N users, the best item first; 0 where a list is shorter, its score is then -inf."""

    items_NK: Tensor
    scores_NK: Tensor
    why_NK: Tensor  # WHY an item is there: the place in it

    @staticmethod
    def empty(n_users: int, k: int) -> "Lists":
        """Nothing yet."""
        items_NK = torch.zeros(n_users, k, dtype=torch.int64)
        return Lists(items_NK, torch.full((n_users, k), -torch.inf), torch.zeros_like(items_NK))

    def put(self, which_N: Tensor, items_BC: Tensor, scores_BC: Tensor) -> None:
        """The best of what a model found for some users."""
        n = min(self.items_NK.shape[1], items_BC.shape[1])
        self.scores_NK[which_N, :n] = scores_BC[:, :n]
        self.items_NK[which_N, :n] = torch.where(scores_BC[:, :n] > -torch.inf, items_BC[:, :n], 0)

    def complete(self, which_N: Tensor, more: "Lists", why: int) -> None:
        """After a user's own items come those of `more` that are not among them."""
        items_BK = self.items_NK[which_N]
        again_BK = (more.items_NK[..., None] == items_BK[:, None]).any(2)
        items_BC = torch.cat([items_BK, more.items_NK.masked_fill(again_BK, 0)], 1)
        scores_BC = torch.cat([self.scores_NK[which_N], more.scores_NK], 1)
        why_BC = torch.cat([self.why_NK[which_N], torch.full_like(more.items_NK, why)], 1)
        order_BK = (items_BC == 0).byte().argsort(dim=1, stable=True)[:, : items_BK.shape[1]]
        self.items_NK[which_N] = items_BC.gather(1, order_BK)
        self.scores_NK[which_N] = scores_BC.gather(1, order_BK)
        self.why_NK[which_N] = why_BC.gather(1, order_BK)


def best_items(served: Served, users_N: Tensor, wanted: Wanted) -> pl.DataFrame:
    """`lists_of` as a frame: nth, the place in `users_N`; item, a row; score; rank, from 1; fallback."""
    lists = lists_of(served, users_N, wanted)
    nth_L, at_L = lists.items_NK.nonzero(as_tuple=True)
    why = pl.Series("fallback", WHY, pl.String).gather(lists.why_NK[nth_L, at_L].numpy())
    items_L, scores_L = lists.items_NK[nth_L, at_L].numpy(), lists.scores_NK[nth_L, at_L].numpy()
    rank_L = (at_L + 1).numpy()
    return pl.DataFrame({"nth": nth_L.numpy(), "item": items_L, "score": scores_L, "rank": rank_L, "fallback": why})


def lists_of(served: Served, users_N: Tensor, wanted: Wanted) -> Lists:
    """The lists of user rows (0: a stranger).

    Popular items complete the list of a stranger, and of a counting model that has counted nothing more; the score is
    then the popularity.
    """
    lists = Lists.empty(len(users_N), wanted.k)
    _from_model(served, users_N, wanted, lists)
    short_N = (lists.items_NK == 0).any(1)
    for why, which_N in ((UNKNOWN, users_N == 0), (EXHAUSTED, short_N & (users_N > 0))):
        for which_B in in_parts(which_N.nonzero()[:, 0], SIZE):
            lists.complete(which_B, _from_counts(served, users_N[which_B], wanted), WHY.index(why))
    return lists


def _from_model(served: Served, users_N: Tensor, wanted: Wanted, lists: Lists) -> None:
    state, nth_N = served.now, users_N.nonzero()[:, 0]
    ends = asked_of(state.recent, served.fresh, users_N[nth_N])
    for which, batch in query_batches(ends, state.model.spec.length, served.carried, SIZE):
        banned_BM = _banned(served, batch.users_B, wanted)
        items_BC, scores_BC = top(state.model, batch, wanted.n_candidates, banned_BM, wanted.allow_M, served.search)
        if served.counts_only:
            scores_BC = scores_BC.masked_fill(scores_BC <= 0, -torch.inf)
        lists.put(nth_N[which], *_diverse(served, items_BC, scores_BC, wanted))


def vectors_of_users(served: Served, users_N: Tensor) -> Iterator[tuple[Tensor, Batch, Tensor]]:
    """Parts of some user rows as a model with vectors sees them now: which of them, their batch, and (B, K, D)."""
    model = served.now.model
    assert isinstance(model, VectorModel)
    ends = asked_of(served.now.recent, served.fresh, users_N)
    for which, batch in query_batches(ends, model.spec.length, served.carried, SIZE):
        batch = known(model, batch)
        yield which, batch, model.user_vectors(batch)


def batch_of_user(served: Served, user_1: Tensor) -> Batch:
    """One user row as the model sees it now."""
    model = served.now.model
    ends = asked_of(served.now.recent, served.fresh, user_1)
    [(_, batch)] = query_batches(ends, model.spec.length, served.carried)
    return known(model, batch)


def _from_counts(served: Served, users_B: Tensor, wanted: Wanted) -> Lists:
    batch = Batch(users_B, torch.zeros(len(users_B), 0, dtype=torch.int64))
    banned_BM = _banned(served, users_B, wanted)
    items_BC, scores_BC = top(served.counts.model, batch, wanted.n_candidates, banned_BM, wanted.allow_M)
    lists = Lists.empty(len(users_B), wanted.k)
    lists.put(torch.arange(len(users_B)), *_diverse(served, items_BC, scores_BC, wanted))
    return lists


def _diverse(served: Served, items_BC: Tensor, scores_BC: Tensor, wanted: Wanted) -> tuple[Tensor, Tensor]:
    """(B, k) of the candidates and their scores; as they are, where nobody asked for diversity."""
    if not wanted.diversity:
        return items_BC, scores_BC
    return diversified(items_BC, scores_BC, served.kinds_I[items_BC], wanted.k, wanted.diversity)


def _banned(served: Served, users_B: Tensor, wanted: Wanted) -> Tensor:
    """(B, M) item rows that each user must not get; 0 where there is none."""
    denied_BM = wanted.deny_M.expand(len(users_B), -1)
    known_B = users_B > 0
    if not wanted.filter_seen or not bool(known_B.any()):
        return denied_BM
    histories = served.counts.recent
    ends = asked_of(histories, served.fresh, users_B[known_B])
    seen_NT = histories_before(ends, len(ends.histories.items_R))
    seen_BT = torch.zeros(len(users_B), seen_NT.shape[1], dtype=torch.int64)
    seen_BT[known_B] = seen_NT
    return torch.cat([denied_BM, seen_BT], 1)


def similar_items(served: Served, items_N: Tensor, k: int) -> pl.DataFrame:
    """The k items most like each of `items_N` (rows): nth, item, score, rank.

    By the cosine of item vectors; a pair counter, a blend's too, is asked as for a user whose only event is the item.
    """
    model = served.state.model
    model = model.experts.counters["item-knn"] if isinstance(model, Blend) else model
    known_N = (items_N <= model.n_items).nonzero()[:, 0]  # of the others the model has not learnt anything yet
    found = [_frame(known_N[:0], torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0))]
    for which in known_N.split(SIZE // 8):
        items_B1 = items_N[which][:, None]
        if isinstance(model, VectorModel):
            scores_BI = model.item_vectors()[items_B1[:, 0]] @ model.item_vectors().T
            scores_BI /= served.norms_I * served.norms_I[items_B1]
            scores_BI.scatter_(1, items_B1, -torch.inf)[:, 0] = -torch.inf
            scores_BK, items_BK = scores_BI.topk(min(k, model.n_items))
        elif isinstance(model, Pairs):
            items_BK, scores_BK = top(model, Batch(torch.zeros(len(which), dtype=torch.int64), items_B1), k, items_B1)
            scores_BK = scores_BK.masked_fill(scores_BK <= 0, -torch.inf)
        else:
            raise IncompatibleError("this model does not relate items to each other; use item-knn, sasrec or another.")
        found.append(_frame(which, items_BK, scores_BK))
    return pl.concat(found).with_columns(rank=pl.int_range(1, pl.len() + 1).over("nth"))


def _frame(nth_B: Tensor, items_BK: Tensor, scores_BK: Tensor) -> pl.DataFrame:
    """A row per item that may be shown, in the order of the lists."""
    columns = {
        "nth": nth_B[:, None].expand_as(items_BK).reshape(-1).numpy(),
        "item": items_BK.reshape(-1).numpy(),
        "score": scores_BK.reshape(-1).numpy(),
    }
    return pl.DataFrame(columns).filter(pl.col("score") > -float("inf"))
