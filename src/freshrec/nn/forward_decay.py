"""Windows and ages in events, which make counts independent of how events are cut into blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from freshrec.nn.sparse import Float64Array

WINDOW_SHARE = 1 / 6  # of the base block: about one span, if the base is half of the log and six spans follow
MAX_EXPONENT = 32  # stored weights are at most 2^32, so that sums of many fit in single precision


def window_size(n_base_events: int, share: float = WINDOW_SHARE) -> int:
    """Return the number of events in a window: a share of the base block, at least 1."""
    return max(1, round(share * n_base_events))


@dataclass(frozen=True)
class ForwardDecay:
    """Clock of counts in which an event weighs 2^(-age / h), with age = later events and h = half-life in events.

    Counts are stored as sums of 2^(p / h - shift), where p is the number of events up to this one. A reader multiplies
    them by `factor` = 2^(shift - n_events / h) [forward decay, Cormode et al. 2009]. So new events do not change stored
    counts, whether they arrive one by one or all at once. `shift` is a whole number that grows before weights become
    too large. Stored counts are then multiplied by a power of two, which is exact.
    """

    n_events: int = 0
    shift: int = 0

    def advance(self, n: int, half_life: float) -> tuple[ForwardDecay, Float64Array, float]:
        """Return the clock after `n` more events, their weights (n,), and a multiplier for the stored counts.

        The multiplier is 1, except about once in 32 half-lives.
        """
        n_events, shift = self.n_events + n, self.shift
        if n_events / half_life - shift > MAX_EXPONENT:
            shift = math.floor(n_events / half_life)
        weights_E = np.exp2(np.arange(self.n_events + 1, n_events + 1) / half_life - shift)
        return ForwardDecay(n_events, shift), weights_E, 2.0 ** (self.shift - shift)

    def factor(self, half_life: float) -> float:
        """Return the factor for reading stored counts: above 2^-33, and 1 before the first event."""
        return float(2.0 ** (self.shift - self.n_events / half_life))
