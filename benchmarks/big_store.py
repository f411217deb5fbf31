"""Make the store for serving benchmarks: 300,000 items, 100,000 users with 4 to 9 interests, trained vectors.

python benchmarks/big_store.py FOLDER [--items 300000] [--users 100000] [--epochs 1]

Each user draws sessions from a few of 2,000 topics. ComiRec-DR is trained on these events. The trained model then reads
a random number of interests (4 to 9) from the events of each user.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import torch

from freshrec.data.batches import history_ends, history_items
from freshrec.nn.scoring import user_vectors
from freshrec.recommender.recommender import Recommender
from freshrec.types import Batch, Interests

TOPICS, EVENTS, D = 2000, 15, 64
START = 1_735_689_600_000_000  # 2025-01-01, in microseconds


def log_of(n_users: int, n_items: int) -> pl.DataFrame:
    """Events of users who like a few topics each. Items of a topic have popularities; each occurs at least once."""
    source = np.random.default_rng(0)
    topic_I = np.sort(source.integers(0, TOPICS, n_items))
    first_T = np.searchsorted(topic_I, np.arange(TOPICS + 1))
    likes_UK = source.zipf(1.3, (n_users, 9)) % TOPICS
    users_E = np.repeat(np.arange(n_users), EVENTS)
    kept_U = source.integers(2, 9, n_users)
    topic_E = likes_UK[users_E, source.integers(0, 1 << 30, len(users_E)) % kept_U[users_E]]
    size_E = np.maximum(first_T[topic_E + 1] - first_T[topic_E], 1)
    items_E = first_T[topic_E] + (size_E * source.random(len(users_E)) ** 2).astype(int)
    missing = np.setdiff1d(np.arange(n_items), items_E)
    items_E = np.concatenate([np.minimum(items_E, n_items - 1), missing])
    users_E = np.concatenate([users_E, source.integers(0, n_users, len(missing))])
    order = source.permutation(len(users_E))
    times = START + np.arange(len(order)) * 1_000_000
    return pl.DataFrame({"user_id": users_E[order], "item_id": items_E[order], "timestamp": times})


def with_interests(recommender: Recommender) -> Recommender:
    """The recommender with 4 to 9 interests per user, which the model reads from the user's events."""
    contents = recommender.bundle
    state = contents.served.state
    model, n_users = state.model, state.histories.n_users
    n_U = torch.from_numpy(np.random.default_rng(1).integers(4, 10, n_users + 1))
    n_U[0] = 0
    offsets_U = torch.cat([torch.zeros(1, dtype=torch.int64), n_U.cumsum(0)])
    vectors_SD = torch.zeros(int(n_U.sum()), D)
    for n in range(4, 10):
        for users_B in (n_U == n).nonzero()[:, 0].split(1024):
            history_BT = history_items(history_ends(state.histories, users_B, "recent"), model.spec.length)
            alive_BK = torch.ones(len(users_B), n, dtype=torch.bool)
            slots_BKD = model.initial_interests(n).expand(len(users_B), -1, -1)
            batch = Batch(users_B, history_BT, interests_BKD=slots_BKD, alive_BK=alive_BK, old_BK=~alive_BK)
            rows = (offsets_U[users_B][:, None] + torch.arange(n)).flatten()
            vectors_SD[rows] = user_vectors(model, batch).flatten(0, 1)
    zeros = torch.zeros(len(vectors_SD), dtype=torch.int32)
    users = Interests(vectors_SD, offsets_U, zeros, zeros.clone())
    served = replace(contents.served, state=replace(state, interests=users))
    return Recommender.from_bundle(replace(contents, served=served))


def main() -> None:
    """Train, and save two versions that are one update apart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=300_000)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()
    since = time.process_time()
    frame = log_of(arguments.users, arguments.items)
    way = f"finetune:fit.base_epochs={arguments.epochs}:fit.epochs=1"
    recommender = Recommender(f"comirec-dr:d={D}:k=4:k_max=9", way).fit(frame[:-20_000])
    print(f"trained on {len(frame):,} events, {time.process_time() - since:.0f} CPU-s")
    with_interests(recommender).save(arguments.folder)
    with_interests(recommender.update(frame[-20_000:])).save(arguments.folder)
    print(f"two versions in {arguments.folder}, {time.process_time() - since:.0f} CPU-s")


if __name__ == "__main__":
    main()
