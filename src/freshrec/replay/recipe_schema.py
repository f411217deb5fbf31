"""Recipes: one TOML file with all options of a replay. Unknown keys are errors. This module imports nothing heavy.

A recipe may start with `extends = "name"`. Then it takes over the keys of name.toml, in the same folder or else in
freshrec, except for those that it sets itself.
"""

import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from annotated_types import MinLen
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from freshrec.config import Count, CountOrZero, check_options, option_error
from freshrec.data.split_config import SplitConfig
from freshrec.data.world_size import WorldSize
from freshrec.deprecation import describe_rename
from freshrec.disk_names import RECIPE_KEYS, with_current_keys
from freshrec.errors import OptionError
from freshrec.replay.recipe_files import find_recipe, read_tables

Words = tuple[str, ...]
Averaging = Literal["users", "targets", "pooled"]  # unit of equal weight within a span; pooled: over all spans
Unseen = Literal["miss", "drop"]
Cadence = Annotated[  # a number or a list of them
    tuple[Count, ...],
    MinLen(1),
    BeforeValidator(lambda value: value if isinstance(value, list | tuple) else [value]),
]


def control_names() -> Words:
    """The names of all controls. The import is late because models import torch."""
    from freshrec.models import CONTROLS

    return tuple(CONTROLS)


@dataclass(frozen=True)
class LogRecipe:
    """[log] The events: a file or a generated world."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    path: Annotated[str, Field(description="The log. Or give --world, or log.path in a recipe.")] = ""
    folder: Annotated[str, Field(description="Folder of a relative log path. Default: the current folder.")] = ""
    columns: Annotated[
        dict[str, str], Field(description="Column names of freshrec and of the log, such as user_id=uid.")
    ] = field(default_factory=dict)
    format: Annotated[str, Field(description="Name of a public format. See `freshrec list formats`.")] = ""
    time_format: Annotated[
        str, Field(description="Format of the timestamps, such as %d.%m.%Y. Default: ISO 8601, or numbers.")
    ] = ""
    events: Annotated[Words, Field(description="Event types to keep. Default: all.")] = ()
    separator: Annotated[
        str, Field(description="Separator of a text file: a character, or tab, semicolon, pipe, comma or space.")
    ] = ""
    min_rating: Annotated[
        float | None, Field(description="Keep only rows with at least this rating, in column rating or weight.")
    ] = None
    exposures: Annotated[
        bool, Field(description="Keep exposures without a click (label 0). For models that predict clicks.")
    ] = False
    users: Annotated[
        CountOrZero, Field(description="Number of users in a random sample, with all their events. 0 = all users.")
    ] = 0
    until: Annotated[
        str,
        Field(description="Leave out events from this time on: ISO 8601 (UTC without a zone), or a period."),
    ] = ""
    world: Annotated[
        str, Field(description="Replay a generated world instead of a log. See `freshrec list worlds`.")
    ] = ""
    world_users: Annotated[int, Field(description="Number of users of the world.")] = WorldSize.users
    world_items: Annotated[int, Field(description="Number of items of the world.")] = WorldSize.items
    world_events: Annotated[int, Field(description="Number of events of the world.")] = WorldSize.events
    seed: Annotated[int, Field(description="Random seed of the sample of users, the split and the world.")] = 0

    def __post_init__(self) -> None:
        check_options(self)


FIRST_UPDATED_SPAN = 2  # in span 1, all strategies have the same model, that of the base block


@dataclass(frozen=True)
class ReplayRecipe:
    """[replay] The models and strategies to compare, and how to measure them. By default, controls run as well."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    models: Annotated[
        Words, Field(description="Models, separated by commas. Options follow a colon: comirec-dr:k=1,sasrec.")
    ] = (
        "blend",
        "comirec-dr",
        "sasrec",
    )
    strategies: Annotated[
        Words, Field(description="Strategies, separated by commas: finetune,imsr:retain.weight=1.")
    ] = (
        "refit",
        "frozen",
        "finetune",
        "full",
        "imsr",
    )
    extra_pairs: Annotated[Words, Field(description="Further runs, each MODEL/STRATEGY: comirec-dr-k1/finetune.")] = ()
    controls: Annotated[Words, Field(description="Controls to run in addition to the models. Default: all.")] = field(
        default_factory=control_names
    )
    seeds: Annotated[Count, Field(description="Number of runs of each trained model, with seeds 0, 1, ...")] = 1
    cadence: Annotated[  # trained models use the first value only
        Cadence, Field(description="Blocks per span. Counting models absorb each block after its test. 1,4 = both.")
    ] = (1,)
    min_history: Annotated[CountOrZero, Field(description="Number of events that a user needs before a target.")] = 1
    tune: Annotated[bool, Field(description="Choose the options of each update on the previous span.")] = False
    unseen: Annotated[
        Unseen,
        Field(description="Targets whose items are new to every model: miss = count as a miss, drop = leave out."),
    ] = "miss"
    averaging: Annotated[
        Averaging,
        Field(
            description="Unit of equal weight in a span: users or targets. pooled = all targets of all spans. "
            "No effect with exposures, where auc and logloss cover all exposures of a span."
        ),
    ] = "users"
    from_span: Annotated[
        CountOrZero,
        Field(
            description="First span of means and tests. 0 = span 2, the first after an update (1 if it is the last)."
        ),
    ] = 0
    last_update: Annotated[
        bool, Field(description="Update after the last span too. Needed for its cost and for forgetting.")
    ] = True
    metrics: Annotated[
        Words,
        Field(
            description="Metrics, such as ndcg@20,hr@10. See `freshrec list metrics`. "
            "With exposures: auc and logloss, the default there."
        ),
    ] = (
        "hr@20",
        "ndcg@20",
        "mrr@20",
        "recall@20",
    )

    def __post_init__(self) -> None:
        check_options(self)


def default_metrics(exposures: bool) -> Words:
    """The metrics of a replay whose user names none: of rankings, or of clicks on a log with exposures."""
    return ("auc", "logloss") if exposures else ReplayRecipe.metrics


@dataclass(frozen=True)
class Recipe:
    """All options of a replay."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    log: LogRecipe = LogRecipe()
    spans: SplitConfig = SplitConfig()
    replay: ReplayRecipe = field(default_factory=ReplayRecipe)


def load_recipe(name: str | Path) -> Recipe:
    """Read a recipe and those that it extends. `name`: a path, or the name of a recipe of freshrec.

    Raises OptionError for an unknown name, invalid TOML or an unknown key.
    """
    path = find_recipe(name)
    tables = read_tables(path)
    try:
        return parse_recipe(tables)
    except OptionError as problem:
        raise OptionError(f"{path}: {problem}") from None


def parse_recipe(tables: dict[str, Any], place: str = "recipe key {}") -> Recipe:
    """Make a recipe from nested dictionaries. Raises OptionError for an unknown key or an invalid value.

    Former names of keys are accepted with a warning. Without metrics, they are those of `default_metrics`.
    `place`: the words for a key in a message. "--{}" names its flag.
    """
    try:
        current_tables = {name: _with_current_keys(name, table) for name, table in tables.items()}
        recipe = TypeAdapter(Recipe).validate_python(current_tables)
    except ValidationError as problem:
        raise option_error(problem, Recipe, place) from None
    if "metrics" in current_tables.get("replay", {}):
        return recipe
    return replace(recipe, replay=replace(recipe.replay, metrics=default_metrics(recipe.log.exposures)))


def _with_current_keys(section: str, table: Any) -> Any:
    former = RECIPE_KEYS.get(section, {})
    for key in former.keys() & table.keys() if isinstance(table, dict) else ():
        warnings.warn(describe_rename(f"recipe key {section}.{key}", former[key]), FutureWarning, stacklevel=3)
    return with_current_keys(table, former)


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe with all its options, including defaults. Options that are None are left out: TOML has no null."""
    tables = {
        section: {name: value for name, value in table.items() if value is not None}
        for section, table in asdict(recipe).items()
    }
    path.write_text(tomli_w.dumps(tables))
