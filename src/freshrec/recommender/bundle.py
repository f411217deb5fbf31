"""A complete recommender: the state that is served, the strategy that updates it, and the files of both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from freshrec.config import name_of
from freshrec.data.catalog import Catalog
from freshrec.data.histories import concat_events, row_users
from freshrec.errors import StateError
from freshrec.forks import require_threads
from freshrec.models import MODELS, find_model
from freshrec.models.absorb import absorb_block
from freshrec.models.popularity import PopularitySpec
from freshrec.models.requirements import build_model
from freshrec.recommender.log_reading import EncodedEvents, ReadOptions
from freshrec.recommender.served_state import ServedState
from freshrec.recommender.serving_bundle import (
    CATEGORIES_FILE,
    ITEMS_FILE,
    SERVED_FILE,
    USERS_FILE,
    ServingBundle,
    read_catalog,
    read_parquet_file,
    read_serving_bundle,
    require_files,
    write_serving_bundle,
)
from freshrec.replay.measure import Queries
from freshrec.store.checkpoint import check_modules, load_tree, save_tree
from freshrec.store.versions import LEGACY_FILE
from freshrec.strategies import STRATEGIES, find_strategy
from freshrec.strategies.compatible import check_compatible, default_strategy, next_state
from freshrec.types import Histories, ModelSpec, Span, State, Strategy

LEGACY_FORMAT = 2  # of folders that `Recommender.save` wrote before stores existed
LEARNING_FILE, QUERIES_FILE = "learning.safetensors", "asked.safetensors"
LEGACY_STATE_FILE = "state.safetensors"  # in older versions, instead of SERVED_FILE and LEARNING_FILE


@dataclass(frozen=True, eq=False)
class Bundle:
    """The content of a version, without its manifest."""

    served: ServedState
    strategy: Strategy
    names: tuple[str, str]  # model and strategy, as the user typed them
    read_options: ReadOptions = ReadOptions()
    holdout_queries: tuple[Queries, ...] = ()  # on which earlier versions were tested, oldest first

    @property
    def recipe(self) -> dict[str, Any]:
        """Model and strategy with all options, and the seed, as JSON values."""
        state, (model, strategy) = self.served.state, self.names
        spec, own = state.model.spec, self.strategy
        options = {"model_options": asdict(spec), "strategy_options": asdict(own) if is_dataclass(own) else {}}
        content = {"model": model, "strategy": strategy, "seed": state.seed, **options}
        return dict(json.loads(json.dumps(content, default=str)))

    @property
    def sizes(self) -> dict[str, int]:
        """Number of events, users and items, including pending events."""
        served = self.served
        return {"events": len(served.counts.histories.items_R), "users": len(served.users), "items": len(served.items)}


def new_bundle(
    model: str | ModelSpec | type[ModelSpec],
    strategy: str | Strategy | type[Strategy] | None,
    seed: int,
    read_options: ReadOptions = ReadOptions(),  # noqa: B008
) -> Bundle:
    """Return a bundle without events.

    The default strategy is `refit` for the blend, `absorb` for other counting models and `finetune` for trained ones.
    Raises OptionError for an unknown name and IncompatibleError if the strategy cannot update the model.
    """
    spec = find_model(model)
    empty_model = build_model(spec, model if isinstance(model, str) else type(spec).__name__, seed)
    strategy = default_strategy(empty_model) if strategy is None else strategy
    chosen_strategy = find_strategy(strategy)
    model = model if isinstance(model, str) else name_of(spec, MODELS)
    strategy = strategy if isinstance(strategy, str) else name_of(chosen_strategy, STRATEGIES)
    check_compatible(spec, model, chosen_strategy, strategy)
    counts = State(PopularitySpec(weighting="decay").build(seed))
    served = ServedState(State(empty_model, seed=seed), counts, Catalog.empty(), Catalog.empty())
    return Bundle(served, chosen_strategy, (model, strategy), read_options)


def learn_events(bundle: Bundle, new: EncodedEvents, n_learned: int | None = None) -> Bundle:
    """Return the bundle after learning the pending events and the first `n_learned` new events (default: all).

    The remaining new events become pending. Late events are sorted into the history of their user.
    """
    served_before, n_learned = bundle.served, len(new.events) if n_learned is None else n_learned
    due = concat_events((served_before.pending, new.events[:n_learned]))
    known = [(due.users_E, served_before.state.histories.n_users), (due.items_E, served_before.state.model.n_items)]
    sizes = [max(int(rows_E.max()) if len(due) else 0, n) for rows_E, n in known]
    state = absorb_block(served_before.state, due, *sizes)
    state = replace(state, histories=sort_by_time(state.histories))
    state = next_state(bundle.strategy, state, Span(state.spans_seen, due, *sizes))
    counts = absorb_block(served_before.counts, new.events, len(new.users), len(new.items))
    served = ServedState(state, counts, new.users, new.items, new.categories, new.events[n_learned:])
    return replace(bundle, served=served)


def sort_by_time(histories: Histories) -> Histories:
    """Sort the rows of each user by time. Ties keep their order."""
    users_R = row_users(histories)
    if bool(((histories.times_R.diff() >= 0) | (users_R.diff() > 0)).all()):
        return histories  # the usual case: no late events
    by_time_R = histories.times_R.argsort(stable=True)
    order_R = by_time_R[users_R[by_time_R].argsort(stable=True)]
    columns = (histories.items_R[order_R], histories.times_R[order_R], histories.due_R[order_R])
    return Histories(histories.offsets_U, *columns, histories.impressions, histories.categories_I)


def write_bundle(bundle: Bundle, folder: Path) -> None:
    """Write the files of a version to `folder`."""
    served = bundle.served
    state = served.state
    learning = (bundle.strategy, state.memory, state.costs, state.shared_base)
    write_serving_bundle(ServingBundle(served, bundle.names, bundle.read_options), folder)
    save_tree(learning, folder / LEARNING_FILE)
    save_tree(bundle.holdout_queries, folder / QUERIES_FILE)


def read_bundle(files: Mapping[str, Path]) -> Bundle:
    """Read what `write_bundle` wrote. Raises StateError for missing or damaged files."""
    require_files(files, (QUERIES_FILE, USERS_FILE, ITEMS_FILE, CATEGORIES_FILE))
    if LEGACY_STATE_FILE in files:
        strategy, names, read_options, state, counts, pending = load_tree(files[LEGACY_STATE_FILE])
        users, items = (read_catalog(files[name]) for name in (USERS_FILE, ITEMS_FILE))
        served = ServedState(state, counts, users, items, read_parquet_file(files[CATEGORIES_FILE]), pending)
        return Bundle(served, strategy, names, read_options, load_tree(files[QUERIES_FILE]))
    require_files(files, (LEARNING_FILE,))
    check_modules(files[name] for name in (SERVED_FILE, LEARNING_FILE) if name in files)
    serving_bundle = read_serving_bundle(files, load_tree)
    strategy, memory, costs, base_state = load_tree(files[LEARNING_FILE])
    state = replace(serving_bundle.served.state, memory=memory, costs=costs, shared_base=base_state)
    return Bundle(
        replace(serving_bundle.served, state=state),
        strategy,
        serving_bundle.names,
        serving_bundle.read_options,
        load_tree(files[QUERIES_FILE]),
    )


def read_legacy_bundle(folder: Path) -> Bundle:
    """Read a folder that `Recommender.save` wrote before stores existed. Raises StateError for anything else."""
    require_threads()
    path = folder / LEGACY_FILE
    try:
        info = json.loads(path.read_bytes())
        part, names, file_format = folder / f"part-{info['part']:d}", (info["model"], info["strategy"]), info["format"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise StateError(f"{path} cannot be read ({problem}). Fit again and save to a new folder.") from None
    if file_format != LEGACY_FORMAT:
        raise StateError(
            f"{path} has format {file_format}, but this freshrec reads format {LEGACY_FORMAT}. Fit again and save."
        )
    strategy, read_options, state, counts = load_tree(part / LEGACY_STATE_FILE)
    users, items = (read_catalog(part / name) for name in (USERS_FILE, ITEMS_FILE))
    return Bundle(ServedState(state, counts, users, items), strategy, names, read_options)
