"""Writes src/freshrec/names.json: a sentence for each model and strategy. `freshrec list` prints it without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from freshrec.models import MODEL_TABLE
from freshrec.strategies import ALIASES, STRATEGY_TABLE


def names_file() -> str:
    """Return the whole file."""
    models = {name: _line(spec, sentence) for name, (spec, sentence) in MODEL_TABLE.items()}
    strategies = {name: _line(strategy, sentence) for name, (strategy, sentence) in STRATEGY_TABLE.items()}
    strategies |= {alias: f"Another name of {name}." for alias, name in ALIASES.items()}
    return json.dumps({"models": models, "strategies": strategies}, indent=1, ensure_ascii=False) + "\n"


def _line(instance: Any, sentence: str) -> str:
    """The sentence, then in brackets the options that differ from the defaults of the class."""
    return " ".join([sentence, *(f"[{option}]" for option in options_of(instance))])


def options_of(instance: Any) -> list[str]:
    """Options that differ from the defaults of the class, as a user writes them: `fit.epochs=5`."""
    options = []
    for name in (field.name for field in fields(instance)):
        value, default = getattr(instance, name), getattr(type(instance)(), name)
        if is_dataclass(value):
            options += [] if type(value) is type(default) else [f"{name}={type(value).__name__}"]
            options += [f"{name}.{option}" for option in options_of(value)]
        elif value != default:
            options.append(f"{name}={str(value).lower() if value is None or isinstance(value, bool) else value}")
    return options


def names_of_type(table: Mapping[str, Any], kind: type) -> list[str]:
    """The names in `table` whose instance has exactly this class."""
    return [name for name, instance in table.items() if type(instance) is kind]
