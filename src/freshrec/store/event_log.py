"""The event log: every delivered event, once, in an append-only Delta table of numbered batches. Users can be erased.

    folder/_delta_log/       commits: files, numbers and sources of batches, times; never an id of a user or item
    folder/batch=3/          the rows of batch 3
    folder/checksums.json    checksums of all files above; a file that differs is not read

A commit exists completely or not at all. A process that is killed before it writes `checksums.json` leaves new files
without checksums. They are read without a check until the next commit adds their checksums.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from deltalake import ColumnProperties, CommitProperties, DeltaTable, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from freshrec.data.catalog import TYPE_NAMES
from freshrec.data.duplicates import EVENT_KEYS, count_reused_ids, drop_duplicate_rows
from freshrec.data.identities import convert_ids
from freshrec.errors import LogError, OptionError, StateError
from freshrec.files import file_checksum
from freshrec.store.checksummed_json import write_checksummed
from freshrec.store.log_columns import COLUMN_TYPES, ID_COLUMNS, as_time, time_range
from freshrec.store.log_files import (
    CHECKSUM_FILE,
    LOG_FOLDER,
    batch_predicate,
    commit_files,
    commit_path,
    damage_error,
    data_files,
    read_checksums,
    require_supported_path,
    verify_files,
    write_checksums,
)
from freshrec.store.manifest import LogFingerprint
from freshrec.store.new_rows import NewRows, find_new_rows
from freshrec.store.signing import SigningKey
from freshrec.store.versions import Store
from freshrec.text_layout import to_printable

TABLE_NAME = "freshrec event log 1"  # name of the table, with the number of its format
CLOCK_DESCRIPTIONS = {True: "time is a clock's", False: "time is a place in the log"}  # the table's description

# Statistics of the time column are stored, so that most files need not be read. Statistics of other columns would copy
# ids of users to places where erasing does not look.
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
    """Numbers of rows of a delivery by outcome: n_rows = n_duplicates + n_known + n_appended + n_separate."""

    batch: int | None  # number of the new batch; None = nothing was appended
    repeated_batch: int | None  # batch of the same source, if it was delivered before
    n_rows: int  # rows delivered
    n_duplicates: int = 0  # repeat an earlier row of the delivery
    n_known: int = 0  # are in the log already
    n_late: int = 0  # appended, but older than the newest row of earlier batches
    n_appended: int = 0
    first_time: int | None = None  # time of the first and of the last appended row
    last_time: int | None = None
    n_separate: int = 0  # appended as a batch of their own
    n_reused_ids: int = 0  # event ids that stand for rows with another user, item or time; only the first row counts


@dataclass(frozen=True)
class EventLog:
    """The event log in `folder`, which need not exist yet. Lock it while you change it: conflicts raise StateError.

    With a key, its checksums are signed, and a log without the signature of this key is an error.
    """

    folder: Path
    key: SigningKey | None = None

    def append(
        self, frame: pl.DataFrame, source: str, has_clock: bool, ignored_batches: Collection[int] = ()
    ) -> AppendResult:
        """Append the new rows of a delivery (a `Log.frame`) in one commit. Raises LogError if its columns do not fit.

        `data/duplicates.py` has the rule for duplicates. Events that only `ignored_batches` hold are new too, because
        no live version has learned them. The same `source`, a hash of the delivered bytes, is never appended twice,
        because that would bring back erased users.
        """
        if not len(frame):
            return AppendResult(None, None, 0)
        with _translate_errors(self.folder, "written"):
            table = _open_table(self.folder, self.key)
            rows = _match_schema(frame, table, has_clock, self.folder)
            distinct = drop_duplicate_rows(rows, has_clock)
            n_duplicates, sources = len(rows) - len(distinct), _batch_sources(table)
            repeated_batch = next((batch for batch, known in sources.items() if known == source), None)
            if repeated_batch is not None:
                return AppendResult(None, repeated_batch, len(rows), n_duplicates, len(distinct))
            known_batches = sources.keys() - set(ignored_batches)
            new, n_reused_ids = NewRows(distinct, 0)
            if table is not None:
                new, n_reused_ids = find_new_rows(distinct, table, has_clock, self.folder, known_batches)
            if n_duplicates:
                n_reused_ids += count_reused_ids(rows, has_clock)
            if not len(new):
                return AppendResult(None, None, len(rows), n_duplicates, len(distinct), n_reused_ids=n_reused_ids)
            newest = as_time(data_files(table).filter(pl.col("batch").is_in(known_batches))["last"].max())
            batch = 1 + max(sources, default=0)
            commit_info = {"batch": batch, "source": source, "doubled": n_duplicates, "known": len(distinct) - len(new)}
            _commit_rows(new, commit_info, table or self.folder, has_clock)
            write_checksums(self.folder, data_files(DeltaTable(self.folder))["name"], self.key)
        n_late = int((new["time"] < newest).sum()) if has_clock and newest is not None else 0
        counts = (len(rows), n_duplicates, len(distinct) - len(new), n_late, len(new))
        return AppendResult(batch, None, *counts, *time_range(new), n_reused_ids=n_reused_ids)

    def read(self, batches: Sequence[int] | None = None) -> pl.DataFrame:
        """Read the events of all batches, or of some, ordered by batch, then time, then place in the delivery.

        An event that several batches hold is returned once, with the first batch. Empty columns are left out.
        Raises LogError if the log is empty.
        """
        with _translate_errors(self.folder, "read"):
            table = _open_table(self.folder, self.key)
            if table is None:
                raise LogError(f"The event log in {self.folder} is empty. Append a delivery first.")
            files = data_files(table)
            if batches is not None:
                _require_batches(batches, _batch_sources(table), self.folder)
                files = files.filter(pl.col("batch").is_in(batches))
            verify_files(self.folder, files["name"])
            found = pl.DataFrame(table.scan(predicate=None if batches is None else batch_predicate(batches)))
            found = found.sort("batch", "time", "row")
            if batches is None or len(batches) > 1:
                found = drop_duplicate_rows(found, _has_clock(table)).sort("batch", "time", "row")
        filled = [name for name in COLUMN_TYPES if name in found.columns and found[name].null_count() < len(found)]
        optional_columns = [name for name in filled if name not in EVENT_KEYS]
        return found.select(*EVENT_KEYS, *optional_columns)

    def rows_not_in(self, rows: pl.DataFrame, batches: Collection[int]) -> pl.DataFrame:
        """Return the rows whose event is in none of these batches. `rows` are rows that `read` returned."""
        with _translate_errors(self.folder, "read"):
            table = _open_table(self.folder, self.key)
            if table is None:
                return rows
            return find_new_rows(rows, table, _has_clock(table), self.folder, batches).rows

    def batches(self) -> pl.DataFrame:
        """A row per batch: batch, source, rows, first and last (times). `rows` is 0 if all users were erased."""
        with _translate_errors(self.folder, "read"):
            table = _open_table(self.folder, self.key)
            sources = list(_batch_sources(table).items())
            files = data_files(table).group_by("batch")
            totals = files.agg(pl.col("rows").sum(), pl.col("first").min(), pl.col("last").max())
        found = pl.DataFrame(sources, {"batch": pl.Int32, "source": pl.String}, orient="row")
        return found.join(totals, on="batch", how="left").with_columns(pl.col("rows").fill_null(0)).sort("batch")

    def delivery_counts(self, batch: int) -> tuple[str, int, int]:
        """Return the source of a batch, and the numbers of its rows left out as duplicates and as known."""
        with _translate_errors(self.folder, "read"):
            commits = _batch_commits(_open_table(self.folder, self.key))
            _require_batches([batch], commits, self.folder)
            return commits[batch]["source"], commits[batch].get("doubled", 0), commits[batch].get("known", 0)

    def fingerprint(self) -> LogFingerprint | None:
        """Return what every later log has in common with this one. None if the log is empty."""
        with _translate_errors(self.folder, "read"):
            table = _open_table(self.folder, self.key)
            if table is None:
                return None
            checksum = file_checksum(commit_path(self.folder, table.version()))
            batch, rows = max(_batch_sources(table), default=0), int(data_files(table)["rows"].sum())
            return LogFingerprint(
                id=str(table.metadata().id), commit=table.version(), sha256=checksum, batch=batch, rows=rows
            )

    @property
    def has_clock(self) -> bool:
        """Whether the events have timestamps; False if the log is empty."""
        with _translate_errors(self.folder, "read"):
            table = _open_table(self.folder, self.key)
            return table is not None and _has_clock(table)

    @property
    def newest_time(self) -> int | None:
        """The time of the newest row, None if the log is empty."""
        return as_time(self.batches()["last"].max())

    def sign(self) -> None:
        """Write signed checksums of all files, also of those that a killed process left without checksums."""
        with _translate_errors(self.folder, "written"):
            table = _open_table(self.folder)
            if table is not None:
                write_checksums(self.folder, data_files(table)["name"], self.key)

    def erase_user(self, user_id: int | str) -> int:
        """Delete all rows of a user in one commit and from the disk. Return their number.

        Afterwards no file below the folder holds the id: not the rows, which are rewritten, nor statistics or commits.
        Another call completes an interrupted one, and may then return 0. Numbers and sources of batches stay.
        """
        n_rows = 0
        with _translate_errors(self.folder, "written"):
            table = _open_table(self.folder, self.key)
            if table is not None:
                verify_files(self.folder, data_files(table)["name"])
                user_literal = _user_literal(user_id, table, self.folder)
                matching = pl.DataFrame(table.scan(columns=["batch"], predicate=f"user_id = {user_literal}"))
                n_rows, batches = len(matching), matching["batch"].unique().sort().to_list()
                if n_rows:
                    # A delete by predicate would write the id into a commit. So the other rows go to new files.
                    remaining = table.scan(predicate=f"{batch_predicate(batches)} AND user_id <> {user_literal}")
                    write_deltalake(
                        table,
                        remaining,
                        mode="overwrite",
                        predicate=batch_predicate(batches),
                        writer_properties=WRITER_PROPERTIES,
                        commit_properties=CommitProperties(max_commit_retries=0),
                    )
            _remove_stale_files(self.folder, table)
            if table is not None:
                write_checksums(self.folder, data_files(DeltaTable(self.folder))["name"], self.key)
        return n_rows


def log_of(store: Store) -> EventLog:
    """Return the event log of a store."""
    return EventLog(store.folder / LOG_FOLDER, store.key)


def _open_table(folder: Path, key: SigningKey | None = None) -> DeltaTable | None:
    """Open the table after checking its commits. None if nothing was appended yet."""
    require_supported_path(folder)
    commits, checksums = commit_files(folder), read_checksums(folder, key)
    for name in [name for name in checksums or {} if name.startswith("_delta_log/")]:
        if name not in commits or file_checksum(folder / name) != (checksums or {})[name]:
            raise damage_error(folder, name)
    if commits and checksums is None:
        raise StateError(
            f"{folder} has a Delta table but no {CHECKSUM_FILE}. Restore that file, or choose another folder."
        )
    if not commits:
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        unknown_names = [
            name for name in names if name not in ("_delta_log", CHECKSUM_FILE) and not name.startswith((".", "batch="))
        ]
        if unknown_names:
            raise StateError(
                f"{folder} holds {to_printable(unknown_names[0], 60)} and no event log. Choose another folder."
            )
        return None
    table = DeltaTable(folder)
    if table.metadata().name != TABLE_NAME:
        raise StateError(f"The Delta table in {folder} is not an event log of this format. Choose another folder.")
    return table


def _has_clock(table: DeltaTable) -> bool:
    return str(table.metadata().description) == CLOCK_DESCRIPTIONS[True]


def _batch_commits(table: DeltaTable | None) -> dict[int, dict[str, Any]]:
    """Return the commit information of every batch, also of batches that are empty by now."""
    history = [] if table is None else reversed(table.history())
    return {commit["batch"]: commit for commit in history if "batch" in commit}


def _batch_sources(table: DeltaTable | None) -> dict[int, str]:
    return {batch: commit["source"] for batch, commit in _batch_commits(table).items()}


def _remove_stale_files(folder: Path, table: DeltaTable | None) -> None:
    """Delete data files that are not in the table: replaced ones, and those of killed processes.

    Delta's vacuum skips unfinished files, which have a # in their names.
    """
    current_files = {folder / name for name in data_files(table)["name"]}
    for path in folder.glob("batch=*/**/*"):
        if path.is_file() and path not in current_files:
            path.unlink()


def _commit_rows(rows: pl.DataFrame, commit_info: dict[str, Any], table: DeltaTable | Path, has_clock: bool) -> None:
    """Append rows in one commit with this information. The first commit creates the table."""
    if isinstance(table, Path):
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
    """Return the columns that hold values, and `row`, the place in the delivery. Raises LogError if they do not fit."""
    column_types = {} if table is None else dict(pl.Schema(table.schema().to_arrow()))
    frame = frame.select(s for s in frame.iter_columns() if s.name in EVENT_KEYS or s.null_count() < len(s))
    for name, kind in frame.schema.items():
        if name not in COLUMN_TYPES or kind not in COLUMN_TYPES[name]:
            raise LogError(
                f"An event log has no column {to_printable(name, 60)} of type {kind}. Read the delivery with read_log."
            )
    known_ids = [name for name in ID_COLUMNS if name in frame.columns and name in column_types]
    frame = frame.with_columns(convert_ids(frame[name], column_types[name]) for name in known_ids)
    if frame.select(EVENT_KEYS).null_count().sum_horizontal().item():
        raise LogError("The delivery has rows without user_id, item_id or time. Read it with read_log.")
    if table is not None and table.metadata().description != CLOCK_DESCRIPTIONS[has_clock]:
        delivered, stored = ("timestamps", "none") if has_clock else ("no timestamps", "timestamps")
        raise LogError(
            f"The delivery has {delivered}, but the event log in {folder} has {stored}. Check its time column."
        )
    return frame.with_columns(row=pl.int_range(pl.len(), dtype=pl.Int64))


def _user_literal(user_id: int | str, table: DeltaTable, folder: Path) -> str:
    """Return a user's id as a literal for a predicate. Raises OptionError if its type is wrong."""
    kind = pl.Schema(table.schema().to_arrow())["user_id"]
    if isinstance(user_id, str) != (kind == pl.String):
        words = TYPE_NAMES[type(kind)]
        raise OptionError(
            f"The user ids of the event log in {folder} are {words}, but {to_printable(repr(user_id), 40)} is not. "
            "Pass an id of that type."
        )
    return "'" + user_id.replace("'", "''") + "'" if isinstance(user_id, str) else str(user_id)


def _require_batches(batches: Iterable[int], known: Collection[int], folder: Path) -> None:
    for batch in batches:
        if batch not in known:
            raise OptionError(f"The event log in {folder} has no batch {batch}. The last one is {len(known)}.")


@contextmanager
def _translate_errors(folder: Path, verb: str) -> Iterator[None]:
    """Turn the errors of Delta, polars and the file system into a StateError."""
    try:
        yield
    except CommitFailedError as problem:
        message = f"Another process changed the event log in {folder}. Nothing was written. Run the command again."
        raise StateError(message) from problem
    except (DeltaError, pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as problem:
        advice = "Check free disk space and permissions" if verb == "written" else "Restore it from a backup"
        reason = to_printable(str(problem).split("\n")[0], 160).rstrip(".")
        raise StateError(
            f"The event log in {folder} cannot be {verb} ({reason}). {advice}, then run the command again."
        ) from problem
