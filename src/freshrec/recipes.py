"""Recipes: everything a replay is made from, in one TOML file; unknown keys are errors."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import polars as pl
import tomli_w
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from freshrec.data.log import Log, before, positives, read_log
from freshrec.data.spans import Cut, cut
from freshrec.data.worlds import make
from freshrec.disk_names import RECIPE_KEYS, with_current_keys
from freshrec.errors import IncompatibleError, LogError, OptionError, unknown
from freshrec.models import CONTROLS, COUNTERS, find_model
from freshrec.replay.clicks import click_metric
from freshrec.replay.measure import Asked
from freshrec.replay.metrics import parse, sampled
from freshrec.replay.replay import Cell, Settings, check, check_clicks
from freshrec.replay.significance import Equal
from freshrec.strategies import find_strategy
from freshrec.types import VALID, TrainedModel


class LogRecipe(BaseModel, extra="forbid", frozen=True):
    """[log] Which events: a file, or a generated world."""

    path: str = ""
    folder: str = ""  # where a relative path starts; empty = the current folder
    columns: dict[str, str] = {}
    format: str = ""
    events: list[str] = []
    exposures: bool = False  # keep what was shown and not taken (label 0), for models that predict clicks
    users: int = 0  # a seeded sample of whole users; 0 = all
    until: str = ""  # events from this moment on are left out (ISO 8601, UTC where no zone is given; or a period)
    world: str = ""  # instead of a path
    world_users: int = 2000
    world_items: int = 1000
    world_events: int = 100_000
    seed: int = 0


class SpansRecipe(BaseModel, extra="forbid", frozen=True):
    """[spans] How the log is cut; see data/spans.py."""

    by: str = "count"
    spans: int = 6
    alpha: float = 0.5
    dates: list[str] = []
    targets: str = "last"
    heldout: str = "next"
    min_events: int = 1
    forget_users: float = 0.05
    base_periods: int = Field(default=1, ge=1)  # for by = "period"
    n_targets: int = 0  # of a span, about so many, of users drawn at random; 0 = all
    sessions: bool = False  # a user of the next span is somebody else: histories end with the span


Cadence = Annotated[  # a number or a list of them
    list[Annotated[int, Field(ge=1)]],
    Field(min_length=1),
    BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
]


class ReplayRecipe(BaseModel, extra="forbid", frozen=True):
    """[replay] What is compared. Controls run with every replay: no table is printed without them."""

    models: list[str] = ["blend", "comirec-dr", "sasrec"]
    strategies: list[str] = ["refit", "frozen", "finetune", "full", "imsr"]
    also: list[str] = []  # further pairs, as in "comirec-dr-k1/finetune"
    controls: list[str] = list(CONTROLS)
    seeds: int = Field(default=1, ge=1)
    cadence: Cadence = [1]  # blocks to a span; with several, all but trained models are replayed at each
    min_history: int = Field(default=1, ge=0)
    tune: bool = False
    unseen: Literal["miss", "drop"] = "miss"  # events of items new to all: asked for like others, or left out
    mean: Equal = "users"  # what weighs equally within a span; "pooled": all targets of all spans
    from_span: int = Field(default=1, ge=1)  # means and tests begin with it; what is before it is shown by span only
    last_update: bool = True  # train on the last span too, although nothing tests it
    metrics: list[str] = ["hr@20", "ndcg@20", "mrr@20", "recall@20"]


class Recipe(BaseModel, extra="forbid", frozen=True):
    """A whole replay."""

    log: LogRecipe = LogRecipe()
    spans: SpansRecipe = SpansRecipe()
    replay: ReplayRecipe = ReplayRecipe()


def load_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file. Raises OptionError where it is no TOML, or has a key or value that does not exist."""
    try:
        return recipe_from(tomllib.loads(path.read_text()))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise OptionError(f"{path} is not a readable recipe ({problem}).") from None


def recipe_from(tables: dict[str, Any]) -> Recipe:
    """The recipe of nested dictionaries. Raises OptionError, naming the nearest valid key."""
    try:
        current = {name: with_current_keys(part, RECIPE_KEYS.get(name, {})) for name, part in tables.items()}
        return Recipe.model_validate(current)
    except ValidationError as problem:
        first = problem.errors()[0]
        *parents, name = map(str, first["loc"])
        if first["type"] == "extra_forbidden":
            part = Recipe.model_fields[parents[0]].annotation if parents else Recipe
            assert part is not None
            raise unknown("recipe key", ".".join([*parents, name]), part.model_fields) from None
        raise OptionError(f"recipe key {'.'.join([*parents, name])}: {first['msg']}.") from None


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as resolved: every option, defaults too."""
    path.write_text(tomli_w.dumps(recipe.model_dump()))


def log_of(recipe: Recipe) -> Log:
    """The events a recipe names: interactions only, unless it asks for exposures too."""
    part = recipe.log
    if part.world and part.path:
        raise OptionError(f"a replay is of one log; both {part.path} and the world {part.world} are given, drop one.")
    if part.world:
        sizes = {"users": part.world_users, "items": part.world_items, "events": part.world_events}
        return make(part.world, **sizes, spans=recipe.spans.spans, seed=part.seed).log
    if not part.path:
        raise OptionError("a replay needs a log: give LOG, --world NAME, or log.path in the recipe.")
    columns, events, users = part.columns, part.events, part.users or None
    log = read_log(
        Path(part.folder) / part.path,
        columns=columns,
        format=part.format or None,
        events=events,
        users=users,
        seed=part.seed,
    )
    if part.exposures and not (log.frame.get_column("label", default=pl.Series([None])) == 0).any():
        raise LogError("exposures were asked for, and no row has a label of 0; name the column, as label = ...")
    log = before(log, part.until) if part.until else log
    return log if part.exposures else positives(log)


def cut_of(recipe: Recipe) -> Cut:
    """The recipe's log in spans. OptionError where it asks for tuning, and no event is there to choose by."""
    part = recipe.spans
    spans = cut(
        log_of(recipe), by=part.by, spans=part.spans, alpha=part.alpha, dates=part.dates, targets=part.targets,
        heldout=part.heldout, min_events=part.min_events, forget_users=part.forget_users,
        base_periods=part.base_periods, sessions=part.sessions, n_targets=part.n_targets, seed=recipe.log.seed,
    )  # fmt: skip
    if recipe.replay.tune and not any(bool((span.events.role_E == VALID).any()) for span in spans.spans[2:]):
        raise OptionError(
            "tuning chooses knobs by the validation events of spans 2, 3, ..., and this cut has none; use targets = "
            '"last" and at least 2 spans, or do not tune.'
        )
    return spans


def settings_of(recipe: Recipe) -> Settings:
    """What all cells share."""
    part = recipe.replay
    if recipe.log.exposures:
        for metric in part.metrics:
            click_metric(metric)
        if part.tune or part.unseen != "miss" or part.mean != "users":
            raise OptionError("tune, unseen and mean are of rankings; on a log with exposures leave them out.")
        asked = Asked(min_history=part.min_history)
        return Settings(asked, last_update=part.last_update)
    for metric in part.metrics:
        parse(metric)
    asked = Asked(min_history=part.min_history, among=sampled(part.metrics), unseen=part.unseen)
    return Settings(asked, part.tune, part.last_update)


def cells_of(recipe: Recipe) -> list[Cell]:
    """Every control, and every model with every strategy that can update it, once per seed and cadence.

    A trained model learns when a span is over, and meets the first cadence only. A strategy that fits none of the
    models is an error; one that fits only some of them is left out for the others.
    """
    part = recipe.replay
    cells: list[Cell] = []
    refused: dict[str, IncompatibleError] = {}
    fitting: set[str] = set()
    named = [(name, "absorb") for name in part.controls if not recipe.log.exposures]  # they say nothing of clicks
    named += [(model, strategy) for model in part.models for strategy in part.strategies]
    named += [(model, strategy) for model, _, strategy in (pair.partition("/") for pair in part.also)]
    for model, strategy in dict.fromkeys(named):
        spec, update = find_model(model), find_strategy(strategy)
        try:
            check(spec, model, update, strategy)
            if recipe.log.exposures:
                check_clicks(spec, model)
        except IncompatibleError as problem:
            refused.setdefault(strategy, problem)
            continue
        fitting.add(strategy)
        seeds = 1 if model.partition(":")[0] in COUNTERS else part.seeds
        for cadence in part.cadence[:1] if isinstance(spec.build(0), TrainedModel) else dict.fromkeys(part.cadence):
            label = strategy if cadence == 1 else f"{strategy} x{cadence}"
            cells += [Cell(model, spec, label, update, seed, cadence) for seed in range(seeds)]
    for strategy, reason in refused.items():
        if strategy not in fitting:
            raise reason
    return cells
