"""Samples of past events: each target with the history before it, and a uniform sample of all targets so far.

Letters: N remembered targets, M draws from them, T history items.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.data.batches import Targets, history_items, mask_held_out
from freshrec.device import uniform
from freshrec.types import TRAINED, TrainedModel


@dataclass(frozen=True)
class TrainingSamples:
    """Targets, each with its history at that time, for training after the events themselves are no longer stored."""

    users_N: Tensor
    histories_NT: Tensor  # int32, most recent last, padded with 0 on the left
    items_N: Tensor
    labels_N: Tensor | None = None  # 1 = clicked, 0 = not; None = all clicked

    def __len__(self) -> int:
        return len(self.items_N)

    def __getitem__(self, index_N: Tensor) -> "TrainingSamples":
        columns: list[Any] = [None if column is None else column[index_N] for column in vars(self).values()]
        return TrainingSamples(*columns)


def sample_history_length(model: TrainedModel) -> int:
    """Return the number of history items to store with a target; 0 if the model does not read histories."""
    return 0 if model.batch_format == "pair" else int(model.spec.length)


def copy_samples(targets: Targets, length: int) -> TrainingSamples:
    """Copy `targets`, each with its last `length` history items. Held-out items become padding."""
    visible_targets = mask_held_out(targets)
    history_NT = history_items(visible_targets, length).int()
    history_NT = F.pad(history_NT, (length - history_NT.shape[1], 0))
    return TrainingSamples(targets.users_N, history_NT, targets.items_N, targets.labels_N)


def concat_samples(first: TrainingSamples, second: TrainingSamples) -> TrainingSamples:
    """Concatenate samples of the same history length, both with labels or both without."""
    both = zip(vars(first).values(), vars(second).values())
    columns: list[Any] = [None if pair[0] is None else torch.cat(pair) for pair in both]
    return TrainingSamples(*columns)


def append_samples(targets: Targets, samples: TrainingSamples, index_M: Tensor, separate_users: bool) -> Targets:
    """Return `targets` and the samples at `index_M`, which may repeat. Their rows follow those of the histories.

    With `separate_users`, each of the M samples belongs to another user. Models whose batches are windows of a user's
    targets need this.
    """
    histories, (n_samples, width) = targets.histories, samples.histories_NT.shape
    row_NT = torch.cat([samples.histories_NT, samples.items_N[:, None].int()], 1)
    end_N = len(histories.items_R) + torch.arange(1, n_samples + 1) * (width + 1) - 1
    is_item_NT = row_NT > 0
    from_N = end_N - width + is_item_NT.int().argmax(1)  # the first item, or the target itself if its history is empty

    users_M, offsets_U = samples.users_N[index_M], histories.offsets_U
    if separate_users:
        users_M = histories.n_users + 1 + torch.arange(len(index_M))
        offsets_U = torch.cat([offsets_U, offsets_U[-1:].expand(len(index_M))])
    trained_R = torch.full((row_NT.numel(),), TRAINED, dtype=torch.int8)
    extended = replace(
        histories,
        offsets_U=offsets_U,
        items_R=torch.cat([histories.items_R, row_NT.reshape(-1)]),
        times_R=torch.cat([histories.times_R, torch.zeros(len(trained_R), dtype=torch.int64)]),
        due_R=torch.cat([histories.due_R, trained_R]),
    )
    labels_N, items_N = None, None
    if targets.labels_N is not None and samples.labels_N is not None:
        labels_N = torch.cat([targets.labels_N, samples.labels_N[index_M]])
        items_N = torch.cat([targets.items_N, samples.items_N[index_M]])
    return Targets(
        extended,
        torch.cat([targets.rows_N, end_N[index_M]]),
        torch.cat([targets.users_N, users_M]),
        torch.cat([targets.first_row_N, from_N[index_M]]),
        items_N,
        labels_N,
    )


@dataclass(frozen=True)
class Reservoir:
    """A uniform sample of a stream: each of the `n_seen` targets so far is in it with the same probability."""

    samples: TrainingSamples
    size: int  # maximum number of samples
    n_seen: int = 0


def fill_reservoir(targets: Targets, size: int, length: int, rng: torch.Generator) -> Reservoir:
    """Return a reservoir of at most `size` samples with `length` history items, after its first targets."""
    return update_reservoir(
        Reservoir(copy_samples(targets[torch.zeros(0, dtype=torch.int64)], length), size), targets, rng
    )


def update_reservoir(reservoir: Reservoir, targets: Targets, rng: torch.Generator) -> Reservoir:
    """Return the reservoir after it has seen `targets`."""
    slot_W, nth_W = assign_slots(reservoir.n_seen, len(targets), reservoir.size, rng)
    new = copy_samples(targets[nth_W], reservoir.samples.histories_NT.shape[1])
    n_seen = reservoir.n_seen + len(targets)
    from_N = torch.arange(min(reservoir.size, n_seen))  # each slot keeps its sample ...
    from_N[slot_W] = len(reservoir.samples) + torch.arange(len(new))  # ... or gets a new one
    return Reservoir(concat_samples(reservoir.samples, new)[from_N], reservoir.size, n_seen)


def assign_slots(n_seen: int, n_new: int, size: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Slots (W,) that change, and the new targets (W,) that end up in them: Algorithm R without a loop.

    Target i of the stream (from 0) takes slot i while slots are free. After that, it draws u from 0..i and takes slot
    u if it exists. Later targets overwrite earlier ones, so each slot keeps the last target that took it.
    """
    nth_N = n_seen + torch.arange(n_new)
    random_slot_N = (uniform((n_new,), rng, torch.float64) * (nth_N + 1)).long()
    slot_N = torch.where(nth_N < size, nth_N, random_slot_N)
    candidate_N = (slot_N < size).nonzero()[:, 0]
    last_S = torch.full((size,), -1).scatter_reduce_(0, slot_N[candidate_N], candidate_N, "amax")
    slot_W = (last_S >= 0).nonzero()[:, 0]
    return slot_W, last_S[slot_W]
