"""A custom strategy is one class with one method. It works in a replay, in a recommender and in a store."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from freshrec.cli.app import main
from freshrec.data.split import split_log
from freshrec.data.synthetic import make_world
from freshrec.errors import IncompatibleError, OptionError, StateError
from freshrec.learn.fit import FitConfig
from freshrec.learn.weights import copy_weights
from freshrec.models import MODELS, find_model
from freshrec.models.absorb import absorb_block
from freshrec.recommender.recommender import Recommender
from freshrec.replay.cell import Cell, ReplaySettings, replay_cell
from freshrec.replay.plan import count_tuning_targets, training_passes
from freshrec.replay.runner import run_cells
from freshrec.replay.tuning import alternatives
from freshrec.store.checkpoint import load_tree, save_tree
from freshrec.strategies import ALIASES, STRATEGIES, find_strategy
from freshrec.strategies.baselines import Absorb, FineTune
from freshrec.strategies.compatible import REQUIREMENTS, check_compatible
from freshrec.types import Span, State
from freshrec.user_modules import IMPORTS

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
SOURCE = '''
from dataclasses import dataclass, replace

from freshrec.learn.fit import FitConfig
from freshrec.strategies.baselines import Absorb, FineTune
from freshrec.strategies.refit import Refit


class Counting:
    def update(self, state, span):
        return Absorb().update(state, span)


class Blending:
    def update(self, state, span):
        return Refit(trains="never").update(state, span)


@dataclass(frozen=True)
class Training:
    epochs: int = 1

    def update(self, state, span):
        return FineTune(FitConfig(epochs=self.epochs, base_epochs=1)).update(state, span)


class Demanding:
    def __init__(self, size):
        self.size = size

    def update(self, state, span):
        return Absorb().update(state, span)


class Broken:
    def update(self, state, span):
        return state.model.no_such_thing


class Nothing:
    def update(self, state, span):
        pass


class Same:
    def update(self, state, span):
        return state


class Ungrown:
    def update(self, state, span):
        return replace(state, spans_seen=state.spans_seen + 1)


class Other:
    """No strategy."""


INSTANCE = Training(epochs=3)
DEMANDING = Demanding(3)
'''


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Write modules with custom strategies into the current folder, and unload them after the test."""
    (tmp_path / "own_strategies.py").write_text(SOURCE)
    (tmp_path / "my_strategy.py").write_text((EXAMPLES / "my_strategy.py").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    importlib.invalidate_caches()
    yield
    for module in ("own_strategies", "my_strategy"):
        sys.modules.pop(module, None)
    for strategy in [kind for kind in REQUIREMENTS if kind.__module__ == "my_strategy"]:
        del REQUIREMENTS[strategy]


def world() -> pl.DataFrame:
    """Return 1,200 events of 60 users and 40 items."""
    return make_world("drift", users=60, items=40, events=1200).log.frame.select("user_id", "item_id", "time")


def cell(model: str, strategy: str) -> Cell:
    return Cell(model, find_model(model), strategy, find_strategy(strategy), 0)


PAIRS = [
    ("item-knn", "own_strategies:Counting", "absorb"),
    ("blend", "own_strategies:Blending", "refit:trains=never"),
    ("mf:d=4", "own_strategies:Training", "finetune:fit.epochs=1:fit.base_epochs=1"),
]


@pytest.mark.parametrize(("model", "custom", "built_in"), PAIRS)
def test_a_custom_strategy_that_calls_a_built_in_one_gives_the_same_ranks_in_a_replay(
    model: str, custom: str, built_in: str, tmp_path: Path
) -> None:
    log = make_world("drift", users=60, items=40, events=1200).log
    cells = [cell(model, custom), cell(model, built_in)]
    for _ in range(2):  # the second time, it finds its own results and accepts them
        run_cells(
            cells,
            split_log(log, by="count", spans=2),
            ReplaySettings(),
            tmp_path / "out",
            on_span_done=lambda cell, span: None,
        )
        cells = [cell(model, custom), cell(model, built_in)]
    found = [pl.read_parquet(tmp_path / "out" / c.folder_name / "span-2.parquet") for c in cells]
    assert len(found[0]) and found[0].equals(found[1])


@pytest.mark.parametrize(("model", "custom", "built_in"), PAIRS)
def test_a_custom_strategy_that_calls_a_built_in_one_gives_the_same_lists_in_a_store(
    model: str,
    custom: str,
    built_in: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(IMPORTS, "own_strategies")
    frame, store = world(), str(tmp_path / "store")
    frame[:1000].write_parquet("base.parquet")
    frame[1000:].write_parquet("day.parquet")
    assert main(["fit", "base.parquet", "--store", store, "--model", model, "--strategy", custom]) == 0
    sys.modules.pop("own_strategies")  # as if in another process
    capsys.readouterr()
    assert main(["update", "day.parquet", "--store", store, "--json"]) == 0
    [version] = json.loads(capsys.readouterr().out)
    assert version["recipe"]["strategy"] == custom
    lists = Recommender.load(store).recommend([1, 2, 3], 5)
    # the same log with the built-in strategy, in another store
    assert main(["fit", "base.parquet", "--store", "ours", "--model", model, "--strategy", built_in]) == 0
    assert main(["update", "day.parquet", "--store", "ours"]) == 0
    assert lists.equals(Recommender.load("ours").recommend([1, 2, 3], 5))


def test_loading_a_store_imports_no_custom_module(tmp_path: Path) -> None:
    Recommender("item-knn", find_strategy("own_strategies:Counting")).fit(world()).save(tmp_path / "at")
    sys.modules.pop("own_strategies")
    with pytest.raises(StateError, match="own_strategies, which is not imported.*add --allow-import own_strategies"):
        Recommender.load(tmp_path / "at")
    assert "own_strategies" not in sys.modules


def test_a_class_an_instance_and_both_forms_of_names_are_accepted() -> None:
    assert find_strategy("own_strategies:Training:epochs=4").epochs == 4  # type: ignore[attr-defined]
    assert find_strategy("own_strategies.Training:epochs=4").epochs == 4  # type: ignore[attr-defined]
    assert find_strategy("own_strategies:Training").epochs == 1  # type: ignore[attr-defined]
    assert find_strategy("own_strategies:INSTANCE").epochs == 3  # type: ignore[attr-defined]
    counting = type(find_strategy("own_strategies:Counting"))
    assert counting.__name__ == "Counting"
    recommender = Recommender("item-knn", counting)  # type: ignore[arg-type]
    assert isinstance(recommender._bundle.strategy, counting)
    assert find_model("freshrec.models.mf:MFSpec:d=4") == find_model("mf:d=4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("own_strategies:Other", r'"own_strategies:Other" has no method update\(state, span\). Add it'),
        ("own_strategies:FitConfig", r"has no method update\(state, span\)"),
        ("own_strategies:Demanding", "is a class that needs arguments. Give them defaults, or name an instance"),
        ("own_strategies:Missing", 'cannot import "Missing" from "own_strategies"'),
        ("no_such_module:Thing", 'cannot import "Thing" from "no_such_module"'),
        ("own_strategies:Counting:epochs=3", "no options"),
        ("own_strategies:Training:epochs", '"epochs" in .* is not an option'),
        ("finetune:epochs", '"epochs" in .* is not an option. Write finetune:field=value'),
        ("fintune:fit.epochs=3", 'Did you mean "finetune"'),
    ],
)
def test_a_name_that_is_no_strategy_is_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        find_strategy(text)


def test_a_strategy_without_a_method_update_is_refused_by_the_recommender() -> None:
    not_a_strategy: Any = FitConfig()
    with pytest.raises(OptionError, match=r"FitConfig.* has no method update\(state, span\)"):
        Recommender("mf", not_a_strategy)


def test_a_custom_strategy_may_update_any_model_and_its_errors_are_not_hidden() -> None:
    broken = find_strategy("own_strategies:Broken")
    for name, spec in MODELS.items():
        check_compatible(spec, name, broken, "own_strategies:Broken")
    with pytest.raises(AttributeError, match="no_such_thing"):
        Recommender("item-knn", broken).fit(world())


@pytest.mark.parametrize(
    ("custom", "message"),
    [
        ("Nothing", r'update\(state, span\) of strategy "Nothing" returned None. It must return the next State'),
        ("Same", '"Same" returned a state with spans_seen=0. It must be 1, one more than before'),
        (
            "Ungrown",
            '"Ungrown" returned a model with 0 users and 0 items, but the span has [0-9]+ and [0-9]+. Grow the model',
        ),
    ],
)
def test_an_update_that_returns_no_next_state_is_refused_in_a_recommender_and_a_replay(
    custom: str, message: str, tmp_path: Path
) -> None:
    # A trained model has no users and no items before its first update.
    with pytest.raises(OptionError, match=message):
        Recommender("mf:d=4", find_strategy(f"own_strategies:{custom}")).fit(world())
    parts = split_log(make_world("drift", users=60, items=40, events=1200).log, by="count", spans=1, min_events=1)
    with pytest.raises(OptionError, match=message):
        list(replay_cell(cell("mf:d=4", f"own_strategies:{custom}"), parts, ReplaySettings(), tmp_path))


def test_a_custom_strategy_may_declare_which_models_it_accepts() -> None:
    example = find_strategy("my_strategy:MyStrategy")
    check_compatible(MODELS["mf"], "mf", example, "mine")
    for name in ("item-knn", "blend"):
        with pytest.raises(IncompatibleError, match=f'Strategy "mine" cannot train model "{name}"'):
            check_compatible(MODELS[name], name, example, "mine")


def test_an_object_with_attributes_must_be_a_dataclass_to_be_saved(tmp_path: Path) -> None:
    counting, demanding = (find_strategy(f"own_strategies:{name}") for name in ("Counting", "DEMANDING"))
    save_tree(counting, tmp_path / "counting")
    assert type(load_tree(tmp_path / "counting")) is type(counting)
    with pytest.raises(StateError, match=r"The Demanding at state cannot be saved\. Make it a dataclass"):
        save_tree(demanding, tmp_path / "demanding")


def test_a_custom_strategy_has_nothing_to_tune_and_is_planned_like_fine_tuning() -> None:
    # 100 events in the base block with 10 epochs; spans of 10 and 20 events with 5 epochs by default
    counting, example = find_strategy("own_strategies:Counting"), find_strategy("my_strategy:MyStrategy:fit.epochs=2")
    assert alternatives(counting) == (counting,) and count_tuning_targets(counting, [100, 10, 20]) == 0
    assert training_passes(counting, [100, 10, 20], 10) == [1000, 50, 100]
    assert training_passes(example, [100, 10, 20], 10) == [1000, 20, 40]  # from its field `fit`
    assert training_passes(Absorb(), [100, 10, 20], 10) == [0, 0, 0]
    assert cell("mf", "own_strategies:Training").shared_fit is None  # its work on a base block is unknown
    assert cell("mf", "finetune:fit.epochs=2").shared_fit == FitConfig(epochs=2)


def test_strategies_that_are_tuned_have_six_alternatives_and_the_strategy_itself_comes_first() -> None:
    # refit and self-tuned tune themselves, absorb and frozen train nothing, and full trains as on the base block
    found = {name: alternatives(strategy) for name, strategy in STRATEGIES.items()}
    assert {name for name, choices in found.items() if len(choices) == 1} == {
        "absorb", "refit", "frozen", "full", "self-tuned",
    }  # fmt: skip
    assert {len(choices) for choices in found.values()} == {1, 6}
    assert all(choices[0] == STRATEGIES[name] for name, choices in found.items())


@pytest.mark.filterwarnings("ignore:strategy rehearsed is now called")  # a former name, not a paper's
def test_names_of_papers_are_aliases() -> None:
    assert ALIASES == {"joint": "full", "dropout": "finetune", "asmg-gru-multi": "asmg", "rehearsed": "self-tuned"}
    assert not ALIASES.keys() & STRATEGIES.keys()
    for alias, name in ALIASES.items():
        assert find_strategy(f"{alias}:fit.epochs=2") == find_strategy(f"{name}:fit.epochs=2")


def test_aliases_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "strategies", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert lines["joint"] == "Another name of full." and lines.keys() == STRATEGIES.keys() | ALIASES.keys()


@pytest.mark.parametrize("model", ["pooled:d=4", "comirec-dr:d=4:k=2", "embedding-mlp:d=4"])
def test_the_example_updates_models_with_scalars_interests_and_several_tables(model: str) -> None:
    # The model pooled has a weight without dimensions. keep = 0 is fine-tuning.
    parts = split_log(make_world("newborn", users=60, items=40, events=1500).log, by="count", spans=1, forget_users=0)
    fit = ":fit.epochs=1:fit.base_epochs=1"
    after = []
    for strategy in (find_strategy(f"my_strategy:MyStrategy:keep=0{fit}"), find_strategy(f"finetune{fit}")):
        state = State(find_model(model).build(0))
        for span in parts.spans:
            state = strategy.update(absorbed(state, span), span)
        after.append(copy_weights(state.model))
    assert after[0].keys() == after[1].keys() and len(after[0])
    assert all(torch.equal(weight, after[1][name]) for name, weight in after[0].items())


def test_the_example_is_the_mean_of_the_weights_before_and_after_fine_tuning() -> None:
    # keep = 0.25: the rows of known users and items are a quarter of the previous weights plus three quarters of the
    # fine-tuned ones. The rows of new users and items are the fine-tuned ones.
    parts = split_log(make_world("newborn", users=60, items=40, events=1500).log, by="count", spans=1, forget_users=0)
    base, span = parts.spans
    fit = ":fit.epochs=1:fit.base_epochs=1"
    example, finetune = find_strategy(f"my_strategy:MyStrategy:keep=0.25{fit}"), find_strategy(f"finetune{fit}")
    before = example.update(absorbed(State(find_model("mf:d=4").build(0)), base), base)
    ready = absorbed(before, span)
    old, mixed, tuned = (
        copy_weights(s.model) for s in (before, example.update(ready, span), finetune.update(ready, span))
    )
    n = len(old["items"])
    assert len(tuned["items"]) > n and not torch.equal(tuned["items"][:n], old["items"])
    torch.testing.assert_close(mixed["items"][:n], 0.25 * old["items"] + 0.75 * tuned["items"][:n])
    assert torch.equal(mixed["items"][n:], tuned["items"][n:])
    assert isinstance(finetune, FineTune)


def absorbed(state: State, span: Span) -> State:
    return absorb_block(state, span.events, span.n_users, span.n_items)
