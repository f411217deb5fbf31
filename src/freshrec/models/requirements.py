"""Checks that a model has all required members, before anything is trained.

CONTRIBUTING.md, "Adding a model", describes these members.
"""

from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any, cast

from torch import nn

from freshrec.errors import OptionError
from freshrec.nn.embedding_table import EmbeddingTable
from freshrec.types import Model

SPEC = ("build",)
TRAINED_SPEC = ("length", "lr", "batch", "negatives")
MODEL = ("spec", "n_users", "n_items", "grow")
COUNTING = ("absorb", "score")
TRAINED = ("seed", "batch_format", "moments", "forward")
BATCH_FORMATS = ("target", "window", "pair", "click", "session-parallel")


def build_model(spec: Any, name: str, seed: int = 0) -> Model:
    """Return the model of a spec, without users and items. Raises OptionError if a required member is missing."""
    if isinstance(spec, type):
        raise OptionError(f'Model "{name}" is a class. Write {spec.__name__}() with brackets.')
    if not is_dataclass(spec):
        raise OptionError(f'The options of model "{name}" are no dataclass. Write @dataclass(frozen=True) above them.')
    _check_names(f'the options of model "{name}" ({type(spec).__name__})', spec, SPEC)
    model = cast(Any, spec).build(seed)
    label = f'model "{name}" ({type(model).__name__})'
    is_trained = isinstance(model, nn.Module)
    if not is_trained:
        _check_names(label, model, (*MODEL, *COUNTING))
        return cast(Model, model)
    _check_names(f'the options of model "{name}" ({type(spec).__name__})', spec, TRAINED_SPEC)
    _check_names(label, model, (*MODEL, *TRAINED))
    if model.batch_format not in BATCH_FORMATS:
        raise OptionError(
            f'The batch_format of {label} is "{model.batch_format}". Use one of {", ".join(BATCH_FORMATS)}.'
        )
    members = _member_names(model)
    if not members & {"encode", "user_vectors", "score"}:
        raise OptionError(f"No method of {label} scores items. Add encode, user_vectors or score.")
    items = dict(model.named_children()).get("items")
    if members & {"encode", "user_vectors"} and not isinstance(items, EmbeddingTable):
        raise OptionError(
            f"The table of item vectors is missing in {label}. "
            "Set self.items = freshrec.nn.embedding_table.EmbeddingTable(...)."
        )
    return cast(Model, model)


def _check_names(label: str, instance: object, names: Sequence[str]) -> None:
    members = _member_names(instance)
    if missing := [name for name in names if name not in members]:
        raise OptionError(f'Missing in {label}: {", ".join(missing)}. See "Adding a model" in CONTRIBUTING.md.')


def _member_names(instance: object) -> set[str]:
    """Return the names of all attributes and methods, including the parts of an `nn.Module`.

    `isinstance` with a protocol does not see these parts from Python 3.12 on, and does not name what is missing.
    """
    return set(dir(instance))
