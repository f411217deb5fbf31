"""A recipe -> what a replay runs: its log, the cut of it, the settings, and the cells."""

from pathlib import Path

import polars as pl

from freshrec.data.log import Log, before, positives, read_log
from freshrec.data.spans import Cut, cut
from freshrec.data.worlds import make
from freshrec.errors import IncompatibleError, LogError, OptionError
from freshrec.models import COUNTERS, find_model
from freshrec.replay.clicks import click_metric
from freshrec.replay.measure import Asked
from freshrec.replay.metrics import parse, sampled
from freshrec.replay.recipe_schema import Recipe, ReplayRecipe
from freshrec.replay.replay import Cell, Settings, check_clicks
from freshrec.strategies import find_strategy
from freshrec.strategies.compatible import check_compatible
from freshrec.types import VALID, TrainedModel


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
    spans = cut(log_of(recipe), recipe.spans, seed=recipe.log.seed)
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
        if part.tune or part.unseen != ReplayRecipe.unseen or part.mean != ReplayRecipe.mean:
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
            check_compatible(spec, model, update, strategy)
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
