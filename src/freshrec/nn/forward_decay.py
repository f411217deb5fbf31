"""Windows and ages in events, so that what is counted does not depend on how the events are cut into blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from freshrec.nn.sparse import Float64Array

WINDOW_SHARE = 1 / 6  # of the base block: about one span where half of the log is the base and six spans follow
MAX_EXPONENT = 32  # stored weights are at most 2^32, so that sums of many fit into single precision


def window_size(n_base_events: int, share: float = WINDOW_SHARE) -> int:
    """Number of events in a window: a share of the base block, at least 1."""
    return max(1, round(share * n_base_events))


@dataclass(frozen=True)
class ForwardDecay:
    """Counts in which an event weighs 2^(-age / h): age = the number of later events, h = the half-life in events.

    They are stored as sums of 2^(p / h - shift), p being the number of events up to this one, and read times `factor`
    = 2^(shift - n_events / h) [forward decay, Cormode et al. 2009]. So new events leave stored counts as they are,
    whether they arrive one by one or all at once. `shift` is a whole number that grows before weights become too large;
    stored counts are then multiplied by a power of two, which is exact.
    """

    n_events: int = 0
    shift: int = 0

    def advance(self, n: int, half_life: float) -> tuple[ForwardDecay, Float64Array, float]:
        """The clock after `n` more events, the weights (n,) to store them with, and what stored counts are times now.

        The last is 1 but once in 32 half-lives.
        """
        n_events, shift = self.n_events + n, self.shift
        if n_events / half_life - shift > MAX_EXPONENT:
            shift = math.floor(n_events / half_life)
        weights_E = np.exp2(np.arange(self.n_events + 1, n_events + 1) / half_life - shift)
        return ForwardDecay(n_events, shift), weights_E, 2.0 ** (self.shift - shift)

    def factor(self, half_life: float) -> float:
        """What stored counts are times when they are read: above 2^-33; 1 before the first event."""
        return float(2.0 ** (self.shift - self.n_events / half_life))
