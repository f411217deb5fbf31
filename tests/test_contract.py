"""The contract of every strategy with every model that it can update. `make test` runs one model per kind.

The world is the checkerboard: even users interact with even items only, odd users with odd ones.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from freshrec.data.batches import history_ends, query_batches
from freshrec.data.split import LogSplit, split_log
from freshrec.data.stored_interests import stored_interests_of
from freshrec.data.synthetic import make_world
from freshrec.errors import IncompatibleError
from freshrec.learn.fit import FitConfig, fit_base_block
from freshrec.models import COUNTING_MODELS, MODELS, find_model
from freshrec.models.absorb import absorb_block
from freshrec.nn.scoring import score_items
from freshrec.store.checkpoint import load_state, save_state
from freshrec.strategies import STRATEGIES
from freshrec.strategies.baselines import Retrain
from freshrec.strategies.compatible import check_compatible
from freshrec.types import Events, ModelSpec, Span, State, Strategy, TrainedModel

QUICK_MODELS = {"item-knn", "mf", "sasrec", "comirec-dr"}
QUICK_STRATEGIES = {"absorb", "frozen", "finetune", "full", "imsr"}
BATCH = {"mf": 64, "sasrec": 8, "gru4rec": 8}  # small logs need small batches: pairs, windows, targets
WITH_CATEGORIES = (
    "sasrec:categories=3",
    "comirec-dr:categories=3",
)  # three rows for five categories, so that some share a row
COLOUR_BLIND = {"popularity", "popularity-last", "popularity-decay", "repeat-last"}


@dataclass(frozen=True)
class Pair:
    """A model and a strategy with a given number of epochs."""

    model: str
    strategy: str

    def spec(self) -> ModelSpec:
        spec = find_model(self.model)
        if self.model in COUNTING_MODELS or self.model == "blend":
            return spec
        return replace(spec, d=16, negatives=32, batch=BATCH.get(self.model.partition(":")[0], 64))  # type: ignore[type-var]

    def update(self, base_epochs: int = 1, epochs: int = 1) -> Strategy:
        strategy = STRATEGIES[self.strategy]
        if self.strategy == "absorb":
            return strategy
        if self.strategy == "refit":  # early stopping chooses the epochs on the base block
            return replace(strategy, fit=replace(strategy.fit, max_epochs=base_epochs))  # type: ignore[attr-defined,type-var]
        fit: FitConfig = strategy.fit  # type: ignore[attr-defined]
        return replace(strategy, fit=replace(fit, base_epochs=base_epochs, epochs=epochs))  # type: ignore[type-var]


@cache
def pairs() -> tuple[Pair, ...]:
    """All compatible pairs."""
    return tuple(_compatible_pairs())


def _compatible_pairs() -> Iterator[Pair]:
    for model in (*MODELS, *WITH_CATEGORIES):
        spec = find_model(model)
        for strategy, update in STRATEGIES.items():
            try:
                check_compatible(spec, model, update, strategy)
            except IncompatibleError:
                continue
            yield Pair(model, strategy)


SHORT = [
    Pair("comirec-dr:categories=3", strategy) for strategy in ("sml-mlp", "imsr-kd2")
]  # below 0.9 on the checkerboard


def marks(pair: Pair) -> list[pytest.MarkDecorator]:
    quick = pair.model in QUICK_MODELS and pair.strategy in QUICK_STRATEGIES
    return [] if quick or (pair.model in WITH_CATEGORIES and pair.strategy == "finetune") else [pytest.mark.slow]


each_pair = pytest.mark.parametrize(
    "pair", [pytest.param(p, id=f"{p.model}-{p.strategy}", marks=marks(p)) for p in pairs()]
)


@cache
def checkerboard() -> LogSplit:
    return with_categories(
        split_log(make_world("checkerboard", users=60, items=40, events=2500, spans=2).log, by="period", forget_users=0)
    )


def with_categories(found: LogSplit) -> LogSplit:
    """The same log with one category per seven rows of items. The last categories appear late, like their items."""
    with_categories_S = [replace(span.events, categories_E=(span.events.items_E // 7).int()) for span in found.spans]
    return replace(
        found, spans=tuple(replace(span, events=events) for span, events in zip(found.spans, with_categories_S))
    )


@cache
def base(pair: Pair) -> State:
    """The state after the base block, trained for one epoch."""
    span = checkerboard().spans[0]
    before = absorb_block(State(pair.spec().build(0)), span.events, span.n_users, span.n_items)
    return pair.update().update(before, span)


def passed(pair: Pair, state: State, span: Span) -> State:
    """The state after absorbing a span and updating on it."""
    return pair.update().update(absorb_block(state, span.events, span.n_users, span.n_items), span)


def day(state: State, users: list[int], items: list[int]) -> Span:
    """A span with these events."""
    n_users, n_items = max([state.model.n_users, *users]), max([state.model.n_items, *items])
    events = Events.trainable(torch.tensor(users, dtype=torch.int64), torch.tensor(items, dtype=torch.int64))
    return Span(state.spans_seen, events, n_users, n_items)


def scores(state: State) -> tuple[Tensor, Tensor]:
    """Users with a history, shape (N,), and their scores of all items, shape (N, I)."""
    users_N = (state.histories.offsets_U.diff() > 0).nonzero()[:, 0]
    ends = history_ends(state.histories, users_N, "recent")
    items_I = torch.arange(1, state.model.n_items + 1)
    scores_NI = torch.empty(len(users_N), len(items_I))
    carried = stored_interests_of(state.model, state.interests, state.spans_seen)
    for which, batch in query_batches(ends, state.model.spec.length, carried):
        scores_NI[which] = score_items(state.model, batch, items_I)
    return users_N, scores_NI


@each_pair
def test_an_update_does_not_change_the_old_state(pair: Pair, bits: Callable[[State], bytes]) -> None:
    span = checkerboard().spans[1]
    state = absorb_block(base(pair), span.events, span.n_users, span.n_items)
    before = bits(state)
    after = pair.update().update(state, span)
    assert bits(state) == before
    assert bits(after) != before


@each_pair
def test_the_same_seed_gives_the_same_bits(pair: Pair, bits: Callable[[State], bytes]) -> None:
    span = checkerboard().spans[1]
    first = bits(passed(pair, base(pair), span))
    torch.manual_seed(99)  # other random numbers of the process do not matter
    assert bits(passed(pair, base(pair), span)) == first


@each_pair
def test_an_update_adds_new_users_and_items(pair: Pair) -> None:
    before, span = base(pair), checkerboard().spans[1]
    after = passed(pair, before, span)
    assert (after.model.n_users, after.model.n_items) == (span.n_users, span.n_items)
    assert span.n_users > before.model.n_users and span.n_items > before.model.n_items
    assert after.spans_seen == 2
    users_N, scores_NI = scores(after)
    assert users_N.max() == span.n_users and scores_NI.isfinite().all()


@each_pair
@pytest.mark.parametrize("what", ["nothing", "one event", "strangers only", "one stranger", "one item"])
def test_any_span_can_be_learned(pair: Pair, what: str) -> None:
    state = base(pair)
    n, m = state.model.n_users, state.model.n_items
    users, items = {
        "nothing": ([], []),
        "one event": ([3], [5]),
        "strangers only": ([n + 1, n + 2] * 3, [m + 1, 2, 3, m + 2, m + 3, 4]),
        "one stranger": ([n + 1], [m + 1]),
        "one item": ([1, 2, 3] * 4, [7] * 12),
    }[what]
    after = passed(pair, state, day(state, users, items))
    assert after.spans_seen == state.spans_seen + 1
    assert (after.model.n_users, after.model.n_items) == (max([n, *users]), max([m, *items]))
    assert scores(after)[1].isfinite().all()


@each_pair
def test_a_user_may_come_back_after_a_long_absence(pair: Pair) -> None:
    state = base(pair)
    items, interests = of_user_2(state)
    for _ in range(3):
        state = passed(pair, state, day(state, [1, 3, 1, 3], [5, 6, 7, 8]))
    items_then, interests_then = of_user_2(state)
    assert items_then == items and len(interests_then) == len(interests)
    if not isinstance(pair.update(), Retrain):  # a retrain uses the user's old events again
        assert interests_then == interests
    state = passed(pair, state, day(state, [2, 2], [9, 4]))
    assert of_user_2(state)[0] == [*items, 9, 4][-state.model.spec.length :]
    assert scores(state)[1].isfinite().all()


def of_user_2(state: State) -> tuple[list[int], list[list[float]]]:
    """The kept events and the stored interests of user 2."""
    items = state.histories.items_R[state.histories.offsets_U[2] : state.histories.offsets_U[3]].tolist()
    if state.interests is None:
        return items, []
    return items, state.interests.vectors_SD[state.interests.offsets_U[2] : state.interests.offsets_U[3]].tolist()


@each_pair
def test_a_saved_state_scores_and_learns_like_the_original(
    pair: Pair, bits: Callable[[State], bytes], tmp_path: Path
) -> None:
    spans = checkerboard().spans
    state = passed(pair, base(pair), spans[1])
    save_state(state, tmp_path / "state")
    loaded = load_state(tmp_path / "state")
    assert torch.equal(scores(loaded)[1], scores(state)[1])
    assert bits(loaded) == bits(state)
    assert bits(passed(pair, loaded, spans[2])) == bits(passed(pair, state, spans[2]))


@each_pair
def test_a_shared_base_block_equals_the_one_that_a_strategy_trains_itself(
    pair: Pair, bits: Callable[[State], bytes]
) -> None:
    if not isinstance(base(pair).model, TrainedModel):
        pytest.skip("counting models are not trained")
    spans = checkerboard().spans
    before = absorb_block(State(pair.spec().build(0)), spans[0].events, spans[0].n_users, spans[0].n_items)
    started = fit_base_block(before, spans[0], FitConfig(base_epochs=1))
    shared = replace(pair.update().update(replace(before, shared_base=started), spans[0]), shared_base=None)
    assert bits(shared) == bits(base(pair))
    assert bits(passed(pair, shared, spans[1])) == bits(passed(pair, base(pair), spans[1]))


@each_pair
def test_the_checkerboard_is_learned(pair: Pair, request: pytest.FixtureRequest) -> None:
    """An item of the user's colour scores above another one in at least 90 % of all pairs. Chance gives half.

    MIND has noisy routing and soft attention and learns more slowly: 0.85 after 20 epochs, 0.91 after 40.
    """
    if pair.model in COLOUR_BLIND:
        pytest.skip("the baseline cannot learn colours")
    if pair in SHORT:
        request.applymarker(pytest.mark.xfail(reason="0.898: categories that do not help slow it down (docs/diary.md)"))
    spans = checkerboard()
    state, strategy = State(pair.spec().build(0)), pair.update(base_epochs=40 if pair.model == "mind" else 20, epochs=5)
    for span in spans.spans:
        state = strategy.update(absorb_block(state, span.events, span.n_users, span.n_items), span)
    users_N, scores_NI = scores(state)
    n_base = spans.spans[0].n_items  # the items that frozen knows
    user_is_odd = torch.tensor(spans.user_catalog.frame["id"].to_list())[users_N - 1] % 2 == 1
    item_is_odd = torch.tensor(spans.item_catalog.frame["id"].to_list())[:n_base] % 2 == 1
    is_own_NI = user_is_odd[:, None] == item_is_odd
    ahead_NII = scores_NI[:, :n_base, None] > scores_NI[:, None, :n_base]
    compared_NII = is_own_NI[:, :, None] & ~is_own_NI[:, None]
    assert ahead_NII[compared_NII].float().mean() > 0.9
