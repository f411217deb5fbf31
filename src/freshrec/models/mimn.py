"""MIMN-R: each event reads and writes a memory of K slots per user; the projected slots are the user's interests.

After Pi et al., "Practice on Long Sequential User Behavior Modeling for Click-Through Rate Prediction", KDD 2019, and
the authors' code. Their model predicts clicks from the last read; this one ranks items. It is meant to be trained on
the base block and then frozen, while the memories follow new events. Differs from the paper:

- A memory is computed from the last `length` events, not carried for life. Within that length both are equal.
- Every position is trained to predict the next item, by sampled softmax. There is no induction unit.
- The penalty on uneven slot usage is that of their code. It sums the weights that are written with, gradients included;
  theirs computes these weights a second time.
- Items that arrive after the first training start at 0. Histories skip them until they are trained.

More dimension letters: M numbers per slot, C units of the controller, G its gates, H heads (one reads, one writes).
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

# Constants of the authors' code: bound of the heads' outputs, sharpness, and divisor of the slot usage
CLIP, SHARPNESS, USAGE_SCALE = 20.0, 2.0, 400.0


@dataclass(frozen=True)
class MIMNSpec:
    """Options of MIMN-R. The defaults of `k`, `slot`, `units` and `usage_penalty` are those of the authors' code."""

    k: Count = 4  # Number of memory slots, and of interests, per user.
    d: Count = 64  # Dimensions of the user and item vectors.
    slot: Count = 32  # Dimensions of a memory slot.
    units: Count = 32  # Units of the controller, which is a GRU.
    usage_penalty: Weight = 1e-3  # Weight of the penalty on uneven use of the slots; 0 = no balancing of their use.
    attention: Literal["hard", "soft"] = "hard"  # Interests that a target trains: the closest ("hard") or all ("soft").
    length: Count = 100  # Number of most recent events per user that the model reads.
    lr: Positive = 0.01  # Learning rate of Adam.
    batch: Count = 128  # Windows per training step, each with up to `length` targets.
    negatives: Count = 512  # Random negative items per training step, shared by the batch.
    std: Positive = 0.1  # Standard deviation of the random values that new vectors start with.
    categories: CountOrZero = 0  # Number of category embeddings added to the item embeddings; 0 = off.

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, seed: int) -> "MIMN":
        """Return a new model without users and items."""
        return MIMN(self, seed)


class SlotMemory(NamedTuple):
    """Memories of the users in a batch."""

    slots_BKM: Tensor
    controller_BC: Tensor
    read_BM: Tensor  # content that the last event read
    usage_BK: Tensor  # sum of the write weights of each slot, over all events


def gru_cell(by_input_BG: Tensor, by_state_BG: Tensor, state_BC: Tensor) -> Tensor:
    """Return the next state of a GRU, (B, C). G = 3 C holds the gates reset, keep and new, as in `torch.nn.GRUCell`."""
    n_units = state_BC.shape[1]
    open_BG = torch.sigmoid(by_input_BG[:, : 2 * n_units] + by_state_BG[:, : 2 * n_units])
    reset_BC, keep_BC = open_BG.chunk(2, 1)
    new_BC = torch.tanh(by_input_BG[:, 2 * n_units :] + reset_BC * by_state_BG[:, 2 * n_units :])
    return torch.lerp(new_BC, state_BC, keep_BC)


def address_slots(query_BHM: Tensor, sharpness_BH: Tensor, keys_KM: Tensor, slots_BKM: Tensor) -> Tensor:
    """ln w, w = softmax_j of sharpness (cos(query, key_j) + cos(query, slot_j)) / 2; (B, H, K). Keys have norm 1."""
    both_BKM = F.normalize(slots_BKM, dim=2) + keys_KM
    cosines_BHK = torch.bmm(F.normalize(query_BHM, dim=2), both_BKM.transpose(1, 2))
    return F.log_softmax(sharpness_BH[..., None] / 2 * cosines_BHK, 2)


def shift_weights(log_w_BK: Tensor, shift_B3: Tensor, sharpness_B1: Tensor) -> Tensor:
    """Share each weight with its neighbours in the ring of slots, raise it to the sharpness, and normalise; (B, K)."""
    moved_BK3 = torch.stack([log_w_BK, log_w_BK.roll(1, 1), log_w_BK.roll(-1, 1)], 2)
    return torch.softmax(sharpness_B1 * torch.logsumexp(moved_BK3 + F.log_softmax(shift_B3, 1)[:, None], 2), 1)


def write_slots(slots_BKM: Tensor, w_BK: Tensor, erase_BM: Tensor, add_BM: Tensor) -> Tensor:
    """M (1 - w e^T) + w a^T: erase, then add."""
    w_BK1 = w_BK[..., None]
    return slots_BKM * (1 - w_BK1 * erase_BM[:, None]) + w_BK1 * add_BM[:, None]


def usage_variance(usage_BK: Tensor) -> Tensor:
    """mean((g - mean g)^2) / (K B), where g is the usage of each user's slots."""
    return (usage_BK - usage_BK.mean(1, keepdim=True)).square().mean() / usage_BK.numel()


class MemoryCell(nn.Module):
    """Update memories with events, one after the other. Each event reads before it writes."""

    def __init__(self, spec: MIMNSpec) -> None:
        super().__init__()
        self.balances_usage, self.std = spec.usage_penalty > 0, spec.std
        n_gates = 3 * spec.units  # of a GRU; torch's own cell supports no vmap and cannot process all items at once
        self.by_item, self.by_state = nn.Linear(spec.d, n_gates), nn.Linear(spec.units, n_gates)
        self.by_read = nn.Linear(spec.slot, n_gates, bias=False)
        n_used, n_moves = (spec.k, 3) if self.balances_usage else (0, 0)
        n_sharpness = 3 if self.balances_usage else 2
        self.sizes = [3 * spec.slot, spec.slot, n_sharpness, n_moves]  # inputs of tanh, sigmoid, softplus, softmax
        self.heads = nn.Linear(spec.units + n_used, sum(self.sizes))
        nn.init.trunc_normal_(self.heads.weight, std=spec.units**-0.5)
        nn.init.zeros_(self.heads.bias)
        self.keys_KM = nn.Parameter(0.5 * torch.randn(spec.k, spec.slot))  # before tanh
        self.first_read_1M = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, spec.slot)))  # before tanh
        self.register_buffer("blank_KM", torch.tanh(1e-5 * torch.randn(spec.k, spec.slot)))

    blank_KM: Tensor

    def initial_memory(self, n_users: int) -> SlotMemory:
        """Return the memory of users without events."""
        blank_BKM, read_BM = self.blank_KM.expand(n_users, -1, -1), torch.tanh(self.first_read_1M).expand(n_users, -1)
        controller_BC = torch.zeros(n_users, self.by_state.in_features)
        return SlotMemory(blank_BKM, controller_BC, read_BM, torch.zeros(n_users, len(self.blank_KM)))

    def forward(self, items_BTD: Tensor, real_BT: Tensor, memory: SlotMemory) -> tuple[Tensor, SlotMemory]:
        """Return the slots after each event, shape (B, T, K, M), and the memory after the last one.

        Padding leaves the memory unchanged. Item vectors are divided by their initial standard deviation, because the
        controller learns slowly from small inputs.
        """
        keys_KM, slots = F.normalize(torch.tanh(self.keys_KM), dim=1), []
        gates_BTG = self.by_item(items_BTD / self.std)
        for gates_BG, real_B1 in zip(gates_BTG.unbind(1), real_BT[..., None].unbind(1)):
            memory = self._step(gates_BG, real_B1, memory, keys_KM)
            slots.append(memory.slots_BKM)
        return torch.stack(slots, 1), memory

    def _step(self, gates_BG: Tensor, real_B1: Tensor, old: SlotMemory, keys_KM: Tensor) -> SlotMemory:
        controller_BC = gru_cell(
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
    """An `EncodingModel` with K interests per user. No strategy stores them between spans."""

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
        """Add rows for new users and items. The vector of a later item stays 0 until it is trained."""
        self.n_users, self.n_items = n_users, n_items
        grow_with_zeros(self.items, n_items)

    def forward(self, batch: Batch) -> Forward:
        """Return the sampled softmax loss over all positions with a target, plus the usage penalty."""
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
        """Return the user vectors (B, K, D), with gradients, of histories whose items have the vectors `items_BTD`."""
        if batch.history_BT.shape[1] == 0:
            return torch.zeros(len(batch), self.spec.k, self.spec.d)
        real_BT = has_vector(items_BTD, batch.history_BT)
        _, memory = self.cell(items_BTD, real_BT, self.cell.initial_memory(len(batch)))
        vectors_BKD: Tensor = self.project(memory.slots_BKM) * real_BT.any(1)[:, None, None]
        return vectors_BKD
