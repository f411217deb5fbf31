"""How metrics, models and strategies are printed in the generated pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

READOUTS = {"stored": "stored interests", "both": "recent and stored interests"}


def fraction(value: float) -> str:
    """Return a metric as a fraction: 0.1994, never 19.94 %."""
    return f"{value:.4f}"


def with_interval(row: Mapping[str, Any]) -> str:
    """Return `value`, and `low` and `high` as the ends of its interval."""
    return f"{row['value']:.4f} ({row['low']:.4f} .. {row['high']:.4f})"


def difference(value: float, low: float, high: float) -> str:
    """Return a difference of two fractions and the ends of its interval, all with their signs."""
    return f"{value:+.4f} ({low:+.4f} .. {high:+.4f})"


def strategy_name(name: str) -> str:
    """Return the name of a strategy with its cadence in words: "absorb x4" is "absorb (4 blocks)"."""
    strategy, is_split, blocks = name.partition(" x")
    return f"{strategy} ({blocks} blocks)" if is_split else name


def model_name(name: str) -> str:
    """Return the name of a model with its readout in words: "mind@both" is "mind (recent and stored interests)"."""
    model, _, readout = name.partition("@")
    return f"{model} ({READOUTS[readout]})" if readout else name
