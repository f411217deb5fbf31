"""RecBole: its SASRec and GRU4Rec with its own defaults (cross-entropy over all items, d = 64), but for the batch.

Its batch of 2,048 rows would leave three steps an epoch on a sample like this; 256 are learnt from in far fewer passes.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol import LENGTH, MOST, Data, main, search
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.interaction import Interaction
from recbole.utils import get_model, get_trainer, init_seed


def run(data: Data, name: str) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    (folder / "log").mkdir()
    rows = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(1, data.n_users + 1):
        rows += [f"{user}\t{item}\t{place}" for place, item in enumerate(data.of(user, 0))]
    (folder / "log" / "log.inter").write_text("\n".join(rows) + "\n")
    config = Config(
        model=name,
        dataset="log",
        config_dict={
            "data_path": str(folder), "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
            "train_neg_sample_args": None, "train_batch_size": 256, "MAX_ITEM_LIST_LENGTH": LENGTH,
            "use_gpu": False, "show_progress": False,
            "checkpoint_dir": str(folder), "epochs": MOST, "state": "ERROR", "seed": 0,
        },
    )  # fmt: skip
    init_seed(0, True)
    dataset = create_dataset(config)
    training, _, _ = data_preparation(config, dataset)
    model = get_model(name)(config, training.dataset)
    trainer = get_trainer(config["MODEL_TYPE"], name)(config, model)
    theirs = np.zeros(data.n_items + 1, np.int64)  # item -> the number that RecBole gave it
    known = np.unique(data.items)
    theirs[known] = dataset.token2id("item_id", known.astype(str))

    def score(users: Any, histories: Any) -> Any:
        model.eval()
        length = (histories > 0).sum(1)
        ordered = np.zeros_like(histories)  # RecBole pads on the right
        for row, history, n in zip(ordered, histories, length):
            row[:n] = theirs[history[LENGTH - n :]]
        asked = {"item_id_list": torch.from_numpy(ordered), "item_length": torch.from_numpy(length)}
        with torch.no_grad():
            return model.full_sort_predict(Interaction(asked)).numpy()[:, theirs]

    def epochs() -> Iterator[float]:
        for n in range(MOST):
            yield trainer._train_epoch(training, n)

    return search(data, epochs(), score)


if __name__ == "__main__":
    main(run)
