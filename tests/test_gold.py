"""Replays, nights and lists of tiny worlds, recorded in tests/gold, so that a refactor changes no result unseen.

Where a result is meant to change, record it again, look at the difference, and say why in the commit message:

    python tests/test_gold.py               # everything
    python tests/test_gold.py mf-sml        # one record or some

A record holds numbers, which must agree to 6 digits everywhere, and hashes of states (`recorded.state_hash`), which
must agree to the last bit where torch and the instructions of the processor are those of the record. Elsewhere only
the comparison of hashes is skipped. Names of classes, fields and files are not recorded, so a rename passes as it is.
"""

from __future__ import annotations

import gc
import json
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
from freshrec.data.spans import Cut, cut
from freshrec.data.worlds import make
from freshrec.models import COUNTERS, find_model
from freshrec.models.checkpoint import load_tree
from freshrec.replay.measure import Asked, facts
from freshrec.replay.replay import Cell, Settings, replay_cell
from freshrec.replay.results import OVERALL, collect
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
    "gru4rec-lanes-finetune": (f"gru4rec:steps=lanes{SMALL}", f"finetune{SHORT}"),
    "comirec-dr-imsr": (f"comirec-dr{SMALL}", f"imsr{SHORT}"),
    "comirec-sa-original-finetune": (f"comirec-sa-original{SMALL}", f"finetune{SHORT}"),
    "mimn-finetune": (f"mimn{SMALL}", f"finetune{SHORT}"),
    "limarec-finetune": (f"limarec{SMALL}", f"finetune{SHORT}"),
    "mf-sml": (f"mf{SMALL}", f"sml{SHORT}"),
    "mf-spmf": (f"mf{SMALL}", f"spmf{SHORT}"),
}
LABELLED = {
    "embedding-mlp-asmg": ("embedding-mlp:categories=2", f"asmg{SHORT}"),
    "embedding-mlp-incctr": ("embedding-mlp:categories=2", f"incctr{SHORT}"),
}
RANKED = ("hr@5", "hr@20", "ndcg@20")
TIMES = ("_s", "_mb")  # ends of the names of costs that differ from run to run


def newborn() -> Cut:
    """Users who gain interests, items that come and go, a category for each item."""
    log = make("newborn", users=100, items=80, events=2000, spans=SPANS).log
    return cut(log, by="count", spans=SPANS, forget_users=0.2)


def exposures() -> Cut:
    """Half of the rows are what a user took, half what it was shown: taken if it is of the user's colour."""
    frame = make("checkerboard", users=60, items=40, events=800, spans=SPANS).log.frame
    shown = frame.with_columns(item_id=pl.Series(np.random.default_rng(0).integers(0, 40, len(frame))))
    both = pl.concat([frame, shown]).sort("time", maintain_order=True)
    own = (pl.col("user_id") + pl.col("item_id")) % 2 == 0
    log = Log(both.with_columns(label=own.cast(pl.Float64), category=pl.col("item_id") % 2), True, "us")
    return cut(log, by="period", spans=SPANS, targets="all", forget_users=0)


def replayed(model: str, strategy: str) -> Record:
    """A replay of ranked lists."""
    spans = newborn()
    return _replayed(model, strategy, spans, Settings(), facts(spans.spans), RANKED)


def replayed_clicks(model: str, strategy: str) -> Record:
    """A replay of a log that says what was shown."""
    return _replayed(model, strategy, exposures(), Settings(asked=Asked(min_history=0)), None, ("auc", "logloss"))


def _replayed(
    model: str, strategy: str, spans: Cut, settings: Settings, slices: pl.DataFrame | None, metrics: tuple[str, ...]
) -> Record:
    cell = Cell(model, find_model(model), strategy, find_strategy(strategy), 0)
    with TemporaryDirectory() as folder:
        for _ in replay_cell(cell, spans, settings, Path(folder)):  # the state goes when the last span has been yielded
            state, _ = load_tree(Path(folder) / cell.name / "state.safetensors")
        results = collect([cell], slices, metrics, Path(folder), "users" if slices is not None else "targets")
    return Record(_table(results, model), {"final state": state_hash(state)})


def _table(results: pl.DataFrame, model: str) -> dict[str, Any]:
    """ "metric" or "metric, slice, readout" -> the value of each span that has one, and the mean over spans."""
    found: dict[str, Any] = {}
    for name, span, part, metric, value in results.select("model", "span", "slice", "metric", "value").iter_rows():
        if metric.endswith(TIMES) or (part != "all" and span != OVERALL):
            continue
        readout = name.removeprefix(model).removeprefix("@")
        row = ", ".join([metric, *[part] * (part != "all"), *[readout] * bool(readout)])
        found.setdefault(row, {})["mean" if span == OVERALL else f"span {span}"] = value
    return found


RECORDS: dict[str, Callable[[], Record]] = {f"{name}-absorb": partial(replayed, name, "absorb") for name in COUNTERS}
RECORDS |= {"blend-refit": partial(replayed, "blend", "refit:fit.max_epochs=2")}
RECORDS |= {name: partial(replayed, *way) for name, way in TRAINED.items()}
RECORDS |= {name: partial(replayed_clicks, *way) for name, way in LABELLED.items()}
RECORDS |= {
    "nights-blend": partial(nights, "blend", "refit:fit.max_epochs=2"),
    "nights-comirec-dr": partial(nights, "comirec-dr:d=8", f"imsr{SHORT}"),
}


def record(name: str) -> Record:
    """What is found today, by one thread: two may add up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # each update of a replay first collects garbage; searching all imported modules takes 0.4 s
    try:
        return RECORDS[name]()
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", RECORDS)
def test_what_was_recorded_is_found_again(name: str, subtests: pytest.Subtests) -> None:
    gold, found = json.loads((GOLD / f"{name}.json").read_text()), record(name)
    assert list(differences(gold["values"], rounded(found.values))) == []
    with subtests.test("hashes of states"):
        if gold["machine"] != cpu_instructions.machine():
            pytest.skip(f"hashes were recorded with {gold['machine']}; this is {cpu_instructions.machine()}")
        assert found.hashes == gold["hashes"]


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
