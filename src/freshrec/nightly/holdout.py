"""Quality of a version on held-out events: the newest ones, and older ones."""

from freshrec.data.batches import occurrence_numbers
from freshrec.device import permutation
from freshrec.models.absorb import grow_items
from freshrec.nn.scoring import history_length
from freshrec.random_streams import stream
from freshrec.recommender.served_state import ServedState
from freshrec.replay.measure import Queries, QueryOptions, SpanBlock, make_queries, rank_queries
from freshrec.replay.metrics import Float64Array, compute_metrics, mean_per_user
from freshrec.types import TRAIN, State

MAX_QUERIES = 1500  # queries from the newest events of a delivery, at most


def newest_queries(served: ServedState) -> Queries:
    """Return the held-out newest events as queries, at most MAX_QUERIES.

    The order is random, but the first event of every user precedes the second event of any user. The candidates are
    the items that the model has learned.
    """
    state, block = served.state, SpanBlock(served.pending, 0, len(served.users), served.state.model.n_items)
    queries = make_queries(state.histories, block, history_length(state.model), QueryOptions(TRAIN))
    order_N = permutation(len(queries), stream(state.seed, "newest queries", state.spans_seen))
    order_N = order_N[occurrence_numbers(queries.users_N[order_N]).argsort(stable=True)]
    return queries[order_N[:MAX_QUERIES]]


def user_values(state: State, queries: Queries, metric: str, n_items: int) -> Float64Array:
    """Metric of each user with a query, shape (U,), from 0 to 1. Histories may contain any of `n_items` items."""
    ranks_N = rank_queries(grow_items(state, n_items), queries)
    values_U: Float64Array = mean_per_user(queries.users_N.numpy(), compute_metrics(ranks_N.numpy(), [metric]))[1][:, 0]
    return values_U
