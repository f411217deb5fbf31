"""Training speed of ComiRec-DR by number of items, with the real training loop and data preparation.

    python benchmarks/bench_step.py             # one JSON line: samples per CPU-second at 12k, 100k, 300k items

One thread, d = 64, K = 4, at most 50 history items (mean 25), 512 shared negatives, batches of 256, three routings.
"""

import json
import sys
import time

import torch

from freshrec.data.batches import targets_at
from freshrec.data.histories import append_events
from freshrec.data.stored_interests import stored_interests_of
from freshrec.learn.fit import train
from freshrec.models import MODELS
from freshrec.types import Events, Histories, TrainedModel

BATCHES, BATCH, LENGTH = 44, 256, 50


def histories_of(n_items: int, source: torch.Generator) -> Histories:
    """One user per sample: a history of random items and a target after it."""
    n_users = BATCHES * BATCH
    lengths = (torch.randn(n_users, generator=source) * 0.9 + 2.95).exp().clamp(1, LENGTH).long()
    users_E = torch.repeat_interleave(torch.arange(1, n_users + 1), lengths + 1)
    items_E = torch.randint(1, n_items + 1, (len(users_E),), generator=source)
    return append_events(Histories.empty(), Events.trainable(users_E, items_E), n_users)


def speed(n_items: int, epochs: int = 3) -> float:
    """Samples per CPU-second: the best epoch after the first."""
    source = torch.Generator().manual_seed(0)
    histories = histories_of(n_items, source)
    model = MODELS["comirec-dr"].build(0)
    assert isinstance(model, TrainedModel)
    model.grow(histories.n_users, n_items)
    targets = targets_at(histories, histories.offsets_U[2:] - 1)
    since, best = time.process_time(), 0.0
    for epoch, _ in enumerate(
        train(model, targets, epochs + 1, (0, 0), stored_interests=stored_interests_of(model, None, 0))
    ):
        now = time.process_time()
        best = max(best, len(targets) / (now - since)) if epoch else best
        since = time.process_time()
    return best


if __name__ == "__main__":
    torch.set_num_threads(1)
    sizes = [int(n) for n in sys.argv[1:]] or [12_000, 100_000, 300_000]
    print(
        json.dumps(
            {"benchmark": "step", "model": "comirec-dr", "samples_per_cpu_s": {n: round(speed(n)) for n in sizes}}
        )
    )
