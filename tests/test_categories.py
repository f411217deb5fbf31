"""Categories as an input: an item's vector is its own row plus that of its category. A new item has only the latter."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from freshrec.data.histories import append_events
from freshrec.errors import OptionError
from freshrec.learn.fit import FitConfig
from freshrec.models import find_model
from freshrec.nn.embedding_table import EmbeddingTable, embed, embedding_matrix, set_categories
from freshrec.nn.scoring import score_items
from freshrec.strategies.baselines import FineTune, Frozen
from freshrec.types import Batch, Events, Histories, Span, State, Strategy, VectorModel

WITH_CATEGORIES = (
    "mf",
    "pooled",
    "sasrec",
    "gru4rec",
    "gru4rec:embeddings=separate",
    "stamp",
    "caser",
    "mind",
    "comirec-dr",
    "comirec-sa",
    "mind-original",
    "comirec-dr-original",
    "comirec-sa-original",
    "limarec",
    "mimn",
)
LR = 0.05


def table_with_categories(n_rows: int, n_categories: int, *categories: int) -> EmbeddingTable:
    """A table with 2 dimensions. Items 1, 2, ... have these categories."""
    table = EmbeddingTable(2, std=1.0, seed=0, n_categories=n_categories)
    table.grow(n_rows)
    set_categories(table, torch.tensor([0, *categories]))
    return table


def test_a_vector_is_the_sum_of_the_items_own_row_and_that_of_its_category() -> None:
    table = table_with_categories(4, 2, 1, 2, 1, 0)
    assert table.common is not None
    own, common = table.weights.tolist(), table.common.weights.tolist()
    for item, category in enumerate((0, 1, 2, 1, 0)):
        expected = [a + b for a, b in zip(own[item], common[category])]
        for found in (
            embedding_matrix(table)[item],
            embed(table, torch.tensor([item]))[0],
            table.lookup(torch.tensor([item]))[0],
        ):
            assert found.tolist() == pytest.approx(expected)
    assert embedding_matrix(table)[0].tolist() == [0.0, 0.0]


def test_surplus_categories_share_rows() -> None:
    # The table has 3 category rows. The fourth category has the row of the first, the fifth that of the second.
    assert table_with_categories(6, 3, 1, 2, 3, 4, 5, 0).kinds_R.tolist() == [0, 1, 2, 3, 1, 2, 0]


def test_categories_of_new_items_can_be_set_later_and_may_be_new() -> None:
    table = table_with_categories(2, 5, 1, 2)
    table.grow(4)
    assert table.kinds_R.tolist() == [0, 1, 2, 0, 0]
    set_categories(table, torch.tensor([0, 1, 2, 5]))  # item 4 has no category yet
    assert table.kinds_R.tolist() == [0, 1, 2, 5, 0]


def test_a_step_changes_only_the_rows_of_its_items_and_of_their_categories() -> None:
    table = table_with_categories(5, 3, 1, 1, 2, 3, 0)
    before = embedding_matrix(table).clone()
    table.lookup(torch.tensor([1, 5])).sum().backward()
    for part in (table, table.common):
        assert part is not None
        part.step(LR)
    # Adam's first step is lr. Item 1 moves by its own row and its category's, item 2 by the category's only.
    moved = (before - embedding_matrix(table))[:, 0].tolist()
    assert moved == pytest.approx([0, 2 * LR, LR, 0, 0, LR], abs=1e-5)


@pytest.mark.parametrize("how", ["lookup", "lookup_all", "full_matrix"])
def test_all_lookups_give_the_same_gradients(how: str) -> None:
    table, ids_N = table_with_categories(5, 3, 1, 1, 2, 3, 0), torch.tensor([1, 2, 3, 5, 3])
    weight_N1 = torch.arange(1.0, 6.0)[:, None]
    rows = table.lookup_all()[ids_N] if how == "lookup_all" else table.lookup(ids_N)
    rows = table.full_matrix()[ids_N] if how == "full_matrix" else rows
    (weight_N1 * rows).sum().backward()
    own, common = _gradients(table), _gradients(table.common)
    assert own == {1: 1.0, 2: 2.0, 3: 8.0, 5: 4.0} and common == {1: 3.0, 2: 8.0}  # items 1 and 2 share a category


def _gradients(table: EmbeddingTable | None) -> dict[int, float]:
    assert table is not None
    ids_N, rows_ND = table.step_rows()
    assert rows_ND.grad is not None
    return {int(i): float(g) for i, g in zip(ids_N, rows_ND.grad[:, 0]) if g}


def test_an_item_that_comes_after_training_starts_at_its_category() -> None:
    table = table_with_categories(2, 2, 1, 2)
    table.lookup(torch.tensor([1, 2])).sum().backward()
    table.step(LR)
    table.grow(4)
    random = table.weights[4].tolist()
    set_categories(table, torch.tensor([0, 1, 2, 2, 0]))
    assert table.common is not None
    assert embedding_matrix(table)[3].tolist() == table.common.weights[2].tolist()
    assert embedding_matrix(table)[4].tolist() == random  # an item without a category starts at random


def test_a_table_with_categories_refuses_a_log_without_any() -> None:
    with pytest.raises(OptionError, match="The log has no item categories. Set the model's option categories=0"):
        set_categories(EmbeddingTable(2, 1.0, 0, n_categories=3), None)


# The purpose of categories.


def base_and_newcomers() -> tuple[Span, Span, Tensor]:
    """Even users take the even ones of 20 items, odd users the odd ones. Then two new users take new items, 21 to 28.

    The category is the colour: 1 = odd, 2 = even.
    """
    source = torch.Generator().manual_seed(0)
    users_E = torch.arange(1, 41).repeat_interleave(20)
    items_E = 2 * torch.randint(0, 10, (800,), generator=source) + 2 - users_E % 2
    new_E = torch.arange(21, 29)
    categories_I = torch.where(torch.arange(29) % 2 == 0, 2, 1).int()
    categories_I[0] = 0
    spans = []
    for index, events in enumerate((Events.trainable(users_E, items_E), Events.trainable(41 + new_E % 2, new_E))):
        events = replace(events, categories_E=categories_I[events.items_E])
        spans.append(Span(index, events, (40, 42)[index], (20, 28)[index]))
    return spans[0], spans[1], categories_I


def in_order(name: str, strategy: Strategy) -> float:
    """Share of pairs in the right order: a new item of the user's colour above a new item of the other colour."""
    base, after, categories_I = base_and_newcomers()
    spec = replace(find_model(name), d=16, negatives=16, batch=64)  # type: ignore[type-var]
    state = State(spec.build(0))
    for span in (base, after):
        recent = append_events(state.histories, span.events, span.n_users)
        state = strategy.update(replace(state, histories=recent), span)
    model: VectorModel = state.model
    items_R, offsets_U = state.histories.items_R, state.histories.offsets_U
    history_BT = torch.stack([items_R[offsets_U[u + 1] - 5 : offsets_U[u + 1]] for u in range(1, 41)]).long()
    batch = Batch(torch.arange(1, 41), history_BT, categories_I=categories_I)
    score_BN = score_items(model, batch, torch.arange(21, 29))
    own_BN = torch.arange(1, 41)[:, None] % 2 == torch.arange(21, 29) % 2
    ahead_BNN = score_BN[:, :, None] > score_BN[:, None]
    return float(ahead_BNN[own_BN[:, :, None] & ~own_BN[:, None]].float().mean())


@pytest.mark.parametrize("name", WITH_CATEGORIES)
def test_a_new_item_is_recommended_by_its_category_before_it_is_trained(name: str) -> None:
    strategy = Frozen(FitConfig(base_epochs=10))
    assert in_order(f"{name}:categories=4", strategy) > 0.9
    assert in_order(name, strategy) < 0.8  # 0.5 by chance; 0 if new items start at 0


@pytest.mark.parametrize("name", ["sasrec", "comirec-dr"])
def test_a_few_events_of_other_users_do_not_undo_the_effect_of_the_category(name: str) -> None:
    assert in_order(f"{name}:categories=4", FineTune(FitConfig(base_epochs=10, epochs=3))) > 0.9


def test_a_model_with_categories_refuses_a_history_without_any() -> None:
    base, _, _ = base_and_newcomers()
    spec = find_model("sasrec:categories=4:d=8")
    events = replace(base.events, categories_E=None)
    state = State(spec.build(0), histories=append_events(Histories.empty(), events, base.n_users))
    with pytest.raises(OptionError, match="The log has no item categories"):
        Frozen(FitConfig(base_epochs=1)).update(state, base)
