"""Ranks and best items against a dense matrix, with ties, excluded and unknown items; the three readouts."""

import numpy as np
import pytest
import torch

from freshrec.errors import TrainingError
from freshrec.models.mf import MF, MFSpec
from freshrec.models.multi_interest import InterestSpec
from freshrec.models.popularity import Popularity, PopularitySpec
from freshrec.models.repeat import RepeatSpec
from freshrec.nn.ranking import ITEM_BLOCK, USER_BLOCK, Exclusions, query_vectors, target_ranks, top_k
from freshrec.nn.scoring import user_vectors
from freshrec.types import Batch

N_USERS, N_ITEMS = USER_BLOCK + 7, 2 * ITEM_BLOCK + 5  # several blocks of both, with a short last one


def model_with_ties() -> MF:
    """A model whose vectors are small whole numbers: all scores are exact, and most of them tie."""
    model, source = MFSpec(d=3).build(0), torch.Generator().manual_seed(0)
    model.grow(N_USERS, N_ITEMS)
    for table in (model.users, model.items):
        table.weights.copy_(torch.randint(-2, 3, table.weights.shape, generator=source))
    return model


def batch_of(n_users: int) -> Batch:
    return Batch(torch.arange(1, n_users + 1), torch.zeros(n_users, 0, dtype=torch.int64))


def dense(model: MF) -> np.ndarray:
    """All scores in float64, shape (users, items), without padding."""
    return (model.users.weights[1:].double() @ model.items.weights[1:].double().T).numpy()


def popularity_of(counts: list[float]) -> Popularity:
    model = PopularitySpec().build(0)
    model.grow(2, len(counts))
    model.counts_I = torch.tensor([0.0, *counts], dtype=torch.float64)
    return model


@pytest.mark.parametrize("n_items", [N_ITEMS, ITEM_BLOCK + 1])
def test_a_rank_is_one_plus_the_items_ahead_plus_half_of_the_ties(n_items: int) -> None:
    model = model_with_ties()
    target_B = torch.randint(1, n_items + 1, (N_USERS,), generator=torch.Generator().manual_seed(1))
    scores = dense(model)[:, :n_items]
    own = scores[np.arange(N_USERS), target_B.numpy() - 1][:, None]
    expected = 1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2  # the target ties with itself
    found = target_ranks(model, batch_of(N_USERS), target_B, n_items=n_items)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_ranks_of_a_counting_model_by_hand() -> None:
    # counts 5 2 2 9: item 4 is first, item 1 second, items 2 and 3 share ranks 3 and 4
    batch = batch_of(4)
    assert target_ranks(popularity_of([5, 2, 2, 9]), batch, torch.tensor([1, 2, 3, 4])).tolist() == [2, 3.5, 3.5, 1]


def test_an_unknown_target_has_the_rank_infinity() -> None:
    model = popularity_of([5, 2, 2, 9])
    assert target_ranks(model, batch_of(2), torch.tensor([5, 1])).tolist() == [np.inf, 2]
    # with only items 1 to 3 known, item 4 is not, and item 1 is first
    assert target_ranks(model, batch_of(2), torch.tensor([4, 1]), n_items=3).tolist() == [np.inf, 1]


def test_a_counting_model_ranks_a_users_own_items_that_are_new_to_everybody_else() -> None:
    # three items are known, 4 and 5 are the user's own; repeat-last: 1 for the latest, then 1/2, 1/3
    repeat, batch = RepeatSpec().build(0), Batch(torch.tensor([1, 1, 1, 1]), torch.tensor([[4, 5, 1]]).repeat(4, 1))
    repeat.grow(1, 5)
    found = target_ranks(repeat, batch, torch.tensor([1, 5, 4, 2]), n_items=3).tolist()
    assert found == [1, 2, 3, 4.5]  # items 2 and 3 tie
    other = Batch(torch.tensor([1, 1]), torch.tensor([[0, 5, 5], [0, 0, 1]]))
    assert target_ranks(repeat, other, torch.tensor([5, 5]), n_items=3).tolist() == [1, np.inf]  # 5 is new
    trained = model_with_ties()
    assert target_ranks(trained, batch, torch.tensor([1, 5, 4, 2]), n_items=3)[1:3].tolist() == [np.inf, np.inf]


def test_a_score_that_is_not_finite_is_an_error() -> None:
    model = model_with_ties()
    model.items.weights[N_ITEMS] = torch.nan  # no target and no best item
    with pytest.raises(TrainingError, match="not finite"):
        target_ranks(model, batch_of(2), torch.tensor([1, 2]))
    with pytest.raises(TrainingError, match="not finite"):
        top_k(model, batch_of(2), 3)
    with pytest.raises(TrainingError, match="not finite"):
        target_ranks(popularity_of([1, float("inf")]), batch_of(1), torch.tensor([1]))


def test_unknown_items_in_a_history_are_ignored() -> None:
    model = InterestSpec(d=4, std=1.0).build(0)
    model.grow(1, 3)
    known, with_unknown = (Batch(torch.tensor([1]), torch.tensor([h])) for h in ([1, 0, 2], [1, 99, 2]))
    target = torch.tensor([3])
    assert torch.equal(target_ranks(model, with_unknown, target), target_ranks(model, known, target))
    assert torch.equal(top_k(model, with_unknown, 3)[1], top_k(model, known, 3)[1])


def test_the_top_items_are_the_first_of_a_dense_sort_without_excluded_items() -> None:
    model, source = MFSpec(d=3, std=1.0).build(0), torch.Generator().manual_seed(2)
    model.grow(5, 8 * ITEM_BLOCK + 9)  # more than one block
    excluded_BM = torch.randint(0, model.n_items + 1, (5, 4000), generator=source)
    excluded_BM[:, 0] = 8 * ITEM_BLOCK + 9  # the last item, for all
    scores = dense(model)
    for user, excluded in enumerate(excluded_BM.numpy()):
        scores[user, excluded[excluded > 0] - 1] = -np.inf
    items_BK, scores_BK = top_k(model, batch_of(5), 50, Exclusions.from_padded(excluded_BM))
    expected = np.argsort(-scores, axis=1)[:, :50]
    np.testing.assert_array_equal(items_BK.numpy(), expected + 1)
    np.testing.assert_allclose(scores_BK.numpy(), np.take_along_axis(scores, expected, 1), rtol=1e-5)


def test_the_top_items_are_allowed_items() -> None:
    model = popularity_of([5, 2, 3, 9])
    items_BK, scores_BK = top_k(
        model, batch_of(1), 9, Exclusions.from_padded(torch.tensor([[3, 4]])), torch.tensor([2, 3])
    )
    assert items_BK.tolist() == [[2, 3]]  # item 4 is excluded and not allowed
    assert scores_BK.tolist() == [[2, -np.inf]]  # item 3 is excluded: the caller drops items with -inf
    assert top_k(model, batch_of(1), 2, allowed_N=torch.zeros(0, dtype=torch.int64))[0].shape == (1, 0)


def test_excluding_items_does_not_change_the_model() -> None:
    model = popularity_of([5, 2, 3, 9])
    top_k(model, batch_of(1), 2, Exclusions.from_padded(torch.tensor([[4]])))
    assert top_k(model, batch_of(1), 2)[0].tolist() == [[4, 1]]


def test_the_readouts_are_recent_interests_stored_interests_or_both() -> None:
    model = InterestSpec(d=2, k=2, std=1.0).build(0)
    model.grow(3, 5)
    stored_BKD = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [0.0, 0.0]], [[7.0, 8.0], [9.0, 9.0]]])
    alive_BK = torch.tensor([[True, True], [True, False], [True, True]])
    old_BK = torch.tensor([[True, True], [True, False], [False, False]])  # user 3 is new
    batch = Batch(
        torch.tensor([1, 2, 3]), torch.tensor([[1, 2], [3, 4], [0, 5]]), None, None, stored_BKD, alive_BK, old_BK
    )
    recent, stored, both = (query_vectors(model, batch, how) for how in ("recent", "stored", "both"))
    assert torch.equal(recent, user_vectors(model, batch))
    # a missing interest of user 2 repeats the first one; a new user has no stored interests
    assert stored[:2].tolist() == [[[1, 2], [3, 4]], [[5, 6], [5, 6]]]
    assert torch.equal(stored[2], recent[2])
    assert torch.equal(both, torch.cat([stored, recent], 1))
