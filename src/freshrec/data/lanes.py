"""Session-parallel batches, as GRU4Rec's authors train: sessions side by side in lanes, one event of each a step.

A session is a run of events of one user, each but the first a target. When one is over, the next that has not been read
takes its lane; when none is left, the lane is dropped. A recurrent model carries its state along the lanes.
"""

import heapq
from collections.abc import Iterator

import torch
from torch import Tensor

from freshrec.data.batches import Targets, smaller, without_secrets
from freshrec.types import SECRET, Batch, Lanes


def schedule(lengths_S: Tensor, n_lanes: int) -> tuple[Tensor, Tensor]:
    """(S,) the lane of each session, and the step in which it begins; a session of n targets takes n steps."""
    free = [(0, lane) for lane in range(n_lanes)]  # the step from which each lane is free; a heap
    lanes, steps = [], []
    for length in lengths_S.tolist():
        step, lane = free[0]
        heapq.heapreplace(free, (step + length, lane))
        lanes.append(lane)
        steps.append(step)
    return torch.tensor(lanes, dtype=torch.int64), torch.tensor(steps, dtype=torch.int64)


def lane_batches(targets: Targets, size: int) -> Iterator[Batch]:
    """One epoch, a row per lane and step: an event and the next one, its target; sessions by their first event's time.

    A target that nothing may be known before, and one right after a secret row, are left out.
    """
    targets = without_secrets(targets)
    follows_N = (targets.lengths(1) > 0) & (targets.histories.due_R[(targets.rows_N - 1).clamp(min=0)] != SECRET)
    targets = targets[follows_N]
    if not len(targets):
        return
    targets = targets[targets.rows_N.argsort()]
    begins_N = torch.ones(len(targets), dtype=torch.bool)
    begins_N[1:] = (targets.rows_N[1:] != targets.rows_N[:-1] + 1) | (targets.users_N[1:] != targets.users_N[:-1])
    session_N = begins_N.cumsum(0) - 1
    lengths_S, first_S = torch.bincount(session_N), begins_N.nonzero()[:, 0]
    order_S = targets.histories.times_R[targets.rows_N[first_S] - 1].argsort(stable=True)
    n_lanes = smaller(size, len(order_S))
    lane_S, step_S = torch.empty_like(order_S), torch.empty_like(order_S)
    lane_S[order_S], step_S[order_S] = (part.to(order_S) for part in schedule(lengths_S[order_S], n_lanes))
    step_N = step_S[session_N] + torch.arange(len(targets)) - first_S[session_N]
    lane_N, carried = lane_S[session_N], dict[int, list[Tensor]]()
    for which in (step_N * n_lanes + lane_N).argsort().split(torch.bincount(step_N).tolist()):
        part, items_R = targets[which], targets.histories.items_R
        lanes = Lanes(lane_N[which], begins_N[which], n_lanes, carried)
        history_B1 = items_R[part.rows_N - 1, None].long()
        yield Batch(part.users_N, history_B1, part.items_N[:, None], lanes=lanes)
