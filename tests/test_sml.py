"""SML: extreme values of its options, the order of its steps, and no use of the span that it is tested on.

T1, T13 and so on are invariants, which hold for all numbers.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from freshrec.data.batches import due_targets
from freshrec.data.histories import append_events
from freshrec.errors import OptionError
from freshrec.learn.fit import FitConfig, fit_base_block, train
from freshrec.learn.transfer import (
    CNNTransfer,
    LinearTransfer,
    MLPTransfer,
    Transfer,
    adaptation_parametrization,
    transfer_parametrization,
    transfer_weights,
)
from freshrec.learn.weights import Weights, copy_weights, load_weights
from freshrec.models import MODELS
from freshrec.random_streams import stream_seed
from freshrec.replay.plan import training_passes
from freshrec.store.checkpoint import load_state, save_state
from freshrec.strategies.baselines import FineTune
from freshrec.strategies.sml import SML, transfer_decay_term, weight_decay_term
from freshrec.types import Events, Span, State, Strategy

TRAINED = ["mf", "sasrec", "mind", "comirec-dr", "comirec-sa"]
FIT = FitConfig(epochs=2, base_epochs=2)
CNN = CNNTransfer(filters=3, filters2=2, hidden=8, residual=False)  # a small version of the paper's network
HIGH_LR = 0.05  # a learning rate that has an effect within a few steps


def span_of(index: int, seed: int | None = None, n: int = 90) -> Span:
    """Return a span of random events of 6 users and 9 items."""
    source = torch.Generator().manual_seed(index if seed is None else seed)
    users, items = (torch.randint(1, highest + 1, (n,), generator=source) for highest in (6, 9))
    return Span(index, Events.trainable(users, items, torch.arange(n) + index * n), 6, 9)


def untrained(model: str) -> State:
    return State(replace(MODELS[model], d=8, negatives=16, batch=32, std=0.5).build(0))  # type: ignore[type-var]


def absorbed(state: State, span: Span) -> State:
    return replace(state, histories=append_events(state.histories, span.events, span.n_users))


def chain(strategy: Strategy, model: str = "mf", spans: list[Span] | None = None) -> list[State]:
    """Return the states after each span."""
    state, states = untrained(model), []
    for span in [span_of(i) for i in range(4)] if spans is None else spans:
        state = strategy.update(absorbed(state, span), span)
        states.append(state)
    return states


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("model", TRAINED)
def test_with_alpha_0_sml_equals_fine_tuning_bit_for_bit(model: str) -> None:
    """T1"""
    sml = SML(transfer=LinearTransfer(alpha=0), fit=FIT, weight_decay=0)
    for state, finetuned in zip(chain(sml, model), chain(FineTune(fit=FIT), model), strict=True):
        assert same(dict(state.model.state_dict()), dict(finetuned.model.state_dict()))  # including the moments
        if state.interests is not None and finetuned.interests is not None:
            assert torch.equal(state.interests.vectors_SD, finetuned.interests.vectors_SD)


@pytest.mark.parametrize("model", TRAINED)
def test_with_alpha_1_an_update_changes_no_weights(model: str) -> None:
    """T1. Weights that are not whole rows are an exception: they are the adapted ones."""
    first, *later = [
        copy_weights(state.model) for state in chain(SML(transfer=LinearTransfer(alpha=1), fit=FIT), model)
    ]
    for weights in later:
        weights = weights | {name: first[name] for name in ("extract.log_fading",) if name in first}
        assert same(weights, first)


@pytest.mark.parametrize("transfer", [LinearTransfer(0.5), LinearTransfer(0.5, learned=True), MLPTransfer(), CNN])
def test_without_training_through_the_network_the_adapted_models_are_those_of_fine_tuning(transfer: Any) -> None:
    """T13"""
    sml = SML(transfer=transfer, fit=FIT, weight_decay=0, train_through_transfer=False, transfer_lr=HIGH_LR)
    for state, finetuned in zip(chain(sml)[1:], chain(FineTune(fit=FIT))[1:], strict=True):
        assert same(copy_weights(state.memory.adapted), copy_weights(finetuned.model))


def test_without_training_through_a_linear_transfer_moving_averages_of_fine_tuned_models_are_served() -> None:
    """T13: W_t = W_{t-1} / 2 + IU_t / 2"""
    sml = SML(transfer=LinearTransfer(0.5), fit=FIT, weight_decay=0, train_through_transfer=False)
    finetuned = [copy_weights(state.model) for state in chain(FineTune(fit=FIT))]
    mean = finetuned[0]
    for state, newest in zip(chain(sml)[1:], finetuned[1:], strict=True):
        mean = {name: 0.5 * mean[name] + 0.5 * newest[name] for name in mean}
        assert same(copy_weights(state.model), mean)


def run_in_order_of_the_paper(strategy: SML, spans: list[Span]) -> list[tuple[Weights, Weights]]:
    """Run the stages in the order of the paper, where each has its next span. Return (served weights, final Theta)."""
    states = chain(FineTune(fit=FIT), spans=spans)  # for the base block and the histories before each span
    model, stages = copy.deepcopy(states[0].model), []
    transfer = Transfer.for_model(strategy.transfer, model, 0)
    targets = [due_targets(absorbed(state, span).histories) for state, span in zip(states, spans[1:])]
    for t, (span_targets, next_targets) in enumerate(zip(targets, targets[1:]), start=1):
        before, served = copy_weights(model), None
        for n in range(1, strategy.rounds + 1):
            transfer.requires_grad_(False)
            key = (0, t) if n == 1 else (0, t, n)
            terms = [weight_decay_term(model, strategy.weight_decay)]
            list(
                train(
                    model,
                    span_targets,
                    FIT.epochs,
                    key,
                    terms=terms,
                    parametrization=adaptation_parametrization(transfer, before),
                )
            )
            served = transfer_weights(transfer, model, before) if served is None else served
            transfer.requires_grad_(True)
            list(
                train(
                    model,
                    next_targets,
                    strategy.transfer_epochs,
                    (stream_seed(0, "transfer training"), t + 1, n),
                    lr_scale=HIGH_LR / model.spec.lr,
                    terms=[transfer_decay_term(transfer, strategy.transfer_weight_decay)],
                    parametrization=transfer_parametrization(transfer, before),
                    trainable=transfer,
                    negative_pool_N=next_targets.histories.items_R[next_targets.rows_N].unique().long(),
                )
            )
            after = transfer_weights(transfer, model, before)
            load_weights(model, after)
        stages.append((served, {name: theta.clone() for name, theta in transfer.state_dict().items()}))
    return stages


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_order_of_the_spans_gives_the_same_weights_as_the_order_of_the_paper(rounds: int) -> None:
    """T14, T15: stage t + 1 serves with Theta after stage t."""
    spans = [span_of(i) for i in range(5)]
    strategy = SML(transfer=CNN, fit=FIT, rounds=rounds, transfer_lr=HIGH_LR, base_parts=0)
    states = chain(strategy, spans=spans)
    for t, (served, theta) in enumerate(run_in_order_of_the_paper(strategy, spans), start=1):
        assert same(copy_weights(states[t].model), served)
        assert same(states[t + 1].memory.theta, theta)
    assert not same(states[2].memory.theta, states[3].memory.theta)


def test_the_served_weights_are_the_adapted_weights_mapped_by_the_stored_theta() -> None:
    """T15"""
    strategy = SML(transfer=CNN, fit=FIT, transfer_lr=HIGH_LR)
    for state in chain(strategy)[1:]:
        transfer = Transfer.for_model(CNN, state.model, 0)
        transfer.load_state_dict(state.memory.theta)
        served = transfer_weights(transfer, state.memory.adapted, state.memory.before)
        assert same(copy_weights(state.model), served)
        assert not same(copy_weights(state.memory.adapted), served)


def test_more_rounds_change_the_weights_of_later_spans_but_not_those_served_first() -> None:
    """A1: the weights that are tested are made before the first step 2."""
    one_round, three_rounds = (chain(SML(transfer=CNN, fit=FIT, rounds=n, transfer_lr=HIGH_LR)) for n in (1, 3))
    same_theta = replace(
        three_rounds[0],
        memory=replace(three_rounds[0].memory, theta=one_round[0].memory.theta, moments=one_round[0].memory.moments),
    )
    span = span_of(1)
    first = SML(transfer=CNN, fit=FIT, rounds=3, transfer_lr=HIGH_LR).update(absorbed(same_theta, span), span)
    assert same(copy_weights(first.model), copy_weights(one_round[1].model))
    assert not same(copy_weights(three_rounds[2].model), copy_weights(one_round[2].model))


@pytest.mark.parametrize(("objective", "reads"), [("next", True), ("current", False)])
def test_only_the_objective_next_trains_on_the_next_span(objective: Any, reads: bool) -> None:
    """T10: SML-N fits Theta on the span it adapts to, so another span 2 does not change the Theta of update 2."""
    strategy = SML(transfer=CNN, fit=FIT, objective=objective, transfer_lr=HIGH_LR)
    past = [span_of(0), span_of(1)]
    one, other = (chain(strategy, spans=[*past, span_of(2, seed)])[-1].memory.theta for seed in (2, 77))
    assert same(one, other) != reads


def test_a_network_that_is_trained_on_the_base_block_only_never_changes_afterwards() -> None:
    """T10: SML-S"""
    states = chain(SML(transfer=CNN, fit=FIT, last_trained_span=0, transfer_lr=HIGH_LR))
    untouched = Transfer.for_model(CNN, states[0].model, 0).state_dict()
    assert not same(states[0].memory.theta, dict(untouched))
    assert all(same(state.memory.theta, states[0].memory.theta) for state in states)
    until_2 = [
        state.memory.theta for state in chain(SML(transfer=CNN, fit=FIT, last_trained_span=2, transfer_lr=HIGH_LR))
    ]
    assert [same(a, b) for a, b in zip(until_2, until_2[1:])] == [True, False, True]  # span 1 has no stage to close


def test_base_parts_change_the_network_only() -> None:
    """The model of the base block equals that of `fit_base_block` bit for bit."""
    span = span_of(0)
    expected = fit_base_block(absorbed(untrained("mf"), span), span, FIT)
    with_parts, without_parts = (chain(SML(transfer=CNN, fit=FIT, base_parts=n), spans=[span])[0] for n in (6, 0))
    assert same(dict(with_parts.model.state_dict()), dict(expected.model.state_dict()))
    assert torch.equal(with_parts.histories.items_R, expected.histories.items_R)
    assert not same(with_parts.memory.theta, without_parts.memory.theta)


@pytest.mark.parametrize("restart", ["transferred", "adapted", "before"])
def test_later_rounds_start_from_the_weights_that_restart_selects(
    restart: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A2: tested without epochs, so that a round changes only the weights that it starts from."""
    strategy = SML(transfer=LinearTransfer(0.5, learned=True), fit=FIT, rounds=2, restart=restart, base_parts=0)
    states = chain(strategy, spans=[span_of(0), span_of(1)])
    memory, without_epochs = states[1].memory, replace(strategy, fit=replace(FIT, epochs=0), transfer_lr=1e-30)
    after = without_epochs.update(absorbed(states[1], span_of(2)), span_of(2)).memory.before["items"]
    before, adapted = memory.before["items"], copy_weights(memory.adapted)["items"]
    mean = 0.5 * (before + adapted)
    start = {"transferred": mean, "adapted": adapted, "before": before}[restart]
    torch.testing.assert_close(after, 0.5 * (before + start))


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_state_with_an_open_stage_can_be_saved(rounds: int, bits: Callable[[State], bytes], tmp_path: Path) -> None:
    strategy, span = SML(transfer=CNN, fit=FIT, rounds=rounds), span_of(3)
    state = chain(strategy, "comirec-dr", [span_of(0), span_of(1), span_of(2)])[-1]
    assert (state.memory.span_data is not None) == (rounds > 1)  # the last events are kept only if needed
    save_state(state, tmp_path / "state")
    loaded = load_state(tmp_path / "state")
    assert bits(strategy.update(absorbed(loaded, span), span)) == bits(strategy.update(absorbed(state, span), span))


def test_new_rows_start_like_those_of_fine_tuning_and_are_then_mapped() -> None:
    """Before step 1 of its span, a new item has the same weights in the previous and in the adapted model."""
    grown = replace(
        span_of(2), events=Events.trainable(torch.tensor([7] * 20), torch.arange(20) % 12 + 1), n_users=7, n_items=12
    )
    state = chain(SML(transfer=LinearTransfer(0.5), fit=FIT), spans=[span_of(0), span_of(1), grown])[-1]
    starts = untrained("mf").model
    starts.grow(7, 12)
    assert torch.equal(state.memory.before["items"][10:], copy_weights(starts)["items"][10:])
    assert len(copy_weights(state.model)["items"]) == 13


def test_the_penalties_by_hand() -> None:
    # lambda_1: a batch has the row (1, 2) twice and the row (3, 0) once: (1 + 4 + 9) / 2 x 0.1 = 0.7
    model = replace(MODELS["mf"], d=2).build(0)  # type: ignore[type-var]
    model.grow(2, 2)
    model.items.weights[1:] = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    model.items.lookup(torch.tensor([1, 1, 2]))
    unused: Any = None
    assert weight_decay_term(model, 0.1)(unused, unused).item() == pytest.approx(0.7)
    transfer = Transfer.for_model(MLPTransfer(hidden=0), model, 0)  # users and items: 4 x 2 weights each
    for theta in transfer.parameters():
        theta.data.fill_(0.5)
    assert transfer_decay_term(transfer, 0.1)(unused, unused).item() == pytest.approx(0.1 / 2 * 16 * 0.25)


def test_the_planned_work_counts_every_pass() -> None:
    # Base block: 3 epochs of 60 events, and 6 parts of 10 events. Two parts train a base for 3 epochs, and three stages
    # have 4 rounds of (2 + 1) epochs: 10 x (2 x 3 + 36). Span 1: 2 x 10. Span 2: 2 x 20, 3 x 2 x 10 for 3 more rounds
    # on the last span, and 4 x 20 for the network.
    strategy = SML(fit=FitConfig(epochs=2), rounds=4)
    assert training_passes(strategy, [60, 10, 20], 3) == [180 + 420, 20, 40 + 60 + 80]
    assert training_passes(replace(strategy, last_trained_span=0), [60, 10, 20], 3) == [600, 20, 40]
    assert training_passes(replace(strategy, objective="current"), [60, 10, 20], 3) == [600, 20, 40 + 60 + 40]
    assert training_passes(SML(transfer=LinearTransfer(), fit=FitConfig(epochs=2)), [60, 10, 20], 3) == [180, 20, 40]


@pytest.mark.parametrize("options", [{"rounds": 2, "train_through_transfer": False}, {"base_parts": 2}])
def test_invalid_combinations_of_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="sml .*Set (rounds=1|base_parts to 0 or at least 3)"):
        SML(**options)


def test_a_learned_alpha_falls_if_the_past_misleads_and_rises_if_it_helps() -> None:
    """Users like other items in each span, or always the same ones. Each span has few events."""

    def learned_alpha(n_moves: int) -> float:
        def span(t: int) -> Span:
            n = 240 if t else 2400
            users = torch.arange(n) % 24 + 1
            liked = (users + t * n_moves) % 6  # one of six groups of five items
            items = liked * 5 + torch.randint(1, 6, (n,), generator=torch.Generator().manual_seed(t))
            return Span(t, Events.trainable(users, items, torch.arange(n) + 2400 * t), 24, 30)

        linear = SML(transfer=LinearTransfer(0.5, learned=True), fit=FitConfig(epochs=5, base_epochs=20), base_parts=0)
        states = chain(replace(linear, transfer_lr=HIGH_LR), spans=[span(t) for t in range(10)])
        rho: Tensor = states[-1].memory.theta["towers.of/items.rho"]
        return float(torch.sigmoid(rho))

    assert learned_alpha(n_moves=1) < 0.3 < 0.6 < learned_alpha(n_moves=0)
