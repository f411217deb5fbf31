"""Cost of the blend: events counted per CPU-second, one update, one request of a user.

Prints one JSON line. Uses one thread and a generated log of 4,000 users, 50,000 items and 120,000 events.
"""

import json
import time

import numpy as np
import torch

from freshrec.data.batches import history_ends, history_items
from freshrec.models.absorb import absorb_block
from freshrec.models.blend.model import BlendSpec
from freshrec.nn.ranking import top_k
from freshrec.strategies.refit import Refit
from freshrec.types import Batch, Events, Histories, Model, Span, State

USERS, ITEMS, EVENTS, SPAN = 4000, 50_000, 104_000, 16_000


def world() -> Events:
    """Users walk through a ring of items and visit popular ones more often."""
    source = np.random.default_rng(0)
    who = source.integers(1, USERS + 1, EVENTS + SPAN)
    where = source.zipf(1.3, USERS + 1) % ITEMS
    items = np.empty(len(who), np.int64)
    for i, user in enumerate(who):
        where[user] = (where[user] + source.zipf(2.0)) % ITEMS if source.random() < 0.7 else source.zipf(1.2) % ITEMS
        items[i] = where[user] + 1
    return Events.trainable(torch.from_numpy(who), torch.from_numpy(items))


def measure_cpu(function, *arguments):  # noqa: ANN001, ANN002, ANN201
    """CPU seconds of a call, and its result."""
    since = time.process_time()
    result = function(*arguments)
    return time.process_time() - since, result


def answer(model: Model, batches: list[Batch]) -> None:
    """Answer one request per batch."""
    for batch in batches:
        top_k(model, batch, 20)


def main() -> None:
    """Measure base block, update and 200 single requests, with and without the trained expert."""
    torch.set_num_threads(1)
    events = world()
    base, new = events[:EVENTS], events[EVENTS:]
    strategies = {"with": Refit(trains="always"), "without": Refit(trains="never")}
    found: dict[str, object] = {"benchmark": "blend", "users": USERS, "items": ITEMS, "events": EVENTS, "new": SPAN}
    for name, strategy in strategies.items():
        state = State(BlendSpec().build(0))
        span = Span(0, base, USERS, ITEMS)
        counted, state = measure_cpu(absorb_block, state, base, USERS, ITEMS)
        fitted, state = measure_cpu(strategy.update, state, span)
        absorbed, state = measure_cpu(absorb_block, state, new, USERS, ITEMS)
        updated, state = measure_cpu(strategy.update, state, Span(1, new, USERS, ITEMS))
        model, recent = state.model, state.histories
        source = torch.Generator().manual_seed(0)
        users = torch.randint(1, USERS + 1, (200,), generator=source)
        ends = [history_ends(recent, user[None], "recent") for user in users]
        batches = [Batch(end.users_N, history_items(end, model.spec.length)) for end in ends]
        answer(model, batches[:20])
        request_s, _ = measure_cpu(answer, model, batches)
        costs = {"base_absorb": counted, "base_fit": fitted, "absorb": absorbed, "update": updated}
        found[f"{name}_trained_cpu_s"] = {part: round(value, 2) for part, value in costs.items()}
        found[f"{name}_trained_request_ms"] = round(1000 * request_s / len(batches), 2)
    seconds = []
    for _ in range(3):  # the first round allocates memory
        counters = BlendSpec().build(0).experts.counters
        for counter in counters.values():
            counter.grow(USERS, ITEMS)
        seconds.append(sum(measure_cpu(counter.absorb, base, Histories.empty())[0] for counter in counters.values()))
    found["counters_events_per_cpu_s"] = round(EVENTS / min(seconds))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
