"""Names in files: every class that can be saved has a tag, and files outlive the renaming of classes and options."""

import json
import sys
import types
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import polars as pl
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from freshrec import disk_names
from freshrec.data.split import LogSplit, split_log
from freshrec.data.synthetic import make_world
from freshrec.disk_names import CLASSES, class_of, current_manifest, current_move, tag_of, with_current_names
from freshrec.errors import IncompatibleError, StateError
from freshrec.former_names import FORMER
from freshrec.models import COUNTING_MODELS, MODELS, find_model
from freshrec.models.absorb import absorb_block
from freshrec.replay.cell import Cell, ReplaySettings
from freshrec.replay.measure import QueryOptions
from freshrec.replay.provenance import base_file, matches_provenance, write_provenance
from freshrec.replay.results import read_ranks
from freshrec.store.checkpoint import load_tree, save_tree
from freshrec.strategies import STRATEGIES, find_strategy
from freshrec.strategies.compatible import check_compatible
from freshrec.types import State


def dataclasses_in(kind: Any, found: set[type]) -> set[type]:
    """Add to `found` all dataclasses that a value of this type can contain."""
    if is_dataclass(kind) and isinstance(kind, type) and kind not in found:
        found.add(kind)
        for hint in get_type_hints(kind).values():
            dataclasses_in(hint, found)
    for part in get_args(kind):
        dataclasses_in(part, found)
    return found


@pytest.fixture(scope="module")
def spans() -> LogSplit:
    log = make_world("newborn", users=25, items=20, events=300, spans=3).log
    return split_log(log, by="count", spans=3, forget_users=0.2)


def test_a_tag_belongs_to_one_class_and_every_former_name_has_a_tag() -> None:
    assert len(set(CLASSES.values())) == len(CLASSES)
    assert set(FORMER.values()) <= CLASSES.keys()
    assert not [tag for tag in CLASSES if ":" in tag]  # a colon marks the module:qualname of another package
    for tag in CLASSES:
        assert tag_of(class_of(tag)) == tag


def test_every_option_class_and_every_part_of_a_tagged_class_has_a_tag() -> None:
    roots = {type(one) for one in (*MODELS.values(), *STRATEGIES.values())} | {class_of(tag) for tag in CLASSES}
    found: set[type] = set()
    for root in roots:
        dataclasses_in(root, found)
    assert {tag_of(kind) for kind in found} == CLASSES.keys()


@pytest.mark.parametrize("name", STRATEGIES)
def test_everything_that_a_strategy_keeps_has_a_tag(name: str, spans: LogSplit, tmp_path: Path) -> None:
    strategy: Any = STRATEGIES[name]
    if name != "absorb":
        quick = {"max_epochs": 1} if name == "refit" else {"base_epochs": 1, "epochs": 1}
        strategy = replace(strategy, fit=replace(strategy.fit, **quick))
    for model in ("item-knn", "blend", "mf", "comirec-dr"):
        spec: Any = MODELS[model]
        try:
            check_compatible(spec, model, strategy, name)
        except IncompatibleError:
            continue
        if model == "mf" and name in ("asmg", "sml"):
            continue  # they keep more with an interest model
        state = State((spec if model in (*COUNTING_MODELS, "blend") else replace(spec, d=4)).build(0))
        for span in spans.spans:  # some strategies keep more after a second update
            state = strategy.update(absorb_block(state, span.events, span.n_users, span.n_items), span)
        save_tree((strategy, state), tmp_path / "state.safetensors")  # StateError where a class has no tag
        assert len(spans.spans) == state.spans_seen
        break
    else:
        pytest.fail(f"{name} updates none of the models")


def test_a_class_of_this_package_without_a_tag_cannot_be_saved(tmp_path: Path) -> None:
    forgotten = type("Forgotten", (), {"__module__": "freshrec.models.mf", "__annotations__": {"d": int}})
    with pytest.raises(StateError, match="cannot be saved without a tag. Add one to CLASSES"):
        save_tree(dataclass(forgotten)(3), tmp_path / "state.safetensors")


@dataclass(frozen=True)
class Theirs:
    """A class of another package."""

    n: int


def test_a_class_of_another_package_is_saved_by_its_module_and_name(tmp_path: Path) -> None:
    save_tree(Theirs(3), tmp_path / "state.safetensors")
    with safe_open(tmp_path / "state.safetensors", framework="pt") as file:
        text = file.metadata()["freshrec"]
    assert json.loads(text)["state"]["class"] == f"{__name__}:Theirs"
    assert load_tree(tmp_path / "state.safetensors") == Theirs(3)


@pytest.mark.parametrize("name", ["os:system", "pathlib:Path", "antigravity:X", "no-such-tag", f"{__name__}:json"])
def test_a_file_may_name_only_existing_dataclasses(name: str) -> None:
    with pytest.raises(StateError, match="The state needs"):
        class_of(name)
    assert "antigravity" not in sys.modules  # a file cannot cause an import


@dataclass(frozen=True)
class MFOptions:
    """A possible future `MFSpec`: d is called dims, lr is gone, a value of `kind` has changed, `bias` is new."""

    dims: int
    kind: str
    bias: bool
    weights: dict[str, Tensor]


def test_a_file_with_former_names_gives_the_current_class(monkeypatch: pytest.MonkeyPatch) -> None:
    later = types.ModuleType("freshrec_later")
    later.MFOptions = MFOptions  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "freshrec_later", later)
    monkeypatch.setitem(CLASSES, "mf-spec", "freshrec_later:MFOptions")
    monkeypatch.setitem(disk_names.FIELDS, "mf-spec", {"d": "dims", "lr": None})
    monkeypatch.setitem(disk_names.VALUES, "mf-spec", {"kind": {"lanes": "parallel"}})
    monkeypatch.setitem(disk_names.ADDED, "mf-spec", {"bias": True})
    monkeypatch.setitem(disk_names.WEIGHTS, "", {"packed": "rows"})
    monkeypatch.setitem(disk_names.WEIGHTS, "mf-spec", {"users": "user_table"})
    # the key of a number is not the name of a weight
    weights = {"dict": {"users.packed": {"tensor": "a"}, "users": {"value": 3}}}
    former = {"d": {"value": 4}, "lr": {"value": 0.1}, "kind": {"value": "lanes"}, "weights": weights}
    found = with_current_names({"class": "freshrec.models.mf:MFSpec", "fields": former})
    assert class_of(found["class"]) is MFOptions
    assert found["fields"].keys() == {f.name for f in fields(MFOptions)}
    assert found["fields"]["dims"] == {"value": 4} and found["fields"]["bias"] == {"value": True}
    assert found["fields"]["kind"] == {"value": "parallel"}
    assert found["fields"]["weights"]["dict"] == {"user_table.rows": {"tensor": "a"}, "users": {"value": 3}}
    # the names of a model's weights depend on the tag of its options
    parts = {"spec": {"class": "mf-spec", "fields": {}}, "weights": weights}
    assert with_current_names({"model": {"dict": parts}})["model"]["dict"]["weights"]["dict"].keys() == {
        "user_table.rows",
        "users",
    }


def test_former_keys_and_columns_of_other_files_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disk_names, "MANIFEST_KEYS", {"held": "held_out"})
    monkeypatch.setattr(disk_names, "NUMBER_KEYS", {"late": "n_late"})
    monkeypatch.setattr(disk_names, "DAY_KEYS", {"gap_hours": "pause_hours"})
    monkeypatch.setattr(disk_names, "KINDS", {"no rows": "empty", "save": "saved"})
    former = {
        "id": 1,
        "kind": "no rows",
        "held": 2,
        "numbers": {"late": 3.0},
        "data": {"day": {"gap_hours": 4}, "odd": []},
    }
    data = {"day": {"pause_hours": 4}, "odd": []}
    now = {"id": 1, "kind": "empty", "held_out": 2, "numbers": {"n_late": 3.0}, "data": data}
    assert current_manifest(former) == now
    assert current_move({"to": 1, "action": "save"}) == {"to": 1, "action": "saved"}
    assert current_manifest([1]) == [1] and current_move("x") == "x"  # the reader that checks it reports damage
    monkeypatch.setitem(disk_names.RANK_COLUMNS, "asked", "span")
    pl.DataFrame({"asked": [1], "rank": [2.0]}).write_parquet(tmp_path / "span-1.parquet")
    assert read_ranks(tmp_path / "span-1.parquet").columns == ["span", "rank"]


def cell_of(model: str, strategy: str) -> Cell:
    return Cell(model, find_model(model), strategy, find_strategy(strategy), 0)


@pytest.mark.parametrize(
    "cell",
    [
        cell_of("sasrec:d=8", "imsr:retain=none:detect.new=2"),
        cell_of("item-knn", "absorb"),
        cell_of("mf", "sml-linear"),
    ],
    ids=lambda cell: cell.model_name,
)
def test_a_run_recorded_by_0_1_0_matches_the_same_run_only(cell: Cell, tmp_path: Path) -> None:
    (tmp_path / "made-of.txt").write_text(repr(cell))  # no class or field of these was renamed since 0.1.0
    assert matches_provenance(tmp_path, cell)
    assert not matches_provenance(tmp_path, replace(cell, cadence=2))
    assert not matches_provenance(tmp_path, replace(cell, strategy_instance=find_strategy("finetune")))
    write_provenance(tmp_path, cell)
    assert matches_provenance(tmp_path, cell) and not matches_provenance(tmp_path, replace(cell, seed=1))


def test_a_replay_recorded_by_0_1_0_matches_its_settings_and_log(tmp_path: Path) -> None:
    settings = ReplaySettings(QueryOptions(unseen="drop"), tune=True)
    (tmp_path / "made-of.txt").write_text(
        "Settings(asked=Asked(role=2, min_history=1, among=0, unseen='drop'), tune=True, last_update=True), log 7f"
    )
    assert matches_provenance(tmp_path, (settings, "7f"))
    assert not matches_provenance(tmp_path, (settings, "7e")) and not matches_provenance(
        tmp_path, (ReplaySettings(), "7f")
    )


def test_a_damaged_record_matches_nothing(tmp_path: Path) -> None:
    for name, text in (("made-of.txt", "Cell(model="), ("made-of.json", "{"), ("made-of.json", '{"class": "no"}')):
        (tmp_path / name).write_text(text)
        assert not matches_provenance(tmp_path, cell_of("item-knn", "absorb"))


def test_a_replay_of_a_custom_model_resumes(tmp_path: Path) -> None:
    class Spec:  # not a dataclass, and it cannot be imported
        def __repr__(self) -> str:
            return "Spec of mine"

    cell = replace(cell_of("item-knn", "absorb"), model_spec=Spec())  # type: ignore[arg-type]
    (tmp_path / "made-of.txt").write_text(repr(cell))
    assert matches_provenance(tmp_path, cell)
    write_provenance(tmp_path, cell)
    assert matches_provenance(tmp_path, cell) and not matches_provenance(tmp_path, replace(cell, seed=1))
    assert base_file(cell, (1, 2), tmp_path) != base_file(cell, (1, 3), tmp_path)


def test_options_that_older_files_lack_get_their_defaults(tmp_path: Path) -> None:
    cell = cell_of("sasrec", "finetune")
    write_provenance(tmp_path, cell)
    file = tmp_path / "made-of.json"
    whole = json.loads(file.read_text())
    del whole["fields"]["model_spec"]["fields"]["predict"]  # as if this option were new
    file.write_text(json.dumps(whole))
    assert matches_provenance(tmp_path, cell)
    assert not matches_provenance(tmp_path, cell_of("sasrec:predict=last", "finetune"))


def test_state_dicts_are_read_by_current_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spans: LogSplit
) -> None:
    span = spans.spans[0]
    state = absorb_block(State(MODELS["popularity"].build(0)), span.events, span.n_users, span.n_items)
    kept = dict(state.model.state_dict())
    name = next(name for name, tensor in kept.items() if tensor.ndim)
    save_tree(state, tmp_path / "state.safetensors")
    monkeypatch.setitem(disk_names.WEIGHTS, "popularity-spec", {name: "a_later_name"})
    with pytest.raises(
        StateError, match=f"does not hold a complete state.*{name}"
    ):  # today's code wants its name of today
        load_tree(tmp_path / "state.safetensors")
    monkeypatch.setitem(disk_names.WEIGHTS, "popularity-spec", {})
    assert torch.equal(load_tree(tmp_path / "state.safetensors").model.state_dict()[name], kept[name])
