"""`Recommender.replay`, progress in Python, and how objects print themselves."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from serving import days

from freshrec import Recommender, SplitConfig, make_world, read_log
from freshrec.cli.app import main
from freshrec.config import name_of
from freshrec.errors import IncompatibleError, OptionError
from freshrec.models import MODELS, find_model
from freshrec.models.sasrec import SASRecSpec
from freshrec.progress import Progress
from freshrec.store.versions import open_store
from freshrec.strategies import STRATEGIES, find_strategy
from freshrec.strategies.baselines import FineTune, Frozen

FAST = "fit.base_epochs=1:fit.epochs=1"
SPLIT = SplitConfig(spans=2)
METRICS = ("ndcg@5", "hr@5")


@pytest.fixture(scope="module")
def log() -> pl.DataFrame:
    frame = make_world("drift", users=40, items=30, events=900).log.frame
    return frame.select("user_id", "item_id", timestamp="time")


def methods(answer: Any) -> set[tuple[str, str]]:
    return {row.method for row in answer.summaries}


def test_the_answer_is_that_of_the_command(
    log: pl.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recommender = Recommender("sasrec:d=8", f"finetune:{FAST}")
    answer = recommender.replay(
        log, models=["item-knn"], strategies=[f"frozen:{FAST}"], controls=["popularity"], split=SPLIT, metrics=METRICS
    )
    log.write_parquet(tmp_path / "log.parquet")
    options = {
        "--models": "sasrec:d=8",
        "--strategies": f"frozen:{FAST},finetune:{FAST}",
        "--extra-pairs": "item-knn/absorb",
        "--controls": "popularity",
        "--spans": "2",
        "--metrics": ",".join(METRICS),
        "--out": str(tmp_path / "out"),
    }
    words = [word for option in options.items() for word in option]
    assert main(["replay", str(tmp_path / "log.parquet"), *words, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)["summary"]
    expected = {(row["model"], row["strategy"]): row["value"] for row in summary if row["metric"] == "ndcg@5"}
    assert {row.method: row.value for row in answer.summaries} == pytest.approx(expected)
    assert answer.metric == "ndcg@5" and answer.best.value == max(expected.values())
    frame = answer.frame()
    assert frame["value"].to_list() == sorted(expected.values(), reverse=True)
    assert frame.row(by_predicate=pl.col("strategy") == f"finetune:{FAST}", named=True)["gain"] is None  # the reference
    assert repr(answer).startswith("Answer(ndcg@5: ") and "0x" not in repr(answer)


def test_a_replay_neither_changes_the_recommender_nor_depends_on_what_it_has_learned(log: pl.DataFrame) -> None:
    renamed = log.rename({"user_id": "customer"})
    recommender, n_threads = (
        Recommender("item-knn").fit(renamed, columns={"user_id": "customer"}),
        torch.get_num_threads(),
    )
    before = recommender.recommend([1, 2], k=5)
    answer = recommender.replay(renamed, split=SPLIT, metrics="hr@5")  # read with the options of fit
    assert recommender.recommend([1, 2], k=5).equals(before) and torch.get_num_threads() == n_threads
    other = Recommender("item-knn").replay(read_log(log), split=SPLIT, metrics="hr@5")
    assert [row.value for row in answer.summaries] == [row.value for row in other.summaries]
    assert methods(answer) == {("item-knn", "absorb")}


@pytest.mark.parametrize(
    ("model", "strategy", "options", "expected"),
    [
        # a counting model has one way of updating
        ("markov", None, {}, {("markov", "absorb")}),
        ("item-knn", None, {"models": ["markov"]}, {("item-knn", "absorb"), ("markov", "absorb")}),
        # classes and instances have the names that would make them
        (
            SASRecSpec(d=8),
            FineTune(fit=replace(FineTune().fit, epochs=1, base_epochs=1)),
            {"strategies": [Frozen(fit=replace(Frozen().fit, base_epochs=1))]},
            {("sasrec:d=8", "finetune:fit.epochs=1:fit.base_epochs=1"), ("sasrec:d=8", "frozen:fit.base_epochs=1")},
        ),
    ],
)
def test_the_own_method_is_compared_with_the_alternatives(
    model: Any, strategy: Any, options: dict[str, Any], expected: set[tuple[str, str]], log: pl.DataFrame
) -> None:
    answer = Recommender(model, strategy).replay(log, split=SPLIT, metrics="hr@5", **options)
    sort = {tuple(":".join(sorted(name.split(":"))) for name in method) for method in methods(answer)}
    assert sort == {tuple(":".join(sorted(name.split(":"))) for name in method) for method in expected}


def test_what_cannot_be_replayed_is_refused(log: pl.DataFrame) -> None:
    recommender = Recommender("item-knn")
    for options, error, message in (
        ({"strategies": ["imsr"]}, IncompatibleError, 'Strategy "imsr" cannot train model "item-knn"'),
        ({"strategies": ["fintune"]}, OptionError, 'Did you mean "finetune"'),
        ({"models": ["item-kn"]}, OptionError, 'Did you mean "item-knn"'),
        ({"metrics": "hr"}, OptionError, "hr"),
        ({"progress": "yes"}, OptionError, "progress is 'yes'. Pass True, False, or a function"),
        ({"seeds": 0}, OptionError, "seeds is 0"),
    ):
        with pytest.raises(error, match=message):
            recommender.replay(log, split=SPLIT, **options)  # type: ignore[arg-type]


def test_a_kept_folder_continues(log: pl.DataFrame, tmp_path: Path) -> None:
    heard: list[Progress] = []
    options: dict[str, Any] = {"split": SPLIT, "metrics": "hr@5", "out": tmp_path / "out", "progress": heard.append}
    first = Recommender("item-knn").replay(log, **options)
    # the base block and two spans of one run
    assert [(p.stage, p.step, p.n_steps) for p in heard] == [("replaying", n, 3) for n in (1, 2, 3)]
    second = Recommender("item-knn").replay(log, **options, models=["markov"])
    assert len(heard) == 6 and all("markov" in p.detail for p in heard[3:])
    assert second.summary(("item-knn", "absorb")) == first.best


def test_progress_is_shown_or_passed_to_a_function(capsys: pytest.CaptureFixture[str]) -> None:
    base, day, _ = days()
    heard: list[Progress] = []
    recommender = Recommender("sasrec:d=8", f"finetune:{FAST}").fit(base, progress=heard.append)
    assert [p.stage for p in heard] == ["learning", "training"] and heard[0].detail == "1,500 events"
    recommender.update(day, progress=heard.append)
    assert [p.stage for p in heard[2:]] == ["learning", "training"]
    assert capsys.readouterr().err == ""
    Recommender("item-knn").fit(base, progress=True)
    assert "learning: 1,500 events" in capsys.readouterr().err
    with pytest.raises(OptionError, match="progress is 1. Pass True, False, or a function"):
        Recommender("item-knn").fit(base, progress=1)  # type: ignore[arg-type]


def test_a_recommender_prints_model_strategy_sizes_and_newest_event(log: pl.DataFrame) -> None:
    rows = {"user_id": ["a", "a", "b"], "item_id": ["x", "y", "x"]}
    assert repr(Recommender("item-knn")) == 'Recommender("item-knn", "absorb", no events)'
    timed = pl.DataFrame(rows | {"timestamp": ["2026-01-01", "2026-01-02", "2026-01-03T12:00:00"]})
    assert repr(Recommender("item-knn").fit(timed)) == (
        'Recommender("item-knn", "absorb", 2 users, 2 items, newest event 2026-01-03T12:00:00)'
    )
    without_times = Recommender("item-knn").fit(pl.DataFrame(rows | {"period": [0, 0, 1]}))
    assert repr(without_times) == 'Recommender("item-knn", "absorb", 2 users, 2 items)'


def test_no_public_object_prints_an_address(log: pl.DataFrame, tmp_path: Path) -> None:
    recommender = Recommender("item-knn").fit(log)
    recommender.save(tmp_path / "s")
    store = open_store(tmp_path / "s")
    printed = [recommender, recommender.bundle, store, store.manifest(1), read_log(log), *STRATEGIES.values()]
    for spec in MODELS.values():
        model = spec.build(0)
        model.grow(2, 3)
        printed += [spec, model]
    assert [text for text in map(repr, printed) if " at 0x" in text] == []


@pytest.mark.parametrize(
    "name", ["sasrec", "comirec-dr-k1", "imsr-no-eir", "sml-5x5", "er-loss", "batch-7", "asmg-linear"]
)
def test_an_instance_has_the_name_that_makes_it(name: str) -> None:
    table: Any = MODELS if name in MODELS else STRATEGIES
    find: Any = find_model if name in MODELS else find_strategy
    assert name_of(table[name], table) == name
    option = "lr=0.5" if name in MODELS else "fit.epochs=7"
    changed = find(f"{name}:{option}")
    assert find(name_of(changed, table)) == changed and option in name_of(changed, table)
