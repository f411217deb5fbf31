"""MIMN-R: writing and addressing by hand, events one by one or at once, and items that were never trained."""

import math
from dataclasses import replace

import circles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.data.histories import append_events
from freshrec.learn.fit import FitConfig
from freshrec.models.mimn import (
    MIMN,
    MIMNSpec,
    SlotMemory,
    address_slots,
    gru_cell,
    shift_weights,
    usage_variance,
    write_slots,
)
from freshrec.nn.scoring import item_vectors, score_items, user_vectors
from freshrec.strategies.baselines import Frozen
from freshrec.types import Batch, EncodingModel, Histories, InterestModel, Span, State

N_ITEMS = 9
SMALL = MIMNSpec(k=3, d=8, slot=6, units=5, std=1.0)


def model_of(spec: MIMNSpec = SMALL, seed: int = 0) -> MIMN:
    model = spec.build(seed)
    model.grow(3, N_ITEMS)
    return model


def query_batch(*histories: list[int]) -> Batch:
    return Batch(torch.arange(1, len(histories) + 1), torch.tensor(histories))


def run(model: MIMN, history: list[int], memory: SlotMemory | None = None) -> SlotMemory:
    """The memory after these events, starting from `memory` or from the initial one."""
    history_1T = torch.tensor([history])
    with torch.no_grad():
        memory = model.cell.initial_memory(1) if memory is None else memory
        after: SlotMemory = model.cell(model.items.weights[history_1T], history_1T > 0, memory)[1]
    return after


def training_batch(history: list[int], targets: list[int]) -> Batch:
    return replace(query_batch(history), targets_BT=torch.tensor([targets]), negatives_N=torch.tensor([1, 3]))


def test_a_write_by_hand() -> None:
    # All ones, w = (1/2, 1/2), e = (1, 0), a = (0.2, 0.4): 1 (1 - 1/2) + 0.1 = 0.6 and 1 (1 - 0) + 0.2 = 1.2.
    slots_BKM, erase_BM, add_BM = torch.ones(1, 2, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.2, 0.4]])
    found_BKM = write_slots(slots_BKM, torch.tensor([[0.5, 0.5]]), erase_BM, add_BM)
    torch.testing.assert_close(found_BKM, torch.tensor([[[0.6, 1.2], [0.6, 1.2]]]), atol=1e-6, rtol=0)


def test_a_write_to_one_slot_that_erases_all_clears_that_slot_only() -> None:
    found_BKM = write_slots(torch.ones(1, 2, 2), torch.tensor([[0.0, 1.0]]), torch.ones(1, 2), torch.zeros(1, 2))
    assert found_BKM.tolist() == [[[1.0, 1.0], [0.0, 0.0]]]


def test_a_slot_is_addressed_by_its_key_and_by_its_content() -> None:
    # Query (2, 0); its length does not matter. Keys (1, 0), (0, 1): cosines 1, 0; slots (0, 3), (1, 1): 0, 1 / sqrt 2.
    # Half their sums: 1/2 and 0.353553; sharpness 4: logits 2 and 1.414214. A slot of zeros has the cosine 0.
    query_BHM, sharpness_BH = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[4.0]])
    log_w = address_slots(query_BHM, sharpness_BH, torch.eye(2), torch.tensor([[[0.0, 3.0], [1.0, 1.0]]]))
    w = 1 / (1 + math.exp(math.sqrt(2) - 2))
    torch.testing.assert_close(log_w.exp(), torch.tensor([[[w, 1 - w]]]))
    torch.testing.assert_close(
        address_slots(query_BHM, sharpness_BH, torch.eye(2), torch.zeros(1, 2, 2)).exp(),
        torch.softmax(torch.tensor([[[2.0, 0.0]]]), 2),
    )


def test_weights_are_shared_with_neighbours_in_the_ring_and_then_sharpened_by_a_power() -> None:
    # Half of w = (0.5, 0.3, 0.2) stays, and 1/4 comes from each of the two neighbours in the ring.
    # So 0.25 + (0.2 + 0.3) / 4 = 0.375, 0.15 + (0.5 + 0.2) / 4 = 0.325, and 0.1 + (0.3 + 0.5) / 4 = 0.3.
    # The power of 2 then squares these, and they are normalised.
    log_w_BK, moves_B3 = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.5, 0.25, 0.25]]).log()
    shared_BK = torch.tensor([[0.375, 0.325, 0.3]])
    torch.testing.assert_close(shift_weights(log_w_BK, moves_B3, torch.tensor([[1.0]])), shared_BK)
    squared_BK = shared_BK.square() / shared_BK.square().sum()
    torch.testing.assert_close(shift_weights(log_w_BK, moves_B3, torch.tensor([[2.0]])), squared_BK)


def test_sharpening_by_a_high_power_stays_finite() -> None:
    # 0.25^84 is below the smallest float, so a quotient of powers would be 0 / 0.
    log_w_BK = torch.full((1, 4), math.log(0.25), requires_grad=True)
    w_BK = shift_weights(log_w_BK, torch.zeros(1, 3), torch.tensor([[84.0]]))
    w_BK[0, 0].backward()
    torch.testing.assert_close(w_BK, torch.full((1, 4), 0.25))
    assert log_w_BK.grad is not None and log_w_BK.grad.isfinite().all()


def test_the_controller_is_a_gated_recurrent_unit() -> None:
    cell = torch.nn.GRUCell(4, 3)
    with torch.no_grad():
        input_BD, state_BC = torch.randn(2, 4), torch.randn(2, 3)
        by_input_BG = F.linear(input_BD, cell.weight_ih, cell.bias_ih)
        by_state_BG = F.linear(state_BC, cell.weight_hh, cell.bias_hh)
        torch.testing.assert_close(gru_cell(by_input_BG, by_state_BG, state_BC), cell(input_BD, state_BC))


def test_the_variance_of_slot_usage_by_hand() -> None:
    # Usage (3, 1) and (2, 2): deviations 1, 1, 0, 0 and mean square 1/2; divided by 2 slots and 2 users: 1/8.
    assert usage_variance(torch.tensor([[3.0, 1.0], [2.0, 2.0]])) == 0.125


def test_one_event_by_hand() -> None:
    # The weights of the heads are 0, so their outputs are the biases, clipped to -20 .. 20. Keys (1, 0) and (0, 1),
    # slots (0, 0) and (4, 4). The read query is (1, 0): cosines 1, 0 with the keys and 0, 1 / sqrt 2 with the slots,
    # sharpness 2 (20 + 1). The write query is (0, 1): cosines 0, 1 and 0, 1 / sqrt 2, sharpness 2 (ln 2 + 1). Then one
    # third of each write weight stays, and two thirds go to the only neighbour. The final power is 4 (ln 2 + 1).
    cell = MIMNSpec(k=2, d=2, slot=2, units=2, std=1.0).build(0).cell
    cell.heads.weight.data.zero_()
    biases = {"read": [20.0, 0.0], "write": [0.0, 20.0], "add": [30.0, 0.5], "erase": [-30.0, 0.0]}
    biases |= {"sharpness": [25.0, 0.0], "power": [0.0], "shift": [0.0, 0.0, 0.0]}
    cell.heads.bias.data = torch.tensor([number for part in biases.values() for number in part])
    cell.keys_KM.data, cell.blank_KM = torch.tensor([[9.0, 0.0], [0.0, 9.0]]), torch.tensor([[0.0, 0.0], [4.0, 4.0]])
    with torch.no_grad():
        slots_BTKM, memory = cell(torch.ones(1, 1, 2), torch.ones(1, 1, dtype=torch.bool), cell.initial_memory(1))
    read_K = torch.softmax(21 * torch.tensor([1, 1 / math.sqrt(2)]), 0)
    torch.testing.assert_close(memory.read_BM[0], read_K[1] * torch.tensor([4.0, 4.0]))  # read before the write
    w_K = torch.softmax((math.log(2) + 1) * torch.tensor([0, 1 + 1 / math.sqrt(2)]), 0)
    w_K = ((w_K + 2 * w_K.flip(0)) / 3) ** (4 * (math.log(2) + 1))
    w_K = w_K / w_K.sum()
    erase_M, add_M = torch.tensor([0.0, 0.5]), torch.tensor([1.0, math.tanh(0.5)])
    written_KM = torch.stack([w_K[0] * add_M, 4 * (1 - w_K[1] * erase_M) + w_K[1] * add_M])
    torch.testing.assert_close(slots_BTKM[0, 0], written_KM)
    torch.testing.assert_close(memory.usage_BK[0], w_K)


def test_events_one_by_one_give_the_same_memory_as_all_at_once() -> None:
    model, history = model_of(), [4, 2, 7, 2, 9, 1]
    memory = model.cell.initial_memory(1)
    for n, item in enumerate(history, 1):
        memory = run(model, [item], memory)
        for carried, at_once in zip(memory, run(model, history[:n])):
            torch.testing.assert_close(carried, at_once)
        with torch.no_grad():
            torch.testing.assert_close(user_vectors(model, query_batch(history[:n])), model.project(memory.slots_BKM))
    assert memory.usage_BK.sum().item() == pytest.approx(6)  # the write weights of an event sum to 1


def test_padding_does_not_change_the_memory() -> None:
    model = model_of()
    before = run(model, [4, 2])
    assert all(torch.equal(old, new) for old, new in zip(before, run(model, [0, 0], before)))
    gapped = model(training_batch([0, 4, 0, 2, 7], [0, 2, 0, 7, 8])).vectors_BKD
    torch.testing.assert_close(gapped, model(training_batch([4, 2, 7], [2, 7, 8])).vectors_BKD)


def test_each_position_sees_its_past_and_not_its_future() -> None:
    model = model_of()
    first, other = (model(training_batch([4, 2, last], [2, 7, 8])).vectors_BKD for last in (7, 5))
    assert torch.equal(first[:2], other[:2]) and (first[2] - other[2]).abs().max() > 0.01
    torch.testing.assert_close(first[2:], user_vectors(model, query_batch([4, 2, 7])))


def trained_once(usage_penalty: float) -> tuple[float, Tensor, MIMN]:
    """The part of the loss that is the usage penalty, the variance of the usage, and the model."""
    model = model_of(replace(SMALL, usage_penalty=usage_penalty))
    batch = training_batch([4, 2, 7], [2, 7, 8])
    forward = model(batch)
    assert forward.logits_BN is not None
    choice = F.cross_entropy(forward.logits_BN, torch.zeros(3, dtype=torch.int64))
    return float((forward.loss - choice).detach()), usage_variance(run(model, [4, 2, 7]).usage_BK), model


def test_uneven_slot_usage_adds_to_the_loss_and_is_an_input_of_the_heads_unless_it_is_off() -> None:
    penalty, variance, model = trained_once(2.0)
    assert penalty == pytest.approx(2 * float(variance), abs=1e-5) and variance > 0
    with torch.no_grad():  # the usage of each slot is an input of the heads
        fresh, used = (
            model.cell.initial_memory(1),
            model.cell.initial_memory(1)._replace(usage_BK=torch.tensor([[400.0, 0.0, 0.0]])),
        )
        assert not torch.allclose(run(model, [4], fresh).slots_BKM, run(model, [4], used).slots_BKM)
    penalty, _, model = trained_once(0.0)
    assert penalty == 0
    used = model.cell.initial_memory(1)._replace(usage_BK=torch.tensor([[400.0, 0.0, 0.0]]))
    assert torch.equal(run(model, [4]).slots_BKM, run(model, [4], used).slots_BKM)


def test_no_gradient_flows_through_the_usage_input_of_the_heads() -> None:
    model = model_of()
    used = model.cell.initial_memory(1)._replace(usage_BK=torch.tensor([[400.0, 0.0, 0.0]], requires_grad=True))
    slots_BTKM, _ = model.cell(model.items.weights[torch.tensor([[4]])], torch.tensor([[True]]), used)
    (gradient,) = torch.autograd.grad(slots_BTKM.sum(), used.usage_BK, allow_unused=True)
    assert gradient is None


def test_all_parameters_get_gradients_and_the_initial_memory_is_no_parameter() -> None:
    model = model_of()
    model(training_batch([4, 2, 7], [2, 7, 8])).loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() and (grad != 0).any() for grad in gradients.values())
    assert "cell.keys_KM" in gradients and "cell.first_read_1M" in gradients and "cell.blank_KM" not in gradients


def test_hard_attention_trains_the_closest_interest_and_soft_attention_all() -> None:
    for attention in ("hard", "soft"):
        model = model_of(replace(SMALL, attention=attention, usage_penalty=0.0))
        batch = training_batch([4, 2], [0, 8])
        vectors_KD = user_vectors(model, batch)[0]
        near_K = vectors_KD @ item_vectors(model)[8]
        share_K = torch.softmax(near_K, 0) if attention == "soft" else F.one_hot(near_K.argmax(), 3).float()
        logits_N = item_vectors(model)[[8, 1, 3]] @ (share_K @ vectors_KD)
        torch.testing.assert_close(model(batch).loss, -torch.log_softmax(logits_N, 0)[0])


def test_the_interests_are_the_projected_slots_and_the_best_of_them_gives_the_score() -> None:
    model, batch = model_of(), query_batch([4, 2, 7])
    assert isinstance(model, EncodingModel) and not isinstance(model, InterestModel)
    vectors_KD, items_N = user_vectors(model, batch)[0], torch.tensor([5, 3])
    with torch.no_grad():
        torch.testing.assert_close(vectors_KD, model.project(run(model, [4, 2, 7]).slots_BKM)[0])
    torch.testing.assert_close(
        score_items(model, batch, items_N)[0], (item_vectors(model)[items_N] @ vectors_KD.t()).amax(1)
    )
    assert torch.equal(model.encode(item_vectors(model)[batch.history_BT], batch)[0], vectors_KD)
    assert (user_vectors(model, query_batch([0, 0])) == 0).all()
    nothing = Batch(torch.tensor([1]), torch.zeros(1, 0, dtype=torch.int64))
    assert torch.equal(user_vectors(model, nothing), torch.zeros(1, 3, 8))


def test_a_frozen_model_follows_its_users_and_ignores_items_that_it_was_not_trained_on() -> None:
    # Users 1..60 go round circles of 5 items each. Then items 21..30 are added, which are never trained.
    base = circles.circles(range(1, 61), 1)
    strategy = Frozen(fit=FitConfig(base_epochs=6))
    state = State(MIMNSpec(d=16, negatives=16).build(0), histories=append_events(Histories.empty(), base, 60))
    state = strategy.update(state, Span(0, base, 60, 20))
    before = {name: weight.clone() for name, weight in state.model.named_parameters()}
    late = circles.circles(range(61, 62), 1)
    state = strategy.update(replace(state, histories=append_events(state.histories, late, 61)), Span(1, late, 61, 30))
    model = state.model
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    best_B5 = score_items(model, query_batch([1, 2, 3], [6, 7, 8]), torch.arange(1, 31)).topk(5).indices + 1
    assert ((best_B5[:, 0] - 1) // 5).tolist() == [0, 1] and best_B5.max() <= 20  # from the user's own circle
    with_KD, without_KD = user_vectors(model, query_batch([1, 22, 2, 3, 21], [0, 1, 0, 2, 3]))
    torch.testing.assert_close(with_KD, without_KD)


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_model() -> None:
    first, again, other = (user_vectors(model_of(seed=seed), query_batch([4, 2, 7])) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other)
