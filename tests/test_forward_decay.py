"""Ages in events: counts of Markov chains and popularity do not depend on how events are cut into blocks."""

import math

import numpy as np
import pytest
import torch

from freshrec.models.blend.experts import COUNTER_SPECS
from freshrec.models.blend.model import Blend, BlendSpec
from freshrec.models.item_knn import ItemKNN, ItemKNNSpec
from freshrec.models.popularity import Popularity, PopularitySpec
from freshrec.nn.forward_decay import MAX_EXPONENT, ForwardDecay, window_size
from freshrec.types import Batch, Events, Histories

N_USERS, N_ITEMS, N_EVENTS = 9, 12, 300


def random_log(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(1, N_USERS + 1, N_EVENTS), rng.integers(1, N_ITEMS + 1, N_EVENTS)


def events_of(users: np.ndarray, items: np.ndarray) -> Events:
    return Events.trainable(torch.from_numpy(users), torch.from_numpy(items))


def histories_of(users: np.ndarray, items: np.ndarray) -> Histories:
    """The events of all users so far, in time order."""
    offsets_U = torch.zeros(N_USERS + 2, dtype=torch.int64)
    offsets_U[1:] = torch.from_numpy(np.bincount(users, minlength=N_USERS + 1)).cumsum(0)
    items_R = torch.from_numpy(items[np.argsort(users, kind="stable")]).int()
    return Histories(
        offsets_U, items_R, torch.zeros(len(users), dtype=torch.int64), torch.zeros(len(users)).to(torch.int8)
    )


def absorbed(kind: str, cuts: list[int], window: int) -> ItemKNN:
    """A model that absorbed a random log, which is cut into blocks before these events."""
    (users, items), model = random_log(), ItemKNNSpec(kind).build(0)  # type: ignore[arg-type]
    model.grow(N_USERS, N_ITEMS)
    model.window_events = window
    for a, b in zip([0, *cuts], [*cuts, N_EVENTS]):
        block = events_of(users[a:b], items[a:b])
        model.absorb(block, histories_of(users[:a], items[:a]))
    return model


def counts_now(model: ItemKNN, window: int) -> np.ndarray:
    """The current weights of a Markov chain's pairs, shape (I, I)."""
    half_life = window * math.log(2) / math.log(1.25)
    return np.asarray(model.pair_counts_II.toarray() * model.clock.factor(half_life))


def all_scores(model: ItemKNN) -> np.ndarray:
    """Scores of all items for two short histories."""
    batch = Batch(torch.tensor([1, 2]), torch.tensor([[0, 3, 4], [5, 5, 6]]))
    return model.score(batch, torch.arange(N_ITEMS + 1)).numpy()


def equal_cuts(n_blocks: int) -> list[int]:
    return [N_EVENTS * n // n_blocks for n in range(1, n_blocks)]


@pytest.mark.parametrize("window", [1, 7, 50])  # with window 1, stored counts are scaled down three times
def test_a_pair_of_a_markov_chain_weighs_by_its_gap_and_by_the_events_after_it(window: int) -> None:
    (users, items), wanted = random_log(), np.zeros((N_ITEMS + 1, N_ITEMS + 1))
    for user in range(1, N_USERS + 1):
        own = np.flatnonzero(users == user)
        for later in range(len(own)):
            for gap in range(1, min(3, later) + 1):
                age = N_EVENTS - 1 - own[later]
                wanted[items[own[later - gap]], items[own[later]]] += 0.8 ** (age / window) / gap
    for n_blocks in (1, 16):
        model = absorbed("markov", equal_cuts(n_blocks), window)
        assert counts_now(model, window) == pytest.approx(wanted, rel=1e-5, abs=1e-12)
        mass_I = model.item_mass_I * model.clock.factor(window * math.log(2) / math.log(1.25))
        assert mass_I == pytest.approx(wanted.sum(1), rel=1e-5)


@pytest.mark.parametrize("n_blocks", [4, 16, N_EVENTS])
@pytest.mark.parametrize("window", [1, 7, 50])
def test_a_markov_chain_learns_the_same_from_one_block_as_from_many(n_blocks: int, window: int) -> None:
    at_once, in_blocks = absorbed("markov", [], window), absorbed("markov", equal_cuts(n_blocks), window)
    assert counts_now(in_blocks, window) == pytest.approx(counts_now(at_once, window), rel=1e-5, abs=1e-12)
    assert all_scores(in_blocks) == pytest.approx(all_scores(at_once), rel=1e-5, abs=1e-12)
    assert all_scores(at_once).max() > 0


def test_the_blocks_after_the_base_block_may_have_any_size() -> None:
    # The window is not set, so it is a sixth of the base block of 60 events in both cases.
    few, many = absorbed("markov", [60], 0), absorbed("markov", list(range(60, N_EVENTS, 13)), 0)
    assert few.window_events == many.window_events == 10
    assert all_scores(many) == pytest.approx(all_scores(few), rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("n_blocks", [4, 16, N_EVENTS])
def test_item_knn_without_decay_is_the_same_to_the_last_bit_and_saves_no_clock(n_blocks: int) -> None:
    at_once, in_blocks = (
        absorbed("cosine", [], 0).state_dict(),
        absorbed("cosine", equal_cuts(n_blocks), 0).state_dict(),
    )
    assert at_once.keys() == in_blocks.keys() and "clock" not in at_once
    assert all(torch.equal(tensor, in_blocks[name]) for name, tensor in at_once.items())


def test_stored_weights_are_limited_and_scaling_them_down_is_exact() -> None:
    # Half-life 2: event p is stored as 2^(p/2 - shift). After 64 events that is 2^32, after 65 more than the limit.
    clock, weights_E, scale = ForwardDecay().advance(64, 2.0)
    assert (clock.shift, scale) == (0, 1.0) and weights_E[-1] == 2.0**MAX_EXPONENT
    assert weights_E[-1] * clock.factor(2.0) == 1 and weights_E[-3] * clock.factor(2.0) == 0.5
    clock, weights_E, scale = clock.advance(2, 2.0)  # floor(66 / 2) = 33
    assert (clock.shift, scale) == (33, 2.0**-33) and weights_E.tolist() == [2**-0.5, 1.0]
    assert clock.factor(2.0) == 1
    _, weights_E, _ = ForwardDecay().advance(10_000, 1.0)  # more half-lives than a float has bits
    assert weights_E[-1] == 1 and weights_E.max() == 1 and weights_E[0] == 0


def test_pairs_that_are_too_old_for_single_precision_are_removed() -> None:
    # 1 -> 2, then 2,000 events of user 2, who takes item 3 only: 0.8^2000 is 0 in single precision.
    model = ItemKNNSpec("markov").build(0)
    model.grow(N_USERS, N_ITEMS)
    model.window_events = 1
    model.absorb(Events.trainable(torch.tensor([1, 1]), torch.tensor([1, 2])), Histories.empty())
    assert all_scores(model).shape and model.pair_counts_II.nnz == 1
    model.absorb(Events.trainable(torch.full((2000,), 2), torch.full((2000,), 3)), Histories.empty())
    assert model.pair_counts_II.nnz == 1 and model.pair_counts_II[[3], [3]][0] > 0
    # its newest events weigh 1 + 0.8 + 0.64 + ... = 5, each with gaps of 1, 2 and 3
    assert counts_now(model, 1)[3, 3] == pytest.approx(5 * (1 + 1 / 2 + 1 / 3))


def test_a_markov_chain_of_version_0_1_0_keeps_its_counts_and_derives_a_window_from_them() -> None:
    # User 1 has 37 events: 36 pairs of gap 1, 35 of gap 2, 34 of gap 3, so 36 + 35/2 + 34/3 = 64.83.
    # An event makes pairs of 11/6 at most, so these are 35 events: a sixth is 6.
    new = ItemKNNSpec("markov").build(0)
    new.grow(N_USERS, N_ITEMS)
    new.window_events = 10**12  # no decay
    items = torch.arange(37) % N_ITEMS + 1
    new.absorb(Events.trainable(torch.ones(37, dtype=torch.int64), items), Histories.empty())
    tensors = new.state_dict()
    del tensors["clock"]
    old = ItemKNNSpec("markov").build(0)
    old.load_state_dict(tensors)
    assert old.window_events == 6 and old.clock == ForwardDecay()
    assert all_scores(old) == pytest.approx(all_scores(new), rel=1e-6)
    # A window of another user's events multiplies all counts by 0.8.
    old.absorb(events_of(np.full(6, 9), np.full(6, 12)), Histories.empty())
    then_II, rows = new.pair_counts_II.toarray(), slice(0, 12)  # item 12 pairs with itself now
    assert counts_now(old, 6)[rows] == pytest.approx(0.8 * then_II[rows], rel=1e-5)
    assert all_scores(old)[0, 5] == pytest.approx(score_of_5(0.8 * then_II), rel=1e-5)


def score_of_5(counts_II: np.ndarray) -> float:
    """What a history of items 3 and 4 gives item 5: 4 is the latest, 3 weighs half."""
    mass_I = counts_II.sum(1)
    return float(counts_II[4, 5] / (10 + mass_I[4]) + counts_II[3, 5] / (10 + mass_I[3]) / 2)


def test_an_empty_markov_chain_of_0_1_0_takes_its_window_from_what_it_absorbs_first() -> None:
    empty = ItemKNNSpec("markov").build(0)
    empty.grow(2, 2)
    tensors = empty.state_dict()
    del tensors["clock"]
    empty.load_state_dict(tensors)
    assert empty.window_events == 0
    empty.absorb(
        Events.trainable(torch.ones(12, dtype=torch.int64), torch.ones(12, dtype=torch.int64)), Histories.empty()
    )
    assert empty.window_events == 2


def blend_after(n_events: int) -> Blend:
    """A blend that absorbed only its base block."""
    users, items = random_log()
    model = BlendSpec(items_per_expert=5, length=5).build(0)
    model.grow(N_USERS, N_ITEMS)
    block = events_of(users[:n_events], items[:n_events])
    model.absorb(block, Histories.empty())
    return model


def windows_of(model: Blend) -> list[int]:
    """The windows of all counting models: four popularities, item-kNN (which does not use it), and Markov."""
    windowed = [one for one in model.experts.counters.values() if isinstance(one, Popularity | ItemKNN)]
    return [one.window_events for one in windowed]


def test_the_window_of_a_blend_is_a_sixth_of_the_whole_base_block() -> None:
    model = blend_after(120)
    assert model.experts.window_events == 20 and windows_of(model) == [20] * 6
    # so its experts count as they do alone, where they absorb the base block at once
    users, items = random_log()
    block = events_of(users[:120], items[:120])
    for name in ("popularity-1", "popularity-1/16", "markov"):
        alone, inside = COUNTER_SPECS[name].build(0), model.experts.counters[name]
        alone.grow(N_USERS, N_ITEMS)
        alone.absorb(block, Histories.empty())
        batch = Batch(torch.tensor([1]), torch.tensor([[3, 4]]))
        every = torch.arange(N_ITEMS + 1)
        assert inside.score(batch, every).numpy() == pytest.approx(alone.score(batch, every).numpy(), rel=1e-5)


def test_a_blend_of_version_0_1_0_sets_its_window_in_all_experts() -> None:
    # Its popularities had a sixth of the first 100 of 120 events, 17; Markov had no clock.
    tensors = blend_after(120).state_dict()
    del tensors["experts.markov.clock"]
    for name in ("popularity", "popularity-1", "popularity-1/4", "popularity-1/16"):
        tensors[f"experts.{name}.sizes"][2] = 17
    again = BlendSpec(items_per_expert=5, length=5).build(0)
    again.load_state_dict(tensors)
    assert again.experts.window_events == 20 and windows_of(again) == [20] * 6


def test_a_window_is_a_sixth_of_the_base_block_and_at_least_one_event() -> None:
    assert [window_size(n) for n in (1, 6, 60, 100)] == [1, 1, 10, 17] and window_size(60, 1 / 2) == 30


@pytest.mark.parametrize("n_blocks", [4, 16, N_EVENTS])
def test_popularity_with_decay_learns_the_same_from_one_block_as_from_many(n_blocks: int) -> None:
    users, items = random_log()
    models = []
    for cuts in ([], equal_cuts(n_blocks)):
        model = PopularitySpec("decay", half_life=1 / 4).build(0)
        model.grow(N_USERS, N_ITEMS)
        model.window_events = 50
        for a, b in zip([0, *cuts], [*cuts, N_EVENTS]):
            model.absorb(events_of(users[a:b], items[a:b]), Histories.empty())
        models.append(model)
    assert models[0].counts_I.numpy() == pytest.approx(models[1].counts_I.numpy(), rel=1e-12)
