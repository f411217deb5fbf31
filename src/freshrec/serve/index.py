"""An index over the item vectors of one version: which items may be near a user's vectors. Scores are made elsewhere.

Up to EXACT items all are scored, in blocks. Above it an inverted file (faiss) looks into the cells nearest to each
vector; how many of the true best items it finds is measured on users of the version, with as many cells as that takes.
Where no number of cells is enough, all items are scored, and `Searching` says so.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from freshrec.models.ranking import Search, top_exact
from freshrec.serve.recommend import Served, vectors_of_users
from freshrec.types import VectorModel

EXACT = 50_000  # items: above it an index answers sooner than all scores are made (`freshrec bench serve`)
FLOOR = 0.98  # of the best LIST items, on average over users, an index must find
LIST, ASKED = 20, 200  # items, and users, by which it is measured
PROBES = (16, 32, 48, 64, 96, 128)  # cells, tried in this order
PER_CELL, CELLS = 300, 1024  # items in a cell, at the least; cells, at the most
TRAINED_ON = 64  # items of each cell, from which the cells are found


@dataclass(frozen=True)
class Searching:
    """How a version is searched."""

    how: str  # "candidates", "exact" or "index"
    why: str  # in words
    recall: float = 1.0  # of the best LIST items
    probes: int = 0  # cells looked into


def searching(served: Served, exact: int = EXACT, floor: float = FLOOR) -> tuple[Search | None, Searching]:
    """The index of a version, or None where all items are scored, and what is to be said of it."""
    model = served.state.model
    if not isinstance(model, VectorModel):
        return None, Searching("candidates", "the model offers candidates of its own")
    if model.n_items <= exact:
        return None, Searching("exact", f"all {model.n_items:,} items are scored")
    vectors_QKD = _asked(served)
    if not len(vectors_QKD):
        return None, Searching("exact", "no user has an event to measure an index with")
    index = built(model.item_vectors())
    all_N = torch.arange(1, model.n_items + 1)
    parts = [top_exact(model.item_vectors(), part_BKD, LIST, None, all_N)[0] for part_BKD in vectors_QKD.split(16)]
    best_QN = torch.cat(parts)
    recall = 0.0
    for probes in PROBES:
        recall = recall_of(through(index, probes), vectors_QKD, best_QN)
        if recall >= floor:
            why = f"finds {recall:.1%} of the best {LIST} items, looking into {probes} of {index.nlist:,} cells"
            return through(index, probes), Searching("index", why, recall, probes)
    why = f"an index finds no more than {recall:.1%} of the best {LIST} items, less than {floor:.0%}: all are scored"
    return None, Searching("exact", why)


def built(items_ID: Tensor) -> Any:
    """An inverted file over the rows from 1; half precision is enough to find, as scores are made from the vectors."""
    rows_ID = np.ascontiguousarray(items_ID[1:].numpy())
    n_cells = max(1, min(CELLS, len(rows_ID) // PER_CELL))
    index: Any = faiss.index_factory(rows_ID.shape[1], f"IVF{n_cells},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid, index.cp.seed = TRAINED_ON, 1234
    index.train(rows_ID)
    index.add_with_ids(rows_ID, np.arange(1, len(rows_ID) + 1))
    with tempfile.TemporaryDirectory() as folder:  # cells that grew have room to spare; those that are read have none
        faiss.write_index(index, f"{folder}/index")
        del index
        return faiss.read_index(f"{folder}/index")


def through(index: Any, probes: int) -> Search:
    """Searches an index, in so many cells of each vector."""

    def search(vectors_BKD: Tensor, n: int) -> Tensor:
        n_users, n_vectors, n_dims = vectors_BKD.shape
        queries = np.ascontiguousarray(vectors_BKD.reshape(-1, n_dims).numpy())
        # more than asked for: places of half precision are not quite those of the scores
        params = faiss.SearchParametersIVF(nprobe=min(probes, index.nlist))  # type: ignore[call-arg]
        _, found = index.search(queries, n + n // 4 + 4, params=params)
        return torch.from_numpy(found).clamp(min=0).view(n_users, n_vectors * found.shape[1])

    return search


def recall_of(search: Search, vectors_QKD: Tensor, best_QN: Tensor) -> float:
    """The share of each user's best items that are among those found."""
    found_QC = search(vectors_QKD, best_QN.shape[1])
    return float((best_QN[..., None] == found_QC[:, None]).any(2).float().mean())


def _asked(served: Served) -> Tensor:
    """(Q, K, D) vectors of some users who have events, as they would be asked now."""
    have_U = (served.now.recent.offsets_U.diff() > 0).nonzero()[:, 0]
    users_N = have_U[torch.randperm(len(have_U), generator=torch.Generator().manual_seed(0))[:ASKED]]
    found = [vectors_BKD for _, _, vectors_BKD in vectors_of_users(served, users_N)]
    return torch.cat(found) if found else torch.zeros(0, 1, 1)
