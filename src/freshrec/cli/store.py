"""The commands that train: `fit` makes a store, `update` learns new events."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freshrec.cli.delivery import changed_options, read_delivery, read_first_log
from freshrec.cli.delivery_text import delivery_line
from freshrec.cli.options import (
    AllowImport,
    AsJson,
    Columns,
    EventTypes,
    FormatName,
    LogPath,
    MinRating,
    Quarantine,
    ReasonOption,
    Separator,
    SignKeyFile,
    StorePath,
    TimeFormat,
    WaitOption,
    parse_duration,
    parse_list,
    parse_pairs,
)
from freshrec.cli.output import print_json, print_labelled, print_wrapped
from freshrec.cli.version_text import fit_lines, next_commands, update_lines, verdict_sentence
from freshrec.cli.versions import locked_store
from freshrec.data.duplicates import count_reused_ids, reused_ids_note
from freshrec.data.log import Log, filter_positives
from freshrec.data.moments import format_time
from freshrec.disk_names import foreign_modules
from freshrec.errors import FreshrecError, LogError, OptionError, RefusedError
from freshrec.progress import report_progress
from freshrec.recommender.progress import READING, show_progress
from freshrec.text_layout import format_count

if TYPE_CHECKING:
    from freshrec.nightly.job import NightlyJob
    from freshrec.recommender.bundle import Bundle
    from freshrec.store.event_log import AppendResult
    from freshrec.store.manifest import Manifest

GateOption = Annotated[str, typer.Option(help="Limits of the gate, such as metric=hr@20:tolerance=0.1.")]
NewEvents = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[NEW]...", help="Files of new events; none = learn waiting clicks and unfinished deliveries."
    ),
]
FullEvery = Annotated[
    str,
    typer.Option(
        metavar="N|auto", help="Also try a full retrain every N updates; auto = as often as it improves quality."
    ),
]


def fit(
    log: LogPath,
    store: StorePath = Path("store"),
    sign_key_file: SignKeyFile = None,
    model: Annotated[str, typer.Option(help="Model; see `freshrec list models`.")] = "blend",
    strategy: Annotated[
        str | None, typer.Option(help="How updates learn new events; see `freshrec list strategies`.")
    ] = None,
    columns: Columns = "",
    format_name: FormatName = None,
    time_format: TimeFormat = None,
    events: EventTypes = "",
    separator: Separator = None,
    min_rating: MinRating = None,
    until: Annotated[str, typer.Option(help="Read only events before this time, such as 2025-06-01.")] = "",
    quarantine: Quarantine = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    budget: Annotated[str, typer.Option(help="Training time of the default model, such as 90s, 10m or 2h.")] = "",
    gate: GateOption = "",
    as_json: AsJson = False,
) -> None:
    """Train on a whole log once and make a store. After that, `update` needs only the new events."""
    from freshrec.nightly.delivery_checks import UNTIL
    from freshrec.nightly.gate import parse_limits
    from freshrec.nightly.job import NightlyJob, hash_source
    from freshrec.recommender.bundle import new_bundle
    from freshrec.recommender.log_reading import ReadOptions
    from freshrec.store.log_files import path_fault
    from freshrec.store.versions import create_store
    from freshrec.strategies.refit import TARGETS_PER_SECOND

    if budget:
        _check_budget(model)
        strategy = f"{strategy or 'refit'}:max_passes={parse_duration(budget, '--budget') * TARGETS_PER_SECOND}"
    read_options = ReadOptions(
        parse_pairs(columns),
        format_name,
        tuple(parse_list(events)),
        separator=separator,
        min_rating=min_rating,
        time_format=time_format,
    )
    limits = parse_limits(gate)
    if fault := path_fault(store):
        raise OptionError(f"{fault} Choose another folder for --store.")
    bundle = new_bundle(model, strategy, seed, read_options)
    with show_progress(not as_json, with_lines=True), create_store(store, sign_key_file) as new_store:
        report_progress(READING, detail=log.name)
        source = hash_source(log)  # first, so that rows which a writer adds later are new to the next update
        interactions = read_first_log(log, read_options, until, quarantine)
        report_progress("read", detail=f"{len(interactions.frame):,} rows of {log.name}")
        job, source = NightlyJob(new_store, limits), source + (UNTIL + until if until else "")
        version = job.fit_first_version(interactions, source, bundle)
        times, skipped = _period_of(interactions), _skipped_rows(job, version, interactions)
    if as_json:
        print_json(version.model_dump())
        return
    typer.echo(f"Version {version.id} is live in {store}.")
    print_labelled(fit_lines(version, times, skipped))
    _print_notes_and_commands(store, version, interactions, bundle)


def _check_budget(model: str) -> None:
    if model.partition(":")[0] != "blend":
        raise OptionError(
            f"--budget applies only to the default model, blend. For --model {model}, set the number of epochs in "
            "--strategy, such as finetune:fit.base_epochs=5."
        )


def _print_notes_and_commands(store: Path, version: Manifest, interactions: Log, bundle: Bundle) -> None:
    """Print what `fit` noticed, and commands to run next."""
    n_reused = count_reused_ids(interactions.frame, interactions.has_clock)
    print_labelled(("Note", note) for note in [*version.notes, *([reused_ids_note(n_reused)] if n_reused else [])])
    modules = foreign_modules(bundle.served.state.model.spec, bundle.strategy)
    commands = next_commands(store, filter_positives(interactions.frame)["user_id"][-1], modules)
    for label, command in zip(("Next:", ""), commands):
        typer.echo(f"{label:<6}{command}")


def _period_of(log: Log) -> str:
    """Return the dates of the first and the last interaction of a log; "" without timestamps."""
    times = filter_positives(log.frame)["time"]
    if not log.has_clock:
        return ""
    first, last = format_time(times.min()), format_time(times.max())  # type: ignore[arg-type]
    return f"{first[:10]} to {last[:10]}" if first[:10] != last[:10] else f"{first} to {last}"


def _skipped_rows(job: NightlyJob, version: Manifest, log: Log) -> list[str]:
    """Say how many rows of the log were skipped, and why."""
    assert version.batch is not None
    counts = ((job.log.delivery_counts(version.batch)[1], "duplicate"), (log.n_quarantined, "bad row"))
    return [f"{format_count(n, noun)} skipped" for n, noun in counts if n]


def update(
    new: NewEvents = None,
    store: StorePath = Path("store"),
    allow_import: AllowImport = None,
    sign_key_file: SignKeyFile = None,
    force: Annotated[bool, typer.Option("--force", help="Promote a refused version anyway; needs --reason.")] = False,
    reason: ReasonOption = "",
    retry: Annotated[
        int | None, typer.Option(metavar="VERSION", help="Learn a refused version's events again.")
    ] = None,
    full_every: FullEvery = "",
    gate: GateOption = "",
    columns: Columns = "",
    format_name: FormatName = None,
    separator: Separator = None,
    min_rating: MinRating = None,
    time_format: TimeFormat = None,
    quarantine: Quarantine = None,
    wait: WaitOption = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what is in the files; change nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Learn new events, measure the new version, and promote it unless it is worse than the live one."""
    from freshrec.nightly.deferral import find_deferral
    from freshrec.nightly.full_retrain import retrain_interval
    from freshrec.nightly.gate import parse_limits
    from freshrec.nightly.job import NightlyJob
    from freshrec.store.versions import open_store, version_chain

    if force and not reason:
        raise OptionError('--force needs a reason, which is stored in the history. Add --reason "...".')
    opened_store = open_store(store, sign_key_file)
    job, force_reason = NightlyJob(opened_store, parse_limits(gate), full_every), reason if force else ""
    if full_every:
        retrain_interval(full_every, version_chain(opened_store))  # an OptionError before any work
    changes = partial(
        changed_options,
        columns=columns,
        format=format_name,
        separator=separator,
        min_rating=min_rating,
        time_format=time_format,
    )
    read_file = partial(read_delivery, job, quarantine=None if dry_run else quarantine, change_options=changes)
    if dry_run:
        if retry is not None or force:
            raise OptionError("--dry-run cannot be combined with --retry or --force. Leave them out.")
        _print_previews([_preview_file(job, path, read_file(path)) for path in new or []], as_json)
        return
    versions, live = _update_store(job, store, wait, sign_key_file, as_json, new or [], retry, read_file, force_reason)
    deferred = find_deferral(opened_store, job.limits).versions if any(not v.promoted for v in versions) else ()
    _report_update(store, live, versions, deferred, force, as_json)


def _update_store(
    job: NightlyJob,
    store: Path,
    wait: str,
    sign_key_file: Path | None,
    as_json: bool,
    paths: list[Path],
    retry: int | None,
    read_file: Callable[[Path], Log | None],
    force_reason: str,
) -> tuple[list[Manifest], int]:
    """Make and print the versions of an update. Return them, and the number of the live version."""
    versions: list[Manifest] = []
    try:
        with locked_store(store, wait, sign_key_file), show_progress(not as_json, with_lines=False) as clear_progress:
            print_line = partial(_print_line, clear_progress, as_json)
            for version in _make_versions(job, paths, retry, read_file, force_reason, print_line):
                versions.append(version)
                clear_progress()
                if not as_json:
                    _print_version(job, version)
            return versions, job.store.live
    except FreshrecError as error:
        if versions:  # made before the file that cannot be read
            failure = {"error": str(error), "exit_code": error.exit_code}
            error.json_output = [*(version.model_dump() for version in versions), failure]
        raise


def _print_line(clear_progress: Callable[[], None], as_json: bool, text: str) -> None:
    """Print a line for people, above the progress bar."""
    clear_progress()
    if not as_json:
        print_wrapped(text, "  ")


def _report_update(
    store: Path, live: int, versions: list[Manifest], deferred: Sequence[Manifest], force: bool, as_json: bool
) -> None:
    """Print the result of an update. Raises RefusedError if the gate refused a version."""
    found = [version.model_dump() for version in versions]
    refused = [version.id for version in versions if not version.promoted and not force]
    if refused:
        numbers = f"version{'s' if len(refused) > 1 else ''} {', '.join(map(str, refused))}"
        at = f"--store {shlex.quote(str(store))}"
        anyway = f'run `freshrec update --retry {refused[-1]} --force --reason "..." {at}`.'
        fate = f"To learn the events anyway, {anyway}"
        if {version.id for version in deferred} >= set(refused):
            fate = f"The next update tries the events again. To learn them at once, {anyway}"
        error = RefusedError(f"The gate refused {numbers} of {store}; version {live} is live. {fate}")
        error.json_output = found
        raise error
    if as_json:
        print_json(found)
    elif not versions:
        typer.echo(f"There are no new events. Version {live} stays live.")


def _make_versions(
    job: NightlyJob,
    paths: list[Path],
    retry: int | None,
    read_file: Callable[[Path], Log | None],
    force: str,
    print_line: Callable[[str], None],
) -> Iterator[Manifest]:
    """Yield the versions of waiting batches, of each file, and of --retry. Clicks are learned with the last file."""
    from freshrec.nightly import click_intake
    from freshrec.nightly.job import hash_source

    yield from job.catch_up(force)
    for path in paths:
        report_progress(READING, detail=path.name)
        source = hash_source(path)
        yield from _learn_file(job, path, source, read_file(path), path is paths[-1], force, print_line)
    if not paths:
        yield from _learn_clicks(job, force, print_line)
    click_intake.remove_learned_clicks(job)
    if n := click_intake.count_waiting_clicks(job):
        clicks = "1 click is" if n == 1 else f"{n:,} clicks are"
        print_line(f"{clicks} newer than the file. The next update learns them, or `freshrec update` without a file.")
    if retry is not None:
        yield job.relearn(retry, force)


def _learn_file(
    job: NightlyJob,
    path: Path,
    source: str,
    log: Log | None,
    with_clicks: bool,
    force: str,
    print_line: Callable[[str], None],
) -> Iterator[Manifest]:
    """Yield the versions of one file; `log` is None if it has no rows. `with_clicks`: also learn waiting clicks."""
    from freshrec.nightly import click_intake
    from freshrec.nightly.delivery_checks import unread_rows
    from freshrec.nightly.job import interaction_rows

    if log is not None:
        log, text = unread_rows(log, source, job.log)
        if text:
            print_line(f"{path.name}: {text}")
    log = None if log is None or not len(interaction_rows(log.frame)) else log
    result: AppendResult | None = None
    try:
        if with_clicks:
            result = click_intake.append_with_clicks(job, log, source)
        elif log is not None:
            result = job.append_delivery(log, source)
    except LogError as error:
        raise LogError(f"{path.name}: {error}") from None
    if result is None:
        print_line(f"{path.name}: no rows")
        yield job.add_unchanged_version(None, source)
        return
    n_bad = 0 if log is None else log.n_quarantined
    name = "Server clicks" if log is None else path.name
    print_line(delivery_line(job, result, name, n_bad))
    for note in () if log is None else (*log.id_notes, log.rating_note):
        if note:
            print_line(f"{name}: {note}")
    if result.n_reused_ids:
        print_line(f"{name}: {reused_ids_note(result.n_reused_ids)}")
    yield from job.catch_up(force)


def _learn_clicks(job: NightlyJob, force: str, print_line: Callable[[str], None]) -> Iterator[Manifest]:
    """Yield the versions of the waiting clicks, without a file. There is none if no click waits."""
    from freshrec.nightly import click_intake

    try:
        result = click_intake.append_with_clicks(job, None, "")
    except LogError as error:
        raise LogError(f"Server clicks: {error}") from None
    if result is None:
        return
    print_line(delivery_line(job, result, "Server clicks"))
    yield from job.catch_up(force)


def _preview_file(job: NightlyJob, path: Path, log: Log | None) -> dict[str, Any]:
    from freshrec.nightly.delivery_checks import unread_rows
    from freshrec.nightly.job import hash_source, preview_delivery

    try:
        log = None if log is None else unread_rows(log, hash_source(path), job.log)[0]
        return {"file": path.name, **preview_delivery(job, log)}
    except LogError as error:
        raise LogError(f"{path.name}: {error}") from None


def _print_previews(previews: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(previews)
        return
    for preview in previews:
        day = preview["day"] or {"n_rows": 0, "n_users": 0, "n_items": 0}
        typer.echo(f"{preview['file']}: {day['n_rows']:,} rows, {day['n_users']:,} users, {day['n_items']:,} items")
        print_labelled(("Unusual", anomaly) for anomaly in preview["odd"] or ["nothing"])


def _print_version(job: NightlyJob, version: Manifest) -> None:
    """Print the verdict on a version, what it learned, its quality, and the notes that are new this week."""
    from freshrec.nightly.deferral import find_deferral
    from freshrec.nightly.notes import notes_to_print
    from freshrec.store.versions import store_option

    deferred = [] if version.promoted else find_deferral(job.store, job.limits).versions
    print_wrapped(verdict_sentence(version, version in deferred), "  ")
    print_labelled(("Reason", reason) for reason in version.reasons)
    print_labelled(update_lines(version))
    notes, n_earlier = notes_to_print(job.store.manifests(), version)
    print_labelled(("Note", note) for note in notes)
    if n_earlier:
        still = "1 earlier note still applies" if n_earlier == 1 else f"{n_earlier} earlier notes still apply"
        command = f"freshrec history --last 1 --long {store_option(job.store.folder)}"
        print_labelled([("Notes", f"{still}; see `{command}`.")])
