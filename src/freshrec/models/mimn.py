"""MIMN-R: a memory of K slots that each event of a user reads and writes; its rows, projected, are the interests.

After Pi et al., "Practice on Long Sequential User Behavior Modeling for Click-Through Rate Prediction", KDD 2019, and
the authors' code. Theirs predicts clicks from the last read; this one ranks. It is meant to be trained on the base
block and then frozen, while memories follow events. Differs from the paper: a memory is computed from the last `length`
events, not carried for life (within that length the two are equal); every position learns, the next item by sampled
softmax; no induction unit; what evens out the use of the slots is that of their code, but counts the weights that are
written with, and their gradients, instead of a copy addressed once more. Items that come after the first training start
at 0 and are passed over in histories until they are trained.

Letters beside the usual: M numbers of a slot, C units of the controller, G its gates, H heads: one reads, one writes.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freshrec.config import Count, CountOrZero, Positive, Weight, check_options
from freshrec.nn.embedding_table import EmbeddingTable, grow_with_zeros, lookup_many
from freshrec.nn.layers import attend, has_vector, sampled_logits, sampled_softmax_loss
from freshrec.random_streams import global_stream, stream_seed
from freshrec.types import Batch, Forward

# Constants of the authors' code: bound of the heads' outputs, sharpness, and the use of a slot that is used much
CLIP, SHARPNESS, USAGE_SCALE = 20.0, 2.0, 400.0


@dataclass(frozen=True)
class MIMNSpec:
    """Options of MIMN-R; slots, sizes and the weight are those of the authors' code."""

    k: Count = 4  # slots of the memory, and interests
    d: Count = 64
    slot: Count = 32  # numbers of a slot
    units: Count = 32  # of the controller
    usage_penalty: Weight = 1e-3  # of the penalty on an uneven use of the slots; 0: nothing looks at their use
    attention: Literal["hard", "soft"] = "hard"  # "hard": the closest interest learns, as it serves; "soft": all do
    length: Count = 100
    lr: Positive = 0.01
    batch: Count = 128  # windows, each with up to `length` targets
    negatives: Count = 512
    std: Positive = 0.1
    categories: CountOrZero = 0  # room for so many, of items; 0: they are not looked at

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> "MIMN":
        """A model without users and items."""
        return MIMN(self, seed)


class SlotMemory(NamedTuple):
    """All that is known of some users."""

    slots_BKM: Tensor
    controller_BC: Tensor
    read_BM: Tensor  # what the last event read
    usage_BK: Tensor  # how much was written to each slot, over all events


def gru_step(by_input_BG: Tensor, by_state_BG: Tensor, state_BC: Tensor) -> Tensor:
    """(B, C) the next state of a gated recurrent unit; G = 3 C are the gates reset, keep, new of `torch.nn.GRUCell`."""
    n_units = state_BC.shape[1]
    open_BG = torch.sigmoid(by_input_BG[:, : 2 * n_units] + by_state_BG[:, : 2 * n_units])
    reset_BC, keep_BC = open_BG.chunk(2, 1)
    new_BC = torch.tanh(by_input_BG[:, 2 * n_units :] + reset_BC * by_state_BG[:, 2 * n_units :])
    return torch.lerp(new_BC, state_BC, keep_BC)


def address_slots(query_BHM: Tensor, sharpness_BH: Tensor, keys_KM: Tensor, slots_BKM: Tensor) -> Tensor:
    """(B, H, K) ln w, w_j the softmax of sharpness (cos(query, key_j) + cos(query, slot_j)) / 2; keys of length 1."""
    both_BKM = F.normalize(slots_BKM, dim=2) + keys_KM
    cosines_BHK = torch.bmm(F.normalize(query_BHM, dim=2), both_BKM.transpose(1, 2))
    return F.log_softmax(sharpness_BH[..., None] / 2 * cosines_BHK, 2)


def shift_weights(log_w_BK: Tensor, shift_B3: Tensor, sharpness_B1: Tensor) -> Tensor:
    """(B, K) w: each weight shared with the neighbours in the circle of slots, then to the power of the sharpness."""
    moved_BK3 = torch.stack([log_w_BK, log_w_BK.roll(1, 1), log_w_BK.roll(-1, 1)], 2)
    return torch.softmax(sharpness_B1 * torch.logsumexp(moved_BK3 + F.log_softmax(shift_B3, 1)[:, None], 2), 1)


def write_slots(slots_BKM: Tensor, w_BK: Tensor, erase_BM: Tensor, add_BM: Tensor) -> Tensor:
    """M (1 - w e^T) + w a^T: erased first, then added to."""
    w_BK1 = w_BK[..., None]
    return slots_BKM * (1 - w_BK1 * erase_BM[:, None]) + w_BK1 * add_BM[:, None]


def usage_variance(usage_BK: Tensor) -> Tensor:
    """mean((g - mean g)^2) / K / B of the use g of each user's slots."""
    return (usage_BK - usage_BK.mean(1, keepdim=True)).square().mean() / usage_BK.numel()


class MemoryCell(nn.Module):
    """Events into memories, one after the other; each reads before it writes."""

    def __init__(self, spec: MIMNSpec) -> None:
        super().__init__()
        self.balances_usage, self.std = spec.usage_penalty > 0, spec.std
        n_gates = 3 * spec.units  # of a GRU; torch's own cell knows no vmap, and cannot take all items at once
        self.by_item, self.by_state = nn.Linear(spec.d, n_gates), nn.Linear(spec.units, n_gates)
        self.by_read = nn.Linear(spec.slot, n_gates, bias=False)
        n_used, n_moves = (spec.k, 3) if self.balances_usage else (0, 0)
        n_sharpness = 3 if self.balances_usage else 2
        self.sizes = [3 * spec.slot, spec.slot, n_sharpness, n_moves]  # of tanh, sigmoid, softplus, softmax
        self.heads = nn.Linear(spec.units + n_used, sum(self.sizes))
        nn.init.trunc_normal_(self.heads.weight, std=spec.units**-0.5)
        nn.init.zeros_(self.heads.bias)
        self.keys_KM = nn.Parameter(0.5 * torch.randn(spec.k, spec.slot))  # before tanh
        self.first_read_1M = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, spec.slot)))  # before tanh
        self.register_buffer("blank_KM", torch.tanh(1e-5 * torch.randn(spec.k, spec.slot)))

    blank_KM: Tensor

    def initial_memory(self, n_users: int) -> SlotMemory:
        """The memory of users without events."""
        blank_BKM, read_BM = self.blank_KM.expand(n_users, -1, -1), torch.tanh(self.first_read_1M).expand(n_users, -1)
        controller_BC = torch.zeros(n_users, self.by_state.in_features)
        return SlotMemory(blank_BKM, controller_BC, read_BM, torch.zeros(n_users, len(self.blank_KM)))

    def forward(self, items_BTD: Tensor, real_BT: Tensor, memory: SlotMemory) -> tuple[Tensor, SlotMemory]:
        """(B, T, K, M) the slots after each event, and the memory after the last; what is not real changes nothing.

        The controller gets the items' vectors as if they had started with variance 1: from small ones it learns slowly.
        """
        keys_KM, slots = F.normalize(torch.tanh(self.keys_KM), dim=1), []
        gates_BTG = self.by_item(items_BTD / self.std)
        for gates_BG, real_B1 in zip(gates_BTG.unbind(1), real_BT[..., None].unbind(1)):
            memory = self._step(gates_BG, real_B1, memory, keys_KM)
            slots.append(memory.slots_BKM)
        return torch.stack(slots, 1), memory

    def _step(self, gates_BG: Tensor, real_B1: Tensor, old: SlotMemory, keys_KM: Tensor) -> SlotMemory:
        controller_BC = gru_step(
            gates_BG + self.by_read(old.read_BM), self.by_state(old.controller_BC), old.controller_BC
        )
        head_inputs = controller_BC
        if self.balances_usage:
            head_inputs = torch.cat([controller_BC, old.usage_BK.detach() / USAGE_SCALE], 1)
        tanh, sigmoid, softplus, softmax = self.heads(head_inputs).clamp(-CLIP, CLIP).split(self.sizes, 1)
        query_BHM, add_BM = torch.tanh(tanh).unflatten(1, (3, -1)).split([2, 1], 1)
        sharpness_BH = SHARPNESS * (F.softplus(softplus) + 1)
        log_w_BHK = address_slots(query_BHM, sharpness_BH[:, :2], keys_KM, old.slots_BKM)
        log_r_BK, log_w_BK = log_w_BHK.unbind(1)
        w_BK = shift_weights(log_w_BK, softmax, 2 * sharpness_BH[:, 2:]) if self.balances_usage else log_w_BK.exp()
        w_BK = w_BK * real_B1
        read_BM = torch.bmm(log_r_BK.exp()[:, None], old.slots_BKM)[:, 0]
        return SlotMemory(
            write_slots(old.slots_BKM, w_BK, torch.sigmoid(sigmoid), add_BM[:, 0]),
            torch.where(real_B1, controller_BC, old.controller_BC),
            torch.where(real_B1, read_BM, old.read_BM),
            old.usage_BK + w_BK,
        )


class MIMN(nn.Module):
    """An `EncodingModel` with K interests, which no strategy carries from span to span."""

    batch_format = "window"

    def __init__(self, spec: MIMNSpec, seed: int) -> None:
        super().__init__()
        self.spec, self.seed, self.n_users, self.n_items = spec, seed, 0, 0
        self.moments: dict[str, Tensor] = {}
        self.items = EmbeddingTable(spec.d, spec.std, stream_seed(seed, "items"), spec.categories)
        with global_stream(seed, "dense weights"):
            self.cell = MemoryCell(spec)
            self.project = nn.Linear(spec.slot, spec.d)

    def grow(self, n_users: int, n_items: int) -> None:
        """Make room for new users and items; items that come late have no vector until they are trained."""
        self.n_users, self.n_items = n_users, n_items
        grow_with_zeros(self.items, n_items)

    def forward(self, batch: Batch) -> Forward:
        """Sampled softmax at each position that has a target, under the label-aware mix of the interests there."""
        assert batch.targets_BT is not None and batch.negatives_N is not None
        real_BT, negative_N = batch.history_BT > 0, batch.negatives_N
        is_target_BT = real_BT & (batch.targets_BT > 0)
        target_B = batch.targets_BT[is_target_BT]
        items_BTD, target_BD, negative_ND = lookup_many(self.items, batch.history_BT, target_B, negative_N)
        slots_BTKM, memory = self.cell(items_BTD, real_BT, self.cell.initial_memory(len(batch)))
        vectors_BKD = self.project(slots_BTKM[is_target_BT])
        user_BD = attend(vectors_BKD, target_BD, None, self.spec.attention)
        logits_BN = sampled_logits(user_BD, target_BD, negative_ND, target_B, negative_N)
        loss = sampled_softmax_loss(logits_BN) + self.spec.usage_penalty * usage_variance(memory.usage_BK)
        return Forward(loss, vectors_BKD, target_BD, logits_BN)

    def encode(self, items_BTD: Tensor, batch: Batch) -> Tensor:
        """`user_vectors` of a history whose items have these vectors, with gradients."""
        if batch.history_BT.shape[1] == 0:
            return torch.zeros(len(batch), self.spec.k, self.spec.d)
        real_BT = has_vector(items_BTD, batch.history_BT)
        _, memory = self.cell(items_BTD, real_BT, self.cell.initial_memory(len(batch)))
        vectors_BKD: Tensor = self.project(memory.slots_BKM) * real_BT.any(1)[:, None, None]
        return vectors_BKD
