"""All that a recommender is: what it serves, how it learns, and how both lie in a version of a store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from freshrec.data.catalog import Catalog
from freshrec.data.histories import concat_events, row_users
from freshrec.disk_names import tag_of
from freshrec.errors import StateError
from freshrec.models import find_model
from freshrec.models.absorb import absorb_block
from freshrec.models.blend.model import Blend
from freshrec.models.popularity import PopularitySpec
from freshrec.models.requirements import build_model
from freshrec.recommender.log_reading import EncodedEvents, ReadOptions
from freshrec.recommender.served_state import ServedState
from freshrec.recommender.serving_bundle import (
    CATEGORIES_FILE,
    ITEMS_FILE,
    USERS_FILE,
    ServingBundle,
    read_catalog,
    read_parquet_file,
    read_serving_bundle,
    require_files,
    write_serving_bundle,
)
from freshrec.replay.measure import Queries
from freshrec.store.checkpoint import load_tree, save_tree
from freshrec.store.versions import LEGACY_FILE
from freshrec.strategies import find_strategy
from freshrec.strategies.compatible import check_compatible
from freshrec.types import Histories, ModelSpec, Span, State, Strategy, TrainedModel

LEGACY_FORMAT = 2  # of what was saved before there were stores
LEARNING_FILE, QUERIES_FILE = "learning.safetensors", "asked.safetensors"
LEGACY_STATE_FILE = (
    "state.safetensors"  # what both SERVED_FILE and LEARNING_FILE hold, in versions of before there was serving
)


@dataclass(frozen=True, eq=False)
class Bundle:
    """What a version holds, beside its manifest."""

    served: ServedState
    strategy: Strategy
    names: tuple[str, str]  # of model and strategy, as the user named them
    read_options: ReadOptions = ReadOptions()
    holdout_queries: tuple[Queries, ...] = ()  # by which earlier versions were tested, the oldest first

    @property
    def recipe(self) -> dict[str, Any]:
        """Model and strategy with all options, and the seed, as JSON holds them."""
        state, (model, strategy) = self.served.state, self.names
        spec, own = state.model.spec, self.strategy
        options = {"model_options": asdict(spec), "strategy_options": asdict(own) if is_dataclass(own) else {}}
        content = {"model": model, "strategy": strategy, "seed": state.seed, **options}
        return dict(json.loads(json.dumps(content, default=str)))

    @property
    def sizes(self) -> dict[str, int]:
        """How many events, users and items it knows, those that the model is to learn next included."""
        served = self.served
        return {"events": len(served.counts.histories.items_R), "users": len(served.users), "items": len(served.items)}


def new_bundle(
    model: str | ModelSpec,
    strategy: str | Strategy | None,
    seed: int,
    read_options: ReadOptions = ReadOptions(),  # noqa: B008
) -> Bundle:
    """One that knows nothing yet.

    Without a strategy a model is fine-tuned; one that counts absorbs; a blend is refitted. OptionError for an unknown
    name, IncompatibleError where the strategy cannot update the model.
    """
    spec = find_model(model) if isinstance(model, str) else model
    empty_model = build_model(spec, model if isinstance(model, str) else type(model).__name__, seed)
    if strategy is None:
        default_counting = "refit" if isinstance(empty_model, Blend) else "absorb"
        strategy = "finetune" if isinstance(empty_model, TrainedModel) else default_counting
    chosen_strategy = find_strategy(strategy)
    model = model if isinstance(model, str) else tag_of(type(model))
    strategy = strategy if isinstance(strategy, str) else tag_of(type(chosen_strategy))
    check_compatible(spec, model, chosen_strategy, strategy)
    counts = State(PopularitySpec(weighting="decay").build(seed))
    served = ServedState(State(empty_model, seed=seed), counts, Catalog.empty(), Catalog.empty())
    return Bundle(served, chosen_strategy, (model, strategy), read_options)


def learn_events(bundle: Bundle, new: EncodedEvents, n_learnt: int | None = None) -> Bundle:
    """After learning from what was pending and from the first `n_learnt` new events, or all; the rest is pending.

    Rows that are older than others of their user take their place in the history.
    """
    served_before, n_learnt = bundle.served, len(new.events) if n_learnt is None else n_learnt
    due = concat_events((served_before.pending, new.events[:n_learnt]))
    known = [(due.users_E, served_before.state.histories.n_users), (due.items_E, served_before.state.model.n_items)]
    sizes = [max(int(rows_E.max()) if len(due) else 0, n) for rows_E, n in known]
    state = absorb_block(served_before.state, due, *sizes)
    state = replace(state, histories=sort_by_time(state.histories))
    state = bundle.strategy.update(state, Span(state.spans_seen, due, *sizes))
    counts = absorb_block(served_before.counts, new.events, len(new.users), len(new.items))
    served = ServedState(state, counts, new.users, new.items, new.categories, new.events[n_learnt:])
    return replace(bundle, served=served)


def sort_by_time(histories: Histories) -> Histories:
    """Each user's rows by time; those that tie stay in their order."""
    users_R = row_users(histories)
    if bool(((histories.times_R.diff() >= 0) | (users_R.diff() > 0)).all()):
        return histories  # as nearly always: nothing came late
    by_time_R = histories.times_R.argsort(stable=True)
    order_R = by_time_R[users_R[by_time_R].argsort(stable=True)]
    columns = (histories.items_R[order_R], histories.times_R[order_R], histories.due_R[order_R])
    return Histories(histories.offsets_U, *columns, histories.impressions, histories.categories_I)


def write_bundle(bundle: Bundle, folder: Path) -> None:
    """Write to a folder, which a store then makes a version."""
    served = bundle.served
    state = served.state
    learning = (bundle.strategy, state.memory, state.costs, state.shared_base)
    write_serving_bundle(ServingBundle(served, bundle.names, bundle.read_options), folder)
    save_tree(learning, folder / LEARNING_FILE)
    save_tree(bundle.holdout_queries, folder / QUERIES_FILE)


def read_bundle(files: Mapping[str, Path]) -> Bundle:
    """What `write_bundle` wrote. StateError where it is not that."""
    require_files(files, (QUERIES_FILE, USERS_FILE, ITEMS_FILE, CATEGORIES_FILE))
    if LEGACY_STATE_FILE in files:
        strategy, names, read_options, state, counts, pending = load_tree(files[LEGACY_STATE_FILE])
        users, items = (read_catalog(files[name]) for name in (USERS_FILE, ITEMS_FILE))
        served = ServedState(state, counts, users, items, read_parquet_file(files[CATEGORIES_FILE]), pending)
        return Bundle(served, strategy, names, read_options, load_tree(files[QUERIES_FILE]))
    require_files(files, (LEARNING_FILE,))
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
    """What `Recommender.save` wrote before there were stores. StateError where it is not that."""
    path = folder / LEGACY_FILE
    try:
        info = json.loads(path.read_bytes())
        part, names, file_format = folder / f"part-{info['part']:d}", (info["model"], info["strategy"]), info["format"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise StateError(f"{path} cannot be read ({problem}); fit again, and save to a new folder.") from None
    if file_format != LEGACY_FORMAT:
        raise StateError(f"{path} has format {file_format}, this freshrec reads {LEGACY_FORMAT}; fit again, and save.")
    strategy, read_options, state, counts = load_tree(part / LEGACY_STATE_FILE)
    users, items = (read_catalog(part / name) for name in (USERS_FILE, ITEMS_FILE))
    return Bundle(ServedState(state, counts, users, items), strategy, names, read_options)
