"""Session-parallel batches, as in GRU4Rec: sessions run side by side in lanes, one event of each per step.

A session is a run of consecutive events of one user. Each event but the first is a target. When a session ends, the
next one takes its lane; when none is left, the lane is dropped. A recurrent model continues from its state at the end
of a lane, which `HiddenStates` keeps between batches.
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from freshrec.data.batches import Targets, limit_batch_size, mask_held_out
from freshrec.types import HELD_OUT, Batch, Forward, SessionLanes


def assign_lanes(lengths_S: Tensor, n_lanes: int) -> tuple[Tensor, Tensor]:
    """Lane and first step of each session, each of shape (S,). A session of n targets takes n steps."""
    free = [(0, lane) for lane in range(n_lanes)]  # a heap: the step from which each lane is free
    lanes, steps = [], []
    for length in lengths_S.tolist():
        step, lane = free[0]
        heapq.heapreplace(free, (step + length, lane))
        lanes.append(lane)
        steps.append(step)
    return torch.tensor(lanes, dtype=torch.int64), torch.tensor(steps, dtype=torch.int64)


def session_parallel_batches(targets: Targets, size: int) -> Iterator[Batch]:
    """Yield one epoch with a row per lane and step: an event, and the next one as its target.

    Sessions are sorted by the time of their first event. A target without an event before it is left out, and so is one
    right after a held-out row.
    """
    targets = mask_held_out(targets)
    has_event_before_N = (targets.history_lengths(1) > 0) & (
        targets.histories.due_R[(targets.rows_N - 1).clamp(min=0)] != HELD_OUT
    )
    targets = targets[has_event_before_N]
    if not len(targets):
        return
    targets = targets[targets.rows_N.argsort()]
    is_first_N = torch.ones(len(targets), dtype=torch.bool)
    is_first_N[1:] = (targets.rows_N[1:] != targets.rows_N[:-1] + 1) | (targets.users_N[1:] != targets.users_N[:-1])
    session_N = is_first_N.cumsum(0) - 1
    lengths_S, first_S = torch.bincount(session_N), is_first_N.nonzero()[:, 0]
    order_S = targets.histories.times_R[targets.rows_N[first_S] - 1].argsort(stable=True)
    n_lanes = limit_batch_size(size, len(order_S))
    lane_S, step_S = torch.empty_like(order_S), torch.empty_like(order_S)
    lane_S[order_S], step_S[order_S] = (column.to(order_S) for column in assign_lanes(lengths_S[order_S], n_lanes))
    step_N = step_S[session_N] + torch.arange(len(targets)) - first_S[session_N]
    lane_N = lane_S[session_N]
    for index_B in (step_N * n_lanes + lane_N).argsort().split(torch.bincount(step_N).tolist()):
        batch_targets, items_R = targets[index_B], targets.histories.items_R
        lanes = SessionLanes(lane_N[index_B], is_first_N[index_B], n_lanes)
        history_B1 = items_R[batch_targets.rows_N - 1, None].long()
        yield Batch(batch_targets.users_N, history_B1, batch_targets.items_N[:, None], lanes=lanes)


class HiddenStates:
    """The hidden states of one recurrent model at the end of each lane, kept between batches.

    Each model and each sequence of batches needs its own: a teacher that reads the student's batches has another one.
    It may be used for several epochs of the same targets, because each epoch starts all lanes again.
    """

    def __init__(self) -> None:
        self.layers: list[Tensor] = []  # (n_lanes, H) for each layer; empty before the first batch

    def run(self, forward: Callable[[Batch], Forward], batch: Batch) -> Forward:
        """Run `forward` on the batch, from the states at the end of its lanes. Without lanes, states are not used."""
        lanes = batch.lanes
        if lanes is None:
            return forward(batch)
        if self.layers:
            continues_B1 = ~lanes.is_first_B[:, None]
            before = tuple(state_LH[lanes.lane_B] * continues_B1 for state_LH in self.layers)
            batch = replace(batch, lanes=replace(lanes, states=before))
        result = forward(batch)
        assert result.states is not None
        if not self.layers:
            self.layers = [state_BH.new_zeros(lanes.n_lanes, state_BH.shape[1]) for state_BH in result.states]
        for state_LH, state_BH in zip(self.layers, result.states):
            state_LH[lanes.lane_B] = state_BH
        return result
