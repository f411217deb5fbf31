"""The commands that show and change the versions of a store: history, promote, rollback, gc, sign, erase."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from freshrec.cli.options import (
    SIGN_KEY_VARIABLE,
    AllowImport,
    AsJson,
    ReasonOption,
    SignKeyFile,
    StorePath,
    WaitOption,
    parse_duration,
)
from freshrec.cli.output import print_json, print_wrapped
from freshrec.cli.version_text import retry_command
from freshrec.errors import OptionError, StateError
from freshrec.store.versions import store_option
from freshrec.text_layout import format_count

if TYPE_CHECKING:
    from freshrec.store.manifest import Manifest
    from freshrec.store.versions import Store


VersionArgument = Annotated[int, typer.Argument(metavar="VERSION", help="Version number; see `freshrec history`.")]


def history(
    store: StorePath = Path("store"),
    allow_import: AllowImport = None,
    sign_key_file: SignKeyFile = None,
    last: Annotated[int | None, typer.Option(min=1, help="Show only the last N versions.", metavar="N")] = None,
    refused: Annotated[bool, typer.Option("--refused", help="Show only versions that the gate refused.")] = False,
    long: Annotated[
        bool, typer.Option("--long", help="Show every number and reason, and all changes of the live version.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print one line per version: time, state, new events, quality and reason."""
    from freshrec.cli.history_text import history_lines, long_lines, move_lines, version_states
    from freshrec.store.versions import open_store

    opened_store = open_store(store, sign_key_file)
    versions, moves = opened_store.manifests(), opened_store.moves()
    if refused:
        versions = [version for version in versions if not version.promoted]
    versions = versions[-last:] if last else versions
    if refused or last:
        shown = {version.id for version in versions}
        moves = [move for move in moves if move.to in shown]
    if as_json:
        answer = {
            "versions": [v.model_dump() for v in versions],
            "moves": [m.model_dump(exclude={"store"}) for m in moves],
        }
        print_json(answer)
        return
    states = version_states(opened_store)
    lines = long_lines(versions, states) + move_lines(moves) if long else history_lines(versions, states)
    for line in lines or ["No version to show."]:
        typer.echo(line)
    for number in [number for number, found in states.items() if found.state == "damaged"]:
        command = f"freshrec doctor {store_option(store)}"
        typer.echo(f"Version {number} is damaged: its manifest cannot be read. See `{command}`.")


@contextmanager
def locked_store(folder: Path, wait: str, sign_key_file: Path | None) -> Iterator[Store]:
    """Open a store and lock it, so that no other process changes it."""
    from freshrec.store.versions import open_store

    store = open_store(folder, sign_key_file)
    with store.locked(parse_duration(wait, "--wait") if wait else 0.0):
        yield store


def promote(
    number: VersionArgument,
    store: StorePath = Path("store"),
    allow_import: AllowImport = None,
    sign_key_file: SignKeyFile = None,
    reason: ReasonOption = "",
    wait: WaitOption = "",
    as_json: AsJson = False,
) -> None:
    """Make a version the live one. A refused version needs --reason."""
    with locked_store(store, wait, sign_key_file) as opened_store:
        if not opened_store.manifest(number).promoted and not reason:
            raise OptionError(f'The gate refused version {number}. To make it live anyway, pass --reason "...".')
        before = _chain_or_nothing(opened_store)
        opened_store.move_pointer(number, "promote", reason)
        dropped = _dropped_text(opened_store, before)
    if as_json:
        print_json({"live": number})
        return
    print_wrapped(f"Version {number} is live.{dropped}")


def rollback(
    number: Annotated[
        int | None, typer.Argument(metavar="[VERSION]", help="Default: the parent of the live version.")
    ] = None,
    store: StorePath = Path("store"),
    allow_import: AllowImport = None,
    sign_key_file: SignKeyFile = None,
    reason: ReasonOption = "",
    wait: WaitOption = "",
    as_json: AsJson = False,
) -> None:
    """Make an earlier version the live one. Later versions are dropped; `update --retry` learns their events again."""
    with locked_store(store, wait, sign_key_file) as opened_store:
        live = opened_store.live
        target = number if number is not None else opened_store.manifest(live).parent
        if target is None:
            raise OptionError(f"Version {live} is the first one. There is no earlier version.")
        if not opened_store.manifest(target).goes_live and not reason:
            raise OptionError(f'The gate refused version {target}. To make it live anyway, pass --reason "...".')
        if target >= live:
            raise OptionError(
                f"Version {target} is not earlier than the live version {live}. Use `freshrec promote {target}`."
            )
        before = _chain_or_nothing(opened_store)
        opened_store.move_pointer(target, "rollback", reason)
        dropped = _dropped_text(opened_store, before)
    if as_json:
        print_json({"live": target, "was": live})
        return
    print_wrapped(f"Version {target} is live instead of version {live}.{dropped}")


def _chain_or_nothing(store: Store) -> list[Manifest]:
    """Return the live version and its ancestors; nothing if the record is damaged, which `promote` repairs."""
    from freshrec.store.versions import version_chain

    try:
        return version_chain(store)
    except StateError:
        return []


def _dropped_text(store: Store, before: list[Manifest]) -> str:
    """Say which events are no longer learned, and which command learns them again. `before`: the former chain."""
    from freshrec.nightly.notes import number_ranges
    from freshrec.text_layout import format_count

    learned = {batch for version in _chain_or_nothing(store) for batch in version.batches}
    dropped = [v for v in before if v.batch not in learned and v.numbers.get("new_events")]
    n_events = int(sum(version.numbers["new_events"] for version in dropped))
    if not n_events:
        return ""
    events = f"{format_count(n_events, 'event')} of version{'s' if len(dropped) > 1 else ''} "
    events += number_ranges([version.id for version in dropped])
    verb = "is" if n_events == 1 else "are"
    if len(dropped) == 1:
        again = f"`{retry_command(dropped[0], store.folder)}` learns {'it' if n_events == 1 else 'them'} again."
    else:
        again = f"`freshrec update --retry N {store_option(store.folder)}` learns those of version N again. "
        again += "Retry the oldest version first."
    return f" {events} {verb} no longer learned. {again}"


def gc(
    store: StorePath = Path("store"),
    allow_import: AllowImport = None,
    sign_key_file: SignKeyFile = None,
    keep: Annotated[int, typer.Option(min=1, help="Number of formerly live versions to keep.")] = 5,
    wait: WaitOption = "",
    as_json: AsJson = False,
) -> None:
    """Delete the files of old and refused versions. `freshrec history` still lists them.

    Kept are the live version, the last N that were live before it, and the N to which `rollback` would go.
    """
    from freshrec.cli.number_labels import format_bytes
    from freshrec.nightly.notes import number_ranges
    from freshrec.store.collection import collect_garbage, disk_bytes

    with locked_store(store, wait, sign_key_file) as opened_store:
        n_bytes = disk_bytes(opened_store.folder)
        collected_numbers = collect_garbage(opened_store, keep)
        n_freed = max(0, n_bytes - disk_bytes(opened_store.folder))
    message = "Nothing to delete."
    if collected_numbers:
        versions = "versions" if len(collected_numbers) > 1 else "version"
        message = f"Deleted the files of {versions} {number_ranges(collected_numbers)}: {format_bytes(n_freed)} freed."
    print_json({"gone": collected_numbers, "bytes_freed": n_freed}) if as_json else typer.echo(message)


def erase(
    user: Annotated[str, typer.Argument(metavar="[USER]", help="User id.", show_default=False)] = "",
    store: StorePath = Path("store"),
    allow_import: AllowImport = None,
    sign_key_file: SignKeyFile = None,
    from_stdin: Annotated[
        bool, typer.Option("--stdin", help="Read the user id from standard input, so that no other process sees it.")
    ] = False,
    wait: WaitOption = "",
    as_json: AsJson = False,
) -> None:
    """Remove a user from the log, the clicks and every version, and print what was removed and what stays.

    Running servers treat the user as unknown from the start of this command on.
    """
    from freshrec.nightly.erase import erase_user
    from freshrec.nightly.job import NightlyJob

    if from_stdin == bool(user):
        raise OptionError("Pass one user id: as USER, or with --stdin.")
    if from_stdin:
        user = sys.stdin.read().removesuffix("\n").removesuffix("\r")
        if not user:
            raise OptionError("Standard input is empty, but --stdin reads the user id from it. Write one id to it.")
    with locked_store(store, wait, sign_key_file) as opened_store:
        receipt = erase_user(NightlyJob(opened_store), user)
    if as_json:
        print_json(receipt)
        return
    if not receipt["events"] and not receipt["versions"] and not receipt["clicks"]:
        if "\n" in user:  # an old store may hold such an id, but several ids are more likely
            raise OptionError("Standard input holds several lines, and no user has this id. Pass one id at a time.")
        typer.echo(f"User {user}: nothing to erase. No event, no click and no version holds this id.")
        return
    versions = ", ".join(map(str, receipt["versions"])) or "none"
    erased = f"erased {format_count(receipt['events'], 'event')} from the log"
    if receipt["clicks"]:
        erased += f" and {format_count(receipt['clicks'], 'click')} from the journal"
    print_wrapped(f"User {user}: {erased}. Rewritten versions: {versions}.")
    print_wrapped(f"Not erased: {receipt['stays']}")


def sign(
    key_file: Annotated[
        Path,
        typer.Option("--sign-key-file", metavar="FILE", envvar=SIGN_KEY_VARIABLE, help="File with the secret key."),
    ],
    store: StorePath = Path("store"),
    old_key_file: Annotated[
        Path | None, typer.Option("--old-sign-key-file", metavar="FILE", help="File with the former key, to change it.")
    ] = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Sign also files without a valid signature, after you checked them.")
    ] = False,
    wait: WaitOption = "",
    as_json: AsJson = False,
) -> None:
    """Sign a store with a key, or with another key. Afterwards, pass --sign-key-file to all commands."""
    from freshrec.store.sign_store import sign_store

    wait_s = parse_duration(wait, "--wait") if wait else 0.0
    found = sign_store(store, key_file, old_key_file, unverified, wait_s)
    if as_json:
        print_json(found)
        return
    print_wrapped(
        f"{store} is signed with the key {found['key']}. Files that it had not signed: {len(found['signed'])}."
    )
