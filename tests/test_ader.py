"""ADER: equations by hand, herding against its definition, and less forgetting than fine-tuning."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import circles
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from freshrec.data.batches import due_targets, targets_at
from freshrec.data.histories import append_events
from freshrec.data.stored_interests import stored_interests_of
from freshrec.learn.exemplars import (
    ExperienceReplay,
    allocate_exemplars,
    build_pool,
    exemplar_batch,
    exemplar_batches,
    herd,
    largest_remainder,
    sample_losses,
    select_exemplars,
    smallest_per_group,
    trainable_targets,
)
from freshrec.learn.fit import FitConfig, fit_base_block
from freshrec.learn.reservoir import TrainingSamples
from freshrec.learn.validation import mean_ndcg
from freshrec.models import MODELS
from freshrec.models.mf import MFSpec
from freshrec.models.sasrec import SASRecSpec
from freshrec.nn.scoring import score_items
from freshrec.random_streams import stream
from freshrec.strategies.ader import ADER, adaptive_weight, distillation, exemplar_distillation_loss
from freshrec.strategies.ader_s import ADERS, select_similar, truncate_sequences
from freshrec.strategies.baselines import FineTune
from freshrec.types import NEVER, Batch, EncodingModel, Events, Histories, Span, State

near = pytest.approx
UNUSED_RNG = torch.Generator()


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float32)


def make_samples(*rows: tuple[int, list[int], int]) -> TrainingSamples:
    """Return exemplars from (user, history, target), for models with a history length of 3."""
    histories = [[0] * (3 - len(history)) + history for _, history, _ in rows]
    users, items = [user for user, _, _ in rows], [item for _, _, item in rows]
    return TrainingSamples(torch.tensor(users), torch.tensor(histories, dtype=torch.int32), torch.tensor(items))


def histories_of(users: list[int], items: list[int]) -> Histories:
    return append_events(Histories.empty(), Events.trainable(torch.tensor(users), torch.tensor(items)), max(users))


# the weight of the loss


def test_the_weight_depends_on_the_shares_of_old_items_and_of_exemplars() -> None:
    """[ADER eq. 4]"""
    assert adaptive_weight(0.8, 100, 100, 25, 100) == near(0.4)  # 0.8 sqrt(1 / 4)
    assert adaptive_weight(0.8, 81, 100, 50, 50) == near(0.72)  # 0.8 sqrt(0.81)
    assert adaptive_weight(0.8, 18_569, 22_692, 28_130, 26_799) == near(0.7414, abs=1e-4)  # cycle 2 of DIGINETICA
    assert adaptive_weight(0.8, 5, 5, 5, 0) == 0


# distillation


def test_distillation_is_a_cross_entropy_over_the_items_that_the_teacher_knows() -> None:
    """[ADER eq. 2]"""
    # p' of (2, 0, 1) = (0.665241, 0.090031, 0.244728); -ln p of (1, 1, 0) = (0.861995, 0.861995, 1.861995). With the
    # new item's 5 in the normaliser, -ln p would be larger by 3.180480, and the loss 4.287183.
    student_BI = row(1, 1, 0, 5).requires_grad_()
    loss = distillation(student_BI, row(2, 0, 1))
    assert loss.item() == near(1.106723, abs=1e-6)
    loss.backward()
    assert student_BI.grad is not None and student_BI.grad[0, 3] == 0 and (student_BI.grad[0, :3] != 0).all()


def test_the_distillation_loss_is_smallest_where_student_and_teacher_agree() -> None:
    # The minimum is the entropy of (0.665241, 0.090031, 0.244728). A constant added to all logits changes nothing.
    student_BI = row(4, 2, 3).requires_grad_()
    loss = distillation(student_BI, row(2, 0, 1))
    assert loss.item() == near(0.832396, abs=1e-6)
    loss.backward()
    assert student_BI.grad is not None and student_BI.grad.abs().max() < 1e-6


# how many exemplars each item gets


def test_items_get_exemplars_in_proportion_to_their_samples() -> None:
    """[ADER eq. 1]"""
    # 3, 2 and 1 of 6 samples, N = 3: 1.5, 1 and 0.5. Two remainders are equal, so the first item is rounded up.
    counts_I = torch.tensor([0, 3, 2, 1])
    assert allocate_exemplars(counts_I, 3, "largest-remainder", False, UNUSED_RNG).tolist() == [0, 2, 1, 0]
    assert allocate_exemplars(counts_I, 100, "largest-remainder", False, UNUSED_RNG).tolist() == [0, 3, 2, 1]
    assert allocate_exemplars(counts_I, 6, "largest-remainder", True, UNUSED_RNG).tolist() == [
        0,
        2,
        2,
        1,
    ]  # 2 each, if the item has 2 samples
    assert not allocate_exemplars(0 * counts_I, 3, "largest-remainder", False, UNUSED_RNG).any()


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(1, 200))
def test_no_exemplar_is_lost_by_rounding(counts: list[int], n: int) -> None:
    counts_I = torch.tensor([0, *counts])
    wanted_I = allocate_exemplars(counts_I, n, "largest-remainder", False, UNUSED_RNG)
    assert int(wanted_I.sum()) == min(n, sum(counts)) and (wanted_I <= counts_I).all()
    assert (largest_remainder(counts_I, n) * sum(counts) - n * counts_I).abs().max() <= sum(counts)  # less than 1 off


def test_a_random_allocation_has_the_right_mean_and_never_exceeds_the_samples_of_an_item() -> None:
    counts_I = torch.tensor([0, 5000, 3000, 2000])
    wanted_I = allocate_exemplars(counts_I, 2000, "multinomial", False, stream(0, "test"))
    assert int(wanted_I.sum()) == 2000
    assert (wanted_I - torch.tensor([0, 1000, 600, 400])).abs().max() < 90  # 4 standard deviations of 22
    few_I = torch.tensor([0, 1, 1, 1])  # all three are drawn in 2 of 9 cases
    assert {int(allocate_exemplars(few_I, 3, "multinomial", True, stream(s, "test")).sum()) for s in range(50)} == {
        1,
        2,
        3,
    }
    assert not allocate_exemplars(0 * few_I, 3, "multinomial", False, stream(0, "test")).any()


# which samples become exemplars


THREE = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
FOUR = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [3.0, 4.0]])


@pytest.mark.parametrize(
    ("points", "m", "repeat", "expected"),
    [
        (THREE, 3, False, [1, 2, 0]),  # mu = (0.6, 0.533): cosines 0.6, 0.8, 0.533
        (THREE, 2, True, [1, 2]),  # 1.1 x 2 rounds are 3; they pick 1, 1, 2, and a repeated pick does not count
        (FOUR, 4, False, [2, 3, 0, 1]),
        (FOUR, 4, True, [2, 3]),  # three of the 5 picks are repeated
        (FOUR, 1, False, [2]),
    ],
)
def test_herding_by_hand(points: Tensor, m: int, repeat: bool, expected: list[int]) -> None:
    group_S = torch.zeros(len(points), dtype=torch.int64)
    assert herd(points, group_S, torch.tensor([m]), repeat).tolist() == expected


def test_herding_keeps_the_mean_of_its_picks_as_close_as_possible_to_the_mean_of_all_samples() -> None:
    # Algorithm 1 as printed: argmin_x || mu - (phi(x) + sum of the picks so far) / k ||, in groups of different sizes.
    features_SD = torch.randn(60, 5, generator=stream(0, "test"))
    group_S = torch.randint(0, 4, (60,), generator=stream(1, "test")) * 3
    wanted_G = torch.zeros(10, dtype=torch.int64).index_fill(0, group_S.unique(), 6)
    found = herd(features_SD, group_S, wanted_G)
    phi_SD = F.normalize(features_SD, dim=1)
    for group in group_S.unique():
        members = (group_S == group).nonzero()[:, 0].tolist()
        mean_D = phi_SD[members].mean(0)
        picks: list[int] = []
        for k in range(1, 7):
            sum_D = phi_SD[picks].sum(0)
            left = [s for s in members if s not in picks]
            picks.append(min(left, key=lambda s: float((mean_D - (phi_SD[s] + sum_D) / k).norm())))  # noqa: B023
        assert [s for s in found.tolist() if s in members] == picks


def test_repeating_all_samples_does_not_change_the_first_pick() -> None:
    group_S = torch.zeros(12, dtype=torch.int64)
    assert herd(FOUR.repeat(3, 1), group_S, torch.tensor([1])).tolist() == [2]


def test_the_samples_with_the_smallest_keys_are_chosen_in_each_group() -> None:
    key_S, group_S = torch.tensor([5.0, 1, 4, 2, 3, 0]), torch.tensor([2, 2, 1, 2, 1, 2])
    assert sorted(smallest_per_group(key_S, group_S, torch.tensor([9, 1, 2])).tolist()) == [1, 4, 5]
    assert len(smallest_per_group(key_S[:0], group_S[:0], torch.tensor([9, 1, 2]))) == 0


def test_selection_by_loss_chooses_the_samples_of_each_item_that_the_model_predicts_best() -> None:
    # With d = 1, users 1, 2 and 3 give item 1 the scores 3, 1 and 2. All give item 2 the score 0.
    model = MFSpec(d=1).build(0)
    model.grow(3, 2)
    model.users.weights[1:], model.items.weights[1:] = torch.tensor([[3.0], [1], [2]]), torch.tensor([[1.0], [0]])
    pool = replace(make_samples((1, [], 1), (2, [], 1), (3, [], 1), (2, [], 2)), histories_NT=torch.zeros(4, 0).int())
    expected = [math.log1p(math.exp(-x)) for x in (3, 1, 2, -1)]
    assert sample_losses(model, pool, None).tolist() == near(expected, abs=1e-6)
    chosen = select_exemplars("loss", model, pool, None, torch.tensor([0, 2, 1]), UNUSED_RNG)
    assert list(zip(chosen.users_N.tolist(), chosen.items_N.tolist())) == [(1, 1), (3, 1), (2, 2)]


def test_random_selection_fills_the_quota_and_can_choose_any_sample() -> None:
    model = SASRecSpec(d=4, length=3).build(0)
    model.grow(9, 2)
    pool = make_samples(*((user, [1], 1) for user in range(1, 10)))
    chosen = [
        select_exemplars("random", model, pool, None, torch.tensor([0, 3, 0]), stream(s, "test")).users_N
        for s in range(40)
    ]
    assert all(len(users_N.unique()) == 3 for users_N in chosen) and len(torch.cat(chosen).unique()) == 9


# how exemplars are stored and trained on


def test_an_exemplar_is_a_target_with_its_history_unless_the_event_before_it_is_held_out() -> None:
    # User 1 has items 5, 6, 7 (held out), 8 and 9. User 2 has item 4 alone.
    # Items 5 and 4 have no history. Item 8 comes right after the held-out event.
    train_at_E = torch.tensor([0, 0, NEVER, 0, 0, 0])
    events = Events.trainable(torch.tensor([1, 1, 1, 1, 1, 2]), torch.tensor([5, 6, 7, 8, 9, 4]))
    targets = due_targets(append_events(Histories.empty(), replace(events, train_at_E=train_at_E.to(torch.int8)), 2))
    pool = build_pool(targets, make_samples((3, [1, 2], 3)), 3)
    assert pool.items_N.tolist() == [6, 9, 3] and pool.users_N.tolist() == [1, 1, 3]
    assert pool.histories_NT.tolist() == [[0, 0, 5], [6, 0, 8], [0, 1, 2]]
    assert len(trainable_targets(targets, 0)) == 5  # a model that reads no history needs none


def test_exemplars_are_batched_in_the_format_of_the_model() -> None:
    exemplars = make_samples((1, [4, 5], 6), (2, [7], 8))
    for spec, targets in ((SASRecSpec(d=4, length=3), [[0, 6], [0, 8]]), (MFSpec(d=4), [[6], [8]])):
        batch = exemplar_batch(exemplars, torch.tensor([0, 1]), spec.build(0), None)
        assert batch.users_B.tolist() == [1, 2] and batch.history_BT.tolist() == [[4, 5], [0, 7]]
        assert batch.targets_BT is not None and batch.targets_BT.tolist() == targets


def test_each_exemplar_is_replayed_once_per_epoch_and_in_another_order_in_the_next_epoch() -> None:
    model = SASRecSpec(d=4, length=3).build(0)
    exemplars = make_samples(*((user, [1], 1) for user in range(1, 13)))
    seen: list[Tensor] = []

    def record_users(which_M: Tensor, batch: Batch) -> Tensor:
        seen.append(batch.users_B)
        return torch.zeros(())

    term = ExperienceReplay(model, exemplars, None, 1.0, record_users, 4, stream(0, "test"))
    batch = Batch(torch.tensor([1]), torch.tensor([[1]]))
    for _ in range(6):
        term(batch, None)  # type: ignore[arg-type]
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(1, 13))
    assert first.tolist() != second.tolist()


def model_of(name: str, **options: object) -> EncodingModel:
    model = replace(MODELS[name], d=8, std=1.0, length=3, **options).build(0)  # type: ignore[type-var]
    model.grow(4, 9)
    model.eval()
    return model


@pytest.mark.parametrize("name", ["sasrec", "mf", "mind", "comirec-dr", "comirec-sa"])
def test_distillation_starts_at_the_entropy_of_the_teacher_and_has_a_gradient_for_old_items_only(name: str) -> None:
    exemplars = make_samples((1, [1, 2], 3), (2, [4], 5), (3, [6, 7, 8], 9))
    teacher, model = model_of(name), model_of(name)
    model.grow(4, 12)  # new items take no part in the distillation
    stored_interests = stored_interests_of(model, None, 1)
    loss = exemplar_distillation_loss(model, teacher, exemplars, stored_interests)
    model.items.lookup(torch.tensor([2, 5, 11]))  # the rows of the step
    batch = exemplar_batch(exemplars, torch.tensor([2, 0]), model, stored_interests)
    p_BI = torch.softmax(score_items(teacher, replace(batch, targets_BT=None), torch.arange(1, 10)), 1)
    found = loss(torch.tensor([2, 0]), batch)
    assert found.item() == near(float(-(p_BI * p_BI.log()).sum(1).mean()), rel=1e-5)
    model.items.weights[5, 0] += 1
    model.items.lookup(torch.tensor([2, 5, 11]))
    loss(torch.tensor([2, 0]), batch).backward()
    ids_N, rows_ND = model.items.step_rows()
    assert rows_ND.grad is not None
    has_gradient = rows_ND.grad.abs().amax(1) > 1e-5
    assert ids_N.tolist() == [2, 5, 11] and has_gradient.tolist() == [True, True, False]


def test_with_the_full_softmax_the_distillation_has_a_gradient_for_every_old_item() -> None:
    exemplars, full = make_samples((1, [1, 2], 3)), {"predict": "last", "loss": "full"}
    teacher, model = model_of("sasrec", **full), model_of("sasrec", **full)
    model.grow(4, 12)
    model.items.weights[5, 0] += 1
    batch = exemplar_batch(exemplars, torch.tensor([0]), model, None)
    model(replace(batch, negatives_N=torch.zeros(0, dtype=torch.int64)))
    exemplar_distillation_loss(model, teacher, exemplars, None)(torch.tensor([0]), batch).backward()
    ids_N, rows_ND = model.items.step_rows()
    assert rows_ND.grad is not None
    assert ids_N[rows_ND.grad.any(1)].sort().values.tolist() == list(range(1, 10))


# a whole update


@cache
def two_periods() -> tuple[State, Span]:
    """Return the world of circles after its base block. It is trained once for all tests."""
    return circles.two_periods(ADER(exemplars=200, fit=FitConfig(base_epochs=12)))


def old_and_new(after: State) -> tuple[float, float]:
    """Return ndcg@20 of the next item for users who go forwards, as before, and for users who go backwards."""
    found = []
    for step in (1, -1):
        histories = append_events(Histories.empty(), circles.circles(range(1, 61), step), 60)
        found.append(mean_ndcg(after.model, targets_at(histories, histories.offsets_U[2:] - 1), None))
    return found[0], found[1]


@pytest.mark.parametrize("distil", [True, False])
def test_ader_remembers_the_old_direction_that_fine_tuning_forgets(distil: bool) -> None:
    # Measured for distillation, replay and fine-tuning: forwards 0.91, 0.91, 0.47; backwards 0.69, 0.57, 0.82.
    # Before the update, backwards is 0.29.
    before, span = two_periods()
    fit = FitConfig(epochs=15)
    old, new = old_and_new(ADER(weight=2.5, distil=distil, fit=fit).update(before, span))
    assert old > old_and_new(FineTune(fit).update(before, span))[0] + 0.2
    assert new > old_and_new(before)[1] + 0.1


def test_with_weight_0_ader_equals_fine_tuning_bit_for_bit(bits: Callable[[State], bytes]) -> None:
    before, span = two_periods()
    plain = replace(FineTune().update(before, span), memory=None)
    for strategy in (ADER(weight=0.0), ADER(weight=0.0, distil=False), ADERS(weight=0.0)):
        assert bits(replace(strategy.update(before, span), memory=None)) == bits(plain)
    assert bits(replace(ADER(exemplars=200).update(before, span), memory=None)) != bits(plain)


def test_an_update_keeps_the_maximum_number_of_exemplars_from_old_and_new_targets() -> None:
    before, span = two_periods()
    memory = ADER(exemplars=200).update(before, span).memory
    assert len(before.memory) == len(memory) == 200
    # 600 new targets have a history, and 200 old samples are left. Each item has 40 of these 800.
    assert torch.bincount(memory.items_N)[1:].tolist() == near([10] * 20, abs=1)
    assert bool((memory.users_N <= 60).any()) and bool((memory.users_N > 60).any())


def test_the_first_update_equals_plain_training_on_the_base_block(bits: Callable[[State], bytes]) -> None:
    base = Events.trainable(torch.tensor([1, 1, 1, 2, 2, 2]), torch.tensor([1, 2, 3, 2, 3, 1]))
    state = State(SASRecSpec(d=4, length=3).build(0), histories=append_events(Histories.empty(), base, 2))
    span, fit = Span(0, base, 2, 3), FitConfig(base_epochs=1)
    for strategy in (ADER(fit=fit), ADERS(fit=fit)):
        assert bits(replace(strategy.update(state, span), memory=None)) == bits(fit_base_block(state, span, fit))


# ADER-S


def test_sequences_end_at_different_random_events() -> None:
    # User 1 has 5 events and three possible ends after 3 or more items. User 2 has 2 events and no possible end.
    targets = due_targets(histories_of([1] * 5 + [2] * 2, [1, 2, 3, 4, 5, 6, 7]), "span")
    all_ends = truncate_sequences(targets, 5, 3, stream(0, "test"))
    assert all_ends.items_N.tolist() == [3, 4, 5]
    assert all_ends.histories_NT.tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
    ends = {tuple(truncate_sequences(targets, 2, 3, stream(s, "test")).items_N.tolist()) for s in range(30)}
    assert ends == {(3, 4), (3, 5), (4, 5)}


def test_active_users_replay_their_sequences_that_are_most_similar_to_the_new_one() -> None:
    # Items 1 and 2 point the same way, 3 is orthogonal to them, and 4 points the other way. User 1 is active with
    # item 1. Its three sequences have the cosines 0 (item 3), 1 (item 2) and -1 (item 4), and it replays
    # ceil(3 / 2) = 2 of them. User 2 is not active.
    items_ID = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    pool = make_samples((1, [3, 3], 3), (1, [2, 2], 2), (1, [4, 4], 4), (2, [1, 1], 1))
    targets = due_targets(histories_of([1, 1, 3], [1, 1, 2]))
    assert select_similar(pool, targets, items_ID, 0.5).tolist() == [0, 1]
    assert select_similar(pool, targets, items_ID, 0.3).tolist() == [1]


def test_every_user_with_three_events_adds_up_to_five_sequences_to_the_pool() -> None:
    before, span = two_periods()
    after = ADERS(fit=FitConfig(epochs=1)).update(before, span)
    assert len(after.memory) == len(before.memory) + 40 * 5
    assert len(list(exemplar_batches(after.memory, after.model, None))) == 2  # 400 samples, up to 256 per batch
