"""Categories as an input: an item is its own row and one that its category shares, and a new item is its category."""

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

TOLD = (
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


def table_with_categories(n_rows: int, n_kinds: int, *kinds: int) -> EmbeddingTable:
    """A table of 2 dimensions whose items have these categories, from item 1 on."""
    table = EmbeddingTable(2, std=1.0, seed=0, n_categories=n_kinds)
    table.grow(n_rows)
    set_categories(table, torch.tensor([0, *kinds]))
    return table


def test_a_vector_is_an_items_own_row_and_that_of_its_category() -> None:
    table = table_with_categories(4, 2, 1, 2, 1, 0)
    assert table.common is not None
    own, common = table.weights.tolist(), table.common.weights.tolist()
    for item, kind in enumerate((0, 1, 2, 1, 0)):
        expected = [a + b for a, b in zip(own[item], common[kind])]
        for found in (
            embedding_matrix(table)[item],
            embed(table, torch.tensor([item]))[0],
            table.lookup(torch.tensor([item]))[0],
        ):
            assert found.tolist() == pytest.approx(expected)
    assert embedding_matrix(table)[0].tolist() == [0.0, 0.0]


def test_more_categories_than_there_is_room_for_share_rows() -> None:
    # Room for 3: the fourth takes the first one's row, the fifth the second one's.
    assert table_with_categories(6, 3, 1, 2, 3, 4, 5, 0).kinds_R.tolist() == [0, 1, 2, 3, 1, 2, 0]


def test_items_may_be_told_of_later_and_a_category_may_be_new() -> None:
    table = table_with_categories(2, 5, 1, 2)
    table.grow(4)
    assert table.kinds_R.tolist() == [0, 1, 2, 0, 0]
    set_categories(table, torch.tensor([0, 1, 2, 5]))  # of item 4 nothing is known
    assert table.kinds_R.tolist() == [0, 1, 2, 5, 0]


def test_a_step_moves_the_rows_of_its_items_and_of_their_categories_alone() -> None:
    table = table_with_categories(5, 3, 1, 1, 2, 3, 0)
    before = embedding_matrix(table).clone()
    table.lookup(torch.tensor([1, 5])).sum().backward()
    for part in (table, table.common):
        assert part is not None
        part.step(LR)
    # Adam's first step is lr: item 1 moves by its own row and its category's, item 2 by the category's; 5 has none.
    moved = (before - embedding_matrix(table))[:, 0].tolist()
    assert moved == pytest.approx([0, 2 * LR, LR, 0, 0, LR], abs=1e-5)


@pytest.mark.parametrize("how", ["pull", "pull_all", "whole"])
def test_all_ways_to_a_row_give_the_same_gradients(how: str) -> None:
    table, ids_N = table_with_categories(5, 3, 1, 1, 2, 3, 0), torch.tensor([1, 2, 3, 5, 3])
    weight_N1 = torch.arange(1.0, 6.0)[:, None]
    rows = table.lookup_all()[ids_N] if how == "pull_all" else table.lookup(ids_N)
    rows = table.full_matrix()[ids_N] if how == "whole" else rows
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
    assert embedding_matrix(table)[4].tolist() == random  # of one without a category nothing better is known


def test_a_model_that_is_told_of_categories_refuses_a_log_without_any() -> None:
    with pytest.raises(OptionError, match="The log has no item categories. Set the model's option categories=0"):
        set_categories(EmbeddingTable(2, 1.0, 0, n_categories=3), None)


# what they are for


def base_and_newcomers() -> tuple[Span, Span, Tensor]:
    """Even users take the even ones of 20 items, odd users the odd ones; then, by two strangers, items 21 to 28 come.

    The category is the colour: 1 odd, 2 even.
    """
    source = torch.Generator().manual_seed(0)
    users_E = torch.arange(1, 41).repeat_interleave(20)
    items_E = 2 * torch.randint(0, 10, (800,), generator=source) + 2 - users_E % 2
    new_E = torch.arange(21, 29)
    kinds_I = torch.where(torch.arange(29) % 2 == 0, 2, 1).int()
    kinds_I[0] = 0
    spans = []
    for index, events in enumerate((Events.trainable(users_E, items_E), Events.trainable(41 + new_E % 2, new_E))):
        events = replace(events, categories_E=kinds_I[events.items_E])
        spans.append(Span(index, events, (40, 42)[index], (20, 28)[index]))
    return spans[0], spans[1], kinds_I


def in_order(name: str, strategy: Strategy) -> float:
    """Of all pairs of new items, one of a base user's colour and one of the other, which share is in order."""
    base, after, kinds_I = base_and_newcomers()
    spec = replace(find_model(name), d=16, negatives=16, batch=64)  # type: ignore[type-var]
    state = State(spec.build(0))
    for span in (base, after):
        recent = append_events(state.histories, span.events, span.n_users)
        state = strategy.update(replace(state, histories=recent), span)
    model: VectorModel = state.model
    items_R, offsets_U = state.histories.items_R, state.histories.offsets_U
    history_BT = torch.stack([items_R[offsets_U[u + 1] - 5 : offsets_U[u + 1]] for u in range(1, 41)]).long()
    score_BN = score_items(model, Batch(torch.arange(1, 41), history_BT, categories_I=kinds_I), torch.arange(21, 29))
    own_BN = torch.arange(1, 41)[:, None] % 2 == torch.arange(21, 29) % 2
    ahead_BNN = score_BN[:, :, None] > score_BN[:, None]
    return float(ahead_BNN[own_BN[:, :, None] & ~own_BN[:, None]].float().mean())


@pytest.mark.parametrize("name", TOLD)
def test_a_new_item_is_recommended_by_its_category_before_anything_was_learnt_of_it(name: str) -> None:
    strategy = Frozen(FitConfig(base_epochs=10))
    assert in_order(f"{name}:categories=4", strategy) > 0.9
    assert in_order(name, strategy) < 0.8  # by chance half of them are; where late items start at 0, none is


@pytest.mark.parametrize("name", ["sasrec", "comirec-dr"])
def test_few_events_of_others_do_not_undo_what_the_category_says(name: str) -> None:
    assert in_order(f"{name}:categories=4", FineTune(FitConfig(base_epochs=10, epochs=3))) > 0.9


def test_the_history_of_a_log_without_categories_is_refused_where_the_model_wants_them() -> None:
    base, _, _ = base_and_newcomers()
    spec = find_model("sasrec:categories=4:d=8")
    events = replace(base.events, categories_E=None)
    state = State(spec.build(0), histories=append_events(Histories.empty(), events, base.n_users))
    with pytest.raises(OptionError, match="The log has no item categories"):
        Frozen(FitConfig(base_epochs=1)).update(state, base)
