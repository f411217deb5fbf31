"""Run the cells of a replay, by (model, seed) so that a base block is trained once, in one or more processes."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import groupby
from multiprocessing.pool import AsyncResult
from pathlib import Path
from zlib import crc32

import torch

from freshrec.data.spans import Cut
from freshrec.errors import OptionError
from freshrec.learn.fit import TrainsPlainly, start
from freshrec.models.checkpoint import load_state, save_state, save_text
from freshrec.models.counted import absorb
from freshrec.replay.replay import Cell, Settings, replay_cell, timed
from freshrec.types import State, TrainedModel

Tell = Callable[[Cell, int], None]  # called with a cell and the span it has just finished


def run(cells: Iterable[Cell], cut: Cut, settings: Settings, out: Path, *, jobs: int = 1, tell: Tell) -> None:
    """Run all cells that are not done yet. One thread a process: on small operations two wait for each other."""
    cells = list(cells)
    _claim(out, cells, cut, settings)
    todo = sorted((c for c in cells if not (out / c.name / "done.json").exists()), key=_group)
    groups = [list(group) for _, group in groupby(todo, key=_group)]
    if jobs <= 1:
        for group in groups:
            _run_group(group, cut, settings, out, tell)
        return
    heed = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process: the workers inherit the deafness
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:  # leaving it ends them
        signal.signal(signal.SIGINT, heed)
        running = [pool.apply_async(_run_group, (group, cut, settings, out, _silent)) for group in groups]
        _watch(running, todo, out, tell)


def _claim(out: Path, cells: list[Cell], cut: Cut, settings: Settings) -> None:
    """Write down what is replayed. OptionError where `out` holds results of another log or of other options."""
    made_of = {out: f"{settings}, log {cut.fingerprint()}"}
    made_of |= {out / cell.name: repr(cell) for cell in cells}
    for folder, text in made_of.items():
        file = folder / "made-of.txt"
        if file.exists() and file.read_text() != text:
            raise OptionError(
                f"{folder} holds results of another log, or made with other options: choose another --out."
            )
    for folder, text in made_of.items():
        folder.mkdir(parents=True, exist_ok=True)
        save_text(text, folder / "made-of.txt")


def _group(cell: Cell) -> tuple[str, int]:
    return cell.model, cell.seed


def _silent(cell: Cell, span: int) -> None:
    """In a worker: the files tell."""


def _watch(running: list[AsyncResult[None]], cells: list[Cell], out: Path, tell: Tell) -> None:
    """Tell what the workers' files say until all are through."""
    told: set[tuple[str, int]] = set()
    while True:
        through = all(group.ready() for group in running)
        for cell in cells:
            for file in sorted((out / cell.name).glob("costs-*.json")):
                span = int(file.stem.rpartition("-")[2])
                if (cell.name, span) not in told:
                    told.add((cell.name, span))
                    tell(cell, span)
        for group in running:
            if group.ready():
                group.get()  # raises what the worker raised
        if through:
            return
        time.sleep(0.5)


def _run_group(cells: list[Cell], cut: Cut, settings: Settings, out: Path, tell: Tell) -> None:
    torch.set_num_threads(1)
    for cell in cells:
        base = _base(cell, cut, out) if cell.update.base == "plain" else None
        for span in replay_cell(cell, cut, settings, out, base):
            tell(cell, span)


def _base(cell: Cell, cut: Cut, out: Path) -> State:
    """The state after the base block, trained once for all strategies that train it plainly with the same options."""
    assert isinstance(cell.update, TrainsPlainly)
    fit = cell.update.fit
    options = repr((cell.spec, fit.base_epochs, fit.max_epochs, fit.patience, fit.holdout))
    path = out / "bases" / f"{cell.model.replace(':', '_')}--{cell.seed}--{crc32(options.encode()):08x}.safetensors"
    if path.exists():
        return load_state(path)
    path.parent.mkdir(exist_ok=True)
    span = cut.spans[0]
    model = cell.spec.build(cell.seed)
    assert isinstance(model, TrainedModel)
    before = absorb(State(model, seed=cell.seed), span.events, span.n_users, span.n_items)
    state, costs = timed(lambda: start(before, span, fit))
    state = replace(state, costs=costs)
    save_state(state, path)
    return state
