"""Do the runs of a replay in one or more processes, ordered so that a shared base block is trained once."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Set
from dataclasses import replace
from multiprocessing.pool import AsyncResult
from pathlib import Path

import torch
from filelock import FileLock

from freshrec.data.split import LogSplit
from freshrec.device import default_device, use_device
from freshrec.errors import OptionError
from freshrec.learn.fit import FitConfig, fit_base_block
from freshrec.models.absorb import absorb_block
from freshrec.replay.cell import Cell, ReplaySettings, measure_cost, replay_cell
from freshrec.replay.provenance import Provenance, base_file, is_spec_of, matches_provenance, write_provenance
from freshrec.store.checkpoint import load_state, save_state
from freshrec.types import Span, State, TrainedModel

ProgressCallback = Callable[[Cell, int], None]  # called with a run and the span that it has just finished


def run_cells(
    cells: Iterable[Cell],
    split: LogSplit,
    settings: ReplaySettings,
    out: Path,
    *,
    jobs: int = 1,
    device: str = "cpu",
    on_span_done: ProgressCallback,
) -> None:
    """Do all runs that are not done yet. Trained models run on `device`.

    Each process has one thread, because threads wait for each other on small operations. A shared base block is trained
    once. Raises OptionError if the device does not exist, or if `out` holds other results.
    """
    cells = list(cells)
    use_device(device)  # raises before anything is written
    _claim_folder(out, cells, split, settings)
    unfinished = sorted((c for c in cells if not (out / c.folder_name / "done.json").exists()), key=_sort_key)
    if jobs <= 1:
        for cell in unfinished:
            _run_cell(cell, split, device, settings, out, on_span_done)
        return
    reported = _finished_spans(unfinished, out).keys()
    bases = {base_file(cell, cell.base_options, out): cell for cell in unfinished if cell.shared_fit}
    # the workers inherit the handler, so that only this process reacts to Ctrl-C
    previous_handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:  # leaving the context ends the workers
        signal.signal(signal.SIGINT, previous_handler)
        running = [pool.apply_async(_prepare_base, (cell, split, device, out)) for cell in bases.values()]
        for cell in unfinished:
            running.append(pool.apply_async(_run_cell, (cell, split, device, settings, out, _ignore_progress)))
        _report_progress(running, unfinished, out, reported, on_span_done)


def _claim_folder(out: Path, cells: list[Cell], split: LogSplit, settings: ReplaySettings) -> None:
    """Record the origin of the results. Raises OptionError if `out` holds results of another log or other options."""
    descriptions: dict[Path, Provenance] = {out: (settings, split.fingerprint())}
    descriptions |= {out / cell.folder_name: cell for cell in cells}
    for folder, source in descriptions.items():
        if not matches_provenance(folder, source):
            raise OptionError(f"{folder} holds results of another log or of other options. Choose another --out.")
    for folder, source in descriptions.items():
        write_provenance(folder, source)


def _sort_key(cell: Cell) -> tuple[str, int]:
    return cell.model_name, cell.seed


def _ignore_progress(cell: Cell, span: int) -> None:
    """Do nothing: the main process reads the progress of a worker from its files."""


def _finished_spans(cells: list[Cell], out: Path) -> dict[tuple[str, int], Cell]:
    """The spans whose files are written: folder of the run and number of the span -> run, in order."""
    return {
        (cell.folder_name, span): cell
        for cell in cells
        for span in sorted(int(file.stem.rpartition("-")[2]) for file in (out / cell.folder_name).glob("costs-*.json"))
    }


def _report_progress(
    running: list[AsyncResult[None]],
    cells: list[Cell],
    out: Path,
    reported: Set[tuple[str, int]],
    on_span_done: ProgressCallback,
) -> None:
    """Report new files of the workers until all have finished. Files of `reported` spans are not new."""
    while True:
        is_finished = all(task.ready() for task in running)
        finished = _finished_spans(cells, out)
        for (folder, span), cell in finished.items():
            if (folder, span) not in reported:
                on_span_done(cell, span)
        reported = reported | finished.keys()
        for task in running:
            if task.ready():
                task.get()  # raises the error of the worker
        if is_finished:
            return
        time.sleep(0.5)


def _run_cell(
    cell: Cell, split: LogSplit, device: str, settings: ReplaySettings, out: Path, on_span_done: ProgressCallback
) -> None:
    torch.set_num_threads(1)
    with use_device(_cell_device(cell, device)):
        split = move_to_device(split)
        base = _load_or_train_base(cell, cell.shared_fit, split, out) if cell.shared_fit else None
        for span in replay_cell(cell, split, settings, out, base):
            on_span_done(cell, span)


def _prepare_base(cell: Cell, split: LogSplit, device: str, out: Path) -> None:
    torch.set_num_threads(1)
    with use_device(_cell_device(cell, device)):
        assert cell.shared_fit
        _load_or_train_base(cell, cell.shared_fit, move_to_device(split), out)


def _cell_device(cell: Cell, device: str) -> str:
    """The device of a run. Counting models and the blend, which mostly counts, run on the CPU."""
    return device if isinstance(cell.model_spec.build(cell.seed), TrainedModel) else "cpu"


def move_to_device(split: LogSplit) -> LogSplit:
    """Move the events of a split to the default device."""
    return replace(split, spans=tuple(replace(span, events=span.events.to(default_device())) for span in split.spans))


def _load_or_train_base(cell: Cell, fit: FitConfig, split: LogSplit, out: Path) -> State:
    """Return the state after the base block. If several processes need it, one trains and the others wait."""
    path, span = base_file(cell, cell.base_options, out), split.spans[0]
    path.parent.mkdir(exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if path.exists() and is_spec_of(found := load_state(path), cell):
            return found
        return _train_base_state(cell, span, fit, path)


def _train_base_state(cell: Cell, span: Span, fit: FitConfig, path: Path) -> State:
    model = cell.model_spec.build(cell.seed)
    assert isinstance(model, TrainedModel)
    absorbed = absorb_block(State(model, seed=cell.seed), span.events, span.n_users, span.n_items)
    state, costs = measure_cost(lambda: fit_base_block(absorbed, span, fit))
    state = replace(state, costs=costs)
    save_state(state, path)
    return state
