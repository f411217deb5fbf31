"""User-kNN by hand, and its state after any cut of the events into blocks."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from freshrec.models.user_knn import UserKNN, UserKNNSpec
from freshrec.types import Batch, Events, Histories

near = pytest.approx
NOTHING = Histories.empty()


def fed(pairs: list[tuple[int, int]], cuts: tuple[int, ...] = (), **options: int) -> UserKNN:
    model = UserKNNSpec(**options).build(0)
    model.grow(9, 9)
    for part in np.split(np.array(pairs), cuts):
        if len(part):
            model.absorb(Events.trainable(torch.tensor(part[:, 0]), torch.tensor(part[:, 1])), NOTHING)
    return model


def all_scores(model: UserKNN, user: int, history: list[int]) -> list[float]:
    scores: list[float] = model.score(Batch(torch.tensor([user]), torch.tensor([history])), torch.arange(10))[
        0
    ].tolist()
    return scores


def test_items_of_similar_users_are_scored_by_the_idf_of_the_shared_items() -> None:
    # 2 users have events; item 1 was taken by both: idf = ln(1 + 2 / 3); item 2 by user 3 alone: ln(1 + 2 / 2).
    model = fed([(2, 1), (2, 5), (3, 1), (3, 2), (3, 6)])
    one, two = np.log1p(2 / 3), np.log1p(1.0)
    scores = all_scores(model, 1, [1, 2, 1])  # taking item 1 twice counts once
    assert scores[5] == near(one) and scores[6] == near(one + two)
    assert scores[1] == near(one + one + two) and scores[2] == near(one + two) and scores[7] == scores[0] == 0


def test_a_user_is_never_its_own_neighbour_and_only_the_nearest_users_count() -> None:
    model = fed([(1, 1), (1, 7), (2, 1), (2, 5), (3, 1), (3, 2), (3, 6)], neighbours=1)
    scores = all_scores(model, 1, [1, 2])
    assert scores[7] == 0 and scores[5] == 0 and scores[6] > 0


def test_only_the_most_recent_users_of_an_item_are_neighbours() -> None:
    pairs = [(2, 1), (2, 5), (3, 1), (3, 6)]
    assert all_scores(fed(pairs, (2,), users_per_item=1), 1, [1])[5:7] == [0, near(np.log1p(2 / 3))]


def test_events_before_the_last_ones_are_forgotten() -> None:
    model = fed([(2, 1), (2, 3), (2, 4)], length=2)
    assert model.recent_UT[2].tolist() == [3, 4] and sum(all_scores(model, 1, [1])) == 0


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=30), st.data())
def test_the_last_events_do_not_depend_on_the_blocks(pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    cuts = tuple(sorted(data.draw(st.lists(st.integers(0, len(pairs)), max_size=4))))
    at_once, in_parts = fed(pairs, length=3), fed(pairs, cuts, length=3)
    assert (at_once.recent_UT == in_parts.recent_UT).all()
    assert all_scores(at_once, 1, [1, 2]) == near(all_scores(in_parts, 1, [1, 2]))


def test_a_loaded_copy_that_learns_more_does_not_change_the_original() -> None:
    model = fed([(2, 1)])
    other = UserKNNSpec().build(0)
    other.load_state_dict(model.state_dict())
    other.absorb(Events.trainable(torch.tensor([2]), torch.tensor([5])), NOTHING)
    assert all_scores(model, 1, [1])[5] == 0 and all_scores(other, 1, [1])[5] > 0


def test_adding_users_and_items_changes_no_score() -> None:
    model = fed([(1, 1), (1, 2), (2, 1), (2, 3), (3, 4)])
    before = all_scores(model, 0, [1])
    model.grow(model.n_users + 20, model.n_items + 5)
    assert all_scores(model, 0, [1])[: len(before)] == before


def test_a_deep_copy_shares_arrays_until_it_changes() -> None:
    model = fed([(2, 1), (2, 5), (3, 1)])
    other = copy.deepcopy(model)
    assert other.recent_UT is model.recent_UT
    other.absorb(Events.trainable(torch.tensor([2, 3]), torch.tensor([7, 8])), NOTHING)
    assert model.recent_UT[2, -2:].tolist() == [1, 5] and other.recent_UT[2, -3:].tolist() == [1, 5, 7]
    assert model.recent_UT[3, -1] == 1 and model.last_block_U[2] == 1
