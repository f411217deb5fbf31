"""Lists whose items are of several categories: each place goes to the best item, less what its category costs by then.

ComiRec's controllable aggregation (Cen and others, KDD 2020), in the form of its authors' code.
"""

import polars as pl
import torch
from torch import Tensor

from freshrec.errors import OptionError

N_EXTRA_CANDIDATES = 300  # the best items by score, among which a list is looked for, beside as many as it is long


def diversify(
    items_BC: Tensor, scores_BC: Tensor, category_BC: Tensor, k: int, diversity: float
) -> tuple[Tensor, Tensor]:
    """(B, k) items and their scores: one by one argmax_i f(i) - diversity * (chosen items of i's category).

    Candidates come the best first; of equal ones the earlier is taken. A category of 0 is none, shared with no other
    item. A score of -inf stays out: it fills what is left at the end of a list.
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
    """(n_items + 1,) the number of each item's category, from item 0; 0 where it has none.

    OptionError where no item has one.
    """
    if categories.is_empty():
        raise OptionError("diversity needs categories, and the log has no such column; leave it at 0.")
    categories_I = torch.zeros(n_items + 1, dtype=torch.int64)
    numbers = categories["category"].rank("dense").cast(pl.Int64).to_numpy(writable=True)
    categories_I[torch.from_numpy(categories["item"].to_numpy(writable=True))] = torch.from_numpy(numbers)
    return categories_I
