"""Features of candidates, computed by hand: counts, repeats, ages and positions in the history."""

import numpy as np
import pytest
import torch

from freshrec.data.batches import targets_at
from freshrec.data.histories import append_events, insert_events
from freshrec.models.blend.features import (
    ITEM_FEATURES,
    OWN_FEATURES,
    PRIOR_EVENTS,
    ItemStatistics,
    is_repeat,
    own_history_features,
    user_features,
)
from freshrec.nn.sparse import ItemOccurrences
from freshrec.types import Events, Histories

near = pytest.approx


def counted() -> ItemStatistics:
    """Item 1 has four events, two of them repeats. Item 2 has one event, item 3 none."""
    statistics, histories = ItemStatistics.empty(), Histories.empty()
    statistics.grow(3)
    for users, items in (([1, 1, 2], [1, 1, 1]), ([1, 2], [2, 1])):
        events = Events.trainable(torch.tensor(users), torch.tensor(items))
        statistics.absorb(targets_at(*insert_events(histories, events, 2)))
        histories = append_events(histories, events, 2)
    return statistics


def test_events_and_repeats_are_counted_across_blocks() -> None:
    statistics = counted()
    assert statistics.event_counts_I.tolist() == [0, 4, 1, 0] and statistics.repeat_counts_I.tolist() == [0, 2, 0, 0]
    assert statistics.first_event_I.tolist()[1:] == [0, 3, np.inf] and statistics.n_events == 5


def test_a_target_is_a_repeat_if_it_is_among_the_events_before_it() -> None:
    users, items = [1, 2, 1, 1, 2, 1], [1, 1, 2, 1, 1, 2]  # user 1 has items 1 2 1 2, user 2 has 1 1
    targets = targets_at(
        *insert_events(Histories.empty(), Events.trainable(torch.tensor(users), torch.tensor(items)), 2)
    )
    assert is_repeat(targets, 2).tolist() == [False, False, False, True, True, True]
    assert is_repeat(targets, 1).tolist() == [False, False, False, False, True, False]
    assert is_repeat(targets[torch.zeros(0, dtype=torch.int64)], 2).tolist() == []


def test_features_of_an_item_in_the_history() -> None:
    runs = ItemOccurrences.from_items(np.array([[0, 1, 2, 1, 2], [0, 0, 0, 0, 2]]))
    named = dict(
        zip(OWN_FEATURES, own_history_features(runs).T)
    )  # items 1 and 2 of the first history, item 2 of the second
    assert named["in history"].tolist() == [1, 1, 1] and named["is last item"].tolist() == [0, 1, 1]
    assert named["count in history"].tolist() == near([np.log(3), np.log(3), np.log(2)])
    assert named["events since"].tolist() == near([np.log(2), 0, 0])
    repeat_rate, length = user_features(runs, np.array([4, 1]), 2 / 5).T
    assert repeat_rate.tolist() == near(
        [(2 + PRIOR_EVENTS * 2 / 5) / (4 + PRIOR_EVENTS), PRIOR_EVENTS * 2 / 5 / (1 + PRIOR_EVENTS)]
    )
    assert length.tolist() == near([np.log(5), np.log(2)])


def test_features_of_an_item() -> None:
    statistics = counted()
    assert statistics.repeat_rate == near(2 / 5)
    named = dict(zip(ITEM_FEATURES, statistics.item_features(window=2).T))
    assert all(x.dtype == np.float32 and x[0] == 0 for x in named.values())
    assert named["item repeat rate"][1:].tolist() == near(
        [(2 + PRIOR_EVENTS * 2 / 5) / (4 + PRIOR_EVENTS), PRIOR_EVENTS * 2 / 5 / (1 + PRIOR_EVENTS), 2 / 5]
    )
    assert named["events"][1:].tolist() == near([np.log(5), np.log(2), 0])
    assert named["age"][1:].tolist() == near([np.log(1 + 5 / 2), np.log(1 + 2 / 2), 0])


def test_statistics_are_restored_from_their_tensors() -> None:
    statistics = counted()
    again = ItemStatistics.from_state_dict(statistics.state_dict())
    assert all(np.array_equal(a, b) for a, b in zip(vars(statistics).values(), vars(again).values()))
