"""Turn a recipe into a replay: its log, spans, settings and runs."""

from pathlib import Path

import polars as pl

from freshrec.data.duplicates import drop_duplicates
from freshrec.data.log import Log, events_before, keep_positives, read_log
from freshrec.data.split import LogSplit, split_log
from freshrec.data.synthetic import make_world
from freshrec.errors import IncompatibleError, LogError, OptionError
from freshrec.models import COUNTING_MODELS, find_model
from freshrec.replay.cell import Cell, ReplaySettings, check_click_model
from freshrec.replay.click_metrics import find_click_metric
from freshrec.replay.measure import QueryOptions
from freshrec.replay.metrics import n_sampled_items, parse_metric
from freshrec.replay.recipe_schema import Recipe, ReplayRecipe
from freshrec.strategies import find_strategy
from freshrec.strategies.compatible import check_compatible, default_strategy
from freshrec.types import VALID, TrainedModel


def load_log(recipe: Recipe) -> Log:
    """Read the events of a recipe: interactions, and exposures if the recipe asks for them."""
    log_recipe = recipe.log
    if log_recipe.world and log_recipe.path:
        raise OptionError(
            f"A replay uses one log, and both {log_recipe.path} and the world {log_recipe.world} are given. Remove one."
        )
    if log_recipe.world:
        sizes = {"users": log_recipe.world_users, "items": log_recipe.world_items, "events": log_recipe.world_events}
        return make_world(log_recipe.world, **sizes, spans=recipe.spans.spans, seed=log_recipe.seed).log
    if not log_recipe.path:
        raise OptionError("A replay needs a log. Give LOG, --world NAME, or log.path in the recipe.")
    columns, events, users = log_recipe.columns, log_recipe.events, log_recipe.users or None
    path = Path(log_recipe.folder) / log_recipe.path
    if not path.exists() and not Path(log_recipe.path).is_absolute():
        raise LogError(f"There is no file {path}. Check the path, or name the folder of the log with --data.")
    log = read_log(
        path,
        columns=columns,
        format=log_recipe.format or None,
        events=events,
        separator=log_recipe.separator or None,
        min_rating=log_recipe.min_rating,
        users=users,
        seed=log_recipe.seed,
        time_format=log_recipe.time_format or None,
    )
    if log_recipe.exposures and not (log.frame.get_column("label", default=pl.Series([None])) == 0).any():
        raise LogError(
            "The recipe asks for exposures, but no row has the label 0. Name the column, such as --columns label=click."
        )
    log = events_before(log, log_recipe.until) if log_recipe.until else log
    return drop_duplicates(log if log_recipe.exposures else keep_positives(log))


def load_split(recipe: Recipe) -> LogSplit:
    """Split the log of a recipe into spans. Raises OptionError for tuning without validation events."""
    split = split_log(load_log(recipe), recipe.spans, seed=recipe.log.seed)
    if recipe.replay.tune and not any(bool((span.events.role_E == VALID).any()) for span in split.spans[2:]):
        raise OptionError(
            "Tuning needs validation events in spans 2, 3, ..., and there are none. "
            "Use --targets last and at least 2 spans, or leave --tune out."
        )
    return split


def make_replay_settings(recipe: Recipe) -> ReplaySettings:
    """Return the settings that all runs share."""
    replay_recipe = recipe.replay
    if recipe.log.exposures:
        for metric in replay_recipe.metrics:
            find_click_metric(metric)
        defaults = ReplayRecipe.unseen, ReplayRecipe.averaging
        if replay_recipe.tune or (replay_recipe.unseen, replay_recipe.averaging) != defaults:
            raise OptionError(
                "tune, unseen and averaging apply to rankings. Leave them out on a log with exposures, where auc and "
                "logloss always cover all exposures of a span."
            )
        query_options = QueryOptions(min_history=replay_recipe.min_history)
        return ReplaySettings(query_options, last_update=replay_recipe.last_update)
    for metric in replay_recipe.metrics:
        parse_metric(metric)
    query_options = QueryOptions(
        min_history=replay_recipe.min_history,
        n_sampled=n_sampled_items(replay_recipe.metrics),
        unseen=replay_recipe.unseen,
    )
    return ReplaySettings(query_options, replay_recipe.tune, replay_recipe.last_update)


def make_cells(recipe: Recipe) -> list[Cell]:
    """Return the runs of `pairs_to_compare`, once per seed and cadence.

    A trained model is trained at the end of a span, so it is replayed at the first cadence only.
    """
    replay_recipe = recipe.replay
    cells: list[Cell] = []
    for model, strategy in pairs_to_compare(recipe)[0]:
        spec, chosen_strategy = find_model(model), find_strategy(strategy)
        seeds = 1 if model.partition(":")[0] in COUNTING_MODELS else replay_recipe.seeds
        is_trained = isinstance(spec.build(0), TrainedModel)
        for cadence in replay_recipe.cadence[:1] if is_trained else dict.fromkeys(replay_recipe.cadence):
            label = strategy if cadence == 1 else f"{strategy} x{cadence}"
            cells += [Cell(model, spec, label, chosen_strategy, seed, cadence) for seed in range(seeds)]
    return cells


def pairs_to_compare(recipe: Recipe) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the pairs of a model and a strategy that are compared, and a sentence on each pair that is left out.

    The pairs are every control, every model with every strategy that can update it, and `extra_pairs`. A model that
    none of the strategies can update is compared with its default strategy. IncompatibleError for an extra pair that
    does not fit, for a model that cannot predict clicks on a log with exposures, and for a strategy that was asked for
    and fits none of the models.
    """
    part, notes = recipe.replay, list[str]()
    pairs = [] if recipe.log.exposures else [(name, "absorb") for name in part.controls]  # they predict no clicks
    fitting: set[str] = set()
    problems: dict[str, IncompatibleError] = {}
    for model in part.models:
        chosen, unfit = list[str](), list[str]()
        for strategy in part.strategies:
            try:
                _check_pair(recipe, model, strategy)
                chosen.append(strategy)
            except IncompatibleError as problem:
                problems.setdefault(strategy, problem)
                unfit.append(strategy)
        fitting.update(chosen)
        instead = ""
        if not chosen:
            default = default_strategy(find_model(model).build(0))
            _check_pair(recipe, model, default)
            chosen, instead = [default], f" It is compared with its default strategy, {default}."
        if unfit and tuple(part.strategies) != ReplayRecipe.strategies:
            notes.append(f"{model} cannot be updated by {', '.join(unfit)}.{instead}")
        pairs += [(model, strategy) for strategy in chosen]
    if tuple(part.strategies) != ReplayRecipe.strategies and part.models:
        for strategy, reason in problems.items():
            if strategy not in fitting:
                raise reason
    for model, _, strategy in (pair.partition("/") for pair in part.extra_pairs):
        _check_pair(recipe, model, strategy)
        pairs.append((model, strategy))
    return list(dict.fromkeys(pairs)), notes


def _check_pair(recipe: Recipe, model: str, strategy: str) -> None:
    """Raise IncompatibleError if the strategy cannot update the model, or the model cannot predict clicks."""
    spec = find_model(model)
    check_compatible(spec, model, find_strategy(strategy), strategy)
    if recipe.log.exposures:
        check_click_model(spec, model)
