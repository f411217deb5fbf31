"""The replay uses no future events, resumes exactly, and its slices add up.

The world is small: 200 users, 80 items and 4,000 events. The base block has half of them, and three spans the rest.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console

import freshrec
from freshrec.data.histories import append_events
from freshrec.data.log import Log
from freshrec.data.split import LogSplit, split_log
from freshrec.data.synthetic import make_world
from freshrec.errors import IncompatibleError, OptionError
from freshrec.models import find_model
from freshrec.models.absorb import absorb_block
from freshrec.models.popularity import PopularitySpec
from freshrec.replay.cell import Cell, ReplaySettings, replay_cell
from freshrec.replay.measure import QueryOptions, SpanBlock, make_queries
from freshrec.replay.progress import ProgressBoard
from freshrec.replay.results import OVERALL_SPAN, collect_results
from freshrec.replay.runner import run_cells
from freshrec.replay.slices import SLICES, slice_table
from freshrec.strategies import STRATEGIES, find_strategy
from freshrec.strategies.baselines import Absorb
from freshrec.strategies.compatible import check_compatible
from freshrec.types import DUE, NEVER, NEXT, NOW, TEST, TRAIN, Events, Histories, Span, State

METRICS = ("hr@20", "ndcg@20")
SPANS = 3
UNSTABLE_COSTS = ("_s", "_mb")  # suffixes of costs that are never the same twice


def world() -> Log:
    return make_world("drift", users=200, items=80, events=4000, spans=SPANS).log


def split_of(log: Log) -> LogSplit:
    return split_log(log, by="count", spans=SPANS, forget_users=0.2)


def cell_of(model: str, strategy: str) -> Cell:
    """Return a run of a small model that trains for one epoch at a time."""
    if strategy != "absorb":
        model += ":d=16:negatives=64"
        strategy += ":fit.base_epochs=1:fit.epochs=1"
    return Cell(model, find_model(model), strategy, find_strategy(strategy), 0)


CELLS = [
    cell_of(*names)
    for names in (("item-knn", "absorb"), ("sasrec", "finetune"), ("comirec-dr", "imsr"), ("comirec-dr", "full"))
]
ALWAYS_TESTED = {"sml", "asmg", "ader", "spmf"}  # they keep networks, models, exemplars or a reservoir between spans
OTHER_CELLS = [cell_of("comirec-dr", name) for name in STRATEGIES if name not in ("absorb", "refit", "imsr", "full")]


def name_of(cell: Cell) -> str:
    return cell.strategy_name.partition(":")[0]


each_cell = pytest.mark.parametrize("cell", CELLS, ids=name_of)
each_strategy = pytest.mark.parametrize(
    "cell",
    [
        *CELLS,
        *(pytest.param(cell, marks=[] if name_of(cell) in ALWAYS_TESTED else pytest.mark.slow) for cell in OTHER_CELLS),
    ],
    ids=name_of,
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Cell], Path]:
    """`uninterrupted(cell)`: the folder of an uninterrupted replay of the world. Tests only read it."""

    @cache
    def replay_once(cell: Cell) -> Path:
        out = tmp_path_factory.mktemp("whole")
        assert list(replay_cell(cell, split_of(world()), ReplaySettings(), out)) == [0, 1, 2, 3]
        return out

    return replay_once


def written(cell: Cell, out: Path) -> dict[str, Any]:
    """Return everything that a run has written, by file name, without times and memory sizes."""
    folder = out / cell.folder_name
    found: dict[str, Any] = {file.name: pl.read_parquet(file).rows() for file in folder.glob("*.parquet")}
    for file in folder.glob("*.json"):
        found[file.name] = {
            k: repr(v) for k, v in json.loads(file.read_text()).items() if not k.endswith(UNSTABLE_COSTS)
        }
    assert {path.name for path in folder.iterdir()} == found.keys()  # there are no other files
    return found


def ranks_of(cell: Cell, out: Path, span: int) -> pl.DataFrame:
    return pl.read_parquet(out / cell.folder_name / f"span-{span}.parquet")


@each_strategy
def test_events_after_a_span_change_no_rank_up_to_it(
    cell: Cell, uninterrupted: Callable[[Cell], Path], tmp_path: Path
) -> None:
    clean = world()
    n_known = sum(len(span.events) for span in split_of(clean).spans[:3])  # the base block and spans 1 and 2
    future = clean.frame[n_known:]
    shuffled = future.with_columns(future["user_id"].shuffle(1), future["item_id"].shuffle(2))  # the same counts
    garbage = split_of(replace(clean, frame=pl.concat([clean.frame[:n_known], shuffled])))
    list(replay_cell(cell, garbage, ReplaySettings(), tmp_path))
    same = [ranks_of(cell, uninterrupted(cell), t).equals(ranks_of(cell, tmp_path, t)) for t in (1, 2, 3)]
    assert same == [True, True, False]  # the garbage changes the replay, but only in span 3


@each_strategy
def test_a_run_interrupted_after_a_span_resumes_with_the_same_results(
    cell: Cell, uninterrupted: Callable[[Cell], Path], tmp_path: Path
) -> None:
    split = split_of(world())
    assert list(islice(replay_cell(cell, split, ReplaySettings(), tmp_path), 2)) == [0, 1]
    assert list(replay_cell(cell, split, ReplaySettings(), tmp_path)) == [2, 3]
    assert written(cell, tmp_path) == written(cell, uninterrupted(cell))


@each_cell
def test_an_interrupted_run_with_tuning_resumes_with_the_same_results(cell: Cell, tmp_path: Path) -> None:
    split, settings = split_of(world()), ReplaySettings(tune=True)
    running = replay_cell(cell, split, settings, tmp_path / "whole")
    assert list(islice(running, 3)) == [0, 1, 2]
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")  # the folder that a process killed here would leave
    assert list(running) == [3]
    assert list(replay_cell(cell, split, settings, tmp_path / "parts")) == [3]
    assert written(cell, tmp_path / "parts") == written(cell, tmp_path / "whole")


def kill_before(n_writes: int) -> Callable[[Path, Path], Path]:
    """Return a substitute for `Path.replace`, which ends every write. It works n times and then raises."""
    rename, allowed = Path.replace, iter(range(n_writes))

    def rename_or_die(self: Path, target: Path) -> Path:
        if next(allowed, None) is None:
            raise KeyboardInterrupt
        return rename(self, target)

    return rename_or_die


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 11])
def test_a_run_killed_between_two_writes_resumes_with_the_same_results(
    n: int, uninterrupted: Callable[[Cell], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Writes 0 and 1 are the costs and the state of the base block. Writes 2, 3 and 4 are the ranks, the costs and the
    # state of span 1. Write 11, after three spans, marks the end.
    cell, split = cell_of("popularity", "absorb"), split_of(world())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", kill_before(n))
        with pytest.raises(KeyboardInterrupt):
            list(replay_cell(cell, split, ReplaySettings(), tmp_path))
    list(replay_cell(cell, split, ReplaySettings(), tmp_path))
    assert written(cell, tmp_path) == written(cell, uninterrupted(cell))


def replay_into(out: str) -> None:
    """Replay one run. The next test kills the process that does this."""
    run_cells([CELLS[1]], split_of(world()), ReplaySettings(), Path(out), on_span_done=lambda cell, span: None)


@pytest.mark.slow
def test_a_process_killed_twice_resumes_with_the_same_results(tmp_path: Path) -> None:
    cell, split = CELLS[1], split_of(world())
    source_folders = [str(Path(freshrec.__file__).parents[1]), str(Path(__file__).parent)]
    command = [sys.executable, "-c", f"import test_replay; test_replay.replay_into({str(tmp_path / 'killed')!r})"]
    for file in ("costs-0.json", "costs-2.json"):
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(source_folders)})
        while not (tmp_path / "killed" / cell.folder_name / file).exists() and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -9  # it was still running
    for name in ("killed", "whole"):
        replay_into(str(tmp_path / name))
    results = [
        collect_results([cell], slice_table(split.spans), METRICS, tmp_path / name) for name in ("killed", "whole")
    ]
    killed, uninterrupted = (r.filter(~pl.col("metric").str.contains("_s$|_mb$")) for r in results)
    assert killed.equals(uninterrupted)


def test_a_folder_with_results_of_another_log_or_of_other_options_is_refused(tmp_path: Path) -> None:
    split, cell = split_of(world()), CELLS[0]
    run_cells([cell], split, ReplaySettings(), tmp_path, on_span_done=lambda cell, span: None)
    span = split.spans[-1]
    changed_span = replace(span, events=replace(span.events, times_E=span.events.times_E + 1))
    changes = (
        ([cell], replace(split, spans=(*split.spans[:-1], changed_span)), ReplaySettings()),
        ([replace(cell, cadence=2)], split, ReplaySettings()),
        ([replace(cell, strategy_instance=find_strategy("finetune:fit.epochs=7"))], split, ReplaySettings()),
    )
    for cells, spans, settings in changes:
        with pytest.raises(OptionError, match="holds results of another log"):
            run_cells(cells, spans, settings, tmp_path, on_span_done=lambda cell, span: None)


def test_the_slices_of_targets_by_hand() -> None:
    # User and item of each event, by span: 11 11 22 | 13 31 | 13 21 34. All events after the base block are targets.
    columns_of_spans = [([1, 1, 2], [1, 1, 2], 2, 2), ([1, 3], [3, 1], 3, 3), ([1, 2, 3], [3, 1, 4], 3, 4)]
    spans = []
    for t, (users, items, n_users, n_items) in enumerate(columns_of_spans):
        events = Events.trainable(torch.tensor(users), torch.tensor(items))
        spans.append(Span(t, replace(events, role_E=torch.full_like(events.role_E, TEST)), n_users, n_items))
    found = slice_table(tuple(spans))
    assert found.select("span", "event").rows() == [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    assert found.select("user", "item").rows() == [(1, 3), (3, 1), (1, 3), (2, 1), (3, 4)]
    assert found["known pair"].to_list() == [False, False, True, False, False]  # only user 1 returns to item 3
    assert found["unseen item"].to_list() == [True, False, False, False, True]
    assert found["new item"].to_list() == [False, False, True, False, False]  # new in the span before, base excluded
    assert found["old item"].to_list() == [False, True, False, True, False]
    assert found["new user"].to_list() == [False, True, False, False, False]
    # Item 1 alone has at least half of the events: two of three before span 1, and three of five before span 2.
    assert found["head"].to_list() == [False, True, False, True, False]


def test_a_log_with_only_a_base_block_has_no_targets_to_slice() -> None:
    events = Events.trainable(torch.tensor([1, 2]), torch.tensor([1, 1]))
    base = Span(0, replace(events, role_E=torch.full_like(events.role_E, TEST)), n_users=2, n_items=1)
    found = slice_table((base,))
    assert len(found) == 0 and found.columns == ["span", "event", "user", "item", *SLICES]


def test_slices_sum_to_the_whole(tmp_path: Path) -> None:
    cell, split = CELLS[0], split_of(world())
    list(
        replay_cell(cell, split, ReplaySettings(), tmp_path)
    )  # not a shared folder, because results are written into it
    results = collect_results([cell], slice_table(split.spans), METRICS, tmp_path).filter(pl.col("metric") == "hr@20")
    n = {(span, part): n for span, part, n in results.select("span", "slice", "n").iter_rows()}
    for span in (OVERALL_SPAN, 1, 2, 3):
        for family in (
            ("known pair", "new pair"),
            ("old item", "new item", "unseen item"),
            ("old user", "new user"),
            ("head", "tail"),
        ):
            assert set(family) <= SLICES.keys()
            assert sum(n.get((span, part), 0) for part in family) == n[span, "all"]


def test_only_held_out_events_are_measured_again_after_every_later_update(
    uninterrupted: Callable[[Cell], Path],
) -> None:
    cell, split = CELLS[1], split_of(world())
    rows = pl.concat(ranks_of(cell, uninterrupted(cell), t) for t in (1, 2, 3))
    for span in (1, 2, 3):
        events = {after: e.to_list() for (after,), e in _events_by_update(rows.filter(pl.col("asked") == span))}
        is_held_out_E = split.spans[span].events.train_at_E == NEVER
        held_out = [event for event in events[span - 1] if is_held_out_E[event]]
        assert 0 < len(held_out) < len(events[span - 1])
        assert all(events[after] == held_out for after in range(span, 4))


def _events_by_update(rows: pl.DataFrame) -> list[tuple[tuple[Any, ...], pl.Series]]:
    return [(key, group["event"]) for key, group in rows.group_by("after", maintain_order=True)]


@dataclass(frozen=True)
class Spy:
    """A strategy that absorbs, and records the times of the events that each update may train on."""

    times: list[list[int]] = field(default_factory=list)

    def update(self, state: State, span: Span) -> State:
        self.times.append(state.histories.times_R[state.histories.due_R == DUE].sort().values.tolist())
        return Absorb().update(state, span)


def test_an_update_trains_on_its_span_and_on_postponed_events_but_never_on_held_out_ones(tmp_path: Path) -> None:
    spy, split = Spy(), split_of(world())
    list(replay_cell(Cell("popularity", PopularitySpec(), "spy", spy, 0), split, ReplaySettings(), tmp_path))
    postponed: list[int] = []
    for span, times in zip(split.spans, spy.times):
        assert times == sorted(postponed + span.events.times_E[span.events.train_at_E == NOW].tolist())
        postponed = span.events.times_E[span.events.train_at_E == NEXT].tolist()
    assert any(bool((span.events.train_at_E == NEVER).any()) for span in split.spans)


def test_absorbing_counts_all_events_except_held_out_ones() -> None:
    span = split_of(world()).spans[1]
    state = absorb_block(State(PopularitySpec().build(0)), span.events, span.n_users, span.n_items)
    assert state.model.counts_I.sum() == (span.events.train_at_E != NEVER).sum() < len(span.events)
    assert len(state.histories.items_R) == len(span.events)  # the histories hold all events


@pytest.mark.parametrize("cell", CELLS[:2], ids=["item-knn", "sasrec"])
def test_a_finer_cadence_has_the_same_targets_and_in_its_first_block_the_same_ranks(
    cell: Cell, uninterrupted: Callable[[Cell], Path], tmp_path: Path
) -> None:
    split = split_of(world())
    list(islice(replay_cell(replace(cell, cadence=2), split, ReplaySettings(), tmp_path), 2))
    one_block, two_blocks = (
        ranks_of(cell, out, 1).filter(pl.col("after") == 0) for out in (uninterrupted(cell), tmp_path)
    )
    assert one_block.select("event", "user").equals(two_blocks.select("event", "user"))  # one row per target
    in_first_block = pl.col("event") < len(split.spans[1].events) // 2
    assert one_block.filter(in_first_block).equals(two_blocks.filter(in_first_block))
    if cell.strategy_name == "absorb":  # the model has counted the first block before the second one
        assert not one_block.filter(~in_first_block).equals(two_blocks.filter(~in_first_block))


def test_the_history_of_a_query_includes_earlier_events_of_its_own_block() -> None:
    # Before the block, user 1 has item 5. The block has (user-item) 1-6, 1-7, 2-8 and 1-9. All but 1-6 are targets.
    histories = append_events(Histories.empty(), Events.trainable(torch.tensor([1]), torch.tensor([5])), 1)
    events = Events.trainable(torch.tensor([1, 1, 2, 1]), torch.tensor([6, 7, 8, 9]))
    events = replace(events, role_E=torch.tensor([TRAIN, TEST, TEST, TEST], dtype=torch.int8))
    queries = make_queries(histories, SpanBlock(events, offset=10, n_users=2, n_items=5), 2)
    assert queries.items_N.tolist() == [7, 9]  # user 2 has no earlier event
    assert queries.histories_NT.tolist() == [[5, 6], [6, 7]]  # at most two
    assert queries.events_N.tolist() == [11, 13]
    no_minimum = make_queries(histories, SpanBlock(events, 10, 2, 5), 2, QueryOptions(min_history=0))
    assert no_minimum.histories_NT.tolist() == [[5, 6], [0, 0], [6, 7]]


@each_cell
def test_spans_with_no_event_or_a_single_one_cause_no_error(cell: Cell, tmp_path: Path) -> None:
    log = world()
    last = log.frame["time"].to_list()[-2:]
    # Span 1 has no events, and span 3 has only the last event.
    middle = log.frame["time"][2000]
    dates = [str(np.datetime64(t, "us")) for t in (middle - 1, middle, last[0] + 1)]
    split = split_log(log, by="dates", dates=dates, forget_users=0.2)
    assert [len(span.events) for span in split.spans] == [2000, 0, 1999, 1]
    for tune in (False, True):
        assert list(replay_cell(cell, split, ReplaySettings(tune=tune), tmp_path / str(tune))) == [0, 1, 2, 3]
        results = collect_results([cell], slice_table(split.spans), METRICS, tmp_path / str(tune))
        assert set(results.filter(pl.col("metric") == "hr@20")["span"]) >= {OVERALL_SPAN, 2}


@pytest.mark.parametrize(
    ("model", "strategy", "why"),
    [
        ("sasrec", "absorb", "needs training"),
        ("item-knn", "finetune", "Use strategy absorb."),
        ("sasrec", "imsr", "several interests"),
    ],
)
def test_a_model_that_a_strategy_cannot_update_is_refused(model: str, strategy: str, why: str) -> None:
    with pytest.raises(IncompatibleError, match=why):
        check_compatible(find_model(model), model, find_strategy(strategy), strategy)


def test_in_a_replay_the_detector_uses_only_items_that_the_model_knows() -> None:
    # Absorbing does not change a trained model. So the detector takes as known only the items that the model knows.
    split = split_of(world())
    base, span = split.spans[0], split.spans[1]
    state = absorb_block(State(CELLS[2].model_spec.build(0)), base.events, base.n_users, base.n_items)
    state = CELLS[2].strategy_instance.update(state, base)
    assert absorb_block(state, span.events, span.n_users, span.n_items).model.n_items == base.n_items
    assert span.n_items > base.n_items


def test_held_out_events_do_not_affect_stored_interests() -> None:
    split = split_of(world())
    base, span = split.spans[0], split.spans[1]
    cell = next(c for c in CELLS if c.model_name.startswith("comirec"))
    state = cell.strategy_instance.update(
        absorb_block(State(cell.model_spec.build(0)), base.events, base.n_users, base.n_items), base
    )
    changed_items_E = torch.where(span.events.train_at_E == NEVER, 1, span.events.items_E)
    assert not torch.equal(changed_items_E, span.events.items_E)

    def stored(events: Events) -> torch.Tensor:
        ready = absorb_block(state, events, span.n_users, span.n_items)
        users = cell.strategy_instance.update(ready, replace(span, events=events)).interests
        assert users is not None
        return users.vectors_SD

    assert torch.equal(stored(span.events), stored(replace(span.events, items_E=changed_items_E)))


def test_events_of_unseen_items_can_be_excluded_from_targets_and_histories() -> None:
    # Items 1..3 are known. User 1 has 2, 9, 3, 9, 1: the targets are 3 (after 2) and 1 (after 2, 3). User 2 has 9, 1:
    # the only event left has no history. Event numbers are positions in the span.
    events = Events.trainable(torch.tensor([1, 1, 1, 1, 1, 2, 2]), torch.tensor([2, 9, 3, 9, 1, 9, 1]))
    events = replace(events, role_E=torch.full_like(events.role_E, TEST))
    queries = make_queries(
        Histories.empty(), SpanBlock(events, offset=10, n_users=2, n_items=3), 4, QueryOptions(unseen="drop")
    )
    assert queries.items_N.tolist() == [3, 1] and queries.events_N.tolist() == [12, 14]
    assert [[item for item in row if item] for row in queries.histories_NT.tolist()] == [[2], [2, 3]]


def test_within_a_span_repeat_last_ranks_new_items_of_the_user_high_and_popularity_does_not(tmp_path: Path) -> None:
    split = split_of(world())
    new, users = split.spans[-1].n_items + 1, torch.tensor([1, 1, 1, 2])  # user 1 clicks it three times, then user 2
    events = Events.trainable(users, torch.full_like(users, new))
    events = replace(events, role_E=torch.full_like(events.role_E, TEST))
    last = Span(SPANS, events, split.spans[-1].n_users, new)
    for model, expected in (("repeat-last", [False, True, True, False]), ("popularity", [False] * 4)):
        cell, out = cell_of(model, "absorb"), tmp_path / model
        list(replay_cell(cell, replace(split, spans=(*split.spans[:-1], last)), ReplaySettings(), out))
        found = pl.read_parquet(out / cell.folder_name / f"span-{SPANS}.parquet").filter(pl.col("asked") == SPANS)
        assert (found["rank"] < new / 2).to_list() == expected


def test_the_last_span_can_be_measured_without_an_update_on_it(
    uninterrupted: Callable[[Cell], Path], tmp_path: Path
) -> None:
    cell, split = CELLS[1], split_of(world())
    assert list(replay_cell(cell, split, ReplaySettings(last_update=False), tmp_path)) == [0, 1, 2, 3]
    both = [ranks_of(cell, out, SPANS).filter(pl.col("after") == SPANS - 1) for out in (uninterrupted(cell), tmp_path)]
    assert both[0].equals(both[1]) and len(both[0])
    costs = json.loads((tmp_path / cell.folder_name / f"costs-{SPANS}.json").read_text())
    assert "update_cpu_s" not in costs


@pytest.mark.parametrize(
    ("model", "strategy", "sentence"),
    [
        ("sasrec", "absorb", '"absorb" trains nothing, and model "sasrec" needs training. Use strategy frozen.'),
        ("item-knn", "finetune", 'train model "item-knn", which is a counting model. Use strategy absorb.'),
        ("item-knn", "imsr", 'Strategy "imsr" cannot train model "item-knn", which is a counting model.'),
        ("blend", "finetune", "is a blend. Use strategy refit, or absorb, which uses the best expert alone."),
        (
            "mf",
            "refit",
            'Strategy "refit" updates only blends, and model "mf" is not a blend. '
            "Use strategy finetune, or model blend.",
        ),
        ("popularity", "refit", 'model "popularity" is not a blend. Use strategy absorb, or model blend.'),
        ("embedding-mlp", "ader", "a model that scores by user and item vectors. "),
        ("embedding-mlp", "ader", ' "embedding-mlp" does not.'),
        ("embedding-mlp", "ewc", "Use a model such as sasrec or comirec-dr."),
        ("sasrec", "imsr", '"imsr" needs a model with several interests per user, and "sasrec" has one vector.'),
    ],
)
def test_the_refusal_of_a_model_says_why_and_what_to_use(model: str, strategy: str, sentence: str) -> None:
    with pytest.raises(IncompatibleError) as refusal:
        check_compatible(find_model(model), model, find_strategy(strategy), strategy)
    assert sentence in str(refusal.value)


def test_a_replay_without_a_last_update_finishes_and_reports_every_span(tmp_path: Path) -> None:
    cell, reported = cell_of("sasrec", "finetune"), []
    board = ProgressBoard([cell], [1, 2, 3], tmp_path, Console(stderr=True), "hr@20")

    def report(done: Cell, span: int) -> None:
        board.report_span(done, span)
        reported.append(span)

    run_cells([cell], split_of(world()), ReplaySettings(last_update=False), tmp_path, on_span_done=report)
    assert reported == [0, 1, 2, 3] and (tmp_path / cell.folder_name / "done.json").exists()


def test_work_that_a_strategy_adds_to_a_shared_base_block_is_in_its_costs(tmp_path: Path) -> None:
    cell = Cell("mf:d=8", find_model("mf:d=8"), "self-tuned", find_strategy("self-tuned:fit.base_epochs=1"), 0)
    run_cells([cell], split_of(world()), ReplaySettings(), tmp_path, on_span_done=lambda cell, span: None)
    costs = json.loads((tmp_path / cell.folder_name / "costs-0.json").read_text())
    assert costs["rehearsal_cpu_s"] > 0 and costs["update_cpu_s"] > costs["rehearsal_cpu_s"]
    assert costs["lr_scale"] in (0.3, 1.0, 2.0)
