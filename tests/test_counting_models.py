"""The baselines by hand: popularity, repeat, item-kNN and Markov chain."""

import copy
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from freshrec.models import item_knn as item_knn_module
from freshrec.models.item_knn import COSINE, ItemKNNSpec
from freshrec.models.popularity import PopularitySpec
from freshrec.models.repeat import RepeatSpec
from freshrec.types import Batch, Events, Histories, Model

SPECS = [
    PopularitySpec(),
    PopularitySpec("last"),
    PopularitySpec("decay"),
    RepeatSpec(),
    RepeatSpec("freq"),
    ItemKNNSpec(),
    ItemKNNSpec("markov"),
]
LOGS = Path(__file__).parents[2] / "shared" / "data"


def events(users, items):
    return Events.trainable(torch.tensor(users, dtype=torch.int64), torch.tensor(items, dtype=torch.int64))


def histories(users, items, n_users):
    """Each user's items so far, in time order."""
    users, items = torch.as_tensor(users, dtype=torch.int64), torch.as_tensor(items, dtype=torch.int32)
    offsets = torch.zeros(n_users + 2, dtype=torch.int64)
    offsets[1:] = torch.bincount(users, minlength=n_users + 1).cumsum(0)
    nothing = torch.zeros(len(users), dtype=torch.int64)
    return Histories(offsets, items[torch.argsort(users, stable=True)], nothing, nothing.to(torch.int8))


def model_of(spec, users, items, n_users, n_items, blocks=1):
    """A model that absorbed the events in `blocks` blocks."""
    model = spec.build(0)
    model.grow(n_users, n_items)
    for part in np.array_split(np.arange(len(users)), blocks):
        before = slice(0, int(part[0]))
        old = histories(users[before], items[before], n_users)
        model.absorb(events(np.take(users, part), np.take(items, part)), old)
    return model


def scores(model, *history):
    """The scores of all items for one user with this history."""
    batch = Batch(torch.tensor([1]), torch.tensor([history]))
    return model.score(batch, torch.arange(1, model.n_items + 1))[0].tolist()


def random_log(n_events=300, n_users=12, n_items=15, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(1, n_users + 1, n_events), generator.integers(1, n_items + 1, n_events)


def test_popularity_counts_events():
    assert scores(model_of(PopularitySpec(), [1, 2, 1], [3, 3, 1], 2, 3), 0) == [1, 0, 2]


def test_events_before_the_last_window_are_forgotten():
    # A window is half of the 4 base events. After the base it holds 1, 2; two events later 3, 3.
    model = model_of(PopularitySpec("last", window=0.5), [1, 1, 1, 1], [1, 1, 1, 2], 1, 3)
    assert scores(model, 0) == [1, 1, 0]
    model.absorb(events([1, 1], [3, 3]), Histories.empty())
    assert scores(model, 0) == [0, 0, 2]


def test_decay_halves_a_count_every_half_life_of_events():
    # Half-life = 1 window = half of 4 events = 2 events. Ages after 6 events: 5 4 3 2 1 0, weights 2^(-age / 2).
    model = model_of(PopularitySpec("decay", window=0.5), [1, 1, 1, 1], [1, 1, 2, 2], 1, 3)
    model.absorb(events([1, 1], [3, 1]), Histories.empty())
    assert scores(model, 0) == pytest.approx([2**-2.5 + 2**-2 + 1, 2**-1.5 + 2**-1, 2**-0.5])


def test_repeat_last_ranks_own_items_by_their_last_event():
    # Ages: item 2 at 0 and 2, item 3 at 1. Other items score 0.
    assert scores(model_of(RepeatSpec(), [1], [1], 1, 3), 0, 2, 3, 2) == pytest.approx([0, 1, 1 / 2])


def test_repeat_freq_sums_the_events_of_an_item_with_decay():
    assert scores(model_of(RepeatSpec("freq"), [1], [1], 1, 3), 0, 2, 3, 2) == pytest.approx(
        [0, 1 + 0.5 ** (2 / 32), 0.5 ** (1 / 32)]
    )


def test_item_knn_by_hand():
    # Pairs 1-2 and 2-3. d = 1, 2, 1 of 4 events: idf(1) = log(1 + 4/2), idf(2) = log(1 + 4/3). History 1, then 2.
    model = model_of(ItemKNNSpec(), [1, 1, 2, 2], [1, 2, 2, 3], 2, 3)
    near, norm = np.log(7 / 3), np.sqrt(11 * 12)
    assert scores(model, 0, 1, 2) == pytest.approx([near / norm, 0.85 * np.log(3) / norm, near / norm])


def test_an_item_bought_again_pairs_with_itself():
    # One pair 1-1, counted from both ends: 2. d = 2 of 2 events: idf = log(1 + 2/3).
    assert scores(model_of(ItemKNNSpec(), [1, 1], [1, 1], 1, 1), 1) == pytest.approx([2 * np.log(5 / 3) / 12])


def test_markov_counts_later_items_and_weights_them_by_gap():
    # 1, 2, 3: 1 -> 2 weighs 1, 1 -> 3 weighs 1/2, 2 -> 3 weighs 1. The window is one event, and 1 -> 2 is one event
    # older than the others: 0.8. So d_1 = 1.3, d_2 = 1, d_3 = 0.
    model = model_of(ItemKNNSpec("markov"), [1, 1, 1], [1, 2, 3], 1, 3)
    assert scores(model, 1) == pytest.approx([0, 0.8 / 11.3, 0.5 / 11.3])
    assert scores(model, 1, 2) == pytest.approx([0, 0.4 / 11.3, 0.25 / 11.3 + 1 / 11])


def test_a_markov_pair_that_is_one_window_old_weighs_four_fifths():
    # A window is two events, like the second block, after which 1 -> 2 weighs 0.8. That block adds 1/2 of 1 -> 3 and 1
    # of 2 -> 3, both times s = 0.8^(1/2), because one event came later. So d_1 = 0.8 + s/2, d_2 = s.
    model = ItemKNNSpec("markov").build(0)
    model.grow(2, 3)
    model.window_events = 2
    model.absorb(events([1, 1], [1, 2]), Histories.empty())
    assert scores(model, 1) == pytest.approx([0, 1 / 11, 0])
    model.absorb(events([1, 2], [3, 3]), histories([1, 1], [1, 2], 2))
    s = 0.8**0.5
    assert scores(model, 1) == pytest.approx([0, 0.8 / (10.8 + s / 2), s / 2 / (10.8 + s / 2)])
    assert scores(model, 2) == pytest.approx([0, 0, s / (10 + s)])


def test_items_without_events_are_left_out_of_queries():
    for kind in ("cosine", "markov"):
        model = model_of(ItemKNNSpec(kind=kind), [1, 1, 2, 2], [1, 2, 1, 2], 2, 2)
        before = scores(model, 1)
        model.grow(2, 30)
        assert np.array_equal(scores(model, 1, *range(3, 28))[:2], before) and before[1] > 0
        other = ItemKNNSpec(kind=kind).build(0)
        other.load_state_dict(model.state_dict())
        assert np.array_equal(scores(other, 1, *range(3, 28))[:2], before)


def test_a_held_out_event_makes_no_pair():
    # Item row 0 hides a held-out event. The gaps around it stay: 1 -> 2 has a gap of 2, so it counts 1/2.
    model = ItemKNNSpec("markov").build(0)
    model.grow(1, 2)
    model.absorb(events([1], [2]), histories([1, 1], [1, 0], 1))
    assert (model.pair_counts_II.toarray() > 0).tolist() == [[False] * 3, [False, False, True], [False] * 3]
    assert scores(model, 1) == pytest.approx([0, 0.5 / 10.5])


@pytest.mark.parametrize("chunk", [7, 200_000])
def test_pairs_are_those_of_a_double_loop(chunk, monkeypatch):
    monkeypatch.setattr(item_knn_module, "CHUNK_EVENTS", chunk)
    users, items = random_log()
    wanted = np.zeros((16, 16))
    for user in range(1, 13):
        own = items[users == user]
        for later in range(len(own)):
            for earlier in range(max(0, later - COSINE.pair_window), later):
                wanted[own[earlier], own[later]] += 1
                wanted[own[later], own[earlier]] += 1
    assert np.array_equal(model_of(ItemKNNSpec(), users, items, 12, 15).pair_counts_II.toarray(), wanted)


@pytest.mark.parametrize("kind", ["cosine", "markov"])
@pytest.mark.parametrize("chunk", [7, 50])
def test_counting_in_parts_equals_counting_at_once(kind, chunk, monkeypatch):
    users, items = random_log()
    at_once = model_of(ItemKNNSpec(kind), users, items, 12, 15, blocks=2)
    monkeypatch.setattr(item_knn_module, "CHUNK_EVENTS", chunk)
    in_parts = model_of(ItemKNNSpec(kind), users, items, 12, 15, blocks=2)
    assert in_parts.pair_counts_II.nnz == at_once.pair_counts_II.nnz and in_parts.pair_counts_II.has_canonical_format
    assert in_parts.pair_counts_II.toarray() == pytest.approx(at_once.pair_counts_II.toarray(), rel=1e-6)


def test_a_query_has_indices_as_narrow_as_the_pairs():
    # With wider indices, every request would convert all pairs: 34 ms instead of 2 ms after 2 million events.
    users, items = random_log()
    for kind in ("cosine", "markov"):
        model = model_of(ItemKNNSpec(kind), users, items, 12, 15)
        query = model._query_weights(Batch(torch.tensor([1]), torch.tensor([[3, 4]])))
        assert query.indices.dtype == query.indptr.dtype == model.pair_counts_II.indices.dtype == np.int32
        assert model.pair_counts_II.indptr.dtype == np.int32


@pytest.mark.parametrize("spec", [PopularitySpec(), ItemKNNSpec()])
def test_events_in_blocks_give_the_same_scores_as_events_at_once(spec):
    users, items = random_log()
    once, often = (model_of(spec, users, items, 12, 15, blocks) for blocks in (1, 9))
    assert scores(once, 3, 4, 5) == pytest.approx(scores(often, 3, 4, 5), rel=1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_loaded_model_scores_and_learns_like_the_saved_one(spec):
    users, items = random_log()
    model = model_of(spec, users, items, 12, 15)
    loaded = spec.build(0)
    loaded.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    for each in (model, loaded):
        each.grow(13, 17)
        each.absorb(events([13, 13], [16, 3]), histories(users, items, 13))
    assert (loaded.n_users, loaded.n_items) == (13, 17)
    assert scores(loaded, 16, 4, 5) == scores(model, 16, 4, 5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_copy_that_absorbs_events_does_not_change_the_original(spec):
    users, items = random_log()
    model = model_of(spec, users, items, 12, 15)
    before = scores(model, 3, 4, 5), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    successor = copy.deepcopy(model)
    successor.grow(20, 20)
    successor.absorb(events([1, 1, 1], [3, 20, 4]), histories(users, items, 20))
    assert scores(model, 3, 4, 5) == before[0]
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_each_row_may_have_its_own_items_to_score(spec):
    users, items = random_log()
    model = model_of(spec, users, items, 12, 15)
    batch = Batch(torch.tensor([1, 2]), torch.tensor([[0, 3, 4], [5, 5, 6]]))
    shared, own = model.score(batch, torch.arange(16)), torch.tensor([[4, 1, 15], [5, 6, 2]])
    assert isinstance(model, Model)
    assert shared.dtype == torch.float32
    assert torch.equal(model.score(batch, own), shared.gather(1, own))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_an_empty_history_and_an_empty_block_are_valid(spec):
    model = spec.build(0)
    model.grow(2, 3)
    model.absorb(events([], []), Histories.empty())
    assert scores(model, 0, 0) == [0, 0, 0]
    assert model.score(Batch(torch.tensor([1]), torch.zeros(1, 0, dtype=torch.int64)), torch.arange(4)).shape == (1, 4)


@pytest.mark.skipif(not LOGS.exists(), reason="the folder shared/data with real logs is not beside the repository")
def test_on_a_real_log_item_knn_has_twice_the_hit_rate_of_popularity():
    log = pl.read_parquet(LOGS / "uci_online_retail.parquet").sort("timestamp", maintain_order=True)
    log = log.with_columns(pl.col("user_id").rank("dense"), pl.col("item_id").rank("dense"))
    old, new = log[: len(log) // 2], log[len(log) // 2 :].unique("user_id", keep="first", maintain_order=True)
    past = old.group_by("user_id", maintain_order=True).agg(pl.col("item_id").tail(20))
    asked = new.join(past, on="user_id", suffix="_past").filter(pl.col("item_id_past").list.len() == 20)
    batch = Batch(asked["user_id"].cast(pl.Int64).to_torch(), asked["item_id_past"].list.to_array(20).to_torch().long())
    hits = {}
    for name, spec in (("popularity", PopularitySpec()), ("item-knn", ItemKNNSpec())):
        sizes = int(log["user_id"].max()), int(log["item_id"].max())
        model = model_of(spec, old["user_id"].to_numpy().astype(int), old["item_id"].to_numpy().astype(int), *sizes)
        best = model.score(batch, torch.arange(sizes[1] + 1)).topk(20).indices
        hits[name] = (best == asked["item_id"].cast(pl.Int64).to_torch()[:, None]).any(1).float().mean().item()
    assert hits["item-knn"] > 2 * hits["popularity"] > 0, hits
