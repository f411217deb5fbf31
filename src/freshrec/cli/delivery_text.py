"""Sentences about the rows of a delivery."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freshrec.cli.version_text import retry_command
from freshrec.text_layout import format_count

if TYPE_CHECKING:
    from freshrec.nightly.job import NightlyJob
    from freshrec.store.event_log import AppendResult

MAX_REASON_WIDTH = 60  # characters of a reason in a sentence


def delivery_line(job: NightlyJob, result: AppendResult, name: str, n_bad: int = 0) -> str:
    """Say how many rows of a file are new, and how many were skipped."""
    from freshrec.nightly.job import refused_batches

    if (batch := result.repeated_batch) is not None:
        if batch not in refused_batches(job.store):
            return f"{name}: this file was learned before, so nothing was read."
        return f"{name}: {_refused_file_text(job, batch)}"
    late = f" ({result.n_late:,} of them late)" if result.n_late else ""
    parts = [f"{result.n_appended:,} new{late}"]
    for n, noun in ((result.n_duplicates, "duplicate"), (result.n_known, "known event"), (n_bad, "bad row")):
        parts += [f"{format_count(n, noun)} skipped"] if n else []
    if result.n_separate:
        parts.append(f"{format_count(result.n_separate, 'row')} judged apart")
    return f"{name}: {format_count(result.n_rows + n_bad, 'row')}: {', '.join(parts)}"


def _refused_file_text(job: NightlyJob, batch: int) -> str:
    """Say what became of a file that was delivered before and is not learned, and which command learns it."""
    from freshrec.cli.history_text import state_reason, version_states
    from freshrec.nightly.deferral import find_deferral

    store = job.store
    version = max((m for m in store.manifests() if m.batch == batch), key=lambda manifest: manifest.id)
    state = version_states(store)[version.id]
    reason = state_reason(version, state, MAX_REASON_WIDTH)
    is_deferred = version in find_deferral(store, job.limits).versions
    again = "The next update with new events tries it again. " if is_deferred else ""
    return (
        f"version {version.id} was made from this file and is not live, so nothing was read. "
        f"It was {state.state}{f': {reason}' if reason else ''}. {again}"
        f"To learn it anyway, run `{retry_command(version, store.folder)}`."
    )
