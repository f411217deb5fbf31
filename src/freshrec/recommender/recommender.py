"""The Python face: fit a recommender, update it from new events only, get lists from it, save it.

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
from freshrec.models.absorb import grow_items
from freshrec.nn.scoring import history_length
from freshrec.recommender.bundle import Bundle, learn_events, new_bundle, read_bundle, read_legacy_bundle, write_bundle
from freshrec.recommender.explain import explain_item
from freshrec.recommender.ids import Ids, column_tensor, id_tuple, normalize_ids, require_rows, resolve_request
from freshrec.recommender.list_request import DEFAULTS, ListRequest, check_k
from freshrec.recommender.lists import similar_items, top_items
from freshrec.recommender.log_reading import LogSource, ReadOptions, encode_events, read_interactions, read_new_events
from freshrec.recommender.served_state import ServedState
from freshrec.replay.measure import QueryOptions, SpanBlock, make_queries, rank_queries
from freshrec.replay.metrics import compute_metrics, mean_per_user, parse_metric
from freshrec.replay.significance import bootstrap_interval
from freshrec.store.manifest import Manifest
from freshrec.store.versions import LEGACY_FILE, Store, create_store, open_store
from freshrec.types import TRAIN, ModelSpec, Strategy


class Recommender:
    """A model that is updated from new events only.

    `model` and `strategy` are names, with options ("comirec-dr:k=1", "imsr:fit.epochs=5"), or instances of one's own.
    Without a strategy a model is fine-tuned; one that counts, such as item-knn, absorbs; a blend is refitted.
    OptionError for an unknown name, IncompatibleError where the strategy cannot update the model.
    """

    def __init__(self, model: str | ModelSpec = "blend", strategy: str | Strategy | None = None, seed: int = 0) -> None:
        self._unfitted_bundle = self._bundle = new_bundle(model, strategy, seed)

    @property
    def bundle(self) -> Bundle:
        """All that it is. StateError before the first `fit`."""
        if self._bundle.served.state.spans_seen == 0:
            raise StateError("this recommender knows nothing yet; call fit(log) first, or load(folder).")
        return self._bundle

    @property
    def served(self) -> ServedState:
        """The state and the catalogs of now. StateError before the first `fit`."""
        return self.bundle.served

    def fit(
        self,
        log: LogSource,
        *,
        columns: Mapping[str, str] | None = None,
        format: str | None = None,
        events: Sequence[str] = (),
    ) -> Recommender:
        """Learn from a whole log; whatever was known before is forgotten.

        `log` is a file or a frame; `columns`, `format` and `events` are those of `read_log`, and hold for the updates
        too. Rows with label 0 (exposures) are left out. LogError where it is not a log.
        """
        read_options = ReadOptions(dict(columns or {}), format, tuple(events))
        found = read_interactions(log, read_options)
        read_options = replace(read_options, has_clock=found.has_clock)
        self._bundle = learn_events(
            replace(self._unfitted_bundle, read_options=read_options),
            encode_events(self._unfitted_bundle.served, found.frame),
        )
        return self

    def update(self, new_events: LogSource) -> Recommender:
        """Learn from new events; only the new rows are needed.

        New users and items are welcome. LogError where a row is older than the newest one learnt; rows given twice
        count twice.
        """
        bundle = self.bundle
        log = read_new_events(new_events, bundle.read_options, bundle.served)
        self._bundle = learn_events(bundle, encode_events(bundle.served, log.frame))
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
        ids = normalize_ids("user_id", users, served.users)
        allow_ids, deny_ids = None if allow is None else id_tuple(allow), () if deny is None else id_tuple(deny)
        request = ListRequest(k, exclude_seen, allow_ids, deny_ids, category, diversity)
        found = top_items(served, served.users.rows(ids), resolve_request(served, request))
        return found.select(
            ids.gather(found["nth"]),
            served.items.ids(column_tensor(found)).alias("item_id"),
            "score",
            "rank",
            "fallback",
        )

    def similar_items(self, items: Ids, k: int = DEFAULTS.k) -> pl.DataFrame:
        """The items most like each of `items`: item_id, similar_id, score, rank.

        The score is the cosine of the item vectors; for item-knn, what a user with this one event would get.
        OptionError for an unknown item, IncompatibleError where the model does not relate items.
        """
        served = self.served
        ids = normalize_ids("item_id", items, served.items)
        rows_N = require_rows(ids, served.items)
        found = similar_items(served, rows_N, check_k(k))
        similar = served.items.ids(column_tensor(found)).alias("similar_id")
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
        users_1 = require_rows(normalize_ids("user_id", user, served.users), served.users)
        items_1 = require_rows(normalize_ids("item_id", item, served.items), served.items)
        found = explain_item(served, users_1, int(items_1))
        return found.with_columns(served.items.ids(column_tensor(found, "because")).alias("because"))

    def evaluate(self, new_events: LogSource, metrics: Sequence[str] = ("hr@20", "ndcg@20")) -> pl.DataFrame:
        """How well new events are predicted, before they are learnt: metric, value, low, high (95 %), n, n_users.

        Every event is a query with all of its user's events before it, those among the new ones too, and ranked among
        all known items; an unknown item is a miss (but a counting model may offer a user an own one again). A user's
        very first event is no query. Users weigh equally; `n` counts events. Nothing is learnt: call it before
        `update`, which takes the same rows.
        """
        for metric in metrics:
            parse_metric(metric)
        served = self.served
        new = encode_events(served, read_new_events(new_events, self.bundle.read_options, served).frame)
        block = SpanBlock(new.events, 0, len(new.users), len(served.items))
        state = grow_items(served.current_state, len(new.items))
        queries = make_queries(state.histories, block, history_length(state.model), QueryOptions(TRAIN))
        if not len(queries):
            raise LogError("no user of the new events has an event before, so nothing can be asked; give more rows.")
        values_QM = compute_metrics(rank_queries(state, queries).numpy(), metrics)
        _, values_UM = mean_per_user(queries.users_N.numpy(), values_QM)
        low_M, high_M = bootstrap_interval(values_UM)
        columns = {"metric": list(metrics), "value": values_UM.mean(0), "low": low_M, "high": high_M}
        return pl.DataFrame(columns).with_columns(n=pl.lit(len(queries)), n_users=pl.lit(len(values_UM)))

    def save(self, folder: str | Path) -> None:
        """A new version in the store in `folder`, the live one from now on; a new folder becomes a store.

        Until all is written, the version that was live before stays so. Older ones stay too (`freshrec gc`).
        OptionError for a store that `freshrec update` keeps.
        """
        folder, bundle = Path(folder), self.bundle
        if not (folder / "store.json").exists():
            with create_store(folder) as store:
                _add_live_version(store, bundle)
            return
        store = open_store(folder)
        with store.locked():
            if any(manifest.batch is not None for manifest in store.manifests()):
                raise OptionError(
                    f"{folder} is kept by `freshrec update`, which knows what each version has learnt; "
                    "save to another folder."
                )
            _add_live_version(store, bundle)

    @staticmethod
    def load(folder: str | Path) -> Recommender:
        """The live recommender of the store in `folder`. StateError where there is none, or it is damaged.

        A folder that was saved before there were stores is read too; `save` it to a new one.
        """
        if (Path(folder) / LEGACY_FILE).exists():
            return Recommender.from_bundle(read_legacy_bundle(Path(folder)))
        store = open_store(Path(folder))
        return Recommender.from_bundle(read_bundle(store.verified_files(store.live)))

    @staticmethod
    def from_bundle(bundle: Bundle) -> Recommender:
        """One that is what a version holds."""
        recommender = Recommender(bundle.served.state.model.spec, bundle.strategy, bundle.served.state.seed)
        recommender._unfitted_bundle = replace(recommender._unfitted_bundle, names=bundle.names)
        recommender._bundle = bundle
        return recommender


def _add_live_version(store: Store, bundle: Bundle) -> None:
    """A version that is live from now on."""
    spans_seen = bundle.served.state.spans_seen
    manifest = Manifest(
        id=store.next_number, kind="saved", recipe=bundle.recipe, spans_seen=spans_seen, sizes=bundle.sizes
    )
    store.write_version(manifest, lambda folder: write_bundle(bundle, folder))
    store.move_pointer(manifest.id, "save")
