"""Full retrains: the interval between them, the data that each starts from, and their gains."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import polars as pl

from freshrec.errors import OptionError
from freshrec.recommender.bundle import Bundle, new_bundle
from freshrec.store.event_log import EventLog
from freshrec.store.manifest import Manifest

FIRST_INTERVAL, MAX_INTERVAL = 7, 56  # updates between two full retrains with "auto": at first, and at most
GAIN_KEY = "full_gain"  # metric of the full retrain minus that of the update on the same events


def retrain_interval(every: str, chain: Sequence[Manifest]) -> int:
    """Return the number of updates between two full retrains.

    `every`: a number, or "auto". "auto" halves the interval after a full retrain that was better than the update,
    beyond chance, and doubles it after one that was not. Raises OptionError for other texts.
    """
    if every != "auto":
        if not re.fullmatch("[1-9][0-9]{0,5}", every):
            raise OptionError(f'--full-every must be a number of updates or auto, not "{every[:40]}".')
        return int(every)
    n = FIRST_INTERVAL
    for manifest in chain:
        if GAIN_KEY in manifest.numbers:
            n = max(1, n // 2) if manifest.numbers.get("full_low", 0.0) > 0 else min(MAX_INTERVAL, 2 * n)
    return n


def updates_since_retrain(chain: Sequence[Manifest]) -> int:
    """Return the number of updates since the last trial of a full retrain."""
    last = max(i for i, m in enumerate(chain) if i == 0 or GAIN_KEY in m.numbers)
    return sum(manifest.kind == "update" for manifest in chain[last + 1 :])


def start_from_scratch(
    bundle: Bundle, log: EventLog, chain: Sequence[Manifest], frame: pl.DataFrame
) -> tuple[Bundle, pl.DataFrame]:
    """Return an empty bundle with the catalogs of the live version, and all events to train it on, `frame` last.

    Raises OptionError if the log lacks the events of the first version.
    """
    if chain[0].batch is None:
        raise OptionError(
            "--full-every: the log lacks the events of version 1, so a full retrain is impossible. "
            "Make a new store with `freshrec fit`, or leave --full-every out."
        )
    empty = new_bundle(bundle.served.state.model.spec, bundle.strategy, bundle.served.state.seed, bundle.read_options)
    served = replace(empty.served, users=bundle.served.users.reset_spans(), items=bundle.served.items.reset_spans())
    past = log.read([batch for manifest in chain for batch in manifest.batches])
    all_rows = pl.concat([past, frame], how="diagonal")
    return replace(bundle, served=served), all_rows


def retrain_plan(chain: Sequence[Manifest]) -> dict[str, Any]:
    """Return what the last full retrain gained, and after how many updates "auto" tries the next one."""
    trials = [manifest for manifest in chain if GAIN_KEY in manifest.numbers]
    found: dict[str, Any] = {
        "updates_since_full": updates_since_retrain(chain),
        "next_full_after": retrain_interval("auto", chain),
    }
    found["full_s"] = next((m.numbers["full_s"] for m in reversed(chain) if "full_s" in m.numbers), None)
    if trials:
        numbers, number = trials[-1].numbers, trials[-1].id
        gain, low, high = (f"{numbers.get(name, 0.0):+.4f}" for name in (GAIN_KEY, "full_low", "full_high"))
        metric = next((name for name in numbers if f"{name} live" in numbers), "metric")
        found["last_full"] = (
            f"version {number}: {metric} {gain} compared with an update on the same events "
            f"(95 % interval {low} to {high}); "
            f"{numbers['full_s']:.3g} s instead of {numbers.get('update_s', 0.0):.3g} s"
        )
    return found
