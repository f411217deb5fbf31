"""Diverse lists, by hand and against a plain loop over items."""

import json
from pathlib import Path

import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from freshrec.cli.app import main
from freshrec.errors import OptionError
from freshrec.nn.layers import max_inner_product
from freshrec.recommender.diversity import diversify, item_categories
from freshrec.recommender.recommender import Recommender

A1, A2, B1 = 11, 12, 21  # items of categories 1, 1 and 2
CANDIDATES = torch.tensor([[A1, A2, B1]])
SCORES, KINDS = torch.tensor([[5.0, 4.5, 4.0]]), torch.tensor([[1, 1, 2]])


def listed(diversity: float, k: int = 3, kinds_BC: Tensor = KINDS) -> list[int]:
    items_BK, scores_BK = diversify(CANDIDATES, SCORES, kinds_BC, k, diversity)
    of_item = dict(zip(CANDIDATES[0].tolist(), SCORES[0].tolist()))
    assert scores_BK[0].tolist() == [
        of_item[item] for item in items_BK[0].tolist()
    ]  # the model's scores, without the cost
    return items_BK[0].tolist()


def test_an_item_lowers_the_next_one_of_its_category() -> None:
    assert listed(1.0) == [A1, B1, A2]  # after A1: A2 has 4.5 - 1 = 3.5, B1 has 4
    assert listed(0.0) == [A1, A2, B1]
    assert listed(1.0, k=2) == [A1, B1]
    assert listed(0.4) == [A1, A2, B1]  # 4.5 - 0.4 = 4.1 > 4


def test_the_cost_grows_with_each_item_of_the_category() -> None:
    # Category 1 has scores 5, 4.9, 4.8, category 2 has 3.5. With cost 1: 5, then 3.9 > 3.5, then 3.5 > 2.8.
    items_BC, scores_BC = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5.0, 4.9, 4.8, 3.5]])
    items_BK, scores_BK = diversify(items_BC, scores_BC, torch.tensor([[1, 1, 1, 2]]), 4, 1.0)
    assert items_BK.tolist() == [[1, 2, 4, 3]]
    torch.testing.assert_close(scores_BK, torch.tensor([[5.0, 4.9, 3.5, 4.8]]))


def test_items_without_a_category_share_none() -> None:
    assert listed(9.0, kinds_BC=torch.tensor([[0, 0, 2]])) == [A1, A2, B1]


def test_excluded_items_come_last_and_no_item_comes_twice() -> None:
    scores_BC = torch.tensor([[5.0, 4.0, -torch.inf], [-torch.inf] * 3])
    items_BK, scores_BK = diversify(CANDIDATES.expand(2, -1), scores_BC, KINDS.expand(2, -1), 9, 100.0)
    assert items_BK[0, :2].tolist() == [A1, A2]
    assert scores_BK.tolist() == [[5, 4, -torch.inf], [-torch.inf] * 3]


def test_no_candidates_make_no_list() -> None:
    items_BK, scores_BK = diversify(CANDIDATES[:, :0], SCORES[:, :0], KINDS[:, :0], 3, 1.0)
    assert items_BK.shape == scores_BK.shape == (1, 0)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), min_size=1, max_size=12),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.5, 2.0, 100.0]),
)
def test_lists_of_a_batch_are_those_of_a_plain_loop(rows: list[tuple[int, int]], k: int, weight: float) -> None:
    rows = sorted(rows, reverse=True)
    scores_C, kinds_C = torch.tensor([float(score) for score, _ in rows]), torch.tensor([kind for _, kind in rows])
    scores_BC, kinds_BC = torch.stack([scores_C, scores_C]), torch.stack([kinds_C, torch.ones_like(kinds_C)])
    items_BC = torch.arange(1, len(rows) + 1).expand(2, -1)
    found_BK, _ = diversify(items_BC, scores_BC, kinds_BC, k, weight)
    for found, kinds in zip(found_BK.tolist(), kinds_BC.tolist()):
        chosen: list[int] = []
        for _ in range(min(k, len(rows))):
            worth = {
                i: score - weight * sum(kinds[j] == kinds[i] > 0 for j in chosen)
                for i, (score, _) in enumerate(rows)
                if i not in chosen
            }
            chosen.append(max(worth, key=lambda i: (worth[i], -i)))
        assert found == [i + 1 for i in chosen]


def test_the_best_items_of_each_interest_include_the_best_items_of_all() -> None:
    # ComiRec retrieves n items per interest. Together they include the n best items by max_k h_k e_i.
    source = torch.Generator().manual_seed(0)
    vectors_BKD, items_ND = torch.randn(5, 4, 8, generator=source), torch.randn(60, 8, generator=source)
    best_BN = max_inner_product(vectors_BKD, items_ND).topk(10).indices
    each_BKN = (vectors_BKD @ items_ND.t()).topk(10).indices
    for best_N, each_KN in zip(best_BN, each_BKN):
        assert set(best_N.tolist()) <= set(each_KN.flatten().tolist())


def test_categories_are_numbered_by_item_row() -> None:
    categories = pl.DataFrame({"item": [3, 1, 4], "category": ["b", "a", "b"]})
    assert item_categories(categories, 5).tolist() == [0, 1, 0, 2, 2, 0]
    with pytest.raises(OptionError, match="diversity needs categories"):
        item_categories(categories.head(0), 5)


def test_diversity_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Counts: a 3, b 2, c 1. Items a and b share a category.
    columns = {"user_id": ["u", "u", "u", "v", "v", "w"], "item_id": list("aabbac"), "category": list("xxxxxy")}
    log = pl.DataFrame(columns).with_columns(timestamp=pl.int_range(1_700_000_000, 1_700_000_006))
    Recommender("popularity").fit(log).save(tmp_path / "store")
    ask = ("recommend", "u", "--store", str(tmp_path / "store"))
    for options, expected in (((), "abc"), (("--diversity", "0.5"), "abc"), (("--diversity", "1.5"), "acb")):
        assert main((*ask, "--no-exclude-seen", "--json", *options)) == 0
        assert "".join(row["item_id"] for row in json.loads(capsys.readouterr().out)) == expected
    assert main((*ask, "--diversity", "-1")) == OptionError.exit_code
