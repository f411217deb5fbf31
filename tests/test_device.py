"""Everything that trains on the CPU trains on another device: each tensor is created there, or moved."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import polars as pl
import pytest
import torch
from pretend import NAME, Devices
from test_contract import Pair, pairs, with_categories

from freshrec.data.split import LogSplit, split_log
from freshrec.data.synthetic import make_world
from freshrec.device import default_device, use_device
from freshrec.errors import OptionError
from freshrec.models import COUNTING_MODELS
from freshrec.replay.cell import Cell, ReplaySettings, replay_cell
from freshrec.replay.runner import move_to_device, run_cells

QUICK = {
    ("comirec-dr", "imsr"),
    ("comirec-sa", "full"),
    ("sasrec", "ader"),
    ("sasrec", "ewc"),
    ("mf", "sml"),
    ("sasrec", "asmg"),
    ("mf", "spmf"),
    ("limarec", "finetune"),
    ("sasrec:categories=3", "full"),
}
ALL_OF = {"sasrec", "comirec-dr", "mf"}  # with every strategy; other models with two


@pytest.fixture
def pretend() -> Iterator[None]:
    with Devices():
        yield


@cache
def world() -> LogSplit:
    world = make_world("checkerboard", users=12, items=20, events=150, spans=2)
    return with_categories(split_log(world.log, by="period", forget_users=0))


def replayed(pair: Pair, out: Path, device: str = "cpu") -> pl.DataFrame:
    cell, log = Cell(pair.model, pair.spec(), pair.strategy, pair.update(), seed=0), world()
    with use_device(device):
        list(replay_cell(cell, move_to_device(log), ReplaySettings(), out))
    return pl.concat(pl.read_parquet(file) for file in sorted((out / cell.folder_name).glob("span-*.parquet")))


def trained() -> Iterator[object]:
    for pair in pairs():
        if pair.model in COUNTING_MODELS or pair.model == "blend":
            continue
        if pair.model in ALL_OF or pair.strategy in {"finetune", "full"} or (pair.model, pair.strategy) in QUICK:
            slow = [] if (pair.model, pair.strategy) in QUICK else [pytest.mark.slow]
            yield pytest.param(pair, id=f"{pair.model}-{pair.strategy}", marks=slow)


@pytest.mark.usefixtures("pretend")
def test_the_pretend_device_refuses_what_a_gpu_refuses() -> None:
    with use_device(NAME):
        there = torch.ones(2, 3)
        assert there.device.type == NAME and default_device().type == NAME and float((there @ there.t()).sum()) == 12.0
        with pytest.raises(RuntimeError, match="two devices"):
            there + torch.ones(2, 3, device="cpu")
        with pytest.raises(RuntimeError, match="generator of another device"):
            torch.rand(3, generator=torch.Generator())
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
        assert there.cpu().numpy().sum() == 6.0


@pytest.mark.usefixtures("pretend")
@pytest.mark.parametrize("pair", list(trained()))
def test_a_replay_runs_on_another_device(pair: Pair, tmp_path: Path) -> None:
    ranks = replayed(pair, tmp_path, NAME)["rank"]
    assert len(ranks) and ranks.is_not_nan().all()


@pytest.mark.usefixtures("pretend")
def test_another_device_gives_the_results_of_the_cpu(tmp_path: Path) -> None:
    # random numbers are the same, and arithmetic differs only in the order of some sums
    pair = Pair("mf", "finetune")
    assert replayed(pair, tmp_path / "there", NAME).equals(replayed(pair, tmp_path / "here"))


def test_a_missing_device_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match='There is no device "abacus" here'):
        run_cells([], world(), ReplaySettings(), tmp_path, device="abacus", on_span_done=lambda cell, span: None)
