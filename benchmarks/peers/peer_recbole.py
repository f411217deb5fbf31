"""RecBole: SASRec and GRU4Rec with its default options (cross-entropy over all items, d = 64) except the batch size.

Its default of 2,048 rows gives three steps per epoch on a sample of this size. 256 needs far fewer epochs.
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
    numbers_I = np.zeros(data.n_items + 1, np.int64)  # item -> its number in RecBole
    known = np.unique(data.items)
    numbers_I[known] = dataset.token2id("item_id", known.astype(str))

    def score(users: Any, histories: Any) -> Any:
        model.eval()
        length = (histories > 0).sum(1)
        ordered = np.zeros_like(histories)  # RecBole pads on the right
        for row, history, n in zip(ordered, histories, length):
            row[:n] = numbers_I[history[LENGTH - n :]]
        inputs = {"item_id_list": torch.from_numpy(ordered), "item_length": torch.from_numpy(length)}
        with torch.no_grad():
            return model.full_sort_predict(Interaction(inputs)).numpy()[:, numbers_I]

    def epochs() -> Iterator[float]:
        for n in range(MOST):
            yield trainer._train_epoch(training, n)

    return search(data, epochs(), score)


if __name__ == "__main__":
    main(run)
