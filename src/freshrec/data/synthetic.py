"""Worlds: generated logs in which the right answer is known. Each docstring states the right answer.

All worlds share one timeline. The activity of users is lognormal, and 30 % of the users arrive while the log runs. Each
item belongs to a topic, the log's `category`: item i belongs to topic i modulo the number of topics.

Within a topic, popularity follows Zipf's law. 40 % of the items replace an earlier item of the same topic and
popularity, which never occurs again. Half of the events are period 0, the base block. The others form `spans` periods
with equal numbers of events, about a day each, so splitting by count and by period gives the same spans.

Ids start at 0 on purpose: an id is not a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from freshrec.data.log import Log
from freshrec.data.world_size import WorldSize
from freshrec.errors import OptionError, unknown_name_error
from freshrec.forks import require_threads

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

DAY = 86_400_000_000  # microseconds
START_TIME = 1_735_689_600_000_000  # 2025-01-01, in microseconds
N_TOPICS = 20
N_TASTES = 3  # topics that a user likes at the start
N_GAINED = 2  # topics that half of the users gain in `newborn`
GAINED_TOPIC_SHARE = 0.7  # share of their later events that is drawn from the gained topics
REPEAT_SHARE = 0.7  # share of events in `repeat` that copy an earlier event of the same user


@dataclass(frozen=True, eq=False)
class World:
    """A log and its number of topics. In `newborn`, `truth` is a frame of user_id, span, category and events."""

    log: Log
    n_topics: int
    truth: pl.DataFrame | None = None


@dataclass(frozen=True, eq=False)
class Timeline:
    """The users and times of all events, before items are chosen."""

    time_fractions_E: Float64Array  # ascending, in [0, 1)
    periods_E: Int64Array
    users_E: Int64Array
    arrival_fractions_U: Float64Array  # arrival of each user in [0, 1); 0 = from the start


def make_world(
    name: str,
    *,
    users: int = WorldSize.users,
    items: int = WorldSize.items,
    events: int = WorldSize.events,
    spans: int = WorldSize.spans,
    seed: int = 0,
) -> World:
    """Generate the world called `name`, a key of WORLDS. The same arguments give the same events.

    `users`, `items`, `events` and `spans` are numbers. `spans` does not include the base block. A user may have no
    events. `items` is rounded down to a multiple of the number of topics. Raises OptionError for an unknown name or for
    sizes that are too small.
    """
    require_threads()
    if name not in WORLDS:
        raise unknown_name_error("world", name, WORLDS)
    if users < 1 or spans < 1 or events < 2 * spans or items < N_TOPICS:
        raise OptionError(
            f"A world of {users} users, {items} items, {events} events and {spans} spans is too small. Use at least "
            f"1 user, {N_TOPICS} items, 1 span and 2 events per span."
        )
    # no named stream: a seed must give the same world as in published results
    return WORLDS[name](WorldSize(users, items, events, spans), np.random.default_rng(seed))


def checkerboard(size: WorldSize, rng: np.random.Generator) -> World:
    """Even users choose only even items, odd users only odd ones: a model must rank all items of that half first."""
    timeline = _make_timeline(size, rng)
    return World(_make_log(size, timeline, timeline.users_E % 2, 2, rng), 2)


def popularity(size: WorldSize, rng: np.random.Generator) -> World:
    """All users draw from the same popularity: no personal ranking beats the order of recent counts."""
    timeline = _make_timeline(size, rng)
    return World(_make_log(size, timeline, np.zeros(size.events, np.int64), 1, rng), 1)


def frozen(size: WorldSize, rng: np.random.Generator) -> World:
    """Each user always likes the same three topics equally: no new interest appears, and detecting one is an error."""
    timeline = _make_timeline(size, rng)
    tastes_UK = _sample_topics(size.users, N_TASTES, rng)
    topics_E = tastes_UK[timeline.users_E, rng.integers(N_TASTES, size=size.events)]
    return World(_make_log(size, timeline, topics_E, N_TOPICS, rng), N_TOPICS)


def drift(size: WorldSize, rng: np.random.Generator) -> World:
    """Each of a user's three interests moves to the next topic twice during the log, each at its own times.

    A model without updates gets worse span by span: the base block says little about a user's taste in the last span. A
    strategy that keeps old knowledge scores better on old targets, not on new ones.
    """
    timeline = _make_timeline(size, rng)
    tastes_UK, phases_UK = _sample_topics(size.users, N_TASTES, rng), rng.random((size.users, N_TASTES))
    taste_index_E = rng.integers(N_TASTES, size=size.events)
    moves_E = (2 * timeline.time_fractions_E + phases_UK[timeline.users_E, taste_index_E]).astype(np.int64)
    return World(
        _make_log(size, timeline, (tastes_UK[timeline.users_E, taste_index_E] + moves_E) % N_TOPICS, N_TOPICS, rng),
        N_TOPICS,
    )


def newborn(size: WorldSize, rng: np.random.Generator) -> World:
    """Like `frozen`, but half of the initial users gain two topics in some span, and prefer them from then on.

    `truth` has one row per user and gained topic: the span of its first event, and its number of events in that span.
    Users without an earlier span are left out, because all their topics are new. A correct detector finds exactly these
    users in these spans. An old topic that a user with few events shows late for the first time is not in `truth`.
    """
    timeline = _make_timeline(size, rng)
    topics_UK = _sample_topics(size.users, N_TASTES + N_GAINED, rng)
    gains_topics_U = (timeline.arrival_fractions_U == 0) & (rng.random(size.users) < 0.5)
    born_U = np.where(gains_topics_U, rng.integers(1, size.spans + 1, size.users), size.spans + 1)
    is_gained_E = (timeline.periods_E >= born_U[timeline.users_E]) & (rng.random(size.events) < GAINED_TOPIC_SHARE)
    old_E, new_E = rng.integers(N_TASTES, size=size.events), rng.integers(N_GAINED, size=size.events) + N_TASTES
    log = _make_log(size, timeline, topics_UK[timeline.users_E, np.where(is_gained_E, new_E, old_E)], N_TOPICS, rng)
    return World(log, N_TOPICS, _first_gained_spans(log.frame, is_gained_E))


def repeat(size: WorldSize, rng: np.random.Generator) -> World:
    """70 % of a user's events copy a random earlier one: a model must rank the user's own items first, by count."""
    timeline = _make_timeline(size, rng)
    tastes_UK = _sample_topics(size.users, N_TASTES, rng)
    log = _make_log(
        size, timeline, tastes_UK[timeline.users_E, rng.integers(N_TASTES, size=size.events)], N_TOPICS, rng
    )
    source_E = _copy_sources(timeline.users_E, rng)
    copied = log.frame.with_columns(pl.col("item_id", "category").gather(source_E))
    return World(Log(copied, log.has_clock, log.unit, log.notes), N_TOPICS)


WORLDS: dict[str, Callable[[WorldSize, np.random.Generator], World]] = {
    "checkerboard": checkerboard,
    "popularity": popularity,
    "frozen": frozen,
    "drift": drift,
    "newborn": newborn,
    "repeat": repeat,
}


def _make_timeline(size: WorldSize, rng: np.random.Generator) -> Timeline:
    """Space events evenly. Each goes to a random user who has arrived, in proportion to their activity."""
    moments_E = np.arange(size.events) / size.events
    starts = np.ceil(size.events * (0.5 + 0.5 * np.arange(size.spans) / size.spans) - 0.5)
    periods_E = np.searchsorted(starts, np.arange(size.events), "right")
    late_U = rng.random(size.users) < 0.3
    late_U[0] = False  # at least one user exists when the log begins
    arrivals_U = np.sort(np.where(late_U, rng.random(size.users), 0.0))
    activity_U = np.cumsum(rng.lognormal(0.0, 1.0, size.users))
    n_arrived_E = np.searchsorted(arrivals_U, moments_E, "right")
    users_E = np.searchsorted(activity_U, rng.random(size.events) * activity_U[n_arrived_E - 1], "right")
    return Timeline(moments_E, periods_E, np.minimum(users_E, n_arrived_E - 1), arrivals_U)


def _sample_topics(n_users: int, n: int, rng: np.random.Generator) -> Int64Array:
    """Distinct random topics of each user, shape (n_users, n)."""
    return np.argsort(rng.random((n_users, N_TOPICS), dtype=np.float32), axis=1)[:, :n]


def _make_log(
    size: WorldSize, timeline: Timeline, topics_E: Int64Array, n_topics: int, rng: np.random.Generator
) -> Log:
    """Draw an item of its topic for each event. A popularity rank passes from one item to the next."""
    n_per_topic = size.items // n_topics
    n_ranks = max(1, round(0.6 * n_per_topic))
    n_held = 1 + np.bincount(rng.integers(n_ranks, size=n_per_topic - n_ranks), minlength=n_ranks)
    first_item = np.cumsum(n_held) - n_held
    zipf = np.cumsum(1 / np.arange(1, n_ranks + 1))
    ranks_E = np.searchsorted(zipf, rng.random(size.events) * zipf[-1], "right").clip(max=n_ranks - 1)
    phases = rng.random((n_topics, n_ranks))  # when the first item of a rank is replaced
    holder_E = (timeline.time_fractions_E * (n_held[ranks_E] - 1) + phases[topics_E, ranks_E]).astype(np.int64)
    columns = {
        "user_id": timeline.users_E,
        "item_id": (first_item[ranks_E] + holder_E) * n_topics + topics_E,
        "time": START_TIME + (timeline.time_fractions_E * 2 * size.spans * DAY).astype(np.int64),
        "category": topics_E,
        "period": timeline.periods_E,
    }
    return Log(pl.DataFrame(columns), True, "us", ("This log is generated.",))


def _first_gained_spans(frame: pl.DataFrame, gained_E: npt.NDArray[np.bool_]) -> pl.DataFrame:
    """Find each user's gained topics: the span of the first event, and the number of events in that span."""
    first = pl.col("period").min()
    since = frame.group_by("user_id").agg(first.alias("since"))
    gained = frame.filter(pl.Series(gained_E)).group_by("user_id", "category")
    rows = gained.agg(first.alias("span"), (pl.col("period") == first).sum().cast(pl.Int64).alias("events"))
    truth = rows.join(since, on="user_id").filter(pl.col("since") < pl.col("span"))
    return truth.select("user_id", "span", "category", "events").sort("user_id", "span", "category")


def _copy_sources(users_E: Int64Array, rng: np.random.Generator) -> Int64Array:
    """Return the source of each event's item: the event itself, or the origin of a chain of copies."""
    n_events = len(users_E)
    by_user = np.argsort(users_E, kind="stable")
    start_of_user = np.searchsorted(users_E[by_user], users_E[by_user])
    n_before = np.arange(n_events) - start_of_user  # earlier events of the same user
    is_copy = (rng.random(n_events) < REPEAT_SHARE) & (n_before > 0)
    source = np.where(is_copy, start_of_user + (rng.random(n_events) * n_before).astype(np.int64), np.arange(n_events))
    while not np.array_equal(
        resolved := source[source], source
    ):  # each round doubles the length of the chains that are resolved
        source = resolved
    source_E = np.empty(n_events, np.int64)
    source_E[by_user] = by_user[source]
    return source_E
