"""The nightly job: take a delivery, learn from it, test the result, and let it go live or not.

    delivery ──▶ log ──▶ batch ──▶ challenger ──▶ gate ──▶ version, live if it passes
                          │ its newest events are held back: on them challenger and live version are compared,
                          ▼ and the next update learns from them
                         facts of the day, compared with those of the days before

Every delivery becomes a batch of the log, and every batch a version, in order: whatever moment the job dies, the next
run goes on where it was. A batch that was refused or rolled back is not learnt from again, unless asked for.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from freshrec.data.catalog import Catalog
from freshrec.data.log import Log, positive_rows, positives
from freshrec.errors import LogError, OptionError, StateError, TrainingError
from freshrec.models.counted import absorb
from freshrec.models.popularity import PopularitySpec
from freshrec.nightly.anew import GAIN, from_nothing, interval_of, since_full
from freshrec.nightly.compare import newest, values_of
from freshrec.nightly.day import Day, facts_of
from freshrec.nightly.gate import Limits, Measured, Verdict, judge, looks_odd
from freshrec.replay.measure import Queries
from freshrec.replay.significance import interval
from freshrec.serve.contents import Contents, read_contents, taught, write_contents
from freshrec.serve.reading import Numbered, alike, numbered
from freshrec.serve.recommend import Served
from freshrec.store.eventlog import EventLog, Taken
from freshrec.store.signed import sum_of_file
from freshrec.store.versions import Action, Kind, Manifest, Store, chain_of
from freshrec.types import State

AGAIN, REMEMBERED = 250, 5  # queries of a version that later ones are asked, and of how many versions
HELD, HELD_FIRST = 0.2, 0.05  # of a day, and of the first log, is held back to be tested on
MOST_HELD = 20_000  # events


class Job:
    """Work on a store that nobody else changes meanwhile."""

    def __init__(self, store: Store, limits: Limits = Limits(), full_every: str = "") -> None:  # noqa: B008
        self.store, self.limits, self.full_every = store, limits, full_every
        self.log = EventLog(store.folder / "log")  # every event that was ever delivered
        self._loaded: tuple[Manifest, Contents] | None = None

    @property
    def contents(self) -> Contents:
        """What the live version holds."""
        about = self.store.manifest(self.store.live)
        if self._loaded is None or self._loaded[0] != about:
            self._loaded = about, read_contents(self.store.files(about.id))
        return self._loaded[1]

    def begin(self, log: Log, source: str, contents: Contents) -> Manifest:
        """The first version, live at once; `contents` knows nothing yet, `source` is a hash of the delivery."""
        since = time.perf_counter()
        taken = self.log.take(taken_rows(positives(log).frame), source, log.has_clock)
        assert taken.batch is not None  # the store is new, and the log has rows
        frame = self.log.read([taken.batch])
        contents = replace(contents, reading=replace(contents.reading, has_clock=log.has_clock))
        new = numbered(contents.served, frame)
        after, numbers = _learnt(contents, new, HELD_FIRST)
        metric, queries, notes = self.limits.metric, newest(after.served), []
        if len(queries):
            for name, state in ((metric, after.served.state), (f"{metric} popularity", _popular(after, new))):
                numbers[name] = float(values_of(state, queries, metric, len(after.served.items)).mean())
        else:
            notes.append("no user of the newest events has an event before, so nothing could be asked.")
        numbers |= {"asked": float(len(queries)), "wait_s": time.perf_counter() - since}
        day = facts_of(frame, Catalog.empty(), Catalog.empty(), log.has_clock, None, taken.doubled, taken.known)
        about = _about(self.store, after, "fit", numbers).model_copy(
            update={"batch": taken.batch, "source": source, "data": {"day": asdict(day)}, "notes": notes}
        )
        return self._live(about, replace(after, asked=(_some(queries),)), "fit")

    def deliver(self, log: Log, source: str) -> Taken:
        """Append what was taken in a delivery to the log, but for what is there already; `catch_up` then learns it.

        LogError where its ids or its clock are of another kind than those before.
        """
        log = alike(log, self.contents.reading)
        served, frame = self.contents.served, taken_rows(log.frame)
        for catalog, name in ((served.users, "user_id"), (served.items, "item_id")):
            catalog.checked(frame[name])
        times = [time for time in (self.log.newest, served.newest_time) if time is not None]
        if not log.has_clock and times:
            frame = frame.with_columns(pl.col("time") + max(times) + 1)
        return self.log.take(frame, source, log.has_clock, set_aside(self.store))

    def catch_up(self, force: str = "") -> Iterator[Manifest]:
        """A version of each batch that waits, as `advance` makes them.

        First of all, a version that was to go live when its maker died does so.
        """
        live, moved = self.store.live, {move.to for move in self.store.moves()}
        for about in self.store.versions():
            if about.goes_live and about.parent == live and about.id not in moved:
                self.store.point(about.id, "update", "its maker died before")
                live = about.id
        for batch in waiting(self.store, self.log):
            yield self.advance(batch, force)

    def again(self, number: int, force: str = "") -> Manifest:
        """A version that has learnt from the events of another, which was refused or left by a rollback."""
        batch = self.store.manifest(number).batch
        if batch is None or batch in batches_of(chain_of(self.store)):
            raise OptionError(f"the live version has learnt all that version {number} had; nothing is left to take.")
        return self.advance(batch, force, is_late=True)

    def rest(self, batch: int | None, source: str) -> Manifest:
        """A version like the live one, of a day that brought nothing."""
        live, contents = self.store.live, self.contents
        note = "nothing was delivered that anybody took and that is new: the model is that of the version before."
        about = _about(self.store, contents, "no rows", {}).model_copy(
            update={"parent": live, "batch": batch, "source": source, "notes": [note]}
        )
        return self._live(about, contents, "update")

    def advance(self, batch: int, force: str = "", is_late: bool = False) -> Manifest:
        """A version that has learnt from a batch, live if it passes the gate, or by `force`, which says why.

        Events that other batches have taught the live version since are left out. Where learning fails, a version like
        the live one is refused, with the reason. `is_late`: that the events are old is known.
        """
        since, delivered = time.perf_counter(), self.log.read([batch])
        frame = self.log.without(delivered, batches_of(chain_of(self.store)))
        source, doubled, known = self.log.delivery(batch)
        known += len(delivered) - len(frame)
        if not len(frame):
            return self.rest(batch, source)
        try:
            about, after = self.tried(frame, (doubled, known), is_late)
        except (LogError, TrainingError) as why:
            about = _about(self.store, self.contents, "update", {}).model_copy(
                update={"parent": self.store.live, "promoted": False, "reasons": [str(why)]}
            )
            after, force = self.contents, ""
        notes = [*about.notes, *([f"let go live by force: {force}"] if force and not about.promoted else [])]
        numbers = about.numbers | {"wait_s": time.perf_counter() - since}
        goes_live = about.promoted or bool(force)
        update = {"batch": batch, "source": source, "notes": notes, "numbers": numbers, "goes_live": goes_live}
        about = about.model_copy(update=update)
        if goes_live:
            return self._live(about, after, "update", force)
        return self.store.write(about, lambda aside: write_contents(after, aside))

    def tried(
        self, frame: pl.DataFrame, left_out: tuple[int, int] = (0, 0), is_late: bool = False
    ) -> tuple[Manifest, Contents]:
        """What becomes of the live version by learning these rows, and the gate's verdict on it; nothing is written."""
        before, chain = self.contents, chain_of(self.store)
        day, first = self.facts(frame, left_out, is_late), chain[0]
        after, numbers = _learnt(before, numbered(before.served, frame), HELD)
        numbers["full_s"] = first.numbers.get("update_s", 0.0) * after.sizes["events"] / max(1, first.sizes["events"])
        queries = newest(after.served)
        if self.full_every and since_full(chain) + 1 >= interval_of(self.full_every, chain) and len(queries):
            is_even_N = queries.users_N % 2 == 0  # by these one of two is chosen, by the others it is judged
            after, more = _anew(self, after, frame, chain, queries[is_even_N.nonzero()[:, 0]])
            numbers, queries = numbers | more, queries[(~is_even_N).nonzero()[:, 0]]
        verdict, asked = self._judged(day, before, after, chain, queries)
        numbers |= verdict.numbers | _interests(before.served.state, after.served.state)
        about = _about(self.store, after, "update", numbers).model_copy(
            update={
                "parent": self.store.live,
                "data": {"day": asdict(day)},
                "notes": list(verdict.notes),
                "promoted": verdict.promoted,
                "reasons": list(verdict.reasons),
            }
        )
        return about, replace(after, asked=(*before.asked, asked)[-REMEMBERED:])

    def facts(self, frame: pl.DataFrame, left_out: tuple[int, int] = (0, 0), is_late: bool = False) -> Day:
        """What is to be said of a day's rows, of which so many doubled and so many known ones were left out."""
        served = self.contents.served
        newest_time = None if is_late else served.newest_time
        has_clock, head = self.contents.reading.has_clock, _head(served)
        return facts_of(frame, served.users, served.items, has_clock, newest_time, *left_out, head)

    def _judged(
        self, day: Day, before: Contents, after: Contents, chain: list[Manifest], queries: Queries
    ) -> tuple[Verdict, Queries]:
        """The gate's verdict, and the queries that later versions are asked."""
        metric, n_items = self.limits.metric, len(after.served.items)
        states = (after.served.state, before.served.state)
        mine_U, theirs_U = (values_of(state, queries, metric, n_items) for state in states)
        older = [past for past in before.asked[:-1] if len(past)]  # the last ones are news to the live version alone
        mine_O, theirs_O = (
            np.concatenate([np.zeros(0), *(values_of(state, past, metric, n_items) for past in older)])
            for state in states
        )
        earlier = _days(chain)
        tails = [manifest.numbers[metric] for manifest in chain if metric in manifest.numbers]
        return judge(day, earlier, Measured(mine_U, theirs_U, mine_O, theirs_O, tails), self.limits), _some(queries)

    def _live(self, about: Manifest, contents: Contents, action: Action, reason: str = "") -> Manifest:
        about = self.store.write(about, lambda aside: write_contents(contents, aside))
        self.store.point(about.id, action, reason)
        self._loaded = about, contents
        return about


def set_aside(store: Store) -> list[int]:
    """Batches that versions have met and the live one has not learnt: refused, or left by a rollback."""
    return sorted(set(batches_of(store.versions())) - set(batches_of(chain_of(store))))


def batches_of(chain: list[Manifest]) -> list[int]:
    """The batches of the log that these versions have met."""
    return [manifest.batch for manifest in chain if manifest.batch is not None]


def waiting(store: Store, log: EventLog) -> list[int]:
    """Batches of the log that no version has met yet, in order.

    StateError where the log lacks one that a version has learnt, or where a damaged manifest may name one.
    """
    met = {manifest.batch: manifest.id for manifest in store.versions() if manifest.batch is not None}
    last = max(met.values(), default=0)  # as batches are met in order, earlier versions name no later ones
    for number in store.numbers():
        if number > last:
            store.manifest(number)
    batches = log.batches()["batch"].to_list()
    if lost := sorted(met.keys() - set(batches)):
        raise StateError(f"{log.folder} lacks batch {lost[0]}, which versions have learnt; restore it from a backup.")
    return [batch for batch in batches if batch > max(met, default=0)]


def _anew(
    job: Job, after: Contents, frame: pl.DataFrame, chain: list[Manifest], queries: Queries
) -> tuple[Contents, dict[str, float]]:
    """A full retrain beside the update: the better one of the two, and what the retrain gained and cost."""
    since = time.perf_counter()
    empty, whole = from_nothing(job.contents, job.log, chain, frame)
    new = numbered(empty.served, whole)
    full = taught(empty, new, len(new.events) - len(after.served.pending))
    seconds, metric = time.perf_counter() - since, job.limits.metric
    if not len(queries):
        return after, {"full_s": seconds, GAIN: 0.0, "full_low": 0.0, "full_high": 0.0}
    values = [values_of(one.served.state, queries, metric, len(new.items)) for one in (full, after)]
    gain_U = values[0] - values[1]
    low, high = (float(end[0]) for end in interval(gain_U[:, None]))
    more = {GAIN: float(gain_U.mean()), "full_low": low, "full_high": high, "full_s": seconds}
    return (full if gain_U.mean() >= 0 else after), more


def preview(job: Job, log: Log | None) -> dict[str, Any]:
    """The facts of a delivery, and what is odd about it; nothing is changed."""
    if log is None:
        return {"day": None, "odd": ["the delivery holds no rows."]}
    day, chain = job.facts(taken_rows(log.frame)), chain_of(job.store)
    return {"day": asdict(day), "odd": looks_odd(day, _days(chain), job.limits)}


def _head(served: Served) -> pl.Series:
    """The ids of the most popular items, which had half of the attention lately."""
    counts_I = served.counts.model.counts_I.double()
    rows_I = counts_I.argsort(descending=True, stable=True)
    ahead_I = counts_I[rows_I].cumsum(0) - counts_I[rows_I]
    return served.items.ids(rows_I[(ahead_I < counts_I.sum() / 2) & (rows_I > 0)])


def _days(chain: list[Manifest]) -> list[Day]:
    """The days that led to the live version, the oldest first."""
    try:
        return [Day(**manifest.data["day"]) for manifest in chain[1:] if "day" in manifest.data]
    except TypeError as problem:
        raise StateError(f"a manifest of the live version's parents holds no facts of a day ({problem}).") from None


def _some(queries: Queries) -> Queries:
    """The first ones: they are in random order."""
    return queries[torch.arange(min(AGAIN, len(queries)))]


def taken_rows(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows that somebody took, as the log keeps them: exposures have label 0; categories and event ids are text."""
    frame = positive_rows(frame)
    return frame.with_columns(
        pl.col(name).cast(pl.String) for name in ("category", "event_id") if name in frame.columns
    )


def source_of(path: Path) -> str:
    """A hash of the bytes of a file, or of all files of a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    sums = [sum_of_file(file) for file in files if file.is_file()]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def _learnt(before: Contents, new: Numbered, share: float) -> tuple[Contents, dict[str, float]]:
    """What follows from learning all events but the newest `share` of those that are not late; what it cost."""
    wall, cpu, newest_time = time.perf_counter(), time.process_time(), before.served.newest_time
    n_events = len(new.events)
    n_new = n_events if newest_time is None else int((new.events.times_E >= newest_time).sum())
    after = taught(before, new, n_events - min(MOST_HELD, round(share * n_new)))
    costs = {"update_s": time.perf_counter() - wall, "update_cpu_s": time.process_time() - cpu}
    more = {f"new_{name}": float(n - before.sizes[name]) for name, n in after.sizes.items()}
    return after, after.served.state.costs | costs | more | {"late": float(n_events - n_new)}


def _popular(after: Contents, new: Numbered) -> State:
    """Popularity, having counted what the first version has learnt from."""
    served = after.served
    learnt = new.events[: len(new.events) - len(served.pending)]
    return absorb(State(PopularitySpec().build(0)), learnt, len(served.users), served.state.model.n_items)


def _interests(before: State, after: State) -> dict[str, float]:
    """How many users have more interests than before, and how many have fewer; nothing for models without."""
    if before.users is None or after.users is None:
        return {}
    n = min(before.users.n_users, after.users.n_users) + 1
    had_U, have_U = before.users.offsets_U.diff()[:n], after.users.offsets_U.diff()[:n]
    known_U = had_U > 0
    return {
        "gained_interests": float((known_U & (have_U > had_U)).sum()),
        "lost_interests": float((known_U & (have_U < had_U)).sum()),
    }


def _about(store: Store, contents: Contents, kind: Kind, numbers: dict[str, float]) -> Manifest:
    return Manifest(
        id=store.next,
        kind=kind,
        recipe=contents.recipe,
        spans_seen=contents.served.state.spans_seen,
        sizes=contents.sizes,
        held=len(contents.served.pending),
        numbers=numbers,
    )
