"""What versions answer to the newest events, which they have not learnt from, and to older ones."""

from freshrec.data.batches import random_source, turns_of
from freshrec.device import permutation
from freshrec.models.counted import told
from freshrec.models.scoring import history_length
from freshrec.replay.measure import Asked, Block, Queries, queries_of, rank_queries
from freshrec.replay.metrics import Floats, evaluate, per_user
from freshrec.serve.recommend import Served
from freshrec.types import TRAIN, State

ASKED = 1500  # of a day's newest events, at most
DRAWN = 1601  # tells the random numbers from others


def newest(served: Served) -> Queries:
    """The pending events as queries, in random order, but one event of each user comes before another's second.

    They may be answered with the items that the model has learnt.
    """
    state, block = served.state, Block(served.pending, 0, len(served.users), served.state.model.n_items)
    queries = queries_of(state.recent, block, history_length(state.model), Asked(TRAIN))
    order_N = permutation(len(queries), random_source(state.seed, state.spans_seen, DRAWN))
    order_N = order_N[turns_of(queries.users_N[order_N]).argsort(stable=True)]
    return queries[order_N[:ASKED]]


def values_of(state: State, queries: Queries, metric: str, n_items: int) -> Floats:
    """(U,) the metric of each user that asks; their histories may hold any of `n_items`."""
    ranks_N = rank_queries(told(state, n_items), queries)
    values_U: Floats = per_user(queries.users_N.numpy(), evaluate(ranks_N.numpy(), [metric]))[1][:, 0]
    return values_U
