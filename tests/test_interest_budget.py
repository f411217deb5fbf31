"""The budget for stored interests: by hand, and over updates of IMSR in a world where users gain interests."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from freshrec.data.histories import append_events, mark_trained
from freshrec.data.split import LogSplit, split_log
from freshrec.data.stored_interests import StoredInterests, pad_interests
from freshrec.data.synthetic import make_world
from freshrec.errors import OptionError
from freshrec.learn.fit import FitConfig
from freshrec.learn.interest_budget import InterestBudget, merge_interests, retire_interests
from freshrec.learn.interest_store import update_interests
from freshrec.models import COMIREC_DR, COMIREC_SA
from freshrec.models.multi_interest import InterestNet, InterestSpec
from freshrec.store.checkpoint import load_state, save_state
from freshrec.strategies import find_strategy
from freshrec.strategies.imsr import IMSR, Detector
from freshrec.types import Events, Histories, Interests, State


def interests(vectors: list[list[float]], counts: list[int], used: list[int] | None = None) -> Interests:
    """Return interests of users 1, 2, ... Interest i was born in span i."""
    offsets_U = torch.tensor([0, 0, *counts]).cumsum(0)
    born_S = torch.arange(len(vectors), dtype=torch.int32)
    used_S = torch.tensor(used or [0] * len(vectors), dtype=torch.int32)
    return Interests(torch.tensor(vectors), offsets_U, born_S, used_S)


def test_interests_unused_for_n_spans_are_retired_counted_back_from_the_users_last_visit() -> None:
    # User 1 was last active in span 7, and user 2 in span 2. Spans in which a user is absent do not count.
    users = interests([[float(i)] for i in range(6)], [4, 2], used=[7, 4, 5, 2, 2, 1])
    assert retire_interests(users, 3, ordered=False).vectors_SD[:, 0].tolist() == [0, 2, 4, 5]
    assert retire_interests(users, 3, ordered=False).offsets_U.tolist() == [0, 0, 2, 4]
    assert retire_interests(users, 1, ordered=False).vectors_SD[:, 0].tolist() == [0, 4]  # each user keeps one
    # If the position of an interest has a meaning for the model, only a user's last ones are dropped.
    assert retire_interests(users, 3, ordered=True).vectors_SD[:, 0].tolist() == [0, 1, 2, 4, 5]


def test_the_most_similar_pairs_are_merged_until_the_budget_is_met() -> None:
    # Highest cosines: user 1 has 0.8 (interests 0 and 2), user 2 has 0.6. User 3 has a single interest.
    vectors = [[1.0, 0, 0], [0, 0, 2], [4, 3, 0], [1, 0, 0], [3, 4, 0], [5, 5, 5]]
    users = interests(vectors, [3, 2, 1], used=[3, 0, 1, 2, 4, 0])
    once = merge_interests(users, 5, ordered=False)
    assert once.vectors_SD.tolist() == [[2.5, 1.5, 0], [0, 0, 2], [1, 0, 0], [3, 4, 0], [5, 5, 5]]
    assert (once.offsets_U.tolist(), once.born_S.tolist()) == ([0, 0, 2, 4, 5], [0, 1, 3, 4, 5])
    assert once.used_S.tolist() == [3, 0, 2, 4, 0]
    twice = merge_interests(users, 4, ordered=False)  # the pairs of both users
    assert twice.vectors_SD.tolist() == [[2.5, 1.5, 0], [0, 0, 2], [2, 2, 0], [5, 5, 5]]
    assert twice.used_S.tolist() == [3, 0, 4, 0]
    for n_most in (3, 1, 0):  # after one more round each user has one, which stays
        fewest = merge_interests(users, n_most, ordered=False)
        assert fewest.vectors_SD.tolist() == [[1.25, 0.75, 1], [2, 2, 0], [5, 5, 5]]
    assert merge_interests(users, 6, ordered=False) is users


def test_the_last_of_ordered_interests_is_merged_into_the_most_similar_one() -> None:
    users = interests([[1.0, 0], [0, 1], [1, 0.1], [0, 3]], [4])  # 0 and 2 are closest, but the last is closest to 1
    assert merge_interests(users, 3, ordered=True).vectors_SD.tolist() == near([[1, 0], [0, 2], [1, 0.1]])


def near(rows: list[list[float]]) -> list[object]:
    return [pytest.approx(numbers) for numbers in rows]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(0, 40), st.booleans(), st.integers(0, 99))
def test_merging_meets_any_budget_that_leaves_each_user_one_interest(
    counts: list[int], n_most: int, ordered: bool, seed: int
) -> None:
    vectors_SD = torch.randn(sum(counts), 3, generator=torch.Generator().manual_seed(seed))
    users = interests(vectors_SD.tolist(), counts)
    if not sum(counts):
        return
    fewer = merge_interests(users, n_most, ordered)
    n_with = sum(count > 0 for count in counts)
    assert len(fewer.vectors_SD) == min(sum(counts), max(n_most, n_with)) == int(fewer.offsets_U[-1])
    before_U, after_U = users.offsets_U.diff(), fewer.offsets_U.diff()
    assert ((after_U > 0) == (before_U > 0)).all() and (after_U <= before_U).all()
    # merging takes means, so the largest number never grows
    assert fewer.vectors_SD.abs().max() <= users.vectors_SD.abs().max()


def test_only_events_of_the_current_span_count_as_use_of_an_interest() -> None:
    # The user's interests point at items 1 and 2. The user clicks item 1 in span 0 and item 2 in span 1. So span
    # 1 does not use the first interest, although the model still reads item 1 in the history.
    model = InterestNet(InterestSpec(d=2, k=2), 0)
    model.grow(1, 2)
    model.items.packed[1:, :2] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    model.user_vectors = lambda batch: torch.eye(2)[None]  # type: ignore[method-assign]
    users, histories = Interests.empty(2), Histories.empty()
    for span, item in enumerate([1, 2]):
        histories = append_events(histories, Events.trainable(torch.tensor([1]), torch.tensor([item])), 1)
        users = update_interests(model, StoredInterests(users, torch.eye(2), span), histories, "recent")
        histories = mark_trained(histories, 50)
    assert (users.born_S.tolist(), users.used_S.tolist()) == ([0, 0], [0, 1])


@pytest.fixture(scope="module")
def world() -> LogSplit:
    return split_log(
        make_world("newborn", users=80, items=60, events=2400, spans=3).log, by="count", spans=3, forget_users=0
    )


def states_of(world: LogSplit, strategy: IMSR, spec: InterestSpec = COMIREC_DR) -> list[State]:
    state, states = State(replace(spec, d=16, negatives=32).build(0)), []
    for span in world.spans:
        state = replace(state, histories=append_events(state.histories, span.events, span.n_users))
        state = strategy.update(state, span)
        states.append(state)
    return states


FIT = FitConfig(base_epochs=2, epochs=1)


@pytest.mark.parametrize("spec", [COMIREC_DR, COMIREC_SA])
def test_a_budget_holds_after_every_update_and_the_memory_is_reported(world: LogSplit, spec: InterestSpec) -> None:
    unlimited = states_of(world, IMSR(detect=Detector(c1=0.5), fit=FIT), spec)
    limited = states_of(world, IMSR(detect=Detector(c1=0.5), fit=FIT, upkeep=InterestBudget(megabytes=0.015)), spec)
    for without_budget, with_budget in zip(unlimited, limited):
        assert without_budget.interests is not None and with_budget.interests is not None
        assert (
            len(without_budget.interests.vectors_SD) * (16 * 4 + 8)
            > 15_000
            >= len(with_budget.interests.vectors_SD) * (16 * 4 + 8)
        )
        assert with_budget.costs["interest_bytes"] < without_budget.costs["interest_bytes"]
        assert with_budget.costs["interest_bytes"] == pytest.approx((16 * 4 + 8) * with_budget.costs["mean_k"])


def test_16_bit_interests_take_half_the_memory_and_are_read_as_32_bit(
    world: LogSplit, tmp_path: Path, bits: Callable[[State], bytes]
) -> None:
    full, half = (
        states_of(world, IMSR(fit=FIT))[-1],
        states_of(world, IMSR(fit=FIT, upkeep=InterestBudget(fp16=True)))[-1],
    )
    assert full.interests is not None and half.interests is not None
    assert half.interests.vectors_SD.dtype == torch.float16
    assert half.costs["interest_bytes"] / half.costs["mean_k"] == pytest.approx(2 * 16 + 8)
    users = torch.arange(1, 9)
    read_BKD, alive_BK, _ = pad_interests(half.interests, users, half.model.initial_interests(4))
    assert read_BKD.dtype == torch.float32 and alive_BK.any(1).all()
    save_state(half, tmp_path / "state")
    assert bits(load_state(tmp_path / "state")) == bits(half)


def test_retiring_after_one_span_keeps_only_the_interests_used_in_the_last_visit(world: LogSplit) -> None:
    state = states_of(world, IMSR(fit=FIT, upkeep=InterestBudget(retire=1)))[-1]
    users = state.interests
    assert users is not None
    owner_S = torch.repeat_interleave(torch.arange(users.n_users + 1), users.offsets_U.diff())
    latest_U = torch.zeros(users.n_users + 1, dtype=torch.int32).scatter_reduce(0, owner_S, users.used_S, "amax")
    assert bool((users.used_S == latest_U[owner_S]).all()) and state.costs["mean_k"] < 4  # each user started with 4


def test_the_default_budget_changes_nothing(world: LogSplit, bits: Callable[[State], bytes]) -> None:
    strategy = find_strategy("imsr:upkeep.retire=0:upkeep.fp16=false:upkeep.megabytes=0")
    state = states_of(world, IMSR(fit=FIT))[0]
    assert strategy == IMSR() and state.interests is not None and bits(InterestBudget()(state)) == bits(state)
    assert find_strategy("imsr:upkeep.retire=3:upkeep.fp16=true").upkeep == InterestBudget(retire=3, fp16=True)  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match="Option megabytes is -1"):
        find_strategy("imsr:upkeep.megabytes=-1")
