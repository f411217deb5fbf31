"""Notes of the gate about checks that it could not make. A note that applies every night is printed once a week."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from freshrec.data.log import format_count
from freshrec.store.manifest import Manifest

CODES_KEY = "note_codes"  # in a manifest's "data": the code of each note, in the order of "notes"
REPEAT_AFTER = timedelta(days=7)  # a note with the same code is printed again after this time
# Codes of notes about one version alone, which are printed every time
ALWAYS_PRINTED = {"forced", "unchanged", "accepted-loss"}


class Note(NamedTuple):
    """A sentence or two for people. Notes with the same code differ only in their numbers."""

    code: str  # stable, because manifests hold it
    text: str


def with_notes(manifest: Manifest, notes: Sequence[Note]) -> Manifest:
    """Return a copy of the manifest with these notes instead of its own."""
    data = manifest.data | {CODES_KEY: [note.code for note in notes]}
    return manifest.model_copy(update={"notes": [note.text for note in notes], "data": data})


def notes_of(manifest: Manifest) -> list[Note]:
    """Return the notes of a version. Versions of freshrec 0.1.0 stored no codes; the text of each note is its code."""
    codes = manifest.data.get(CODES_KEY, [])
    if len(codes) != len(manifest.notes):
        codes = manifest.notes
    return [Note(str(code), text) for code, text in zip(codes, manifest.notes)]


def notes_to_print(chain: Sequence[Manifest], manifest: Manifest) -> tuple[list[str], int]:
    """Return the notes to print below a version, and the number of those that were printed in the last 7 days.

    `chain`: the versions from the first one to the version's parent. What they printed follows from their notes and
    their times, so nothing else has to be stored.
    """
    printed_at: dict[str, datetime] = {}
    new: list[str] = []
    for version in (*(v for v in chain if v.id < manifest.id), manifest):
        made_at, new = datetime.fromisoformat(version.made_at), []
        for note in notes_of(version):
            last = printed_at.get(note.code)
            if note.code in ALWAYS_PRINTED or last is None or made_at - last >= REPEAT_AFTER:
                printed_at[note.code] = made_at
                new.append(note.text)
    return new, len(manifest.notes) - len(new)


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
