"""Lists with items of several categories. An item loses score for each item of its category above it in the list.

This is the controllable aggregation of ComiRec (Cen et al., KDD 2020), in the form of the authors' code.
"""

import numpy as np
import polars as pl
import torch
from torch import Tensor

from freshrec.errors import OptionError

N_EXTRA_CANDIDATES = 300  # A diverse list of k items is chosen among the k + 300 items with the highest scores.


def diversify(
    items_BC: Tensor, scores_BC: Tensor, category_BC: Tensor, k: int, diversity: float
) -> tuple[Tensor, Tensor]:
    """Choose k items, each as argmax_i score(i) - diversity * (number of chosen items of i's category).

    Candidates are sorted by score, best first; the earlier one wins a tie. Category 0 means no category and is shared
    with no other item. Items with score -inf only fill the end of a list. Returns items and scores, shape (B, k) each.

    The items of a category are chosen in their order. So each has lost diversity * (candidates of its category before
    it) when its turn comes, and one sort of these values gives all choices.
    """
    n_before_BC = _n_same_before(category_BC)
    costs_N = np.zeros(int(n_before_BC.max()) + 1 if n_before_BC.numel() else 1, np.float32)
    costs_N[1:] = np.add.accumulate(np.full(len(costs_N) - 1, diversity, np.float32))
    order_BC = (scores_BC - torch.from_numpy(costs_N)[n_before_BC]).argsort(dim=1, descending=True, stable=True)
    return items_BC.gather(1, order_BC[:, :k]), scores_BC.gather(1, order_BC[:, :k])


def _n_same_before(category_BC: Tensor) -> Tensor:
    """Return the number of earlier candidates of the same category, shape (B, C); 0 without a category."""
    sorted_BC, order_BC = category_BC.sort(dim=1, stable=True)
    at_BC = torch.arange(category_BC.shape[1]).expand_as(category_BC)
    starts_BC = torch.ones_like(sorted_BC, dtype=torch.bool)
    starts_BC[:, 1:] = sorted_BC[:, 1:] != sorted_BC[:, :-1]
    n_before_BC = at_BC - torch.where(starts_BC, at_BC, 0).cummax(1).values if at_BC.numel() else at_BC
    return torch.empty_like(at_BC).scatter_(1, order_BC, n_before_BC) * (category_BC > 0)


def item_categories(categories: pl.DataFrame, n_items: int) -> Tensor:
    """Category number of each item row, shape (n_items + 1,); 0 = no category.

    Raises OptionError if no item has a category.
    """
    if categories.is_empty():
        raise OptionError("The option diversity needs categories, but the log has no category column. Use diversity 0.")
    categories_I = torch.zeros(n_items + 1, dtype=torch.int64)
    numbers = categories["category"].rank("dense").cast(pl.Int64).to_numpy(writable=True)
    categories_I[torch.from_numpy(categories["item"].to_numpy(writable=True))] = torch.from_numpy(numbers)
    return categories_I
