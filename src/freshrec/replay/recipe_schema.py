"""Recipes: everything a replay is made from, in one TOML file; unknown keys are errors. Imports nothing heavy.

A recipe may begin with `extends = "name"`: the recipe name.toml beside it, whose keys it replaces one by one.
"""

import tomllib
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
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
from freshrec.errors import OptionError, unknown_name_error

Words = tuple[str, ...]
Averaging = Literal["users", "targets", "pooled"]  # what weighs equally: within a span, or targets over all spans
Unseen = Literal["miss", "drop"]
Cadence = Annotated[  # a number or a list of them
    tuple[Count, ...],
    MinLen(1),
    BeforeValidator(lambda value: value if isinstance(value, list | tuple) else [value]),
]


def control_names() -> Words:
    """The names of all controls, looked up late: the models need torch."""
    from freshrec.models import CONTROLS

    return tuple(CONTROLS)


@dataclass(frozen=True)
class LogRecipe:
    """[log] Which events: a file, or a generated world."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    path: Annotated[str, Field(description="The log; or --world, or log.path in a recipe.")] = ""
    folder: Annotated[str, Field(description="Folder of a relative log path; the current folder unless given.")] = ""
    columns: Annotated[dict[str, str], Field(description="Our column names and yours, as in user_id=uid.")] = field(
        default_factory=dict
    )
    format: Annotated[str, Field(description="A public format.")] = ""
    events: Annotated[Words, Field(description="The event types to keep; all unless given.")] = ()
    exposures: Annotated[
        bool, Field(description="Keep exposures without a click (label 0), for models that predict clicks.")
    ] = False
    users: Annotated[CountOrZero, Field(description="Keep a seeded sample of this many whole users; 0 = all.")] = 0
    until: Annotated[
        str,
        Field(description="Leave out events from this moment on: ISO 8601 (UTC unless it has a zone), or a period."),
    ] = ""
    world: Annotated[str, Field(description="Replay a generated world instead of a log.")] = ""
    world_users: Annotated[int, Field(description="Number of users of the world.")] = WorldSize.users
    world_items: Annotated[int, Field(description="Number of items of the world.")] = WorldSize.items
    world_events: Annotated[int, Field(description="Number of events of the world.")] = WorldSize.events
    seed: Annotated[int, Field(description="Random seed of the sample, the cut and the world.")] = 0

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class ReplayRecipe:
    """[replay] What is compared. Controls run with every replay: no table is printed without them."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    models: Annotated[Words, Field(description="Models, with options as in comirec-dr:k=1,sasrec.")] = (
        "blend",
        "comirec-dr",
        "sasrec",
    )
    strategies: Annotated[Words, Field(description="Strategies, as in finetune,imsr:retain.weight=1.")] = (
        "refit",
        "frozen",
        "finetune",
        "full",
        "imsr",
    )
    extra_pairs: Annotated[Words, Field(description="Further pairs, as in comirec-dr-k1/finetune.")] = ()
    controls: Annotated[Words, Field(description="Controls to run beside the models; all unless given.")] = field(
        default_factory=control_names
    )
    seeds: Annotated[Count, Field(description="Number of training seeds.")] = 1
    cadence: Annotated[  # with several, trained models are replayed at the first only
        Cadence, Field(description="Blocks per span; counting models learn after each. 1,4 for both.")
    ] = (1,)
    min_history: Annotated[CountOrZero, Field(description="Events that a user needs before a target.")] = 1
    tune: Annotated[bool, Field(description="Choose the options of each update on the span before.")] = False
    unseen: Annotated[
        Unseen, Field(description="Targets whose items are new to all: counted as a miss, or dropped.")
    ] = "miss"
    averaging: Annotated[
        Averaging,
        Field(description="What weighs equally within a span: users or targets; pooled = all targets together."),
    ] = "users"
    from_span: Annotated[Count, Field(description="First span of means and tests; earlier ones are shown alone.")] = 1
    last_update: Annotated[
        bool, Field(description="Train on the last span too, although nothing tests that update.")
    ] = True
    metrics: Annotated[Words, Field(description="As in ndcg@20,hr@10.")] = ("hr@20", "ndcg@20", "mrr@20", "recall@20")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Recipe:
    """A whole replay."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    log: LogRecipe = LogRecipe()
    spans: SplitConfig = SplitConfig()
    replay: ReplayRecipe = field(default_factory=ReplayRecipe)


def load_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file, and what it extends. OptionError where it is no TOML, or has an unknown key."""
    return parse_recipe(_tables(path, ()))


def _tables(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    """The tables of a file over those of the file it extends; `children` are the files that led here."""
    if path in children:
        raise OptionError(f"{path} extends itself, by way of {children[-1]}; drop one `extends`.")
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise OptionError(f"{path} is not a readable recipe ({problem}).") from None
    parent = tables.pop("extends", None)
    if parent is None:
        return tables
    if not (path.parent / f"{parent}.toml").exists():
        raise unknown_name_error(
            f"recipe beside {path}", str(parent), [file.stem for file in path.parent.glob("*.toml")]
        )
    return merge_tables(_tables(path.parent / f"{parent}.toml", (*children, path)), tables)


def merge_tables(tables: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`tables` with the keys of `changes` in place of their own, section by section; a list replaces a list."""
    merged = dict(tables)
    for section, table in changes.items():
        old = merged.get(section)
        merged[section] = old | table if isinstance(old, dict) and isinstance(table, dict) else table
    return merged


def parse_recipe(tables: dict[str, Any]) -> Recipe:
    """The recipe of nested dictionaries. OptionError with the nearest valid key or value.

    Keys may have their former names, with a warning.
    """
    try:
        current_tables = {name: _with_current_keys(name, table) for name, table in tables.items()}
        return TypeAdapter(Recipe).validate_python(current_tables)
    except ValidationError as problem:
        raise option_error(problem, Recipe, "recipe key {}") from None


def _with_current_keys(section: str, table: Any) -> Any:
    former = RECIPE_KEYS.get(section, {})
    for key in former.keys() & table.keys() if isinstance(table, dict) else ():
        warnings.warn(describe_rename(f"recipe key {section}.{key}", former[key]), FutureWarning, stacklevel=3)
    return with_current_keys(table, former)


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as resolved: every option, defaults too."""
    path.write_text(tomli_w.dumps(asdict(recipe)))
