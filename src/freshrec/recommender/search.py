"""Search for the items with the highest inner products with a user's vectors, in one version.

There are three methods, tried in this order on a sample of the version's users:

- "longest": score(item) <= |item| |user|, so the longest item vectors come first. Vectors of popular items are often
  long. A few thousand of them then decide every list exactly.
- "exact": score all items in blocks, up to `SearchOptions.exact_max_items` items.
- "index": an inverted file (faiss) probes the cells nearest to each vector. The number of cells is the smallest one
  with enough recall. If no number is enough, all items are scored.

`SearchInfo` reports the choice.
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

ITEMS_PER_BLOCK = 2_048  # longest items scored at once
MIN_DECIDED_SHARE = 0.99  # minimum share of lists that the longest items decide
N_SEEN_ALLOWANCE = 40  # extra items per list in the measurement, because lists leave out seen items
ROUNDING_MARGIN = 1 + 1e-5  # by rounding, a score can exceed the product of the norms
LIST_LENGTH, N_SAMPLE_USERS = 20, 200  # items and users on which a search is measured
USERS_PER_BATCH = 16  # users measured at once, to limit memory
PROBE_COUNTS = (16, 32, 48, 64, 96, 128)  # numbers of cells, tried in this order
MIN_ITEMS_PER_CELL, MAX_CELLS = 300, 1024  # mean items per cell, and number of cells
TRAINING_ITEMS_PER_CELL = 64  # sampled items per cell for k-means


@dataclass(frozen=True)
class SearchOptions:
    """Options of the search for the best items of a version."""

    exact_max_items: int = 50_000  # Score all items up to this number; above it an index is faster.
    min_recall: float = 0.98  # Minimum share of the best 20 items that an index must find, from 0 to 1.
    n_longest: int = 16_384  # Number of items with the longest vectors to try first; 0 = off.


DEFAULT_SEARCH = SearchOptions()
EXACT_SEARCH = SearchOptions(exact_max_items=sys.maxsize, n_longest=0)  # scores all items, without measurement


@dataclass(frozen=True)
class SearchInfo:
    """The search method of a version, and the reason."""

    how: str  # "candidates", "exact", "longest" or "index"
    why: str  # in words
    recall: float = 1.0  # share of the best LIST_LENGTH items that are found
    probes: int = 0  # cells probed per vector


def choose_search(
    served: ServedState, options: SearchOptions = DEFAULT_SEARCH
) -> tuple[VectorSearch | None, SearchInfo]:
    """Choose the search for a version (None = score all items), and describe the choice."""
    model = served.state.model
    if not isinstance(model, VectorModel):
        return None, SearchInfo("candidates", "the model scores items itself, without vectors")
    exact_info = SearchInfo("exact", f"all {model.n_items:,} items are scored")
    has_tail = 0 < options.n_longest < model.n_items
    if model.n_items <= options.exact_max_items and not has_tail:
        return None, exact_info
    vectors_QKD = _sample_user_vectors(served)
    if not len(vectors_QKD):
        return None, SearchInfo("exact", "no user has events, so no search can be measured")
    if has_tail:
        search = longest_first_search(item_vectors(model), options.n_longest)
        n_Q = torch.full((len(vectors_QKD),), LIST_LENGTH + N_SEEN_ALLOWANCE)
        lists = [
            search(part_BKD, n_B)[0]
            for part_BKD, n_B in zip(vectors_QKD.split(USERS_PER_BATCH), n_Q.split(USERS_PER_BATCH))
        ]
        decided = float((torch.cat(lists) > 0).all(1).float().mean())
        if decided >= MIN_DECIDED_SHARE:
            reason = f"the {options.n_longest:,} longest item vectors decide {decided:.1%} of the lists exactly"
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
                f"the index finds {recall:.1%} of the best {LIST_LENGTH} items in {probes} of {index.nlist:,} cells"
            )
            return search, SearchInfo("index", reason, recall, probes)
    limit = f"less than {options.min_recall:.0%}"
    reason = f"an index finds {recall:.1%} of the best {LIST_LENGTH} items, {limit}, so all items are scored"
    return None, SearchInfo("exact", reason)


def build_index(items_ID: Tensor) -> Any:
    """Build an inverted file over rows 1, 2, ... in half precision. Final scores use the full vectors."""
    rows_ID = np.ascontiguousarray(items_ID[1:].numpy())
    n_cells = max(1, min(MAX_CELLS, len(rows_ID) // MIN_ITEMS_PER_CELL))
    index: Any = faiss.index_factory(rows_ID.shape[1], f"IVF{n_cells},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid, index.cp.seed = TRAINING_ITEMS_PER_CELL, 1234
    index.train(rows_ID)
    index.add_with_ids(rows_ID, np.arange(1, len(rows_ID) + 1))
    with tempfile.TemporaryDirectory() as folder:  # a written and read index has no spare capacity
        faiss.write_index(index, f"{folder}/index")
        del index
        return faiss.read_index(f"{folder}/index")


def longest_first_search(items_ID: Tensor, n_longest: int) -> VectorSearch:
    """Return an exact search over the longest items. It returns item 0 for a user whose list they do not decide."""
    length_H, at_H = items_ID[1:].norm(dim=1).topk(min(n_longest, len(items_ID) - 1))
    row_H = at_H + 1
    items_HD = items_ID[row_H]
    # Upper bound of the norms after each block. After the last block, it is the norm of the last item.
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
    """Return a search that probes `probes` cells of an index per vector. Scores are exact inner products."""

    def search(vectors_BKD: Tensor, n_B: Tensor) -> tuple[Tensor, Tensor]:
        n_users, n_vectors, n_dims = vectors_BKD.shape
        queries = np.ascontiguousarray(vectors_BKD.reshape(-1, n_dims).numpy())
        # Fetch more than n items, because ranks in half precision differ slightly from the exact ones.
        params = faiss.SearchParametersIVF(nprobe=min(probes, index.nlist))  # type: ignore[call-arg]
        n_found_B = n_B + n_B // 4 + 4
        found = torch.from_numpy(index.search(queries, int(n_found_B.max()), params=params)[1])
        found_BKC = found.clamp(min=0).view(n_users, n_vectors, -1)
        is_requested_BC = torch.arange(found_BKC.shape[2]) < n_found_B[:, None]  # a list does not depend on other users
        found_BC = (found_BKC * is_requested_BC[:, None]).flatten(1).sort(1).values
        repeated_BC = torch.zeros_like(found_BC, dtype=torch.bool)
        repeated_BC[:, 1:] = found_BC[:, 1:] == found_BC[:, :-1]
        return found_BC.masked_fill(repeated_BC, 0), max_inner_product(vectors_BKD, items_ID[found_BC])

    return search


def measure_recall(search: VectorSearch, vectors_QKD: Tensor, best_QN: Tensor) -> float:
    """Share of the best items that a search finds, averaged over users."""
    found_QC, _ = search(vectors_QKD, torch.full((len(vectors_QKD),), best_QN.shape[1]))
    return float((best_QN[..., None] == found_QC[:, None]).any(2).float().mean())


def _sample_user_vectors(served: ServedState) -> Tensor:
    """Current vectors of a random sample of users with events, shape (Q, K, D)."""
    active_users_U = (served.current_state.histories.offsets_U.diff() > 0).nonzero()[:, 0]
    order_U = torch.randperm(len(active_users_U), generator=stream(0, "index queries"))
    users_N = active_users_U[order_U[:N_SAMPLE_USERS]]
    found = [vectors_BKD for _, _, vectors_BKD in user_vector_batches(served, users_N)]
    return torch.cat(found) if found else torch.zeros(0, 1, 1)
