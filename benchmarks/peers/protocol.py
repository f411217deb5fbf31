"""The task that every library solves. Uses numpy only, since each script runs in the environment of its library.

The last event of each user is the test target, the one before it the validation target. The others are for training. A
library scores all items, given the events before the target. Training stops when ndcg@20 on the validation targets has
not risen for `PATIENCE` epochs, or when `Data.limit` CPU seconds are spent. The best epoch is reported.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PATIENCE, MOST = 5, 60
LENGTH = 20  # events per history
K = 20


@dataclass(frozen=True)
class Data:
    """Events of users 1, 2, ... with items 1, 2, ...: user u has items[offsets[u - 1] : offsets[u]], oldest first."""

    offsets: Any
    items: Any
    n_items: int
    limit: float  # CPU seconds of training after which no epoch starts

    @property
    def n_users(self) -> int:
        return len(self.offsets) - 1

    def of(self, user: int, n_last: int) -> Any:
        """A user's events without the last `n_last`."""
        return self.items[self.offsets[user - 1] : self.offsets[user] - n_last]

    def training(self) -> tuple[Any, Any]:
        """Users and items of all training events."""
        parts = [self.of(user, 2) for user in range(1, self.n_users + 1)]
        return np.repeat(np.arange(1, self.n_users + 1), [len(part) for part in parts]), np.concatenate(parts)

    def targets(self, n_last: int) -> Any:
        """The target of each user: the event before the last `n_last` ones."""
        return self.items[self.offsets[1:] - n_last - 1]

    def histories(self, users: Any, n_last: int) -> Any:
        """The events before the target, shape (B, LENGTH), padded with 0 on the left."""
        rows = np.zeros((len(users), LENGTH), np.int64)
        for row, user in zip(rows, users):
            part = self.of(user, n_last + 1)[-LENGTH:]
            row[LENGTH - len(part) :] = part
        return rows


Score = Callable[[Any, Any], Any]  # (users (B,), histories (B, LENGTH)) -> (B, n_items + 1) scores; item 0 is none


def ranks(data: Data, score: Score, n_last: int) -> Any:
    """Rank of each target among all items, shape (n_users,); ties count half."""
    found = []
    for users in np.array_split(np.arange(1, data.n_users + 1), max(1, data.n_users // 256)):
        scores = np.asarray(score(users, data.histories(users, n_last)))[:, 1 : data.n_items + 1]
        target = scores[np.arange(len(users)), data.targets(n_last)[users - 1] - 1, None]
        found.append(0.5 + (scores > target).sum(1) + 0.5 * (scores == target).sum(1))  # the target ties with itself
    return np.concatenate(found)


def ndcg(rank: Any) -> Any:
    """ndcg@20 of each target, from its rank."""
    return (rank <= K) / np.log2(1 + rank)


def search(data: Data, epochs: Iterator[Any], score: Score) -> dict[str, Any]:
    """Train with `epochs` until the validation quality stops rising. Seconds are those of training only."""
    best, since_best, spent, found = -1.0, 0, 0.0, {}
    for n in range(1, MOST + 1):
        since = time.process_time()
        if next(epochs, StopIteration) is StopIteration:
            break
        spent += time.process_time() - since
        quality = float(ndcg(ranks(data, score, 1)).mean())
        print(f"epoch {n}: ndcg@20 {quality:.4f} after {spent:.1f} CPU-s", file=sys.stderr, flush=True)
        since_best += 1
        if quality > best:
            best, since_best = quality, 0
            found = {"epochs": n, "cpu_s": spent, "valid": quality, "ranks": ranks(data, score, 0).tolist()}
        if since_best >= PATIENCE or spent > data.limit:
            break
    return found | {"epochs_in_all": n, "cpu_s_in_all": spent, "limited": since_best < PATIENCE and spent > data.limit}


def once(train: Callable[[], Any]) -> Iterator[Any]:
    """The single epoch of a counting model."""
    yield train()


def main(run: Callable[[Data, str], dict[str, Any]]) -> None:
    """`python SCRIPT data.npz MODEL LIMIT out.json`"""
    path, model, limit, out = sys.argv[1:]
    part = np.load(path, allow_pickle=False)
    data = Data(part["offsets"], part["items"], int(part["n_items"]), float(limit))
    Path(out).write_text(json.dumps(run(data, model)))
