"""The replay: for each span, measure what the model of the past says, absorb, update. Stops anywhere, resumes exactly.

A cell is one (model, strategy, seed, cadence). Its folder holds a Parquet file of ranks and a JSON file of costs per
span, and the state after the last finished span until the cell is done.
"""

import gc
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import polars as pl
import torch

from freshrec.data.batches import append
from freshrec.data.spans import Cut
from freshrec.errors import IncompatibleError
from freshrec.learn.fit import Clock
from freshrec.models.blend import Blend
from freshrec.models.checkpoint import load_tree, save_text, save_tree, write_whole
from freshrec.models.counted import absorb, told
from freshrec.models.ranking import READOUTS
from freshrec.models.requirements import build_model
from freshrec.models.scoring import history_length
from freshrec.replay.measure import Asked, Block, Queries, blocks_of, click_rows, queries_of, rank_queries
from freshrec.types import (
    VALID,
    ClickModel,
    EncodingModel,
    Histories,
    InterestModel,
    ModelSpec,
    Span,
    State,
    Strategy,
    TrainedModel,
)


@dataclass(frozen=True)
class Cell:
    """One way of updating one model, with one seed."""

    model: str
    spec: ModelSpec
    strategy: str
    update: Strategy
    seed: int
    cadence: int = 1  # blocks a span is replayed in: measure, count; the neural update comes at the span's end

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.model}--{self.strategy}--{self.seed}".replace("/", "_").replace(":", "_")


@dataclass(frozen=True)
class Settings:
    """What all cells of a replay share."""

    asked: Asked = Asked()
    tune: bool = False  # choose each update's knobs by the span before
    last_update: bool = True  # after the last span too, although nothing tests it


def check(model: ModelSpec, model_name: str, strategy: Strategy, strategy_name: str) -> None:
    """Raises IncompatibleError, with a sentence, where this strategy cannot update this model.

    OptionError where the model lacks what every model must have.
    """
    built = build_model(model, model_name)
    if strategy.needs == "counters" and isinstance(built, TrainedModel):
        raise IncompatibleError(
            f'"{strategy_name}" trains nothing, and "{model_name}" learns only by training: use frozen.'
        )
    if strategy.needs == "experts" and not isinstance(built, Blend):
        raise IncompatibleError(f'"{strategy_name}" joins experts, and "{model_name}" has none: use it with blend.')
    if strategy.needs not in ("counters", "experts") and not isinstance(built, TrainedModel):
        ways = "refit (or absorb, which trusts the best expert)" if isinstance(built, Blend) else "absorb"
        raise IncompatibleError(f'"{model_name}" counts, it is not trained: its only strategy is {ways}.')
    if strategy.needs == "encoding" and not isinstance(built, EncodingModel):
        raise IncompatibleError(
            f'"{strategy_name}" follows the scores of all items back to their vectors; "{model_name}" does not let it. '
            "Use a model with user and item vectors, such as sasrec or comirec-dr."
        )
    if strategy.needs == "interests" and not isinstance(built, InterestModel):
        raise IncompatibleError(
            f'"{strategy_name}" needs a model with several interests a user; "{model_name}" has one vector. '
            "Use mind, comirec-dr or comirec-sa."
        )


def check_clicks(model: ModelSpec, model_name: str) -> None:
    """Raises IncompatibleError, with a sentence, where the model cannot say how likely a click is."""
    if not isinstance(model.build(0), ClickModel):
        raise IncompatibleError(
            f'"{model_name}" ranks items, it does not say how likely one is taken: on a log with exposures use '
            "embedding-mlp, or leave the exposures out."
        )


def replay_cell(cell: Cell, cut: Cut, settings: Settings, out: Path, base: State | None = None) -> Iterator[int]:
    """Run or resume a cell; yields each span once its files are written. `base`: the base state, if already trained."""
    folder = out / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    state, before, asked = _resumed(cell, folder, cut, settings)
    for span in cut.spans[state.spans_seen :]:
        strategy = cell.update
        rows: list[pl.DataFrame] = []
        clock = Clock()
        costs: dict[str, float] = {}
        is_over = span.index == len(cut.spans) - 1 and not settings.last_update
        if state.spans_seen:
            state, new_rows, new_asked = _tested(state, _blocks(span, cut, cell.cadence), span, settings, clock)
            rows, asked = rows + new_rows, [*asked, *new_asked]
            if settings.tune and before is not None and not is_over:
                strategy, costs = _tuned(cell.update, before, cut.spans[span.index - 1], span, settings)
        else:
            since = time.process_time()
            state = replace(absorb(state, span.events, span.n_users, span.n_items), started=base)
            clock.timed("absorb_cpu_s", since)
        if is_over:
            _write(folder, span.index, rows, clock.costs)
            yield span.index
            break
        before = state if state.spans_seen and settings.tune else None
        state, update_costs = timed(partial(strategy.update, state, span))
        if span.index == 0 and base is not None:  # the base is trained once for all; what this strategy adds counts too
            added = update_costs["update_cpu_s"]
            update_costs = state.costs | base.costs
            update_costs["update_cpu_s"] += added
        update_costs["update_cpu_s"] += clock.costs["absorb_cpu_s"]
        state = replace(state, started=None)
        rows += _asked_again(state, asked, span.index, settings.asked.among)
        _write(folder, span.index, rows, clock.costs | costs | update_costs)
        save_tree((state, before), folder / "state.safetensors")  # one file, so that a kill never parts the two
        yield span.index
    save_text("{}", folder / "done.json")
    (folder / "state.safetensors").unlink(missing_ok=True)


def _resumed(
    cell: Cell, folder: Path, cut: Cut, settings: Settings
) -> tuple[State, State | None, list[tuple[int, Queries]]]:
    """Where to go on: state, the state before the last update, and queries to ask again."""
    saved = folder / "state.safetensors"
    if not saved.exists():
        return State(cell.spec.build(cell.seed), seed=cell.seed), None, []
    state, before = load_tree(saved)
    recent, asked = Histories.empty(), []
    for span in cut.spans[: state.spans_seen]:  # the queries are made of the log alone, so they need not be saved
        for block in _blocks(span, cut, cell.cadence) if span.index else []:
            if block.events.labels_E is None:
                queries = queries_of(recent, block, history_length(state.model), settings.asked)
                asked.append((span.index, _secret(queries)))
            recent = append(recent, block.events, span.n_users)
        recent = recent if span.index else append(recent, span.events, span.n_users)
    return state, before, asked


def _blocks(span: Span, cut: Cut, cadence: int) -> list[Block]:
    return blocks_of(span, cut.spans[span.index - 1].n_items, cadence)


def _secret(queries: Queries) -> Queries:
    return queries[queries.secret_N]


def _tested(
    state: State, blocks: list[Block], span: Span, settings: Settings, clock: Clock
) -> tuple[State, list[pl.DataFrame], list[tuple[int, Queries]]]:
    """Measure each block, then absorb it; the state that is ready for the update, ranks, and queries to ask again."""
    rows, asked = [], []
    for block in blocks:
        n_items = max(block.n_items, int(block.events.items_E.max()) if len(block.events) else 0)
        state = told(state, n_items)
        if block.events.labels_E is not None:
            rows.append(_named(click_rows(state, block, settings.asked), span.index, span.index - 1))
        else:
            queries = queries_of(state.recent, block, history_length(state.model), settings.asked)
            for readout in READOUTS if isinstance(state.model, InterestModel) else READOUTS[:1]:
                ranks_N = rank_queries(state, queries, readout, settings.asked.among)
                rows.append(_rows(queries, ranks_N, span.index, span.index - 1, readout))
            asked.append((span.index, _secret(queries)))
        since = time.process_time()
        state = absorb(state, block.events, span.n_users, n_items)
        clock.timed("absorb_cpu_s", since)
    return state, rows, asked


def _rows(queries: Queries, ranks_N: torch.Tensor, asked: int, after: int, readout: str = "recent") -> pl.DataFrame:
    columns = {"event": queries.events_N, "user": queries.users_N, "rank": ranks_N}
    return _named(pl.DataFrame({name: column.cpu().numpy() for name, column in columns.items()}), asked, after, readout)


def _named(rows: pl.DataFrame, asked: int, after: int, readout: str = "recent") -> pl.DataFrame:
    """`asked`: the span of the targets; `after`: the last span the model was updated on."""
    names = [
        pl.lit(asked, pl.Int32).alias("asked"),
        pl.lit(after, pl.Int32).alias("after"),
        pl.lit(readout).alias("readout"),
    ]
    return rows.select(*names, *rows.columns)


def _asked_again(state: State, asked: list[tuple[int, Queries]], span: int, among: int) -> list[pl.DataFrame]:
    """Ranks of earlier spans' secret queries under today's state: what has been forgotten since."""
    rows = []
    for past, queries in asked:
        rows.append(_rows(queries, rank_queries(state, queries, among=among), past, span))
    return rows


def _tuned(
    strategy: Strategy, before: State, last: Span, span: Span, settings: Settings
) -> tuple[Strategy, dict[str, float]]:
    """The alternative of `strategy` whose update on the last span would have been best on this span's VALID events."""
    alternatives = strategy.alternatives()
    if len(alternatives) < 2 or not bool((span.events.role_E == VALID).any()):
        return strategy, {}
    since, qualities = time.process_time(), []
    for alternative in alternatives:
        state = alternative.update(before, last)
        block = Block(span.events, 0, span.n_users, last.n_items)
        queries = queries_of(state.recent, block, history_length(state.model), Asked(VALID, settings.asked.min_history))
        ranks_N = rank_queries(state, queries)
        qualities.append(float(((ranks_N <= 20) / torch.log2(1 + ranks_N)).nan_to_num(0.0).mean()))
    best = max(range(len(qualities)), key=qualities.__getitem__)
    return alternatives[best], {"tune_cpu_s": time.process_time() - since, "tuned_to": float(best)}


def timed(update: Callable[[], State]) -> tuple[State, dict[str, float]]:
    """What an update gives and what it cost: wall and CPU seconds, peak memory of the process in MB, its own counts."""
    gc.collect()
    _forget_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    state = update()
    costs = {"update_s": time.perf_counter() - wall, "update_cpu_s": time.process_time() - cpu, "peak_mb": _peak_mb()}
    return state, state.costs | costs


def _forget_peak() -> None:
    """Start the process's peak memory anew, where the system can (Linux)."""
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mb() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return float(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _write(folder: Path, span: int, rows: list[pl.DataFrame], costs: dict[str, float]) -> None:
    if rows:
        write_whole(folder / f"span-{span}.parquet", pl.concat(rows).write_parquet)
    save_text(json.dumps(costs), folder / f"costs-{span}.json")
