"""The commands that operate on the versions of a store: history, promote, rollback, gc, erase."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from freshrec.cli.options import AsJson, ReasonOption, StorePath, WaitOption, parse_duration
from freshrec.cli.output import print_json, print_table
from freshrec.cli.version_text import version_line
from freshrec.errors import OptionError

if TYPE_CHECKING:
    from freshrec.store.versions import Store


VersionArgument = Annotated[int, typer.Argument(metavar="VERSION", help="See `freshrec history`.")]


def history(store: StorePath = Path("store"), as_json: AsJson = False) -> None:
    """All versions, and what became of them."""
    from freshrec.store.versions import open_store

    opened_store = open_store(store)
    versions, moves = opened_store.manifests(), opened_store.moves()
    if as_json:
        answer = {"versions": [v.model_dump() for v in versions], "moves": [m.model_dump() for m in moves]}
        print_json(answer)
        return
    live, rows = opened_store.live if versions else None, []
    for v in versions:
        summary = version_line(v).partition(": ")[2]
        rows.append((v.id, "live" if v.id == live else "", v.made_at, summary, " ".join(v.reasons)))
    print_table(("version", "", "made", "what", "why"), rows)
    print_table(("moved", "by", "to", "why"), [(m.at, m.action, m.to, m.reason) for m in moves])


@contextmanager
def locked_store(folder: Path, wait: str) -> Iterator[Store]:
    """A store that nobody else changes meanwhile."""
    from freshrec.store.versions import open_store

    store = open_store(folder)
    with store.locked(parse_duration(wait) if wait else 0.0):
        yield store


def promote(
    number: VersionArgument,
    store: StorePath = Path("store"),
    reason: ReasonOption = "",
    wait: WaitOption = "",
    as_json: AsJson = False,
) -> None:
    """Make a version the live one; one that was refused needs a reason."""
    with locked_store(store, wait) as opened_store:
        if not opened_store.manifest(number).promoted and not reason:
            raise OptionError(
                f'version {number} was refused by the gate; promote it with --reason "...", which is kept.'
            )
        opened_store.move_pointer(number, "promote", reason)
    print_json({"live": number}) if as_json else typer.echo(f"version {number} is live")


def rollback(
    number: Annotated[
        int | None, typer.Argument(metavar="[VERSION]", help="The parent of the live one if none.")
    ] = None,
    store: StorePath = Path("store"),
    reason: ReasonOption = "",
    wait: WaitOption = "",
    as_json: AsJson = False,
) -> None:
    """Go back to an earlier version. What later ones had learnt is not learnt again (but see `update --retry`)."""
    with locked_store(store, wait) as opened_store:
        live = opened_store.live
        target = number if number is not None else opened_store.manifest(live).parent
        if target is None:
            raise OptionError(f"version {live} is the first; there is nothing to go back to.")
        if not opened_store.manifest(target).goes_live and not reason:
            raise OptionError(f'version {target} was refused by the gate; take it with --reason "...", which is kept.')
        if target >= live:
            raise OptionError(
                f"version {target} is not earlier than the live one, {live}; use `freshrec promote {target}`."
            )
        opened_store.move_pointer(target, "rollback", reason)
    message = f"version {target} is live, after {live}"
    print_json({"live": target, "was": live}) if as_json else typer.echo(message)


def gc(
    store: StorePath = Path("store"),
    keep: Annotated[int, typer.Option(min=1, help="Versions that were live and stay, beside the live one.")] = 5,
    wait: WaitOption = "",
    as_json: AsJson = False,
) -> None:
    """Give up the files of old and refused versions; `history` still lists them."""
    from freshrec.store.versions import collect_garbage

    with locked_store(store, wait) as opened_store:
        collected_numbers = collect_garbage(opened_store, keep)
    message = "nothing to give up"
    if collected_numbers:
        message = f"versions {', '.join(map(str, collected_numbers))} were given up"
    print_json({"gone": collected_numbers}) if as_json else typer.echo(message)


def erase(
    user: Annotated[str, typer.Argument(metavar="USER")],
    store: StorePath = Path("store"),
    wait: WaitOption = "",
    as_json: AsJson = False,
) -> None:
    """Remove a user from the log and from every version, on the disk, and print a receipt of what stays."""
    from freshrec.nightly.erase import erase_user
    from freshrec.nightly.job import NightlyJob

    with locked_store(store, wait) as opened_store:
        receipt = erase_user(NightlyJob(opened_store), user)
    if as_json:
        print_json(receipt)
        return
    if not receipt["events"] and not receipt["versions"]:
        typer.echo(f"{user}: there was nothing to erase: no event and no version holds this id")
        return
    versions = ", ".join(map(str, receipt["versions"])) or "none"
    typer.echo(f"{user}: {receipt['events']:,} events erased from the log; versions rewritten: {versions}")
    typer.echo(f"what stays: {receipt['stays']}")
