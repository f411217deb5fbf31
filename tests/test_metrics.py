"""Metrics by hand, by law, and by a second opinion."""

import ir_measures
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from freshrec.errors import OptionError, TrainingError
from freshrec.replay.metrics import METRICS, compute_metrics, mean_per_user, parse_metric

NAMES = ["recall@20", "mrr@20", "recall@10", "mrr@10", "ndcg@20", "hr@20"]


def test_four_ranks_give_the_values_computed_by_hand():
    # ranks 1, 3, 25, 11: three of four within 20, two within 10.
    # mrr@20 = (1 + 1/3 + 0 + 1/11) / 4; mrr@10 = (1 + 1/3) / 4; ndcg@20 = (1/log2(2) + 1/log2(4) + 0 + 1/log2(12)) / 4
    values = compute_metrics(np.array([1, 3, 25, 11]), NAMES).mean(0)
    assert values == pytest.approx([0.75, 0.356061, 0.5, 0.333333, 0.444736, 0.75], abs=5e-7)


def test_a_target_that_cannot_be_found_is_a_miss_of_every_metric():
    assert compute_metrics(np.array([np.inf]), NAMES).tolist() == [[0.0] * 6]


def test_a_tie_across_the_edge_of_the_list_is_judged_by_its_middle():
    # Two items share places 20 and 21: the middle is 20.5, outside. Places 19 and 20: 19.5, inside, worth 1 / 19.5.
    values = compute_metrics(np.array([20.5, 19.5]), ["hr@20", "mrr@20"])
    assert values.tolist() == [[0, 0], [1, 1 / 19.5]]


@given(st.lists(st.floats(1, 1000) | st.just(np.inf), min_size=1, max_size=30))
def test_every_query_has_mrr_below_ndcg_below_hr_and_longer_lists_never_hurt(ranks):
    short = compute_metrics(np.array(ranks), ["mrr@10", "ndcg@10", "hr@10"])
    long = compute_metrics(np.array(ranks), ["mrr@20", "ndcg@20", "hr@20"])
    for values in (short, long):
        assert np.all(np.diff(values, axis=1) >= 0)
    assert np.all(short <= long)
    assert set(long[:, 2]) <= {0.0, 1.0}


def test_a_well_kept_library_computes_the_same_on_random_rankings():
    generator = np.random.default_rng(0)
    scores = generator.random((50, 40))
    targets = generator.integers(0, 40, 50)
    ranks = 1 + (scores > scores[np.arange(50), targets][:, None]).sum(1)
    ours = compute_metrics(ranks, ["ndcg@20", "recall@10", "mrr@10", "hr@5"]).mean(0)
    theirs = [ir_measures.nDCG @ 20, ir_measures.R @ 10, ir_measures.RR @ 10, ir_measures.Success @ 5]
    wanted = {str(q): {str(item): 1} for q, item in enumerate(targets)}
    run = {str(q): {str(item): float(s) for item, s in enumerate(row)} for q, row in enumerate(scores)}
    found = ir_measures.calc_aggregate(theirs, wanted, run)
    assert ours == pytest.approx([found[measure] for measure in theirs], abs=1e-5)


def test_a_user_with_many_targets_counts_once():
    # User 7 hits 1 of 2, user 3 hits 1 of 1: the mean over users is (1/2 + 1) / 2, not 2/3.
    users, values = mean_per_user(np.array([7, 3, 7]), np.array([[1.0], [1.0], [0.0]]))
    assert users.tolist() == [3, 7]
    assert values.tolist() == [[1.0], [0.5]]
    assert values.mean() == 0.75


def test_a_name_is_a_metric_and_a_length():
    assert parse_metric("ndcg@20") == (METRICS["ndcg"], 20)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ndgc@20", 'Did you mean "ndcg"'),
        ("ndcg", "ndcg@20"),
        ("ndcg@", "ndcg@20"),
        ("hr@0", "hr@20"),
        ("hr@x", "hr@20"),
    ],
)
def test_a_wrong_name_is_refused_with_a_right_one(name, said):
    with pytest.raises(OptionError, match=said):
        parse_metric(name)


@pytest.mark.parametrize("rank", [np.nan, 0.0, -1.0])
def test_a_rank_that_is_not_one_is_refused_and_not_counted_as_a_hit_or_a_miss(rank):
    with pytest.raises(TrainingError):
        compute_metrics(np.array([1.0, rank]), ["hr@20"])
