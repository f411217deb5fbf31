"""The base block as if it were a stream, for what has to be learnt before the first span."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from freshrec.data.batches import rows_where
from freshrec.learn.fit import nth_part
from freshrec.types import DONE, SECRET, Events, Histories, Span


def rehearsal(histories: Histories, n: int) -> Iterator[tuple[Histories, Span]]:
    """The first third of `n` parts of the base block as a base, then a span for each of the others.

    Each comes with the histories as they are when it is due. The parts count as spans -n .. -1, so that no random
    number is drawn twice; a span's events are in the histories only.
    """
    part_R, part_E = _parts(histories, n)
    n_base, nothing = max(1, n // 3), Events.of(torch.zeros(0), torch.zeros(0))
    for last in range(n_base - 1, n):
        since = 0 if last < n_base else last  # what came before counts as trained on
        is_done_R = (part_R < since) & (histories.due_R != SECRET)
        recent = replace(histories, due_R=torch.where(is_done_R, DONE, histories.due_R))
        known = histories.items_R[part_R <= last].long()
        if histories.shown is not None:
            known = torch.cat([known, histories.shown.items_E[part_E <= last]])
            recent = replace(recent, shown=histories.shown[(part_E >= since) & (part_E <= last)])
        n_items = int(known.max()) if len(known) else 0
        yield rows_where(recent, part_R <= last), Span(last - n, nothing, histories.n_users, n_items)


def _parts(histories: Histories, n: int) -> tuple[Tensor, Tensor]:
    """(R,) and (E,) in which of n equal parts a row is, and what was shown, where the log says so."""
    if histories.shown is None:
        return nth_part(histories, n), torch.zeros(0, dtype=torch.int64)
    times_E = histories.shown.times_E
    edges = times_E.sort().values[[len(times_E) * i // n for i in range(1, n)]] if len(times_E) else times_E
    return torch.searchsorted(edges, histories.times_R, right=True), torch.searchsorted(edges, times_E, right=True)
