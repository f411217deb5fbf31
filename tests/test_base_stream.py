"""The base block as a stream: each part has the right new events and the right past, and never sees later events."""

import torch
from torch import Tensor

from freshrec.data.batches import due_targets
from freshrec.data.histories import append_events
from freshrec.learn.base_stream import base_stream
from freshrec.types import DUE, HELD_OUT, TRAINED, Events, Histories


def base(labels_E: Tensor | None = None) -> Histories:
    """Return twelve events, one per hour. Users 1 and 2 alternate, and the items are 1 .. 12."""
    hours_E = torch.arange(12)
    events = Events.trainable(hours_E % 2 + 1, hours_E + 1, hours_E)
    return append_events(Histories.empty(), Events(*list(vars(events).values())[:5], labels_E), 2)


def items(histories: Histories, due: int) -> list[int]:
    return sorted(histories.items_R[histories.due_R == due].tolist())


def test_the_first_third_is_the_base_and_the_other_parts_follow_one_by_one() -> None:
    parts = list(base_stream(base(), 6))
    assert [items(recent, DUE) for recent, _ in parts] == [[1, 2, 3, 4], [5, 6], [7, 8], [9, 10], [11, 12]]
    assert [items(recent, TRAINED) for recent, _ in parts] == [list(range(1, n)) for n in (1, 5, 7, 9, 11)]
    assert [(span.index, span.n_users, span.n_items) for _, span in parts] == [
        (-5, 2, 4),
        (-4, 2, 6),
        (-3, 2, 8),
        (-2, 2, 10),
        (-1, 2, 12),
    ]


def test_held_out_events_stay_held_out() -> None:
    histories = base()
    histories.due_R[histories.items_R == 2] = HELD_OUT
    assert all(items(recent, HELD_OUT) == [2] for recent, _ in base_stream(histories, 3))


def test_exposures_are_split_at_the_same_hours_and_histories_hold_clicked_items_only() -> None:
    # Items 1, 4, 7 and 10 were clicked. Each part has 4 hours: its rows are due, with the histories up to its end.
    labels_E = torch.tensor([1.0, 0, 0] * 4)
    for part, (recent, span) in enumerate(base_stream(base(labels_E), 3)):
        targets = due_targets(recent)
        assert targets.items_N.tolist() == list(range(4 * part + 1, 4 * part + 5))
        assert targets.labels_N is not None and targets.labels_N.tolist() == labels_E[4 * part : 4 * part + 4].tolist()
        assert sorted(recent.items_R.tolist()) == [item for item in (1, 4, 7, 10) if item <= 4 * part + 4]
        assert span.n_items == 4 * part + 4


def test_an_empty_base_block_gives_parts_without_targets() -> None:
    assert [
        len(due_targets(recent))
        for recent, _ in base_stream(append_events(Histories.empty(), Events.trainable(*torch.zeros(2, 0)), 0), 3)
    ] == [0] * 3
