"""The catalog: ids get rows in order of appearance, and rows never change."""

import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from freshrec.data.catalog import Catalog
from freshrec.errors import LogError, StateError


def catalog() -> Catalog:
    """b -> 1 and a -> 2 from span 0; c -> 3 from span 4, in which a came again."""
    return Catalog.empty().extend(pl.Series(["b", "a", "b"]), 0).extend(pl.Series(["c", "a"]), 4)


def test_ids_get_rows_in_order_of_appearance_and_an_unknown_id_gets_row_0() -> None:
    assert len(catalog()) == 3
    assert catalog().rows(pl.Series(["c", "nobody", "b", "a"])).tolist() == [3, 0, 1, 2]
    assert catalog().rows(pl.Series(["c"])).dtype == torch.int64


def test_first_and_last_span_of_each_id_are_kept() -> None:
    assert catalog().frame.rows() == [("b", 0, 0), ("a", 0, 4), ("c", 4, 4)]


def test_extending_leaves_the_old_catalog_alone() -> None:
    old = catalog()
    old.extend(pl.Series(["d", "b"]), 5)
    assert old.frame.rows() == catalog().frame.rows()


def test_ids_are_found_again_by_row_and_padding_has_none() -> None:
    assert catalog().ids(torch.tensor([3, 0, 1])).to_list() == ["c", None, "b"]


def test_a_span_without_events_changes_nothing() -> None:
    assert catalog().extend(pl.Series([], dtype=pl.String), 5).frame.equals(catalog().frame)


def test_an_empty_catalog_knows_no_id() -> None:
    assert Catalog.empty().rows(pl.Series([7, 8])).tolist() == [0, 0]


def test_integer_ids_stay_integers_whatever_their_width() -> None:
    small = Catalog.empty().extend(pl.Series([7, 5], dtype=pl.Int16), 0)
    assert small.ids(torch.tensor([1, 2])).to_list() == [7, 5]
    assert small.rows(pl.Series([5], dtype=pl.Int64)).tolist() == [2]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (pl.Series("user_id", [1.0, 0.5]), 'user_id "0.5" is not exactly a whole number'),
        (pl.Series("user_id", [True]), "Column user_id has the type Boolean. Convert it to text or whole numbers"),
        (pl.Series("user_id", ["a", None]), "Rows without an id in column 'user_id': 1"),
    ],
)
def test_ids_of_another_kind_and_nulls_are_refused(ids: pl.Series, message: str) -> None:
    with pytest.raises(LogError, match=message):
        catalog().extend(ids, 5)


def test_a_saved_catalog_is_the_same_catalog(tmp_path: pytest.TempPathFactory) -> None:
    catalog().frame.write_parquet(f"{tmp_path}/items.parquet")
    loaded = Catalog.load(pl.read_parquet(f"{tmp_path}/items.parquet"))
    assert loaded.frame.equals(catalog().frame)


def test_a_damaged_catalog_is_refused() -> None:
    with pytest.raises(StateError, match="repeated"):
        Catalog.load(pl.concat([catalog().frame, catalog().frame]))
    with pytest.raises(StateError, match="columns"):
        Catalog.load(catalog().frame.drop("last_span"))


@given(st.lists(st.lists(st.integers(0, 9), max_size=8), max_size=5))
def test_rows_count_up_from_1_and_never_change(days: list[list[int]]) -> None:
    book = Catalog.empty()
    expected: dict[int, int] = {}
    for span, day in enumerate(days):
        for raw in day:
            expected.setdefault(raw, len(expected) + 1)  # the rule, one id at a time
        book = book.extend(pl.Series(day, dtype=pl.Int64), span)
        assert book.rows(pl.Series(list(expected), dtype=pl.Int64)).tolist() == list(expected.values())
