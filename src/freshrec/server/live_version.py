"""The live version in memory: watched, loaded, tried and swapped whole; and the clicks that came since it was made."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import polars as pl
import torch

from freshrec.errors import FreshrecError, OptionError, StateError
from freshrec.recommender.click_overlay import ClickOverlay
from freshrec.recommender.ids import normalize_id, resolve_request
from freshrec.recommender.list_request import ListRequest
from freshrec.recommender.lists import top_items
from freshrec.recommender.search import DEFAULT_SEARCH, SearchOptions, choose_search
from freshrec.recommender.served_state import ServedState
from freshrec.recommender.serving_bundle import ServingBundle, read_serving_bundle
from freshrec.server.handlers import LoadedVersion, user_row
from freshrec.server.memory import release_memory
from freshrec.store.checkpoint import load_for_serving
from freshrec.store.click_journal import Click, ClickJournal, read_journal
from freshrec.store.manifest import Manifest, utc_now
from freshrec.store.versions import Store

POLL_INTERVAL_S = 0.5  # how often the live pointer is looked at
N_TRIAL_USERS = 8  # users whose lists a new version must make before it is served: it is in memory beside the old one
RETRY_INTERVAL_S = 30.0  # until a version that could not be served is tried once more
MAX_REMEMBERED_IDS = 100_000  # ids of learnt clicks that are remembered, to know them again
LOAD_ERRORS = (FreshrecError, OSError, MemoryError, RuntimeError, ValueError, IndexError, KeyError, TypeError)
Identity = tuple[int | str, ...]
LogLine = Callable[[str], object]  # where to say what happened, never with an id of a user


@dataclass(frozen=True)
class ClickOutcome:
    """What became of a click."""

    click: Click
    is_duplicate: bool
    is_in_overlay: bool
    reason: str | None = None


class LiveVersion:
    """The version that answers, and the journal of clicks. Whoever asks takes `version` once, and keeps it."""

    def __init__(self, store: Store, log_line: LogLine, search_options: SearchOptions = DEFAULT_SEARCH) -> None:
        self.store, self.log_line, self.search_options = store, log_line, search_options
        self.version: LoadedVersion | None = None
        self.problem = ""  # why the version that the store points to is not served
        self.n_swaps = 0
        self._journal = ClickJournal(store.folder)
        self._known_clicks = dict[Identity, None]()  # identities of accepted clicks, the oldest first
        self._clicks_during_swap: list[Click] | None = None  # what is taken while a swap reads the journal
        self._users_being_erased = set[int | str]()  # users who are being erased
        self._overlay_lock, self.loading_lock = threading.Lock(), threading.Lock()
        self._last_checked: object = None  # the pointer and the files that were looked at last
        self._retry_at_s = 0.0  # when they are looked at again
        self._stop_event = threading.Event()
        self._watcher = threading.Thread(target=self._watch_loop, name="watch", daemon=True)

    def start(self) -> None:
        """Load the live version, and watch for others. StateError where it cannot be served."""
        self.refresh()
        if self.version is None:
            raise StateError(self.problem)
        self._watcher.start()

    def stop(self) -> None:
        """Stop watching."""
        self._stop_event.set()
        if self._watcher.is_alive():
            self._watcher.join()
        self._journal.close()

    def refresh(self) -> None:
        """Serve what the store points to, if that is not served yet. What cannot be served is reported instead."""
        with self.loading_lock:
            try:
                manifest = self.store.manifest(self.store.live)
            except FreshrecError as problem:
                self._record_problem("pointer", str(problem))
                return
            fingerprint = (manifest.id, tuple(sorted((name, file.sha256) for name, file in manifest.files.items())))
            if fingerprint == self._last_checked and time.monotonic() < self._retry_at_s:
                return
            release_memory()
            try:
                self._swap(load_version(self.store, manifest, self.search_options))
            except LOAD_ERRORS as problem:
                self._record_problem(fingerprint, f"version {manifest.id} is not served: {_describe_error(problem)}")
                return
            self._last_checked, self._retry_at_s, self.problem = fingerprint, math.inf, ""
        release_memory()

    def _record_problem(self, fingerprint: object, problem: str) -> None:
        """Say why nothing new is served; what was wrong may be mended, so it is tried again in a while."""
        if problem != self.problem:
            self.log_line(problem)
        self._last_checked, self._retry_at_s, self.problem = fingerprint, time.monotonic() + RETRY_INTERVAL_S, problem

    def _swap(self, version: LoadedVersion) -> None:
        """All at once: model, ids, interests, index, and the clicks that this version does not hold.

        StateError where the journal is damaged: then all stays as it was.
        """
        # event ids, because histories of learnt events keep none
        ids = [identity for identity in self._known_clicks if len(identity) == 1]
        known_clicks = dict[Identity, None](dict.fromkeys(ids[-MAX_REMEMBERED_IDS:]))
        self._clicks_during_swap = []
        try:
            learnt_batches = {manifest.batch for manifest in _version_chain(self.store, version.manifest)} - {None}
            files = [file for file in read_journal(self.store.folder) if file.batch not in learnt_batches]
            # by identity, as some may be in two files
            pending_clicks = {click.identity: click for file in files for click in file.clicks}
            for click in pending_clicks.values():
                _add_to_overlay(version, click, known_clicks)
            with self._overlay_lock:  # the clicks that came meanwhile, and users being erased
                for click in self._clicks_during_swap:
                    if click.identity not in known_clicks:
                        _add_to_overlay(version, click, known_clicks)
                erased_rows = {user_row(version, user) for user in self._users_being_erased} - {0}
                version.served.overlay.erased_users.update(erased_rows)
                for row in erased_rows:
                    version.served.overlay.clicks.pop(row, None)
                self.version, self._known_clicks, self.n_swaps = version, known_clicks, self.n_swaps + 1
        finally:
            self._clicks_during_swap = None
        self.log_line(f"version {version.number} is served")

    def accept_clicks(self, clicks: Sequence[Click]) -> tuple[int, list[ClickOutcome]]:
        """Write clicks to the journal, and fold them in; the version they were folded into.

        StateError where they could not be written: then nobody sees any of them.
        """
        with self._overlay_lock:
            version = self.version
            assert version is not None
            if any(click.user_id in self._users_being_erased for click in clicks):
                raise OptionError("one of these users is being erased at this moment; send the events again later.")
            new = {click.identity: click for click in reversed(clicks) if not self._is_known(version, click)}
            if new:
                self._journal.append(reversed(new.values()))
                if self._clicks_during_swap is not None:
                    self._clicks_during_swap.extend(new.values())
            outcomes = []
            for click in clicks:
                is_duplicate = new.pop(click.identity, None) is None
                reason: str | None = "it was taken before"
                if not is_duplicate:
                    reason = _add_to_overlay(version, click, self._known_clicks)
                outcomes.append(ClickOutcome(click, is_duplicate, reason is None, reason))
        return version.number, outcomes

    def _is_known(self, version: LoadedVersion, click: Click) -> bool:
        """Whether this very click was taken already, by this server or in the version's own events."""
        if click.identity in self._known_clicks:
            return True
        return click.event_id is None and _is_in_history(version.served, click)

    @contextmanager
    def erasing(self, user: int | str) -> Iterator[None]:
        """While a user is erased: a stranger from the first moment; afterwards, what is on the disk is read again."""
        assert self.version is not None
        user = normalize_id("user_id", user, self.version.served.users)
        with self._overlay_lock:
            self._users_being_erased.add(user)
            served, row = self.version.served, user_row(self.version, user)
            served.overlay.erased_users.update({row} - {0})
            served.overlay.clicks.pop(row, None)
            served.overlay.new_users.pop(user, None)
        try:
            yield
        finally:
            self._users_being_erased.discard(user)
            self.refresh()
            with self.loading_lock:  # the clicks that are left
                bundle = self.version.bundle
                bundle = replace(bundle, served=replace(bundle.served, overlay=ClickOverlay()))
                self._swap(replace(self.version, bundle=bundle))

    @property
    def newest_time(self) -> int | None:
        """The time of the newest event that lists are made from."""
        assert self.version is not None
        served = self.version.served
        click_times = [click[0] for clicks in list(served.overlay.clicks.values()) for click in clicks[-1:]]
        times = [served.newest_time, *click_times] if self.version.bundle.read_options.has_clock else [None]
        return max((time for time in times if time is not None), default=None)

    def _watch_loop(self) -> None:
        while not self._stop_event.wait(POLL_INTERVAL_S):
            self.refresh()


def load_version(store: Store, manifest: Manifest, search_options: SearchOptions = DEFAULT_SEARCH) -> LoadedVersion:
    """A version in memory, with its index, warm and tried. StateError where it is not whole, or answers nonsense."""
    bundle = read_serving_bundle(store.verified_files(manifest.id), load_for_serving)
    check_sizes(bundle)
    bundle = replace(bundle, served=bundle.served.serving_copy)
    search, search_info = choose_search(bundle.served, search_options)
    bundle = replace(bundle, served=replace(bundle.served, search=search, overlay=ClickOverlay()))
    check_lists(bundle)
    return LoadedVersion(manifest, bundle, search_info, utc_now())


def check_sizes(bundle: ServingBundle) -> None:
    """StateError where ids and model are not of one version."""
    served = bundle.served
    state, model = served.state, served.state.model
    n_users, n_items = len(served.users), len(served.items)
    if model.n_items > n_items or model.n_users > n_users or state.histories.n_users > n_users:
        raise StateError(
            f"its model knows {model.n_users:,} users and {model.n_items:,} items, its catalogs {n_users:,} and "
            f"{n_items:,}: they are not of one version."
        )


def check_lists(bundle: ServingBundle) -> None:
    """Make some lists. StateError where one is not what it must be."""
    served = bundle.served
    state, n_items = served.state, len(served.items)
    active_users_U = (state.histories.offsets_U.diff() > 0).nonzero()[:, 0]
    users_N = torch.cat([torch.zeros(1, dtype=torch.int64), active_users_U[-N_TRIAL_USERS:]])
    request = resolve_request(served, ListRequest(k=10, exclude_seen=False))
    lists, repeated_lists = top_items(served, users_N, request), top_items(served, users_N, request)
    rows = lists["item"]
    if not len(lists) or not rows.is_between(1, n_items).all() or not lists["score"].is_finite().all():
        raise StateError("its lists are empty, hold items that nobody knows, or scores that are not finite.")
    if lists.filter(pl.col("nth") == 0).is_empty() or not lists.equals(repeated_lists):
        raise StateError("a stranger gets nothing from it, or its lists differ when made twice.")


def _version_chain(store: Store, manifest: Manifest) -> list[Manifest]:
    """A version and all that it comes from."""
    found = [manifest]
    while (parent := found[-1].parent) is not None:
        found.append(store.manifest(parent))
    return found


def _add_to_overlay(version: LoadedVersion, click: Click, known_clicks: dict[Identity, None]) -> str | None:
    """Put a click into its user's history; why not, where it cannot be."""
    served = version.served
    known_clicks[click.identity] = None
    if _is_in_history(served, click):
        return "it is in the user's history already"
    item = served.items.row(normalize_id("item_id", click.item_id, served.items))
    overlay, user = served.overlay, user_row(version, click.user_id)
    if not item:
        return "the item is new: the next update learns it"
    if not user:
        user = overlay.add_user(click.user_id, len(served.users))
    has_clock = version.bundle.read_options.has_clock
    overlay.add_click(user, click.time if has_clock else 2**62 + len(overlay.clicks.get(user, ())), item)
    return None


def _is_in_history(served: ServedState, click: Click) -> bool:
    """Whether the version's own events hold one of this user, item and time."""
    histories = served.counts.histories
    user = served.users.row(normalize_id("user_id", click.user_id, served.users))
    if not user or user > histories.n_users:
        return False
    rows = slice(int(histories.offsets_U[user]), int(histories.offsets_U[user + 1]))
    at = histories.times_R[rows] == click.time
    if not bool(at.any()):
        return False
    item = served.items.row(normalize_id("item_id", click.item_id, served.items))
    return bool((histories.items_R[rows][at] == item).any())


def check_click_ids(version: LoadedVersion, click: Click) -> Click:
    """A click whose ids are of the store's kind. LogError where they are not."""
    served = version.served
    user_id = normalize_id("user_id", click.user_id, served.users)
    item_id = normalize_id("item_id", click.item_id, served.items)
    return click._replace(user_id=user_id, item_id=item_id)


def _describe_error(problem: BaseException) -> str:
    return (
        str(problem) if isinstance(problem, FreshrecError) else f"{type(problem).__name__} while it was loaded or tried"
    )
