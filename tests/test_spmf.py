"""SPMF: the reservoir against Algorithm R, the weights by hand, and the events that an update trains on."""

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


def events_in_slots(size: int, parts: list[int], seed: int) -> Tensor:
    """Return which of the events 0, 1, 2, ... each slot holds after a stream in these parts, shape (size,)."""
    slots, first = torch.full((size,), -1), 0
    for part in parts:
        slot_W, nth_W = assign_slots(first, part, size, stream(seed, "test", first))
        slots[slot_W] = first + nth_W
        first += part
    return slots


def test_every_event_of_the_stream_is_kept_equally_often() -> None:
    # T17: a quarter of the events fits, so each is kept with probability 0.25. Each tenth of the stream has 200 x 200
    # draws, so the standard error is 0.002.
    events = torch.cat([events_in_slots(500, [2000], seed) for seed in range(200)])
    share = torch.bincount(events // 200, minlength=10) / (200 * 200)
    assert share.min() > 0.244 and share.max() < 0.256


def test_new_events_may_replace_each_other() -> None:
    # T17: t / (t + m) = 10 / 12 = 0.8333 of the old events stay. If new events could not replace each other, that would
    # be 1 - 1 / 11 - 1 / 12 = 0.8258, or 1 - ln(12 / 10) = 0.8177 for a hundred times as many events.
    slots = torch.cat([events_in_slots(500, [1000, 200], seed) for seed in range(200)])
    assert (slots < 1000).float().mean().item() == near(0.8333, abs=0.004)
    assert all(events_in_slots(5, [5, 5], seed).max() < 10 for seed in range(5))


@pytest.mark.parametrize(("n_seen", "n_new", "size"), [(0, 40, 7), (3, 40, 7), (100, 500, 7), (100, 3, 7), (0, 3, 7)])
def test_adding_events_in_one_batch_equals_adding_them_one_by_one(n_seen: int, n_new: int, size: int) -> None:
    # Algorithm R as published, with the same random numbers: event i draws u from 0..i and takes slot u.
    draws = torch.rand(n_new, generator=stream(1, "test"), dtype=torch.float64)
    expected: dict[int, int] = {}
    for nth, u in enumerate(draws.tolist()):
        i = n_seen + nth
        slot = i if i < size else int(u * (i + 1))
        if slot < size:
            expected[slot] = nth
    slot_W, nth_W = assign_slots(n_seen, n_new, size, stream(1, "test"))
    assert dict(zip(slot_W.tolist(), nth_W.tolist())) == expected


def histories_of(users: list[int], items: list[int]) -> Histories:
    return append_events(Histories.empty(), Events.trainable(torch.tensor(users), torch.tensor(items)), max(users))


def test_a_reservoir_keeps_all_targets_until_it_is_full_and_never_grows_beyond_its_size() -> None:
    # T19: a reservoir of size four gets three targets, and then twenty more.
    targets = due_targets(histories_of([1, 1, 2], [7, 8, 9]))
    three = fill_reservoir(targets, 4, 2, stream(0, "test"))
    assert three.samples.users_N.tolist() == [1, 1, 2] and three.samples.items_N.tolist() == [7, 8, 9]
    assert three.samples.histories_NT.tolist() == [[0, 0], [0, 7], [0, 0]]
    four = update_reservoir(three, due_targets(histories_of([3] * 20, list(range(1, 21)))), stream(0, "test"))
    assert len(four.samples) == four.size == 4 and four.n_seen == 23
    assert len(three.samples) == 3  # the old one has not changed


def test_a_stored_sample_is_the_same_target_as_before() -> None:
    histories = histories_of([1, 2, 1, 1, 2], [11, 21, 12, 13, 22])
    stored = copy_samples(due_targets(histories), length=2)
    new = due_targets(histories_of([5], [50]))
    index = torch.tensor([2, 0, 2, 4])
    both = append_samples(new, stored, index, separate_users=False)
    assert both.users_N.tolist() == [5, 1, 1, 1, 2]
    assert both.histories.items_R[both.rows_N].tolist() == [50, 13, 11, 13, 22]
    assert history_items(both, 2).tolist() == [[0, 0], [11, 12], [0, 0], [11, 12], [0, 21]]


def test_stored_samples_have_one_target_per_window_and_windows_of_the_span_stay_whole() -> None:
    model = SASRecSpec(d=4, length=3, batch=8).build(0)
    stored = copy_samples(due_targets(histories_of([1] * 4, [11, 12, 13, 14])), length=3)
    current = due_targets(histories_of([1] * 3, [21, 22, 23]))
    both = append_samples(current, stored, torch.tensor([2, 2, 0]), separate_users=True)
    found = [
        (history[history > 0].tolist(), targets[targets > 0].tolist())
        for batch in training_batches(model, both, stream(0, "test"))
        for history, targets in zip(batch.history_BT, batch.targets_BT)  # type: ignore[arg-type]
    ]
    # The third of the four events comes twice. The first one has no history, so it is no target.
    assert sorted(found) == [([11, 12], [13]), ([11, 12], [13]), ([21, 22], [22, 23])]


# drawing samples


def test_rank_weights_by_hand() -> None:
    # T18: e^0 and e^(1/2), divided by their sum. e^0, e^(1/4), e^(2/4) and e^(3/4), divided by theirs. The best score
    # has the smallest weight.
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


# a whole update


def world() -> LogSplit:
    return split_log(
        make_world("checkerboard", users=60, items=40, events=2000, spans=2).log, by="period", forget_users=0
    )


def after_base(strategy: SPMF, spec: MFSpec | SASRecSpec, spans: LogSplit) -> State:
    base = spans.spans[0]
    state = State(spec.build(0))
    state = replace(state, histories=append_events(state.histories, base.events, base.n_users))
    return strategy.update(state, base)


def absorb(state: State, span: Span) -> State:
    return replace(state, histories=append_events(state.histories, span.events, span.n_users))


QUICK = FitConfig(base_epochs=2, epochs=2)


def test_the_size_of_the_reservoir_is_a_share_of_the_base_block_or_a_number() -> None:
    n_base = len(world().spans[0].events)
    for reservoir, size in ((0.1, round(0.1 * n_base)), (1.0, n_base), (50, 50)):
        state = after_base(SPMF(reservoir=reservoir, fit=QUICK), MFSpec(d=4), world())
        assert len(state.memory.samples) == size and state.memory.n_seen == n_base
        assert state.memory.samples.histories_NT.shape[1] == 0  # mf reads no history, so none is stored


def test_with_share_0_spmf_equals_fine_tuning_bit_for_bit(bits: Callable[[State], bytes]) -> None:
    spans, spmf = world(), SPMF(take="all", share=0, fit=QUICK)
    state = absorb(after_base(spmf, MFSpec(d=4), spans), spans.spans[1])
    finetuned = FineTune(fit=QUICK).update(replace(state, memory=None), spans.spans[1])
    assert bits(replace(spmf.update(state, spans.spans[1]), memory=None)) == bits(finetuned)
    mixed = replace(spmf, share=0.1).update(state, spans.spans[1])
    assert bits(replace(mixed, memory=None)) != bits(finetuned)


def test_targets_are_scored_by_the_previous_model_from_the_history_before_each() -> None:
    spans = world()
    state = absorb(after_base(SPMF(fit=QUICK), SASRecSpec(d=4, length=5), spans), spans.spans[1])
    model, due = grown_copy(state, spans.spans[1]), due_targets(state.histories)
    stored = copy_samples(due, 5)
    copies = append_samples(
        due[torch.zeros(0, dtype=torch.int64)], stored, torch.arange(len(stored)), separate_users=False
    )
    scores = target_scores(model, due, None)
    torch.testing.assert_close(target_scores(model, copies, None), scores)
    nth = 10  # one target by hand: the output at the last position times the item's vector
    ids = due.histories.items_R[int(due.first_row_N[nth]) : int(due.rows_N[nth]) + 1].long()
    vector = user_vectors(model, Batch(due.users_N[nth : nth + 1], ids[None, -6:-1]))[0, 0]  # type: ignore[attr-defined]
    assert scores[nth].item() == near(float(vector @ model.items.weights[ids[-1]]), abs=1e-5)  # type: ignore[attr-defined]


def test_an_update_reads_the_number_of_events_that_take_and_share_give() -> None:
    spans = world()
    for spmf in (SPMF(reservoir=100, fit=QUICK), SPMF(take="all", share=0.5, reservoir=1000, fit=QUICK)):
        state = absorb(after_base(spmf, MFSpec(d=4), spans), spans.spans[1])
        n_due = int((state.histories.due_R == DUE).sum())
        read = spmf.update(state, spans.spans[1]).costs["rows_read"]
        assert read == (n_due + 100 if spmf.take == "sampled" else n_due + int(0.5 * n_due))
