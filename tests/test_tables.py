"""Embedding tables: the optimiser is right, touches only the rows of a batch, and growth changes nothing else."""

import torch
from torch import Tensor, nn

from freshrec.models.tables import Table

LR = 0.05
BATCHES = [torch.tensor(ids) for ids in ([3, 1, 3, 2], [5], [2, 5, 5, 5, 1], [4, 4], [3, 1, 2, 5])]


def table_of(n_rows: int, n_dims: int = 4, seed: int = 0) -> Table:
    table = Table(n_dims, std=0.1, seed=seed)
    table.grow(n_rows)
    return table


def loss_of(vectors_ND: Tensor) -> Tensor:
    """Any loss whose gradient differs by row and place in the batch."""
    weight_N1 = torch.arange(1, len(vectors_ND) + 1)[:, None]
    return (weight_N1 * (vectors_ND - 0.3) ** 2).sum()


def step(table: Table, ids_N: Tensor) -> None:
    loss_of(table.pull(ids_N)).backward()
    table.push(LR)


def test_a_table_learns_as_the_sparse_adam_of_torch_does() -> None:
    table = table_of(5)
    embedding = nn.Embedding(6, 4, sparse=True)
    embedding.weight.data.copy_(table.weights)
    adam = torch.optim.SparseAdam(embedding.parameters(), lr=LR)
    for ids_N in BATCHES * 10:
        step(table, ids_N)
        adam.zero_grad()
        loss_of(embedding(ids_N)).backward()
        adam.step()
    assert (table.weights[1:] - table_of(5).weights[1:]).abs().min() > 0.01  # all rows have moved
    torch.testing.assert_close(table.weights, embedding.weight.data, rtol=1e-4, atol=1e-6)


def test_only_the_rows_of_a_batch_change() -> None:
    table = table_of(6)
    step(table, torch.tensor([1, 2, 3, 4, 5, 6]))  # so that all rows have moments that could decay
    before = table.packed.clone()
    step(table, torch.tensor([2, 5, 2]))
    changed = (table.packed != before).any(1).nonzero()[:, 0]
    assert changed.tolist() == [2, 5]


def test_the_padding_row_stays_zero_where_its_loss_does_not_depend_on_it() -> None:
    # Models multiply padding away, so its gradient is 0, and Adam's step for a gradient of 0 is 0 / (0 + eps) = 0.
    table = table_of(3)
    for _ in range(3):
        vectors_ND = table.pull(torch.tensor([0, 1, 0, 2]))
        loss_of(vectors_ND * torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None]).backward()
        table.push(LR)
    assert table.packed[0].tolist() == [0.0] * 12
    assert (table.packed[1:3] != table_of(3).packed[1:3]).any(1).all()


def test_growth_leaves_the_old_rows_and_their_moments_alone() -> None:
    table = table_of(3)
    step(table, torch.tensor([1, 2, 3]))
    before, n_steps = table.packed.clone(), int(table.steps)
    table.grow(7)
    assert torch.equal(table.packed[:4], before) and int(table.steps) == n_steps
    assert len(table.weights) == 8 and (table.weights[4:] != 0).all()
    assert (table.packed[4:, 4:] == 0).all()  # new rows have no moments
    table.grow(5)  # a table never shrinks
    assert len(table.weights) == 8


def test_new_rows_depend_on_the_seed_and_the_size_before_alone() -> None:
    quiet, busy, other = table_of(3), table_of(3), table_of(3, seed=1)
    step(busy, torch.tensor([1, 2]))
    for table in (quiet, busy, other):
        table.grow(5)
    assert torch.equal(quiet.weights[4:], busy.weights[4:])
    assert not torch.equal(quiet.weights[4:], other.weights[4:])


def test_a_push_without_a_loss_changes_nothing() -> None:
    table = table_of(3)
    table.pull(torch.tensor([1, 2]))
    table.push(LR)
    assert torch.equal(table.packed, table_of(3).packed) and int(table.steps) == 0
