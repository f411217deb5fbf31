"""Self-tuned: settings are chosen on the base block, replayed as a stream, and each setting has its effect."""

from dataclasses import replace
from typing import Any

import circles
import pytest
import torch

from freshrec.data.batches import due_targets
from freshrec.data.histories import append_events
from freshrec.learn.fit import FitConfig, train
from freshrec.models.sasrec import SASRecSpec
from freshrec.nn.embedding_table import embedding_tables
from freshrec.strategies.baselines import FineTune
from freshrec.strategies.self_tuned import (
    SEARCH_SPACE,
    SelfTuned,
    UpdateSettings,
    average_epoch_weights,
    mix_negative_pool,
)
from freshrec.types import Histories, Span, State, TrainedModel

FIT = FitConfig(base_epochs=3, epochs=3)


def model_and_targets() -> tuple[TrainedModel, Any]:
    histories = append_events(Histories.empty(), circles.circles(range(1, 61), 1), 60)
    model = SASRecSpec(d=16, negatives=16, length=8, dropout=0.0).build(0)
    model.grow(60, 20)
    return model, due_targets(histories)


def weights(model: TrainedModel) -> torch.Tensor:
    return embedding_tables(model)["items"].weights.clone()


def test_the_average_is_over_the_weights_after_each_epoch_except_the_first() -> None:
    one, targets = model_and_targets()
    after_epochs = [weights(one) for _ in train(one, targets, 4, (0, 1))]
    other, _ = model_and_targets()
    average_epoch_weights(other, train(other, targets, 4, (0, 1)))
    torch.testing.assert_close(weights(other), torch.stack(after_epochs[1:]).mean(0))


@pytest.mark.parametrize("epochs", [0, 1])
def test_with_fewer_than_two_epochs_averaging_equals_plain_training(epochs: int) -> None:
    one, targets = model_and_targets()
    for _ in train(one, targets, epochs, (0, 1)):
        pass
    other, _ = model_and_targets()
    average_epoch_weights(other, train(other, targets, epochs, (0, 1)))
    assert torch.equal(weights(other), weights(one))


def test_half_of_the_negatives_are_current_items() -> None:
    items_N = mix_negative_pool(torch.tensor([3, 7, 9]), 10)
    assert len(items_N) == 20
    counts = torch.bincount(items_N, minlength=11).tolist()
    assert counts == [0, 1, 1, 5, 1, 1, 1, 4, 1, 4, 1]  # each of 10 once, and 10 places for the three


def test_without_base_parts_self_tuned_equals_fine_tuning() -> None:
    self_tuned, span = circles.two_periods(SelfTuned(base_parts=0, fit=FIT))
    finetuned, _ = circles.two_periods(FineTune(fit=FIT))
    after, expected = (
        SelfTuned(base_parts=0, fit=FIT).update(self_tuned, span),
        FineTune(fit=FIT).update(finetuned, span),
    )
    assert self_tuned.memory.settings == UpdateSettings()
    assert torch.equal(weights(after.model), weights(expected.model))


def test_settings_are_chosen_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[UpdateSettings] = []

    def quality(self: SelfTuned, state: State, parts: Any, memory: Any) -> float:
        settings: UpdateSettings = memory.settings
        tried.append(settings)
        base_quality = {0.3: 0.1, 1.0: 0.2, 2.0: 0.3}[settings.lr_scale]
        return base_quality - 0.1 * settings.current_negatives + 0.05 * settings.average_epochs

    monkeypatch.setattr(SelfTuned, "_simulate_updates", quality)
    state, _ = circles.two_periods(SelfTuned(fit=FIT))
    # replay_share makes no difference here, so it keeps its default
    assert state.memory.settings == UpdateSettings(lr_scale=2.0, average_epochs=True)
    assert len(tried) == 1 + sum(map(len, SEARCH_SPACE.values())) and tried[0] == UpdateSettings()
    assert {name: state.costs[name] for name in SEARCH_SPACE} == {
        "lr_scale": 2.0,
        "current_negatives": 0.0,
        "replay_share": 0.0,
        "average_epochs": 1.0,
    }


@pytest.mark.parametrize(
    ("setting", "rows"),
    [({"replay_share": 0.5}, 1.5), ({"current_negatives": True}, 1.0), ({"lr_scale": 0.3}, 1.0), ({}, 1.0)],
)
def test_each_setting_changes_the_update(setting: dict[str, Any], rows: float) -> None:
    strategy = SelfTuned(base_parts=0, reservoir=1.0, fit=FIT)
    base, after = circles.circles(range(1, 61), 1), circles.circles(range(1, 61), -1)
    after = after[after.items_E <= 10]  # half of the items are current
    before = State(
        SASRecSpec(d=16, negatives=16, length=8).build(0), histories=append_events(Histories.empty(), base, 60)
    )
    state = strategy.update(before, Span(0, base, 60, 20))
    state, span = replace(state, histories=append_events(state.histories, after, 60)), Span(1, after, 60, 20)
    plain = strategy.update(state, span)
    changed = replace(state, memory=replace(state.memory, settings=UpdateSettings(**setting)))
    found = strategy.update(changed, span)
    assert torch.equal(weights(found.model), weights(plain.model)) == (not setting)
    assert found.costs["rows_read"] == rows * plain.costs["rows_read"]


def test_in_a_world_that_turns_round_a_larger_learning_rate_is_chosen() -> None:
    """Users go forwards until the last third of the base block, and backwards after that."""
    forwards, backwards = circles.circles(range(1, 61), 1), circles.circles(range(61, 121), -1)
    base = append_events(append_events(Histories.empty(), forwards, 60), backwards, 120)
    spec = SASRecSpec(d=16, negatives=16, length=8, dropout=0.0, lr=0.001)
    strategy = SelfTuned(base_parts=4, fit=replace(FIT, epochs=2))
    after = strategy.update(State(spec.build(0), histories=base), Span(0, backwards, 120, 20))
    assert after.memory.settings.lr_scale == 2.0
