"""The live version in memory: watched, loaded, tried and swapped whole; and the clicks that came since it was made."""

from __future__ import annotations

import ctypes
import gc
import math
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import polars as pl
import torch

from freshrec.errors import FreshrecError, OptionError, StateError
from freshrec.models.checkpoint import load_to_ask
from freshrec.serve.answers import Version, row_of
from freshrec.serve.fresh import Fresh
from freshrec.serve.index import USUAL, Limits, searching
from freshrec.serve.list_request import ListRequest
from freshrec.serve.reading import id_of, resolve_request
from freshrec.serve.recommend import Served, best_items
from freshrec.serve.saved import Kept, read_served
from freshrec.store.clicks import Click, Journal, written
from freshrec.store.versions import Manifest, Store, now

EVERY_S = 0.5  # how often the live pointer is looked at
TRIED = 8  # users whose lists a new version must make before it is served: it is in memory beside the old one
AGAIN_S = 30.0  # until a version that could not be served is tried once more
MOST_KNOWN = 100_000  # ids of learnt clicks that are remembered, to know them again
FAULTS = (FreshrecError, OSError, MemoryError, RuntimeError, ValueError, IndexError, KeyError, TypeError)
M_MMAP_THRESHOLD = -3  # of glibc's mallopt
Identity = tuple[int | str, ...]
Told = Callable[[str], object]  # where to say what happened, never with an id of a user


@dataclass(frozen=True)
class Outcome:
    """What became of a click."""

    click: Click
    known: bool
    folded: bool
    why: str | None = None


class Live:
    """The version that answers, and the journal of clicks. Whoever asks takes `version` once, and keeps it."""

    def __init__(self, store: Store, told: Told, limits: Limits = USUAL) -> None:
        self.store, self.told, self.limits = store, told, limits
        self.version: Version | None = None
        self.trouble = ""  # why the version that the store points to is not served
        self.swaps = 0
        self._journal, self._known = Journal(store.folder), dict[Identity, None]()  # what was taken, the oldest first
        self._since: list[Click] | None = None  # what is taken while a swap reads the journal
        self._leaving = set[int | str]()  # users who are being erased
        self._folding, self.loading = threading.Lock(), threading.Lock()
        self._seen: object = None  # the pointer and the files that were looked at last
        self._again = 0.0  # when they are looked at again
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._watching, name="watch", daemon=True)

    def begin(self) -> None:
        """Load the live version, and watch for others. StateError where it cannot be served."""
        self.look()
        if self.version is None:
            raise StateError(self.trouble)
        self._watch.start()

    def end(self) -> None:
        """Stop watching."""
        self._over.set()
        if self._watch.is_alive():
            self._watch.join()
        self._journal.end()

    def look(self) -> None:
        """Serve what the store points to, if that is not what is served. What cannot be served is told, not served."""
        with self.loading:
            try:
                about = self.store.manifest(self.store.live)
            except FreshrecError as why:
                self._refuse("pointer", str(why))
                return
            seen = (about.id, tuple(sorted((name, file.sha256) for name, file in about.files.items())))
            if seen == self._seen and time.monotonic() < self._again:
                return
            give_back()
            try:
                self._swap(loaded(self.store, about, self.limits))
            except FAULTS as why:
                self._refuse(seen, f"version {about.id} is not served: {_sentence(why)}")
                return
            self._seen, self._again, self.trouble = seen, math.inf, ""
        give_back()

    def _refuse(self, seen: object, why: str) -> None:
        """Say why nothing new is served; what was wrong may be mended, so it is tried again in a while."""
        if why != self.trouble:
            self.told(why)
        self._seen, self._again, self.trouble = seen, time.monotonic() + AGAIN_S, why

    def _swap(self, version: Version) -> None:
        """All at once: model, ids, interests, index, and the clicks that this version does not hold.

        StateError where the journal is damaged: then all stays as it was.
        """
        ids = [one for one in self._known if len(one) == 1][-MOST_KNOWN:]  # what is learnt keeps no trace of them
        known = dict[Identity, None](dict.fromkeys(ids))
        self._since = []
        try:
            learnt = {manifest.batch for manifest in _chain(self.store, version.about)} - {None}
            files = [file for file in written(self.store.folder) if file.batch not in learnt]
            waiting = {click.identity: click for file in files for click in file.clicks}  # some may be in two files
            for click in waiting.values():
                _fold(version, click, known)
            with self._folding:  # the clicks of meanwhile, and those who leave
                for click in self._since:
                    if click.identity not in known:
                        _fold(version, click, known)
                gone = {row_of(version, user) for user in self._leaving} - {0}
                version.served.fresh.gone.update(gone)
                for row in gone:
                    version.served.fresh.clicks.pop(row, None)
                self.version, self._known, self.swaps = version, known, self.swaps + 1
        finally:
            self._since = None
        self.told(f"version {version.number} is served")

    def take(self, clicks: Sequence[Click]) -> tuple[int, list[Outcome]]:
        """Write clicks to the journal, and fold them in; the version they were folded into.

        StateError where they could not be written: then nobody sees any of them.
        """
        with self._folding:
            version = self.version
            assert version is not None
            if any(click.user_id in self._leaving for click in clicks):
                raise OptionError("one of these users is being erased at this moment; send the events again later.")
            new = {click.identity: click for click in reversed(clicks) if not self._has(version, click)}
            if new:
                self._journal.add(reversed(new.values()))
                if self._since is not None:
                    self._since.extend(new.values())
            found = []
            for click in clicks:
                known = new.pop(click.identity, None) is None
                why = "it was taken before" if known else _fold(version, click, self._known)
                found.append(Outcome(click, known, why is None, why))
        return version.number, found

    def _has(self, version: Version, click: Click) -> bool:
        """Whether this very click was taken already, by this server or in the version's own events."""
        if click.identity in self._known:
            return True
        return click.event_id is None and _in_histories(version.served, click)

    @contextmanager
    def leaving(self, user: int | str) -> Iterator[None]:
        """While a user is erased: a stranger from the first moment; afterwards, what is on the disk is read again."""
        assert self.version is not None
        user = id_of("user_id", user, self.version.served.users)
        with self._folding:
            self._leaving.add(user)
            served, row = self.version.served, row_of(self.version, user)
            served.fresh.gone.update({row} - {0})
            served.fresh.clicks.pop(row, None)
            served.fresh.newcomers.pop(user, None)
        try:
            yield
        finally:
            self._leaving.discard(user)
            self.look()
            with self.loading:  # the clicks that are left
                kept = self.version.kept
                self._swap(replace(self.version, kept=replace(kept, served=replace(kept.served, fresh=Fresh()))))

    @property
    def newest(self) -> int | None:
        """The time of the newest event that is answered from."""
        assert self.version is not None
        served = self.version.served
        clicked = [click[0] for clicks in list(served.fresh.clicks.values()) for click in clicks[-1:]]
        times = [served.newest_time, *clicked] if self.version.kept.reading.has_clock else [None]
        return max((time for time in times if time is not None), default=None)

    def _watching(self) -> None:
        while not self._over.wait(EVERY_S):
            self.look()


def loaded(store: Store, about: Manifest, limits: Limits = USUAL) -> Version:
    """A version in memory, with its index, warm and tried. StateError where it is not whole, or answers nonsense."""
    kept = read_served(store.files(about.id), load_to_ask)
    fits(kept)
    kept = replace(kept, served=kept.served.settled)
    search, how = searching(kept.served, limits)
    kept = replace(kept, served=replace(kept.served, search=search, fresh=Fresh()))
    tried(kept)
    return Version(about, kept, how, now())


def fits(kept: Kept) -> None:
    """StateError where ids and model are not of one version."""
    served = kept.served
    state, model = served.state, served.state.model
    n_users, n_items = len(served.users), len(served.items)
    if model.n_items > n_items or model.n_users > n_users or state.recent.n_users > n_users:
        raise StateError(
            f"its model knows {model.n_users:,} users and {model.n_items:,} items, its catalogs {n_users:,} and "
            f"{n_items:,}: they are not of one version."
        )


def tried(kept: Kept) -> None:
    """Ask for some lists. StateError where one is not what it must be."""
    served = kept.served
    state, n_items = served.state, len(served.items)
    have_U = (state.recent.offsets_U.diff() > 0).nonzero()[:, 0]
    users_N = torch.cat([torch.zeros(1, dtype=torch.int64), have_U[-TRIED:]])
    wanted = resolve_request(served, ListRequest(k=10, exclude_seen=False))
    lists, again = best_items(served, users_N, wanted), best_items(served, users_N, wanted)
    rows = lists["item"]
    if not len(lists) or not rows.is_between(1, n_items).all() or not lists["score"].is_finite().all():
        raise StateError("its lists are empty, hold items that nobody knows, or scores that are not finite.")
    if lists.filter(pl.col("nth") == 0).is_empty() or not lists.equals(again):
        raise StateError("a stranger gets nothing from it, or it does not answer twice alike.")


def _chain(store: Store, about: Manifest) -> list[Manifest]:
    """A version and all that it comes from."""
    found = [about]
    while (parent := found[-1].parent) is not None:
        found.append(store.manifest(parent))
    return found


def _fold(version: Version, click: Click, known: dict[Identity, None]) -> str | None:
    """Put a click into its user's history; why not, where it cannot be."""
    served = version.served
    known[click.identity] = None
    if _in_histories(served, click):
        return "it is in the user's history already"
    item = served.items.row(id_of("item_id", click.item_id, served.items))
    fresh, user = served.fresh, row_of(version, click.user_id)
    if not item:
        return "the item is new: the next update learns it"
    if not user:
        user = fresh.newcomer(click.user_id, len(served.users))
    fresh.add(user, click.time if version.kept.reading.has_clock else 2**62 + len(fresh.clicks.get(user, ())), item)
    return None


def _in_histories(served: Served, click: Click) -> bool:
    """Whether the version's own events hold one of this user, item and time."""
    mine = served.counts.recent
    user = served.users.row(id_of("user_id", click.user_id, served.users))
    if not user or user > mine.n_users:
        return False
    rows = slice(int(mine.offsets_U[user]), int(mine.offsets_U[user + 1]))
    at = mine.times_R[rows] == click.time
    if not bool(at.any()):
        return False
    item = served.items.row(id_of("item_id", click.item_id, served.items))
    return bool((mine.items_R[rows][at] == item).any())


def checked(version: Version, click: Click) -> Click:
    """A click whose ids are of the store's kind. LogError where they are not."""
    served = version.served
    user_id, item_id = id_of("user_id", click.user_id, served.users), id_of("item_id", click.item_id, served.items)
    return click._replace(user_id=user_id, item_id=item_id)


def give_back() -> None:
    """Give what a former version took back to the system; what stays is not searched for garbage again, for 100 ms."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    _glibc("malloc_trim", 0)


def be_even() -> None:
    """Look for garbage seldom; let what is freed go back to the system at once where it is large, which glibc would
    learn to keep."""
    gc.set_threshold(50_000, 20, 100)
    _glibc("mallopt", M_MMAP_THRESHOLD, 1 << 20)


def _glibc(name: str, *numbers: int) -> None:
    """Call a function that only glibc has; elsewhere nothing happens."""
    if platform.libc_ver()[0] == "glibc":
        getattr(ctypes.CDLL(None), name)(*numbers)


def _sentence(why: BaseException) -> str:
    return str(why) if isinstance(why, FreshrecError) else f"{type(why).__name__} while it was loaded or tried"
