"""Comparisons are fair: a full retrain is trained enough, duplicates count once, and means start after an update."""

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from freshrec.cli.app import main
from freshrec.data.log import read_log
from freshrec.data.split import split_log
from freshrec.data.synthetic import make_world
from freshrec.data.validate import validate_log
from freshrec.learn.fit import FitConfig
from freshrec.models import find_model
from freshrec.models.absorb import absorb_block
from freshrec.recommender.recommender import Recommender
from freshrec.replay.recipe_schema import parse_recipe
from freshrec.replay.recipes import load_log
from freshrec.strategies.baselines import Retrain
from freshrec.types import State


def epochs_of_retrains(fit: FitConfig) -> list[float]:
    """The epochs of the base block and of two full retrains on a world of circles."""
    split = split_log(make_world("drift", users=60, items=40, events=1500, spans=2).log, by="period", forget_users=0)
    state, strategy, found = State(find_model("mf:d=8:negatives=16").build(0)), Retrain(fit=fit), []
    for span in split.spans:
        state = strategy.update(absorb_block(state, span.events, span.n_users, span.n_items), span)
        found.append(state.costs["epochs"])
    return found


def test_each_full_retrain_chooses_its_own_epochs_and_has_at_least_five() -> None:
    # With patience 1 and at most 2 epochs, the choice is at most 2: the base block keeps it, a retrain gets 5.
    short = FitConfig(patience=1, max_epochs=2)
    base, *retrains = epochs_of_retrains(short)
    assert base <= 2 and retrains == [5.0, 5.0]
    assert epochs_of_retrains(replace(short, min_epochs=1))[1:] != retrains
    # A fixed number stays fixed, in the base block and in each retrain.
    assert epochs_of_retrains(FitConfig(base_epochs=3)) == [3.0, 3.0, 3.0]


@pytest.fixture
def doubled(tmp_path: Path) -> tuple[Path, Path]:
    """A log, and the same log with every row twice."""
    log = make_world("drift", users=60, items=40, events=800).log.frame
    log = log.select("user_id", "item_id", timestamp=pl.col("time") // 1_000_000).unique(maintain_order=True)
    log.write_parquet(tmp_path / "log.parquet")
    pl.concat([log, log]).write_parquet(tmp_path / "doubled.parquet")
    return tmp_path / "log.parquet", tmp_path / "doubled.parquet"


def test_a_doubled_log_is_replayed_fitted_and_validated_like_the_log_itself(doubled: tuple[Path, Path]) -> None:
    once, twice = (load_log(parse_recipe({"log": {"path": str(path)}})) for path in doubled)
    assert twice.frame.equals(once.frame)
    assert any(note.startswith(f"Skipped {len(once.frame):,} duplicates") for note in twice.notes)
    lists = [Recommender("repeat-last").fit(path).recommend([1, 2, 3], k=5, exclude_seen=False) for path in doubled]
    assert lists[0].equals(lists[1])
    assert [validate_log(read_log(path)).duplicates for path in doubled] == [0, len(once.frame)]


def test_without_timestamps_a_repeated_row_is_an_event_of_its_own(tmp_path: Path) -> None:
    pl.DataFrame({"user_id": [1, 1, 2], "item_id": [5, 5, 5], "period": [0, 0, 1]}).write_parquet(
        tmp_path / "log.parquet"
    )
    assert len(load_log(parse_recipe({"log": {"path": str(tmp_path / "log.parquet")}})).frame) == 3


def test_rows_of_exposures_are_duplicates_only_with_the_same_label(tmp_path: Path) -> None:
    rows = {"user_id": [1, 1, 1], "item_id": [5, 5, 5], "timestamp": [1_700_000_000] * 3, "label": [0, 1, 1]}
    pl.DataFrame(rows).write_parquet(tmp_path / "log.parquet")
    log = load_log(parse_recipe({"log": {"path": str(tmp_path / "log.parquet"), "exposures": True}}))
    assert sorted(log.frame["label"].to_list()) == [0.0, 1.0]


def test_means_start_at_the_first_span_after_an_update(doubled: tuple[Path, Path], tmp_path: Path) -> None:
    # In span 1, both strategies have the model of the base block.
    replay = ["replay", str(doubled[0]), "--spans", "3", "--models", "mf:d=4", "--controls", "popularity"]
    replay += ["--strategies", "frozen:fit.base_epochs=1,finetune:fit.base_epochs=1:fit.epochs=1"]
    for name, option, first in (("default", [], 2), ("all", ["--from-span", "1"], 1)):
        assert main([*replay, *option, "--out", str(tmp_path / name)]) == 0
        rows = pl.read_parquet(tmp_path / name / "results.parquet").filter(
            metric="ndcg@20", slice="all", model="mf:d=4"
        )
        for (_,), of_strategy in rows.group_by("strategy"):
            by_span = dict(of_strategy.select("span", "value").iter_rows())
            expected = sum(by_span[span] for span in range(first, 4)) / (4 - first)
            assert by_span[-1] == pytest.approx(expected)
