"""Metrics by hand, their general properties, and the same values from another library."""

import ir_measures
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from freshrec.errors import OptionError, TrainingError
from freshrec.replay.metrics import METRICS, compute_metrics, mean_per_user, parse_metric

NAMES = ["recall@20", "mrr@20", "recall@10", "mrr@10", "ndcg@20", "hr@20"]


def test_the_metrics_of_four_ranks_by_hand():
    # Ranks 1, 3, 25, 11: three of four are within 20, and two within 10.
    # - mrr@20 = (1 + 1/3 + 0 + 1/11) / 4 and mrr@10 = (1 + 1/3) / 4
    # - ndcg@20 = (1/log2(2) + 1/log2(4) + 0 + 1/log2(12)) / 4
    values = compute_metrics(np.array([1, 3, 25, 11]), NAMES).mean(0)
    assert values == pytest.approx([0.75, 0.356061, 0.5, 0.333333, 0.444736, 0.75], abs=5e-7)


def test_an_infinite_rank_is_a_miss_in_every_metric():
    assert compute_metrics(np.array([np.inf]), NAMES).tolist() == [[0.0] * 6]


def test_a_tie_across_the_end_of_the_list_counts_at_its_mean_rank():
    # Two items share ranks 20 and 21: the mean, 20.5, is outside. Ranks 19 and 20: 19.5 is inside, and mrr is 1 / 19.5.
    values = compute_metrics(np.array([20.5, 19.5]), ["hr@20", "mrr@20"])
    assert values.tolist() == [[0, 0], [1, 1 / 19.5]]


@given(st.lists(st.floats(1, 1000) | st.just(np.inf), min_size=1, max_size=30))
def test_mrr_is_at_most_ndcg_which_is_at_most_hr_and_longer_lists_lower_nothing(ranks):
    short = compute_metrics(np.array(ranks), ["mrr@10", "ndcg@10", "hr@10"])
    long = compute_metrics(np.array(ranks), ["mrr@20", "ndcg@20", "hr@20"])
    for values in (short, long):
        assert np.all(np.diff(values, axis=1) >= 0)
    assert np.all(short <= long)
    assert set(long[:, 2]) <= {0.0, 1.0}


def test_ir_measures_computes_the_same_values_on_random_rankings():
    generator = np.random.default_rng(0)
    scores = generator.random((50, 40))
    targets = generator.integers(0, 40, 50)
    ranks = 1 + (scores > scores[np.arange(50), targets][:, None]).sum(1)
    values = compute_metrics(ranks, ["ndcg@20", "recall@10", "mrr@10", "hr@5"]).mean(0)
    measures = [ir_measures.nDCG @ 20, ir_measures.R @ 10, ir_measures.RR @ 10, ir_measures.Success @ 5]
    relevant = {str(q): {str(item): 1} for q, item in enumerate(targets)}
    run = {str(q): {str(item): float(s) for item, s in enumerate(row)} for q, row in enumerate(scores)}
    expected = ir_measures.calc_aggregate(measures, relevant, run)
    assert values == pytest.approx([expected[measure] for measure in measures], abs=1e-5)


def test_a_user_with_many_targets_counts_once():
    # User 7 hits 1 of 2, and user 3 hits 1 of 1. The mean over users is (1/2 + 1) / 2, not 2/3.
    users, values = mean_per_user(np.array([7, 3, 7]), np.array([[1.0], [1.0], [0.0]]))
    assert users.tolist() == [3, 7]
    assert values.tolist() == [[1.0], [0.5]]
    assert values.mean() == 0.75


def test_a_metric_name_is_parsed_into_a_metric_and_a_list_length():
    assert parse_metric("ndcg@20") == (METRICS["ndcg"], 20)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ndgc@20", 'Did you mean "ndcg"'),
        ("ndcg", "ndcg@20"),
        ("ndcg@", "ndcg@20"),
        ("hr@0", "hr@20"),
        ("hr@x", "hr@20"),
    ],
)
def test_a_wrong_metric_name_is_refused_and_the_error_shows_a_right_one(name, message):
    with pytest.raises(OptionError, match=message):
        parse_metric(name)


@pytest.mark.parametrize("rank", [np.nan, 0.0, -1.0])
def test_an_impossible_rank_is_refused_and_not_counted_as_a_hit_or_a_miss(rank):
    with pytest.raises(TrainingError):
        compute_metrics(np.array([1.0, rank]), ["hr@20"])
