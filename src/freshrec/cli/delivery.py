"""Read the log of `fit`, and the files of an update with the same options unless others are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from freshrec.cli.options import parse_pairs
from freshrec.data.log import Log, events_before
from freshrec.errors import NoRowsError

if TYPE_CHECKING:
    from freshrec.nightly.job import NightlyJob
    from freshrec.recommender.log_reading import ReadOptions


def read_first_log(path: Path, read_options: ReadOptions, until: str, quarantine: Path | None) -> Log:
    """Read the log of `fit`. `until`: keep the events before this moment; "" = all events."""
    from freshrec.recommender.log_reading import read_with_options

    log = read_with_options(path, read_options, quarantine=quarantine)
    return events_before(log, until) if until else log


def changed_options(
    options: ReadOptions,
    columns: str,
    format: str | None,
    separator: str | None,
    min_rating: float | None,
    time_format: str | None,
) -> ReadOptions:
    """Return the options of `fit` with those of an update in their place. A format brings its own separator."""
    return replace(
        options,
        columns={**options.columns, **parse_pairs(columns)},
        format=format or options.format,
        separator=separator or (None if format else options.separator),
        min_rating=options.min_rating if min_rating is None else min_rating,
        time_format=time_format or options.time_format,
    )


def read_delivery(
    job: NightlyJob, path: Path, quarantine: Path | None, change_options: Callable[[ReadOptions], ReadOptions]
) -> Log | None:
    """Read a file with the options of `fit`, unless others are given. Return None if it has no rows."""
    from freshrec.recommender.log_reading import known_id_types, read_with_options
    from freshrec.store.log_columns import has_column

    try:
        return read_with_options(
            path,
            change_options(job.bundle.read_options),
            drop_weight=has_column(job.log.folder, "weight"),  # a store of an earlier version took it
            quarantine=quarantine,
            allow_missing_events=True,
            id_types=known_id_types(job.bundle.served),
        )
    except NoRowsError:
        return None
