"""Facts by hand: counts, repeats, ages; what a candidate is to a history."""

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
    """Item 1 four times, twice of them again; item 2 once; item 3 never."""
    facts, histories = ItemStatistics.empty(), Histories.empty()
    facts.grow(3)
    for users, items in (([1, 1, 2], [1, 1, 1]), ([1, 2], [2, 1])):
        events = Events.trainable(torch.tensor(users), torch.tensor(items))
        facts.absorb(targets_at(*insert_events(histories, events, 2)))
        histories = append_events(histories, events, 2)
    return facts


def test_events_and_repeats_are_counted_across_blocks() -> None:
    facts = counted()
    assert facts.event_counts_I.tolist() == [0, 4, 1, 0] and facts.repeat_counts_I.tolist() == [0, 2, 0, 0]
    assert facts.first_event_I.tolist()[1:] == [0, 3, np.inf] and facts.n_events == 5


def test_which_targets_are_among_the_last_before_them() -> None:
    users, items = [1, 2, 1, 1, 2, 1], [1, 1, 2, 1, 1, 2]  # user 1 has items 1 2 1 2, user 2 has 1 1
    targets = targets_at(
        *insert_events(Histories.empty(), Events.trainable(torch.tensor(users), torch.tensor(items)), 2)
    )
    assert is_repeat(targets, 2).tolist() == [False, False, False, True, True, True]
    assert is_repeat(targets, 1).tolist() == [False, False, False, False, True, False]
    assert is_repeat(targets[torch.zeros(0, dtype=torch.int64)], 2).tolist() == []


def test_an_own_item_is_described_by_its_place_in_the_history() -> None:
    runs = ItemOccurrences.from_items(np.array([[0, 1, 2, 1, 2], [0, 0, 0, 0, 2]]))
    named = dict(zip(OWN_FEATURES, own_history_features(runs).T))  # of items 1 and 2, and 2 of the second
    assert named["taken"].tolist() == [1, 1, 1] and named["is the last"].tolist() == [0, 1, 1]
    assert named["times taken"].tolist() == near([np.log(3), np.log(3), np.log(2)])
    assert named["age of the last"].tolist() == near([np.log(2), 0, 0])
    again, length = user_features(runs, np.array([4, 1]), 2 / 5).T
    assert again.tolist() == near(
        [(2 + PRIOR_EVENTS * 2 / 5) / (4 + PRIOR_EVENTS), PRIOR_EVENTS * 2 / 5 / (1 + PRIOR_EVENTS)]
    )
    assert length.tolist() == near([np.log(5), np.log(2)])


def test_an_item_is_described_by_what_is_known_of_it() -> None:
    facts = counted()
    assert facts.repeat_rate == near(2 / 5)
    named = dict(zip(ITEM_FEATURES, facts.item_features(window=2).T))
    assert all(x.dtype == np.float32 and x[0] == 0 for x in named.values())
    assert named["taken again"][1:].tolist() == near(
        [(2 + PRIOR_EVENTS * 2 / 5) / (4 + PRIOR_EVENTS), PRIOR_EVENTS * 2 / 5 / (1 + PRIOR_EVENTS), 2 / 5]
    )
    assert named["events"][1:].tolist() == near([np.log(5), np.log(2), 0])
    assert named["age"][1:].tolist() == near([np.log(1 + 5 / 2), np.log(1 + 2 / 2), 0])


def test_facts_come_back_from_their_tensors() -> None:
    facts = counted()
    again = ItemStatistics.from_state_dict(facts.state_dict())
    assert all(np.array_equal(a, b) for a, b in zip(vars(facts).values(), vars(again).values()))
