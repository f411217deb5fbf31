"""Notes of the gate about checks that it could not make. A note that applies every night is printed once a week."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

import polars as pl

from freshrec.data.id_warnings import warn_about_ids
from freshrec.store.manifest import Manifest
from freshrec.text_layout import format_count

CODES_KEY = "note_codes"  # in a manifest's "data": the code of each note, in the order of "notes"
# A note with the same code is printed again after 7 days. Half a day less, because a nightly job may start earlier.
REPEAT_AFTER = timedelta(days=6.5)
# Codes of notes about one version alone, which are printed every time
ALWAYS_PRINTED = {"separate", "forced", "unchanged", "accepted-loss", "accepted-amount", "deferred", "blamed"}


class Note(NamedTuple):
    """A sentence or two for people. Notes with the same code differ only in their numbers."""

    code: str  # stable, because manifests hold it
    text: str


def notes_about_ids(frame: pl.DataFrame) -> list[Note]:
    """Return the notes about suspicious ids of events, such as "nan"."""
    return [Note(code, text) for code, text in warn_about_ids(frame).items()]


def with_notes(manifest: Manifest, notes: Sequence[Note]) -> Manifest:
    """Return a copy of the manifest with these notes instead of its own."""
    data = manifest.data | {CODES_KEY: [note.code for note in notes]}
    return manifest.model_copy(update={"notes": [note.text for note in notes], "data": data})


def notes_of(manifest: Manifest) -> list[Note]:
    """Return the notes of a version. Versions of freshrec 0.1.0 stored no codes; the text of each note is its code."""
    codes = manifest.data.get(CODES_KEY)
    if not isinstance(codes, list) or len(codes) != len(manifest.notes):
        codes = manifest.notes
    return [Note(str(code), text) for code, text in zip(codes, manifest.notes)]


def notes_to_print(versions: Sequence[Manifest], manifest: Manifest) -> tuple[list[str], int]:
    """Return the notes to print below a version, and the number of those that were printed in the last 7 days.

    `versions`: all versions of the store in ascending order, also the refused ones. What they printed follows from
    their notes and their times, so nothing else has to be stored. A version is ignored if it was made after `manifest`,
    or if its time cannot be read.
    """
    now = _time_made(manifest)
    if now is None:
        return list(manifest.notes), 0
    printed_at: dict[str, datetime] = {}
    for version in versions:
        made_at = _time_made(version)
        if version.id < manifest.id and made_at is not None and made_at <= now:
            printed_at |= {note.code: made_at for note in _new_notes(version, made_at, printed_at)}
    new = [note.text for note in _new_notes(manifest, now, printed_at)]
    return new, len(manifest.notes) - len(new)


def _new_notes(manifest: Manifest, made_at: datetime, printed_at: Mapping[str, datetime]) -> list[Note]:
    """Return the notes that were not printed in the 7 days before `made_at`."""
    return [
        note
        for note in notes_of(manifest)
        if note.code in ALWAYS_PRINTED
        or note.code not in printed_at
        or not timedelta(0) <= made_at - printed_at[note.code] < REPEAT_AFTER
    ]


def _time_made(manifest: Manifest) -> datetime | None:
    """Return the time of a version; None if it cannot be read or has no time zone."""
    try:
        made_at = datetime.fromisoformat(manifest.made_at)
    except ValueError:
        return None
    return None if made_at.tzinfo is None else made_at


def current_notes(chain: Sequence[Manifest]) -> list[str]:
    """Return all notes that apply to the live version, the last one of `chain`.

    A version of a day without new events is a copy of its parent, so the notes of the parent still apply.
    """
    found: list[Note] = []
    for version in reversed(chain):
        found += notes_of(version)
        if version.kind != "no rows":
            break
    return list(dict.fromkeys(note.text for note in found))


def count_of(n: int, singular: str, plural: str = "") -> str:
    """Return a number with its noun: "no rows", "1 row", "2,000 rows"."""
    return format_count(n, singular, plural) if n else f"no {plural or f'{singular}s'}"


def number_ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as text: "1 to 4, 6, 7". Fewer than three in a row are listed."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def format_percent(share: float) -> str:
    """Return a share in percent, to three digits."""
    return f"{100 * share:.3g} %"
