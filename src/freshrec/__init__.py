"""Update recommenders from new events only.

from freshrec import Recommender

recommender = Recommender("sasrec").fit("events.parquet")
recommender.update("last-night.parquet")
recommender.recommend(["u42"], k=10)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    from freshrec.data.spans import split_log
    from freshrec.data.worlds import make_world
    from freshrec.models import MODELS
    from freshrec.serve.recommender import Recommender
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
    "StateError",
    "TrainingError",
    "__version__",
    "split_log",
    "make_world",
    "read_log",
]

_LAZY_IMPORTS = {  # imported when first asked for, because torch alone takes seconds, and `freshrec --help` needs none of it
    "MODELS": "freshrec.models",
    "STRATEGIES": "freshrec.strategies",
    "Recommender": "freshrec.serve.recommender",
    "cut": "freshrec.data.spans",
    "make": "freshrec.data.worlds",
    "read_log": "freshrec.data.log",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY_IMPORTS:
        return getattr(import_module(_LAZY_IMPORTS[name]), name)
    raise AttributeError(f"module freshrec has no attribute {name}")
