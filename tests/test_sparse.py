"""Sparse matrices: distinct items, best entries per row, and lookups, by hand and against dense arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from freshrec.nn.sparse import (
    CandidateCells,
    ItemOccurrences,
    build_csr,
    distinct_items,
    item_indicator,
    pack_keys,
    row_sums,
    top_k_entries,
    unpack_keys,
)

near = pytest.approx


def test_a_row_has_each_item_once_and_no_padding() -> None:
    items = np.array([[0, 3, 1, 3], [0, 0, 0, 0], [2, 2, 2, 2]])
    assert distinct_items(items).tolist() == [[1, 3], [0, 0], [2, 0]]
    assert item_indicator(items, 4).toarray().tolist() == [[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert distinct_items(items[1:2]).shape == (1, 0) and distinct_items(items[:, :0]).shape == (3, 0)


def test_the_best_entries_of_each_row_come_first_and_zeros_are_left_out() -> None:
    dense = np.array([[0.0, 2, 5, 1], [0, 0, 0, 0], [0, 0, 7, 0]], np.float32)
    columns, values = top_k_entries(sparse.csr_array(dense), 2)
    assert columns.tolist() == [[2, 1], [0, 0], [2, 0]] and values.tolist() == [[5, 2], [0, 0], [7, 0]]
    stored_zero = sparse.csr_array((np.zeros(1, np.float32), np.array([3]), np.array([0, 1])), shape=(1, 4))
    assert top_k_entries(stored_zero, 2)[0].tolist() == [[0]]


def test_keys_sort_by_value_and_then_by_falling_position_and_can_be_unpacked() -> None:
    # 1.0 has the bits 0x3f800000: (0x3f800000 << 32) - 3
    assert pack_keys(np.array([1.0]), np.array([3])).tolist() == [0x3F80000000000000 - 3]
    value, position = np.array([2.0, 0.0, 2.0, 2.5, 1e-45]), np.array([0, 7, 2**32 - 1, 9, 1])
    keys = pack_keys(value, position)
    assert keys.argsort()[::-1].tolist() == [3, 0, 2, 4, 1] and keys[1] < 0 < keys[4]
    positions, values = unpack_keys(keys)
    assert positions.tolist() == position.tolist() and values.tolist() == value.astype(np.float32).tolist()
    assert [part.tolist() for part in unpack_keys(np.zeros(1, np.int64))] == [[0], [0.0]]


def test_row_sums_include_empty_rows() -> None:
    dense = np.array([[0.0, 2, 5, 1], [0, 0, 0, 0], [0, 0, 7, 0], [0, 0, 0, 0]], np.float32)
    assert row_sums(sparse.csr_array(dense)).tolist() == [8, 0, 7, 0]
    assert row_sums(sparse.csr_array((2, 3), dtype=np.float32)).tolist() == [0, 0]


def test_cells_are_the_numbers_of_candidates_with_their_share_of_the_row() -> None:
    cells = CandidateCells(np.array([[1, 4, 0], [2, 3, 4]]), 5)  # numbered 1 2 - and 4 5 6
    assert cells.cells_of(np.array([[4, 2, 0], [0, 1, 4]])).tolist() == [[2, 0, 0], [0, 0, 6]]
    # item 0, and item 1 in the second row, are no candidates
    dense = np.array([[9.0, 1, 0, 0, 2], [0, 4, 5, 0, 1]], np.float32)
    at, shares = cells.matching_cells(sparse.csr_array(dense))
    assert at.tolist() == [1, 2, 4, 6] and shares.tolist() == near([1 / 12, 2 / 12, 5 / 10, 1 / 10])
    alone = CandidateCells(np.array([[2, 3, 4]]), 5).matching_cells(sparse.csr_array(dense[1:]))
    assert alone[0].tolist() == [1, 3] and alone[1].tolist() == near([5 / 10, 1 / 10])
    assert [
        len(part) for part in CandidateCells(np.zeros((2, 0), np.int64), 5).matching_cells(sparse.csr_array(dense))
    ] == [0, 0]


def test_item_occurrences_are_the_items_of_each_row_with_their_steps() -> None:
    runs = ItemOccurrences.from_items(np.array([[0, 3, 1, 3], [0, 0, 0, 0], [2, 2, 2, 2]]))
    assert runs.offsets_B.tolist() == [0, 2, 2, 3] and runs.row_W.tolist() == [0, 0, 2]
    assert runs.items_W.tolist() == [1, 3, 2] and runs.steps_E.tolist() == [2, 1, 3, 0, 1, 2, 3]
    assert runs.counts_W.tolist() == [1, 2, 4] and runs.last_step_W.tolist() == [2, 3, 3]
    nothing = ItemOccurrences.from_items(np.zeros((2, 0), np.int64))
    assert nothing.offsets_B.tolist() == [0, 0, 0] and len(nothing.counts_W) == len(nothing.last_step_W) == 0


def test_indices_are_as_wide_as_needed() -> None:
    one = np.ones(1, np.float32), np.ones(1, np.int64), np.array([0, 1])
    assert build_csr(*one, 5).indices.dtype == build_csr(*one, 5).indptr.dtype == np.int32
    assert build_csr(*one, 2**40).indices.dtype == np.int64


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=6, max_size=6), min_size=2, max_size=5))
def test_the_best_entries_of_a_row_do_not_depend_on_other_rows(scores: list[list[float]]) -> None:
    scores_BN = sparse.csr_array(np.array(scores, np.float32))
    columns_BK, values_BK = top_k_entries(scores_BN, 4)
    for row, line in enumerate(scores):
        order = sorted((n for n in range(6) if line[n] > 0), key=lambda n: (-line[n], n))[:4]  # ties: the first
        assert columns_BK[row][: len(order)].tolist() == order and not columns_BK[row][len(order) :].any()
        assert values_BK[row][: len(order)].tolist() == [line[n] for n in order]
