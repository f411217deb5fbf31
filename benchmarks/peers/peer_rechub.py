"""torch-rechub: MIND, ComirecDR and ComirecSA as in its examples (list-wise softmax), with our sizes.

d = 64, four interests, 20 negatives per row (its examples have 3), Adam with lr 0.001 (its examples: 0.0001).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from protocol import LENGTH, MOST, Data, main, search
from torch_rechub.basic.features import SequenceFeature, SparseFeature
from torch_rechub.models.matching import MIND, ComirecDR, ComirecSA
from torch_rechub.trainers import MatchTrainer
from torch_rechub.utils.data import MatchDataGenerator

D, NEGATIVES, BATCH = 64, 20, 256


def samples(data: Data) -> dict[str, Any]:
    """One row for each event that has an earlier one."""
    users, histories, items = [], [], []
    for user in range(1, data.n_users + 1):
        mine = data.of(user, 2)
        for place in range(1, len(mine)):
            row = np.zeros(LENGTH, np.int64)
            row[: min(place, LENGTH)] = mine[max(0, place - LENGTH) : place]
            users.append(user)
            histories.append(row)
            items.append(mine[place])
    return {"user_id": np.array(users), "hist_item_id": np.stack(histories), "item_id": np.array(items)}


def run(data: Data, name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    source = np.random.default_rng(0)
    n = data.n_items + 1
    shared = {"embed_dim": D, "pooling": "concat", "shared_with": "item_id"}
    of_user = [SparseFeature("user_id", data.n_users + 1, D)]
    of_history, of_item = [SequenceFeature("hist_item_id", n, **shared)], [SparseFeature("item_id", n, D)]
    of_others = [SequenceFeature("neg_items", n, **shared)]
    parts = of_user, of_history, of_item, of_others
    model = {
        "mind": lambda: MIND(*parts, max_length=LENGTH),
        "comirec-dr": lambda: ComirecDR(*parts, max_length=LENGTH),
        "comirec-sa": lambda: ComirecSA(*parts),
    }[name]()
    trainer = MatchTrainer(model, mode=2, optimizer_params={"lr": 1e-3, "weight_decay": 1e-6})
    x = samples(data)

    def epochs() -> Iterator[float]:
        for _ in range(MOST):
            x["neg_items"] = source.integers(1, n, (len(x["item_id"]), NEGATIVES))
            loader = MatchDataGenerator(x, np.zeros(len(x["item_id"]), np.int64)).generate_dataloader(
                x, x, batch_size=BATCH, num_workers=0
            )[0]
            yield trainer.train_one_epoch(loader)

    def score(users: Any, histories: Any) -> Any:
        left = np.zeros_like(histories)  # its examples pad on the right
        for row, history in zip(left, histories):
            m = int((history > 0).sum())
            row[:m] = history[LENGTH - m :]
        model.eval()
        with torch.no_grad():
            model.mode = "user"
            vectors = model({"user_id": torch.from_numpy(users), "hist_item_id": torch.from_numpy(left)})
            model.mode = "item"
            items = model({"item_id": torch.arange(n)})
            model.mode = None
        return (vectors @ items.T).amax(1).numpy()

    return search(data, epochs(), score)


if __name__ == "__main__":
    main(run)
