"""The commands that make a store learn: fit and update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import polars as pl
import typer

from freshrec.cli.options import (
    AsJson,
    Columns,
    EventTypes,
    FormatName,
    LogPath,
    Quarantine,
    ReasonOption,
    StorePath,
    WaitOption,
    parse_duration,
    parse_list,
    parse_pairs,
)
from freshrec.cli.output import print_json
from freshrec.cli.version_text import version_line
from freshrec.cli.versions import locked_store
from freshrec.data.log import Log, events_before, read_log
from freshrec.errors import FreshrecError, LogError, NoRowsError, OptionError, RefusedError

if TYPE_CHECKING:
    from freshrec.nightly.job import NightlyJob
    from freshrec.store.event_log import AppendResult
    from freshrec.store.manifest import Manifest


GateOption = Annotated[str, typer.Option(help="Limits of the gate, as in metric=hr@20:tolerance=0.1.")]


def fit(
    log: LogPath,
    store: StorePath = Path("store"),
    model: Annotated[str, typer.Option(help="See `freshrec list models`.")] = "blend",
    strategy: Annotated[str | None, typer.Option(help="How updates learn; see `freshrec list strategies`.")] = None,
    columns: Columns = "",
    format_name: FormatName = None,
    events: EventTypes = "",
    until: Annotated[str, typer.Option(help="Leave out what happened then or later, as in 2025-06-01.")] = "",
    quarantine: Quarantine = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    budget: Annotated[str, typer.Option(help="Time for the blend's training, as in 90s, 10m or 2h.")] = "",
    gate: GateOption = "",
    as_json: AsJson = False,
) -> None:
    """Make a store: learn from a whole log, once; after that `update` needs the new events only."""
    from freshrec.nightly.gate import parse_limits
    from freshrec.nightly.job import NightlyJob, hash_source
    from freshrec.recommender.bundle import new_bundle
    from freshrec.recommender.log_reading import ReadOptions
    from freshrec.store.versions import create_store
    from freshrec.strategies.refit import TARGETS_PER_SECOND

    if budget and model.partition(":")[0] != "blend":
        raise OptionError(f'--budget sizes the blend; "{model}" trains as its options say, as in fit.base_epochs=5.')
    if budget:
        strategy = f"{strategy or 'refit'}:max_passes={parse_duration(budget) * TARGETS_PER_SECOND}"
    read_options, limits = ReadOptions(parse_pairs(columns), format_name, tuple(parse_list(events))), parse_limits(gate)
    bundle = new_bundle(model, strategy, seed, read_options)
    interactions = read_log(
        log, columns=read_options.columns, format=format_name, events=read_options.events, quarantine=quarantine
    )
    interactions = events_before(interactions, until) if until else interactions
    with create_store(store) as new_store:
        version = NightlyJob(new_store, limits).fit_first_version(
            interactions, hash_source(log) + (f" until {until}" if until else ""), bundle
        )
    print_json(version.model_dump()) if as_json else typer.echo(f"{version_line(version)}; live in {store}")


def update(
    new: Annotated[list[Path] | None, typer.Argument(metavar="[NEW]...", help="New events; none: go on.")] = None,
    store: StorePath = Path("store"),
    force: Annotated[bool, typer.Option("--force", help="Go live whatever the gate says; needs --reason.")] = False,
    reason: ReasonOption = "",
    retry: Annotated[int | None, typer.Option(metavar="VERSION", help="Take a refused version's events again.")] = None,
    full_every: Annotated[str, typer.Option(metavar="N|auto", help="Try a full retrain every so many updates.")] = "",
    gate: GateOption = "",
    columns: Columns = "",
    format_name: FormatName = None,
    quarantine: Quarantine = None,
    wait: WaitOption = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be read and odd; change nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Learn from new events, test the result, and let it go live if it is not worse."""
    from freshrec.nightly.full_retrain import retrain_interval
    from freshrec.nightly.gate import parse_limits
    from freshrec.nightly.job import NightlyJob, preview_delivery
    from freshrec.store.versions import open_store, version_chain

    if force and not reason:
        raise OptionError('--force needs --reason "..."; it is kept with the version.')
    opened_store = open_store(store)
    job, force_reason = NightlyJob(opened_store, parse_limits(gate), full_every), reason if force else ""
    if full_every:
        retrain_interval(full_every, version_chain(opened_store))  # an OptionError before any work
    read_delivery = partial(
        _read_delivery, job, quarantine=None if dry_run else quarantine, columns=columns, format_name=format_name
    )
    if dry_run:
        if retry is not None or force:
            raise OptionError("--dry-run reads new events only; leave --retry and --force out.")
        previews = [{"file": path.name, **preview_delivery(job, read_delivery(path))} for path in new or []]
        _print_previews(previews, as_json)
        return
    versions: list[Manifest] = []
    try:
        with locked_store(store, wait):
            for version in _make_versions(job, new or [], retry, read_delivery, force_reason, as_json):
                versions.append(version)
                if not as_json:
                    _print_version(version)
            live = opened_store.live
    except FreshrecError as problem:
        if versions:  # what was made before a delivery that cannot be read
            failure = {"error": str(problem), "exit_code": problem.exit_code}
            problem.json_output = [*(version.model_dump() for version in versions), failure]
        raise
    _report_update(store, live, versions, force, as_json)


def _report_update(store: Path, live: int, versions: list[Manifest], force: bool, as_json: bool) -> None:
    """Say what an update came to. RefusedError where a version did not pass."""
    found = [version.model_dump() for version in versions]
    refused = [version.id for version in versions if not version.promoted and not force]
    if refused:
        numbers = "version" + ("s " if len(refused) > 1 else " ") + ", ".join(map(str, refused))
        error = RefusedError(
            f"{numbers} of {store} did not pass the gate, version {live} is live; see `freshrec history`, "
            f"or learn the events nevertheless with `freshrec update --retry {refused[-1]} --force --reason ...`."
        )
        error.json_output = found
        raise error
    if as_json:
        print_json(found)
    elif not versions:
        typer.echo(f"nothing new: version {live} stays live")


def _make_versions(
    job: NightlyJob,
    paths: list[Path],
    retry: int | None,
    read_delivery: Callable[[Path], Log | None],
    force: str,
    as_json: bool,
) -> Iterator[Manifest]:
    """The versions of what waits, of each delivery, and of what was refused before; clicks come with the last one."""
    from freshrec.nightly import click_intake

    yield from job.catch_up(force)
    for path in paths:
        yield from _learn_file(job, path, read_delivery(path), path is paths[-1], force, as_json)
    if not paths:
        yield from _learn_clicks(job, force, as_json)
    click_intake.remove_learnt_clicks(job)
    if (n := click_intake.count_waiting_clicks(job)) and not as_json:
        typer.echo(f"clicks newer than the file: {n:,}; they wait for the next one, or for `update` without a file")
    if retry is not None:
        yield job.relearn(retry, force)


def _learn_file(
    job: NightlyJob, path: Path, log: Log | None, with_clicks: bool, force: str, as_json: bool
) -> Iterator[Manifest]:
    """The versions of one file of new events, with the clicks that wait or without; `log` is None for no rows."""
    from freshrec.nightly import click_intake
    from freshrec.nightly.job import hash_source, interaction_rows

    source = hash_source(path)
    log = None if log is None or not len(interaction_rows(log.frame)) else log
    result: AppendResult | None = None
    try:
        if with_clicks:
            result = click_intake.append_with_clicks(job, log, source)
        elif log is not None:
            result = job.append_delivery(log, source)
    except LogError as problem:
        raise LogError(f"{path.name}: {problem}") from None
    if result is None:
        yield job.add_unchanged_version(None, source)
        return
    if not as_json:
        quarantined = f"; {log.n_quarantined:,} bad rows set aside" if log is not None and log.n_quarantined else ""
        typer.echo(_delivery_line(job, result, "clicks" if log is None else path.name) + quarantined)
    yield from job.catch_up(force)


def _learn_clicks(job: NightlyJob, force: str, as_json: bool) -> Iterator[Manifest]:
    """The versions of the clicks that wait, without a file; none where no click waits."""
    from freshrec.nightly import click_intake

    try:
        result = click_intake.append_with_clicks(job, None, "")
    except LogError as problem:
        raise LogError(f"clicks: {problem}") from None
    if result is None:
        return
    if not as_json:
        typer.echo(_delivery_line(job, result, "clicks"))
    yield from job.catch_up(force)


def _read_delivery(
    job: NightlyJob, path: Path, quarantine: Path | None, columns: str, format_name: str | None
) -> Log | None:
    """A delivery, read as the log of `fit` was, but for the options given; None where it holds no rows."""
    read_options, served = job.bundle.read_options, job.bundle.served
    catalogs = {"user_id": served.users, "item_id": served.items}
    text = [name for name, catalog in catalogs.items() if catalog.frame["id"].dtype == pl.String]
    try:
        return read_log(
            path,
            columns={**read_options.columns, **parse_pairs(columns)},
            format=format_name or read_options.format,
            events=read_options.events,
            quarantine=quarantine and _free_path(quarantine),
            allow_missing_events=True,
            text_columns=text,
        )
    except NoRowsError:
        return None


def _print_previews(previews: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(previews)
        return
    for preview in previews:
        day = preview["day"] or {"n_rows": 0, "n_users": 0, "n_items": 0}
        typer.echo(f"{preview['file']}: {day['n_rows']:,} rows, {day['n_users']:,} users, {day['n_items']:,} items")
        for anomaly in preview["odd"] or ["nothing"]:
            typer.echo(f"  odd: {anomaly}")


def _free_path(path: Path) -> Path:
    """The path, or, where there is a file, the first of name-1, name-2, ... that is free."""
    candidates = (path.with_stem(f"{path.stem}-{n}") for n in count(1))
    return path if not path.exists() else next(other for other in candidates if not other.exists())


def _delivery_line(job: NightlyJob, result: AppendResult, name: str) -> str:
    """What became of the rows of a delivery."""
    from freshrec.nightly.job import rejected_batches

    if result.repeated_batch is not None:
        message = f"{name}: the very bytes of batch {result.repeated_batch}; nothing is taken again"
        if result.repeated_batch not in rejected_batches(job.store):
            return message
        number = max(manifest.id for manifest in job.store.manifests() if manifest.batch == result.repeated_batch)
        return f"{message}: version {number} has learnt it and is not live; see `freshrec update --retry {number}`"
    left = [f"{n:,} {label}" for n, label in ((result.n_duplicates, "doubled"), (result.n_known, "known already")) if n]
    late = f", {result.n_late:,} of them late" if result.n_late else ""
    left_out = f"; left out: {', '.join(left)}" if left else ""
    return f"{name}: {result.n_rows:,} rows, {result.n_appended:,} new{late}{left_out}"


def _print_version(version: Manifest) -> None:
    typer.echo(version_line(version))
    for reason in version.reasons:
        typer.echo(f"  refused: {reason}")
    for note in version.notes:
        typer.echo(f"  note: {note}")
