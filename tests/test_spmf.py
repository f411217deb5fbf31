"""SPMF: the reservoir against the rule it stands for, the weights by hand, and what an update trains on."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from freshrec.data.batches import due_targets, history_items
from freshrec.data.histories import append_events
from freshrec.data.split import LogSplit, split_log
from freshrec.data.synthetic import make_world
from freshrec.learn.fit import FitConfig, grown_copy, training_batches
from freshrec.learn.reservoir import append_samples, assign_slots, copy_samples, fill_reservoir, update_reservoir
from freshrec.models.mf import MFSpec
from freshrec.models.sasrec import SASRecSpec
from freshrec.nn.scoring import user_vectors
from freshrec.random_streams import stream
from freshrec.strategies.baselines import FineTune
from freshrec.strategies.spmf import (
    SPMF,
    rank_weights,
    sample_with_replacement,
    sample_without_replacement,
    target_scores,
)
from freshrec.types import DUE, Batch, Events, Histories, Span, State

near = pytest.approx


# the reservoir


def held(size: int, parts: list[int], seed: int) -> Tensor:
    """(size,) which of the events 0, 1, 2, ... the slots hold after a stream in these parts."""
    slots, first = torch.full((size,), -1), 0
    for part in parts:
        slot_W, nth_W = assign_slots(first, part, size, stream(seed, "test", first))
        slots[slot_W] = first + nth_W
        first += part
    return slots


def test_every_event_of_the_stream_is_held_equally_often() -> None:
    # T17: a quarter of the events fits, so each is held with 0.25. Tenths of the stream, 200 x 200 draws each: the
    # standard error is 0.002.
    events = torch.cat([held(500, [2000], seed) for seed in range(200)])
    share = torch.bincount(events // 200, minlength=10) / (200 * 200)
    assert share.min() > 0.244 and share.max() < 0.256


def test_new_events_may_push_each_other_out() -> None:
    # T17: t / (t + m) = 10 / 12 = 0.8333 of what was held stays; were new events safe from each other, it would be
    # 1 - 1 / 11 - 1 / 12 = 0.8258 there, and 1 - ln(12 / 10) = 0.8177 for a hundred times as many.
    slots = torch.cat([held(500, [1000, 200], seed) for seed in range(200)])
    assert (slots < 1000).float().mean().item() == near(0.8333, abs=0.004)
    assert all(held(5, [5, 5], seed).max() < 10 for seed in range(5))


@pytest.mark.parametrize(("n_seen", "n_new", "size"), [(0, 40, 7), (3, 40, 7), (100, 500, 7), (100, 3, 7), (0, 3, 7)])
def test_all_at_once_is_one_after_the_other(n_seen: int, n_new: int, size: int) -> None:
    # Algorithm R as it is written, with the same random numbers: event i draws u from 0..i and takes slot u.
    draws = torch.rand(n_new, generator=stream(1, "test"), dtype=torch.float64)
    expected: dict[int, int] = {}
    for nth, u in enumerate(draws.tolist()):
        i = n_seen + nth
        slot = i if i < size else int(u * (i + 1))
        if slot < size:
            expected[slot] = nth
    slot_W, nth_W = assign_slots(n_seen, n_new, size, stream(1, "test"))
    assert dict(zip(slot_W.tolist(), nth_W.tolist())) == expected


def logged(users: list[int], items: list[int]) -> Histories:
    return append_events(Histories.empty(), Events.trainable(torch.tensor(users), torch.tensor(items)), max(users))


def test_a_reservoir_keeps_a_small_block_as_it_is_and_then_never_grows() -> None:
    # T19. Three targets in a reservoir of four; then twenty more.
    targets = due_targets(logged([1, 1, 2], [7, 8, 9]))
    three = fill_reservoir(targets, 4, 2, stream(0, "test"))
    assert three.samples.users_N.tolist() == [1, 1, 2] and three.samples.items_N.tolist() == [7, 8, 9]
    assert three.samples.histories_NT.tolist() == [[0, 0], [0, 7], [0, 0]]
    four = update_reservoir(three, due_targets(logged([3] * 20, list(range(1, 21)))), stream(0, "test"))
    assert len(four.samples) == four.size == 4 and four.n_seen == 23
    assert len(three.samples) == 3  # the old one is left as it was


def test_what_is_kept_comes_back_as_the_same_target() -> None:
    histories = logged([1, 2, 1, 1, 2], [11, 21, 12, 13, 22])
    kept = copy_samples(due_targets(histories), length=2)
    other = due_targets(logged([5], [50]))
    which = torch.tensor([2, 0, 2, 4])
    both = append_samples(other, kept, which, separate_users=False)
    assert both.users_N.tolist() == [5, 1, 1, 1, 2]
    assert both.histories.items_R[both.rows_N].tolist() == [50, 13, 11, 13, 22]
    assert history_items(both, 2).tolist() == [[0, 0], [11, 12], [0, 0], [11, 12], [0, 21]]


def test_windows_of_what_is_kept_hold_one_target_each_and_those_of_the_span_stay_whole() -> None:
    model = SASRecSpec(d=4, length=3, batch=8).build(0)
    kept = copy_samples(due_targets(logged([1] * 4, [11, 12, 13, 14])), length=3)
    today = due_targets(logged([1] * 3, [21, 22, 23]))
    both = append_samples(today, kept, torch.tensor([2, 2, 0]), separate_users=True)
    found = [
        (history[history > 0].tolist(), targets[targets > 0].tolist())
        for batch in training_batches(model, both, stream(0, "test"))
        for history, targets in zip(batch.history_BT, batch.targets_BT)  # type: ignore[arg-type]
    ]
    # the third event of the four, twice; the first has no history, so nothing predicts it
    assert sorted(found) == [([11, 12], [13]), ([11, 12], [13]), ([21, 22], [22, 23])]


# drawing


def test_rank_weights_by_hand() -> None:
    # T18: e^0, e^(1/2) over their sum; e^0, e^(1/4), e^(2/4), e^(3/4) over theirs. The best score weighs least.
    assert rank_weights(torch.tensor([2.0, 1.0])).tolist() == near([0.37754, 0.62246], abs=5e-6)
    four = rank_weights(torch.tensor([1.0, 3.0, 2.0, 4.0]))
    assert four.tolist() == near([0.34993, 0.21224, 0.27253, 0.16530], abs=5e-6)
    many = rank_weights(torch.randn(1000, generator=stream(0, "test")))
    assert (many.max() / many.min()).item() == near(torch.tensor(0.999).exp().item())  # e^((N - 1) / N) < e
    assert len(rank_weights(torch.zeros(0))) == 0


def test_draws_follow_the_weights() -> None:
    p_N = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    share_N = torch.bincount(sample_with_replacement(p_N, 100_000, stream(0, "test"))) / 100_000
    assert share_N.tolist() == near([0.1, 0.2, 0.7], abs=0.006)
    first_N = (
        torch.bincount(torch.stack([sample_without_replacement(p_N, 1, stream(s, "test"))[0] for s in range(10_000)]))
        / 10_000
    )
    assert first_N.tolist() == near([0.1, 0.2, 0.7], abs=0.02)
    assert sorted(sample_without_replacement(p_N, 9, stream(0, "test")).tolist()) == [0, 1, 2]
    assert len(sample_with_replacement(torch.zeros(0), 5, stream(0, "test"))) == 0


# the whole


def world() -> LogSplit:
    return split_log(
        make_world("checkerboard", users=60, items=40, events=2000, spans=2).log, by="period", forget_users=0
    )


def after_base(strategy: SPMF, spec: MFSpec | SASRecSpec, spans: LogSplit) -> State:
    base = spans.spans[0]
    state = State(spec.build(0))
    state = replace(state, histories=append_events(state.histories, base.events, base.n_users))
    return strategy.update(state, base)


def seen(state: State, span: Span) -> State:
    return replace(state, histories=append_events(state.histories, span.events, span.n_users))


QUICK = FitConfig(base_epochs=2, epochs=2)


def test_the_reservoir_holds_a_share_of_the_base_block_or_so_many() -> None:
    n_base = len(world().spans[0].events)
    for reservoir, size in ((0.1, round(0.1 * n_base)), (1.0, n_base), (50, 50)):
        state = after_base(SPMF(reservoir=reservoir, fit=QUICK), MFSpec(d=4), world())
        assert len(state.memory.samples) == size and state.memory.n_seen == n_base
        assert state.memory.samples.histories_NT.shape[1] == 0  # mf reads no history, so none is kept


def test_without_a_share_of_the_reservoir_spmf_is_fine_tuning_to_the_bit(bits: Callable[[State], bytes]) -> None:
    spans, spmf = world(), SPMF(take="all", share=0, fit=QUICK)
    state = seen(after_base(spmf, MFSpec(d=4), spans), spans.spans[1])
    plain = FineTune(fit=QUICK).update(replace(state, memory=None), spans.spans[1])
    assert bits(replace(spmf.update(state, spans.spans[1]), memory=None)) == bits(plain)
    mixed = replace(spmf, share=0.1).update(state, spans.spans[1])
    assert bits(replace(mixed, memory=None)) != bits(plain)


def test_the_scores_that_rank_are_those_of_the_last_model_for_the_history_before_each_target() -> None:
    spans = world()
    state = seen(after_base(SPMF(fit=QUICK), SASRecSpec(d=4, length=5), spans), spans.spans[1])
    model, due = grown_copy(state, spans.spans[1]), due_targets(state.histories)
    kept = copy_samples(due, 5)
    copies = append_samples(due[torch.zeros(0, dtype=torch.int64)], kept, torch.arange(len(kept)), separate_users=False)
    scores = target_scores(model, due, None)
    torch.testing.assert_close(target_scores(model, copies, None), scores)
    nth = 10  # one of them by hand: the last position's output times the vector of the item
    ids = due.histories.items_R[int(due.first_row_N[nth]) : int(due.rows_N[nth]) + 1].long()
    vector = user_vectors(model, Batch(due.users_N[nth : nth + 1], ids[None, -6:-1]))[0, 0]  # type: ignore[attr-defined]
    assert scores[nth].item() == near(float(vector @ model.items.weights[ids[-1]]), abs=1e-5)  # type: ignore[attr-defined]


def test_training_reads_as_many_events_as_each_way_says() -> None:
    spans = world()
    for spmf in (SPMF(reservoir=100, fit=QUICK), SPMF(take="all", share=0.5, reservoir=1000, fit=QUICK)):
        state = seen(after_base(spmf, MFSpec(d=4), spans), spans.spans[1])
        n_due = int((state.histories.due_R == DUE).sum())
        read = spmf.update(state, spans.spans[1]).costs["rows_read"]
        assert read == (n_due + 100 if spmf.take == "sampled" else n_due + int(0.5 * n_due))
