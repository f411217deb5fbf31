"""Run the cells of a replay, by (model, seed) so that a base block is trained once, in one or more processes."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from multiprocessing.pool import AsyncResult
from pathlib import Path

import torch
from filelock import FileLock

from freshrec.data.spans import Cut
from freshrec.device import here, on
from freshrec.errors import OptionError
from freshrec.learn.fit import Fit, start
from freshrec.models.checkpoint import load_state, save_state
from freshrec.models.counted import absorb
from freshrec.replay.made_of import Made, base_file, is_made_of, is_spec_of, write_made_of
from freshrec.replay.replay import Cell, Settings, replay_cell, timed
from freshrec.types import Span, State, TrainedModel

Tell = Callable[[Cell, int], None]  # called with a cell and the span it has just finished


def run(
    cells: Iterable[Cell],
    cut: Cut,
    settings: Settings,
    out: Path,
    *,
    jobs: int = 1,
    device: str = "cpu",
    tell: Tell,
) -> None:
    """Run all cells that are not done yet, what trains on `device`.

    One thread a process: on small operations two wait for each other. Cells that share a base block share its training.
    OptionError where there is no such device.
    """
    cells = list(cells)
    on(device)  # it is there: asked before anything is written
    _claim(out, cells, cut, settings)
    todo = sorted((c for c in cells if not (out / c.name / "done.json").exists()), key=_group)
    if jobs <= 1:
        for cell in todo:
            _run_cell(cell, cut, device, settings, out, tell)
        return
    bases = {_base_file(cell, cell.shared_fit, out): cell for cell in todo if cell.shared_fit}
    heed = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process: the workers inherit the deafness
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:  # leaving it ends them
        signal.signal(signal.SIGINT, heed)
        running = [
            pool.apply_async(_train_base, (cell, cut, device, out)) for cell in bases.values()
        ]  # and meanwhile ...
        running += [pool.apply_async(_run_cell, (cell, cut, device, settings, out, _silent)) for cell in todo]
        _watch(running, todo, out, tell)


def _claim(out: Path, cells: list[Cell], cut: Cut, settings: Settings) -> None:
    """Write down what is replayed. OptionError where `out` holds results of another log or of other options."""
    made_of: dict[Path, Made] = {out: (settings, cut.fingerprint())}
    made_of |= {out / cell.name: cell for cell in cells}
    for folder, made in made_of.items():
        if not is_made_of(folder, made):
            raise OptionError(
                f"{folder} holds results of another log, or made with other options: choose another --out."
            )
    for folder, made in made_of.items():
        write_made_of(folder, made)


def _group(cell: Cell) -> tuple[str, int]:
    return cell.model, cell.seed


def _silent(cell: Cell, span: int) -> None:
    """In a worker: the files tell."""


def _watch(running: list[AsyncResult[None]], cells: list[Cell], out: Path, tell: Tell) -> None:
    """Tell what the workers' files say until all are through."""
    told: set[tuple[str, int]] = set()
    while True:
        through = all(task.ready() for task in running)
        for cell in cells:
            for file in sorted((out / cell.name).glob("costs-*.json")):
                span = int(file.stem.rpartition("-")[2])
                if (cell.name, span) not in told:
                    told.add((cell.name, span))
                    tell(cell, span)
        for task in running:
            if task.ready():
                task.get()  # raises what the worker raised
        if through:
            return
        time.sleep(0.5)


def _run_cell(cell: Cell, cut: Cut, device: str, settings: Settings, out: Path, tell: Tell) -> None:
    torch.set_num_threads(1)
    with on(_device_of(cell, device)):
        cut = moved(cut)
        base = _base(cell, cell.shared_fit, cut, out) if cell.shared_fit else None
        for span in replay_cell(cell, cut, settings, out, base):
            tell(cell, span)


def _train_base(cell: Cell, cut: Cut, device: str, out: Path) -> None:
    torch.set_num_threads(1)
    with on(_device_of(cell, device)):
        assert cell.shared_fit
        _base(cell, cell.shared_fit, moved(cut), out)


def _device_of(cell: Cell, device: str) -> str:
    """What counts does so on the CPU, and so does the blend, which is counters but for one small model."""
    return device if isinstance(cell.spec.build(cell.seed), TrainedModel) else "cpu"


def moved(cut: Cut) -> Cut:
    """The cut with its events where new tensors lie."""
    return replace(cut, spans=tuple(replace(span, events=span.events.to(here())) for span in cut.spans))


def _base_file(cell: Cell, fit: Fit, out: Path) -> Path:
    """Where the state after the base block is kept for all that train it plainly with the same options."""
    return base_file(cell, (fit.base_epochs, fit.max_epochs, fit.patience, fit.holdout), out)


def _base(cell: Cell, fit: Fit, cut: Cut, out: Path) -> State:
    """The state after the base block: of several processes that want it, one trains it and the others wait."""
    path, span = _base_file(cell, fit, out), cut.spans[0]
    path.parent.mkdir(exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if path.exists() and is_spec_of(found := load_state(path), cell):
            return found
        return _trained(cell, span, fit, path)


def _trained(cell: Cell, span: Span, fit: Fit, path: Path) -> State:
    model = cell.spec.build(cell.seed)
    assert isinstance(model, TrainedModel)
    before = absorb(State(model, seed=cell.seed), span.events, span.n_users, span.n_items)
    state, costs = timed(lambda: start(before, span, fit))
    state = replace(state, costs=costs)
    save_state(state, path)
    return state
