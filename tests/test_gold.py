"""Replays, updates and lists of tiny worlds, recorded in tests/gold. A refactoring must not change them.

If a result is meant to change, record it again, check the difference, and give the reason in the commit message:

    python tests/test_gold.py               # everything
    python tests/test_gold.py mf-sml        # some records

A record holds numbers, which must agree to 6 digits, and hashes of states (`recorded.state_hash`), which must agree to
the last bit. Hit rates and counts change only if a score crosses the edge of a list, so every machine compares them.
Scores after training and hashes are compared only with the torch and processor instructions of the record. With
`cpu_instructions`, every x86-64 processor of the last ten years qualifies. Records do not contain names of classes,
fields or files, so a rename changes no record.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cpu_instructions
import numpy as np
import polars as pl
import pytest
import torch
from gold_store import nights
from recorded import Record, differences, rounded, state_hash, write

from freshrec.data.log import Log
from freshrec.data.split import LogSplit, split_log
from freshrec.data.split_config import HELDOUT_RULES, SPLIT_RULES, TARGET_RULES
from freshrec.data.synthetic import WORLDS, make_world
from freshrec.models import COUNTING_MODELS, find_model
from freshrec.replay.cell import Cell, ReplaySettings, replay_cell
from freshrec.replay.measure import QueryOptions
from freshrec.replay.results import OVERALL_SPAN, collect_results
from freshrec.replay.slices import slice_table
from freshrec.store.checkpoint import load_tree
from freshrec.strategies import find_strategy

GOLD = Path(__file__).parent / "gold"
SPANS = 3
SMALL = ":d=16:negatives=64"
SHORT = ":fit.base_epochs=2:fit.epochs=1"
TRAINED = {  # name -> model, strategy
    "sasrec-finetune": (f"sasrec{SMALL}", f"finetune{SHORT}"),
    "sasrec-full": (f"sasrec{SMALL}", f"full{SHORT}"),
    "sasrec-ader": (f"sasrec{SMALL}", f"ader{SHORT}"),
    "sasrec-ewc": (f"sasrec{SMALL}", f"ewc{SHORT}"),
    "gru4rec-lanes-finetune": (f"gru4rec:steps=session-parallel{SMALL}", f"finetune{SHORT}"),
    "sasrec-self-tuned": (f"sasrec{SMALL}", f"self-tuned{SHORT}"),
    "gru4rec-windows-finetune": (f"gru4rec:loss=xe:logq=1:embeddings=separate{SMALL}", f"finetune{SHORT}"),
    "comirec-dr-imsr": (f"comirec-dr{SMALL}", f"imsr{SHORT}"),
    "comirec-dr-imsr-kd2": (f"comirec-dr:categories=3{SMALL}", f"imsr-kd2{SHORT}"),
    "comirec-dr-ader-s": (f"comirec-dr{SMALL}", f"ader-s{SHORT}"),
    "comirec-sa-batch-3": (f"comirec-sa{SMALL}", f"batch-3{SHORT}"),
    "mind-finetune-span": (f"mind{SMALL}", f"finetune-span{SHORT}"),
    "mf-sml": (f"mf{SMALL}", f"sml{SHORT}"),
    "mf-sml-mlp": (f"mf{SMALL}", f"sml-mlp{SHORT}"),
    "mf-spmf": (f"mf{SMALL}", f"spmf{SHORT}"),
    "mf-asmg-linear": (f"mf{SMALL}", f"asmg-linear{SHORT}"),
}
OTHERS = ("comirec-dr-original", "comirec-sa-original", "mind-original", "mimn", "limarec", "pooled", "stamp", "stmp",
          "caser", "mf-biased")  # fmt: skip
TRAINED |= {f"{model}-finetune": (f"{model}{SMALL}", f"finetune{SHORT}") for model in OTHERS}
LABELLED = {
    "embedding-mlp-asmg": ("embedding-mlp:categories=2", f"asmg{SHORT}"),
    "embedding-mlp-incctr": ("embedding-mlp:categories=2", f"incctr{SHORT}"),
}
RANKED = ("hr@5", "hr@20", "ndcg@20")
TRAINED_ROWS = ("auc", "logloss", "kl_")  # unlike ranks, these change with every bit
UNSTEADY = ("sml",)  # its network transforms weights, so differences in the last bits grow until they change hits
TIMES = ("_s", "_mb")  # endings of the names of costs that differ between runs


def newborn() -> LogSplit:
    """Users who gain interests, items that come and go, a category for each item."""
    log = make_world("newborn", users=100, items=80, events=2000, spans=SPANS).log
    return split_log(log, by="count", spans=SPANS, forget_users=0.2)


def exposures() -> LogSplit:
    """Half of the rows are events of users, half random exposures. The label says if item and user have one colour."""
    frame = make_world("checkerboard", users=60, items=40, events=800, spans=SPANS).log.frame
    shown = frame.with_columns(item_id=pl.Series(np.random.default_rng(0).integers(0, 40, len(frame))))
    both = pl.concat([frame, shown]).sort("time", maintain_order=True)
    own = (pl.col("user_id") + pl.col("item_id")) % 2 == 0
    log = Log(both.with_columns(label=own.cast(pl.Float64), category=pl.col("item_id") % 2), True, "us")
    return split_log(log, by="period", spans=SPANS, targets="all", forget_users=0)


def replayed(model: str, strategy: str, settings: ReplaySettings = ReplaySettings(), cadence: int = 1) -> Record:  # noqa: B008
    """A replay of ranked lists."""
    spans = newborn()
    found = _replayed(model, strategy, spans, settings, slice_table(spans.spans), RANKED, cadence)
    return Record({}, found.values | found.trained, found.hashes) if strategy.startswith(UNSTEADY) else found


def replayed_clicks(model: str, strategy: str) -> Record:
    """A replay of a log with exposures."""
    return _replayed(
        model,
        strategy,
        exposures(),
        ReplaySettings(query_options=QueryOptions(min_history=0)),
        None,
        ("auc", "logloss"),
    )


def _replayed(
    model: str,
    strategy: str,
    spans: LogSplit,
    settings: ReplaySettings,
    slices: pl.DataFrame | None,
    metrics: tuple[str, ...],
    cadence: int = 1,
) -> Record:
    cell = Cell(model, find_model(model), strategy, find_strategy(strategy), 0, cadence)
    with TemporaryDirectory() as folder:
        for _ in replay_cell(cell, spans, settings, Path(folder)):  # the state file is deleted after the last span
            state, _ = load_tree(Path(folder) / cell.folder_name / "state.safetensors")
        results = collect_results([cell], slices, metrics, Path(folder), "users" if slices is not None else "targets")
    table = _table(results, model)
    trained = {row: table.pop(row) for row in list(table) if row.startswith(TRAINED_ROWS)}
    return Record(table, trained, {"final state": state_hash(state)})


def _table(results: pl.DataFrame, model: str) -> dict[str, Any]:
    """ "metric" or "metric, slice, readout" -> the value of each span that has one, and the mean over spans."""
    found: dict[str, Any] = {}
    for name, span, part, metric, value in results.select("model", "span", "slice", "metric", "value").iter_rows():
        if metric.endswith(TIMES) or (part != "all" and span != OVERALL_SPAN):
            continue
        readout = name.removeprefix(model).removeprefix("@")
        row = ", ".join([metric, *[part] * (part != "all"), *[readout] * bool(readout)])
        found.setdefault(row, {})["mean" if span == OVERALL_SPAN else f"span {span}"] = value
    return found


def worlds() -> Record:
    """Every world, and every rule for splitting one."""
    log = make_world("drift", users=60, items=40, events=800, spans=SPANS).log
    ways: dict[str, dict[str, Any]] = {rule: {"by": rule} for rule in SPLIT_RULES if rule != "dates"}
    ways["dates"] = {"by": "dates", "dates": ["2025-01-04", "2025-01-05T12:00:00"]}
    ways |= {targets: {"by": "count", "targets": targets} for targets in TARGET_RULES if targets != "split"}
    ways |= {heldout: {"by": "count", "heldout": heldout} for heldout in HELDOUT_RULES}
    ways["sessions"] = {"by": "count", "sessions": True, "min_events": 3, "n_targets": 9, "seed": 1}
    cuts = {name: split_log(log, **({"spans": SPANS, "forget_users": 0.2} | way)) for name, way in ways.items()}
    logs = {name: make_world(name, users=60, items=40, events=800, spans=SPANS).log for name in WORLDS}
    hashes = {f"world {name}": state_hash(one.frame) for name, one in logs.items()}
    hashes |= {
        f"cut {name}": state_hash(one.spans, one.user_catalog.frame, one.item_catalog.frame)
        for name, one in cuts.items()
    }
    sizes = {name: [len(span.events) for span in one.spans] for name, one in cuts.items()}
    return Record({"events of spans": sizes}, {}, hashes)


RECORDS: dict[str, Callable[[], Record]] = {
    f"{name}-absorb": partial(replayed, name, "absorb") for name in COUNTING_MODELS
}
RECORDS |= {"blend-refit": partial(replayed, "blend", "refit:fit.max_epochs=2")}
RECORDS |= {name: partial(replayed, *way) for name, way in TRAINED.items()}
RECORDS |= {name: partial(replayed_clicks, *way) for name, way in LABELLED.items()}
SAMPLED = ReplaySettings(query_options=QueryOptions(min_history=2, n_sampled=20, unseen="drop"), last_update=False)
RECORDS |= {
    "worlds": worlds,
    "markov-absorb-in-blocks": partial(replayed, "markov", "absorb", SAMPLED, 4),
    "mf-finetune-tuned": partial(replayed, f"mf{SMALL}", f"finetune{SHORT}", ReplaySettings(tune=True)),
    "nights-item-knn": partial(nights, "item-knn", "absorb", trains=False),
    "nights-blend": partial(nights, "blend", "refit:fit.max_epochs=2"),
    "nights-comirec-dr": partial(nights, "comirec-dr:d=8", f"imsr{SHORT}"),
}


def record(name: str) -> Record:
    """The record of the current code. Uses one thread and no oneDNN, because both change the order of sums."""
    threads, onednn = torch.get_num_threads(), torch.backends.mkldnn.enabled
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False
    try:
        return RECORDS[name]()
    finally:
        torch.backends.mkldnn.enabled = onednn
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", RECORDS)
def test_results_are_the_recorded_ones(name: str, subtests: pytest.Subtests) -> None:
    gold, found = json.loads((GOLD / f"{name}.json").read_text()), record(name)
    assert list(differences(gold["values"], rounded(found.values))) == []
    with subtests.test("to the last bit"):
        if gold["machine"] != cpu_instructions.machine():
            pytest.skip(f"hashes and scores were recorded with {gold['machine']}; this is {cpu_instructions.machine()}")
        assert list(differences(gold["trained"], rounded(found.trained))) == []
        assert found.hashes == gold["hashes"]


def test_instructions_are_chosen_before_torch_is_imported() -> None:
    if os.environ["ATEN_CPU_CAPABILITY"] != "avx2":
        pytest.skip("other instructions were chosen in the environment")
    assert torch.backends.cpu.get_cpu_capability() in ("AVX2", "DEFAULT")  # DEFAULT: the processor has no AVX2


def test_a_hash_of_a_state_does_not_depend_on_names_or_order_but_on_every_bit() -> None:
    ones, zeros = torch.ones(2, 3), torch.zeros(2)
    whole = state_hash({"a": ones, "b": (zeros, 7, None)})
    assert state_hash([7, zeros], {"renamed": ones}) == whole
    for other in (ones.double(), ones.view(3, 2), ones.view(-1), torch.nextafter(ones, 2 * ones)):
        assert state_hash({"a": other, "b": (zeros, 7)}) != whole
    assert state_hash({"a": ones, "b": (zeros, 7.5)}) != whole


if __name__ == "__main__":
    for name in sys.argv[1:] or RECORDS:
        write(record(name), GOLD / f"{name}.json")
