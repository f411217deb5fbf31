"""The demo's sentences follow from the numbers it is given."""

import polars as pl
import pytest

from freshrec.replay.demo import describe_results
from freshrec.replay.results import OVERALL_SPAN

QUALITY = {"frozen": 0.10, "finetune": 0.12, "full": 0.11, "imsr": 0.13}


def results() -> pl.DataFrame:
    """Overlapping intervals everywhere; IMSR's interests grow from 4 to 5 to 6, whose mean is 5."""
    rows = [("popularity", "absorb", OVERALL_SPAN, "ndcg@20", 0.05)]
    for way, quality in QUALITY.items():
        costs = {"ndcg@20": quality, "update_cpu_s": 2.0, "forgetting ndcg@20": 0.01, "mean_k": 5.0}
        rows += [("comirec-dr", way, OVERALL_SPAN, metric, value) for metric, value in costs.items()]
        rows += [("comirec-dr", way, span, "mean_k", 4.0 + span) for span in (0, 1, 2)]
    frame = pl.DataFrame(rows, schema=["model", "strategy", "span", "metric", "value"], orient="row")
    return frame.with_columns(slice=pl.lit("all"), low=pl.lit(0.0), high=pl.lit(1.0))


def make_tests(p_updating: float, p_imsr: float) -> pl.DataFrame:
    pairs = [("finetune", "frozen", p_updating), ("finetune", "imsr", p_imsr), ("frozen", "imsr", 0.5)]
    frame = pl.DataFrame(pairs, schema=["strategy_a", "strategy_b", "p_adjusted"], orient="row")
    return frame.with_columns(model_a=pl.lit("comirec-dr"), model_b=pl.lit("comirec-dr"), metric=pl.lit("ndcg@20"))


@pytest.mark.parametrize(("p", "chance"), [(0.04, False), (0.06, True)])
def test_what_is_chance_is_decided_by_the_paired_test_not_by_overlapping_intervals(p: float, chance: bool) -> None:
    updating, imsr = (" ".join(describe_results(results(), make_tests(*ps))) for ps in ((p, 0.5), (0.5, p)))
    assert ("this is within chance" in updating) == chance
    assert ("call it a tie" in imsr) == chance
    assert "call it a tie" in updating and "this is within chance" in imsr


def test_the_interests_that_imsr_leaves_are_those_after_the_last_span() -> None:
    assert "keeps 6.0 per user" in " ".join(describe_results(results(), make_tests(0.01, 0.01)))


def test_forgetting_names_its_metric_and_its_direction() -> None:
    # every strategy of `results` forgets 0.01
    text = "Forgetting of earlier spans, as loss of ndcg@20 (positive = lost): +0.0100 with fine-tuning, +0.0100 with"
    assert text in " ".join(describe_results(results(), make_tests(0.01, 0.01)))
