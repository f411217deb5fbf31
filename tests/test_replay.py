"""The replay does not see the future, resumes exactly, and adds up.

On a tiny world: 200 users, 80 items, 4,000 events, half of them the base block, then three spans.
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
TIMES = ("_s", "_mb")  # ends of the names of costs that differ from run to run


def world() -> Log:
    return make_world("drift", users=200, items=80, events=4000, spans=SPANS).log


def cut_of(log: Log) -> LogSplit:
    return split_log(log, by="count", spans=SPANS, forget_users=0.2)


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
QUICK = {"sml", "asmg", "ader", "spmf"}  # what keeps networks, models, exemplars or a reservoir between spans
OTHERS = [cell_of("comirec-dr", name) for name in STRATEGIES if name not in ("absorb", "refit", "imsr", "full")]


def name_of(cell: Cell) -> str:
    return cell.strategy_name.partition(":")[0]


each_cell = pytest.mark.parametrize("cell", CELLS, ids=name_of)
each_strategy = pytest.mark.parametrize(
    "cell",
    [*CELLS, *(pytest.param(cell, marks=[] if name_of(cell) in QUICK else pytest.mark.slow) for cell in OTHERS)],
    ids=name_of,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Cell], Path]:
    """`whole(cell)`: the folder of a replay of the world that did not stop. Tests only read it."""

    @cache
    def replayed(cell: Cell) -> Path:
        out = tmp_path_factory.mktemp("whole")
        assert list(replay_cell(cell, cut_of(world()), ReplaySettings(), out)) == [0, 1, 2, 3]
        return out

    return replayed


def written(cell: Cell, out: Path) -> dict[str, Any]:
    """All that a cell has written, by file name, without what a clock or the memory says."""
    folder = out / cell.folder_name
    found: dict[str, Any] = {file.name: pl.read_parquet(file).rows() for file in folder.glob("*.parquet")}
    for file in folder.glob("*.json"):
        found[file.name] = {k: repr(v) for k, v in json.loads(file.read_text()).items() if not k.endswith(TIMES)}
    assert {path.name for path in folder.iterdir()} == found.keys()  # nothing else is left behind
    return found


def ranks_of(cell: Cell, out: Path, span: int) -> pl.DataFrame:
    return pl.read_parquet(out / cell.folder_name / f"span-{span}.parquet")


@each_strategy
def test_what_comes_after_a_span_changes_no_rank_up_to_it(
    cell: Cell, whole: Callable[[Cell], Path], tmp_path: Path
) -> None:
    clean = world()
    n_known = sum(len(span.events) for span in cut_of(clean).spans[:3])  # the base and spans 1 and 2
    future = clean.frame[n_known:]
    shuffled = future.with_columns(future["user_id"].shuffle(1), future["item_id"].shuffle(2))  # the same counts
    garbage = cut_of(replace(clean, frame=pl.concat([clean.frame[:n_known], shuffled])))
    list(replay_cell(cell, garbage, ReplaySettings(), tmp_path))
    same = [ranks_of(cell, whole(cell), t).equals(ranks_of(cell, tmp_path, t)) for t in (1, 2, 3)]
    assert same == [True, True, False]  # the garbage did reach the replay, in span 3


@each_strategy
def test_a_cell_that_stops_after_a_span_resumes_as_if_it_had_not(
    cell: Cell, whole: Callable[[Cell], Path], tmp_path: Path
) -> None:
    parts = cut_of(world())
    assert list(islice(replay_cell(cell, parts, ReplaySettings(), tmp_path), 2)) == [0, 1]
    assert list(replay_cell(cell, parts, ReplaySettings(), tmp_path)) == [2, 3]
    assert written(cell, tmp_path) == written(cell, whole(cell))


@each_cell
def test_a_cell_that_is_tuned_resumes_as_if_it_had_not_stopped(cell: Cell, tmp_path: Path) -> None:
    parts, settings = cut_of(world()), ReplaySettings(tune=True)
    running = replay_cell(cell, parts, settings, tmp_path / "whole")
    assert list(islice(running, 3)) == [0, 1, 2]
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")  # the folder as a process leaves it that is killed here
    assert list(running) == [3]
    assert list(replay_cell(cell, parts, settings, tmp_path / "parts")) == [3]
    assert written(cell, tmp_path / "parts") == written(cell, tmp_path / "whole")


def kill_before(n_writes: int) -> Callable[[Path, Path], Path]:
    """What stands in for `Path.replace`, in which every write ends: the process dies before its n-th."""
    rename, left = Path.replace, iter(range(n_writes))

    def rename_or_die(self: Path, target: Path) -> Path:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return rename(self, target)

    return rename_or_die


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 11])
def test_a_cell_killed_between_any_two_writes_resumes_as_if_it_had_not(
    n: int, whole: Callable[[Cell], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the base writes costs 0 and state 1, span 1 ranks 2, costs 3, state 4; after three spans 11 marks the end
    cell, parts = cell_of("popularity", "absorb"), cut_of(world())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", kill_before(n))
        with pytest.raises(KeyboardInterrupt):
            list(replay_cell(cell, parts, ReplaySettings(), tmp_path))
    list(replay_cell(cell, parts, ReplaySettings(), tmp_path))
    assert written(cell, tmp_path) == written(cell, whole(cell))


def go(out: str) -> None:
    """What the process does that is killed below."""
    run_cells([CELLS[1]], cut_of(world()), ReplaySettings(), Path(out), on_span_done=lambda cell, span: None)


@pytest.mark.slow
def test_a_process_killed_twice_resumes_to_the_results_of_one_that_was_not(tmp_path: Path) -> None:
    cell, parts = CELLS[1], cut_of(world())
    places = [str(Path(freshrec.__file__).parents[1]), str(Path(__file__).parent)]
    command = [sys.executable, "-c", f"import test_replay; test_replay.go({str(tmp_path / 'killed')!r})"]
    for file in ("costs-0.json", "costs-2.json"):
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(places)})
        while not (tmp_path / "killed" / cell.folder_name / file).exists() and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -9  # it was still running
    for name in ("killed", "whole"):
        go(str(tmp_path / name))
    results = [
        collect_results([cell], slice_table(parts.spans), METRICS, tmp_path / name) for name in ("killed", "whole")
    ]
    killed, whole = (r.filter(~pl.col("metric").str.contains("_s$|_mb$")) for r in results)
    assert killed.equals(whole)


def test_a_folder_takes_no_results_of_another_log_or_of_other_options(tmp_path: Path) -> None:
    parts, cell = cut_of(world()), CELLS[0]
    run_cells([cell], parts, ReplaySettings(), tmp_path, on_span_done=lambda cell, span: None)
    span = parts.spans[-1]
    later = replace(span, events=replace(span.events, times_E=span.events.times_E + 1))
    others = (
        ([cell], replace(parts, spans=(*parts.spans[:-1], later)), ReplaySettings()),
        ([replace(cell, cadence=2)], parts, ReplaySettings()),
        ([replace(cell, strategy_instance=find_strategy("finetune:fit.epochs=7"))], parts, ReplaySettings()),
    )
    for cells, spans, settings in others:
        with pytest.raises(OptionError, match="holds results of another log"):
            run_cells(cells, spans, settings, tmp_path, on_span_done=lambda cell, span: None)


def test_facts_by_hand() -> None:
    # (user, item) by span, all of them targets after the base: 11 11 22 | 13 31 | 13 21 34
    cut = [([1, 1, 2], [1, 1, 2], 2, 2), ([1, 3], [3, 1], 3, 3), ([1, 2, 3], [3, 1, 4], 3, 4)]
    spans = []
    for t, (users, items, n_users, n_items) in enumerate(cut):
        events = Events.trainable(torch.tensor(users), torch.tensor(items))
        spans.append(Span(t, replace(events, role_E=torch.full_like(events.role_E, TEST)), n_users, n_items))
    found = slice_table(tuple(spans))
    assert found.select("span", "event").rows() == [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    assert found.select("user", "item").rows() == [(1, 3), (3, 1), (1, 3), (2, 1), (3, 4)]
    assert found["known pair"].to_list() == [False, False, True, False, False]  # only user 1 comes back to item 3
    assert found["unseen item"].to_list() == [True, False, False, False, True]
    assert found["new item"].to_list() == [False, False, True, False, False]  # of the span before; the base is old
    assert found["old item"].to_list() == [False, True, False, True, False]
    assert found["new user"].to_list() == [False, True, False, False, False]
    # before span 1 item 1 has two of three events, before span 2 three of five: half and more, alone
    assert found["head"].to_list() == [False, True, False, True, False]


def test_a_log_that_is_all_base_block_has_no_targets_to_slice() -> None:
    events = Events.trainable(torch.tensor([1, 2]), torch.tensor([1, 1]))
    base = Span(0, replace(events, role_E=torch.full_like(events.role_E, TEST)), n_users=2, n_items=1)
    found = slice_table((base,))
    assert len(found) == 0 and found.columns == ["span", "event", "user", "item", *SLICES]


def test_slices_sum_to_the_whole(tmp_path: Path) -> None:
    cell, parts = CELLS[0], cut_of(world())
    list(replay_cell(cell, parts, ReplaySettings(), tmp_path))  # a folder of its own: results are written into it
    results = collect_results([cell], slice_table(parts.spans), METRICS, tmp_path).filter(pl.col("metric") == "hr@20")
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


def test_only_secret_events_are_asked_again_after_every_later_update(whole: Callable[[Cell], Path]) -> None:
    cell, parts = CELLS[1], cut_of(world())
    rows = pl.concat(ranks_of(cell, whole(cell), t) for t in (1, 2, 3))
    for asked in (1, 2, 3):
        events = {after: e.to_list() for (after,), e in _events_by_update(rows.filter(pl.col("asked") == asked))}
        is_secret_E = parts.spans[asked].events.train_at_E == NEVER
        secret = [event for event in events[asked - 1] if is_secret_E[event]]
        assert 0 < len(secret) < len(events[asked - 1])
        assert all(events[after] == secret for after in range(asked, 4))


def _events_by_update(rows: pl.DataFrame) -> list[tuple[tuple[Any, ...], pl.Series]]:
    return [(key, group["event"]) for key, group in rows.group_by("after", maintain_order=True)]


@dataclass(frozen=True)
class Spy:
    """Absorbs, and notes at which times the events happened that each update may train on."""

    times: list[list[int]] = field(default_factory=list)

    def update(self, state: State, span: Span) -> State:
        self.times.append(state.histories.times_R[state.histories.due_R == DUE].sort().values.tolist())
        return Absorb().update(state, span)


def test_an_update_trains_on_its_span_and_on_what_the_last_one_held_back_but_never_on_secrets(tmp_path: Path) -> None:
    spy, parts = Spy(), cut_of(world())
    list(replay_cell(Cell("popularity", PopularitySpec(), "spy", spy, 0), parts, ReplaySettings(), tmp_path))
    held: list[int] = []
    for span, times in zip(parts.spans, spy.times):
        assert times == sorted(held + span.events.times_E[span.events.train_at_E == NOW].tolist())
        held = span.events.times_E[span.events.train_at_E == NEXT].tolist()
    assert any(bool((span.events.train_at_E == NEVER).any()) for span in parts.spans)


def test_what_is_absorbed_counts_all_events_but_the_secret_ones() -> None:
    span = cut_of(world()).spans[1]
    state = absorb_block(State(PopularitySpec().build(0)), span.events, span.n_users, span.n_items)
    assert state.model.counts_I.sum() == (span.events.train_at_E != NEVER).sum() < len(span.events)
    assert len(state.histories.items_R) == len(span.events)  # as history, the user's own, they are all there


@pytest.mark.parametrize("cell", CELLS[:2], ids=["item-knn", "sasrec"])
def test_a_finer_cadence_asks_the_same_targets_and_its_first_block_meets_the_same_base(
    cell: Cell, whole: Callable[[Cell], Path], tmp_path: Path
) -> None:
    parts = cut_of(world())
    list(islice(replay_cell(replace(cell, cadence=2), parts, ReplaySettings(), tmp_path), 2))
    one, two = (ranks_of(cell, out, 1).filter(pl.col("after") == 0) for out in (whole(cell), tmp_path))
    assert one.select("event", "user").equals(two.select("event", "user"))  # one row per target
    early = pl.col("event") < len(parts.spans[1].events) // 2
    assert one.filter(early).equals(two.filter(early))
    if cell.strategy_name == "absorb":  # the second block meets a model that has counted the first
        assert not one.filter(~early).equals(two.filter(~early))


def test_a_query_has_all_of_its_users_events_before_it_those_of_its_own_block_too() -> None:
    # before: user 1 has item 5; the block: 1-6 1-7 2-8 1-9, of which all but the first are targets
    recent = append_events(Histories.empty(), Events.trainable(torch.tensor([1]), torch.tensor([5])), 1)
    events = Events.trainable(torch.tensor([1, 1, 2, 1]), torch.tensor([6, 7, 8, 9]))
    events = replace(events, role_E=torch.tensor([TRAIN, TEST, TEST, TEST], dtype=torch.int8))
    queries = make_queries(recent, SpanBlock(events, offset=10, n_users=2, n_items=5), 2)
    assert queries.items_N.tolist() == [7, 9]  # user 2 has no event before
    assert queries.histories_NT.tolist() == [[5, 6], [6, 7]]  # at most two
    assert queries.events_N.tolist() == [11, 13]
    no_minimum = make_queries(recent, SpanBlock(events, 10, 2, 5), 2, QueryOptions(min_history=0))
    assert no_minimum.histories_NT.tolist() == [[5, 6], [0, 0], [6, 7]]


@each_cell
def test_spans_without_events_and_with_a_single_one_are_survived(cell: Cell, tmp_path: Path) -> None:
    log = world()
    last = log.frame["time"].to_list()[-2:]
    # span 1 ends before it begins to have events, span 3 holds the last event alone
    middle = log.frame["time"][2000]
    dates = [str(np.datetime64(t, "us")) for t in (middle - 1, middle, last[0] + 1)]
    parts = split_log(log, by="dates", dates=dates, forget_users=0.2)
    assert [len(span.events) for span in parts.spans] == [2000, 0, 1999, 1]
    for tune in (False, True):
        assert list(replay_cell(cell, parts, ReplaySettings(tune=tune), tmp_path / str(tune))) == [0, 1, 2, 3]
        results = collect_results([cell], slice_table(parts.spans), METRICS, tmp_path / str(tune))
        assert set(results.filter(pl.col("metric") == "hr@20")["span"]) >= {OVERALL_SPAN, 2}


@pytest.mark.parametrize(
    ("model", "strategy", "why"),
    [
        ("sasrec", "absorb", "needs training"),
        ("item-knn", "finetune", "Use strategy absorb."),
        ("sasrec", "imsr", "several interests"),
    ],
)
def test_a_strategy_refuses_a_model_it_cannot_update(model: str, strategy: str, why: str) -> None:
    with pytest.raises(IncompatibleError, match=why):
        check_compatible(find_model(model), model, find_strategy(strategy), strategy)


def test_the_detector_judges_known_items_only_when_it_runs_in_a_replay() -> None:
    # absorb leaves a trained model as it is, so what the detector takes for known is what the model has learnt
    parts = cut_of(world())
    base, span = parts.spans[0], parts.spans[1]
    state = absorb_block(State(CELLS[2].model_spec.build(0)), base.events, base.n_users, base.n_items)
    state = CELLS[2].strategy_instance.update(state, base)
    assert absorb_block(state, span.events, span.n_users, span.n_items).model.n_items == base.n_items
    assert span.n_items > base.n_items


def test_secret_events_leave_no_trace_in_stored_interests() -> None:
    parts = cut_of(world())
    base, span = parts.spans[0], parts.spans[1]
    cell = next(c for c in CELLS if c.model_name.startswith("comirec"))
    state = cell.strategy_instance.update(
        absorb_block(State(cell.model_spec.build(0)), base.events, base.n_users, base.n_items), base
    )
    other = torch.where(span.events.train_at_E == NEVER, 1, span.events.items_E)
    assert not torch.equal(other, span.events.items_E)

    def stored(events: Events) -> torch.Tensor:
        ready = absorb_block(state, events, span.n_users, span.n_items)
        users = cell.strategy_instance.update(ready, replace(span, events=events)).interests
        assert users is not None
        return users.vectors_SD

    assert torch.equal(stored(span.events), stored(replace(span.events, items_E=other)))


def test_events_of_unseen_items_can_be_left_out_of_the_test_as_if_they_were_not() -> None:
    # items 1..3 are known; user 1 meets 2, 9, 3, 9, 1: asked are 3 (after 2) and 1 (after 2, 3); user 2 meets 9, 1:
    # what is left is one event, with nothing before it. Places are those in the span.
    events = Events.trainable(torch.tensor([1, 1, 1, 1, 1, 2, 2]), torch.tensor([2, 9, 3, 9, 1, 9, 1]))
    events = replace(events, role_E=torch.full_like(events.role_E, TEST))
    queries = make_queries(
        Histories.empty(), SpanBlock(events, offset=10, n_users=2, n_items=3), 4, QueryOptions(unseen="drop")
    )
    assert queries.items_N.tolist() == [3, 1] and queries.events_N.tolist() == [12, 14]
    assert [[item for item in row if item] for row in queries.histories_NT.tolist()] == [[2], [2, 3]]


def test_within_a_span_a_user_is_offered_an_own_new_item_again_before_anybody_counted_it(tmp_path: Path) -> None:
    parts = cut_of(world())
    new, users = parts.spans[-1].n_items + 1, torch.tensor([1, 1, 1, 2])  # user 1 takes it three times, then user 2
    events = Events.trainable(users, torch.full_like(users, new))
    events = replace(events, role_E=torch.full_like(events.role_E, TEST))
    last = Span(SPANS, events, parts.spans[-1].n_users, new)
    for model, expected in (("repeat-last", [False, True, True, False]), ("popularity", [False] * 4)):
        cell, out = cell_of(model, "absorb"), tmp_path / model
        list(replay_cell(cell, replace(parts, spans=(*parts.spans[:-1], last)), ReplaySettings(), out))
        found = pl.read_parquet(out / cell.folder_name / f"span-{SPANS}.parquet").filter(pl.col("asked") == SPANS)
        assert (found["rank"] < new / 2).to_list() == expected


def test_the_last_span_can_be_tested_without_being_learnt(whole: Callable[[Cell], Path], tmp_path: Path) -> None:
    cell, parts = CELLS[1], cut_of(world())
    assert list(replay_cell(cell, parts, ReplaySettings(last_update=False), tmp_path)) == [0, 1, 2, 3]
    both = [ranks_of(cell, out, SPANS).filter(pl.col("after") == SPANS - 1) for out in (whole(cell), tmp_path)]
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
            'Strategy "refit" updates blends, and model "mf" is none. Use strategy finetune, or model blend.',
        ),
        ("popularity", "refit", 'model "popularity" is none. Use strategy absorb, or model blend.'),
        ("embedding-mlp", "ader", "a model that scores by user and item vectors. "),
        ("embedding-mlp", "ader", ' "embedding-mlp" does not.'),
        ("embedding-mlp", "ewc", "Use a model such as sasrec or comirec-dr."),
        ("sasrec", "imsr", '"imsr" needs a model with several interests per user, and "sasrec" has one vector.'),
    ],
)
def test_a_strategy_refuses_a_model_that_it_cannot_update_with_a_sentence(
    model: str, strategy: str, sentence: str
) -> None:
    with pytest.raises(IncompatibleError) as refusal:
        check_compatible(find_model(model), model, find_strategy(strategy), strategy)
    assert sentence in str(refusal.value)


def test_a_replay_without_a_last_update_ends_and_tells_of_every_span(tmp_path: Path) -> None:
    cell, told = cell_of("sasrec", "finetune"), []
    board = ProgressBoard([cell], [1, 2, 3], tmp_path, Console(stderr=True), "hr@20")

    def tell(one: Cell, span: int) -> None:
        board.report_span(one, span)
        told.append(span)

    run_cells([cell], cut_of(world()), ReplaySettings(last_update=False), tmp_path, on_span_done=tell)
    assert told == [0, 1, 2, 3] and (tmp_path / cell.folder_name / "done.json").exists()


def test_what_a_strategy_adds_to_a_shared_base_block_is_in_its_costs(tmp_path: Path) -> None:
    cell = Cell("mf:d=8", find_model("mf:d=8"), "self-tuned", find_strategy("self-tuned:fit.base_epochs=1"), 0)
    run_cells([cell], cut_of(world()), ReplaySettings(), tmp_path, on_span_done=lambda cell, span: None)
    costs = json.loads((tmp_path / cell.folder_name / "costs-0.json").read_text())
    assert costs["rehearsal_cpu_s"] > 0 and costs["update_cpu_s"] > costs["rehearsal_cpu_s"]
    assert costs["lr_scale"] in (0.3, 1.0, 2.0)
