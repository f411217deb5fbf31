"""Lists of any length, for any number of users: the same for every batch, in bounded memory."""

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from freshrec.data import batches
from freshrec.data.batches import flat_history_items, history_items, split_by_cost
from freshrec.data.histories import append_events
from freshrec.models.popularity import PopularitySpec
from freshrec.nn.ranking import Exclusions, top_k
from freshrec.recommender import explanation, lists
from freshrec.recommender.click_overlay import ClickOverlay, current_targets
from freshrec.recommender.diversity import diversify
from freshrec.recommender.list_request import ListRequest
from freshrec.recommender.recommender import Recommender
from freshrec.server import handlers, micro_batching
from freshrec.server.micro_batching import MicroBatcher
from freshrec.types import Batch, Events, Histories

N_ITEMS, N_USERS = 60, 40
STRANGER = 999
HEAVY, N_SEEN = 1, 150_000  # a user, and the number of this user's events


def random_log() -> pl.DataFrame:
    """Users with 1 to 60 different items, in 5 categories. Popular items are more frequent."""
    rng = np.random.default_rng(5)
    items = [rng.permutation(N_ITEMS)[: 1 + user % N_ITEMS] + 1 for user in range(0, 2 * N_USERS, 2)]
    users = np.repeat(np.arange(1, N_USERS + 1), [len(part) for part in items])
    order = rng.permutation(len(users))
    frame = pl.DataFrame({"user_id": users[order], "item_id": np.concatenate(items)[order]})
    times = 1_700_000_000 + pl.int_range(pl.len()) * 60
    return frame.with_columns(timestamp=times, category=(pl.col("item_id") % 5).cast(pl.String))


USERS = [*range(1, N_USERS + 1), STRANGER, 3, 3]
REQUESTS: dict[str, dict[str, Any]] = {
    "short": {"k": 5},
    "whole catalogue": {"k": N_ITEMS},
    "far beyond it": {"k": 10**9},
    "with seen items": {"k": 30, "exclude_seen": False},
    "allow and deny": {"k": 30, "allow": list(range(1, 31)), "deny": list(range(10, 25))},
    "deny all": {"k": 30, "deny": list(range(1, 1_000))},
    "deny most": {"k": 500, "deny": list(range(4, 1_000))},
    "category": {"k": 500, "category": "3"},
    "diversity": {"k": 12, "diversity": 0.3},
    "diversity, whole catalogue": {"k": 10**9, "diversity": 0.3},
}


@pytest.fixture(scope="module", params=["popularity", "item-knn", "user-knn", "sknn", "mf:d=4"])
def fitted(request: pytest.FixtureRequest) -> Recommender:
    if request.param != "mf:d=4":
        return Recommender(request.param).fit(random_log())
    fitted = Recommender(request.param, "finetune:fit.base_epochs=1").fit(random_log())
    model: Any = fitted.served.state.model
    for table in (model.users, model.items):  # small whole numbers, because products in batches of other sizes round
        table.weights.copy_(torch.randint(-9, 10, table.weights.shape, generator=torch.Generator().manual_seed(0)))
    return fitted


@pytest.mark.parametrize("name", REQUESTS)
def test_lists_are_the_same_for_every_size_of_a_batch(
    name: str, fitted: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fitted.recommend(USERS, **REQUESTS[name])
    alone = [fitted.recommend(user, **REQUESTS[name]) for user in USERS[:8]]
    assert pl.concat(alone).equals(fitted.recommend(USERS[:8], **REQUESTS[name]))
    for budget, n_users in ((1, 256), (2_000, 256), (10**9, 3)):
        monkeypatch.setattr(batches, "MAX_BATCH_VALUES", budget)
        monkeypatch.setattr(lists, "MAX_BATCH_VALUES", budget)
        monkeypatch.setattr(lists, "USERS_PER_BATCH", n_users)
        assert fitted.recommend(USERS, **REQUESTS[name]).equals(expected)


def test_a_list_of_popular_items_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    log = random_log()
    counts = dict(log["item_id"].value_counts().iter_rows())
    seen = {user: set(items) for user, items in log.group_by("user_id").agg("item_id").iter_rows()}
    fitted = Recommender("popularity").fit(log)
    for budget in (1, 10**9):
        monkeypatch.setattr(batches, "MAX_BATCH_VALUES", budget)
        monkeypatch.setattr(lists, "MAX_BATCH_VALUES", budget)
        found = fitted.recommend(USERS[:-2], k=10**6, deny=[7, 8])
        for user in USERS[:-2]:
            listed = found.filter(pl.col("user_id") == user)
            left = set(counts) - {7, 8} - seen.get(user, set())
            assert set(listed["item_id"]) == left and listed.height == len(left)
            assert listed["rank"].to_list() == list(range(1, len(left) + 1))
            if user != STRANGER:  # the score of a fallback item weighs recent events more
                assert listed["score"].to_list() == sorted((counts[item] for item in left), reverse=True)


def test_similar_items_are_the_same_for_every_size_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    for model, strategy in (("item-knn", None), ("mf:d=4", "finetune:fit.base_epochs=1")):
        fitted = Recommender(model, strategy).fit(random_log())
        monkeypatch.setattr(lists, "MAX_BATCH_VALUES", 2**23)
        expected = fitted.similar_items([*range(1, N_ITEMS + 1), 4], k=10**9)
        monkeypatch.setattr(lists, "MAX_BATCH_VALUES", 1)
        found = fitted.similar_items([*range(1, N_ITEMS + 1), 4], k=10**9)
        assert found.drop("score").equals(expected.drop("score")) and found["rank"].max() <= N_ITEMS - 1
        np.testing.assert_allclose(found["score"].to_numpy(), expected["score"].to_numpy(), rtol=1e-5, atol=1e-6)


def test_an_explanation_is_the_same_for_every_size_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Recommender("repeat-last:order=freq").fit(random_log()).served
    expected = explanation.explain_pair(
        served, 40, int(random_log().filter(pl.col("user_id") == 40)["item_id"][-1]), "repeat-last", True
    )
    monkeypatch.setattr(explanation, "MAX_BATCH_VALUES", 1)
    assert explanation.explain_pair(served, 40, expected.item, "repeat-last", True) == expected
    assert expected.total == pytest.approx(expected.score)


@pytest.mark.parametrize("diversity", [0.0, 0.1, 0.7, 3.3, 1e6])
def test_a_diverse_list_is_that_of_a_loop_to_the_last_bit(diversity: float) -> None:
    source = torch.Generator().manual_seed(1)
    scores_BC = torch.rand(20, 40, generator=source).sort(1, descending=True).values
    scores_BC[::2, 5:9] = scores_BC[::2, 5:6]  # ties
    kinds_BC, items_BC = torch.randint(0, 4, (20, 40), generator=source), torch.arange(1, 41).expand(20, -1)
    left_BC, costs_BC, chosen = scores_BC.clone(), torch.zeros_like(scores_BC), []
    for _ in range(40):
        at_B1 = (left_BC - costs_BC).argmax(1, keepdim=True)
        chosen.append(items_BC.gather(1, at_B1))
        left_BC.scatter_(1, at_B1, -torch.inf)
        kind_B1 = kinds_BC.gather(1, at_B1)
        costs_BC += diversity * ((kinds_BC == kind_B1) & (kind_B1 > 0))
    for k in (1, 7, 40, 10**9):
        items_BK, scores_BK = diversify(items_BC, scores_BC, kinds_BC, k, diversity)
        assert torch.equal(items_BK, torch.cat(chosen, 1)[:, :k])
        assert torch.equal(scores_BK, scores_BC.gather(1, items_BK - 1))


def test_batches_are_split_where_their_cost_reaches_the_budget() -> None:
    # costs 3 4 5 1 1 9 1 start at 0 3 7 12 13 14 23: with a budget of 10, the chunks start at 0, 12 and 23
    cost_N = torch.tensor([3, 4, 5, 1, 1, 9, 1])
    found = [part.tolist() for part in split_by_cost(torch.arange(10, 17), cost_N, 10)]
    assert found == [[10, 11, 12], [13, 14, 15], [16]]
    assert [len(part) for part in split_by_cost(torch.arange(7), cost_N, 1)] == [1] * 7


def test_history_items_without_padding_are_those_with_padding() -> None:
    events = Events.trainable(torch.tensor([1, 3, 1, 3, 3]), torch.tensor([5, 6, 7, 8, 9]))
    histories, overlay = append_events(Histories.empty(), events, 3), ClickOverlay()
    overlay.add_click(2, 99, 4)
    users_N = torch.tensor([3, 1, 2, 3])
    targets = current_targets(histories, overlay, users_N)
    index_E, items_E = flat_history_items(targets)
    padded_NT = history_items(targets, 9)
    assert list(zip(index_E.tolist(), items_E.tolist())) == [
        (n, item) for n, row in enumerate(padded_NT.tolist()) for item in row if item
    ]
    assert [len(part) for part in flat_history_items(targets[:0])] == [0, 0]


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes by which the largest memory of this process exceeds that before the call."""

    def peak() -> int:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the current memory
    before = peak()
    call()
    return peak() - before


@pytest.fixture(scope="module")
def heavy() -> Recommender:
    """One user with 150,000 items among 255 users with 10 each, and items in 50 categories."""
    rng = np.random.default_rng(0)
    items = np.append(rng.permutation(N_SEEN) + 1, rng.integers(1, N_SEEN, 255 * 10))
    users = np.append(np.full(N_SEEN, HEAVY), np.repeat(np.arange(2, 257), 10))
    frame = pl.DataFrame({"user_id": users, "item_id": items, "timestamp": 1_700_000_000 + np.arange(len(users))})
    return Recommender("popularity").fit(frame.with_columns(category=pl.col("item_id") % 50))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "call",
    [
        lambda heavy: heavy.recommend(list(range(1, 257)), k=10),
        lambda heavy: heavy.recommend(list(range(2, 257)), k=10, deny=list(range(1, 149_000))),
        lambda heavy: heavy.recommend(list(range(2, 257)) * 20, k=100_000, allow=[1, 2, 3]),
        lambda heavy: heavy.recommend([2, 3], k=10**10, diversity=0.5),
    ],
    ids=["a heavy user", "many denied items", "k", "diversity"],
)
def test_memory_is_bounded_apart_from_the_answer(call: Callable[[Recommender], object], heavy: Recommender) -> None:
    # A padded matrix of 256 users x 150,000 items takes 307 MB in int64, and its comparison with the items as much
    # again. A batch takes about 200 MB, and a row of the answer about 100 bytes while it is made.
    assert peak_memory(lambda: call(heavy)) < 400e6


def test_a_heavy_user_costs_the_others_no_more_than_a_list_of_their_own(heavy: Recommender) -> None:
    def seconds(users: list[int]) -> float:
        start = time.process_time()
        heavy.recommend(users, k=10)
        return time.process_time() - start

    others = list(range(2, 257))
    seconds(others)  # the first call builds caches
    assert seconds([HEAVY, *others]) < 0.2 + 3 * (seconds(others) + seconds([HEAVY]))


def test_exclusions_of_a_batch_equal_a_padded_matrix() -> None:
    model, source = PopularitySpec().build(0), torch.Generator().manual_seed(3)
    model.grow(4, 50)
    model.counts_I = torch.arange(51).double()
    items_BM = torch.randint(0, 51, (4, 30), generator=source)
    shared_M = torch.tensor([50, 3, 70])  # the model has not learned item 70
    users_E, columns_E = items_BM.nonzero(as_tuple=True)
    excluded = Exclusions(shared_M, users_E, items_BM[users_E, columns_E])
    found = top_k(model, Batch(torch.arange(1, 5), torch.zeros(4, 0, dtype=torch.int64)), 50, excluded)
    left = [[item for item in range(50, 0, -1) if item not in (*row, 50, 3)] for row in items_BM.tolist()]
    assert [row[scores > -torch.inf].tolist() for row, scores in zip(*found)] == left
    assert excluded.count(4, 50).tolist() == [50 - len(row) for row in left]
    is_kept_B = torch.tensor([True, False, False, True])
    assert excluded.select_users(is_kept_B).count(2, 50).tolist() == [50 - len(left[0]), 50 - len(left[3])]
    expected_BC = torch.tensor([[item not in row for item in range(1, 51)] for row in left])
    assert torch.equal(excluded.contain(torch.arange(1, 51).expand(4, -1)), expected_BC)


class Version:
    """A version whose lists are computed at once."""

    search_info = SimpleNamespace(how="candidates")


@pytest.fixture
def batch_users(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The users of each batch. User n has n events."""
    found: list[list[int]] = []

    def recommend(version: Version, users: list[int], request: ListRequest) -> list[int]:
        found.append(list(users))
        return users

    monkeypatch.setattr(handlers, "recommend", recommend)
    monkeypatch.setattr(handlers, "n_past_events", lambda version, user: user)
    return found


def test_a_user_with_many_events_is_answered_outside_of_the_batches(batch_users: list[list[int]]) -> None:
    in_workers: list[int] = []

    async def worker(work: Callable[[], list[int]]) -> list[int]:
        in_workers.extend(work())
        return in_workers[-1:]

    many = micro_batching.MAX_BATCH_EVENTS + 1

    async def all_at_once() -> list[Any]:
        batcher, version, request = MicroBatcher(worker), Version(), ListRequest()  # type: ignore[arg-type]
        return await asyncio.gather(*(batcher.recommend(version, user, request) for user in (1, many, 2)))  # type: ignore[arg-type]

    assert asyncio.run(all_at_once()) == [1, many, 2]
    assert in_workers == [many] and sorted(batch_users) == [[1, 2], [many]]
