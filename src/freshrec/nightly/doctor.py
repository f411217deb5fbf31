"""Check a store: every file, and whether its parts belong together: versions, moves, event log and clicks."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version as version_of
from pathlib import Path

from freshrec.errors import FreshrecError, StateError
from freshrec.nightly.delivery_checks import waiting_batches
from freshrec.nightly.notes import count_of, number_ranges
from freshrec.store import click_journal
from freshrec.store.checksummed_json import read_signed
from freshrec.store.erasures import ERASURE_FILE, read_erasures
from freshrec.store.event_log import log_of
from freshrec.store.log_files import CHECKSUM_FILE, COMMIT_FOLDER, LOG_FOLDER, commit_path, read_checksums
from freshrec.store.log_fingerprint import find_contradiction
from freshrec.store.sign_store import signed_files
from freshrec.store.versions import REBUILT_REASON, Store, is_collected, version_chain, version_folder
from freshrec.text_layout import format_count, to_printable

LIBRARIES = ("torch", "polars", "numpy", "scipy", "deltalake", "safetensors", "pydantic")
STORE_CONTENT = {"store.json", "live.json", "lock", "log", "versions", "clicks", ERASURE_FILE}

Check = tuple[bool, str]  # whether it passed, and a sentence


def check_store(store: Store | None) -> list[Check]:
    """Check the environment and every file of the store. Each check is a pair: whether it passed, and a sentence."""
    libraries = ", ".join(f"{name} {version_of(name)}" for name in LIBRARIES)
    found = [(True, f"Python {platform.python_version()}; {libraries}")]
    if store is None:
        return found
    for check in CHECKS:
        found += _caught(check, store)
    return found


def _caught(check: Callable[[Store], list[Check]], store: Store) -> list[Check]:
    """Return the results of a check. An error that it raises is a failed check."""
    try:
        return check(store)
    except FreshrecError as problem:
        return [(False, str(problem))]
    except OSError as problem:
        return [(False, f"{problem.filename} cannot be read ({problem.strerror}). Check its permissions.")]


def _check_versions(store: Store) -> list[Check]:
    """Check the files of each version."""
    found, deleted, numbers = list[Check](), list[int](), store.version_numbers()
    for number in numbers:
        with suppress(StateError):
            deleted += [store.manifest(number).id] if is_collected(store, number) else []
    if deleted:
        names = f"version {deleted[0]}: its" if len(deleted) == 1 else f"versions {number_ranges(deleted)}: their"
        found.append((True, f"{names} files were deleted by `freshrec gc` or `freshrec erase`"))
    for number in [number for number in numbers if number not in deleted]:
        try:
            wrong = store.find_damage(number)
            found.append((not wrong, f"version {number}: {'; '.join(wrong) or 'all files are intact'}"))
        except StateError as problem:
            found.append((False, f"version {number}: {problem}"))
    return found


def _check_live(store: Store) -> list[Check]:
    store.verified_files(store.live)
    read_erasures(store.folder)
    updates = format_count(len(version_chain(store)) - 1, "update")
    return [(True, f"version {store.live} is live, {updates} after the first version")]


def _check_moves(store: Store) -> list[Check]:
    """Compare the changes of the live version with the versions."""
    moves, versions = store.moves(), store.manifests()
    path, numbers, targets = store.folder / "live.json", set(store.version_numbers()), {move.to for move in moves}
    if missing := sorted(targets - numbers):
        return [
            (False, f"{path} names version {missing[0]}, which does not exist. Restore versions/ from a newer backup.")
        ]
    if not moves or any(move.reason == REBUILT_REASON for move in moves):
        return []  # after damage, only the moves to promoted versions are known
    last = moves[-1]
    parents = {version.parent for version in versions if version.parent is not None}
    lost = sorted((parents & numbers) - targets)
    # an interrupted update leaves a version that was never live; it is newer than the record only if moves are missing
    lost += [
        version.id
        for version in versions
        if version.goes_live and version.id not in targets and version.parent != last.to and version.made_at > last.at
    ]
    if lost:
        return [
            (
                False,
                f"{path} is older than the versions: version {lost[0]} was live, but the file has no such change. "
                "Restore it from a newer backup, or choose a live version with `freshrec promote N`.",
            )
        ]
    return []


def _check_log(store: Store) -> list[Check]:
    """Check every file of the event log."""
    log = log_of(store)
    batches = log.batches()
    n_events = len(log.read()) if len(batches) else 0
    rows, events = count_of(int(batches["rows"].sum()), "row"), count_of(n_events, "different event")
    return [(True, f"the event log holds {rows} ({events}) in {count_of(len(batches), 'delivery', 'deliveries')}")]


def _check_match(store: Store) -> list[Check]:
    """Compare the event log with each version."""
    versions, log = store.manifests(), log_of(store)
    if contradictions := [text for version in versions if (text := find_contradiction(log.folder, version))]:
        return [(False, contradictions[-1])]
    n_waiting = len(waiting_batches(store, log))  # compares the deliveries
    newest = max((version.log.commit for version in versions if version.log), default=-1)
    checksums = read_checksums(log.folder) or {}
    paths = [commit_path(log.folder, number) for number in range(newest + 1)]
    missing = [path for path in paths if str(path.relative_to(log.folder)) not in checksums]
    if missing and missing != paths[-1:]:  # the last one is missing if the process was killed before it was written
        return [(False, f"{log.folder} has no checksum of {missing[0].name}. Restore the log from a backup.")]
    if n_waiting:
        return [(True, f"{count_of(n_waiting, 'delivery waits', 'deliveries wait')} for the next `freshrec update`")]
    return []


def _check_journal(store: Store) -> list[Check]:
    """Check each file of the journal, and that the event log has its batch."""
    found, n_waiting, batches = list[Check](), 0, set(log_of(store).batches()["batch"])
    for path in click_journal.journal_paths(store.folder):
        name, batch = f"clicks/{path.name}", click_journal.batch_of(path)
        try:
            n_clicks = len(click_journal.read_file(path).clicks)
        except StateError as problem:
            found.append((False, str(problem)))
            continue
        if batch is not None and batch not in batches:
            found.append((False, f"{name} holds clicks of batch {batch}, which the event log lacks. Restore the log."))
        elif batch is None:
            n_waiting += n_clicks
        if click_journal.has_cut_line(path):
            found.append((True, f"{name} ends with an incomplete line. It is ignored, for it was never acknowledged"))
    if n_waiting:
        found.append((True, f"{count_of(n_waiting, 'click waits', 'clicks wait')} for the next `freshrec update`"))
    return found


def _check_signatures(store: Store) -> list[Check]:
    """Say who signed the store. Without the key, the signatures cannot be verified."""
    signers = {path: read_signed(path, store.key)[1] for path in signed_files(store)}
    signed = sorted(set(signers.values()) - {""})
    if store.key is not None:
        return [(True, f"the signatures of {count_of(len(signers), 'file')} are valid (key {store.key.id})")]
    if not signed:
        return []
    text = f"the store is signed (key {', '.join(signed)}), which was not verified. Pass --sign-key-file"
    unsigned = [path for path, signer in signers.items() if not signer]
    return [
        (True, text),
        *(
            (False, f"{_relative(path, store)} is not signed, but other files are. See `freshrec sign --help`.")
            for path in unsigned
        ),
    ]


def _check_foreign(store: Store) -> list[Check]:
    """Name files that are not part of the store. No command reads them."""
    versions = {version_folder(store, number) for number in store.version_numbers()}
    found = [
        *(path for path in store.folder.iterdir() if path.name not in STORE_CONTENT),
        *(path for path in (store.folder / "versions").iterdir() if path not in versions),
        *(path for path in (store.folder / LOG_FOLDER).glob("*") if not _is_of_log(path)),
        *click_journal.foreign_paths(store.folder),
    ]
    shown = sorted(path for path in found if not path.name.startswith("."))
    return [
        (True, f"{_relative(path, store)} is not part of the store. It is ignored; `freshrec erase` does not search it")
        for path in shown
    ]


def _is_of_log(path: Path) -> bool:
    return path.name in (COMMIT_FOLDER, CHECKSUM_FILE) or path.name.startswith("batch=")


def _relative(path: Path, store: Store) -> str:
    return to_printable(str(path.relative_to(store.folder)), 60)


CHECKS = (
    _check_versions,
    _check_live,
    _check_moves,
    _check_log,
    _check_match,
    _check_journal,
    _check_signatures,
    _check_foreign,
)
