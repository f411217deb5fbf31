"""The Python face: fit a recommender, update it from new events only, ask it, save it.

The same pieces as in a replay: fit = absorb and update on span 0, update = the same on the next span. Ids are the
user's own everywhere. A saved recommender is a folder of safetensors, Parquet and JSON, without pickle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl

from freshrec.deprecation import UNSET, Unset, value_of_renamed
from freshrec.errors import LogError, OptionError, StateError
from freshrec.models.counted import told
from freshrec.models.scoring import history_length
from freshrec.replay.measure import Asked, Block, queries_of, rank_queries
from freshrec.replay.metrics import evaluate, parse, per_user
from freshrec.replay.significance import interval
from freshrec.serve.contents import Contents, begun, read_contents, read_older, taught, write_contents
from freshrec.serve.explain import reasons
from freshrec.serve.list_request import DEFAULTS, ListRequest, check_k
from freshrec.serve.reading import (
    Ids,
    Reading,
    Source,
    id_tuple,
    ids_of,
    known_rows,
    numbered,
    read,
    read_next,
    resolve_request,
    rows_of,
)
from freshrec.serve.recommend import Served, best_items, similar_items
from freshrec.store.versions import OLDER, Manifest, Store, new_store, open_store
from freshrec.types import TRAIN, ModelSpec, Strategy


class Recommender:
    """A model that is updated from new events only.

    `model` and `strategy` are names, with options ("comirec-dr:k=1", "imsr:fit.epochs=5"), or instances of one's own.
    Without a strategy a model is fine-tuned; one that counts, such as item-knn, absorbs; a blend is refitted.
    OptionError for an unknown name, IncompatibleError where the strategy cannot update the model.
    """

    def __init__(self, model: str | ModelSpec = "blend", strategy: str | Strategy | None = None, seed: int = 0) -> None:
        self._empty = self._contents = begun(model, strategy, seed)

    @property
    def contents(self) -> Contents:
        """All that it is. StateError before the first `fit`."""
        if self._contents.served.state.spans_seen == 0:
            raise StateError("this recommender knows nothing yet; call fit(log) first, or load(folder).")
        return self._contents

    @property
    def served(self) -> Served:
        """The state and the catalogs of now. StateError before the first `fit`."""
        return self.contents.served

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
        found = read(log, reading)
        reading = replace(reading, has_clock=found.has_clock)
        self._contents = taught(replace(self._empty, reading=reading), numbered(self._empty.served, found.frame))
        return self

    def update(self, new_events: Source) -> Recommender:
        """Learn from new events; only the new rows are needed.

        New users and items are welcome. LogError where a row is older than the newest one learnt; rows given twice
        count twice.
        """
        contents = self.contents
        log = read_next(new_events, contents.reading, contents.served)
        self._contents = taught(contents, numbered(contents.served, log.frame))
        return self

    partial_fit = update

    def recommend(
        self,
        users: Ids,
        k: int = DEFAULTS.k,
        exclude_seen: bool = DEFAULTS.exclude_seen,
        allow: Ids | None = None,
        deny: Ids | None = None,
        category: str | int | None = DEFAULTS.category,
        diversity: float = DEFAULTS.diversity,
        *,
        filter_seen: bool | Unset = UNSET,
    ) -> pl.DataFrame:
        """The best items of each user, in the order given: user_id, item_id, score, rank (from 1), fallback.

        The other arguments are the fields of `ListRequest`, which describes them; `filter_seen` is the old name of
        `exclude_seen`. With `diversity` the list is no longer in the order of its scores. Where the model has nothing
        to say, popular items complete the list with their popularity as score, and `fallback` says why; elsewhere it is
        null. Unknown users are strangers, not errors. OptionError for an unknown category, for diversity on a log
        without categories, and for a value out of bounds.
        """
        exclude_seen = value_of_renamed("exclude_seen", exclude_seen, "filter_seen", filter_seen)
        served = self.served
        ids = ids_of("user_id", users, served.users)
        allow_ids, deny_ids = None if allow is None else id_tuple(allow), () if deny is None else id_tuple(deny)
        request = ListRequest(k, exclude_seen, allow_ids, deny_ids, category, diversity)
        found = best_items(served, served.users.rows(ids), resolve_request(served, request))
        return found.select(
            ids.gather(found["nth"]), served.items.ids(rows_of(found)).alias("item_id"), "score", "rank", "fallback"
        )

    def similar_items(self, items: Ids, k: int = DEFAULTS.k) -> pl.DataFrame:
        """The items most like each of `items`: item_id, similar_id, score, rank.

        The score is the cosine of the item vectors; for item-knn, what a user with this one event would get.
        OptionError for an unknown item, IncompatibleError where the model does not relate items.
        """
        served = self.served
        ids = ids_of("item_id", items, served.items)
        rows_N = known_rows(ids, served.items)
        found = similar_items(served, rows_N, check_k(k))
        similar = served.items.ids(rows_of(found)).alias("similar_id")
        return found.select(ids.gather(found["nth"]), similar, "score", "rank")

    def explain(self, user: str | int, item: str | int) -> pl.DataFrame:
        """Why a user is offered an item: source, place, points, because; the weightiest reason first.

        Of a blend a source is an expert, or a kind of fact. `place`: of the item among those that the expert offers
        (the trained expert: among what anybody offers). `points`: what it adds to the logarithm of the score, above the
        user's candidates on average. `because`: the item of the user's history that speaks most for it. Of a model with
        vectors a source is an interest, `place` that among all items, `points` the inner product; the largest is the
        score. No rows: the item is not offered. OptionError for unknown ids, IncompatibleError for other models.
        """
        served = self.served
        if not isinstance(user, str | int) or not isinstance(item, str | int):
            raise OptionError("one user and one item are explained at a time; give an id of each.")
        users_1 = known_rows(ids_of("user_id", user, served.users), served.users)
        items_1 = known_rows(ids_of("item_id", item, served.items), served.items)
        found = reasons(served, users_1, int(items_1))
        return found.with_columns(served.items.ids(rows_of(found, "because")).alias("because"))

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
        new = numbered(served, read_next(new_events, self.contents.reading, served).frame)
        block, state = Block(new.events, 0, len(new.users), len(served.items)), told(served.now, len(new.items))
        queries = queries_of(state.recent, block, history_length(state.model), Asked(TRAIN))
        if not len(queries):
            raise LogError("no user of the new events has an event before, so nothing can be asked; give more rows.")
        values_QM = evaluate(rank_queries(state, queries).numpy(), metrics)
        _, values_UM = per_user(queries.users_N.numpy(), values_QM)
        low_M, high_M = interval(values_UM)
        columns = {"metric": list(metrics), "value": values_UM.mean(0), "low": low_M, "high": high_M}
        return pl.DataFrame(columns).with_columns(n=pl.lit(len(queries)), n_users=pl.lit(len(values_UM)))

    def save(self, folder: str | Path) -> None:
        """A new version in the store in `folder`, the live one from now on; a new folder becomes a store.

        Until all is written, the version that was live before stays so. Older ones stay too (`freshrec gc`).
        OptionError for a store that `freshrec update` keeps.
        """
        folder, contents = Path(folder), self.contents
        if not (folder / "store.json").exists():
            with new_store(folder) as store:
                _add(store, contents)
            return
        store = open_store(folder)
        with store.locked():
            if any(manifest.batch is not None for manifest in store.versions()):
                raise OptionError(
                    f"{folder} is kept by `freshrec update`, which knows what each version has learnt; "
                    "save to another folder."
                )
            _add(store, contents)

    @staticmethod
    def load(folder: str | Path) -> Recommender:
        """The live recommender of the store in `folder`. StateError where there is none, or it is damaged.

        A folder that was saved before there were stores is read too; `save` it to a new one.
        """
        if (Path(folder) / OLDER).exists():
            return Recommender.of(read_older(Path(folder)))
        store = open_store(Path(folder))
        return Recommender.of(read_contents(store.files(store.live)))

    @staticmethod
    def of(contents: Contents) -> Recommender:
        """One that is what a version holds."""
        recommender = Recommender(contents.served.state.model.spec, contents.strategy, contents.served.state.seed)
        recommender._empty, recommender._contents = replace(recommender._empty, names=contents.names), contents
        return recommender


def _add(store: Store, contents: Contents) -> None:
    """A version that is live from now on."""
    spans_seen = contents.served.state.spans_seen
    about = Manifest(id=store.next, kind="saved", recipe=contents.recipe, spans_seen=spans_seen, sizes=contents.sizes)
    store.write(about, lambda aside: write_contents(contents, aside))
    store.point(about.id, "save")
