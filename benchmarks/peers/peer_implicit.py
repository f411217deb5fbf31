"""implicit: BPR and ALS (epoch by epoch, so that all stop by the same rule), and its cosine item-kNN."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from implicit.als import AlternatingLeastSquares
from implicit.bpr import BayesianPersonalizedRanking
from implicit.nearest_neighbours import CosineRecommender
from protocol import Data, main, once, search
from scipy import sparse

STEP = 5  # epochs of theirs that count as one: a pass of BPR is a draw of as many events, and takes milliseconds


def run(data: Data, name: str) -> dict[str, Any]:
    users, items = data.training()
    taken = sparse.csr_matrix((np.ones(len(users), np.float32), (users, items)), (data.n_users + 1, data.n_items + 1))
    if name == "item-knn":
        knn = CosineRecommender(K=100)

        def by_neighbours(users: Any, histories: Any) -> Any:
            asked = [(row, item) for row, history in enumerate(histories) for item in history[history > 0]]
            rows, columns = np.array(asked).T
            shape = (len(users), data.n_items + 1)
            mine = sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape)
            return (mine @ knn.similarity).toarray()

        return search(data, once(lambda: knn.fit(taken, show_progress=False)), by_neighbours)
    spec: dict[str, Any] = {"factors": 64, "num_threads": 1, "random_state": 0}
    model = {
        "bpr": lambda: BayesianPersonalizedRanking(**spec, iterations=STEP),
        "als": lambda: AlternatingLeastSquares(**spec, iterations=1),
    }[name]()

    def epochs() -> Iterator[None]:
        while True:
            yield model.fit(taken, show_progress=False)  # goes on from where it is

    def score(users: Any, histories: Any) -> Any:
        return model.user_factors[users] @ model.item_factors.T

    return search(data, epochs(), score)


if __name__ == "__main__":
    main(run)
