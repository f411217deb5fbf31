"""Session-kNN by hand and against a slow reference of dicts and loops, and its index after updates."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freshrec.config import find_instance
from freshrec.errors import OptionError
from freshrec.models.session_knn import (
    DAY,
    S_SKNN,
    SKNN,
    STAN,
    V_SKNN,
    SessionKNN,
    SessionQuery,
    SKNNSpec,
    neighbour_decay,
    query_item_weights,
    top_k_per_row,
)
from freshrec.nn.ranking import target_ranks, top_k
from freshrec.store.checkpoint import load_state, save_state
from freshrec.types import Batch, CandidateModel, Events, Histories, State

near = pytest.approx
Block = list[tuple[int, int, int]]  # events: user, item, day
N_ITEMS = 9
NAMED = {"sknn": SKNN, "s-sknn": S_SKNN, "v-sknn": V_SKNN, "stan": STAN}
TWO = [(1, 1, 0), (1, 2, 0), (1, 3, 0), (2, 2, 0), (2, 4, 0)]  # sessions {1, 2, 3} and {2, 4}


def fed(spec: SKNNSpec, *blocks: Block) -> SessionKNN:
    model = spec.build(0)
    model.grow(9, N_ITEMS)
    for block in blocks:
        users_E, items_E, days_E = torch.tensor(block, dtype=torch.int64).reshape(-1, 3).T
        model.absorb(Events.trainable(users_E, items_E, days_E * DAY), Histories.empty())
    return model


def all_scores(model: SessionKNN, history: list[int], user: int = 9) -> list[float]:
    batch = Batch(torch.tensor([user]), torch.tensor([history], dtype=torch.int64))
    scores: list[float] = model.score(batch, torch.arange(model.n_items + 1))[0].tolist()
    return scores


def reference(spec: SKNNSpec, blocks: list[Block], history: list[int], user: int = 9) -> list[float]:
    """The scores of all items by the formulas, computed session by session and item by item."""
    sessions, time, turn = _sessions(spec, blocks)
    taken = {item for items in sessions.values() for item in items}
    query = [item for item in history if item in taken][-spec.length :]
    position = {item: p for p, item in enumerate(query, 1)}  # the last position wins
    weight = {item: _weight(spec, p, len(query)) for item, p in position.items()}
    latest = sorted(sessions, key=lambda u: (time[u], u), reverse=True)
    shares = [u for u in latest if u != user and position.keys() & set(sessions[u])][: spec.sample]
    sims = {}
    for u in shares:
        held = set(sessions[u])
        sim = sum(weight[item] for item in position.keys() & held)
        norm = math.sqrt(sum(w * w for w in weight.values())) * math.sqrt(len(held))
        sim /= norm if spec.similarity == "cosine" else len(position)
        when = time if spec.ages == "days" else turn
        if spec.lambda2:
            sim *= math.exp(-min((max(when[v] for v in sessions) - when[u]) / spec.lambda2, 60))
        sims[u] = sim
    nearest = sorted((u for u in shares if sims[u] > 0), key=lambda u: -np.float32(sims[u]))[: spec.k]
    scores = [0.0] * (N_ITEMS + 1)
    for u in nearest:
        last = {item: p for p, item in enumerate(sessions[u], 1)}
        last_position = max(p for item, p in position.items() if item in last)
        last_shared = max(p for item, p in last.items() if item in position)
        for item, p in last.items():
            idf = math.log(len(sessions) / sum(item in items for items in sessions.values()))
            nearness = math.exp(-abs(p - last_shared) / spec.lambda3) if spec.lambda3 else 1
            scores[item] += sims[u] * _decay(spec, last_position, len(query)) * nearness * (1 + spec.idf * idf)
    return scores


def _sessions(spec: SKNNSpec, blocks: list[Block]) -> tuple[dict[int, list[int]], dict[int, float], dict[int, float]]:
    """The last items of each user, the day of the last event, and the number of the last block with events."""
    items: dict[int, list[int]] = {}
    time: dict[int, float] = {}
    turn: dict[int, float] = {}
    for t, block in enumerate((block for block in blocks if block), 1):
        for user, item, day in block:
            items[user] = [*items.get(user, []), item][-spec.length :]
            time[user], turn[user] = max(day, time.get(user, day)), t
    newest = max(turn.values(), default=0)
    return {u: items[u] for u in items if not spec.last_n or turn[u] > newest - spec.last_n}, time, turn


def _weight(spec: SKNNSpec, p: int, n: int) -> float:
    kinds = {"same": 1, "div": p / n, "linear": max(1 - (n - p) / 10, 0), "log": 1 / math.log10(n - p + 1.7)}
    weight = (kinds | {"quadratic": (p / n) ** 2})[spec.weights]
    return weight * math.exp((p - n) / spec.lambda1) if spec.lambda1 else weight


def _decay(spec: SKNNSpec, p: int, n: int) -> float:
    step = n - p + 1
    kinds = {"same": 1, "place": p / n, "div": 1 / step, "linear": max(1 - step / 10, 0)}
    return (kinds | {"log": 1 / math.log10(step + 1.7), "quadratic": 1 / step**2})[spec.decay]


BLOCKS = st.lists(
    st.lists(st.tuples(st.integers(1, 7), st.integers(1, 6), st.integers(0, 20)), max_size=20), min_size=1, max_size=4
)
QUERIES = st.lists(
    st.tuples(st.integers(0, 9), st.lists(st.integers(1, 7), max_size=13)), min_size=1, max_size=4
)  # item 7 is in no session; users 8 and 9 have none


def agrees(spec: SKNNSpec, blocks: list[Block], queries: list[tuple[int, list[int]]]) -> None:
    width = max(len(history) for _, history in queries)
    history_BT = torch.tensor([[0] * (width - len(h)) + h for _, h in queries], dtype=torch.int64)
    batch = Batch(torch.tensor([user for user, _ in queries]), history_BT.reshape(len(queries), width))
    scores_BI = fed(spec, *blocks).score(batch, torch.arange(N_ITEMS + 1))
    for (user, history), scores_I in zip(queries, scores_BI.tolist()):
        assert scores_I == near(reference(spec, blocks, history, user), rel=1e-5)


@pytest.mark.parametrize("spec", NAMED.values(), ids=NAMED)
@settings(max_examples=60)
@given(BLOCKS, QUERIES, st.sampled_from([{}, {"k": 2}, {"sample": 3}, {"k": 1, "sample": 2}, {"length": 4}]))
def test_each_named_method_equals_its_formulas(
    spec: SKNNSpec, blocks: list[Block], queries: list[tuple[int, list[int]]], limits: dict[str, Any]
) -> None:
    agrees(replace(spec, **limits), blocks, queries)


@given(BLOCKS, QUERIES, st.data())
def test_any_combination_of_options_equals_its_formulas(
    blocks: list[Block], queries: list[tuple[int, list[int]]], data: st.DataObject
) -> None:
    options: dict[str, Any] = {
        "k": [1, 3, 100],
        "sample": [1, 2, 100],
        "length": [3, 50],
        "last_n": [0, 1, 2],
        "ages": ["days", "blocks"],
        "similarity": ["cosine", "vec"],
        "weights": ["same", "div", "linear", "log", "quadratic"],
        "idf": [0, 5],
        "decay": ["same", "place", "div", "linear", "log", "quadratic"],
        "lambda1": [0, 1.02],
        "lambda2": [0, 3],
        "lambda3": [0, 2.05],
    }
    chosen = {name: data.draw(st.sampled_from(values)) for name, values in options.items()}
    agrees(SKNNSpec(**chosen), blocks, queries)


def test_sknn_sums_the_cosines() -> None:
    # {1, 2} and {1, 2, 3} share two items: 2 / sqrt(6). {1, 2} and {2, 4} share one: 1/2. Item 2 is in both sessions.
    far, close = 2 / math.sqrt(6), 0.5
    assert all_scores(fed(SKNN, TWO), [1, 2])[1:5] == near([0.816497, 1.316497, 0.816497, 0.5], abs=1e-6)
    assert all_scores(fed(SKNN, TWO), [2, 1])[1:5] == near([far, far + close, far, close])  # in any order


def test_s_sknn_halves_a_neighbour_that_shares_the_first_of_two_items() -> None:
    # {2, 4} shares item 2, at position 1 of 2: 0.5 x 1/2. {1, 2, 3} shares the last item too.
    assert all_scores(fed(S_SKNN, TWO), [2, 1])[3:5] == near([0.816497, 0.25], abs=1e-6)


def test_v_sknn_weights_shared_items_by_position() -> None:
    # Weights 1/2 and 1 over 2 items: (1/2 + 1) / 2 and (1/2) / 2. The step of 2 halves the second one.
    assert all_scores(fed(replace(V_SKNN, decay="same"), TWO), [2, 1])[3:5] == near([0.75, 0.25])
    assert all_scores(fed(V_SKNN, TWO), [2, 1])[3:5] == near([0.75, 0.125])


def test_stan_weights_by_position_age_and_distance() -> None:
    # Weights e^-1 and 1: (e^-1 + 1) / sqrt(e^-2 + 1) / sqrt(3) and e^-1 / sqrt(e^-2 + 1) / sqrt(2), at age 0.
    spec = replace(STAN, lambda1=1.0)
    sims = [0.741182, 0.244134]
    assert all_scores(fed(replace(spec, lambda3=0.0), TWO), [2, 1])[3:5] == near(sims, abs=1e-6)
    # In {1, 2, 3} the last shared item is 2, one before item 3. In {2, 4} it is one before item 4.
    decay = math.exp(-1 / 2.05)
    assert all_scores(fed(spec, TWO), [2, 1])[3:5] == near([sims[0] * decay, sims[1] * decay], abs=1e-6)
    # A session without shared items follows ten days later. Both are then ten days old: exp(-10 / 5).
    older = all_scores(fed(spec, TWO, [(3, 9, 10)]), [2, 1])
    assert older[3:5] == near([sim * decay * math.exp(-2) for sim in sims], abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("same", [1, 1, 1]),
        ("div", [1 / 12, 11 / 12, 1]),
        ("linear", [0, 0.9, 1]),  # 1 - 11/10 is below 0
        ("log", [1 / math.log10(12.7), 1 / math.log10(2.7), 1 / math.log10(1.7)]),
        ("quadratic", [1 / 144, 121 / 144, 1]),
    ],
)
def test_weights_of_the_first_and_the_last_two_of_twelve_events(kind: Any, expected: list[float]) -> None:
    row_Q = np.zeros(3, np.int64)
    query = SessionQuery(row_Q, np.array([12]), row_Q, np.array([4, 5, 6]), np.array([1, 11, 12]))
    assert query_item_weights(query, SKNNSpec(weights=kind)) == near(expected)
    decayed = [weight * math.exp(-back / 2) for weight, back in zip(expected, [11, 1, 0])]
    assert query_item_weights(query, SKNNSpec(weights=kind, lambda1=2.0)) == near(decayed)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("same", [1, 1, 1]),
        ("place", [1 / 12, 11 / 12, 1]),
        ("div", [1 / 12, 1 / 2, 1]),
        ("linear", [0, 0.8, 0.9]),
        ("log", [1 / math.log10(13.7), 1 / math.log10(3.7), 1 / math.log10(2.7)]),
        ("quadratic", [1 / 144, 1 / 4, 1]),
    ],
)
def test_decay_where_the_first_or_the_last_two_of_twelve_events_are_shared(kind: Any, expected: list[float]) -> None:
    assert neighbour_decay(np.array([1, 11, 12]), np.full(3, 12), SKNNSpec(decay=kind)) == near(expected)


def test_an_item_in_few_sessions_has_a_larger_idf_factor() -> None:
    # Items 3 and 4 are in 1 of 2 sessions: factor 1 + 5 ln 2. Item 2 is in both: factor 1.
    plain, boosted = (all_scores(fed(replace(SKNN, idf=idf), TWO), [1, 2]) for idf in (0.0, 5.0))
    assert boosted[2] == near(plain[2]) and boosted[3:5] == near(
        [score * (1 + 5 * math.log(2)) for score in plain[3:5]]
    )


def test_a_session_is_never_its_own_neighbour() -> None:
    assert all_scores(fed(SKNN, TWO), [1], user=1) == [0] * 10
    assert all_scores(fed(SKNN, TWO), [2], user=1)[3:5] == near([0, 1 / math.sqrt(2)])


def test_a_repeated_item_has_its_last_position() -> None:
    # In 1, 2, 1 the positions are 3 and 2, with two items and three events. Session 2 shares item 2, one step back.
    assert all_scores(fed(V_SKNN, TWO), [1, 2, 1])[4] == near(2 / 3 / 2 / 2)
    # In the session 3, 1, 5, 3 only the last position of item 3 counts, two after item 1.
    assert all_scores(fed(STAN, [(1, 3, 0), (1, 1, 0), (1, 5, 0), (1, 3, 0)]), [1])[3] == near(
        math.exp(-2 / 2.05) / math.sqrt(3)
    )


def test_only_the_most_recent_sessions_with_a_shared_item_are_compared() -> None:
    # Sessions 3 and 2 are the most recent, although 1 is the most similar. The query's own session is not counted.
    log = [(1, 1, 0), (1, 2, 0), (2, 1, 1), (2, 5, 1), (2, 6, 1), (3, 2, 2), (3, 7, 2), (4, 1, 3)]
    scores = all_scores(fed(replace(SKNN, sample=2), log), [1, 2], user=4)
    assert scores[5] > 0 and scores[7] > 0 and scores[1] == near(scores[5])
    assert all_scores(fed(replace(SKNN, sample=2), log), [1, 2])[5:8] == near([0, 0, 0.5])  # now session 4 counts
    late = [*log, (1, 8, 9)]  # the last event gives the time of a session
    assert all_scores(fed(replace(SKNN, sample=1), late), [1, 2])[8] > 0


def test_of_equally_similar_sessions_the_later_one_is_taken() -> None:
    log = [(1, 1, 5), (1, 2, 5), (2, 1, 4), (2, 3, 4)]
    assert all_scores(fed(replace(SKNN, k=1), log), [1])[2:4] == near([1 / math.sqrt(2), 0])
    log[2:] = [(2, 1, 5), (2, 3, 5)]  # at the same time: the later row
    assert all_scores(fed(replace(SKNN, k=1), log), [1])[2:4] == near([0, 1 / math.sqrt(2)])


def test_sums_that_differ_in_the_last_bit_are_equal() -> None:
    row_N, value_N = np.array([0, 0, 0, 2, 2]), np.array([0.6, 0.1 + 0.2 + 0.3, 0.7, 0.0, 1e-40])
    assert top_k_per_row(row_N, value_N, 3, 2).tolist() == [2, 0, 4]  # 0.6000000000000001 equals 0.6; 0 is left out
    assert top_k_per_row(row_N[:0], value_N[:0], 3, 2).tolist() == []


def test_without_timestamps_sessions_decay_by_blocks_or_not_at_all() -> None:
    def ordered(spec: SKNNSpec) -> list[float]:
        model = fed(spec)
        model.absorb(Events.trainable(torch.tensor([1, 1]), torch.tensor([1, 2])), Histories.empty())
        model.absorb(Events.trainable(torch.zeros(0), torch.zeros(0)), Histories.empty())  # not counted
        model.absorb(
            Events.trainable(torch.tensor([2, 2]), torch.tensor([1, 3]), torch.tensor([2, 3])), Histories.empty()
        )
        return all_scores(model, [1])

    spec = SKNNSpec(lambda2=2.0)
    assert ordered(spec)[2] == near(ordered(spec)[3], rel=1e-6)
    by_blocks = ordered(replace(spec, ages="blocks"))
    assert by_blocks[2] == near(by_blocks[3] * math.exp(-1 / 2))


def test_a_session_of_ten_years_ago_is_still_found() -> None:
    model = fed(STAN, [(1, 1, 0), (1, 2, 0)], [(2, 5, 3650)])
    assert all_scores(model, [1])[2] > 0


def test_last_n_limits_the_sessions_to_the_last_blocks() -> None:
    blocks = [[(1, 1, 0), (1, 2, 0)], [(2, 1, 1), (2, 3, 1)], [(3, 1, 2), (3, 4, 2)]]
    assert [score > 0 for score in all_scores(fed(SKNNSpec(last_n=2), *blocks), [1])[2:5]] == [False, True, True]
    again = [*blocks, [(1, 5, 3)]]  # an old session with a new event has all its items
    assert [score > 0 for score in all_scores(fed(SKNNSpec(last_n=1), *again), [1])[2:6]] == [True, False, False, True]


def test_events_before_the_last_ones_are_forgotten() -> None:
    model = fed(SKNNSpec(length=2), [(2, 1, 0), (2, 3, 0)], [(2, 4, 0)])
    assert sum(all_scores(model, [1])) == 0 and all_scores(model, [9, 3])[4] > 0
    assert all_scores(model, [3, 1, 1]) == all_scores(model, [3])  # no session has item 1 any more


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 7), st.integers(1, 6)), min_size=1, max_size=30),
    st.lists(st.integers(0, 30), max_size=4),
)
def test_the_index_does_not_depend_on_the_blocks(pairs: list[tuple[int, int]], cuts: list[int]) -> None:
    spec = replace(STAN, idf=1.0, sample=3)
    log = [(user, item, day) for day, (user, item) in enumerate(pairs)]
    edges = [0, *sorted(cuts), len(log)]
    parts = [log[a:b] for a, b in zip(edges, edges[1:])]
    at_once, in_parts = fed(spec, log), fed(spec, *parts)
    by_user = fed(spec, *([event for event in log if event[0] == user] for user in (3, 7, 1, 2, 6, 5, 4)))
    assert all_scores(at_once, [1, 2, 3]) == all_scores(in_parts, [1, 2, 3]) == all_scores(by_user, [1, 2, 3])


def test_a_copy_that_learns_more_or_forgets_does_not_change_the_original() -> None:
    model = fed(STAN, TWO)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = STAN.build(0)
    other.grow(9, N_ITEMS)
    other.load_state_dict(model.state_dict())
    assert all_scores(other, [1, 2]) == all_scores(model, [1, 2])
    other.absorb(Events.trainable(torch.tensor([2, 5]), torch.tensor([5, 1])), Histories.empty())
    assert all_scores(other, [1])[5] == 0 < all_scores(other, [2])[5]
    other.load_state_dict(model.state_dict())
    assert all_scores(other, [1, 2]) == all_scores(model, [1, 2])
    other.erase_user(1)
    assert all_scores(other, [1])[3] == 0 < all_scores(model, [1])[3]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@settings(max_examples=40)
@given(BLOCKS, st.integers(1, 9))
def test_erasing_a_user_equals_never_having_seen_it(blocks: list[Block], user: int) -> None:
    spec = replace(STAN, idf=1.0)
    model = fed(spec, *blocks)
    model.erase_user(user)
    without = fed(spec, *([event for event in block if event[0] != user] for block in blocks))
    for name in ("offsets_U", "items_R", "time_U"):
        assert torch.equal(model.state_dict()[name], without.state_dict()[name])
    assert all_scores(model, [1, 2, 3]) == all_scores(without, [1, 2, 3])


def test_adding_users_and_items_changes_no_score() -> None:
    model = fed(STAN, TWO)
    before = all_scores(model, [1, 2])
    model.grow(model.n_users + 20, model.n_items + 5)
    assert all_scores(model, [1, 2]) == before + [0] * 5
    model.absorb(Events.trainable(torch.tensor([25]), torch.tensor([14])), Histories.empty())
    assert all_scores(model, [14])[14] > 0


def test_a_query_without_shared_items_scores_zero() -> None:
    empty = SKNN.build(0)
    batch = Batch(torch.tensor([1, 2]), torch.zeros(2, 0, dtype=torch.int64))
    assert empty.score(batch, torch.arange(1)).tolist() == [[0], [0]]
    empty.grow(2, 3)
    for spec in NAMED.values():
        assert not any(all_scores(fed(spec), [1])) and not any(all_scores(fed(spec, TWO), [9, 52]))
        assert not any(all_scores(fed(spec, TWO), []))
    assert [part.shape for part in empty.candidates(batch)] == [(2, 0), (2, 0)]


def test_its_candidates_are_the_items_of_the_neighbours() -> None:
    model = fed(SKNN, TWO)
    assert isinstance(model, CandidateModel)
    batch = Batch(torch.tensor([8, 9, 9]), torch.tensor([[1, 2], [0, 4], [0, 9]]))
    items_BC, score_BC = model.candidates(batch)
    dense_BI = model.score(batch, torch.arange(N_ITEMS + 1))
    assert torch.equal(torch.where(items_BC > 0, dense_BI.gather(1, items_BC), 0), score_BC)
    assert [set(row) - {0} for row in items_BC.tolist()] == [{1, 2, 3, 4}, {2, 4}, set()]
    # First row: 2 is ahead of 1 and 3, which tie. Second row: 2 and 4 tie. Third row: all nine items tie at 0.
    assert target_ranks(model, batch, torch.tensor([3, 2, 9])).tolist() == [2.5, 1.5, 5]
    assert top_k(model, batch, 1)[0][0].tolist() == [2]


def test_each_row_may_have_its_own_items_to_score() -> None:
    batch, own_BN = Batch(torch.tensor([8, 9]), torch.tensor([[1, 2], [0, 4]])), torch.tensor([[2, 5], [4, 1]])
    assert fed(SKNN, TWO).score(batch, own_BN).tolist() == [[near(1.316497), 0], [near(0.707107), 0]]


@pytest.mark.parametrize("ages", ["days", "blocks"])
def test_a_loaded_model_scores_and_learns_like_the_saved_one(ages: Any, tmp_path: Path) -> None:
    model = fed(replace(STAN, ages=ages), TWO, [(4, 2, 3), (4, 6, 3)])
    save_state(State(model), tmp_path / "state")
    loaded = load_state(tmp_path / "state").model
    assert all_scores(loaded, [1, 2]) == all_scores(model, [1, 2]) and loaded.spec == model.spec
    for each in (model, loaded):
        each.absorb(
            Events.trainable(torch.tensor([4, 5]), torch.tensor([1, 2]), torch.tensor([5, 5]) * DAY), Histories.empty()
        )
    assert all_scores(loaded, [1, 2]) == all_scores(model, [1, 2])


def test_options_can_be_set_by_name_and_are_checked() -> None:
    assert find_instance("model", "v-sknn:k=500:sample=5000:weights=quadratic:idf=5", NAMED) == SKNNSpec(
        k=500, sample=5000, similarity="vec", weights="quadratic", decay="div", idf=5
    )
    with pytest.raises(OptionError, match='Option similarity is "jaccard". Use one of cosine, vec.'):
        SKNNSpec(similarity="jaccard")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="Option lambda2 is -1"):
        SKNNSpec(lambda2=-1)
