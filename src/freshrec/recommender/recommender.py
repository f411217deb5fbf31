"""The Python interface: fit a recommender, update it from new events only, get lists from it, save it.

It calls the same functions as a replay: `fit` absorbs and updates on span 0, `update` on the next span. All ids are
those of the log. A saved recommender is a folder of safetensors, Parquet and JSON files, without pickle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl

from freshrec.data.moments import format_time
from freshrec.deprecation import UNSET, Unset, value_of_renamed
from freshrec.errors import LogError, OptionError, StateError
from freshrec.forks import require_threads
from freshrec.memory_limits import naming_memory_shortage
from freshrec.models.absorb import grow_items
from freshrec.nn.scoring import history_length
from freshrec.progress import report_progress
from freshrec.recommender.bundle import Bundle, learn_events, new_bundle, read_bundle, read_legacy_bundle, write_bundle
from freshrec.recommender.explain import explain_item
from freshrec.recommender.ids import (
    Ids,
    column_tensor,
    id_tuple,
    normalize_ids,
    require_rows,
    resolve_request,
    rows_of_pair,
)
from freshrec.recommender.list_request import DEFAULTS, ListRequest, check_k
from freshrec.recommender.lists import similar_items, top_items
from freshrec.recommender.log_reading import LogSource, ReadOptions, encode_events, read_interactions, read_new_events
from freshrec.recommender.progress import ProgressOption, reporting
from freshrec.recommender.replaying import replay_recommender
from freshrec.recommender.served_state import ServedState
from freshrec.replay.measure import QueryOptions, SpanBlock, make_queries, rank_queries
from freshrec.replay.metrics import compute_metrics, mean_per_user, parse_metric
from freshrec.replay.significance import bootstrap_interval
from freshrec.store.manifest import Manifest
from freshrec.store.versions import LEGACY_FILE, Store, create_store, open_store
from freshrec.text_layout import format_count
from freshrec.types import TRAIN, ModelSpec, Strategy


def recommender_text(recommender: Recommender) -> str:
    """Return model, strategy, numbers of users and items, and the time of the newest event in one line."""
    bundle = recommender._bundle
    served, (model, strategy) = bundle.served, bundle.names
    parts = [f'"{model}"', f'"{strategy}"', "no events"]
    if served.newest_time is not None:
        parts[2:] = [format_count(len(served.users), "user"), format_count(len(served.items), "item")]
        parts += [f"newest event {format_time(served.newest_time)[:19]}"] if bundle.read_options.has_clock else []
    return f"Recommender({', '.join(parts)})"


class Recommender:
    """A model that is updated from new events only.

    `model` and `strategy` are names with options ("comirec-dr:k=1", "imsr:fit.epochs=5"), instances, or classes, which
    stand for their default options. The default strategy is `refit` for the blend, `absorb` for other counting models
    such as item-knn, and `finetune` for trained models. Raises OptionError for an unknown name and IncompatibleError if
    the strategy cannot update the model.
    """

    replay = replay_recommender
    __repr__ = recommender_text

    def __init__(
        self,
        model: str | ModelSpec | type[ModelSpec] = "blend",
        strategy: str | Strategy | type[Strategy] | None = None,
        seed: int = 0,
    ) -> None:
        self._unfitted_bundle = self._bundle = new_bundle(model, strategy, seed)

    @property
    def bundle(self) -> Bundle:
        """State, catalogs, strategy and options. Raises StateError before the first `fit`, and in a forked process."""
        require_threads()
        if self._bundle.served.state.spans_seen == 0:
            raise StateError("This recommender has no events yet. Call fit(log) or load(folder) first.")
        return self._bundle

    @property
    def served(self) -> ServedState:
        """The current state and catalogs. Raises StateError before the first `fit`."""
        return self.bundle.served

    @naming_memory_shortage()
    def fit(
        self,
        log: LogSource,
        *,
        columns: Mapping[str, str] | None = None,
        format: str | None = None,
        events: Sequence[str] = (),
        separator: str | None = None,
        min_rating: float | None = None,
        time_format: str | None = None,
        progress: ProgressOption = False,
    ) -> Recommender:
        """Learn from a whole log. A second call starts again from an untrained model.

        `log` is a file or a frame. `progress`: True shows progress on stderr, and a function is called with each
        `Progress`. The other arguments are those of `read_log`; updates use them too. Exposures with label 0 are
        dropped. A column `weight` is ignored with a UserWarning in a frame, and refused in a file. Raises LogError for
        a bad log, also if all its events lie in the future, and OptionError for an unknown format or event type.
        Returns the recommender itself.
        """
        read_options = ReadOptions(
            dict(columns or {}),
            format,
            tuple(events),
            separator=separator,
            min_rating=min_rating,
            time_format=time_format,
        )
        with reporting(progress):
            found = read_interactions(log, read_options)
            report_progress("learning", detail=format_count(len(found.frame), "event"))
            read_options = replace(read_options, has_clock=found.has_clock)
            self._bundle = learn_events(
                replace(self._unfitted_bundle, read_options=read_options),
                encode_events(self._unfitted_bundle.served, found.frame),
            )
        return self

    @naming_memory_shortage()
    def update(self, new_events: LogSource, *, progress: ProgressOption = False) -> Recommender:
        """Learn from new events; only the new rows are needed.

        They may have new users and items. Duplicates within one call count once, and rows of the newest learned moment
        that are learned already are left out. A store also recognises older events, and event ids of earlier calls.
        `progress` is that of `fit`. Raises LogError if a row is older than the newest learned one, and StateError
        before the first `fit`. Returns the recommender itself.
        """
        bundle = self.bundle
        with reporting(progress):
            log = read_new_events(new_events, bundle.read_options, bundle.served)
            report_progress("learning", detail=format_count(len(log.frame), "event"))
            if len(log.frame):
                self._bundle = learn_events(bundle, encode_events(bundle.served, log.frame))
        return self

    partial_fit = update

    @naming_memory_shortage()
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
        """Return the best items of each user as a frame: user_id, item_id, score, rank (from 1), fallback.

        Users keep the given order. `ListRequest` describes the other arguments; `filter_seen` is the old name of
        `exclude_seen`. A list with `diversity` is not sorted by score. If the model scores too few items, popular items
        complete the list. Their score is their popularity, and `fallback` gives the reason; it is null for other items.
        An unknown user gets popular items. Raises OptionError for an unknown category, for `diversity` on a log without
        categories, and for a value out of bounds. Raises LogError for an id of another type than those of the log.
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
        """Return the most similar items of each given item as a frame: item_id, similar_id, score, rank (from 1).

        The score is the cosine of item vectors. For item-knn, markov and the blend, it is the item-kNN score for a user
        whose only event is the item. Raises OptionError for an unknown item and IncompatibleError for a model without
        item similarities.
        """
        served = self.served
        ids = normalize_ids("item_id", items, served.items)
        rows_N = require_rows(ids, served.items)
        found = similar_items(served, rows_N, check_k(k))
        similar = served.items.ids(column_tensor(found)).alias("similar_id")
        return found.select(ids.gather(found["nth"]), similar, "score", "rank")

    def explain(self, user: str | int, item: str | int) -> pl.DataFrame:
        """Return the reasons for the score of an item as a frame: source, place, points, because. Largest points first.

        - Blend: a source is an expert or a group of features. `points` is its contribution to ln(score), minus the mean
          over the user's candidates. `place` is the rank among the items that the expert proposes, and among all
          candidates for the trained expert.
        - Models with vectors: a source is one of the user's vectors. `points` is its inner product with the item; the
          largest one is the score. `place` is the rank by this vector among all items.
        - Other models: one row. `points` is the score and `place` the rank among all items.

        `because` is the item of the user's history that contributes most, or null if unknown. There are no rows if the
        model does not score the item; a list may still have it as a fallback. Raises OptionError for an unknown user or
        item.
        """
        served = self.served
        found = explain_item(served, *rows_of_pair(served, user, item))
        return found.with_columns(served.items.ids(column_tensor(found, "because")).alias("because"))

    def evaluate(self, new_events: LogSource, metrics: str | Sequence[str] = ("hr@20", "ndcg@20")) -> pl.DataFrame:
        """Measure the model on new events. Returns a frame: metric, value, low, high (95 % interval), n, n_users.

        Each event is one query. Its history is all earlier events of the user, including new ones. Its item is
        ranked among all known items. An unknown item is a miss, but a counting model may recommend a user's own new
        item again. The first event of a user is no query. Users have equal weights; `n` counts queries. The model does
        not change: call `update` with the same rows afterwards. Raises LogError if there are no queries and OptionError
        for an unknown metric.
        """
        metrics = [metrics] if isinstance(metrics, str) else metrics
        for metric in metrics:
            parse_metric(metric)
        served = self.served
        new = encode_events(served, read_new_events(new_events, self.bundle.read_options, served).frame)
        block = SpanBlock(new.events, 0, len(new.users), len(served.items))
        state = grow_items(served.current_state, len(new.items))
        queries = make_queries(state.histories, block, history_length(state.model), QueryOptions(TRAIN))
        if not len(queries):
            raise LogError(
                "No user of the new events has an earlier event, so nothing can be measured. Pass more rows."
            )
        values_QM = compute_metrics(rank_queries(state, queries).numpy(), metrics)
        _, values_UM = mean_per_user(queries.users_N.numpy(), values_QM)
        low_M, high_M = bootstrap_interval(values_UM)
        columns = {"metric": list(metrics), "value": values_UM.mean(0), "low": low_M, "high": high_M}
        return pl.DataFrame(columns).with_columns(n=pl.lit(len(queries)), n_users=pl.lit(len(values_UM)))

    def save(self, folder: str | Path, sign_key_file: str | Path | None = None) -> None:
        """Save as a new version in the store in `folder`, and make it the live one. A new folder becomes a store.

        The previous version stays live until all files are written. Older versions stay; `freshrec gc` deletes them.
        `sign_key_file` holds a secret key, which signs the store (docs/security.md). Raises OptionError for an invalid
        key and for a store that `freshrec update` maintains. Raises SignatureError for a store without its signature.
        """
        folder, bundle = Path(folder), self.bundle
        key_file = None if sign_key_file is None else Path(sign_key_file)
        if not (folder / "store.json").exists():
            with create_store(folder, key_file) as store:
                _add_live_version(store, bundle)
            return
        store = open_store(folder, key_file)
        with store.locked():
            if any(manifest.batch is not None for manifest in store.manifests()):
                raise OptionError(
                    f"`freshrec update` maintains the store in {folder} and tracks the events of each version. "
                    "Save to another folder."
                )
            _add_live_version(store, bundle)

    @staticmethod
    @naming_memory_shortage()
    def load(folder: str | Path, sign_key_file: str | Path | None = None) -> Recommender:
        """Load the live version of the store in `folder`. Raises StateError for a missing or damaged store.

        Import the module of a custom model or strategy first: loading imports nothing outside freshrec.
        `sign_key_file` holds a secret key. With it, SignatureError is raised for a store that the key has not signed.

        A folder of an older freshrec without a store is read too; `save` it to a new folder.
        """
        if (Path(folder) / LEGACY_FILE).exists():
            return Recommender.from_bundle(read_legacy_bundle(Path(folder)))
        store = open_store(Path(folder), None if sign_key_file is None else Path(sign_key_file))
        return Recommender.from_bundle(read_bundle(store.verified_files(store.live)))

    @staticmethod
    def from_bundle(bundle: Bundle) -> Recommender:
        """Return a recommender with the content of a version."""
        recommender = Recommender(bundle.served.state.model.spec, bundle.strategy, bundle.served.state.seed)
        recommender._unfitted_bundle = replace(recommender._unfitted_bundle, names=bundle.names)
        recommender._bundle = bundle
        return recommender


def _add_live_version(store: Store, bundle: Bundle) -> None:
    """Write a version and make it the live one."""
    spans_seen = bundle.served.state.spans_seen
    manifest = Manifest(
        id=store.next_number, kind="saved", recipe=bundle.recipe, spans_seen=spans_seen, sizes=bundle.sizes
    )
    store.write_version(manifest, lambda folder: write_bundle(bundle, folder))
    store.move_pointer(manifest.id, "save")
