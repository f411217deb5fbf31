"""Early stopping: training stops by the quality on a held-out part and returns to its best epoch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import circles
import pytest
import torch

from freshrec.data.batches import due_targets
from freshrec.data.histories import append_events
from freshrec.errors import OptionError
from freshrec.learn import validation
from freshrec.learn.fit import CostMeter, EpochChoice, FitConfig, fit_model, split_holdout, train_to_best_epoch
from freshrec.learn.weights import snapshot
from freshrec.models.sasrec import SASRecSpec
from freshrec.nn.embedding_table import embedding_tables
from freshrec.strategies.baselines import FineTune
from freshrec.strategies.incctr import IncCTR
from freshrec.strategies.self_tuned import SelfTuned
from freshrec.strategies.sml import SML
from freshrec.strategies.spmf import SPMF
from freshrec.types import NEVER, NOW, Batch, Events, Histories, State, TrainedModel

EARLY_STOPPING = FitConfig(base_epochs=3, holdout=0.25, max_epochs=12, patience=2)


def untrained() -> TrainedModel:
    model = SASRecSpec(d=16, negatives=16, length=8, dropout=0.0).build(0)
    model.grow(60, 20)
    return model


def test_the_weights_and_the_optimiser_state_of_the_best_epoch_are_restored() -> None:
    model, epochs_run = untrained(), []
    qualities = iter([0.1, 0.3, 0.3, 0.2, 0.9])  # a second 0.3 is no improvement; the patience ends after 0.2

    def epochs() -> Iterator[float]:
        for n in range(5):
            embedding_tables(model)["items"].packed[1:] = n + 1.0
            model.moments = {"n": torch.tensor(n + 1.0)}
            epochs_run.append(n + 1)
            yield 0.0

    choice = train_to_best_epoch(model, epochs(), lambda: next(qualities), patience=2, max_epochs=5)
    assert choice == EpochChoice(2, "patience")
    assert epochs_run == [1, 2, 3, 4]
    assert embedding_tables(model)["items"].packed[1:].unique().tolist() == [2.0] and model.moments["n"] == 2.0


def test_without_an_epoch_the_model_is_unchanged() -> None:
    model = untrained()
    before = embedding_tables(model)["items"].packed.clone()
    assert train_to_best_epoch(model, iter([]), lambda: math.nan, patience=1, max_epochs=0) == EpochChoice(0, "maximum")
    assert torch.equal(embedding_tables(model)["items"].packed, before)


def test_later_training_does_not_change_a_snapshot() -> None:
    model = untrained()
    weight = dict(model.named_parameters())["positions_TD"]
    before = weight.detach().clone()
    restore = snapshot(model)
    with torch.no_grad():
        weight.add_(1.0)
    restore()
    assert torch.equal(dict(model.named_parameters())["positions_TD"], before)


def test_a_quarter_is_held_out_and_the_rest_is_trained_on() -> None:
    targets = due_targets(append_events(Histories.empty(), circles.circles(range(1, 61), 1), 60))
    trained, held_out = split_holdout(targets, EARLY_STOPPING, (0, 1))
    assert (
        len(held_out) == 240
        and sorted([*trained.rows_N.tolist(), *held_out.rows_N.tolist()]) == targets.rows_N.tolist()
    )
    assert len(split_holdout(targets, FitConfig(), (0, 1))[0]) == len(targets)
    assert (
        split_holdout(targets, EARLY_STOPPING, (0, 2))[1].rows_N.tolist() != held_out.rows_N.tolist()
    )  # another span holds out another part


def test_training_on_the_base_block_and_in_updates_stops_early_and_reports_its_epochs() -> None:
    state, span = circles.two_periods(FineTune(fit=replace(EARLY_STOPPING, base_epochs=50)))
    assert 1 <= state.base_epochs <= 12  # not base_epochs = 50
    after = FineTune(fit=EARLY_STOPPING).update(state, span)
    assert 1 <= after.costs["epochs"] <= 12


@pytest.mark.parametrize("epochs", [1, 4])
def test_the_number_of_epochs_has_no_effect_if_a_part_is_held_out(epochs: int) -> None:
    histories = append_events(Histories.empty(), circles.circles(range(1, 61), 1), 60)
    state = State(untrained(), histories=histories)
    models = [untrained(), untrained()]
    for model, config in zip(models, (EARLY_STOPPING, replace(EARLY_STOPPING, epochs=epochs))):
        fit_model(model, due_targets(state.histories), config, (0, 0), CostMeter())
    assert torch.equal(*(embedding_tables(model)["items"].packed for model in models))


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        (lambda: SML(fit=EARLY_STOPPING), "weights that are not served"),
        (lambda: SPMF(fit=EARLY_STOPPING), "draws new samples in each epoch"),
        (lambda: IncCTR(threshold=3, fit=EARLY_STOPPING), "while rare ids share a row"),
        (lambda: SelfTuned(fit=EARLY_STOPPING), "Leave out fit.holdout"),
        (lambda: SelfTuned(base_parts=3), "Set base_parts to 0 or at least 4"),
    ],
)
def test_strategies_that_cannot_use_a_held_out_part_refuse_it(strategy: Callable[[], object], why: str) -> None:
    with pytest.raises(OptionError, match=why):
        strategy()


def test_a_part_can_be_held_out_from_two_targets_or_more() -> None:
    targets = due_targets(
        append_events(Histories.empty(), Events.trainable(torch.tensor([1, 1]), torch.tensor([1, 2])), 1)
    )
    assert [len(part) for part in split_holdout(targets, EARLY_STOPPING, (0, 0))] == [1, 1]
    assert [len(part) for part in split_holdout(targets[torch.tensor([1])], EARLY_STOPPING, (0, 0))] == [1, 0]


def test_measuring_the_held_out_part_never_reads_events_that_must_not_be_trained_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = Events.trainable(torch.tensor([1, 1, 1]), torch.tensor([1, 2, 3]))
    events = replace(events, train_at_E=torch.tensor([NOW, NEVER, NOW], dtype=torch.int8))
    items_read = []

    def record_history(model: TrainedModel, batch: Batch, target_B: torch.Tensor) -> torch.Tensor:
        items_read.extend(batch.history_BT.flatten().tolist())
        return torch.ones(len(batch))

    monkeypatch.setattr(validation, "target_ranks", record_history)
    validation.hit_rate(untrained(), due_targets(append_events(Histories.empty(), events, 1)), None)
    assert 1 in items_read and 2 not in items_read
