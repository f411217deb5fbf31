"""Ranks among sampled items: which items are sampled, and the metrics of the ranks."""

import numpy as np
import pytest
import torch
from torch import Tensor

from freshrec.errors import OptionError
from freshrec.models.mf import MF, MFSpec
from freshrec.nn.ranking import target_ranks_among
from freshrec.replay.measure import Queries, sample_negatives
from freshrec.replay.metrics import compute_metrics, parse_metric
from freshrec.replay.metrics import n_sampled_items as n_sampled
from freshrec.types import Batch

near = pytest.approx


def queries(n: int, n_items: int, history: list[int], target: int) -> Queries:
    ones_N = torch.ones(n, dtype=torch.int64)
    history_NT = torch.tensor([history], dtype=torch.int32).expand(n, -1)
    return Queries(ones_N, history_NT, target * ones_N, torch.arange(n), ones_N > 1, n_items)


def test_the_sampled_items_are_distinct_new_to_the_user_and_equally_likely() -> None:
    # Of items 1 .. 50, the user has 3, 4 and 5, and 6 is the target. Each of the 46 others is sampled with 20 / 46.
    chosen_Nn = sample_negatives(queries(4000, 50, [0, 3, 4, 5], 6), 20)
    assert chosen_Nn.shape == (4000, 20) and (chosen_Nn > 0).all()
    assert all(len(row.unique()) == 20 for row in chosen_Nn[:200])
    share_I = torch.bincount(chosen_Nn.reshape(-1), minlength=51) / 4000
    assert share_I[[0, 3, 4, 5, 6]].tolist() == [0] * 5
    others_I = torch.cat([share_I[1:3], share_I[7:]])
    assert others_I.min() > 20 / 46 - 0.04 and others_I.max() < 20 / 46 + 0.04  # 5 standard errors


def test_an_event_has_the_same_sampled_items_in_every_batch() -> None:
    whole_batch = queries(50, 1000, [1, 2], 9)
    part = torch.tensor([40, 7])
    assert torch.equal(sample_negatives(whole_batch, 99)[part], sample_negatives(whole_batch[part], 99))
    empty = queries(50, 1000, [], 9)  # without a history, only the target is excluded
    assert (sample_negatives(empty, 99) > 0).all()


def test_if_there_are_too_few_items_all_of_them_are_sampled() -> None:
    chosen_Nn = sample_negatives(queries(20, 6, [2], 3), 40)
    assert all(set(row.tolist()) == {0, 1, 4, 5, 6} for row in chosen_Nn)  # 0 = empty place


def model_with(scores: Tensor) -> MF:
    """Return an MF model whose score of item i is scores[i - 1], for all users."""
    model = MFSpec(d=1).build(0)
    model.grow(1, len(scores))
    model.users.packed[1, 0] = 1.0
    model.items.packed[1:, 0] = scores
    return model


def test_a_rank_among_some_items_by_hand() -> None:
    # The target, item 1, scores 5. Of the others, 7 is ahead, 5 ties and 3 is behind: 1 + 1 + 1/2. Item 0 is padding.
    model, batch = model_with(torch.tensor([5.0, 7, 5, 3])), Batch(torch.tensor([1]), torch.zeros(1, 0).long())
    assert target_ranks_among(model, batch, torch.tensor([1]), torch.tensor([[2, 3, 4, 0, 0]])).tolist() == [2.5]
    assert target_ranks_among(model, batch, torch.tensor([9]), torch.tensor([[2, 3, 4, 0, 0]])).tolist() == [torch.inf]


def test_random_ranks_among_1000_items_have_the_metrics_expected_by_chance() -> None:
    # T32: recall@5, @10, @20 = 0.005, 0.010, 0.020; ndcg = 0.002948, 0.004544, 0.007040. Every rank occurs once:
    names = [f"{metric}@{k} among 999 sampled" for metric in ("recall", "ndcg") for k in (5, 10, 20)]
    values = compute_metrics(np.arange(1, 1001), names).mean(0)
    assert values == near([0.005, 0.010, 0.020, 0.002948, 0.004544, 0.007040], abs=5e-7)
    # A model with equal scores ties with all items, so the rank is the middle of 1,000 places.
    model, batch = model_with(torch.zeros(2000)), Batch(torch.tensor([1]), torch.zeros(1, 0).long())
    others_BN = sample_negatives(queries(1, 2000, [], 5), 999)
    assert target_ranks_among(model, batch, torch.tensor([5]), others_BN).item() == 500.5


def test_the_name_of_a_metric_gives_the_number_of_sampled_items() -> None:
    assert n_sampled(["recall@20 among 999 sampled", "ndcg@5 among 999 sampled"]) == 999
    assert n_sampled(["recall@20"]) == 0 == n_sampled([])
    assert parse_metric("recall@20 among 999 sampled")[1] == 20
    with pytest.raises(OptionError, match="rank among different numbers of items"):
        n_sampled(["recall@20", "recall@20 among 999 sampled"])
