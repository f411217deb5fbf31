"""The Python face: fit a recommender, update it from new events only, ask it, save it.

The same pieces as in a replay: fit = absorb and update on span 0, update = the same on the next span. Ids are the
user's own everywhere. A saved recommender is a folder of safetensors, Parquet and JSON, without pickle.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import polars as pl
import torch
from torch import Tensor

from freshrec.data.catalog import Catalog
from freshrec.data.log import Log, positives, read_log
from freshrec.errors import LogError, OptionError, StateError
from freshrec.learn.checkpoint import load_tree, save_text, save_tree
from freshrec.models import find_model
from freshrec.models.blend import Blend
from freshrec.models.popularity import PopularitySpec
from freshrec.replay.measure import Asked, Block, queries_of, rank_queries
from freshrec.replay.metrics import evaluate, parse, per_user
from freshrec.replay.replay import absorb, check, told
from freshrec.replay.significance import interval
from freshrec.serve.recommend import Served, Wanted, best_items, reasons, similar_items
from freshrec.strategies import find_strategy
from freshrec.types import TRAIN, Events, ModelSpec, Span, State, Strategy, TrainedModel

if TYPE_CHECKING:
    import pandas as pd

Source: TypeAlias = "str | Path | pl.DataFrame | pd.DataFrame"
Ids: TypeAlias = str | int | Sequence[str] | Sequence[int] | pl.Series  # one id or many

FORMAT = 2
ABOUT = "recommender.json"  # names the part that is current, and is written last


@dataclass(frozen=True)
class Reading:
    """How logs are read: the arguments of `read_log` given to `fit`, kept for the updates."""

    columns: dict[str, str] = field(default_factory=dict)
    format: str | None = None
    events: tuple[str, ...] = ()
    has_clock: bool = True  # whether the log of `fit` had one; new events must be alike


class Recommender:
    """A model that is updated from new events only.

    `model` and `strategy` are names, with options ("comirec-dr:k=1", "imsr:fit.epochs=5"), or instances of one's own.
    Without a strategy a model is fine-tuned; one that counts, such as item-knn, absorbs; a blend is refitted.
    OptionError for an unknown name, IncompatibleError where the strategy cannot update the model.
    """

    def __init__(self, model: str | ModelSpec = "blend", strategy: str | Strategy | None = None, seed: int = 0) -> None:
        spec = find_model(model) if isinstance(model, str) else model
        empty = spec.build(seed)
        if strategy is None:
            counting = "refit" if isinstance(empty, Blend) else "absorb"
            strategy = "finetune" if isinstance(empty, TrainedModel) else counting
        self.strategy = find_strategy(strategy) if isinstance(strategy, str) else strategy
        self.names = tuple(thing if isinstance(thing, str) else type(thing).__name__ for thing in (model, strategy))
        check(spec, self.names[0], self.strategy, self.names[1])
        counts = PopularitySpec(keep="decay").build(seed)
        self._empty = Served(State(empty, seed=seed), State(counts), Catalog.empty(), Catalog.empty())
        self._served, self._reading = self._empty, Reading()

    @property
    def served(self) -> Served:
        """The state and the catalogs of now. StateError before the first `fit`."""
        if self._served.state.spans_seen == 0:
            raise StateError("this recommender knows nothing yet; call fit(log) first, or load(folder).")
        return self._served

    def sizes(self) -> dict[str, int]:
        """How many events, users and items it has learnt from."""
        served = self.served
        return {"events": len(served.counts.recent.items_R), "users": len(served.users), "items": len(served.items)}

    def fit(
        self,
        log: Source,
        *,
        columns: Mapping[str, str] | None = None,
        format: str | None = None,
        events: Sequence[str] = (),
    ) -> Recommender:
        """Learn from a whole log; whatever was known before is forgotten.

        `log` is a file or a frame; `columns`, `format` and `events` are those of `read_log`, and hold for the updates
        too. Rows with label 0 (exposures) are left out. LogError where it is not a log.
        """
        reading = Reading(dict(columns or {}), format, tuple(events))
        read = _read(log, reading)
        self._served, self._reading = self._updated(self._empty, read), replace(reading, has_clock=read.has_clock)
        return self

    def update(self, new_events: Source) -> Recommender:
        """Learn from new events; only the new rows are needed.

        New users and items are welcome. LogError where a row is older than the newest one learnt; rows given twice
        count twice.
        """
        self._served = self._updated(self.served, _read_next(new_events, self._reading, self.served))
        return self

    partial_fit = update

    def _updated(self, before: Served, log: Log) -> Served:
        events, users, items = _numbered(before, log)
        sizes = len(users), len(items)
        state = absorb(before.state, events, *sizes)
        state = self.strategy.update(state, Span(state.spans_seen, events, *sizes))
        return Served(state, absorb(before.counts, events, *sizes), users, items)

    def recommend(
        self,
        users: Ids,
        k: int = 10,
        filter_seen: bool = True,
        allow: Ids | None = None,
        deny: Ids | None = None,
    ) -> pl.DataFrame:
        """The best items of each user, in the order given: user_id, item_id, score, rank (from 1), fallback.

        `filter_seen` leaves out all that the user has had; `allow` admits only these items, `deny` none of these. Where
        the model has nothing to say, popular items complete the list with their popularity as score, and `fallback`
        says why; elsewhere it is null. Unknown users are strangers, not errors; unknown items in `allow` and `deny` are
        ignored. A list is shorter than k where fewer items are left.
        """
        served = self.served
        ids = _ids("user_id", users, served.users)
        allow_M = None if allow is None else _item_rows(served, allow)
        deny_M = _item_rows(served, [] if deny is None else deny)
        wanted = Wanted(_positive(k), filter_seen, allow_M, deny_M)
        found = best_items(served, served.users.rows(ids), wanted)
        return found.select(
            ids.gather(found["nth"]), served.items.ids(_rows(found)).alias("item_id"), "score", "rank", "fallback"
        )

    def similar_items(self, items: Ids, k: int = 10) -> pl.DataFrame:
        """The items most like each of `items`: item_id, similar_id, score, rank.

        The score is the cosine of the item vectors; for item-knn, what a user with this one event would get.
        OptionError for an unknown item, IncompatibleError where the model does not relate items.
        """
        served = self.served
        ids = _ids("item_id", items, served.items)
        rows_N = _known_rows(ids, served.items)
        found = similar_items(served.state.model, rows_N, _positive(k))
        similar = served.items.ids(_rows(found)).alias("similar_id")
        return found.select(ids.gather(found["nth"]), similar, "score", "rank")

    def explain(self, user: str | int, item: str | int) -> pl.DataFrame:
        """Why a blend offers a user an item: source, place, points, because; the weightiest reason first.

        A source is an expert, or a kind of fact. `place`: of the item among those that the expert offers (the trained
        expert: among what anybody offers). `points`: what it adds to the logarithm of the score, above the user's
        candidates on average. `because`: the item of the user's history that speaks most for it. No rows: the item is
        not offered. OptionError for unknown ids, IncompatibleError for other models.
        """
        served = self.served
        if not isinstance(user, str | int) or not isinstance(item, str | int):
            raise OptionError("one user and one item are explained at a time; give an id of each.")
        users_1 = _known_rows(_ids("user_id", user, served.users), served.users)
        items_1 = _known_rows(_ids("item_id", item, served.items), served.items)
        found = reasons(served, users_1, int(items_1))
        return found.with_columns(served.items.ids(_rows(found, "because")).alias("because"))

    def evaluate(self, new_events: Source, metrics: Sequence[str] = ("hr@20", "ndcg@20")) -> pl.DataFrame:
        """How well new events are predicted, before they are learnt: metric, value, low, high (95 %), n, n_users.

        Every event is asked for with all of its user's events before it, those among the new ones too, and ranked among
        all known items; an unknown item is a miss (but what counts may offer a user an own one again). A user's very
        first event is not asked for. Users weigh equally; `n` counts events. Nothing is learnt: call it before
        `update`, which takes the same rows.
        """
        for metric in metrics:
            parse(metric)
        served = self.served
        events, users, items = _numbered(served, _read_next(new_events, self._reading, served))
        block, state = Block(events, 0, len(users), len(served.items)), told(served.state, len(items))
        queries = queries_of(served.state.recent, block, served.state.model.spec.length, Asked(TRAIN))
        if not len(queries):
            raise LogError("no user of the new events has an event before, so nothing can be asked; give more rows.")
        values_QM = evaluate(rank_queries(state, queries).numpy(), metrics)
        _, values_UM = per_user(queries.users_N.numpy(), values_QM)
        low_M, high_M = interval(values_UM)
        columns = {"metric": list(metrics), "value": values_UM.mean(0), "low": low_M, "high": high_M}
        return pl.DataFrame(columns).with_columns(n=pl.lit(len(queries)), n_users=pl.lit(len(values_UM)))

    def save(self, folder: str | Path) -> None:
        """Write to `folder`: until all is written, the recommender that was there before stays, whole."""
        served, folder = self.served, Path(folder)
        check_folder(folder)
        about = folder / ABOUT
        number = _about(folder)["part"] + 1 if about.exists() else 1
        part = folder / f"part-{number}"
        part.mkdir(parents=True, exist_ok=True)
        save_tree((self.strategy, self._reading, served.state, served.counts), part / "state.safetensors")
        served.users.frame.write_parquet(part / "users.parquet")
        served.items.frame.write_parquet(part / "items.parquet")
        model, strategy = self.names
        text = {"format": FORMAT, "part": number, "model": model, "strategy": strategy, "seed": served.state.seed}
        save_text(json.dumps(text), about)
        for old in folder.glob("part-*"):
            if old != part:
                shutil.rmtree(old)

    @staticmethod
    def load(folder: str | Path) -> Recommender:
        """The recommender in `folder`. StateError where there is none, or it is damaged or of another format."""
        about = _about(Path(folder))
        part = Path(folder) / f"part-{about['part']}"
        strategy, reading, state, counts = load_tree(part / "state.safetensors")
        recommender = Recommender(state.model.spec, strategy, state.seed)
        recommender.names = (about["model"], about["strategy"])
        users, items = (_catalog(part / name) for name in ("users.parquet", "items.parquet"))
        recommender._served, recommender._reading = Served(state, counts, users, items), reading
        return recommender


def check_folder(folder: Path) -> None:
    """OptionError where a recommender cannot be saved in `folder`, because it holds something else."""
    if folder.exists() and not (folder / ABOUT).exists() and (folder.is_file() or any(folder.iterdir())):
        raise OptionError(f"{folder} holds something else; name a new folder, or that of a recommender.")


def _read(source: Source, reading: Reading) -> Log:
    return positives(read_log(source, columns=reading.columns, format=reading.format, events=reading.events))


def _read_next(source: Source, reading: Reading, served: Served) -> Log:
    """A log that continues what has been learnt. LogError where rows are older; without a clock, they follow it."""
    log, newest = _read(source, reading), int(served.counts.recent.times_R.max())
    if log.has_clock != reading.has_clock:
        had, has = ("a clock", "none") if reading.has_clock else ("no clock", "one")
        raise LogError(f"the log that was fitted had {had} and the new events have {has}; give both alike.")
    if not log.has_clock:
        return replace(log, frame=log.frame.with_columns(pl.col("time") + newest + 1))
    times_E = log.frame["time"]
    n_late = int((times_E < newest).sum())
    if n_late:
        first, last = (np.datetime64(time, "us").astype("datetime64[s]") for time in (times_E[0], newest))
        raise LogError(
            f"{n_late:,} of {len(times_E):,} rows (the first of {first}) are older than {last}, the newest row learnt; "
            "an update needs newer rows: drop the older ones, or fit again on all."
        )
    return log


def _numbered(served: Served, log: Log) -> tuple[Events, Catalog, Catalog]:
    """The events in rows, and both catalogs once they are over."""
    frame, span = log.frame, served.state.spans_seen
    users, items = served.users.extend(frame["user_id"], span), served.items.extend(frame["item_id"], span)
    times_E = torch.from_numpy(frame["time"].to_numpy(writable=True))
    return Events.of(users.rows(frame["user_id"]), items.rows(frame["item_id"]), times_E), users, items


def _ids(name: str, ids: Ids, catalog: Catalog) -> pl.Series:
    """One or many ids as a column of the catalog's kind; "42" is read as 42 where the catalog holds integers."""
    kind = catalog.frame["id"].dtype
    many = [ids] if isinstance(ids, str | int) else list(ids)
    try:
        column = pl.Series(name, many) if many else pl.Series(name, many, dtype=kind)
    except TypeError:
        raise LogError(f"{name} mixes numbers and text; ids are all of one kind.") from None
    if column.dtype != pl.String or kind != pl.Int64:
        return column
    numbers = column.cast(pl.Int64, strict=False)
    if numbers.null_count():
        wrong = column.filter(numbers.is_null())[0]
        raise LogError(f'{name} "{wrong[:60]}" is not an integer, as all ids of this log are; give one that is.')
    return numbers


def _item_rows(served: Served, ids: Ids) -> Tensor:
    """Ascending rows of the ids that are known."""
    rows_M: Tensor = served.items.rows(_ids("item_id", ids, served.items)).unique()
    return rows_M[rows_M > 0]


def _known_rows(ids: pl.Series, catalog: Catalog) -> Tensor:
    rows_N = catalog.rows(ids)
    if bool((rows_N == 0).any()):
        what, name = ids.name.removesuffix("_id"), str(ids[int((rows_N == 0).int().argmax())])
        raise OptionError(f'{what} "{name[:60]}" has never occurred in an event; ask for one that has.')
    return rows_N


def _rows(found: pl.DataFrame, column: str = "item") -> Tensor:
    return torch.from_numpy(found[column].to_numpy(writable=True))


def _positive(k: int) -> int:
    if k < 1:
        raise OptionError(f"k is {k}; ask for at least one item.")
    return k


def _about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    try:
        about: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise StateError(f"{folder} holds no readable recommender ({problem}); fit one and save it there.") from None
    if about.get("format") != FORMAT:
        raise StateError(f"{path} has format {about.get('format')}, this freshrec reads {FORMAT}; upgrade freshrec.")
    return about


def _catalog(path: Path) -> Catalog:
    try:
        return Catalog.load(pl.read_parquet(path))
    except (OSError, pl.exceptions.PolarsError) as problem:
        raise StateError(f"{path} cannot be read ({problem}); fit again and save.") from None
