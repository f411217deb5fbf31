"""Logs with exposures: what a model is trained on, what is measured, and that no future event is used.

The world is a checkerboard with exposures: a user clicks items of its own colour and no others.
"""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from freshrec.data.batches import due_targets, history_items
from freshrec.data.histories import append_events, mark_trained
from freshrec.data.log import Log
from freshrec.data.split import LogSplit, split_log
from freshrec.data.synthetic import make_world
from freshrec.errors import IncompatibleError, OptionError
from freshrec.learn.click_quality import auc, log_losses
from freshrec.models import find_model
from freshrec.replay.cell import Cell, ReplaySettings, replay_cell
from freshrec.replay.click_metrics import auc_contributions, compute_click_metrics
from freshrec.replay.measure import QueryOptions
from freshrec.replay.recipe_schema import parse_recipe
from freshrec.replay.recipes import make_cells, make_replay_settings
from freshrec.replay.results import OVERALL_SPAN, collect_results
from freshrec.strategies import find_strategy
from freshrec.types import Events, Histories

near = pytest.approx


# metrics


def as_arrays(labels: list[float], p: list[float]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(labels, np.float32), np.array(p, np.float32)


def test_auc_by_hand() -> None:
    # Clicked: 0.9 and 0.4. Not clicked: 0.5 and 0.4. Of four pairs, 0.9 wins two, and 0.4 loses one and ties one.
    assert auc(*as_arrays([1, 1, 0, 0], [0.9, 0.4, 0.5, 0.4])) == near(2.5 / 4)
    for order in ([1.0, 1, 0, 0], [0.0, 1, 0, 1], [0.0, 0, 1, 1]):  # T30: equal scores give 0.5 in any order
        assert auc(*as_arrays(order, [0.3] * 4)) == 0.5
    assert np.isnan(auc(*as_arrays([1, 1], [0.2, 0.3]))) and np.isnan(auc(*as_arrays([], [])))


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.1, 0.2, 0.3, 0.7])), min_size=2, max_size=40))
def test_auc_is_the_statistic_of_mann_and_whitney(rows: list[tuple[bool, float]]) -> None:
    labels, p = as_arrays([float(label) for label, _ in rows], [p for _, p in rows])
    if 0 < labels.sum() < len(labels):
        u = mannwhitneyu(p[labels > 0], p[labels == 0]).statistic
        assert auc(labels, p) == near(u / (labels.sum() * (1 - labels).sum()))


def test_the_contributions_to_an_auc_by_hand() -> None:
    # Against the two not clicked, 0.9 wins both (1). 0.4 wins none and ties one (0.25). Against the two clicked, 0.5
    # loses to one (0.5). 0.4 loses to one and ties one (0.75). Each label has 2 of 4 events, so it weighs 4 / 2 = 2.
    shares = auc_contributions(*as_arrays([1, 1, 0, 0], [0.9, 0.4, 0.5, 0.4]))
    assert shares == near([0.625 + 2 * (x - 0.625) for x in (1, 0.25, 0.5, 0.75)])
    assert shares.mean() == near(0.625)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.1, 0.2, 0.3, 0.7])), min_size=2, max_size=40))
def test_the_mean_of_the_contributions_is_the_auc(rows: list[tuple[bool, float]]) -> None:
    labels, p = as_arrays([float(label) for label, _ in rows], [p for _, p in rows])
    assert auc_contributions(labels, p).mean() == near(auc(labels, p), nan_ok=True)


def test_the_standard_error_of_an_auc_matches_its_standard_deviation_over_new_samples() -> None:
    source = np.random.default_rng(0)
    aucs, widths = [], []
    for _ in range(300):
        labels = (source.random(200) < 0.3).astype(np.float32)
        p = (source.normal(size=200) + labels).astype(np.float32)
        aucs.append(auc(labels, p))
        widths.append(auc_contributions(labels, p).std() / np.sqrt(200))
    assert np.mean(widths) == near(np.std(aucs), rel=0.1)


def test_a_span_without_both_labels_has_no_value_in_any_metric() -> None:
    predictions = pl.DataFrame({"asked": [1, 2, 1, 2], "label": [1.0, 1.0, 0.0, 1.0], "p": [0.8, 0.3, 0.4, 0.6]})
    values = compute_click_metrics(predictions, ["logloss", "auc"])
    assert np.isnan(values).tolist() == [[False] * 2, [True] * 2, [False] * 2, [True] * 2]
    assert values[0] == near([-np.log(0.8), 1.0]) and values[2] == near([-np.log(0.6), 1.0])


def test_log_loss_by_hand() -> None:
    # -(ln 0.8 + ln 0.7) / 2. A wrong prediction of 0 costs -ln 1e-7, not infinity.
    assert log_losses(*as_arrays([1, 0], [0.8, 0.3])) == near([0.223144, 0.356675], abs=1e-6)
    assert log_losses(*as_arrays([1], [0.0])) == near([16.1181], abs=1e-4)
    assert log_losses(*as_arrays([0, 1], [0.5, 0.5])).mean() == near(0.693147, abs=1e-6)  # T32


# training data


def test_the_history_of_a_target_holds_items_that_were_clicked_strictly_earlier() -> None:
    # User 1 clicks 11 at time 1, not 12 at 2, 13 but not 14 at 3, and not 15 at 4. User 2 clicks 21 at 3.
    users, items = torch.tensor([1, 1, 2, 1, 1, 1]), torch.tensor([11, 12, 21, 13, 14, 15])
    events = replace(
        Events.trainable(users, items, torch.tensor([1, 2, 3, 3, 3, 4])), labels_E=torch.tensor([1.0, 0, 1, 1, 0, 0])
    )
    histories = append_events(Histories.empty(), events, 2)
    assert histories.items_R.tolist() == [11, 13, 21]  # items that were not clicked are not in the history
    due = due_targets(histories)
    assert due.items_N.tolist() == [11, 12, 21, 13, 14, 15] and due.labels_N is not None
    assert due.labels_N.tolist() == [1, 0, 1, 1, 0, 0]
    assert history_items(due, 5).tolist() == [[0, 0], [0, 11], [0, 0], [0, 11], [0, 11], [11, 13]]
    trained = mark_trained(histories, 5)
    assert len(due_targets(trained)) == 0 and trained.items_R.tolist() == [11, 13, 21]
    later = append_events(
        trained, replace(Events.trainable(users[:1], items[:1] + 5, torch.tensor([9])), labels_E=torch.ones(1)), 2
    )
    assert history_items(due_targets(later), 5).tolist() == [[11, 13]]


def test_an_event_without_a_label_is_in_the_history_and_is_no_target() -> None:
    nan = float("nan")
    events = replace(Events.trainable(torch.ones(2).long(), torch.tensor([7, 8])), labels_E=torch.tensor([nan, 0.0]))
    due = due_targets(append_events(Histories.empty(), events, 1))
    assert due.items_N.tolist() == [8] and history_items(due, 5).tolist() == [[7]]


# the replay


def world(swap_from: int | None = None) -> LogSplit:
    """Return a base block and three spans. From span `swap_from` on, users like the other colour."""
    frame = make_world("checkerboard", users=60, items=40, events=800, spans=3).log.frame
    shown = frame.with_columns(item_id=pl.Series(np.random.default_rng(0).integers(0, 40, len(frame))))
    both = pl.concat([frame, shown]).sort("time", maintain_order=True)
    own = (pl.col("user_id") + pl.col("item_id")) % 2 == 0
    if swap_from is not None:
        own = own ^ (pl.col("period") >= swap_from)
    log = Log(both.with_columns(label=own.cast(pl.Float64), category=pl.col("item_id") % 2), True, "us")
    return split_log(log, by="period", spans=3, targets="all", forget_users=0)


def cell(strategy: str, fit: str = ":fit.base_epochs=6:fit.epochs=2") -> Cell:
    model = "embedding-mlp:categories=2:lr=0.01"
    return Cell(model, find_model(model), strategy, find_strategy(strategy + fit), 0)


CLICK_SETTINGS = ReplaySettings(query_options=QueryOptions(min_history=0))


def run(tested: Cell, split: LogSplit, out: Path) -> pl.DataFrame:
    assert list(replay_cell(tested, split, CLICK_SETTINGS, out)) == [0, 1, 2, 3]
    return pl.concat([pl.read_parquet(out / tested.folder_name / f"span-{span}.parquet") for span in (1, 2, 3)])


@pytest.mark.parametrize("strategy", ["finetune", "full", "spmf", "spmf-all", "incctr", "sml", "asmg"])
def test_every_labelled_event_is_predicted_once_before_it_is_trained_on(strategy: str, tmp_path: Path) -> None:
    spans = world()
    predictions = run(cell(strategy), spans, tmp_path)
    assert len(predictions) == sum(len(span.events) for span in spans.spans[1:])
    assert (predictions["after"] == predictions["asked"] - 1).all() and predictions["p"].is_between(0, 1).all()
    results = collect_results([cell(strategy)], None, ["auc", "logloss"], tmp_path, "targets")
    by_span = results.filter((pl.col("metric") == "auc") & (pl.col("span") != OVERALL_SPAN))["value"].to_list()
    overall = results.filter((pl.col("metric") == "auc") & (pl.col("span") == OVERALL_SPAN))["value"].item()
    assert len(by_span) == 3 and overall == near(sum(by_span) / 3) and min(by_span) > 0.95
    assert f"| embedding-mlp:categories=2:lr=0.01 | {strategy} | {overall:.4f} (" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("strategy", ["finetune", "spmf", "incctr", "sml", "asmg", "asmg-linear"])
def test_events_after_a_span_change_no_probability_up_to_it(strategy: str, tmp_path: Path) -> None:
    tested = cell(strategy, ":fit.base_epochs=2:fit.epochs=1")
    plain, poisoned = run(tested, world(), tmp_path / "a"), run(tested, world(swap_from=3), tmp_path / "b")
    up_to_span_2 = pl.col("asked") <= 2
    assert plain.filter(up_to_span_2)["p"].to_list() == poisoned.filter(up_to_span_2)["p"].to_list()
    assert plain.filter(~up_to_span_2)["p"].to_list() != poisoned.filter(~up_to_span_2)["p"].to_list()


def test_an_interrupted_replay_of_clicks_resumes_with_the_same_results(tmp_path: Path) -> None:
    tested = cell("spmf", ":fit.base_epochs=2:fit.epochs=1")
    uninterrupted = run(tested, world(), tmp_path / "a")
    assert list(islice(replay_cell(tested, world(), CLICK_SETTINGS, tmp_path / "b"), 2)) == [0, 1]
    assert list(replay_cell(tested, world(), CLICK_SETTINGS, tmp_path / "b")) == [2, 3]
    parts = [pl.read_parquet(tmp_path / "b" / tested.folder_name / f"span-{span}.parquet") for span in (1, 2, 3)]
    assert pl.concat(parts).equals(uninterrupted)


def recipe(**replay: object) -> dict[str, dict[str, object]]:
    return {
        "log": {"path": "x", "exposures": True},
        "replay": {"models": ["embedding-mlp"], "metrics": ["auc"]} | replay,
    }


def test_only_models_that_predict_clicks_and_metrics_of_clicks_are_accepted() -> None:
    good = parse_recipe(recipe(strategies=["finetune", "incctr"]))
    assert {c.strategy_name for c in make_cells(good)} == {"finetune", "incctr"} and make_replay_settings(
        good
    ).query_options.n_sampled == 0
    with pytest.raises(IncompatibleError, match='"mf" ranks items and does not predict clicks'):
        make_cells(parse_recipe(recipe(models=["mf"], strategies=["finetune"])))
    with pytest.raises(OptionError, match='no metric of a log with exposures "hr@20"'):
        make_replay_settings(parse_recipe(recipe(metrics=["hr@20"])))


@pytest.mark.parametrize(
    "option", [{"averaging": "targets"}, {"averaging": "pooled"}, {"unseen": "drop"}, {"tune": True}]
)
def test_options_of_rankings_are_refused_on_a_log_with_exposures(option: dict[str, object]) -> None:
    # An option without effect is not accepted. The default "users" is, because saved recipes hold every option.
    with pytest.raises(OptionError, match="apply to rankings. Leave them out on a log with exposures"):
        make_replay_settings(parse_recipe(recipe(**option)))
    make_replay_settings(parse_recipe(recipe(averaging="users")))
