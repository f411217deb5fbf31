"""What a model must supply, checked before anything is trained. CONTRIBUTING.md, "A new model", says it in words."""

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
    """The model of a spec, without users and items. OptionError, with what is missing, where it is no model."""
    if isinstance(spec, type) or not is_dataclass(spec):
        raise OptionError(f'model "{name}" is no instance of a dataclass; name one, such as MY_MODEL = MySpec().')
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
            f'batch_format of {label} is "{model.batch_format}"; it must be one of {", ".join(BATCH_FORMATS)}.'
        )
    members = set(dir(model))
    if not members & {"encode", "user_vectors", "score"}:
        raise OptionError(f"{label} has no encode, user_vectors or score, so that nothing says how items are scored.")
    items = dict(model.named_children()).get("items")
    if members & {"encode", "user_vectors"} and not isinstance(items, EmbeddingTable):
        raise OptionError(
            f"{label} has no table of item vectors: set self.items = freshrec.nn.embedding_table.EmbeddingTable(...)."
        )
    return cast(Model, model)


def _check_names(label: str, instance: object, names: Sequence[str]) -> None:
    present = set(dir(instance))
    if missing := [name for name in names if name not in present]:
        raise OptionError(f'{label} lacks {", ".join(missing)}; CONTRIBUTING.md, "A new model", says what they are.')
