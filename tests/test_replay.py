"""The replay does not see the future, resumes exactly, and adds up.

On a tiny world: 200 users, 80 items, 4,000 events, half of them the base block, then three spans.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from freshrec.data.log import Log
from freshrec.data.spans import Cut, cut
from freshrec.data.worlds import make
from freshrec.errors import IncompatibleError
from freshrec.learn.fit import Fit
from freshrec.models import find_model
from freshrec.replay.measure import SLICES, facts
from freshrec.replay.replay import Cell, Settings, check, replay_cell
from freshrec.replay.results import OVERALL, collect
from freshrec.replay.run import run
from freshrec.strategies import find_strategy
from freshrec.types import DUE, NEVER, SECRET, TEST, Events, Span, State, Strategy

METRICS = ("hr@20", "ndcg@20")
SPANS = 3
TIMES = ("_s", "_mb")  # ends of the names of costs that differ from run to run


def world() -> Log:
    return make("drift", users=200, items=80, events=4000, spans=SPANS).log


def cut_of(log: Log) -> Cut:
    return cut(log, by="count", spans=SPANS, forget_users=0.2)


def cell_of(model: str, strategy: str) -> Cell:
    """A small model, trained for one epoch at a time."""
    if strategy != "absorb":
        model += ":d=16:negatives=64"
        strategy += ":fit.base_epochs=1:fit.epochs=1"
    return Cell(model, find_model(model), strategy, find_strategy(strategy), 0)


CELLS = [
    cell_of(*names)
    for names in (("item-knn", "absorb"), ("sasrec", "finetune"), ("comirec-dr", "imsr"), ("comirec-dr", "full"))
]
each_cell = pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.strategy.partition(":")[0])


def ranks_of(cell: Cell, out: Path) -> dict[int, pl.DataFrame]:
    """The rank tables of a cell by span."""
    return {int(f.stem.rpartition("-")[2]): pl.read_parquet(f) for f in (out / cell.name).glob("span-*.parquet")}


def results_of(cell: Cell, parts: Cut, out: Path) -> pl.DataFrame:
    """The final results, without what a clock or the memory says."""
    results = collect([cell], facts(parts.spans), METRICS, out)
    return results.filter(~pl.any_horizontal(pl.col("metric").str.ends_with(end) for end in TIMES))


@each_cell
def test_what_comes_after_a_span_changes_no_rank_up_to_it(cell: Cell, tmp_path: Path) -> None:
    clean = world()
    whole = cut_of(clean)
    known = sum(len(span.events) for span in whole.spans[:3])  # the base and spans 1 and 2
    future = clean.frame[known:]
    shuffled = future.with_columns(future["user_id"].shuffle(1), future["item_id"].shuffle(2))  # the same counts
    garbage = replace(clean, frame=pl.concat([clean.frame[:known], shuffled]))
    for parts, name in ((whole, "clean"), (cut_of(garbage), "garbage")):
        list(replay_cell(cell, parts, Settings(), tmp_path / name))
    a, b = (ranks_of(cell, tmp_path / name) for name in ("clean", "garbage"))
    assert a[1].equals(b[1])
    assert a[2].equals(b[2])
    assert not a[3].equals(b[3])  # the garbage did reach the replay


@pytest.mark.parametrize("tune", [False, True])
@each_cell
def test_a_cell_that_stops_after_a_span_resumes_as_if_it_had_not(cell: Cell, tune: bool, tmp_path: Path) -> None:
    parts, settings = cut_of(world()), Settings(tune=tune)
    assert list(replay_cell(cell, parts, settings, tmp_path / "whole")) == [0, 1, 2, 3]
    assert list(islice(replay_cell(cell, parts, settings, tmp_path / "parts"), 3)) == [0, 1, 2]
    assert list(replay_cell(cell, parts, settings, tmp_path / "parts")) == [3]
    whole, resumed = (ranks_of(cell, tmp_path / name) for name in ("whole", "parts"))
    assert all(whole[t].equals(resumed[t]) for t in (1, 2, 3))
    assert results_of(cell, parts, tmp_path / "whole").equals(results_of(cell, parts, tmp_path / "parts"))


def test_a_cell_killed_before_any_of_its_writes_resumes_as_if_it_had_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, parts = cell_of("popularity", "absorb"), cut_of(world())
    list(replay_cell(cell, parts, Settings(), tmp_path / "whole"))
    expected, original, n_writes = results_of(cell, parts, tmp_path / "whole"), Path.replace, 0

    def killed(left: list[int]) -> None:
        """Every write ends in a rename; the one after `left` others does not come to be."""

        def rename(self: Path, target: Path) -> Path:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return original(self, target)

        monkeypatch.setattr(Path, "replace", rename)

    while True:
        out = tmp_path / str(n_writes)
        killed([n_writes])
        try:
            list(replay_cell(cell, parts, Settings(), out))
            break
        except KeyboardInterrupt:
            monkeypatch.undo()
            list(replay_cell(cell, parts, Settings(), out))
            assert results_of(cell, parts, out).equals(expected)
            n_writes += 1
    assert n_writes == 3 + 3 * 2 + 2  # ranks in 3 spans, costs in 4, the state in 4, and the mark that all is done
