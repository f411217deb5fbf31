"""The live version in memory: watch the store, load and test new versions, swap them, and add clicks to histories."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import polars as pl
import torch

from freshrec.errors import FreshrecError, OptionError, StateError
from freshrec.recommender.click_overlay import ClickOverlay
from freshrec.recommender.ids import normalize_id, resolve_request
from freshrec.recommender.list_request import ListRequest
from freshrec.recommender.lists import top_items
from freshrec.recommender.search import DEFAULT_SEARCH, SearchOptions, choose_search
from freshrec.recommender.serving_bundle import ServingBundle, read_serving_bundle
from freshrec.server.handlers import HiddenUsers, LoadedVersion, user_row
from freshrec.server.known_clicks import LEARNED, ClickCheck, KnownClicks
from freshrec.server.memory import release_memory
from freshrec.store.checkpoint import load_for_serving
from freshrec.store.click_journal import KNOWN_SUFFIX, Click, ClickJournal, read_journal, read_known_clicks
from freshrec.store.erasures import read_erasures
from freshrec.store.learned_ids import LearnedIds
from freshrec.store.log_files import LOG_FOLDER
from freshrec.store.log_fingerprint import require_same_log
from freshrec.store.manifest import Manifest, utc_now
from freshrec.store.versions import Store

POLL_INTERVAL_S = 0.5  # time between two checks of the live pointer
N_TRIAL_USERS = 8  # users whose lists test a new version before it is served
RETRY_INTERVAL_S = 30.0  # time before a version that could not be served is tried again
MAX_ERASURE_TIME = timedelta(hours=1)  # the command that erases a user is stopped after this time
LOAD_ERRORS = (FreshrecError, OSError, MemoryError, RuntimeError, ValueError, IndexError, KeyError, TypeError)
LogLine = Callable[[str], object]  # writes a line to the log of the server, never with an id of a user


@dataclass(frozen=True)
class ClickOutcome:
    """The result of a click that was sent to the server."""

    click: Click
    is_duplicate: bool  # whether the same event was received or learned before
    is_in_overlay: bool  # whether it changes lists now
    reason: str | None = None  # why it does not change lists


class LiveVersion:
    """The live version and the journal of clicks.

    A request reads `version` once and uses that object to the end, so an answer never mixes two versions.
    """

    def __init__(self, store: Store, log_line: LogLine, search_options: SearchOptions = DEFAULT_SEARCH) -> None:
        self.store, self.log_line, self.search_options = store, log_line, search_options
        self.version: LoadedVersion | None = None
        self.problem = ""  # why the live version of the store is not served
        self.n_swaps = 0
        self._journal, self._known_journal = ClickJournal(store.folder), ClickJournal(store.folder, KNOWN_SUFFIX)
        self._known: KnownClicks | None = None  # the clicks that are known beside `version`
        self._clicks_during_swap: list[tuple[Click, ClickCheck]] | None = None  # received while a swap reads files
        self._requested_erasures = Counter[int | str]()  # users whose erasure this server has requested
        self._overlay_lock, self.loading_lock = threading.Lock(), threading.Lock()
        self._last_checked: object = None  # the version number and files that were checked last
        self._retry_at_s = 0.0  # when they are checked again
        self._stop_event = threading.Event()
        self._watcher = threading.Thread(target=self._watch_loop, name="watch", daemon=True)

    def start(self) -> None:
        """Load the live version and watch the store for others. Raises StateError if it cannot be served."""
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
        self._known_journal.close()

    def refresh(self) -> None:
        """Serve the live version of the store, if it is not served yet. If it cannot be served, `problem` says why."""
        with self.loading_lock:
            try:
                erasures = read_erasures(self.store.folder)  # before the version, which may lack them otherwise
                if self.version is not None:
                    self.version.hidden.erasures = erasures
                manifest = self.store.manifest(self.store.live)
            except FreshrecError as problem:
                self._record_problem("pointer", str(problem))
                return
            files = tuple(sorted((name, file.sha256) for name, file in manifest.files.items()))
            fingerprint = (manifest.id, files, erasures.last_number)
            if fingerprint == self._last_checked and time.monotonic() < self._retry_at_s:
                return
            release_memory()
            try:
                require_same_log(self.store)
                version = load_version(self.store, manifest, self.search_options)
                hidden = HiddenUsers(erasures, erasures.last_number, self._requested_erasures)
                self._swap(replace(version, hidden=hidden))
            except LOAD_ERRORS as problem:
                self._record_problem(fingerprint, f"Version {manifest.id} cannot be served: {_describe_error(problem)}")
                return
            self._last_checked, self._retry_at_s, self.problem = fingerprint, math.inf, ""
        release_memory()

    def _record_problem(self, fingerprint: object, problem: str) -> None:
        """Remember and log why the live version is not served. It is tried again later, in case it was fixed."""
        if problem != self.problem:
            self.log_line(problem)
        self._last_checked, self._retry_at_s, self.problem = fingerprint, time.monotonic() + RETRY_INTERVAL_S, problem

    def _swap(self, version: LoadedVersion) -> None:
        """Swap model, ids, interests, index and overlay at once. The overlay gets all clicks that the version lacks.

        Raises StateError if the journal is damaged. Then nothing changes.
        """
        self._clicks_during_swap = []
        try:
            chain = _version_chain(self.store, version.manifest)
            learned_batches = {batch for manifest in chain for batch in manifest.batches}
            known = KnownClicks(
                version.served, version.bundle.read_options.has_clock, self._read_learned_ids(learned_batches)
            )
            files = [file for file in read_journal(self.store.folder) if file.batch not in learned_batches]
            _add_new_clicks(version, known, [click for file in files for click in file.clicks])
            for click in read_known_clicks(self.store.folder):
                known.add(click, ClickCheck(LEARNED))
            with self._overlay_lock:  # then the clicks received meanwhile
                accepted = [click for click, check in self._clicks_during_swap if not check.reason]
                _add_new_clicks(version, known, accepted)
                for click, check in self._clicks_during_swap:
                    known.add(click, check)
                self.version, self._known, self.n_swaps = version, known, self.n_swaps + 1
        finally:
            self._clicks_during_swap = None
        self.log_line(f"Version {version.number} is live.")

    def _read_learned_ids(self, batches: set[int]) -> LearnedIds:
        """Return the event ids of the learned batches. If the event log is damaged, return those that were known."""
        learned_ids = LearnedIds() if self._known is None else self._known.learned_ids
        try:
            return learned_ids.read(self.store.folder / LOG_FOLDER, batches)
        except (StateError, OSError, pl.exceptions.PolarsError) as problem:
            self.log_line(f"The event ids of the log cannot be read: {_describe_error(problem)}")
            return learned_ids

    def accept_clicks(self, clicks: Sequence[Click]) -> tuple[int, list[ClickOutcome]]:
        """Write new clicks to the journal and add them to the overlay. Returns the overlay's version, and the results.

        Of known clicks, only new ids are written. Raises StateError if something could not be written. Then none of the
        clicks changes a list.
        """
        with self._overlay_lock:
            version, known = self.version, self._known
            assert version is not None and known is not None
            if any(_is_being_erased(version.hidden, click.user_id) for click in clicks):
                raise OptionError("One of these users is being erased. Send the events again later.")
            checked = list(zip(clicks, known.check(clicks)))
            if with_new_ids := [click for click, check in checked if check.has_new_id]:
                self._known_journal.append(with_new_ids)
            if new := [click for click, check in checked if not check.reason]:
                self._journal.append(new)
            if self._clicks_during_swap is not None:
                self._clicks_during_swap += checked
            outcomes = []
            for click, check in checked:
                known.add(click, check)
                reason = check.reason or _add_to_overlay(version, click)
                outcomes.append(ClickOutcome(click, bool(check.reason), reason is None, reason))
        return version.number, outcomes

    @contextmanager
    def erasing(self, user: int | str) -> Iterator[None]:
        """Treat a user as unknown while the user is erased. Afterwards, load the version and the clicks again.

        If the version cannot be loaded, the user stays unknown until it can.
        """
        assert self.version is not None
        user = normalize_id("user_id", user, self.version.served.users)
        with self._overlay_lock:
            self._requested_erasures[user] += 1
        try:
            yield
        finally:
            self.refresh()  # the record of the erasure in the store hides the user from now on
            with self._overlay_lock:
                self._requested_erasures -= Counter([user])

    @property
    def newest_time(self) -> int | None:
        """Time of the newest event that lists use: microseconds since 1970, or None without timestamps."""
        assert self.version is not None
        served = self.version.served
        click_times = [click[0] for clicks in list(served.overlay.clicks.values()) for click in clicks[-1:]]
        times = [served.newest_time, *click_times] if self.version.bundle.read_options.has_clock else [None]
        return max((time for time in times if time is not None), default=None)

    def _watch_loop(self) -> None:
        """Check the store every POLL_INTERVAL_S until `stop` is called."""
        while not self._stop_event.wait(POLL_INTERVAL_S):
            self.refresh()


def load_version(store: Store, manifest: Manifest, search_options: SearchOptions = DEFAULT_SEARCH) -> LoadedVersion:
    """Load a version, build its index and test it. Raises StateError if it is damaged or its lists are wrong."""
    bundle = read_serving_bundle(store.verified_files(manifest.id), load_for_serving)
    check_sizes(bundle)
    bundle = replace(bundle, served=bundle.served.serving_copy)
    search, search_info = choose_search(bundle.served, search_options)
    bundle = replace(bundle, served=replace(bundle.served, search=search, overlay=ClickOverlay()))
    check_lists(bundle)
    return LoadedVersion(manifest, bundle, search_info, utc_now())


def check_sizes(bundle: ServingBundle) -> None:
    """Raise StateError if ids and model belong to different versions."""
    served = bundle.served
    state, model = served.state, served.state.model
    n_users, n_items = len(served.users), len(served.items)
    if model.n_items > n_items or model.n_users > n_users or state.histories.n_users > n_users:
        raise StateError(
            f"Its model has {model.n_users:,} users and {model.n_items:,} items, but its catalogs have {n_users:,} and "
            f"{n_items:,}. They belong to different versions. Roll back to another version with `freshrec rollback`."
        )


def check_lists(bundle: ServingBundle) -> None:
    """Compute some lists twice. Raise StateError if one of them is wrong."""
    served = bundle.served
    state, n_items = served.state, len(served.items)
    active_users_U = (state.histories.offsets_U.diff() > 0).nonzero()[:, 0]
    users_N = torch.cat([torch.zeros(1, dtype=torch.int64), active_users_U[-N_TRIAL_USERS:]])
    request = resolve_request(served, ListRequest(k=10, exclude_seen=False))
    lists, repeated_lists = top_items(served, users_N, request), top_items(served, users_N, request)
    rows = lists["item"]
    if not len(lists) or not rows.is_between(1, n_items).all() or not lists["score"].is_finite().all():
        raise StateError(
            "Its lists are empty, have unknown items, or have scores that are not finite. Roll back to another version."
        )
    if lists.filter(pl.col("nth") == 0).is_empty() or not lists.equals(repeated_lists):
        raise StateError(
            "It gives unknown users no list, or different lists for the same request. Roll back to another version."
        )


def _is_being_erased(hidden: HiddenUsers, user: int | str) -> bool:
    """Whether clicks of a user must wait. An erasure that began long ago was interrupted; it deletes later clicks."""
    began = hidden.erasures.began_at(user)
    is_running = began is not None and datetime.now(UTC) - began < MAX_ERASURE_TIME
    return user in hidden.requested or is_running


def _version_chain(store: Store, manifest: Manifest) -> list[Manifest]:
    """Return a version and all its ancestors."""
    found = [manifest]
    while (parent := found[-1].parent) is not None:
        found.append(store.manifest(parent))
    return found


def _add_new_clicks(version: LoadedVersion, known: KnownClicks, clicks: Sequence[Click]) -> None:
    """Add clicks of the journal to the overlay, unless they are known."""
    for click, check in zip(clicks, known.check(clicks)):
        known.add(click, check)
        if not check.reason:
            _add_to_overlay(version, click)


def _add_to_overlay(version: LoadedVersion, click: Click) -> str | None:
    """Add a click to its user's history in the overlay. Returns the reason if that is not possible."""
    served = version.served
    item = served.items.row(normalize_id("item_id", click.item_id, served.items))
    overlay, user = served.overlay, user_row(version, click.user_id)
    if not item:
        return "The item is new. The next update learns it."
    if click.user_id in version.hidden:
        return "The user was erased. Lists change once the version is loaded again."
    if not user:
        user = overlay.add_user(click.user_id, len(served.users))
    has_clock = version.bundle.read_options.has_clock
    overlay.add_click(user, click.time if has_clock else 2**62 + len(overlay.clicks.get(user, ())), item)
    return None


def _describe_error(problem: BaseException) -> str:
    """Describe why a version could not be loaded, without the text of foreign errors, which may contain an id."""
    return str(problem) if isinstance(problem, FreshrecError) else f"{type(problem).__name__} while loading or testing."
