"""Training that stops by a held-out part, and goes back to its best epoch."""

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
from freshrec.learn.fit import CostMeter, FitConfig, fit_model, split_holdout, train_to_best_epoch
from freshrec.learn.weights import snapshot
from freshrec.models.sasrec import SASRecSpec
from freshrec.nn.embedding_table import embedding_tables
from freshrec.strategies.baselines import FineTune
from freshrec.strategies.incctr import IncCTR
from freshrec.strategies.self_tuned import SelfTuned
from freshrec.strategies.sml import SML
from freshrec.strategies.spmf import SPMF
from freshrec.types import NEVER, NOW, Batch, Events, Histories, State, TrainedModel

STOPPED = FitConfig(base_epochs=3, holdout=0.25, max_epochs=12, patience=2)


def untrained() -> TrainedModel:
    model = SASRecSpec(d=16, negatives=16, length=8, dropout=0.0).build(0)
    model.grow(60, 20)
    return model


def test_the_best_epoch_is_gone_back_to_with_the_weights_and_the_optimisers_of_then() -> None:
    model, seen = untrained(), []
    qualities = iter([0.1, 0.3, 0.3, 0.2, 0.9])  # 0.3 again is not better; two epochs after it the patience ends

    def epochs() -> Iterator[float]:
        for n in range(5):
            embedding_tables(model)["items"].packed[1:] = n + 1.0
            model.moments = {"n": torch.tensor(n + 1.0)}
            seen.append(n + 1)
            yield 0.0

    assert train_to_best_epoch(model, epochs(), lambda: next(qualities), patience=2, max_epochs=5) == 2
    assert seen == [1, 2, 3, 4]
    assert embedding_tables(model)["items"].packed[1:].unique().tolist() == [2.0] and model.moments["n"] == 2.0


def test_without_any_epoch_the_model_is_as_it_was() -> None:
    model = untrained()
    before = embedding_tables(model)["items"].packed.clone()
    assert train_to_best_epoch(model, iter([]), lambda: math.nan, patience=1, max_epochs=0) == 0
    assert torch.equal(embedding_tables(model)["items"].packed, before)


def test_a_snapshot_is_not_touched_by_later_training() -> None:
    model = untrained()
    weight = dict(model.named_parameters())["positions_TD"]
    before = weight.detach().clone()
    back = snapshot(model)
    with torch.no_grad():
        weight.add_(1.0)
    back()
    assert torch.equal(dict(model.named_parameters())["positions_TD"], before)


def test_a_quarter_is_held_out_and_the_rest_is_trained_on() -> None:
    targets = due_targets(append_events(Histories.empty(), circles.circles(range(1, 61), 1), 60))
    learnt, held = split_holdout(targets, STOPPED, (0, 1))
    assert len(held) == 240 and sorted([*learnt.rows_N.tolist(), *held.rows_N.tolist()]) == targets.rows_N.tolist()
    assert len(split_holdout(targets, FitConfig(), (0, 1))[0]) == len(targets)
    assert (
        split_holdout(targets, STOPPED, (0, 2))[1].rows_N.tolist() != held.rows_N.tolist()
    )  # another span, another part


def test_base_block_and_update_stop_by_themselves_and_say_when() -> None:
    state, span = circles.two_periods(FineTune(fit=replace(STOPPED, base_epochs=50)))
    assert 1 <= state.base_epochs <= 12  # not the 50 of a fixed number
    after = FineTune(fit=STOPPED).update(state, span)
    assert 1 <= after.costs["epochs"] <= 12


@pytest.mark.parametrize("epochs", [1, 4])
def test_the_number_of_epochs_does_not_matter_where_a_part_is_held_out(epochs: int) -> None:
    histories = append_events(Histories.empty(), circles.circles(range(1, 61), 1), 60)
    state = State(untrained(), histories=histories)
    models = [untrained(), untrained()]
    for model, how in zip(models, (STOPPED, replace(STOPPED, epochs=epochs))):
        fit_model(model, due_targets(state.histories), how, (0, 0), CostMeter())
    assert torch.equal(*(embedding_tables(model)["items"].packed for model in models))


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        (lambda: SML(fit=STOPPED), "weights that are not served"),
        (lambda: SPMF(fit=STOPPED), "draws new samples in each epoch"),
        (lambda: IncCTR(threshold=3, fit=STOPPED), "while rare ids share a row"),
        (lambda: SelfTuned(fit=STOPPED), "Leave out fit.holdout"),
        (lambda: SelfTuned(base_parts=3), "Set base_parts to 0 or at least 4"),
    ],
)
def test_what_cannot_be_stopped_by_a_held_out_part_says_so(strategy: Callable[[], object], why: str) -> None:
    with pytest.raises(OptionError, match=why):
        strategy()


def test_the_least_log_that_can_be_held_out_from_is_one_of_two_targets() -> None:
    targets = due_targets(
        append_events(Histories.empty(), Events.trainable(torch.tensor([1, 1]), torch.tensor([1, 2])), 1)
    )
    assert [len(part) for part in split_holdout(targets, STOPPED, (0, 0))] == [1, 1]
    assert [len(part) for part in split_holdout(targets[torch.tensor([1])], STOPPED, (0, 0))] == [1, 0]


def test_nothing_that_is_held_out_is_read_where_training_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events.trainable(torch.tensor([1, 1, 1]), torch.tensor([1, 2, 3]))
    events = replace(events, train_at_E=torch.tensor([NOW, NEVER, NOW], dtype=torch.int8))
    read = []

    def all_first(model: TrainedModel, batch: Batch, target_B: torch.Tensor) -> torch.Tensor:
        read.extend(batch.history_BT.flatten().tolist())
        return torch.ones(len(batch))

    monkeypatch.setattr(validation, "target_ranks", all_first)
    validation.hit_rate(untrained(), due_targets(append_events(Histories.empty(), events, 1)), None)
    assert 1 in read and 2 not in read
