"""What a replay will take, before it runs: seconds by cell, from a second of measured training."""

import time
from dataclasses import replace

import polars as pl
import torch
from torch import Tensor

from freshrec.data.batches import due_targets
from freshrec.data.carried import carried_by
from freshrec.data.spans import Cut
from freshrec.learn.fit import USUAL_EPOCHS, train
from freshrec.models.blend import Blend
from freshrec.models.counted import absorb
from freshrec.replay.replay import Cell, Settings
from freshrec.types import Events, State, Strategy, TrainedModel

CHOICE = 2.0  # choosing them trains about as much again


def estimate(cells: list[Cell], cut: Cut, settings: Settings) -> pl.DataFrame:
    """model, strategy, seed, and CPU seconds of the base and of the updates of each cell; right to a factor of 2.

    The seconds of the updates include those of tuning them.
    """
    sizes = [int(learnable(span.events).sum()) for span in cut.spans]
    speeds: dict[str, float] = {}
    rows, based = [], set()
    for cell in cells:
        if cell.model not in speeds:
            speeds[cell.model] = speed(cell, cut)
        base, *later = cell.update.work(sizes, USUAL_EPOCHS)
        later = later if settings.last_update else later[:-1]
        base = 0.0 if (cell.model, cell.seed) in based else base * CHOICE
        if cell.update.base == "plain":  # trained once for all
            based.add((cell.model, cell.seed))
        tuning = tuning_work(cell.update, sizes) if settings.tune else 0.0
        seconds = (base / speeds[cell.model], (sum(later) + tuning) / speeds[cell.model])
        rows.append((cell.model, cell.strategy, cell.seed, *seconds))
    names = ["model", "strategy", "seed", "base_s", "updates_s"]
    return pl.DataFrame(rows, schema=names, orient="row")


def learnable(events: Events) -> Tensor:
    """(E,) whether a model can be trained on an event: where the log has labels, on those that have one."""
    return torch.ones(len(events), dtype=torch.bool) if events.labels_E is None else ~events.labels_E.isnan()


def tuning_work(strategy: Strategy, sizes: list[int]) -> float:
    """Targets trained on to choose knobs: from span 2 on, every alternative repeats the update of the span before."""
    alternatives = strategy.alternatives()
    if len(alternatives) < 2:
        return 0.0
    return sum(sum(alternative.work(sizes, USUAL_EPOCHS)[1:-1]) for alternative in alternatives)


def speed(cell: Cell, cut: Cut, n_events: int = 10_000) -> float:
    """Targets a CPU-second that training this model passes, on the first events of the base block."""
    model = cell.spec.build(cell.seed)
    model = model.experts.trained if isinstance(model, Blend) else model
    if not isinstance(model, TrainedModel):
        return float("inf")
    span = cut.spans[0]
    some = span.events[learnable(span.events)][:n_events]
    state = absorb(replace(State(model), seed=cell.seed), some, span.n_users, span.n_items)
    model.grow(span.n_users, span.n_items)
    targets = due_targets(state.recent)
    carried = carried_by(model, None, 0)
    epochs = train(model, targets, 2, (cell.seed, 0), carried=carried)
    next(epochs)  # the first one also warms up
    since = time.process_time()
    next(epochs)
    return max(len(targets), 1) / max(time.process_time() - since, 1e-6)
