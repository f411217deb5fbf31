"""Facts by hand: counts, repeats, ages; what a candidate is to a history."""

import numpy as np
import pytest
import torch

from freshrec.data.batches import append, place, targets_at
from freshrec.models.facts import ITEM, OWN, PRIOR, USER, Facts
from freshrec.models.sparse import Board
from freshrec.types import Events, Histories

near = pytest.approx


def counted() -> Facts:
    """Item 1 four times, twice of them again; item 2 once; item 3 never."""
    facts, histories = Facts.empty(), Histories.empty()
    facts.grow(3)
    for users, items in (([1, 1, 2], [1, 1, 1]), ([1, 2], [2, 1])):
        events = Events.of(torch.tensor(users), torch.tensor(items))
        facts.absorb(targets_at(*place(histories, events, 2)))
        histories = append(histories, events, 2)
    return facts


def test_events_and_repeats_are_counted_across_blocks() -> None:
    facts = counted()
    assert facts.events_I.tolist() == [0, 4, 1, 0] and facts.again_I.tolist() == [0, 2, 0, 0]
    assert facts.first_I.tolist()[1:] == [0, 3, np.inf] and facts.clock == 5


def test_a_candidate_is_described_by_its_place_in_the_history_and_by_what_is_known_of_it() -> None:
    items, history = np.array([[1, 2, 3], [1, 0, 0]]), np.array([[0, 1, 2, 1, 2], [0, 0, 0, 0, 2]])
    columns = counted().describe(items, history, Board(2, 4), window=2)
    named = dict(zip((*OWN, *ITEM, *USER), columns))
    assert named["taken"].tolist() == [[1, 1, 0], [0, 0, 0]]
    assert named["times taken"][0].tolist() == near([np.log(3), np.log(3), 0])
    assert named["age of the last"][0].tolist() == near([np.log(2), 0, 0])
    assert named["is the last"].tolist() == [[0, 1, 0], [0, 0, 0]]
    mean = 2 / 5
    assert named["taken again"][0].tolist() == near(
        [(2 + PRIOR * mean) / (4 + PRIOR), PRIOR * mean / (1 + PRIOR), mean]
    )
    assert named["events"][0].tolist() == near([np.log(5), np.log(2), 0])
    assert named["age"][0].tolist() == near([np.log(1 + 5 / 2), np.log(1 + 2 / 2), 0])
    assert named["takes again"][0].tolist() == near([(2 + PRIOR * mean) / (4 + PRIOR)] * 3)
    assert named["length"][:, 0].tolist() == near([np.log(5), np.log(2)]) and named["length"][1, 1] == 0


def test_facts_come_back_from_their_tensors() -> None:
    facts = counted()
    again = Facts.load(facts.state_dict())
    assert all(np.array_equal(a, b) for a, b in zip(vars(facts).values(), vars(again).values()))
