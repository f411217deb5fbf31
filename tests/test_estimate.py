"""The plan of a replay counts what the replay will do, and its seconds follow from what was measured."""

import json
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console

from freshrec.data.split import LogSplit, split_log
from freshrec.data.synthetic import make_world
from freshrec.models import find_model
from freshrec.replay.cell import Cell, ReplaySettings, replay_cell
from freshrec.replay.estimate import (
    ModelSpeed,
    Range,
    RunEstimate,
    Sizes,
    base_seconds,
    estimate_cost,
    measure_sizes,
    ranking_seconds,
    sample_users,
    split_cost,
)
from freshrec.replay.progress import MeasuringLog, format_range, print_estimate
from freshrec.replay.runner import run_cells
from freshrec.strategies import find_strategy
from freshrec.types import State

QUICK = "fit.base_epochs=1:fit.epochs=1"


def world(users: int = 200, events: int = 4000) -> LogSplit:
    return split_log(make_world("drift", users=users, items=80, events=events, spans=3).log, spans=3, forget_users=0.2)


def cell(strategy: str, model: str = "mf:d=8") -> Cell:
    return Cell(model, find_model(model), strategy, find_strategy(strategy), 0)


@pytest.mark.parametrize("last_update", [True, False])
def test_the_targets_and_queries_of_a_plan_are_those_of_the_replay(tmp_path: Path, last_update: bool) -> None:
    split, settings, one = world(), ReplaySettings(last_update=last_update), cell(f"finetune:{QUICK}")
    list(replay_cell(one, split, settings, tmp_path))
    sizes = measure_sizes(split, settings)
    for span in range(4):
        costs = json.loads((tmp_path / one.folder_name / f"costs-{span}.json").read_text())
        if "rows_read" in costs:
            assert sizes.targets[span] == costs["rows_read"]
        file = tmp_path / one.folder_name / f"span-{span}.parquet"
        after = pl.read_parquet(file)["after"].to_list() if file.exists() else []
        assert (sizes.queries[span], sizes.ranked_again[span]) == (after.count(span - 1), after.count(span))
    assert sizes.ranked_again[2] > 0 and (sizes.ranked_again[3] > 0) == last_update


def test_a_sample_has_whole_users_and_the_rows_of_the_log() -> None:
    split = world()
    base, span = sample_users(split, 500)
    assert 250 < len(base.events) < 1000 and (base.n_users, base.n_items) == (
        split.spans[0].n_users,
        split.spans[0].n_items,
    )
    chosen = set(base.events.users_E.tolist()) | set(span.events.users_E.tolist())
    for whole, part in zip(split.spans, (base, span)):
        assert sum(user in chosen for user in whole.events.users_E.tolist()) == len(part.events)
    assert sample_users(split, 2000) == split.spans[:2]  # the base block has 2,000 events


def test_the_part_of_a_cost_that_does_not_grow_is_that_of_an_update_without_events() -> None:
    assert split_cost(0, 0.5, 100, 2.5) == (0.5, 0.02)  # (2.5 - 0.5) / 100
    # 10 of the 100 passes are there without new events, such as those of a reservoir: 1.8 / 90 = 0.02; 0.5 - 10 * 0.02
    assert split_cost(10, 0.5, 100, 2.3) == pytest.approx((0.3, 0.02))
    assert split_cost(80, 2.0, 100, 2.5) == (0.0, 0.025)  # a full retrain: everything grows
    assert split_cost(0, 0.4, 0, 0.5) == (0.5, 0.0)  # a frozen model: nothing does


def test_the_base_block_costs_the_search_for_the_number_of_epochs_and_the_training() -> None:
    speed = ModelSpeed((), State(find_model("mf").build(0)), epoch_s=6.0, rank_s={"recent": 0.01})
    sizes = Sizes([1200, 300], [0, 40], [0, 10])
    # 4 epochs: 24 s. The search stops 8 epochs later: 12 of them, each 5 s on 5/6 of the targets and 2 s for 200 tests.
    chosen = base_seconds(cell("finetune"), speed, Range(4, 8), sizes)
    assert (chosen.low, chosen.high) == pytest.approx((24 + 12 * 7, 48 + 16 * 7))
    assert base_seconds(cell("finetune:fit.base_epochs=4"), speed, Range(4, 4), sizes) == Range(24.0, 24.0)
    # 40 queries in two readouts, 10 again in one: 40 * 0.03 + 10 * 0.01
    assert ranking_seconds({"recent": 0.01, "stored": 0.02}, sizes).low == pytest.approx(1.3)


def test_a_shared_base_block_is_estimated_once_and_seeds_multiply() -> None:
    cells = [cell(f"frozen:{QUICK}"), cell(f"finetune:{QUICK}"), cell("absorb", "item-knn")]
    cells.append(replace(cells[1], seed=1))
    seen: list[str] = []
    frozen, finetune, knn = estimate_cost(cells, world(), ReplaySettings(), seen.append)
    assert seen == [f"mf:d=8 frozen:{QUICK}", f"mf:d=8 finetune:{QUICK}", "item-knn absorb"]
    assert (frozen.n_seeds, finetune.n_seeds, knn.n_seeds) == (1, 2, 1)
    assert frozen.base.low > 0 and frozen.base.low == frozen.base.high  # one epoch, as the option says
    assert finetune.base.low < frozen.base.low and finetune.updates.low > frozen.updates.low
    assert knn.total.low < 1


@pytest.mark.slow
def test_an_estimate_is_right_within_a_factor_of_two(tmp_path: Path) -> None:
    # CPU seconds of a short run; both are measured on this machine, in this process
    split = split_log(make_world("newborn", users=300, items=150, events=9_000, spans=3).log, spans=3)
    cells = [cell(name, "comirec-dr:d=16") for name in ("finetune", "full", "imsr")]
    estimates = {row.strategy: row for row in estimate_cost(cells, split, ReplaySettings())}
    run_cells(cells, split, ReplaySettings(), tmp_path, on_span_done=lambda cell, span: None)
    for one in cells:
        files = [tmp_path / one.folder_name / f"costs-{span}.json" for span in range(4)]
        base_s, *updates_s = (json.loads(file.read_text())["update_cpu_s"] for file in files)
        estimate = estimates[one.strategy_name]
        assert estimate.updates.low / 2 < sum(updates_s) < 2 * estimate.updates.high
        if one.strategy_name == "finetune":
            assert estimate.base.low / 2 < base_s < 2 * estimate.base.high


def test_a_plan_of_a_few_seconds_reports_nothing_on_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    MeasuringLog(silent_s=1e9)("mf full")
    assert capsys.readouterr().err == ""
    MeasuringLog(silent_s=0)("mf full")
    assert capsys.readouterr().err == "[0 CPU-s] timing mf full\n"


def test_an_estimate_is_one_number_or_a_range_and_fits_80_columns() -> None:
    ranges = [(3.04, 3.04), (100, 119), (5, 20), (0.01, 0.02), (0.01, 0.4), (0, 0)]
    assert [format_range(Range(*ends)) for ends in ranges] == ["3.0", "119", "5.0 .. 20", "<0.1", "<0.1 .. 0.4", "0"]
    rows = [
        RunEstimate("comirec-dr:d=16", "finetune", 3, Range(100, 400), Range(1000, 1000), Range(12, 12)),
        RunEstimate("popularity-decay", "absorb x3", 1, Range(), Range(0.4, 0.4), Range(1.2, 1.2)),
    ]
    console = Console(width=80, force_terminal=False, record=True, stderr=True)
    print_estimate(console, rows)
    text = console.export_text()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and all(line == line.rstrip() for line in lines)
    # 100 + 1000 + 12 + 0.4 + 1.2 and 400 + 1000 + 12 + 1.6
    assert "Total: 1,114 .. 1,414 CPU-s." in text and "Ranges: the epochs were chosen on a sample" in " ".join(
        text.split()
    )
