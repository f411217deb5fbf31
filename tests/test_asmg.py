"""ASMG: the chain equals fine-tuning, each model is trained on the right span, and the generator learns."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch

from freshrec import random_streams
from freshrec.data.batches import due_targets
from freshrec.data.histories import append_events
from freshrec.data.split import LogSplit, split_log
from freshrec.data.stored_interests import pad_interests
from freshrec.data.synthetic import make_world
from freshrec.errors import OptionError
from freshrec.learn.fit import FitConfig, training_batches
from freshrec.learn.generators import ModelGenerator, ModelWindow
from freshrec.learn.weights import Weights, copy_weights, load_weights
from freshrec.models import MODELS
from freshrec.replay.plan import training_passes
from freshrec.strategies.asmg import ASMG, PastSpan
from freshrec.strategies.baselines import FineTune
from freshrec.types import DUE, NEXT, NOW, Events, Forward, Histories, Span, State, Strategy, TrainedModel

near = pytest.approx
FIT = FitConfig(base_epochs=2, epochs=1)
MULTI = ASMG(base_parts=0, fit=FIT)
SINGLE, LINEAR = replace(MULTI, loss="last"), replace(MULTI, generator="linear", loss="last")


@cache
def log() -> LogSplit:
    return split_log(
        make_world("checkerboard", users=60, items=40, events=1600, spans=5).log, by="period", forget_users=0
    )


def spec(name: str) -> State:
    """An untrained state with a small model."""
    small = replace(MODELS[name], d=8, negatives=16, batch=64)  # type: ignore[type-var]
    return State(small.build(0))


def updated(strategy: Strategy, state: State, span: Span) -> State:
    ready = replace(state, histories=append_events(state.histories, span.events, span.n_users))
    return strategy.update(ready, span)


def stream(strategy: Strategy, model: str = "mf", n: int = 6) -> list[State]:
    """Return the states after each of the first n spans."""
    states = [spec(model)]
    for span in log().spans[:n]:
        states.append(updated(strategy, states[-1], span))
    return states[1:]


def same(one: Weights, other: Weights) -> bool:
    return all(torch.equal(one[name], other[name]) for name in (*one, *other))


@pytest.mark.parametrize("model", ["mf", "sasrec", "comirec-dr", "embedding-mlp"])
def test_the_chain_equals_fine_tuning_bit_for_bit_whatever_is_served(
    model: str, bits: Callable[[State], bytes]
) -> None:
    """T29"""
    asmg, finetuned = stream(MULTI, model, 4)[-1], stream(FineTune(FIT), model, 4)[-1]
    chain = replace(asmg, model=asmg.memory.model, interests=asmg.memory.interests, memory=None)
    assert bits(chain) == bits(finetuned)
    assert bits(replace(asmg, memory=None)) != bits(finetuned)


def test_an_untrained_residual_generator_serves_the_newest_model_of_the_chain(bits: Callable[[State], bytes]) -> None:
    # The second update has the first window. Until then, without base parts, the generator has not been trained.
    asmg, finetuned = stream(MULTI, "mf", 2), stream(FineTune(FIT), "mf", 2)
    assert same(copy_weights(asmg[1].model), copy_weights(finetuned[1].model))


def events_of_update(t: int) -> Events:
    """Return the events that the update on span t trains on: its own, and those that the span before held back."""
    previous, current = (log().spans[i].events for i in (t - 1, t))
    previous, current = previous[previous.train_at_E == NEXT], current[current.train_at_E == NOW]
    return Events.trainable(
        torch.cat([previous.users_E, current.users_E]), torch.cat([previous.items_E, current.items_E])
    )


@dataclass
class TrainingCall:
    """The data that a generator was trained on."""

    window: ModelWindow
    past_spans: tuple[PastSpan, ...]


def training_calls(strategy: ASMG, monkeypatch: pytest.MonkeyPatch) -> list[TrainingCall]:
    """Return one call per update after the base block, for a strategy without base parts."""
    calls: list[TrainingCall] = []
    original = ASMG._train_generator

    def spy(
        self: ASMG,
        generator: ModelGenerator,
        model: TrainedModel,
        window: ModelWindow,
        past_spans: tuple[PastSpan, ...],
        key: tuple,
    ) -> ModelGenerator:
        calls.append(TrainingCall(window, past_spans))
        return original(self, generator, model, window, past_spans, key)

    monkeypatch.setattr(ASMG, "_train_generator", spy)
    stream(strategy)
    return calls


@pytest.mark.parametrize(
    ("strategy", "n_models", "n_past_spans"),
    [
        (MULTI, [0, 1, 2, 3, 3], [1, 1, 2, 3, 3]),
        (replace(MULTI, k=2), [0, 1, 2, 2, 2], [1, 1, 2, 2, 2]),
        (replace(MULTI, k=0, carry=False), [0, 1, 2, 3, 4], [1, 1, 2, 3, 4]),
        (SINGLE, [0, 1, 2, 3, 3], [1, 1, 1, 1, 1]),
        (LINEAR, [0, 1, 2, 3, 3], [1, 1, 1, 1, 1]),
    ],
)
def test_the_model_generated_from_those_up_to_span_i_is_trained_on_span_i_plus_1(
    strategy: ASMG, n_models: list[int], n_past_spans: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """T29. The base model is in no window."""
    chain = [copy_weights(state.model) for state in stream(FineTune(FIT))]
    for t, call in enumerate(training_calls(strategy, monkeypatch), 1):
        assert len(call.window.models) == n_models[t - 1] and len(call.past_spans) == n_past_spans[t - 1]
        newest_first = range(t - 1, 0, -1)
        for i, model in zip(newest_first, reversed(call.window.models)):
            known = {name: model[name][: len(rows)] for name, rows in chain[i].items()}
            assert same(known, chain[i])
        for i, past_span in zip(range(t, 0, -1), reversed(call.past_spans)):
            due_R = past_span.histories.due_R == DUE
            assert sorted(past_span.histories.items_R[due_R].tolist()) == sorted(events_of_update(i).items_E.tolist())
            assert past_span.n_items == log().spans[i].n_items


def test_with_one_model_in_the_window_all_weightings_of_the_spans_are_equal(bits: Callable[[State], bytes]) -> None:
    """T27: with k = 1, the losses of multi, single and unif are equal."""
    multi, single, uniform = (
        stream(replace(MULTI, k=1, loss=loss), "mf", 4)[-1] for loss in ("linear", "last", "uniform")
    )
    assert bits(multi) == bits(single) == bits(uniform)


def test_the_loss_is_the_weighted_sum_over_the_spans() -> None:
    """[ASMG eq. lambda] T27, computed with models that hold the generated weights."""
    state = stream(replace(MULTI, residual=False), "mf", 5)[-1]
    memory, window = state.memory, state.memory.window
    past_spans = list(memory.past_spans)
    assert len(window.models) == 3 and len(past_spans) == 2
    key = (0, 4)
    term = MULTI._past_spans_term(memory.generator, state.model, window, past_spans, key)
    newest = Forward(torch.tensor(0.7))
    expected = 0.7 / 2
    for j, (past_span, share) in enumerate(zip(past_spans, (1 / 6, 1 / 3))):
        model = copy.deepcopy(state.model)
        load_weights(model, memory.generator.generate(ModelWindow(window.models[: j + 1], window.hidden)))
        rng = random_streams.stream(0, "past spans", 4, j)
        expected += share * model(next(MULTI._endless_batches(model, past_span, rng))).loss.item()
    assert 0.7 + term(None, newest).item() == near(expected, rel=1e-5)  # type: ignore[arg-type]


def test_past_spans_are_repeated_with_the_negatives_of_their_time_and_empty_ones_are_skipped() -> None:
    state = stream(MULTI, "mf", 5)[-1]
    past_span = replace(state.memory.past_spans[0], n_items=3)
    one_epoch = list(training_batches(state.model, due_targets(past_span.histories), torch.Generator()))
    endless = MULTI._endless_batches(state.model, past_span, torch.Generator())
    drawn = [next(endless) for _ in range(3 * len(one_epoch))]
    n_targets = int((past_span.histories.due_R == DUE).sum())
    assert sum(len(batch) for batch in drawn) == 3 * n_targets
    assert max(int(batch.negatives_N.max()) for batch in drawn) == 3  # type: ignore[union-attr]
    empty = replace(past_span, histories=Histories.empty())
    assert list(MULTI._endless_batches(state.model, empty, torch.Generator())) == []


def test_a_past_span_keeps_the_interests_that_were_served_in_it() -> None:
    states = stream(MULTI, "comirec-dr", 4)
    past_span, before = (
        states[3].memory.past_spans[-1],
        states[2].interests,
    )  # the last span, and the interests before it
    assert past_span.stored_interests is not None and before is not None
    users_N = events_of_update(3).users_E.unique()
    users_N = users_N[users_N <= before.n_users]
    found, expected = (
        pad_interests(past_span.stored_interests.interests, users_N, past_span.stored_interests.initial_KD),
        pad_interests(before, users_N, past_span.stored_interests.initial_KD),
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (
        len(past_span.stored_interests.interests.vectors_SD)
        == before.offsets_U.diff()[users_N].sum()
        < len(before.vectors_SD)
    )


def test_the_chain_and_the_generator_both_train_on_exposures(bits: Callable[[State], bytes]) -> None:
    """On a log with labels: 20 users are shown 400 items in 5 spans, and click a random half."""
    source = torch.Generator().manual_seed(0)
    users_E, items_E = (torch.randint(1, n, (400,), generator=source) for n in (21, 31))
    labels_E, none_E = torch.randint(2, (400,), generator=source).float(), torch.zeros(400, dtype=torch.int8)
    shown = Events(users_E, items_E, torch.arange(400), none_E, none_E, labels_E)
    spans = [Span(t, shown[80 * t : 80 * t + 80], 20, 30) for t in range(5)]
    asmg = finetuned = spec("embedding-mlp")
    for span in spans:
        asmg, finetuned = updated(replace(MULTI, base_parts=6), asmg, span), updated(FineTune(FIT), finetuned, span)
    assert bits(replace(asmg, model=asmg.memory.model, memory=None)) == bits(finetuned)
    assert not same(copy_weights(asmg.model), copy_weights(finetuned.model))
    for t, past_span in zip((3, 4), asmg.memory.past_spans, strict=True):
        targets = due_targets(past_span.histories)
        assert torch.equal(targets.items_N, items_E[80 * t : 80 * t + 80])
        assert torch.equal(targets.labels_N, labels_E[80 * t : 80 * t + 80])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("strategy", "carries"), [(MULTI, True), (replace(MULTI, carry=False), False), (LINEAR, False)]
)
def test_the_state_before_the_window_is_kept_once_the_window_is_full(strategy: ASMG, carries: bool) -> None:
    windows = [state.memory.window for state in stream(strategy)]
    assert [len(window.models) for window in windows] == [0, 1, 2, 3, 3, 3]
    assert [window.hidden is not None for window in windows] == [False] * 4 + [carries] * 2


def test_the_generator_prefers_the_model_that_is_good_on_the_new_span() -> None:
    # The window has two models. The older one is trained, and the newer one is noise. The weights of the mean start
    # equal and move to the older model, in every dimension of both tables.
    state, span = stream(FineTune(FitConfig(base_epochs=10, epochs=3)), "mf", 2)[-1], log().spans[2]
    good = copy_weights(state.model)
    source = torch.Generator().manual_seed(0)
    bad = {name: rows.std() * torch.randn(rows.shape, generator=source) for name, rows in good.items()}
    ready = replace(state, histories=append_events(state.histories, span.events, span.n_users))
    model = copy.deepcopy(state.model)
    model.grow(span.n_users, span.n_items)
    linear = replace(LINEAR, k=2, epochs=3)
    window = ModelWindow((good, bad)).grow(copy_weights(model))
    generator = linear.update(spec("mf"), log().spans[0]).memory.generator
    trained = linear._train_generator(generator, model, window, (linear._past_span(ready, model, span),), (0, 2))
    for name in ("users", "items"):
        alpha_PM = torch.softmax(trained.networks[name].logits_PM, 1)  # type: ignore[union-attr]
        assert (alpha_PM[:, 0] > 0.5).all()
    assert torch.equal(generator.networks["items"].logits_PM, torch.zeros(8, 2))  # type: ignore[union-attr]


def test_full_trains_on_20_past_spans_where_multi_trains_on_3() -> None:
    """T28: as at i = 30 in the paper, where the window has the models since 11."""
    sizes = [100] * 22  # the base block, and 21 spans
    multi, full = (training_passes(replace(MULTI, k=k), sizes, 2)[-1] - 100 for k in (3, 0))
    assert full / multi == near(20 / 3)
    assert training_passes(SINGLE, sizes, 2)[-1] - 100 == 100


def test_base_parts_train_the_generator_and_nothing_else(bits: Callable[[State], bytes]) -> None:
    with_parts, without_parts = (stream(replace(MULTI, base_parts=n), "mf", 1)[0] for n in (6, 0))
    assert bits(replace(with_parts, memory=None)) == bits(replace(without_parts, memory=None))
    assert with_parts.memory.window == ModelWindow() and with_parts.memory.past_spans == ()
    assert with_parts.memory.generator.moments and not without_parts.memory.generator.moments


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"generator": "linear"}, "trains on one span"),
        ({"generator": "linear", "loss": "last", "k": 0}, "Set k >= 1"),
        ({"base_parts": 2}, "Set base_parts to 0 or at least 3"),
        ({"loss": "newest"}, 'Option loss is "newest"'),
    ],
)
def test_invalid_combinations_of_options_are_refused(options: dict[str, object], expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        ASMG(**options)  # type: ignore[arg-type]
