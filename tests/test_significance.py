"""Confidence intervals and significance tests on numbers whose right answer is known."""

import numpy as np
import polars as pl
import pytest

from freshrec.replay import significance
from freshrec.replay.significance import bootstrap_interval, compare_methods, paired_p_values, user_contributions

HR = ["hr@20"]


def queries(model, values, strategy="frozen", seed=0, span=1, users=None):
    """Return one row per value, by default with one query per user."""
    users = range(len(values)) if users is None else users
    frame = pl.DataFrame({"user": users, "hr@20": values}, schema={"user": pl.Int64, "hr@20": pl.Float64})
    return frame.with_columns(
        model=pl.lit(model), strategy=pl.lit(strategy), seed=pl.lit(seed), span=pl.lit(span), target=pl.lit(1)
    )


def test_the_interval_of_a_share_is_the_textbook_interval():
    # 100 hits of 1000: 0.1 +- 1.96 sqrt(0.1 * 0.9 / 1000) = 0.0814 .. 0.1186. With 500 resamples, an
    # end has the standard error sqrt(0.025 * 0.975 / 500) / 0.058 = 0.12 of the mean's 0.0095, which is 0.0011. The
    # tolerance is three of these.
    low, high = bootstrap_interval(np.repeat([1.0, 0.0], [100, 900])[:, None])
    assert low[0] == pytest.approx(0.0814, abs=0.0034)
    assert high[0] == pytest.approx(0.1186, abs=0.0034)


def test_each_metric_has_its_own_interval():
    values = np.random.default_rng(0).random((200, 3))
    together = bootstrap_interval(values, seed=4)
    alone = [bootstrap_interval(values[:, [m]], seed=4) for m in range(3)]
    assert np.allclose(together, np.concatenate(alone, axis=1))


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not():
    values = np.random.default_rng(0).random((50, 1))
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


@pytest.mark.parametrize("n_users", [1, 2, 1000])
def test_equal_values_have_an_interval_of_width_0(n_users):
    low, high = bootstrap_interval(np.full((n_users, 2), 0.1))
    assert low.tolist() == high.tolist() == [0.1, 0.1]


def test_six_wins_and_four_ties_have_the_p_value_2_in_64():
    # Only 6 signs matter. All six are the same in 1 of 2^6 cases on each side: 2 / 64.
    differences = np.array([0.1] * 6 + [0.0] * 4)[:, None]
    assert paired_p_values(differences)[0] == pytest.approx(2 / 64)


def test_a_thousand_ties_do_not_change_the_p_value_of_six_wins():
    # As above, but from 9999 random flips: 0.03125 with a standard error of 2 sqrt(2^-6 / 9999) = 0.0025.
    differences = np.array([0.1] * 6 + [0.0] * 1000)[:, None]
    assert paired_p_values(differences)[0] == pytest.approx(2 / 64, abs=0.01)


def test_without_a_difference_or_with_a_single_user_the_p_value_is_1():
    assert paired_p_values(np.zeros((500, 2))).tolist() == [1, 1]
    assert paired_p_values(np.array([[0.5]])).tolist() == [1]


def test_equal_methods_are_called_different_at_the_rate_of_the_significance_level():
    # 400 comparisons of noise: 5 % = 20 expected below 0.05, standard deviation sqrt(400 * 0.05 * 0.95) = 4.4.
    noise = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], p=[0.05, 0.9, 0.05], size=(300, 400))
    assert 20 - 3 * 4.4 <= (paired_p_values(noise) < 0.05).sum() <= 20 + 3 * 4.4


def test_contributions_weigh_spans_equally_then_users_then_queries():
    # Span 1: user 7 with the values 1 and 0, user 8 with 1: (1/2 + 1) / 2 = 3/4. Span 2: user 8 with 0. Mean: 3/8.
    # User 7 contributes 1/2 / 2 / 2 = 1/8 and user 8 contributes 1 / 2 / 2 = 1/4. Times two users: 1/4 and 1/2.
    spans, users, values = np.array([1, 1, 1, 2]), np.array([7, 8, 7, 8]), np.array([[1.0], [1.0], [0.0], [0.0]])
    found = user_contributions(spans, users, values)
    assert found.tolist() == [[0.25], [0.5]]
    assert found.mean() == 3 / 8


def test_a_comparison_weighs_all_spans_equally():
    # In span 1, a is better by 0.5 for 10 users. In span 2, a is worse by 0.1 for 100 others. (0.5 - 0.1) / 2 = 0.2.
    # Users pooled over spans would give (10 * 0.5 - 100 * 0.1) / 110 = -0.045.
    few, many = range(10), range(10, 110)
    a = pl.concat([queries("a", [0.5] * 10, users=few, span=1), queries("a", [0.0] * 100, users=many, span=2)])
    b = pl.concat([queries("b", [0.0] * 10, users=few, span=1), queries("b", [0.1] * 100, users=many, span=2)])
    row = compare_methods(pl.concat([a, b]), HR).row(0, named=True)
    assert (row["model_a"], row["model_b"], row["n"]) == ("a", "b", 110)
    assert row["difference"] == pytest.approx(0.2)
    assert row["low"] == pytest.approx(0.2) == row["high"]  # in every resample, because the users of a span agree


def test_a_second_metric_does_not_change_what_is_significant_in_the_first():
    # P-values are adjusted per metric. Those of hr and recall together would be twice as many.
    generator = np.random.default_rng(0)
    rates = ("a", 0.1), ("b", 0.2), ("c", 0.22)
    table = pl.concat([queries(name, (generator.random(300) < rate).astype(float)) for name, rate in rates])
    alone = compare_methods(table, HR)
    both = compare_methods(table.with_columns(pl.col("hr@20").alias("recall@20")), [*HR, "recall@20"])
    assert alone["p_adjusted"].n_unique() > 1
    for metric in ("hr@20", "recall@20"):
        assert both.filter(pl.col("metric") == metric).drop("metric").equals(alone.drop("metric"))


def test_seeds_are_averaged_before_methods_are_compared():
    # a hits with one of two seeds: 1/2. b has one seed and misses.
    table = pl.concat([queries("a", [1, 1], seed=0), queries("a", [0, 0], seed=1), queries("b", [0, 0])])
    row = compare_methods(table, HR).row(0, named=True)
    assert (row["difference"], row["low"], row["high"], row["n"]) == (0.5, 0.5, 0.5, 2)


def test_only_queries_that_both_methods_answered_are_compared():
    # b has no results for span 2, where a fails. On span 1 they are equal. c shares no query with a or b.
    a = pl.concat([queries("a", [1, 1], span=1), queries("a", [0, 0], span=2)])
    found = compare_methods(pl.concat([a, queries("b", [1, 1], span=1), queries("c", [1, 1], span=3)]), HR)
    assert found.select("model_a", "model_b", "difference", "n").rows() == [("a", "b", 0.0, 2)]


def test_every_pair_of_methods_is_compared_and_p_is_adjusted_for_their_number():
    # Three methods: three p-values. Benjamini-Hochberg: sorted p times 3 / rank, made monotone from the largest down.
    generator = np.random.default_rng(0)
    tables = [
        queries("m", (generator.random(300) < rate).astype(float), strategy)
        for strategy, rate in (("ewc", 0.1), ("full", 0.2), ("imsr", 0.22))
    ]
    found = compare_methods(pl.concat(tables), HR).sort("p")
    assert found.select("strategy_a", "strategy_b").n_unique() == 3
    p = found["p"].to_list()
    third, second = p[2], min(p[2], p[1] * 3 / 2)
    assert found["p_adjusted"].to_list() == pytest.approx([min(second, p[0] * 3), second, third])


def test_the_interval_and_the_test_agree_on_a_clear_difference():
    # a wins for 60 of 400 users and loses for none: mean 0.15, far from zero.
    # The smallest p-value of 9999 flips is 2 / 10,000.
    table = pl.concat([queries("a", [1.0] * 60 + [0.0] * 340), queries("b", [0.0] * 400)])
    found = compare_methods(table, HR).row(0, named=True)
    assert 0 < found["low"] < found["difference"] == 0.15 < found["high"]
    assert found["p"] == pytest.approx(2 / 10_000)


def test_one_method_alone_gives_an_empty_table_of_the_same_columns():
    two = pl.concat([queries("a", [1]), queries("b", [1])])
    assert compare_methods(queries("a", [1, 0]), HR).schema == compare_methods(two, HR).schema


def test_if_targets_weigh_equally_the_value_is_their_mean_within_each_span():
    # Span 1: users 1, 1, 1, 2 with 1, 0, 0, 1. The mean over targets is 1/2, over users (1/3 + 1) / 2 = 2/3. Span 2: 1.
    spans, users, values = np.array([1, 1, 1, 1, 2]), np.array([1, 1, 1, 2, 2]), np.array([[1.0], [0], [0], [1], [1]])
    assert user_contributions(spans, users, values, "targets").mean() == pytest.approx((1 / 2 + 1) / 2)
    assert user_contributions(spans, users, values).mean() == pytest.approx((2 / 3 + 1) / 2)


def test_a_comparison_averaged_over_targets_is_the_difference_of_these_means():
    table = pl.concat(
        [queries("a", [1.0, 0.0, 0.0, 1.0], users=[1, 1, 1, 2]), queries("b", [0.0] * 4, users=[1, 1, 1, 2])]
    )
    table = table.with_columns(pl.int_range(pl.len()).mod(4).alias("target"))
    row = compare_methods(table, HR, averaging="targets").row(0, named=True)
    assert row["difference"] == pytest.approx(1 / 2)


def test_pooled_targets_weigh_equally_over_all_spans():
    # T33: 100 and 300 targets with recalls of 0.2 and 0.4 give 0.35, and 0.30 if spans weigh equally.
    spans, users = np.repeat([1, 2], [100, 300]), np.arange(400) % 7
    values = np.concatenate([np.arange(100) < 20, np.arange(300) < 120]).astype(float)[:, None]
    assert user_contributions(spans, users, values, "pooled").mean() == pytest.approx(0.35)
    assert user_contributions(spans, users, values, "targets").mean() == pytest.approx(0.30)


def test_the_interval_of_a_mean_over_targets_is_that_of_a_mean_and_not_of_a_total():
    # Users have 1 to 10 targets each, and all of them are hits. So the mean of every resample is 1.
    users = np.repeat(np.arange(55), np.arange(55) % 10 + 1)
    spans, values = np.ones(len(users)), np.ones((len(users), 1))
    low, high = bootstrap_interval(user_contributions(spans, users, values, "targets", centred=True))
    assert [*low, *high] == pytest.approx([1.0, 1.0])
    half = np.random.default_rng(0).random((len(users), 1))
    plain, centred = (user_contributions(spans, users, half, "targets", centred=c) for c in (False, True))
    assert plain.mean() == pytest.approx(centred.mean()) == pytest.approx(half.mean())


def test_flipping_many_users_in_groups_gives_about_the_same_p_values(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.random.default_rng(0).normal([0.0, 0.05, 0.09], 1.0, (1501, 3))
    ungrouped = paired_p_values(differences)
    monkeypatch.setattr(significance, "MAX_FLIP_GROUPS", 400)  # 4 users per group, except in the last ones
    assert paired_p_values(differences) == pytest.approx(ungrouped, abs=0.04) and ungrouped[2] < 0.01
