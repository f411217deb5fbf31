"""When a full retrain pays: tried now and then beside the update, and less often where it gains nothing."""

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

FIRST_INTERVAL, MAX_INTERVAL = 7, 56  # updates between two retrains by "auto", at first and at most
GAIN_KEY = "full_gain"  # what a retrain had over the update of the same night, in the metric; with its interval


def retrain_interval(every: str, chain: Sequence[Manifest]) -> int:
    """Updates between two full retrains: as many as asked for; "auto": half as many after one that gained beyond
    chance, twice as many after one that did not. OptionError for anything else."""
    if every != "auto":
        if not re.fullmatch("[1-9][0-9]{0,5}", every):
            raise OptionError(f'--full-every is a number of updates or auto, not "{every[:40]}".')
        return int(every)
    n = FIRST_INTERVAL
    for manifest in chain:
        if GAIN_KEY in manifest.numbers:
            n = max(1, n // 2) if manifest.numbers.get("full_low", 0.0) > 0 else min(MAX_INTERVAL, 2 * n)
    return n


def updates_since_retrain(chain: Sequence[Manifest]) -> int:
    """How many updates of the chain came after the last retrain, or trial of one."""
    last = max(i for i, m in enumerate(chain) if i == 0 or GAIN_KEY in m.numbers)
    return sum(manifest.kind == "update" for manifest in chain[last + 1 :])


def start_from_scratch(
    bundle: Bundle, log: EventLog, chain: Sequence[Manifest], frame: pl.DataFrame
) -> tuple[Bundle, pl.DataFrame]:
    """A bundle that knows nothing but the rows that ids have, and all that it has to learn, `frame` last.

    OptionError where the log does not hold all that the live version has learnt.
    """
    if chain[0].batch is None:
        raise OptionError("the log does not hold what this store began with, so there is no full retrain; fit again.")
    empty = new_bundle(bundle.served.state.model.spec, bundle.strategy, bundle.served.state.seed, bundle.read_options)
    served = replace(empty.served, users=bundle.served.users.reset_spans(), items=bundle.served.items.reset_spans())
    past = log.read([manifest.batch for manifest in chain if manifest.batch is not None])
    all_rows = pl.concat([past, frame], how="diagonal")
    return replace(bundle, served=served), all_rows


def retrain_plan(chain: Sequence[Manifest]) -> dict[str, Any]:
    """What the store has measured of full retrains, and when the next one is to be tried by "auto"."""
    trials = [manifest for manifest in chain if GAIN_KEY in manifest.numbers]
    found: dict[str, Any] = {
        "updates_since_full": updates_since_retrain(chain),
        "next_full_after": retrain_interval("auto", chain),
    }
    found["full_s"] = next((m.numbers["full_s"] for m in reversed(chain) if "full_s" in m.numbers), None)
    if trials:
        numbers, number = trials[-1].numbers, trials[-1].id
        gain = ", ".join(f"{numbers.get(name, 0.0):+.4f}" for name in (GAIN_KEY, "full_low", "full_high"))
        live_value = next((numbers[name] for name in numbers if f"{name} live" in numbers), 0.0)
        share = f" ({100 * numbers[GAIN_KEY] / live_value:+.2g} % of the metric)" if live_value else ""
        cost = f"{numbers['full_s']:.3g} s against {numbers.get('update_s', 0.0):.3g} s"
        found["last_full"] = (
            f"version {number}: {gain} (95 % interval) over the update of that night{share}, for {cost}"
        )
    return found
