"""Update recommenders from new events only.

from freshrec import Recommender

recommender = Recommender("sasrec").fit("events.parquet")
recommender.update("last-night.parquet")
recommender.recommend(["u42"], k=10)
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from freshrec.deprecation import describe_rename
from freshrec.errors import (
    BusyError,
    FreshrecError,
    IncompatibleError,
    LogError,
    OptionError,
    RefusedError,
    SpanError,
    StateError,
    TrainingError,
)
from freshrec.version import __version__

if TYPE_CHECKING:
    from freshrec.data.log import read_log
    from freshrec.data.split import split_log
    from freshrec.data.split_config import SplitConfig
    from freshrec.data.synthetic import make_world
    from freshrec.models import MODELS
    from freshrec.recommender.recommender import Recommender
    from freshrec.strategies import STRATEGIES

__all__ = [
    "BusyError",
    "FreshrecError",
    "IncompatibleError",
    "LogError",
    "MODELS",
    "OptionError",
    "Recommender",
    "RefusedError",
    "STRATEGIES",
    "SpanError",
    "SplitConfig",
    "StateError",
    "TrainingError",
    "__version__",
    "make_world",
    "read_log",
    "split_log",
]

_HOMES = {  # imported on first use: importing torch takes seconds, and `freshrec --help` does not need it
    "MODELS": "freshrec.models",
    "STRATEGIES": "freshrec.strategies",
    "Recommender": "freshrec.recommender.recommender",
    "SplitConfig": "freshrec.data.split_config",
    "make_world": "freshrec.data.synthetic",
    "read_log": "freshrec.data.log",
    "split_log": "freshrec.data.split",
}
_FORMER = {"cut": "split_log", "make": "make_world"}  # names of 0.1.0


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _FORMER:
        warnings.warn(describe_rename(f"freshrec.{name}", _FORMER[name]), FutureWarning, stacklevel=2)
        name = _FORMER[name]
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'freshrec' has no attribute '{name}'")
