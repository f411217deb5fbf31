"""Embedding tables: the optimiser equals torch's Adam, a step changes only its rows, and growth changes no old row."""

import pytest
import torch
from torch import Tensor, nn

from freshrec.nn.embedding_table import BLOCK_ROWS, EmbeddingTable

LR = 0.05
BATCHES = [torch.tensor(ids) for ids in ([3, 1, 3, 2], [5], [2, 5, 5, 5, 1], [4, 4], [3, 1, 2, 5])]


def table_of(n_rows: int, n_dims: int = 4, seed: int = 0) -> EmbeddingTable:
    table = EmbeddingTable(n_dims, std=0.1, seed=seed)
    table.grow(n_rows)
    return table


def loss_of(vectors_ND: Tensor) -> Tensor:
    """A loss whose gradient differs by row and by position in the batch."""
    weight_N1 = torch.arange(1, len(vectors_ND) + 1)[:, None]
    return (weight_N1 * (vectors_ND - 0.3) ** 2).sum()


def step(table: EmbeddingTable, ids_N: Tensor) -> None:
    loss_of(table.lookup(ids_N)).backward()
    table.step(LR)


def test_each_row_is_trained_as_by_an_adam_of_its_own_in_torch() -> None:
    table = table_of(5)
    rows = [nn.Parameter(row.clone()) for row in table.weights]
    adams = [torch.optim.Adam([row], lr=LR) for row in rows]
    for ids_N in BATCHES * 10:
        step(table, ids_N)
        loss_of(torch.stack([rows[i] for i in ids_N])).backward()
        for i in ids_N.unique():
            adams[i].step()
            adams[i].zero_grad()
    assert (table.weights[1:] - table_of(5).weights[1:]).abs().min() > 0.01  # all rows have moved
    torch.testing.assert_close(table.weights, torch.stack(rows).detach(), rtol=1e-4, atol=1e-6)


def test_only_the_rows_of_a_batch_change() -> None:
    table = table_of(6)
    step(table, torch.tensor([1, 2, 3, 4, 5, 6]))  # so that all rows have moments that could decay
    before = table.packed.clone()
    step(table, torch.tensor([2, 5, 2]))
    changed = (table.packed != before).any(1).nonzero()[:, 0]
    assert changed.tolist() == [2, 5]


def test_the_padding_row_stays_zero_if_the_loss_does_not_depend_on_it() -> None:
    # Models multiply padding away, so its gradient is 0, and Adam's step for a gradient of 0 is 0 / (0 + eps) = 0.
    table = table_of(3)
    for _ in range(3):
        vectors_ND = table.lookup(torch.tensor([0, 1, 0, 2]))
        loss_of(vectors_ND * torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None]).backward()
        table.step(LR)
    assert table.packed[0].tolist() == [0.0] * 12
    assert (table.packed[1:3] != table_of(3).packed[1:3]).any(1).all()


def test_growth_does_not_change_the_old_rows_and_their_moments() -> None:
    table = table_of(3)
    step(table, torch.tensor([1, 2, 3]))
    before = table.packed.clone()
    table.grow(7)
    assert torch.equal(table.packed[:4], before) and table.steps_R.tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
    assert len(table.weights) == 8 and (table.weights[4:] != 0).all()
    assert (table.packed[4:, 4:] == 0).all()  # new rows have no moments
    table.grow(5)  # a table never shrinks
    assert len(table.weights) == 8


def test_the_initial_values_of_a_row_do_not_depend_on_when_the_table_grew() -> None:
    at_once, bit_by_bit, other = table_of(2 * BLOCK_ROWS + 7), table_of(3), table_of(2 * BLOCK_ROWS + 7, seed=1)
    for n_rows in (5, BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1, 2 * BLOCK_ROWS + 7):
        bit_by_bit.grow(n_rows)
    assert torch.equal(bit_by_bit.weights, at_once.weights)
    assert (at_once.weights[1:] != other.weights[1:]).all()


def test_the_first_step_of_a_late_row_is_as_small_as_that_of_an_early_row() -> None:
    # Adam's first step is lr x the sign of the gradient. With one count for all rows, row 2's step here would be
    # 0.1 / sqrt(0.001) = 3.2 times as long: (1 - beta1) g / sqrt((1 - beta2) g^2), with no bias correction any more.
    table = table_of(2)
    step(table, torch.tensor([1]))
    table.steps_R[1] = 10_000
    before = table.weights.clone()
    step(table, torch.tensor([2]))
    assert (table.weights[2] - before[2]).abs().tolist() == pytest.approx([LR] * 4, rel=1e-4)


def test_a_step_on_all_rows_has_one_count_and_the_first_step_of_a_new_row_is_long() -> None:
    table = table_of(2)
    table.steps_R[1:] = 10_000
    table.grow(3)
    before = table.weights.clone()
    loss_of(table.lookup_all()).backward()
    table.step(LR)
    assert table.steps_R.tolist() == [10_001] * 4
    assert (table.weights[3] - before[3]).abs().tolist() == pytest.approx([LR * 0.1 / 0.001**0.5] * 4, rel=1e-4)


def test_a_step_without_gradients_changes_nothing() -> None:
    table = table_of(3)
    table.lookup(torch.tensor([1, 2]))
    table.step(LR)
    assert torch.equal(table.packed, table_of(3).packed) and not table.steps_R.any()


def test_two_lookups_in_one_step_equal_one_lookup_of_both() -> None:
    first, second = torch.tensor([3, 1, 3]), torch.tensor([4, 3])
    for ids_N, moved in ((second, [1, 3, 4]), (torch.tensor([2]), [1, 2, 3])):
        once, twice = table_of(5), table_of(5)
        loss_of(once.lookup(torch.cat([first, ids_N]))).backward()
        once.step(LR)
        both = [twice.lookup(first)]
        twice.continue_step()
        both.append(twice.lookup(ids_N))
        loss_of(torch.cat(both)).backward()
        twice.step(LR)
        torch.testing.assert_close(twice.packed, once.packed)
        assert twice.steps_R.nonzero()[:, 0].tolist() == moved  # one step each
    step(twice, torch.tensor([5]))  # the next step counts separately
    assert twice.steps_R.tolist() == [0, 1, 1, 1, 0, 1]


def test_a_loss_on_the_whole_table_changes_only_the_rows_of_the_step() -> None:
    table = table_of(5)
    table.lookup(torch.tensor([2, 4, 2]))
    assert torch.equal(table.full_matrix().detach(), table.weights)
    loss_of(table.full_matrix()).backward()
    ids_N, rows_ND = table.step_rows()
    torch.testing.assert_close(rows_ND.grad, 2 * (ids_N + 1)[:, None] * (table.weights[ids_N] - 0.3))
    before = table.weights.clone()
    table.step(LR)
    assert (table.weights != before).any(1).nonzero()[:, 0].tolist() == [2, 4]


@pytest.mark.parametrize("n_lookups", [1, 2])
def test_a_step_on_all_rows_equals_a_step_on_a_list_of_all_rows(n_lookups: int) -> None:
    n_rows = BLOCK_ROWS + 3  # more rows than one block
    whole, listed = table_of(n_rows), table_of(n_rows)
    ids_N = torch.arange(n_rows + 1)
    for _ in range(3):
        for n in range(n_lookups):
            for table in (whole, listed):
                if n:
                    table.continue_step()
            loss = loss_of(whole.lookup_all() if n == 0 else whole.lookup(ids_N.flip(0)))
            loss.backward()
            loss_of(listed.lookup(ids_N if n == 0 else ids_N.flip(0))).backward()
        assert whole.step_rows()[1] is whole.full_matrix()  # no copy: gradients reach every row
        whole.step(LR)
        listed.step(LR)
    torch.testing.assert_close(whole.packed, listed.packed)
    assert whole.steps_R.tolist() == listed.steps_R.tolist()
