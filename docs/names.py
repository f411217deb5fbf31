"""Writes src/freshrec/names.json: a line on each model and strategy, which `freshrec list` prints without torch."""

from __future__ import annotations

import json
import sys
from dataclasses import fields, is_dataclass
from typing import Any

from freshrec.models import MODELS
from freshrec.strategies import ALIASES, STRATEGIES


def names_file() -> str:
    """The whole file."""
    models = {name: _line(spec, sys.modules[type(spec).__module__].__doc__) for name, spec in MODELS.items()}
    strategies = {name: _line(strategy, type(strategy).__doc__) for name, strategy in STRATEGIES.items()}
    strategies |= {alias: f"Another name of {name}." for alias, name in ALIASES.items()}
    return json.dumps({"models": models, "strategies": strategies}, indent=1, ensure_ascii=False) + "\n"


def _line(instance: Any, doc: str | None) -> str:
    """The first line of the docstring, and the options in which this instance differs from its class's defaults."""
    return " ".join([(doc or "").partition("\n")[0], *(f"[{option}]" for option in options_of(instance))])


def options_of(instance: Any) -> list[str]:
    """The fields in which a dataclass differs from its class's defaults, as a user writes them: `fit.epochs=5`."""
    options = []
    for name in (field.name for field in fields(instance)):
        value, default = getattr(instance, name), getattr(type(instance)(), name)
        if is_dataclass(value):
            options += [] if type(value) is type(default) else [f"{name}={type(value).__name__}"]
            options += [f"{name}.{option}" for option in options_of(value)]
        elif value != default:
            options.append(f"{name}={'none' if value is None else value}")
    return options
