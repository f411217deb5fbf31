"""All that a recommender is: what it serves, how it learns, and how both lie in a version of a store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from freshrec.data.batches import joined_events, owners
from freshrec.data.catalog import Catalog
from freshrec.disk_names import tag_of
from freshrec.errors import StateError
from freshrec.models import find_model
from freshrec.models.blend import Blend
from freshrec.models.checkpoint import load_tree, save_tree
from freshrec.models.counted import absorb
from freshrec.models.popularity import PopularitySpec
from freshrec.models.requirements import build_model
from freshrec.replay.measure import Queries
from freshrec.serve.reading import Numbered, Reading
from freshrec.serve.recommend import Served
from freshrec.serve.saved import (
    CATEGORIES,
    ITEMS,
    USERS,
    Kept,
    catalog_in,
    must_have,
    parquet_in,
    read_served,
    write_served,
)
from freshrec.store.versions import OLDER
from freshrec.strategies import find_strategy
from freshrec.strategies.compatible import check_compatible
from freshrec.types import Histories, ModelSpec, Span, State, Strategy, TrainedModel

OLDER_FORMAT = 2  # of what was saved before there were stores
LEARNING, ASKED = "learning.safetensors", "asked.safetensors"
STATE = "state.safetensors"  # what both SERVED and LEARNING hold, in versions of before there was serving


@dataclass(frozen=True, eq=False)
class Contents:
    """What a version holds, beside its manifest."""

    served: Served
    strategy: Strategy
    names: tuple[str, str]  # of model and strategy, as they were asked for
    reading: Reading = Reading()
    asked: tuple[Queries, ...] = ()  # by which earlier versions were tested, the oldest first

    @property
    def recipe(self) -> dict[str, Any]:
        """Model and strategy with all options, and the seed, as JSON holds them."""
        state, (model, strategy) = self.served.state, self.names
        spec, own = state.model.spec, self.strategy
        options = {"model_options": asdict(spec), "strategy_options": asdict(own) if is_dataclass(own) else {}}
        whole = {"model": model, "strategy": strategy, "seed": state.seed, **options}
        return dict(json.loads(json.dumps(whole, default=str)))

    @property
    def sizes(self) -> dict[str, int]:
        """How many events, users and items it knows, those that the model is to learn next included."""
        served = self.served
        return {"events": len(served.counts.recent.items_R), "users": len(served.users), "items": len(served.items)}


def begun(model: str | ModelSpec, strategy: str | Strategy | None, seed: int, reading: Reading = Reading()) -> Contents:  # noqa: B008
    """One that knows nothing yet.

    Without a strategy a model is fine-tuned; one that counts absorbs; a blend is refitted. OptionError for an unknown
    name, IncompatibleError where the strategy cannot update the model.
    """
    spec = find_model(model) if isinstance(model, str) else model
    empty = build_model(spec, model if isinstance(model, str) else type(model).__name__, seed)
    if strategy is None:
        counting = "refit" if isinstance(empty, Blend) else "absorb"
        strategy = "finetune" if isinstance(empty, TrainedModel) else counting
    update = find_strategy(strategy)
    model = model if isinstance(model, str) else tag_of(type(model))
    strategy = strategy if isinstance(strategy, str) else tag_of(type(update))
    check_compatible(spec, model, update, strategy)
    counts = State(PopularitySpec(keep="decay").build(seed))
    served = Served(State(empty, seed=seed), counts, Catalog.empty(), Catalog.empty())
    return Contents(served, update, (model, strategy), reading)


def taught(contents: Contents, new: Numbered, n_learnt: int | None = None) -> Contents:
    """After learning from what was pending and from the first `n_learnt` new events, or all; the rest is pending.

    Rows that are older than others of their user take their place in the history.
    """
    before, n_learnt = contents.served, len(new.events) if n_learnt is None else n_learnt
    due = joined_events((before.pending, new.events[:n_learnt]))
    known = [(due.users_E, before.state.recent.n_users), (due.items_E, before.state.model.n_items)]
    sizes = [max(int(rows_E.max()) if len(due) else 0, n) for rows_E, n in known]
    state = absorb(before.state, due, *sizes)
    state = replace(state, recent=in_time_order(state.recent))
    state = contents.strategy.update(state, Span(state.spans_seen, due, *sizes))
    counts = absorb(before.counts, new.events, len(new.users), len(new.items))
    served = Served(state, counts, new.users, new.items, new.categories, new.events[n_learnt:])
    return replace(contents, served=served)


def in_time_order(histories: Histories) -> Histories:
    """Each user's rows by time; those that tie stay in their order."""
    users_R = owners(histories)
    if bool(((histories.times_R.diff() >= 0) | (users_R.diff() > 0)).all()):
        return histories  # as nearly always: nothing came late
    by_time_R = histories.times_R.argsort(stable=True)
    order_R = by_time_R[users_R[by_time_R].argsort(stable=True)]
    columns = (histories.items_R[order_R], histories.times_R[order_R], histories.due_R[order_R])
    return Histories(histories.offsets_U, *columns, histories.shown, histories.kinds_I)


def write_contents(contents: Contents, folder: Path) -> None:
    """Write to a folder, which a store then makes a version."""
    served = contents.served
    state = served.state
    learning = (contents.strategy, state.memory, state.costs, state.started)
    write_served(Kept(served, contents.names, contents.reading), folder)
    save_tree(learning, folder / LEARNING)
    save_tree(contents.asked, folder / ASKED)


def read_contents(files: Mapping[str, Path]) -> Contents:
    """What `write_contents` wrote. StateError where it is not that."""
    must_have(files, (ASKED, USERS, ITEMS, CATEGORIES))
    if STATE in files:
        strategy, names, reading, state, counts, pending = load_tree(files[STATE])
        users, items = (catalog_in(files[name]) for name in (USERS, ITEMS))
        served = Served(state, counts, users, items, parquet_in(files[CATEGORIES]), pending)
        return Contents(served, strategy, names, reading, load_tree(files[ASKED]))
    must_have(files, (LEARNING,))
    kept = read_served(files, load_tree)
    strategy, memory, costs, started = load_tree(files[LEARNING])
    state = replace(kept.served.state, memory=memory, costs=costs, started=started)
    return Contents(replace(kept.served, state=state), strategy, kept.names, kept.reading, load_tree(files[ASKED]))


def read_older(folder: Path) -> Contents:
    """What `Recommender.save` wrote before there were stores. StateError where it is not that."""
    path = folder / OLDER
    try:
        about = json.loads(path.read_bytes())
        part, names, wrote = folder / f"part-{about['part']:d}", (about["model"], about["strategy"]), about["format"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise StateError(f"{path} cannot be read ({problem}); fit again, and save to a new folder.") from None
    if wrote != OLDER_FORMAT:
        raise StateError(f"{path} has format {wrote}, this freshrec reads {OLDER_FORMAT}; fit again, and save.")
    strategy, reading, state, counts = load_tree(part / STATE)
    users, items = (catalog_in(part / name) for name in (USERS, ITEMS))
    return Contents(Served(state, counts, users, items), strategy, names, reading)
