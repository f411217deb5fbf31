"""Vector search: lists are exact or nearly so, never too short, and the recall is measured."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from serving import items, server, stored
from torch import Tensor

from freshrec.data.catalog import Catalog
from freshrec.data.histories import append_events
from freshrec.models.multi_interest import InterestSpec
from freshrec.models.popularity import PopularitySpec
from freshrec.nn.ranking import Exclusions, top_k, top_k_exact
from freshrec.nn.scoring import item_vectors, user_vectors
from freshrec.recommender import search as module
from freshrec.recommender.search import (
    SearchOptions,
    build_index,
    choose_search,
    index_search,
    longest_first_search,
    measure_recall,
)
from freshrec.recommender.served_state import ServedState
from freshrec.types import Batch, Events, Histories, State

N, D, K = 6000, 16, 4


def clustered(n: int = N) -> Tensor:
    """Item vectors in 60 clusters, as trained vectors are; row 0 is padding."""
    source = torch.Generator().manual_seed(1)
    centres = torch.randn(60, D, generator=source)
    items_ID = centres[torch.randint(60, (n,), generator=source)] + 0.3 * torch.randn(n, D, generator=source)
    return torch.cat([torch.zeros(1, D), items_ID])


def isotropic(n: int = N) -> Tensor:
    """Vectors without clusters, the worst case of an index."""
    return torch.cat([torch.zeros(1, D), torch.randn(n, D, generator=torch.Generator().manual_seed(1))])


def served_of(items_ID: Tensor) -> ServedState:
    """A model with these item vectors, and 300 users with 12 events each."""
    model = InterestSpec(d=D, k=K).build(0)
    model.grow(300, len(items_ID) - 1)
    model.items.packed[:, :D] = items_ID
    source = torch.Generator().manual_seed(2)
    users_E = torch.arange(1, 301).repeat_interleave(12)
    events = Events.trainable(users_E, torch.randint(1, len(items_ID), (len(users_E),), generator=source))
    recent = append_events(Histories.empty(), events, 300)
    counts = State(PopularitySpec().build(0))
    counts.model.grow(300, len(items_ID) - 1)
    none = Catalog.empty()
    return ServedState(State(model, histories=recent), State(counts.model, histories=recent), none, none)


def query_batch(served: ServedState, n: int = 40) -> Batch:
    recent = served.state.histories
    history_BT = torch.stack([recent.items_R[recent.offsets_U[u] : recent.offsets_U[u + 1]] for u in range(1, n + 1)])
    return Batch(torch.arange(1, n + 1), history_BT.long())


@pytest.fixture(autouse=True)
def small_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_ITEMS_PER_CELL", 20)


def test_small_catalogues_are_searched_exactly_and_large_ones_by_an_index() -> None:
    served = served_of(clustered())
    assert choose_search(served)[0] is None and choose_search(served)[1].how == "exact"
    search, about = choose_search(served, SearchOptions(exact_max_items=1000))
    assert search is not None and about.how == "index" and about.recall >= 0.98
    batch = query_batch(served)
    exact, _ = top_k(served.state.model, batch, 20)
    found, _ = top_k(served.state.model, batch, 20, search=search)
    shared = (exact[..., None] == found[:, None]).any(2).float().mean()
    assert shared >= 0.98


def test_recall_is_the_share_of_the_best_items_that_are_found() -> None:
    best_QN = torch.tensor([[1, 2], [3, 4]])
    found = torch.tensor([[2, 9, 1], [7, 3, 3]])
    recall = measure_recall(lambda vectors_QKD, n: (found, found), torch.zeros(2, 1, 1), best_QN)
    assert recall == 0.75  # 1, 2 and 3 are found, 4 is not


def test_scores_and_order_are_exact_and_no_item_is_repeated() -> None:
    served = served_of(clustered())
    model, batch = served.state.model, query_batch(served)
    items_BK, scores_BK = top_k(
        model, batch, 30, search=index_search(build_index(item_vectors(model)), item_vectors(model), 8)
    )
    vectors_BKD = user_vectors(model, batch)
    for row in range(len(batch)):
        chosen = items_BK[row].tolist()
        assert len(set(chosen)) == 30
        by_hand = [float((vectors_BKD[row] @ item_vectors(model)[item]).max()) for item in chosen]
        assert scores_BK[row].tolist() == pytest.approx(by_hand, abs=1e-5)
        assert by_hand == sorted(by_hand, reverse=True)


def test_filters_never_shorten_a_list() -> None:
    # Every item that the index finds with one probe is excluded. The user gets other items.
    served = served_of(clustered(600))
    model, batch = served.state.model, query_batch(served, 5)
    search = index_search(build_index(item_vectors(model)), item_vectors(model), 1)
    banned_BM, _ = search(user_vectors(model, batch), torch.full((5,), 600))
    items_BK, scores_BK = top_k(model, batch, 20, Exclusions.from_padded(banned_BM), search=search)
    exact_BK, _ = top_k_exact(
        item_vectors(model), user_vectors(model, batch), 20, Exclusions.from_padded(banned_BM), torch.arange(1, 601)
    )
    assert bool(torch.isfinite(scores_BK).all()) and torch.equal(items_BK, exact_BK)
    nearly_all_BM = torch.arange(1, 596).expand(5, -1)  # five items are left, fewer than k
    items_BK, scores_BK = top_k(model, batch, 20, Exclusions.from_padded(nearly_all_BM), search=search)
    assert torch.isfinite(scores_BK).sum(1).tolist() == [5] * 5


def test_all_items_are_scored_if_no_number_of_cells_is_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PROBE_COUNTS", (1, 2))
    search, about = choose_search(served_of(isotropic()), SearchOptions(exact_max_items=1000))
    assert search is None and about.how == "exact" and "less than 98%" in about.why
    monkeypatch.setattr(module, "PROBE_COUNTS", (1, 300))
    search, about = choose_search(served_of(isotropic()), SearchOptions(exact_max_items=1000))
    assert search is not None and about.probes == 300 and about.recall >= 0.98  # more cells are enough


def some_long(n: int = N) -> Tensor:
    """Vectors without clusters. Every twentieth is long, like that of a popular item."""
    items_ID = isotropic(n)
    items_ID[1::20] *= 5.0
    return items_ID


@given(st.integers(0, 2**32), st.integers(1, 60), st.sampled_from([1, 40, 300, 5000]))
def test_a_list_that_the_longest_items_decide_is_exact(seed: int, n: int, head: int) -> None:
    # Many norms are equal, so items after the last block may tie with those that were found.
    source = torch.Generator().manual_seed(seed)
    items_ID = torch.randint(-3, 4, (2000, 3), generator=source).float()
    items_ID[0] = 0.0
    vectors_BKD = torch.randint(-2, 3, (5, 3, 3), generator=source).float()
    found_BN, own_BN = longest_first_search(items_ID, head)(vectors_BKD, torch.full((5,), n))
    exact_BN, scores_BN = top_k_exact(items_ID, vectors_BKD, n, None, torch.arange(1, 2000))
    for row in range(5):
        if bool((found_BN[row] == 0).any()):
            assert bool((found_BN[row] == 0).all())  # a list is complete or empty
        else:
            assert len(set(found_BN[row].tolist())) == n
            assert torch.equal((vectors_BKD[row] @ items_ID[found_BN[row]].T).amax(0), own_BN[row])
            assert torch.equal(own_BN[row], scores_BN[row])


def test_lists_are_exact_whether_or_not_the_longest_items_decide_them() -> None:
    served = served_of(some_long())
    search, about = choose_search(served, SearchOptions(n_longest=2500))
    assert search is not None and about.how == "longest" and about.recall == 1.0
    model, batch = served.state.model, query_batch(served)
    banned_BM = torch.zeros(len(batch), 300, dtype=torch.int64)
    long_N = torch.arange(1, 6001, 20)
    banned_BM[::2] = long_N  # every second user must not get long items, so these cannot decide the list
    n_B = 20 + (banned_BM > 0).sum(1)
    decided_B = (search(user_vectors(model, batch), n_B)[0] > 0).all(1)
    assert not bool(decided_B[::2].any()) and bool(decided_B[1::2].all())  # filters of one user do not affect another
    for banned in (None, Exclusions.from_padded(banned_BM)):
        exact, scores = top_k_exact(item_vectors(model), user_vectors(model, batch), 20, banned, torch.arange(1, 6001))
        found = top_k(model, batch, 20, banned, search=search)
        assert torch.equal(found[0], exact) and torch.allclose(found[1], scores)


def test_a_user_who_repeats_few_items_gets_a_complete_list() -> None:
    served = served_of(some_long(300))
    model, batch = served.state.model, query_batch(served, 3)
    search = longest_first_search(item_vectors(model), 50)
    banned_BM = torch.arange(1, 6).repeat(3, 64)
    items_BK, scores_BK = top_k(model, batch, 10, Exclusions.from_padded(banned_BM), search=search)
    exact_BK, _ = top_k_exact(
        item_vectors(model), user_vectors(model, batch), 10, Exclusions.from_padded(banned_BM), torch.arange(1, 301)
    )
    assert torch.equal(items_BK, exact_BK) and bool(torch.isfinite(scores_BK).all())


def test_the_longest_items_are_not_used_if_all_norms_are_equal() -> None:
    items_ID = torch.nn.functional.normalize(isotropic())
    search, about = choose_search(served_of(items_ID), SearchOptions(n_longest=2500))
    assert search is None and about.how == "exact"


def test_the_longest_items_decide_no_list_of_a_zero_vector() -> None:
    assert not bool(longest_first_search(some_long(), 2500)(torch.zeros(1, 2, D), torch.tensor([20]))[0].any())


def test_lists_that_are_served_through_an_index_agree_with_exact_ones(tmp_path: Path) -> None:
    stored(tmp_path, "comirec-dr:d=8", "finetune:fit.base_epochs=2:fit.epochs=1", n=2)
    lists = []
    for exact in (10, 50_000):
        with server(tmp_path, search_options=SearchOptions(exact_max_items=exact)) as (client, _):
            lists.append([items(client.get(f"/recommend/user-{n}?k=7")) for n in range(1, 30)])
            search = client.get("/version").json()["search"]
            assert search["how"] == ("index" if exact == 10 else "exact")
            assert f"freshrec_index_recall {search['recall']}" in client.get("/metrics").text
    assert np.mean([len(set(a) & set(b)) / 7 for a, b in zip(*lists)]) >= 0.98
