"""Which items of one version are near a user's vectors.

An item cannot score more than its length times the user's. So the longest come first, and where those that many users
had have grown long, a few thousand of them decide the lists, exactly. Where that is not so, all items are scored in
blocks, up to `SearchOptions.exact_max_items`; above it an inverted file (faiss) looks into the cells nearest to each
vector. All of it is measured on users of the version: how many lists the longest decide, and how many of the true best
items the cells hold, with as many cells as that takes. Where no number of cells is enough, all items are scored;
`SearchInfo` says it.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from freshrec.nn.layers import max_inner_product
from freshrec.nn.ranking import VectorSearch, top_k_exact
from freshrec.nn.scoring import item_vectors
from freshrec.random_streams import stream
from freshrec.recommender.lists import user_vector_batches
from freshrec.recommender.served_state import ServedState
from freshrec.types import VectorModel

ITEMS_PER_BLOCK = 2_048  # of the longest items, how many are scored at once
MIN_DECIDED_SHARE = 0.99  # share of lists that the longest must decide
N_SEEN_ALLOWANCE = 40  # best items that a user has had already, and that its list leaves out
ROUNDING_MARGIN = 1 + 1e-5  # a score may be larger than the product of the lengths, by rounding
LIST_LENGTH, N_SAMPLE_USERS = 20, 200  # items and users by which a search is measured
USERS_PER_BATCH = 16  # users measured at once: all need much memory
PROBE_COUNTS = (16, 32, 48, 64, 96, 128)  # cells, tried in this order
MIN_ITEMS_PER_CELL, MAX_CELLS = 300, 1024  # items in a cell, at the least; cells, at the most
TRAINING_ITEMS_PER_CELL = 64  # items of each cell, from which the cells are found


@dataclass(frozen=True)
class SearchOptions:
    """What decides how a version is searched."""

    exact_max_items: int = 50_000  # above it an index is faster than scoring all items (`freshrec bench serve`)
    min_recall: float = 0.98  # of the best LIST_LENGTH items, on average over users, an index must find
    n_longest: int = 16_384  # of more items, so many with the longest vectors are tried first; 0: none


DEFAULT_SEARCH = SearchOptions()
EXACT_SEARCH = SearchOptions(exact_max_items=sys.maxsize, n_longest=0)  # nothing is measured: all items are scored


@dataclass(frozen=True)
class SearchInfo:
    """How a version is searched."""

    how: str  # "candidates", "exact", "longest" or "index"
    why: str  # in words
    recall: float = 1.0  # of the best LIST_LENGTH items
    probes: int = 0  # cells looked into


def choose_search(
    served: ServedState, options: SearchOptions = DEFAULT_SEARCH
) -> tuple[VectorSearch | None, SearchInfo]:
    """How a version is searched, None where all items are scored, and what is to be said of it."""
    model = served.state.model
    if not isinstance(model, VectorModel):
        return None, SearchInfo("candidates", "the model offers candidates of its own")
    exact_info = SearchInfo("exact", f"all {model.n_items:,} items are scored")
    has_tail = 0 < options.n_longest < model.n_items
    if model.n_items <= options.exact_max_items and not has_tail:
        return None, exact_info
    vectors_QKD = _sample_user_vectors(served)
    if not len(vectors_QKD):
        return None, SearchInfo("exact", "no user has an event to measure a search with")
    if has_tail:
        search = longest_first_search(item_vectors(model), options.n_longest)
        n_Q = torch.full((len(vectors_QKD),), LIST_LENGTH + N_SEEN_ALLOWANCE)
        lists = [
            search(part_BKD, n_B)[0]
            for part_BKD, n_B in zip(vectors_QKD.split(USERS_PER_BATCH), n_Q.split(USERS_PER_BATCH))
        ]
        decided = float((torch.cat(lists) > 0).all(1).float().mean())
        if decided >= MIN_DECIDED_SHARE:
            reason = f"{options.n_longest:,} items with the longest vectors decide {decided:.1%} of the lists, exactly"
            return search, SearchInfo("longest", reason)
    if model.n_items <= options.exact_max_items:
        return None, exact_info
    index = build_index(item_vectors(model))
    all_N = torch.arange(1, model.n_items + 1)
    parts = [
        top_k_exact(item_vectors(model), part_BKD, LIST_LENGTH, None, all_N)[0]
        for part_BKD in vectors_QKD.split(USERS_PER_BATCH)
    ]
    best_QN = torch.cat(parts)
    recall = 0.0
    for probes in PROBE_COUNTS:
        search = index_search(index, item_vectors(model), probes)
        recall = measure_recall(search, vectors_QKD, best_QN)
        if recall >= options.min_recall:
            reason = (
                f"finds {recall:.1%} of the best {LIST_LENGTH} items, looking into {probes} of {index.nlist:,} cells"
            )
            return search, SearchInfo("index", reason, recall, probes)
    limit = f"less than {options.min_recall:.0%}"
    reason = f"an index finds {recall:.1%} of the best {LIST_LENGTH} items, {limit}: all are scored"
    return None, SearchInfo("exact", reason)


def build_index(items_ID: Tensor) -> Any:
    """An inverted file over the rows from 1; half precision is enough to find, as scores are made from the vectors."""
    rows_ID = np.ascontiguousarray(items_ID[1:].numpy())
    n_cells = max(1, min(MAX_CELLS, len(rows_ID) // MIN_ITEMS_PER_CELL))
    index: Any = faiss.index_factory(rows_ID.shape[1], f"IVF{n_cells},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid, index.cp.seed = TRAINING_ITEMS_PER_CELL, 1234
    index.train(rows_ID)
    index.add_with_ids(rows_ID, np.arange(1, len(rows_ID) + 1))
    with tempfile.TemporaryDirectory() as folder:  # cells that grew have room to spare; those that are read have none
        faiss.write_index(index, f"{folder}/index")
        del index
        return faiss.read_index(f"{folder}/index")


def longest_first_search(items_ID: Tensor, n_longest: int) -> VectorSearch:
    """Searches the longest of the items; what it finds is exact. No row of users for whom these do not decide."""
    length_H, at_H = items_ID[1:].norm(dim=1).topk(min(n_longest, len(items_ID) - 1))
    row_H = at_H + 1
    items_HD = items_ID[row_H]
    # the longest of what comes after each block; after the last one nothing is known to be shorter than its last item
    next_lengths = [
        *length_H[ITEMS_PER_BLOCK::ITEMS_PER_BLOCK].tolist(),
        float(length_H[-1]) if len(row_H) < len(items_ID) - 1 else -torch.inf,
    ]

    def search(vectors_BKD: Tensor, n_B: Tensor) -> tuple[Tensor, Tensor]:
        n, last_B1 = int(n_B.max()), n_B[:, None] - 1
        reach_B = vectors_BKD.norm(dim=2).amax(1) * ROUNDING_MARGIN
        score_BN, row_BN = torch.zeros(len(reach_B), 0), torch.zeros(len(reach_B), 0, dtype=torch.int64)
        decided_B = torch.zeros(len(reach_B), dtype=torch.bool)
        for items_SD, row_S, beyond in zip(items_HD.split(ITEMS_PER_BLOCK), row_H.split(ITEMS_PER_BLOCK), next_lengths):
            score_BC = torch.cat([score_BN, max_inner_product(vectors_BKD, items_SD)], 1)
            score_BN, at_BN = score_BC.topk(min(n, score_BC.shape[1]))
            row_BN = torch.cat([row_BN, row_S.expand(len(row_BN), -1)], 1).gather(1, at_BN)
            lowest_B = score_BN.gather(1, last_B1.clamp(max=row_BN.shape[1] - 1))[:, 0]
            decided_B = (lowest_B > reach_B * beyond) & (n_B <= row_BN.shape[1])
            if bool(decided_B.all()):
                break
        return row_BN * decided_B[:, None], score_BN

    return search


def index_search(index: Any, items_ID: Tensor, probes: int) -> VectorSearch:
    """Searches an index, in so many cells of each vector; what it finds is scored by the vectors themselves."""

    def search(vectors_BKD: Tensor, n_B: Tensor) -> tuple[Tensor, Tensor]:
        n = int(n_B.max())
        n_users, n_vectors, n_dims = vectors_BKD.shape
        queries = np.ascontiguousarray(vectors_BKD.reshape(-1, n_dims).numpy())
        # more than asked for: places of half precision are not quite those of the scores
        params = faiss.SearchParametersIVF(nprobe=min(probes, index.nlist))  # type: ignore[call-arg]
        _, found = index.search(queries, n + n // 4 + 4, params=params)
        found_BC = torch.from_numpy(found).clamp(min=0).view(n_users, n_vectors * found.shape[1]).sort(1).values
        repeated_BC = torch.zeros_like(found_BC, dtype=torch.bool)
        repeated_BC[:, 1:] = found_BC[:, 1:] == found_BC[:, :-1]
        return found_BC.masked_fill(repeated_BC, 0), max_inner_product(vectors_BKD, items_ID[found_BC])

    return search


def measure_recall(search: VectorSearch, vectors_QKD: Tensor, best_QN: Tensor) -> float:
    """The share of each user's best items that are among those found."""
    found_QC, _ = search(vectors_QKD, torch.full((len(vectors_QKD),), best_QN.shape[1]))
    return float((best_QN[..., None] == found_QC[:, None]).any(2).float().mean())


def _sample_user_vectors(served: ServedState) -> Tensor:
    """(Q, K, D) vectors of some users who have events, as a list would be made for them now."""
    active_users_U = (served.current_state.histories.offsets_U.diff() > 0).nonzero()[:, 0]
    order_U = torch.randperm(len(active_users_U), generator=stream(0, "index queries"))
    users_N = active_users_U[order_U[:N_SAMPLE_USERS]]
    found = [vectors_BKD for _, _, vectors_BKD in user_vector_batches(served, users_N)]
    return torch.cat(found) if found else torch.zeros(0, 1, 1)
