"""Models and strategies of the user's own modules: what may be imported, and what may be named."""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from serving import days, server

from freshrec import Recommender, SplitConfig, make_world, split_log
from freshrec.cli.app import main
from freshrec.cli.server import erase_in_subprocess
from freshrec.errors import OptionError, StateError
from freshrec.learn.fit import FitConfig
from freshrec.models import MODELS, find_model
from freshrec.models.sasrec import SASRec, SASRecSpec
from freshrec.replay.cell import Cell
from freshrec.store.checkpoint import load_tree
from freshrec.strategies.baselines import FineTune, Frozen, Retrain

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"
OWN_STRATEGY = """
from dataclasses import dataclass, replace
from freshrec.strategies.baselines import Absorb

@dataclass(frozen=True)
class Own:
    def update(self, state, span):
        return Absorb().update(state, span)
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the modules shop_model and shop_strategy, and a store in `s` that needs both."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copy(EXAMPLES / "my_model.py", folder / "shop_model.py")
    (folder / "shop_strategy.py").write_text(OWN_STRATEGY)
    base, day, _ = days()
    base.write_parquet(folder / "base.parquet")
    day.write_parquet(folder / "day.parquet")
    names = ["--model", "shop_model:MyModelSpec", "--strategy", "shop_strategy:Own"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        assert main(["fit", "base.parquet", "--store", "s", *names]) == 0
    return folder


@pytest.fixture
def shop(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of that folder, which is the current one. Its modules are not imported, as in a new process."""
    shutil.copytree(prepared, tmp_path / "shop")
    monkeypatch.chdir(tmp_path / "shop")
    monkeypatch.setattr(sys, "path", list(sys.path))
    forget_modules()
    yield tmp_path / "shop"
    forget_modules()


def forget_modules() -> None:
    for name in ("shop_model", "shop_strategy"):
        sys.modules.pop(name, None)


COMMANDS = [
    ["recommend", "user-1"],
    ["similar", "item-1"],
    ["explain", "user-1", "item-1"],
    ["inspect", "user", "user-1"],
    ["update", "day.parquet"],
    ["diff", "1", "2"],
    ["erase", "user-1"],
    ["export", "out"],
    ["serve", "--port", "0"],
]
OTHERS = ["status", "history", "promote", "rollback", "gc", "doctor"]  # they read no model
ALLOW = ["--allow-import", "shop_model", "--allow-import", "shop_strategy"]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
def test_a_store_imports_nothing_by_itself_and_names_the_option(
    command: list[str], shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command[0] == "diff":  # a second version, made by hand
        assert main(["update", "day.parquet", "--store", "s", "--force", "--reason", "a test", *ALLOW]) == 0
        forget_modules()
    for name in ("shop_model", "shop_strategy"):  # the code that a hostile store would like to run
        (shop / f"{name}.py").write_text(f"open('ran-{name}', 'w').close()")
    assert main([*command, "--store", "s"]) == StateError.exit_code
    message = capsys.readouterr().err
    assert not list(shop.glob("ran-*")) and not {"shop_model", "shop_strategy"} & sys.modules.keys()
    assert "not imported. If you trust the code, add --allow-import shop_model " in message
    if command[0] != "serve" and command[0] != "export":  # a server reads no strategy
        assert "--allow-import shop_model --allow-import shop_strategy to the command" in message


def test_the_commands_that_fit_suggests_have_the_option(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "base.parquet", "--store", "t", "--model", "shop_model:MyModelSpec"]) == 0
    update, recommend = capsys.readouterr().out.splitlines()[-2:]
    assert update == "Next: freshrec update NEW-EVENTS --store t --allow-import shop_model"
    forget_modules()
    assert main(recommend.split()[1:]) == 0


@pytest.mark.parametrize("allow", [ALLOW, ["--allow-import", "shop_model,shop_strategy"]])
def test_the_option_opens_the_store(allow: list[str], shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["update", "day.parquet", "--store", "s", "--force", "--reason", "a test", *allow]) == 0
    for command in (COMMANDS[0], *COMMANDS[2:4]):  # the model has no item similarities
        forget_modules()
        assert main([*command, "--store", "s", *allow]) == 0, command
    capsys.readouterr()
    assert main(["recommend", "user-1", "--store", "s", "--json"]) == 0  # imported by now
    best = [row["item_id"] for row in json.loads(capsys.readouterr().out)]
    with server(shop) as (client, _):
        assert [row["item_id"] for row in client.get("/recommend/user-1").json()["items"]] == best


def test_erasing_through_the_server_allows_the_same_modules_and_nothing_of_the_current_folder(shop: Path) -> None:
    (shop / "typer.py").write_text("open('ran-typer', 'w').close()")  # `python -m` would import it
    assert erase_in_subprocess(Path("s"), "user-1", ["shop_model", "shop_strategy"])["events"] > 0
    assert not list(shop.glob("ran-*"))


@pytest.mark.parametrize("command", [*[words[0] for words in COMMANDS], *OTHERS])
def test_every_command_that_opens_a_store_has_the_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "--allow-import" in capsys.readouterr().out


@pytest.mark.parametrize("command", OTHERS)
def test_commands_that_read_no_model_need_no_module(command: str, shop: Path) -> None:
    code = main([command, *(["1"] if command == "promote" else []), "--store", "s"])
    assert code == (2 if command == "rollback" else 0)  # there is no earlier version
    assert "shop_model" not in sys.modules


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("no_such_module", "--allow-import names no_such_module, which cannot be imported"),
        ("shop_model.py", "--allow-import names shop_model.py, which cannot be imported"),
        ("./shop_model", '--allow-import is "./shop_model", which is not a module. Write a name such as my_model'),
        (".shop_model", '--allow-import is ".shop_model", which is not a module'),
    ],
)
def test_a_module_that_does_not_exist_is_an_error(
    module: str, message: str, shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--store", "s", "--allow-import", module]) == 2
    assert message in capsys.readouterr().err


def write_tree(path: Path, name: str, fields: dict[str, Any]) -> None:
    """Write a file that names a class, as a hostile store could."""
    tree = {"class": name, "fields": {key: {"value": value} for key, value in fields.items()}}
    save_file({}, path, metadata={"freshrec": json.dumps({"format": 2, "state": tree})})


HOSTILE = [
    # a command of freshrec is a dataclass that runs when it is made: this one imports a module
    ("freshrec.cli.replay:replay", {"world": "drift", "models": ["shop_model:MyModelSpec"], "out": "out"}),
    ("collections:Counter", {}),  # it has a method `update`, as a strategy does
    ("subprocess:Popen", {"args": "touch ran"}),
    ("shop_model:MyModelSpec", {}),  # not imported
    ("shop_model; touch ran:MyModelSpec", {}),  # a message must not tell anybody to type this
    ("\x1b[2Jshop_model:MyModelSpec", {}),
    ("os", {}),
    (":", {}),
]


@pytest.mark.parametrize(("name", "fields"), HOSTILE)
def test_a_file_makes_only_objects_of_known_classes(name: str, fields: dict[str, Any], shop: Path) -> None:
    import freshrec.cli.replay  # noqa: F401

    write_tree(shop / "state", name, fields)
    with pytest.raises(StateError) as caught:
        load_tree(shop / "state")
    assert "ran:MyModelSpec to" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert ("--allow-import" in str(caught.value)) == (name == "shop_model:MyModelSpec")
    assert not (shop / "out").exists() and not (shop / "ran").exists() and "shop_model" not in sys.modules


CLASSES = [  # class -> the name of what it stands for
    *[(type(spec), name) for name, spec in MODELS.items() if spec == type(spec)()],
    *[(type(spec.build(0)), name) for name, spec in MODELS.items() if spec == type(spec)()],
]


@pytest.mark.parametrize(("kind", "name"), CLASSES, ids=lambda value: getattr(value, "__name__", value))
def test_a_class_of_options_or_of_models_stands_for_the_model_with_default_options(kind: Any, name: str) -> None:
    bundle = Recommender(kind)._bundle
    assert bundle.served.state.model.spec == MODELS[name]
    assert bundle.names == Recommender(name)._bundle.names  # what a store and a table call it
    assert find_model(f"{kind.__module__}:{kind.__name__}") == MODELS[name]


@pytest.mark.parametrize(("kind", "name"), [(FineTune, "finetune"), (Retrain, "full"), (Frozen, "frozen")])
def test_a_class_of_strategies_stands_for_its_default_options(kind: Any, name: str) -> None:
    assert Recommender("sasrec", kind)._bundle.names == ("sasrec", name)
    assert Cell("sasrec", SASRecSpec, name, kind, 0) == Cell("sasrec", SASRecSpec(), name, kind(), 0)  # type: ignore[arg-type]


@dataclass(frozen=True)
class NoSeed:
    def build(self) -> None: ...


@dataclass(frozen=True)
class Demanding:
    hours: float

    def build(self, seed: int) -> None: ...

    def update(self, state: Any, span: Any) -> None: ...


WRONG: list[tuple[Any, Any, str]] = [
    (
        SASRec(SASRecSpec(), 0),
        None,
        r'Model "SASRec" is a model, not its options. Pass its options, such as SASRecSpec\(\)',
    ),
    (FineTune, None, r'Model "FineTune" has no method build\(seed\)'),
    (NoSeed, None, r'Model "NoSeed" has a method build with other arguments. Write build\(seed\)'),
    (Demanding, None, 'Model "Demanding" is a class that needs arguments'),
    (5, None, r'Model "int" has no method build\(seed\)'),
    ("sasrec", SASRec, r'Strategy "SASRec" has no method update\(state, span\)'),
    ("item-knn", Demanding, 'Strategy "Demanding" is a class that needs arguments'),
    ("sasrec", FineTune(fit=FitConfig), r'Strategy "FineTune": option fit is a class. Write fit=FitConfig\(\)'),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("model", "strategy", "message"), WRONG)
def test_anything_else_is_one_clear_sentence(model: Any, strategy: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Recommender(model, strategy)


def test_a_class_or_a_frame_for_split_log_is_understood_or_explained() -> None:
    log = make_world("drift", users=30, items=20, events=300, spans=2).log
    assert split_log(log, SplitConfig).fingerprint() == split_log(log).fingerprint()
    with pytest.raises(OptionError, match="split_log takes the result of read_log"):
        split_log(log.frame)  # type: ignore[arg-type]


def test_one_metric_may_be_given_as_a_text() -> None:
    base, day, _ = days()
    recommender = Recommender("item-knn").fit(base)
    assert recommender.evaluate(day, "hr@5").equals(recommender.evaluate(day, ["hr@5"]))
