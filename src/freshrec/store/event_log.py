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

from freshrec.data.catalog import TYPE_NAMES
from freshrec.data.formats import to_printable
from freshrec.errors import LogError, OptionError, StateError
from freshrec.files import file_checksum, sync_folder
from freshrec.store.checksummed_json import read_checksummed, write_checksummed
from freshrec.store.dedup import COLUMN_TYPES, EVENT_KEYS, as_time, drop_duplicates, split_by_event_id, time_range

TABLE_NAME = "freshrec event log 1"  # of the table, with the number of this format
CLOCK_DESCRIPTIONS = {True: "time is a clock's", False: "time is a place in the log"}  # the table's description
CHECKSUM_FILE = "checksums.json"

# The least and the greatest time of a file stand in the log, so that most files need not be read. The statistics of
# other columns would copy ids to places where nobody looks for them.
TABLE_PROPERTIES = {"delta.dataSkippingStatsColumns": "time", "delta.enableExpiredLogCleanup": "false"}
WRITER_PROPERTIES = WriterProperties(
    compression="ZSTD",
    default_column_properties=ColumnProperties(statistics_enabled="NONE"),
    column_properties={
        "time": ColumnProperties(False, "CHUNK", encoding="DELTA_BINARY_PACKED"),
        "row": ColumnProperties(False, "NONE", encoding="DELTA_BINARY_PACKED"),
    },
)


@dataclass(frozen=True)
class AppendResult:
    """What became of a delivery: n_rows = n_duplicates + n_known + n_appended."""

    batch: int | None  # the number of the new batch; None: nothing was appended
    repeated_batch: int | None  # the batch that this very source already was
    n_rows: int  # delivered
    n_duplicates: int = 0  # of these, the same event as an earlier row of the delivery
    n_known: int = 0  # in the log already
    n_late: int = 0  # kept, and older than the newest row of earlier batches
    n_appended: int = 0
    first_time: int | None = None  # time of the first kept row, and of the last
    last_time: int | None = None


@dataclass(frozen=True)
class EventLog:
    """The log in `folder`, which need not exist yet. Whoever changes it holds a lock: a conflict is a StateError."""

    folder: Path

    def append(
        self, frame: pl.DataFrame, source: str, has_clock: bool, ignored_batches: Collection[int] = ()
    ) -> AppendResult:
        """Append what is new of a delivery (a `Log.frame`) in one commit, or nothing. LogError where it does not fit.

        An event is its event_id where it has one, else (user_id, item_id, time); without a clock a row that has no
        event_id is always new. What only `ignored_batches` hold is new too: nobody has learnt it. The very same
        `source`, a hash of what was delivered, is never taken twice: that would bring back users who were erased.
        """
        if not len(frame):
            return AppendResult(None, None, 0)
        with _translate_errors(self.folder, "written"):
            table = _open_table(self.folder)
            rows = _match_schema(frame, table, has_clock, self.folder)
            distinct = drop_duplicates(rows, has_clock)
            n_duplicates, sources = len(rows) - len(distinct), _batch_sources(table)
            repeated_batch = next((batch for batch, known in sources.items() if known == source), None)
            if repeated_batch is not None:
                return AppendResult(None, repeated_batch, len(rows), n_duplicates, len(distinct))
            known_batches = sources.keys() - set(ignored_batches)
            new = distinct if table is None else _new_rows(distinct, table, has_clock, self.folder, known_batches)
            if not len(new):
                return AppendResult(None, None, len(rows), n_duplicates, len(distinct))
            newest = as_time(_data_files(table).filter(pl.col("batch").is_in(known_batches))["last"].max())
            batch = 1 + max(sources, default=0)
            commit_info = {"batch": batch, "source": source, "doubled": n_duplicates, "known": len(distinct) - len(new)}
            _commit_rows(new, commit_info, table or self.folder, has_clock)
            _write_checksums(self.folder)
        n_late = int((new["time"] < newest).sum()) if has_clock and newest is not None else 0
        first, last = time_range(new)
        return AppendResult(
            batch, None, len(rows), n_duplicates, len(distinct) - len(new), n_late, len(new), first, last
        )

    def read(self, batches: Sequence[int] | None = None) -> pl.DataFrame:
        """The events of all batches, or of some, in the order of arrival: by batch, then time, then as delivered.

        Each once, where it came first. The columns are those of `Log.frame` in which any of these rows has a value.
        """
        with _translate_errors(self.folder, "read"):
            table = _open_table(self.folder)
            if table is None:
                raise LogError(f"the event log in {self.folder} holds no batch yet; give it a delivery first.")
            files = _data_files(table)
            if batches is not None:
                _require_batches(batches, _batch_sources(table), self.folder)
                files = files.filter(pl.col("batch").is_in(batches))
            _verify_files(self.folder, files)
            found = pl.DataFrame(table.scan(predicate=None if batches is None else _batch_predicate(batches)))
            found = found.sort("batch", "time", "row")
            if batches is None or len(batches) > 1:
                found = drop_duplicates(found, _has_clock(table)).sort("batch", "time", "row")
        filled = [name for name in COLUMN_TYPES if name in found.columns and found[name].null_count() < len(found)]
        optional_columns = [name for name in filled if name not in EVENT_KEYS]
        return found.select(*EVENT_KEYS, *optional_columns)

    def rows_not_in(self, rows: pl.DataFrame, batches: Collection[int]) -> pl.DataFrame:
        """Those of some rows that `read` gave whose event is in none of these batches."""
        with _translate_errors(self.folder, "read"):
            table = _open_table(self.folder)
            return rows if table is None else _new_rows(rows, table, _has_clock(table), self.folder, batches)

    def batches(self) -> pl.DataFrame:
        """batch, source, rows, and the times first and last, of every batch; 0 rows where all were erased."""
        with _translate_errors(self.folder, "read"):
            table = _open_table(self.folder)
            sources = list(_batch_sources(table).items())
            files = _data_files(table).group_by("batch")
            totals = files.agg(pl.col("rows").sum(), pl.col("first").min(), pl.col("last").max())
        found = pl.DataFrame(sources, {"batch": pl.Int32, "source": pl.String}, orient="row")
        return found.join(totals, on="batch", how="left").with_columns(pl.col("rows").fill_null(0)).sort("batch")

    def delivery_counts(self, batch: int) -> tuple[str, int, int]:
        """The source of a batch, and how many rows were left out as doubled or known; also of one empty by now."""
        with _translate_errors(self.folder, "read"):
            commits = _batch_commits(_open_table(self.folder))
            _require_batches([batch], commits, self.folder)
            return commits[batch]["source"], commits[batch].get("doubled", 0), commits[batch].get("known", 0)

    @property
    def has_clock(self) -> bool:
        """Whether times are a clock's; False also where there is no row yet."""
        with _translate_errors(self.folder, "read"):
            table = _open_table(self.folder)
            return table is not None and _has_clock(table)

    @property
    def newest_time(self) -> int | None:
        """The time of the newest row; None where there is none."""
        return as_time(self.batches()["last"].max())

    def erase_user(self, user_id: int | str) -> int:
        """Remove all rows of a user, in one commit and from the disk; how many they were.

        After it no file below the folder holds the id: not the rows, which are rewritten, not statistics, not the
        log. One that was interrupted is completed by another call, which then may count 0. Numbers and sources of
        batches stay.
        """
        n_rows = 0
        with _translate_errors(self.folder, "written"):
            table = _open_table(self.folder)
            if table is not None:
                _verify_files(self.folder, _data_files(table))
                user_literal = _user_literal(user_id, table, self.folder)
                matching = pl.DataFrame(table.scan(columns=["batch"], predicate=f"user_id = {user_literal}"))
                n_rows, batches = len(matching), matching["batch"].unique().sort().to_list()
                if n_rows:
                    # A delete by predicate would write the id into the log. The rows stream from file to file.
                    remaining = table.scan(predicate=f"{_batch_predicate(batches)} AND user_id <> {user_literal}")
                    write_deltalake(
                        table,
                        remaining,
                        mode="overwrite",
                        predicate=_batch_predicate(batches),
                        writer_properties=WRITER_PROPERTIES,
                        commit_properties=CommitProperties(max_commit_retries=0),
                    )
            _remove_stale_files(self.folder, table)
            if table is not None:
                _write_checksums(self.folder)
        return n_rows


def _open_table(folder: Path) -> DeltaTable | None:
    """The table, when its log is as it was written; None where nothing was taken yet."""
    commits, checksums = _commit_files(folder), _read_checksums(folder)
    for name in [name for name in checksums or {} if name.startswith("_delta_log/")]:
        if name not in commits or file_checksum(folder / name) != (checksums or {})[name]:
            raise _damage_error(folder, name)
    if commits and checksums is None:
        raise StateError(f"{folder} has a Delta table but no {CHECKSUM_FILE}: restore that, or choose another folder.")
    if not commits:
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        unknown_names = [
            name for name in names if name not in ("_delta_log", CHECKSUM_FILE) and not name.startswith((".", "batch="))
        ]
        if unknown_names:
            raise StateError(
                f"{folder} holds {to_printable(unknown_names[0], 60)} and no event log; choose another folder."
            )
        return None
    table = DeltaTable(folder)
    if table.metadata().name != TABLE_NAME:
        raise StateError(f"the Delta table in {folder} is no event log of this format; choose another folder.")
    return table


def _has_clock(table: DeltaTable) -> bool:
    return str(table.metadata().description) == CLOCK_DESCRIPTIONS[True]


def _commit_files(folder: Path) -> list[str]:
    """The files of the log that Delta reads, but for its hint where to begin."""
    found = (folder / "_delta_log").glob("[0-9]*")
    return sorted(f"_delta_log/{path.name}" for path in found if path.suffix in (".json", ".parquet"))


def _read_checksums(folder: Path) -> dict[str, str] | None:
    """The checksums of files by name; None where there are none at all."""
    if not (folder / CHECKSUM_FILE).exists():
        return None
    found: dict[str, str] = read_checksummed(folder / CHECKSUM_FILE)
    return found


def _data_files(table: DeltaTable | None) -> pl.DataFrame:
    """The files of the rows: name, batch, rows, first, last."""
    if table is None:
        column_types = {"batch": pl.Int32, "rows": pl.Int64, "first": pl.Int64, "last": pl.Int64}
        return pl.DataFrame(schema={"name": pl.String, **column_types})
    actions = pl.DataFrame(table.get_add_actions(flatten=True))
    stats = {"rows": "num_records", "first": "min.time", "last": "max.time"}
    return actions.select(name="path", batch="partition.batch", **stats)


def _batch_commits(table: DeltaTable | None) -> dict[int, dict[str, Any]]:
    """What the commits that made them say of every batch that there ever was."""
    history = [] if table is None else reversed(table.history())
    return {commit["batch"]: commit for commit in history if "batch" in commit}


def _batch_sources(table: DeltaTable | None) -> dict[int, str]:
    return {batch: commit["source"] for batch, commit in _batch_commits(table).items()}


def _verify_files(folder: Path, files: pl.DataFrame) -> None:
    """StateError where a file is missing or not as it was written."""
    sums = _read_checksums(folder) or {}
    for name in files["name"]:
        if not (folder / name).exists() or (name in sums and file_checksum(folder / name) != sums[name]):
            raise _damage_error(folder, name)


def _damage_error(folder: Path, name: str) -> StateError:
    return StateError(
        f"the event log in {folder} is damaged: {name} is missing or not as it was written; restore it from a backup."
    )


def _write_checksums(folder: Path) -> None:
    """Bring the last commit to the disk, and write the checksums of all files."""
    sums = _read_checksums(folder) or {}
    names = [*_commit_files(folder), *_data_files(DeltaTable(folder))["name"]]
    for name in [name for name in names if name not in sums]:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
        sums[name] = file_checksum(folder / name)
        sync_folder((folder / name).parent)
    write_checksummed({name: sums[name] for name in names}, folder / CHECKSUM_FILE)


def _remove_stale_files(folder: Path, table: DeltaTable | None) -> None:
    """Remove the files of rows that are not in the table: former ones, and what killed processes left.

    A vacuum passes over unfinished files, which have a # in their names.
    """
    current_files = {folder / name for name in _data_files(table)["name"]}
    for path in folder.glob("batch=*/**/*"):
        if path.is_file() and path not in current_files:
            path.unlink()


def _commit_rows(rows: pl.DataFrame, commit_info: dict[str, Any], table: DeltaTable | Path, has_clock: bool) -> None:
    """One commit, which `commit_info` describes; the first one makes the table."""
    if isinstance(table, Path):
        if unquote(str(table.absolute())) != str(table.absolute()):
            raise StateError(f"Delta tables cannot lie in {table}, for its percent sign; choose another folder.")
        table.mkdir(parents=True, exist_ok=True)
        write_checksummed({}, table / CHECKSUM_FILE)
    write_deltalake(
        table,
        rows.sort("time", "row").with_columns(
            batch=pl.lit(commit_info["batch"], pl.Int32), source=pl.lit(commit_info["source"])
        ),
        mode="append",
        schema_mode="merge",
        partition_by="batch",
        name=TABLE_NAME,
        description=CLOCK_DESCRIPTIONS[has_clock],
        configuration=TABLE_PROPERTIES if isinstance(table, Path) else None,
        writer_properties=WRITER_PROPERTIES,
        commit_properties=CommitProperties(commit_info, max_commit_retries=0),
    )


def _match_schema(frame: pl.DataFrame, table: DeltaTable | None, has_clock: bool, folder: Path) -> pl.DataFrame:
    """The columns that hold anything, as the log has them, and `row`, the place in the delivery."""
    column_types = {} if table is None else dict(pl.Schema(table.schema().to_arrow()))
    frame = frame.select(s for s in frame.iter_columns() if s.name in EVENT_KEYS or s.null_count() < len(s))
    for name, kind in frame.schema.items():
        if name not in COLUMN_TYPES or kind not in COLUMN_TYPES[name]:
            raise LogError(
                f"a log has no column {to_printable(name, 60)} of {kind}; give frames that read_log has read."
            )
        if kind != column_types.get(name, kind):
            advice = f"declare it: --columns {name}=NAME:text" if kind == pl.Int64 else "check the delivery"
            found, expected = TYPE_NAMES[type(kind)], TYPE_NAMES[type(column_types[name])]
            raise LogError(f"{name} holds {found}, but {expected} in the event log in {folder}; {advice}.")
    if frame.select(EVENT_KEYS).null_count().sum_horizontal().item():
        raise LogError("a delivery has rows without user_id, item_id or time; give frames that read_log has read.")
    if table is not None and table.metadata().description != CLOCK_DESCRIPTIONS[has_clock]:
        delivered, stored = ("a clock", "none") if has_clock else ("no clock", "one")
        raise LogError(
            f"the delivery has {delivered}, and the event log in {folder} has {stored}; check its time column."
        )
    return frame.with_columns(row=pl.int_range(pl.len(), dtype=pl.Int64))


def _new_rows(
    rows: pl.DataFrame, table: DeltaTable, has_clock: bool, folder: Path, batches: Collection[int]
) -> pl.DataFrame:
    """The rows whose event none of these batches holds, in their order."""
    with_id, without_id = split_by_event_id(rows.with_row_index("place"))
    ids_known = "event_id" in [field.name for field in table.schema().fields]
    files, in_batches = _data_files(table).filter(pl.col("batch").is_in(batches)), _batch_predicate(batches)
    if len(with_id) and ids_known:
        _verify_files(folder, files)
        with_id = _anti_join(with_id, ["event_id"], table, f"{in_batches} AND event_id IS NOT NULL")
    if len(without_id) and has_clock:
        first, last = time_range(without_id)
        _verify_files(folder, files.filter(pl.col("first") <= last, pl.col("last") >= first))
        during = f"{in_batches} AND time >= {first} AND time <= {last}"
        without_id = _anti_join(without_id, EVENT_KEYS, table, during + (" AND event_id IS NULL" if ids_known else ""))
    return pl.concat([with_id, without_id]).sort("place").drop("place")


def _anti_join(rows: pl.DataFrame, keys: Sequence[str], table: DeltaTable, predicate: str) -> pl.DataFrame:
    """The rows whose keys no row of the table has, among those that meet the predicate."""
    existing = pl.DataFrame(table.scan(columns=list(keys), predicate=predicate))
    return rows.join(existing, on=list(keys), how="anti")


def _user_literal(user_id: int | str, table: DeltaTable, folder: Path) -> str:
    """A user's id in a predicate."""
    kind = pl.Schema(table.schema().to_arrow())["user_id"]
    if isinstance(user_id, str) != (kind == pl.String):
        words = TYPE_NAMES[type(kind)]
        raise OptionError(
            f"the users of the event log in {folder} are {words}; {to_printable(repr(user_id), 40)} is none."
        )
    return "'" + user_id.replace("'", "''") + "'" if isinstance(user_id, str) else str(user_id)


def _batch_predicate(batches: Iterable[int]) -> str:
    return f"batch IN ({', '.join(map(str, [0, *batches]))})"  # there is no batch 0, and a list is never empty


def _require_batches(batches: Iterable[int], known: Collection[int], folder: Path) -> None:
    for batch in batches:
        if batch not in known:
            raise OptionError(f"the event log in {folder} has no batch {batch}; it has {len(known)}, counted from 1.")


@contextmanager
def _translate_errors(folder: Path, verb: str) -> Iterator[None]:
    """Turns what the library or the disk makes of trouble into one StateError."""
    try:
        yield
    except CommitFailedError as problem:
        raise StateError(
            f"another process changed the event log in {folder} at the same time, so that nothing was written; "
            "run it again."
        ) from problem
    except (DeltaError, pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as problem:
        advice = "see that the disk has room and the folder may be written" if verb == "written" else "restore it"
        reason = to_printable(str(problem).split("\n")[0], 160).rstrip(".")
        raise StateError(
            f"the event log in {folder} cannot be {verb} ({reason}); {advice}, and run it again."
        ) from problem
