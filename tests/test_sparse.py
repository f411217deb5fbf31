"""Sparse rows: items once each, the best of each row, lookups; by hand and against dense arrays."""

import numpy as np
from scipy import sparse

from freshrec.models.sparse import Board, best, distinct, last_of, rows_of


def test_a_row_has_each_item_once_and_padding_is_none() -> None:
    items = np.array([[0, 3, 1, 3], [0, 0, 0, 0], [2, 2, 2, 2]])
    assert distinct(items).tolist() == [[1, 3], [0, 0], [2, 0]]
    assert rows_of(items, 4).toarray().tolist() == [[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert distinct(items[1:2]).shape == (1, 0) and distinct(items[:, :0]).shape == (3, 0)


def test_the_last_values_of_rows_of_different_lengths() -> None:
    values, counts = np.array([1, 2, 3, 4, 5, 6]), np.array([1, 4, 1])
    assert last_of(values, counts, 3).tolist() == [[0, 0, 1], [3, 4, 5], [0, 0, 6]]


def test_the_best_of_each_row_come_first_and_a_zero_is_none() -> None:
    dense = np.array([[0.0, 2, 5, 1], [0, 0, 0, 0], [0, 0, 7, 0]], np.float32)
    columns, values = best(sparse.csr_array(dense), 2)
    assert columns.tolist() == [[2, 1], [0, 0], [2, 0]] and values.tolist() == [[5, 2], [0, 0], [7, 0]]
    stored_zero = sparse.csr_array((np.zeros(1, np.float32), np.array([3]), np.array([0, 1])), shape=(1, 4))
    assert best(stored_zero, 2)[0].tolist() == [[0]]


def test_a_board_answers_for_what_was_put_on_it_and_is_clean_afterwards() -> None:
    board = Board(2, 5)
    asked = np.array([[1, 4, 0], [2, 2, 3]])
    put, values = np.array([[4, 4], [2, 0]]), np.array([[7, 8], [9, 1]])
    assert board.at(asked, put, values).tolist() == [[0, 8, 0], [9, 9, 0]]  # the last one wins; item 0 is none
    dense = np.array([[3.0, 1, 0, 0, 2], [0, 0, 5, 0, 0]], np.float32)
    assert board.of(asked, sparse.csr_array(dense)).tolist() == [[1, 2, 0], [5, 5, 0]]
    assert not board.values_BI.any()
