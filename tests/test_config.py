"""`name:field=value` picks an instance and sets its fields; what is unknown is named, with the nearest valid name."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from freshrec.config import Count, Positive, Rate, bounds_of, description_of, hints_of
from freshrec.errors import IncompatibleError, OptionError, suggest_name
from freshrec.models import find_model
from freshrec.models.multi_interest import InterestSpec
from freshrec.replay.plan import count_tuning_targets
from freshrec.replay.recipe_schema import Recipe, load_recipe, parse_recipe, save_recipe
from freshrec.replay.recipes import load_log, load_split, make_cells, pairs_to_compare
from freshrec.strategies import find_strategy
from freshrec.strategies.imsr import IMSR, Retainer

ROOT = Path(__file__).resolve().parent.parent


def test_options_set_fields_and_fields_of_parts_with_the_type_of_the_default() -> None:
    spec = find_model("comirec-dr:k=6:attention=soft:recency=false")
    assert spec == InterestSpec(k=6, attention="soft", recency=False)
    strategy = find_strategy("imsr:retain.weight=1:detect=none")
    assert strategy == IMSR(retain=Retainer(weight=1.0), detect=None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("comirec", 'Did you mean "comirec-'),  # -dr and -sa are equally near
        ("comirec-dr:kk=6", 'Model comirec-dr has no option "kk". Did you mean "k"?'),
        ("sasrec:dims=3", 'Model sasrec has no option "dims". Its options: .*heads'),
        ("comirec-dr:k=six", "Write a value like its default, 4"),
        ("comirec-dr:k", "field=value"),
        ("comirec-dr:k.x=1", "no options below"),
        ("nobody.knows", "cannot import"),
    ],
)
def test_an_unknown_name_or_option_is_refused(text: str, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        find_model(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("popularity:weighting=lats", 'weighting is "lats". Use one of .* Did you mean "last"'),
        ("item-knn:kind=markvo", 'Did you mean "markov"'),
        ("repeat-last:order=x", "one of last, freq"),
        ("sasrec:length=0", '"sasrec:length=0": Option length is 0. It must be at least 1'),
        ("mf:d=0", "Option d is 0"),
        ("sasrec:lr=-0.1", "Option lr is -0.1. It must be above 0"),
        ("mf:lr=nan", "Option lr is nan"),
        ("sasrec:dropout=1", "at least 0 and below 1"),
        ("sasrec:lr=none", 'lr cannot be "none". Write a value like its default, 0.003'),
        ("comirec-dr:k=none", 'k cannot be "none"'),
    ],
)
def test_a_value_that_an_option_does_not_take_is_refused_before_anything_is_built(text: str, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        find_model(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("finetune:fit=none", "write fit.field=value"),  # only a part that may be None can be left out
        ("finetune:fit.history=spam", 'history is "spam".*Did you mean "span"'),
        ("finetune:fit.epochs=-1", '"finetune:fit.epochs=-1": Option epochs is -1'),
        ("imsr:detect.form=qantile", 'form is "qantile".*Did you mean "quantile"'),
        ("imsr:retain.form=distanc", 'form is "distanc".*Did you mean "distance"'),
        ("imsr:retain.xyz=1", 'Strategy imsr has no option "retain.xyz". Its options: .*retain.form'),
        ("absorb:fit.epochs=1", 'no options below "fit"'),
    ],
)
def test_a_value_that_a_strategy_does_not_take_is_refused(text: str, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        find_strategy(text)


def test_heads_must_divide_d_once_all_options_are_set() -> None:
    assert find_model("sasrec:heads=3:d=66").build(0).spec.d == 66  # though 3 does not divide the default of 64
    with pytest.raises(OptionError, match="d = 64 cannot be divided by heads = 3"):
        find_model("sasrec:heads=3").build(0)


def test_a_custom_model_is_found_by_its_module() -> None:
    assert find_model("freshrec.models.mind.MIND:k=2").k == 2  # type: ignore[attr-defined]


def test_a_recipe_survives_its_file_and_refuses_unknown_keys(tmp_path: Path) -> None:
    recipe = parse_recipe({"log": {"world": "newborn"}, "replay": {"models": ["mf"], "seeds": 2}})
    save_recipe(recipe, tmp_path / "recipe.toml")
    assert load_recipe(tmp_path / "recipe.toml") == recipe
    with pytest.raises(OptionError, match="replay.seed.*seeds"):
        parse_recipe({"replay": {"seed": 2}})
    with pytest.raises(OptionError, match="spans.spans"):
        parse_recipe({"spans": {"spans": "many"}})


def test_every_recipe_of_the_repository_is_valid() -> None:
    files = sorted((ROOT / "recipes").glob("*.toml"))
    assert len(files) >= 6
    assert all(isinstance(load_recipe(file), Recipe) and make_cells(load_recipe(file)) for file in files)


def tables_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """A recipe as JSON has it."""
    tables: dict[str, dict[str, Any]] = json.loads(json.dumps(asdict(recipe)))
    return tables


FEWER_USERS = {
    "beauty-spine": 1500, "globo-spine": 1500, "gowalla-spine": 600, "grocery-spine": 2500, "kuairand-spine": 450,
    "uci-spine": 200, "default-beauty": 800, "default-diginetica": 2200, "default-electronics": 1600,
    "default-globo": 1500, "default-gowalla": 350, "default-grocery": 900, "default-kuairand": 350,
    "default-taobao": 70, "default-uci": 140, "default-yoochoose": 2200,
}  # fmt: skip


def test_every_recipe_resolves_to_what_was_recorded_field_by_field() -> None:
    # Recorded from the recipes of 0.1.0, before any of them extended another: the defaults of all fields, and for each
    # recipe the fields that differ from them.
    # Since then, means and tests start at span 2 by default. The protocol of ADER keeps all cycles. Full retrains cost
    # more, so the recipes *-spine and default-* sample fewer users, and *-spine has three seeds.
    recorded = json.loads((ROOT / "tests/gold/recipes.json").read_text())
    recorded["defaults"]["replay"]["from_span"] = 0
    recorded["defaults"]["log"] |= {"separator": "", "min_rating": None, "time_format": ""}  # new options
    assert tables_of(Recipe()) == recorded["defaults"]
    for name, changes in recorded["recipes"].items():
        expected = {part: table | changes.get(part, {}) for part, table in recorded["defaults"].items()}
        if name.startswith(("ader", "sknn-diginetica", "blend-diginetica")):
            expected["replay"]["from_span"] = 1
        if name.endswith("-spine"):
            expected["replay"]["seeds"] = 3
        if name in FEWER_USERS:
            expected["log"]["users"] = FEWER_USERS[name]
        assert tables_of(load_recipe(ROOT / f"recipes/{name}.toml")) == expected, name


def test_a_recipe_replaces_single_keys_of_the_one_that_it_extends(tmp_path: Path) -> None:
    (tmp_path / "root.toml").write_text('[spans]\nspans = 4\nalpha = 0.3\n[replay]\nmodels = ["mf", "sasrec"]\n')
    (tmp_path / "middle.toml").write_text('extends = "root"\n[spans]\nspans = 9\n')
    (tmp_path / "leaf.toml").write_text('extends = "middle"\n[log]\nusers = 7\n[replay]\nmodels = ["mf"]\n')
    leaf = load_recipe(tmp_path / "leaf.toml")
    assert (leaf.log.users, leaf.spans.spans, leaf.spans.alpha) == (7, 9, 0.3)
    assert leaf.replay.models == ("mf",)  # a list takes the place of a list
    save_recipe(leaf, tmp_path / "elsewhere.toml")
    (tmp_path / "root.toml").unlink()
    assert load_recipe(tmp_path / "elsewhere.toml") == leaf  # a saved recipe holds everything


def test_a_recipe_that_extends_itself_or_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('extends = "b"')
    (tmp_path / "b.toml").write_text('extends = "a"')
    with pytest.raises(OptionError, match="extends itself, through .*b.toml"):
        load_recipe(tmp_path / "a.toml")
    (tmp_path / "default.toml").touch()
    (tmp_path / "c.toml").write_text('extends = "defualt"')
    with pytest.raises(
        OptionError, match='c.toml extends "defualt", which is not in the folder. Did you mean "default"'
    ):
        load_recipe(tmp_path / "c.toml")


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ({"lgo": {}}, 'There is no recipe key "lgo". Did you mean "log"'),
        ({"spans": {"alhpa": 0.5}}, 'There is no recipe key "spans.alhpa". Did you mean "spans.alpha"'),
        ({"spans": {"alpha": 1}}, "Recipe key spans.alpha is 1. It must be above 0 and below 1"),
        ({"spans": {"by": "counts"}}, 'Recipe key spans.by is "counts". Use one of count, .* Did you mean "count"'),
        ({"replay": {"cadence": [1, 0]}}, "Recipe key replay.cadence.1 is 0. It must be at least 1"),
        ({"replay": {"unseen": "mis"}}, 'replay.unseen is "mis". Use one of miss, drop. Did you mean "miss"'),
        ({"log": {"users": -1}}, "Recipe key log.users is -1. It must be at least 0"),
        ({"spans": {"by": "dates"}}, "--by dates needs --dates"),
        ({"log": {"columns": {"user_id": 3}}}, "Recipe key log.columns.user_id is 3. Write a text."),
        ({"spans": 3}, "Recipe key spans is 3. Write a table of keys and values."),
        ({"spans": {"spans": "many"}}, 'Recipe key spans.spans is "many". Write a whole number.'),
        ({"replay": {"cadence": []}}, r"Recipe key replay.cadence is \[\]. Write at least one value."),
        ({"spans": {"by": "weeks"}}, "Use one of count, time, count-alpha, clock-alpha, dates, period.$"),
        ({"run": {}}, 'There is no recipe key "run". Valid names: log, replay, spans.'),
    ],
)
def test_a_wrong_key_or_value_of_a_recipe_is_an_error(tables: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        parse_recipe(tables)


def test_a_recipe_is_a_file_or_else_a_name_of_freshrec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spine = load_recipe(ROOT / "recipes" / "uci-spine.toml")
    assert load_recipe("uci-spine") == load_recipe("uci-spine.toml") == spine and spine.spans.spans == 6
    Path("mine.toml").write_text('extends = "uci-spine"\n[spans]\nspans = 3\n')
    assert load_recipe("mine.toml").spans.spans == 3 and load_recipe("mine.toml").replay == spine.replay
    Path("uci-spine.toml").write_text("[spans]\nspans = 2\n")  # a file comes before a name
    assert load_recipe("uci-spine.toml").spans.spans == 2 and load_recipe("uci-spine").spans.spans == 6
    Path("spine").mkdir()
    assert load_recipe("spine").spans.spans == 6  # a folder is no recipe
    for name, message in (("uci-spin", 'Did you mean "uci-spine"?'), ("x/uci-spine", "There is no file x/uci-spine")):
        with pytest.raises(OptionError, match=re.escape(message)):
            load_recipe(name)
    Path("mine.toml").write_text('extends = "uci-spin"')
    with pytest.raises(OptionError, match='extends "uci-spin", which is not in the folder. Did you mean "uci-spine"'):
        load_recipe("mine.toml")


def test_an_error_of_a_recipe_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[run]\n")
    with pytest.raises(OptionError, match='bad.toml: There is no recipe key "run"'):
        load_recipe(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_text("[run\n")
    with pytest.raises(OptionError, match="The recipe .*bad.toml is not valid TOML .* Correct it."):
        load_recipe(tmp_path / "bad.toml")
    with pytest.raises(OptionError, match="There is no file .*missing.toml. Check the path, or use a recipe of"):
        load_recipe(tmp_path / "missing.toml")
    with pytest.raises(OptionError, match=r"The recipe .* cannot be read \(Is a directory\)"):
        load_recipe(tmp_path)


def test_only_a_close_name_is_suggested_and_at_most_twelve_names_are_listed() -> None:
    assert suggest_name("lots", ["last", "lost"]) == 'Did you mean "lost"?'
    assert suggest_name("xyz", ["last", "lost"]) == "Valid names: last, lost."
    names = [f"option{number:02}" for number in range(1, 16)]  # 15 names: 12 are listed, 3 are counted
    listed = ", ".join(names[:12])
    assert suggest_name("xyz", names, "Its options") == f"Its options: {listed} and 3 more."


def test_bounds_are_formatted_in_words_and_a_type_may_have_a_description() -> None:
    assert bounds_of(Annotated[Rate, Field(description="A share.")]) == "at least 0 and below 1"
    assert bounds_of(Positive) == "above 0"  # below infinity goes without saying, and infinity is refused
    assert bounds_of(int) == description_of(Count) == ""
    assert description_of(Annotated[Rate, Field(description="A share.")]) == "A share."


def test_each_field_of_a_recipe_has_a_sentence() -> None:
    sections = hints_of(Recipe)
    assert list(sections) == ["log", "spans", "replay"]
    for kind in sections.values():
        for name, hint in hints_of(kind).items():
            assert description_of(hint).endswith("."), name


def test_counters_are_replayed_at_each_cadence_and_trained_models_at_the_first() -> None:
    part = {"models": ["mf", "markov"], "strategies": ["finetune", "absorb"], "controls": [], "cadence": [4, 1]}
    found = [(cell.model_name, cell.strategy_name, cell.cadence) for cell in make_cells(parse_recipe({"replay": part}))]
    assert found == [("mf", "finetune x4", 4), ("markov", "absorb x4", 4), ("markov", "absorb", 1)]
    assert {cell.cadence for cell in make_cells(parse_recipe({"replay": part | {"cadence": 2}}))} == {2}
    for wrong in (0, [], [1, 0], "often"):
        with pytest.raises(OptionError, match="cadence"):
            parse_recipe({"replay": {"cadence": wrong}})


def test_each_model_gets_the_strategies_that_fit_it_or_its_default_strategy() -> None:
    def found(models: list[str], strategies: list[str]) -> tuple[list[str], list[str]]:
        part = {"models": models, "strategies": strategies, "controls": []}
        pairs, notes = pairs_to_compare(parse_recipe({"replay": part}))
        return ["/".join(pair) for pair in pairs], notes

    assert found(["sasrec", "mind"], ["imsr"]) == (
        ["sasrec/finetune", "mind/imsr"],
        ["sasrec cannot be updated by imsr. It is compared with its default strategy, finetune."],
    )
    assert found(["sasrec", "blend", "markov"], ["finetune", "full"]) == (
        ["sasrec/finetune", "sasrec/full", "blend/refit", "markov/absorb"],
        [
            "blend cannot be updated by finetune, full. It is compared with its default strategy, refit.",
            "markov cannot be updated by finetune, full. It is compared with its default strategy, absorb.",
        ],
    )
    assert found(["comirec-dr", "sasrec"], ["finetune", "imsr"]) == (
        ["comirec-dr/finetune", "comirec-dr/imsr", "sasrec/finetune"],
        ["sasrec cannot be updated by imsr."],
    )
    assert [cell.model_name for cell in make_cells(parse_recipe({"replay": {"models": ["item-knn"]}}))].count(
        "item-knn"
    ) == 1  # the default strategies fit trained models only; item-knn is a control too, and runs once


def test_a_strategy_that_fits_none_of_the_models_is_an_error() -> None:
    with pytest.raises(IncompatibleError, match="several interests"):
        make_cells(parse_recipe({"replay": {"models": ["sasrec"], "strategies": ["imsr"]}}))


def test_controls_run_with_every_replay_and_once_whatever_the_seeds() -> None:
    cells = make_cells(parse_recipe({"replay": {"models": ["mf"], "strategies": ["finetune"], "seeds": 3}}))
    assert [(c.model_name, c.seed) for c in cells if c.strategy_name == "finetune"] == [("mf", 0), ("mf", 1), ("mf", 2)]
    assert sum(c.strategy_name == "absorb" for c in cells) == 5


@pytest.mark.parametrize(("targets", "spans"), [("all", 3), ("last", 1)])
def test_tuning_without_events_to_choose_by_is_refused_once_the_log_is_cut(targets: str, spans: int) -> None:
    log = {"world": "drift", "world_users": 50, "world_items": 20, "world_events": 300}
    tables = {"log": log, "spans": {"targets": targets, "spans": spans}}
    assert len(load_split(parse_recipe(tables)).spans) == spans + 1
    with pytest.raises(OptionError, match="Tuning needs validation events"):
        load_split(parse_recipe(tables | {"replay": {"tune": True}}))


def test_a_recipe_names_one_log() -> None:
    with pytest.raises(OptionError, match="both a.csv and the world drift"):
        load_log(parse_recipe({"log": {"path": "a.csv", "world": "drift"}}))


def test_a_plan_counts_what_tuning_trains() -> None:
    # Spans of 100, 10, 20, 30 events. Fine-tuning is tuned before spans 2 and 3, on the 10 and 20 events of the spans
    # before them. Its alternatives have 5, 2, 10, 5, 2 and 10 epochs: (10 + 20) x 34. Frozen has nothing to choose.
    assert count_tuning_targets(find_strategy("finetune"), [100, 10, 20, 30]) == 30 * 34
    assert count_tuning_targets(find_strategy("frozen"), [100, 10, 20, 30]) == 0
