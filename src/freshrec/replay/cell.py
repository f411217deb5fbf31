"""The replay of one run. For each span: test the previous model, absorb the events, update. It resumes exactly.

A `Cell` describes a run: one model with one strategy, seed and cadence. The folder of a run holds a Parquet file of
ranks and a JSON file of costs for each span. Until the run is done, it also holds the state after the last finished
span.
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

from freshrec.data.histories import append_events
from freshrec.data.split import LogSplit
from freshrec.errors import IncompatibleError
from freshrec.files import write_atomically, write_text_atomically
from freshrec.learn.fit import CostMeter, FitConfig
from freshrec.models import find_model
from freshrec.models.absorb import absorb_block, grow_items
from freshrec.nn.ranking import READOUTS
from freshrec.nn.scoring import history_length
from freshrec.replay.measure import (
    Queries,
    QueryOptions,
    SpanBlock,
    make_queries,
    predict_clicks,
    rank_queries,
    split_into_blocks,
)
from freshrec.replay.recipe_schema import ReplayRecipe
from freshrec.replay.tuning import tune
from freshrec.store.checkpoint import load_tree, save_tree
from freshrec.strategies import find_strategy
from freshrec.strategies.ader import ADER
from freshrec.strategies.ader_s import ADERS
from freshrec.strategies.asmg import ASMG
from freshrec.strategies.baselines import FineTune, Frozen, Retrain
from freshrec.strategies.compatible import next_state
from freshrec.strategies.ewc import EWC
from freshrec.strategies.imsr import IMSR
from freshrec.strategies.incctr import IncCTR
from freshrec.strategies.self_tuned import SelfTuned
from freshrec.strategies.sml import SML
from freshrec.strategies.spmf import SPMF
from freshrec.types import ClickModel, Histories, InterestModel, ModelSpec, Span, State, Strategy

# `learn.fit.fit_base_block` alone trains their base block, so runs with the same options can share it.
SHARING = Frozen | FineTune | Retrain | ADER | ADERS | ASMG | EWC | IMSR | IncCTR | SelfTuned | SML | SPMF


@dataclass(frozen=True)
class Cell:
    """One run: a model, a strategy, a seed and a cadence."""

    model_name: str
    model_spec: ModelSpec
    strategy_name: str
    strategy_instance: Strategy
    seed: int
    cadence: int = 1  # blocks per span; the model is tested on each block, then absorbs it; training ends the span

    def __post_init__(self) -> None:  # a class becomes an instance
        if isinstance(self.model_spec, type):
            object.__setattr__(self, "model_spec", find_model(self.model_spec))
        if isinstance(self.strategy_instance, type):
            object.__setattr__(self, "strategy_instance", find_strategy(self.strategy_instance))

    @property
    def folder_name(self) -> str:
        """Name of the folder with the results of the run."""
        return f"{self.model_name}--{self.strategy_name}--{self.seed}".replace("/", "_").replace(":", "_")

    @property
    def shared_fit(self) -> FitConfig | None:
        """Training options of the base block, if other runs may share it; None = this run trains its own."""
        return self.strategy_instance.fit if isinstance(self.strategy_instance, SHARING) else None

    @property
    def base_options(self) -> tuple[float, ...]:
        """The options that a shared base block depends on, besides model and seed; () if it is not shared."""
        fit = self.shared_fit
        return (fit.base_epochs, fit.max_epochs, fit.patience, fit.holdout) if fit else ()

    @property
    def base_key(self) -> tuple[str, int, tuple[float, ...]] | None:
        """Key that is equal for runs that share a base block; None = this run trains its own."""
        return (self.model_name, self.seed, self.base_options) if self.shared_fit else None


@dataclass(frozen=True)
class ReplaySettings:
    """The settings that all runs of a replay share."""

    query_options: QueryOptions = QueryOptions()
    tune: bool = ReplayRecipe.tune  # choose the options of each update on the previous span
    last_update: bool = ReplayRecipe.last_update  # update after the last span too, although nothing tests it


def check_click_model(model: ModelSpec, model_name: str) -> None:
    """Raise IncompatibleError if the model cannot predict click probabilities."""
    if not isinstance(model.build(0), ClickModel):
        raise IncompatibleError(
            f'Model "{model_name}" ranks items and does not predict clicks. '
            "On a log with exposures, use embedding-mlp, or leave the exposures out."
        )


def replay_cell(
    cell: Cell, split: LogSplit, settings: ReplaySettings, out: Path, base: State | None = None
) -> Iterator[int]:
    """Start or resume a run. Yield the number of each span after its files are written.

    `base`: the state after the base block, if another run has trained it.
    """
    folder = out / cell.folder_name
    folder.mkdir(parents=True, exist_ok=True)
    state, previous_state, earlier_queries = _resume_cell(cell, folder, split, settings)
    for span in split.spans[state.spans_seen :]:
        strategy = cell.strategy_instance
        rows: list[pl.DataFrame] = []
        meter = CostMeter()
        costs: dict[str, float] = {}
        skips_update = span.index == len(split.spans) - 1 and not settings.last_update
        if state.spans_seen:
            blocks = _blocks_of_span(span, split, cell.cadence)
            state, new_rows, new_queries = _test_then_absorb(state, blocks, span, settings, meter)
            rows, earlier_queries = rows + new_rows, [*earlier_queries, *new_queries]
            if settings.tune and previous_state is not None and not skips_update:
                last, min_history = split.spans[span.index - 1], settings.query_options.min_history
                strategy, costs = tune(cell.strategy_instance, previous_state, last, span, min_history)
        else:
            started_s = time.process_time()
            state = replace(absorb_block(state, span.events, span.n_users, span.n_items), shared_base=base)
            meter.add_time("absorb_cpu_s", started_s)
        if skips_update:
            _write_span(folder, span.index, rows, meter.costs)
            yield span.index
            break
        previous_state = state if state.spans_seen and settings.tune else None
        state, update_costs = measure_cost(partial(next_state, strategy, state, span))
        if span.index == 0 and base is not None:  # the cost of the shared base, and what this strategy adds to it
            added = update_costs["update_cpu_s"]
            update_costs = state.costs | base.costs
            update_costs["update_cpu_s"] += added
        update_costs["update_cpu_s"] += meter.costs["absorb_cpu_s"]
        state = replace(state, shared_base=None)
        rows += _rank_earlier_queries(state, earlier_queries, span.index, settings.query_options.n_sampled)
        _write_span(folder, span.index, rows, meter.costs | costs | update_costs)
        save_tree((state, previous_state), folder / "state.safetensors")  # one file: a kill cannot separate the two
        yield span.index
    write_text_atomically("{}", folder / "done.json")
    (folder / "state.safetensors").unlink(missing_ok=True)


def _resume_cell(
    cell: Cell, folder: Path, split: LogSplit, settings: ReplaySettings
) -> tuple[State, State | None, list[tuple[int, Queries]]]:
    """Load the state, the state before the last update, and the earlier queries to rank again."""
    path = folder / "state.safetensors"
    if not path.exists():
        return State(cell.model_spec.build(cell.seed), seed=cell.seed), None, []
    state, previous_state = load_tree(path)
    recent, earlier_queries = Histories.empty(), []
    for span in split.spans[: state.spans_seen]:  # queries depend on the log alone, so they are not saved
        for block in _blocks_of_span(span, split, cell.cadence) if span.index else []:
            if block.events.labels_E is None:
                queries = make_queries(recent, block, history_length(state.model), settings.query_options)
                earlier_queries.append((span.index, _heldout_queries(queries)))
            recent = append_events(recent, block.events, span.n_users)
        recent = recent if span.index else append_events(recent, span.events, span.n_users)
    return state, previous_state, earlier_queries


def _blocks_of_span(span: Span, split: LogSplit, cadence: int) -> list[SpanBlock]:
    return split_into_blocks(span, split.spans[span.index - 1].n_items, cadence)


def _heldout_queries(queries: Queries) -> Queries:
    return queries[queries.heldout_N]


def _test_then_absorb(
    state: State, blocks: list[SpanBlock], span: Span, settings: ReplaySettings, meter: CostMeter
) -> tuple[State, list[pl.DataFrame], list[tuple[int, Queries]]]:
    """Test the model on each block, then absorb it. Return the state, the ranks and the held-out queries."""
    rows, heldout_queries = [], []
    for block in blocks:
        n_items = max(block.n_items, int(block.events.items_E.max()) if len(block.events) else 0)
        state = grow_items(state, n_items)
        if block.events.labels_E is not None:
            rows.append(_label_rows(predict_clicks(state, block, settings.query_options), span.index, span.index - 1))
        else:
            queries = make_queries(state.histories, block, history_length(state.model), settings.query_options)
            for readout in READOUTS if isinstance(state.model, InterestModel) else READOUTS[:1]:
                ranks_N = rank_queries(state, queries, readout, settings.query_options.n_sampled)
                rows.append(_rank_rows(queries, ranks_N, span.index, span.index - 1, readout))
            heldout_queries.append((span.index, _heldout_queries(queries)))
        started_s = time.process_time()
        state = absorb_block(state, block.events, span.n_users, n_items)
        meter.add_time("absorb_cpu_s", started_s)
    return state, rows, heldout_queries


def _rank_rows(
    queries: Queries, ranks_N: torch.Tensor, target_span: int, after: int, readout: str = "recent"
) -> pl.DataFrame:
    columns = {"event": queries.events_N, "user": queries.users_N, "rank": ranks_N}
    rows = pl.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
    return _label_rows(rows, target_span, after, readout)


def _label_rows(rows: pl.DataFrame, target_span: int, after: int, readout: str = "recent") -> pl.DataFrame:
    """Add three columns: `asked` (span of the targets), `after` (last span of the model's updates) and `readout`."""
    names = [
        pl.lit(target_span, pl.Int32).alias("asked"),
        pl.lit(after, pl.Int32).alias("after"),
        pl.lit(readout).alias("readout"),
    ]
    return rows.select(*names, *rows.columns)


def _rank_earlier_queries(
    state: State, earlier_queries: list[tuple[int, Queries]], span: int, n_sampled: int
) -> list[pl.DataFrame]:
    """Rank the held-out queries of earlier spans with the current state, to measure forgetting."""
    rows = []
    for target_span, queries in earlier_queries:
        rows.append(_rank_rows(queries, rank_queries(state, queries, n_sampled=n_sampled), target_span, span))
    return rows


def measure_cost(update: Callable[[], State]) -> tuple[State, dict[str, float]]:
    """Run an update. Return its state and its costs: wall seconds, CPU-s, peak memory in MB, and its own counters."""
    gc.collect()
    _reset_peak_memory()
    wall, cpu = time.perf_counter(), time.process_time()
    state = update()
    costs = {
        "update_s": time.perf_counter() - wall,
        "update_cpu_s": time.process_time() - cpu,
        "peak_mb": _peak_memory_mb(),
    }
    return state, state.costs | costs


def _reset_peak_memory() -> None:
    """Reset the peak memory of the process, if the system supports it (Linux)."""
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory_mb() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return float(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _write_span(folder: Path, span: int, rows: list[pl.DataFrame], costs: dict[str, float]) -> None:
    if rows:
        write_atomically(folder / f"span-{span}.parquet", pl.concat(rows).write_parquet)
    write_text_atomically(json.dumps(costs), folder / f"costs-{span}.json")
