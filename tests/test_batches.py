"""Histories, targets and batches of small logs, computed by hand."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from freshrec.data.batches import (
    due_targets,
    history_items,
    limit_batch_size,
    pair_batches,
    query_batches,
    target_batches,
    targets_at,
    window_batches,
)
from freshrec.data.histories import append_events, insert_events, mark_trained
from freshrec.data.stored_interests import pad_interests
from freshrec.random_streams import stream
from freshrec.types import DEFERRED, DUE, HELD_OUT, NEVER, NEXT, NOW, TRAINED, Events, Histories, Interests

# Six events in time order: user 1 has items 1 2 3 4, user 2 has items 5 6.
USERS, ITEMS = [1, 2, 1, 1, 2, 1], [1, 5, 2, 3, 6, 4]


def events_of(users: list[int], items: list[int], joins: list[int] | None = None) -> Events:
    events = Events.trainable(torch.tensor(users, dtype=torch.int64), torch.tensor(items, dtype=torch.int64))
    joins_E = events.train_at_E if joins is None else torch.tensor(joins, dtype=torch.int8)
    return Events(events.users_E, events.items_E, events.times_E, events.role_E, joins_E)


def one_user(due: list[int]) -> Histories:
    """User 1 with items 1, 2, ..., and the given values of `due`."""
    n = len(due)
    items_R = torch.arange(1, n + 1, dtype=torch.int32)
    return Histories(torch.tensor([0, 0, n]), items_R, torch.arange(n), torch.tensor(due, dtype=torch.int8))


def rows(tensor: Tensor) -> list[list[int]]:
    return tensor.tolist()


def test_appended_events_are_sorted_by_user_and_time() -> None:
    histories = append_events(Histories.empty(), events_of(USERS, ITEMS), n_users=2)
    assert histories.offsets_U.tolist() == [0, 0, 4, 6]  # the padding, user 0, owns no row
    assert histories.items_R.tolist() == [1, 2, 3, 4, 5, 6]
    assert histories.times_R.tolist() == [0, 2, 3, 5, 1, 4]  # the place of each event in the log


@pytest.mark.parametrize("cut", range(7))
def test_appending_two_blocks_equals_appending_one(cut: int) -> None:
    events = events_of(USERS, ITEMS)
    whole = append_events(Histories.empty(), events, 2)
    parts = append_events(append_events(Histories.empty(), events[:cut], 2), events[cut:], 2)
    for a, b in zip((whole.offsets_U, whole.items_R, whole.times_R), (parts.offsets_U, parts.items_R, parts.times_R)):
        assert torch.equal(a, b)


def test_insert_events_returns_the_row_of_each_event() -> None:
    events = events_of(USERS, ITEMS)
    _, rows_E = insert_events(append_events(Histories.empty(), events[:3], 2), events[3:], 2)
    # user 1 owns rows 0-3, and 0 and 1 are old; user 2 owns rows 4 and 5, and 4 is old
    assert rows_E.tolist() == [2, 5, 3]


def test_a_new_user_gets_rows_after_all_others() -> None:
    histories = append_events(
        append_events(Histories.empty(), events_of([1, 1], [1, 2]), 1), events_of([3, 1], [9, 3]), 3
    )
    assert histories.offsets_U.tolist() == [0, 0, 3, 3, 4]  # user 2 exists and has no events
    assert histories.items_R.tolist() == [1, 2, 3, 9]


def test_mark_trained_makes_due_rows_trained_and_deferred_rows_due_and_keeps_the_last_rows() -> None:
    joins = [NOW, NEVER, NOW, NEXT, NOW, NEXT]
    histories = append_events(Histories.empty(), events_of(USERS, ITEMS, joins), 2)
    assert histories.due_R.tolist() == [DUE, DUE, DEFERRED, DEFERRED, HELD_OUT, DUE]
    settled = mark_trained(histories, n_recent=3)
    assert settled.items_R.tolist() == [2, 3, 4, 5, 6]  # user 1 had four rows
    assert settled.due_R.tolist() == [TRAINED, DUE, DUE, HELD_OUT, TRAINED]
    assert settled.offsets_U.tolist() == [0, 0, 3, 5]


def test_a_target_sees_the_events_before_it_most_recent_last() -> None:
    histories = append_events(Histories.empty(), events_of(USERS, ITEMS), 2)
    targets = targets_at(histories, torch.tensor([0, 2, 3, 5]))
    assert rows(history_items(targets, 2)) == [[0, 0], [1, 2], [2, 3], [0, 5]]


def test_a_history_of_the_span_starts_at_its_first_event() -> None:
    histories = one_user([TRAINED, TRAINED, DUE, DUE, DEFERRED])
    recent, span = (history_items(due_targets(histories, how), 9) for how in ("recent", "span"))
    assert rows(recent) == [[0, 1, 2], [1, 2, 3]]  # targets are items 3 and 4
    assert rows(span) == [[0], [3]]


def test_only_due_rows_are_targets() -> None:
    histories = one_user([TRAINED, DUE, HELD_OUT, DUE, DEFERRED])
    assert due_targets(histories).rows_N.tolist() == [1, 3]


def test_held_out_events_are_hidden_in_training_and_visible_in_queries() -> None:
    histories = one_user([DUE, HELD_OUT, DUE])
    targets = targets_at(histories, torch.tensor([2]))
    (trained,) = target_batches(targets, 8, 9, stream(0, "test"))
    assert rows(trained.history_BT) == [[0, 1]]  # item 2 leaves no gap
    ((_, asked),) = query_batches(targets, 9)
    assert rows(asked.history_BT) == [[1, 2]]


def test_windows_are_cut_back_to_back_from_the_last_target() -> None:
    targets = due_targets(one_user([DUE] * 5))
    windows = {tuple(w) for b in window_batches(targets, 8, 2, stream(0, "test")) for w in rows(b.history_BT)}
    goals = {tuple(w) for b in window_batches(targets, 8, 2, stream(0, "test")) for w in rows(b.targets_BT)}
    assert windows == {(3, 4), (1, 2)}  # item 1 has no history, so it is no target
    assert goals == {(4, 5), (2, 3)}


@given(st.lists(st.sampled_from([TRAINED, DUE, DEFERRED, HELD_OUT]), min_size=2, max_size=14), st.integers(1, 4))
def test_every_due_target_with_a_history_is_in_exactly_one_window(due: list[int], length: int) -> None:
    batches = window_batches(due_targets(one_user(due)), 3, length, stream(0, "test"))
    found = [item for batch in batches for item in batch.targets_BT.flatten().tolist() if item]
    after_secret = [i > 0 and due[i - 1] == HELD_OUT for i in range(len(due))]  # nothing to predict them from
    wanted = [i + 1 for i, kind in enumerate(due) if kind == DUE and i > 0 and not after_secret[i]]
    assert sorted(found) == wanted


def test_targets_without_history_are_left_out_of_target_batches_and_kept_as_pairs() -> None:
    targets = due_targets(append_events(Histories.empty(), events_of(USERS, ITEMS), 2))
    with_history = [i for b in target_batches(targets, 2, 9, stream(0, "test")) for i in b.targets_BT[:, 0].tolist()]
    pairs = [i for b in pair_batches(targets, 2, stream(0, "test")) for i in b.targets_BT[:, 0].tolist()]
    assert sorted(with_history) == [2, 3, 4, 6]
    assert sorted(pairs) == [1, 2, 3, 4, 5, 6]


def test_batches_depend_on_the_generator_only() -> None:
    targets = due_targets(one_user([DUE] * 40))

    def order(*numbers: int) -> list[int]:
        return [
            i
            for b in pair_batches(targets, 8, stream(numbers[0], "test", *numbers[1:]))
            for i in b.targets_BT[:, 0].tolist()
        ]

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(2, 1)


def test_interests_are_padded_to_the_largest_number_and_new_users_get_initial_interests() -> None:
    # user 1 has interests (1, 1) of span 0 and (2, 2) of span 3, user 2 has none yet, user 3 is unknown
    users = Interests(
        torch.tensor([[1.0, 1.0], [2.0, 2.0]]),
        torch.tensor([0, 0, 2, 2]),
        torch.tensor([0, 3], dtype=torch.int32),
        torch.tensor([0, 3], dtype=torch.int32),
    )
    slots_KD = torch.tensor([[7.0, 8.0]])
    vectors_BKD, alive_BK, born_BK = pad_interests(users, torch.tensor([1, 2, 3]), slots_KD)
    assert vectors_BKD.tolist() == [[[1, 1], [2, 2]], [[7, 8], [0, 0]], [[7, 8], [0, 0]]]
    assert alive_BK.tolist() == [[True, True], [True, False], [True, False]]
    later = 2**31 - 1  # than any span
    assert born_BK.tolist() == [[0, 3], [later, later], [later, later]]


def test_without_stored_interests_all_users_get_initial_interests() -> None:
    vectors_BKD, alive_BK, _ = pad_interests(Interests.empty(2), torch.tensor([1, 5]), torch.tensor([[7.0, 8.0]]))
    assert vectors_BKD.tolist() == [[[7, 8]], [[7, 8]]]
    assert alive_BK.tolist() == [[True], [True]]


def test_mark_trained_keeps_old_rows_that_are_still_to_be_trained_on() -> None:
    # the last two rows stay, and the deferred one before them
    left = mark_trained(one_user([DEFERRED, TRAINED, DUE, DUE]), n_recent=2)
    assert left.items_R.tolist() == [1, 3, 4]
    assert left.due_R.tolist() == [DUE, TRAINED, TRAINED]
    assert left.offsets_U.diff().tolist() == [0, 3]


def test_a_small_log_gets_smaller_batches_so_that_an_epoch_has_enough_steps() -> None:
    # 5000 rows in batches of 256 are 20 steps; 5000 // 50 = 100 a batch are 50. 300 rows: 6 a batch, but at least 16.
    assert [limit_batch_size(256, n) for n in (100_000, 5_000, 300)] == [256, 100, 16]
    assert limit_batch_size(8, 300) == 8  # never more than was asked for


def test_a_history_of_held_out_rows_only_is_left_out_and_gaps_are_closed() -> None:
    events = Events.trainable(torch.tensor([1, 1, 1, 2, 2]), torch.tensor([1, 2, 3, 2, 1]))
    joins_E = torch.tensor([NOW, NEVER, NOW, NEVER, NOW], dtype=torch.int8)
    targets = due_targets(append_events(Histories.empty(), replace(events, train_at_E=joins_E), 2))
    found = list(target_batches(targets, 8, 50, stream(0, "test")))
    assert [batch.history_BT.tolist() for batch in found] == [[[0, 1]]]  # not [1, 0]: what is secret was not there
