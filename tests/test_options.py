"""`name:field=value` picks an instance and sets its fields; what is unknown is named, with the nearest valid name."""

from pathlib import Path

import pytest

from freshrec.errors import IncompatibleError, OptionError
from freshrec.models import find_model
from freshrec.models.interests import InterestSpec
from freshrec.recipes import Recipe, cells_of, load_recipe, recipe_from, save_recipe
from freshrec.strategies import find_strategy
from freshrec.strategies.imsr import IMSR, Retain


def test_options_set_fields_and_fields_of_parts_with_the_type_of_the_default() -> None:
    spec = find_model("comirec-dr:k=6:attention=soft:recency=false")
    assert spec == InterestSpec(k=6, attention="soft", recency=False)
    strategy = find_strategy("imsr:retain.weight=1:detect=none")
    assert strategy == IMSR(retain=Retain(weight=1.0), detect=None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("comirec", "comirec-dr"),
        ("comirec-dr:kk=6", '"k"'),
        ("comirec-dr:k=six", "default is 4"),
        ("comirec-dr:k", "field=value"),
        ("comirec-dr:k.x=1", "no options below"),
        ("nobody.knows", "cannot import"),
    ],
)
def test_what_is_unknown_is_refused_with_a_sentence(text: str, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        find_model(text)


def test_a_model_of_somebody_else_is_found_by_its_module() -> None:
    assert find_model("freshrec.models.mind.MIND:k=2").k == 2  # type: ignore[attr-defined]


def test_a_recipe_survives_its_file_and_refuses_unknown_keys(tmp_path: Path) -> None:
    recipe = recipe_from({"log": {"world": "newborn"}, "replay": {"models": ["mf"], "seeds": 2}})
    save_recipe(recipe, tmp_path / "recipe.toml")
    assert load_recipe(tmp_path / "recipe.toml") == recipe
    with pytest.raises(OptionError, match="replay.seed.*seeds"):
        recipe_from({"replay": {"seed": 2}})
    with pytest.raises(OptionError, match="spans.spans"):
        recipe_from({"spans": {"spans": "many"}})


def test_every_recipe_of_the_repository_is_valid() -> None:
    files = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))
    assert len(files) >= 6
    assert all(isinstance(load_recipe(file), Recipe) and cells_of(load_recipe(file)) for file in files)


def test_a_strategy_runs_on_the_models_it_fits_and_is_an_error_only_where_it_fits_none() -> None:
    both = recipe_from({"replay": {"models": ["sasrec", "mind"], "strategies": ["imsr"], "controls": []}})
    assert [cell.model for cell in cells_of(both)] == ["mind"]
    with pytest.raises(IncompatibleError, match="several interests"):
        cells_of(recipe_from({"replay": {"models": ["sasrec"], "strategies": ["imsr"]}}))


def test_controls_run_with_every_replay_and_once_whatever_the_seeds() -> None:
    cells = cells_of(recipe_from({"replay": {"models": ["mf"], "strategies": ["finetune"], "seeds": 3}}))
    assert [(c.model, c.seed) for c in cells if c.strategy == "finetune"] == [("mf", 0), ("mf", 1), ("mf", 2)]
    assert sum(c.strategy == "absorb" for c in cells) == 5
