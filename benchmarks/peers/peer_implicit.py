"""implicit: BPR and ALS, trained epoch by epoch for a common stopping rule, and cosine item-kNN."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from implicit.als import AlternatingLeastSquares
from implicit.bpr import BayesianPersonalizedRanking
from implicit.nearest_neighbours import CosineRecommender
from protocol import Data, main, once, search
from scipy import sparse

STEP = 5  # epochs of implicit per step: one BPR epoch draws as many samples as there are events, and takes milliseconds


def run(data: Data, name: str) -> dict[str, Any]:
    users, items = data.training()
    counts_UI = sparse.csr_matrix(
        (np.ones(len(users), np.float32), (users, items)), (data.n_users + 1, data.n_items + 1)
    )
    if name == "item-knn":
        knn = CosineRecommender(K=100)

        def by_neighbours(users: Any, histories: Any) -> Any:
            pairs = [(row, item) for row, history in enumerate(histories) for item in history[history > 0]]
            rows, columns = np.array(pairs).T
            shape = (len(users), data.n_items + 1)
            history_UI = sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape)
            return (history_UI @ knn.similarity).toarray()

        return search(data, once(lambda: knn.fit(counts_UI, show_progress=False)), by_neighbours)
    spec: dict[str, Any] = {"factors": 64, "num_threads": 1, "random_state": 0}
    model = {
        "bpr": lambda: BayesianPersonalizedRanking(**spec, iterations=STEP),
        "als": lambda: AlternatingLeastSquares(**spec, iterations=1),
    }[name]()

    def epochs() -> Iterator[None]:
        while True:
            yield model.fit(counts_UI, show_progress=False)  # continues training

    def score(users: Any, histories: Any) -> Any:
        return model.user_factors[users] @ model.item_factors.T

    return search(data, epochs(), score)


if __name__ == "__main__":
    main(run)
