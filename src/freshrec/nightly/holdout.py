"""How well versions predict the newest events, which they have not learnt from, and older ones."""

from freshrec.data.batches import occurrence_numbers
from freshrec.device import permutation
from freshrec.models.absorb import grow_items
from freshrec.nn.scoring import history_length
from freshrec.random_streams import stream
from freshrec.recommender.served_state import ServedState
from freshrec.replay.measure import Queries, QueryOptions, SpanBlock, make_queries, rank_queries
from freshrec.replay.metrics import Float64Array, compute_metrics, mean_per_user
from freshrec.types import TRAIN, State

MAX_QUERIES = 1500  # of a day's newest events, at most


def newest_queries(served: ServedState) -> Queries:
    """The pending events as queries, in random order, but one event of each user comes before another's second.

    They may be answered with the items that the model has learnt.
    """
    state, block = served.state, SpanBlock(served.pending, 0, len(served.users), served.state.model.n_items)
    queries = make_queries(state.histories, block, history_length(state.model), QueryOptions(TRAIN))
    order_N = permutation(len(queries), stream(state.seed, "newest queries", state.spans_seen))
    order_N = order_N[occurrence_numbers(queries.users_N[order_N]).argsort(stable=True)]
    return queries[order_N[:MAX_QUERIES]]


def user_values(state: State, queries: Queries, metric: str, n_items: int) -> Float64Array:
    """(U,) the metric of each user with a query; their histories may hold any of `n_items`."""
    ranks_N = rank_queries(grow_items(state, n_items), queries)
    values_U: Float64Array = mean_per_user(queries.users_N.numpy(), compute_metrics(ranks_N.numpy(), [metric]))[1][:, 0]
    return values_U
