"""Session-parallel batches: the events that share a step, and the hidden states that are kept between steps."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from freshrec.data.batches import Targets, due_targets, targets_at
from freshrec.data.histories import append_events
from freshrec.data.session_parallel import HiddenStates, assign_lanes, session_parallel_batches
from freshrec.models.gru4rec import GRU4Rec, GRU4RecSpec
from freshrec.nn.scoring import user_vectors
from freshrec.types import NEVER, Batch, Events, Histories, SessionLanes


def targets_of(*sessions: list[int], held_out: tuple[int, ...] = ()) -> Targets:
    """Return the targets of users 1, 2, ..., one user after the other. Items in `held_out` are never trained on."""
    users_E = torch.tensor([user for user, items in enumerate(sessions, 1) for _ in items])
    items_E = torch.tensor([item for items in sessions for item in items])
    events = Events.trainable(users_E, items_E)
    events.train_at_E[torch.isin(items_E, torch.tensor(held_out, dtype=torch.int64))] = NEVER
    return due_targets(append_events(Histories.empty(), events, len(sessions)))


def steps(targets: Targets, n_lanes: int) -> list[list[tuple[int, int, int, bool]]]:
    """Return for each step: (lane, event, target, whether a session starts)."""
    found = []
    for batch in session_parallel_batches(targets, n_lanes):
        assert batch.lanes is not None and batch.targets_BT is not None
        columns = batch.lanes.lane_B, batch.history_BT[:, 0], batch.targets_BT[:, 0], batch.lanes.is_first_B
        found.append(list(zip(*(column.tolist() for column in columns))))
    return found


def test_the_steps_of_two_lanes_by_hand() -> None:
    # A = [1, 2, 3] and B = [4, 5] start. B ends after one step, and C = [6, 7] takes its lane. Then both end.
    assert steps(targets_of([1, 2, 3], [4, 5], [6, 7]), 2) == [
        [(0, 1, 2, True), (1, 4, 5, True)],
        [(0, 2, 3, False), (1, 6, 7, True)],
    ]


def test_a_lane_is_dropped_if_no_session_is_left() -> None:
    assert steps(targets_of([1, 2, 3, 4], [5, 6]), 2) == [
        [(0, 1, 2, True), (1, 5, 6, True)],
        [(0, 2, 3, False)],
        [(0, 3, 4, False)],
    ]
    assert steps(targets_of([1], [2]), 2) == []  # no event follows another


def test_a_held_out_event_splits_a_session() -> None:
    # In [1, 2, 9, 3, 4], 9 is held out: 1 -> 2, and 3 -> 4 as another session.
    assert steps(targets_of([1, 2, 9, 3, 4], held_out=(9,)), 1) == [[(0, 1, 2, True)], [(0, 3, 4, True)]]


def test_old_events_start_a_session_and_are_no_targets() -> None:
    histories = append_events(Histories.empty(), Events.trainable(torch.ones(4), torch.tensor([1, 2, 3, 4])), 1)
    assert steps(targets_at(histories, torch.tensor([2, 3])), 4) == [[(0, 2, 3, True)], [(0, 3, 4, False)]]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.integers(1, 5))
def test_each_target_occurs_once_and_each_lane_has_one_session_at_a_time(lengths: list[int], n_lanes: int) -> None:
    lane_S, step_S = assign_lanes(torch.tensor(lengths), n_lanes)
    places = [(lane, step + n) for lane, step, m in zip(lane_S.tolist(), step_S.tolist(), lengths) for n in range(m)]
    assert len(set(places)) == len(places) == sum(lengths)  # steps times lanes = the sum of (length - 1) of sessions
    assert step_S.tolist() == sorted(step_S.tolist())  # in the order of the sessions
    for lane in set(lane_S.tolist()):
        steps_of_lane = sorted(step for other_lane, step in places if other_lane == lane)
        assert steps_of_lane == list(range(len(steps_of_lane)))  # without a gap


def model_of(layers: int) -> GRU4Rec:
    model = GRU4Rec(
        GRU4RecSpec(d=6, hidden=5, layers=layers, std=1.0, steps="session-parallel", drop_in=0, drop_out=0), seed=0
    )
    model.grow(3, 9)
    return model


def vectors(hidden: HiddenStates, model: GRU4Rec, batch: Batch) -> Tensor:
    found = hidden.run(model, batch).vectors_BKD
    assert found is not None
    return found[:, 0]


@pytest.mark.parametrize("layers", [1, 2])
def test_event_by_event_equals_the_whole_history(layers: int) -> None:
    # Without training in between, the hidden state of a lane is that of the history so far.
    model, hidden, so_far = model_of(layers), HiddenStates(), dict[int, list[int]]()
    for batch in session_parallel_batches(targets_of([1, 2, 3, 8, 4], [4, 5], [6, 7, 1]), 2):
        assert batch.lanes is not None
        batch = replace(batch, negatives_N=torch.tensor([9]))
        found_BD = vectors(hidden, model, batch)
        for user, item, vector_D in zip(batch.users_B.tolist(), batch.history_BT[:, 0].tolist(), found_BD):
            so_far.setdefault(user, []).append(item)
            expected = user_vectors(model, Batch(torch.tensor([user]), torch.tensor([so_far[user]])))
            torch.testing.assert_close(vector_D, expected[0, 0])
    assert so_far == {1: [1, 2, 3, 8], 2: [4], 3: [6, 7]}


def test_no_gradient_reaches_an_earlier_step() -> None:
    model, hidden = model_of(1), HiddenStates()
    first, second = (
        Batch(
            item,
            item[:, None],
            3 * item[:, None],
            torch.tensor([9]),
            lanes=SessionLanes(0 * item, item == first_item, 1),
        )
        for item, first_item in ((torch.tensor([1]), 1), (torch.tensor([1]), 0))
    )
    hidden.run(model, first)
    rows_ND = model.items.step_rows()[1]
    hidden.run(model, second).loss.backward()
    assert rows_ND.grad is None and model.items.step_rows()[1].grad is not None


def test_models_that_read_the_same_batches_have_their_own_states() -> None:
    model, other, hidden, others = model_of(1), model_of(1), HiddenStates(), HiddenStates()
    for batch in session_parallel_batches(targets_of([1, 2, 3]), 1):
        assert batch.lanes is not None
        batch = replace(batch, negatives_N=torch.tensor([9]))
        # one model reads the batch before the other
        assert torch.equal(vectors(hidden, model, batch), vectors(others, other, batch))
        assert batch.lanes.states is None  # the batch itself does not change


def test_the_states_of_one_epoch_do_not_reach_the_next() -> None:
    model, hidden, epochs = model_of(2), HiddenStates(), []
    for _ in range(2):
        batches = list(session_parallel_batches(targets_of([1, 2, 3, 8], [4, 5], [6, 7, 1]), 2))
        ready = [replace(batch, negatives_N=torch.tensor([9])) for batch in batches]
        epochs.append(torch.cat([vectors(hidden, model, batch) for batch in ready]))
    assert torch.equal(*epochs) and len(epochs[0].unique(dim=0)) == 3 + 1 + 2  # every history has a different vector
