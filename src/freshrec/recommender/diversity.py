"""Lists with items of several categories. An item loses score for each item of its category above it in the list.

This is the controllable aggregation of ComiRec (Cen et al., KDD 2020), in the form of the authors' code.
"""

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
    """
    remaining_BC, costs_BC = scores_BC.clone(), torch.zeros_like(scores_BC)
    items, scores = [items_BC[:, :0]], [scores_BC[:, :0]]
    for _ in range(min(k, items_BC.shape[1])):
        at_B1 = (remaining_BC - costs_BC).argmax(1, keepdim=True)
        items.append(items_BC.gather(1, at_B1))
        scores.append(remaining_BC.gather(1, at_B1))
        remaining_BC.scatter_(1, at_B1, -torch.inf)
        category_B1 = category_BC.gather(1, at_B1)
        costs_BC += diversity * ((category_BC == category_B1) & (category_B1 > 0))
    return torch.cat(items, 1), torch.cat(scores, 1)


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
