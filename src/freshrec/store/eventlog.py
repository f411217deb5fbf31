"""Every event ever delivered, once: an append-only Delta table of numbered batches, from which a user can be erased.

    folder/_delta_log/       the commits: files, numbers and sources of batches, times; never an id
    folder/batch=3/          the rows of the third batch
    folder/checksums.json    of all files above: one that differs from it is not read

A commit is there as a whole or not at all. A process that is killed between its commit and `checksums.json` leaves
files that are taken on trust until the next commit, which adds them.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import polars as pl
from deltalake import ColumnProperties, CommitProperties, DeltaTable, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from freshrec.data.catalog import WORDS
from freshrec.data.formats import printable
from freshrec.errors import LogError, OptionError, StateError
from freshrec.store.rows import KEYS, KINDS, each_once, ends_of, moment, split_named
from freshrec.store.signed import read_signed, sum_of_file, sync, write_signed

NAME = "freshrec event log 1"  # of the table, with the number of this format
CLOCK = {True: "time is a clock's", False: "time is a place in the log"}  # the table's description
SUMS = "checksums.json"

# The least and the greatest time of a file stand in the log, so that most files need not be read. The statistics of
# other columns would copy ids to places where nobody looks for them.
PROPERTIES = {"delta.dataSkippingStatsColumns": "time", "delta.enableExpiredLogCleanup": "false"}
WRITER = WriterProperties(
    compression="ZSTD",
    default_column_properties=ColumnProperties(statistics_enabled="NONE"),
    column_properties={
        "time": ColumnProperties(False, "CHUNK", encoding="DELTA_BINARY_PACKED"),
        "row": ColumnProperties(False, "NONE", encoding="DELTA_BINARY_PACKED"),
    },
)


@dataclass(frozen=True)
class Taken:
    """What became of a delivery: rows = doubled + known + kept."""

    batch: int | None  # the number of the new batch; None: nothing was appended
    again: int | None  # the batch that this very source already was
    rows: int  # delivered
    doubled: int = 0  # of these, the same event as an earlier row of the delivery
    known: int = 0  # in the log already
    late: int = 0  # kept, and older than the newest row of earlier batches
    kept: int = 0
    first: int | None = None  # time of the first kept row, and of the last
    last: int | None = None


@dataclass(frozen=True)
class EventLog:
    """The log in `folder`, which need not exist yet. Whoever changes it holds a lock: a conflict is a StateError."""

    folder: Path

    def take(self, frame: pl.DataFrame, source: str, has_clock: bool, aside: Collection[int] = ()) -> Taken:
        """Append what is new of a delivery (a `Log.frame`) in one commit, or nothing. LogError where it does not fit.

        An event is its event_id where it has one, else (user_id, item_id, time); without a clock a row that has no
        event_id is always new. What only batches `aside` hold is new too: nobody has learnt it. The very same `source`,
        a hash of what was delivered, is never taken twice: that would bring back users who were erased.
        """
        if not len(frame):
            return Taken(None, None, 0)
        with _told(self.folder, "written"):
            table = _table(self.folder)
            rows = _fitting(frame, table, has_clock, self.folder)
            once = each_once(rows, has_clock)
            n_doubled, sources = len(rows) - len(once), _sources(table)
            again = next((batch for batch, known in sources.items() if known == source), None)
            if again is not None:
                return Taken(None, again, len(rows), n_doubled, len(once))
            among = sources.keys() - set(aside)
            new = once if table is None else _new(once, table, has_clock, self.folder, among)
            if not len(new):
                return Taken(None, None, len(rows), n_doubled, len(once))
            newest = moment(_files(table).filter(pl.col("batch").is_in(among))["last"].max())
            batch = 1 + max(sources, default=0)
            about = {"batch": batch, "source": source, "doubled": n_doubled, "known": len(once) - len(new)}
            _append(new, about, table or self.folder, has_clock)
            _vouch(self.folder)
        n_late = int((new["time"] < newest).sum()) if has_clock and newest is not None else 0
        first, last = ends_of(new)
        return Taken(batch, None, len(rows), n_doubled, len(once) - len(new), n_late, len(new), first, last)

    def read(self, batches: Sequence[int] | None = None) -> pl.DataFrame:
        """The events of all batches, or of some, in the order of arrival: by batch, then time, then as delivered.

        Each once, where it came first. The columns are those of `Log.frame` in which any of these rows has a value.
        """
        with _told(self.folder, "read"):
            table = _table(self.folder)
            if table is None:
                raise LogError(f"the event log in {self.folder} holds no batch yet; give it a delivery first.")
            files = _files(table)
            if batches is not None:
                _must_know(batches, _sources(table), self.folder)
                files = files.filter(pl.col("batch").is_in(batches))
            _verify(self.folder, files)
            found = pl.DataFrame(table.scan(predicate=None if batches is None else _among(batches)))
            found = found.sort("batch", "time", "row")
            if batches is None or len(batches) > 1:
                found = each_once(found, _has_clock(table)).sort("batch", "time", "row")
        given = [name for name in KINDS if name in found.columns and found[name].null_count() < len(found)]
        more = [name for name in given if name not in KEYS]
        return found.select(*KEYS, *more)

    def without(self, rows: pl.DataFrame, batches: Collection[int]) -> pl.DataFrame:
        """Those of some rows that `read` gave whose event is in none of these batches."""
        with _told(self.folder, "read"):
            table = _table(self.folder)
            return rows if table is None else _new(rows, table, _has_clock(table), self.folder, batches)

    def batches(self) -> pl.DataFrame:
        """batch, source, rows, and the times first and last, of every batch; 0 rows where all were erased."""
        with _told(self.folder, "read"):
            table = _table(self.folder)
            sources = list(_sources(table).items())
            files = _files(table).group_by("batch")
            of_each = files.agg(pl.col("rows").sum(), pl.col("first").min(), pl.col("last").max())
        found = pl.DataFrame(sources, {"batch": pl.Int32, "source": pl.String}, orient="row")
        return found.join(of_each, on="batch", how="left").with_columns(pl.col("rows").fill_null(0)).sort("batch")

    def delivery(self, batch: int) -> tuple[str, int, int]:
        """The source of a batch, and how many rows were left out as doubled or known; also of one empty by now."""
        with _told(self.folder, "read"):
            made = _made(_table(self.folder))
            _must_know([batch], made, self.folder)
            return made[batch]["source"], made[batch].get("doubled", 0), made[batch].get("known", 0)

    @property
    def has_clock(self) -> bool:
        """Whether times are a clock's; False also where there is no row yet."""
        with _told(self.folder, "read"):
            table = _table(self.folder)
            return table is not None and _has_clock(table)

    @property
    def newest(self) -> int | None:
        """The time of the newest row; None where there is none."""
        return moment(self.batches()["last"].max())

    def erase(self, user_id: int | str) -> int:
        """Remove all rows of a user, in one commit and from the disk; how many they were.

        After it no file below the folder holds the id: not the rows, which are written anew, not statistics, not the
        log. One that was interrupted is completed by another call, which then may count 0. Numbers and sources of
        batches stay.
        """
        n_rows = 0
        with _told(self.folder, "written"):
            table = _table(self.folder)
            if table is not None:
                _verify(self.folder, _files(table))
                who = _literal(user_id, table, self.folder)
                hit = pl.DataFrame(table.scan(columns=["batch"], predicate=f"user_id = {who}"))
                n_rows, batches = len(hit), hit["batch"].unique().sort().to_list()
                if n_rows:
                    # A delete by predicate would write the id into the log. The rows stream from file to file.
                    rest = table.scan(predicate=f"{_among(batches)} AND user_id <> {who}")
                    write_deltalake(
                        table,
                        rest,
                        mode="overwrite",
                        predicate=_among(batches),
                        writer_properties=WRITER,
                        commit_properties=CommitProperties(max_commit_retries=0),
                    )
            _sweep(self.folder, table)
            if table is not None:
                _vouch(self.folder)
        return n_rows


def _table(folder: Path) -> DeltaTable | None:
    """The table, when its log is as it was written; None where nothing was taken yet."""
    commits, sums = _commits(folder), _sums(folder)
    for name in [name for name in sums or {} if name.startswith("_delta_log/")]:
        if name not in commits or sum_of_file(folder / name) != (sums or {})[name]:
            raise _damaged(folder, name)
    if commits and sums is None:
        raise StateError(f"{folder} has a Delta table but no {SUMS}: restore that, or choose another folder.")
    if not commits:
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        strangers = [
            name for name in names if name not in ("_delta_log", SUMS) and not name.startswith((".", "batch="))
        ]
        if strangers:
            raise StateError(f"{folder} holds {printable(strangers[0], 60)} and no event log; choose another folder.")
        return None
    table = DeltaTable(folder)
    if table.metadata().name != NAME:
        raise StateError(f"the Delta table in {folder} is no event log of this format; choose another folder.")
    return table


def _has_clock(table: DeltaTable) -> bool:
    return str(table.metadata().description) == CLOCK[True]


def _commits(folder: Path) -> list[str]:
    """The files of the log that Delta reads, but for its hint where to begin."""
    found = (folder / "_delta_log").glob("[0-9]*")
    return sorted(f"_delta_log/{path.name}" for path in found if path.suffix in (".json", ".parquet"))


def _sums(folder: Path) -> dict[str, str] | None:
    """The checksums of files by name; None where there are none at all."""
    found: dict[str, str] | None = read_signed(folder / SUMS) if (folder / SUMS).exists() else None
    return found


def _files(table: DeltaTable | None) -> pl.DataFrame:
    """The files of the rows: name, batch, rows, first, last."""
    if table is None:
        kinds = {"batch": pl.Int32, "rows": pl.Int64, "first": pl.Int64, "last": pl.Int64}
        return pl.DataFrame(schema={"name": pl.String, **kinds})
    actions = pl.DataFrame(table.get_add_actions(flatten=True))
    stats = {"rows": "num_records", "first": "min.time", "last": "max.time"}
    return actions.select(name="path", batch="partition.batch", **stats)


def _made(table: DeltaTable | None) -> dict[int, dict[str, Any]]:
    """What the commits that made them say of every batch that there ever was."""
    history = [] if table is None else reversed(table.history())
    return {commit["batch"]: commit for commit in history if "batch" in commit}


def _sources(table: DeltaTable | None) -> dict[int, str]:
    return {batch: commit["source"] for batch, commit in _made(table).items()}


def _verify(folder: Path, files: pl.DataFrame) -> None:
    """StateError where a file is missing or not as it was written."""
    sums = _sums(folder) or {}
    for name in files["name"]:
        if not (folder / name).exists() or (name in sums and sum_of_file(folder / name) != sums[name]):
            raise _damaged(folder, name)


def _damaged(folder: Path, name: str) -> StateError:
    return StateError(
        f"the event log in {folder} is damaged: {name} is missing or not as it was written; restore it from a backup."
    )


def _vouch(folder: Path) -> None:
    """Bring the last commit to the disk, and write the checksums of all files."""
    sums = _sums(folder) or {}
    names = [*_commits(folder), *_files(DeltaTable(folder))["name"]]
    for name in [name for name in names if name not in sums]:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
        sums[name] = sum_of_file(folder / name)
        sync((folder / name).parent)
    write_signed({name: sums[name] for name in names}, folder / SUMS)


def _sweep(folder: Path, table: DeltaTable | None) -> None:
    """Remove the files of rows that are not in the table: former ones, and what killed processes left.

    A vacuum passes over unfinished files, which have a # in their names.
    """
    kept = {folder / name for name in _files(table)["name"]}
    for path in folder.glob("batch=*/**/*"):
        if path.is_file() and path not in kept:
            path.unlink()


def _append(rows: pl.DataFrame, about: dict[str, Any], table: DeltaTable | Path, has_clock: bool) -> None:
    """One commit, which says of itself what it is `about`; the first one makes the table."""
    if isinstance(table, Path):
        if unquote(str(table.absolute())) != str(table.absolute()):
            raise StateError(f"Delta tables cannot lie in {table}, for its percent sign; choose another folder.")
        table.mkdir(parents=True, exist_ok=True)
        write_signed({}, table / SUMS)
    write_deltalake(
        table,
        rows.sort("time", "row").with_columns(batch=pl.lit(about["batch"], pl.Int32), source=pl.lit(about["source"])),
        mode="append",
        schema_mode="merge",
        partition_by="batch",
        name=NAME,
        description=CLOCK[has_clock],
        configuration=PROPERTIES if isinstance(table, Path) else None,
        writer_properties=WRITER,
        commit_properties=CommitProperties(about, max_commit_retries=0),
    )


def _fitting(frame: pl.DataFrame, table: DeltaTable | None, has_clock: bool, folder: Path) -> pl.DataFrame:
    """The columns that hold anything, as the log has them, and `row`, the place in the delivery."""
    kinds = {} if table is None else dict(pl.Schema(table.schema().to_arrow()))
    frame = frame.select(s for s in frame.iter_columns() if s.name in KEYS or s.null_count() < len(s))
    for name, kind in frame.schema.items():
        if name not in KINDS or kind not in KINDS[name]:
            raise LogError(f"a log has no column {printable(name, 60)} of {kind}; give frames that read_log has read.")
        if kind != kinds.get(name, kind):
            mend = f"declare it: --columns {name}=NAME:text" if kind == pl.Int64 else "check the delivery"
            found, wanted = WORDS[type(kind)], WORDS[type(kinds[name])]
            raise LogError(f"{name} holds {found}, but {wanted} in the event log in {folder}; {mend}.")
    if frame.select(KEYS).null_count().sum_horizontal().item():
        raise LogError("a delivery has rows without user_id, item_id or time; give frames that read_log has read.")
    if table is not None and table.metadata().description != CLOCK[has_clock]:
        here, there = ("a clock", "none") if has_clock else ("no clock", "one")
        raise LogError(f"the delivery has {here}, and the event log in {folder} has {there}; check its time column.")
    return frame.with_columns(row=pl.int_range(pl.len(), dtype=pl.Int64))


def _new(
    rows: pl.DataFrame, table: DeltaTable, has_clock: bool, folder: Path, batches: Collection[int]
) -> pl.DataFrame:
    """The rows whose event none of these batches holds, in their order."""
    named, plain = split_named(rows.with_row_index("place"))
    ids_known = "event_id" in [field.name for field in table.schema().fields]
    files, among = _files(table).filter(pl.col("batch").is_in(batches)), _among(batches)
    if len(named) and ids_known:
        _verify(folder, files)
        named = _without(named, ["event_id"], table, f"{among} AND event_id IS NOT NULL")
    if len(plain) and has_clock:
        first, last = ends_of(plain)
        _verify(folder, files.filter(pl.col("first") <= last, pl.col("last") >= first))
        during = f"{among} AND time >= {first} AND time <= {last}"
        plain = _without(plain, KEYS, table, during + (" AND event_id IS NULL" if ids_known else ""))
    return pl.concat([named, plain]).sort("place").drop("place")


def _without(rows: pl.DataFrame, keys: Sequence[str], table: DeltaTable, predicate: str) -> pl.DataFrame:
    """The rows whose keys no row of the table has, among those that meet the predicate."""
    held = pl.DataFrame(table.scan(columns=list(keys), predicate=predicate))
    return rows.join(held, on=list(keys), how="anti")


def _literal(user_id: int | str, table: DeltaTable, folder: Path) -> str:
    """A user's id in a predicate."""
    kind = pl.Schema(table.schema().to_arrow())["user_id"]
    if isinstance(user_id, str) != (kind == pl.String):
        words = WORDS[type(kind)]
        raise OptionError(
            f"the users of the event log in {folder} are {words}; {printable(repr(user_id), 40)} is none."
        )
    return "'" + user_id.replace("'", "''") + "'" if isinstance(user_id, str) else str(user_id)


def _among(batches: Iterable[int]) -> str:
    return f"batch IN ({', '.join(map(str, [0, *batches]))})"  # there is no batch 0, and a list is never empty


def _must_know(batches: Iterable[int], known: Collection[int], folder: Path) -> None:
    for batch in batches:
        if batch not in known:
            raise OptionError(f"the event log in {folder} has no batch {batch}; it has {len(known)}, counted from 1.")


@contextmanager
def _told(folder: Path, verb: str) -> Iterator[None]:
    """Turns what the library or the disk makes of trouble into one StateError."""
    try:
        yield
    except CommitFailedError as why:
        raise StateError(
            f"another process changed the event log in {folder} at the same time, so that nothing was written; "
            "run it again."
        ) from why
    except (DeltaError, pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as why:
        mend = "see that the disk has room and the folder may be written" if verb == "written" else "restore it"
        reason = printable(str(why).split("\n")[0], 160).rstrip(".")
        raise StateError(f"the event log in {folder} cannot be {verb} ({reason}); {mend}, and run it again.") from why
