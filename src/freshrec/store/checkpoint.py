"""The only save format: a state in one safetensors file, written completely or not at all. No pickle.

Tensors are stored under their paths, such as "model.items.packed". Everything else is JSON in the metadata of the file.
Classes are stored under the names in `disk_names`. Only dataclasses with a tag there, or from modules that are already
imported, can be loaded.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from freshrec.device import default_device
from freshrec.disk_names import INT32_FIELDS, class_of, require_modules, tag_of, with_current_names
from freshrec.errors import StateError
from freshrec.files import write_atomically
from freshrec.nn.embedding_table import embedding_tables
from freshrec.types import Model, SeededModel, State, StateDictModel, Strategy, TrainedModel

FORMAT_VERSION = 2  # format 1 names classes by module and class; it can still be read
CHUNK_BYTES = 1 << 21  # bytes of a tensor that are read at a time; the mapped memory is freed after each


class TensorReader(Protocol):
    """A function that reads a tensor from a file."""

    def __call__(self, name: str, columns: int | None = None) -> Tensor:
        """Return the tensor with this name in the file: all columns, or the first ones."""


def save_state(state: State, path: Path) -> None:
    """Write `state` to `path`, completely or not at all."""
    save_tree(state, path)


def load_state(path: Path) -> State:
    """Load the state in `path`. Raises StateError if the file is missing, damaged or has an unknown format."""
    state = load_tree(path)
    if not isinstance(state, State):
        raise StateError(f"{path} does not hold a state. Use another file.")
    return state


def save_tree(tree: Any, path: Path) -> None:
    """Save a tree to `path`: tensors, numbers, strings, models and dataclasses in nested tuples, lists and dicts."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps({"format": FORMAT_VERSION, "state": _encode(tree, "state", tensors)})
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"freshrec": text}))


def encode_options(tree: Any) -> dict[str, Any]:
    """Return a tree without tensors and models as JSON. Raises StateError if it holds tensors."""
    tensors: dict[str, Tensor] = {}
    found: dict[str, Any] = _encode(tree, "options", tensors)
    if tensors:
        raise StateError(f"Options must not hold tensors, but {min(tensors)} is one. Keep tensors in the state.")
    return found


def decode_options(encoded: dict[str, Any]) -> Any:
    """Undo `encode_options`, also of an earlier freshrec. Raises StateError if the JSON has another form."""
    try:
        return _decode(with_current_names(encoded), _no_tensor, _build_full_model)
    except (KeyError, ValueError, TypeError, AttributeError) as problem:
        raise StateError(f"The options cannot be read ({problem}). Choose another folder.") from None


def _no_tensor(name: str, columns: int | None = None) -> Tensor:
    raise StateError(f"Options must not hold tensors, but {name} is one. Choose another folder.")


def load_tree(path: Path) -> Any:
    """Load what `save_tree` wrote. Raises StateError if the file is missing, damaged or has an unknown format."""
    with _as_state_error(path):
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {})["freshrec"]
            # copies are aligned like new tensors; otherwise sums over them can differ in the last bits
            tensors = {name: file.get_tensor(name).to(default_device(), copy=True) for name in file.keys()}  # noqa: SIM118
        return _decode(_parse_tree(text, path), lambda name, columns=None: tensors[name], _build_full_model)


def load_for_serving(path: Path) -> Any:
    """Load a tree for serving only, without the optimiser state of embedding tables: a third of their size.

    Tensors are read in pieces. A tensor that equals the first one of its shape shares its memory. Examples are the
    histories that a model reads and the complete histories. The result is read-only and cannot be trained.
    """
    shared: dict[tuple[torch.Size, torch.dtype], Tensor] = {}

    def read_shared(name: str, columns: int | None = None) -> Tensor:
        tensor = _read_in_chunks(path, name, columns)
        earlier = shared.setdefault((tensor.shape, tensor.dtype), tensor)
        return earlier if torch.equal(earlier, tensor) else tensor

    with _as_state_error(path):
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {})["freshrec"]
        return _decode(_parse_tree(text, path), read_shared, _build_serving_model)


@contextmanager
def _as_state_error(path: Path) -> Iterator[None]:
    """Turn the errors of reading a file into a StateError."""
    try:
        yield
    except (SafetensorError, OSError) as problem:
        raise StateError(f"{path} cannot be read ({problem}). Use an earlier version, or fit again.") from None
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as problem:
        raise StateError(
            f"{path} does not hold a complete state ({problem}). Use an earlier version, or fit again."
        ) from None


def _parse_tree(text: str, path: Path) -> Any:
    tree = json.loads(text)
    if tree["format"] not in range(1, FORMAT_VERSION + 1):
        raise StateError(
            f"{path} has state format {tree['format']}, but this freshrec reads {FORMAT_VERSION}. Upgrade freshrec."
        )
    return with_current_names(tree["state"])


def check_modules(paths: Iterable[Path]) -> None:
    """Raise StateError if a class in one of these files comes from a module that is not imported. Imports nothing.

    The message names all such modules at once. Loading a file raises the same error for this file only.
    """
    names: dict[str, None] = {}
    for path in paths:
        with _as_state_error(path), safe_open(path, framework="pt") as file:
            tree = _parse_tree((file.metadata() or {})["freshrec"], path)
            names |= dict.fromkeys(_class_names(tree))
    require_modules(names)


def _class_names(node: Any) -> Iterator[str]:
    """Yield the name of each class in an encoded tree."""
    if isinstance(node, dict):
        if isinstance(node.get("class"), str):
            yield node["class"]
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _class_names(child)


def _read_in_chunks(path: Path, name: str, columns: int | None = None) -> Tensor:
    """Read a tensor of the file, or its first columns."""
    with safe_open(path, framework="pt") as file:
        shape = file.get_slice(name).get_shape()
        if not shape or 0 in shape:
            tensor: Tensor = file.get_tensor(name).clone()
            return tensor if columns is None else tensor[:, :columns]
        first_row = file.get_slice(name)[:1]
    n_rows = max(1, CHUNK_BYTES // max(1, first_row.nbytes))
    out = torch.empty(
        (shape[0], *first_row.shape[1:]) if columns is None else (shape[0], columns), dtype=first_row.dtype
    )
    for first in range(0, shape[0], n_rows):
        with safe_open(path, framework="pt") as file:
            part = file.get_slice(name)[first : first + n_rows]
            out[first : first + n_rows] = part if columns is None else part[:, :columns]
    return out


def _encode(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return `node` as JSON, and add its tensors to `tensors` under their paths."""
    if node is None or isinstance(node, bool | int | float | str):
        return {"value": node}
    if isinstance(node, Tensor):
        tensors[path] = node.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(node, tuple | list):
        parts = [_encode(child, f"{path}.{i}", tensors) for i, child in enumerate(node)]
        return {"tuple" if isinstance(node, tuple) else "list": parts}
    if isinstance(node, dict):
        if not all(isinstance(k, str) for k in node):
            raise StateError(f"The dict at {path} has keys that are not strings. Use strings as keys, or a tensor.")
        return {"dict": {k: _encode(child, f"{path}.{k}", tensors) for k, child in node.items()}}
    if isinstance(node, Model):
        return {"model": _encode(_model_parts(node), path, tensors)}
    if isinstance(node, Strategy) and not is_dataclass(node) and not vars(node):  # a class without fields
        return {"class": tag_of(type(node)), "fields": {}}
    if is_dataclass(node):
        encoded_fields = {f.name: _encode(getattr(node, f.name), f"{path}.{f.name}", tensors) for f in fields(node)}
        return {"class": tag_of(type(node)), "fields": encoded_fields}
    raise StateError(
        f"The {type(node).__name__} at {path} cannot be saved. Make it a dataclass. "
        "States hold tensors, numbers, strings and dataclasses, in tuples, lists and dicts."
    )


MODEL_PARTS = ("spec", "sizes", "seed", "moments", "weights")
BUILT = ("spec", "n_users", "n_items", "seed")  # attributes that building and growing a model sets


def _model_parts(model: Model) -> dict[str, Any]:
    """Return the parts from which a model is built again."""
    return {
        "spec": model.spec,
        "sizes": (model.n_users, model.n_items),
        "seed": model.seed if isinstance(model, SeededModel) else 0,  # counting models use no random numbers
        "moments": model.moments if isinstance(model, TrainedModel) else {},
        "weights": _weights_of(model),
    }


def _weights_of(model: Model) -> dict[str, Any]:
    """Return the learned values of a model by name: its `state_dict`, or all its attributes if it has none."""
    if isinstance(model, StateDictModel):
        return dict(model.state_dict())
    return {name: value for name, value in vars(model).items() if name not in BUILT}


def _load_weights(model: Model, weights: dict[str, Any]) -> None:
    """Undo `_weights_of`."""
    if isinstance(model, StateDictModel):
        model.load_state_dict(weights)
        return
    for name, value in weights.items():
        setattr(model, name, value)


def _decode(
    node: dict[str, Any], read: TensorReader, build_model: Callable[[dict[str, Any], TensorReader], Model]
) -> Any:
    """Undo `_encode`. `build_model` builds a model from its encoded parts."""
    if "value" in node:
        return node["value"]
    if "tensor" in node:
        return read(node["tensor"])
    if "tuple" in node or "list" in node:
        children = [_decode(child, read, build_model) for child in node.get("tuple", node.get("list", []))]
        return tuple(children) if "tuple" in node else children
    if "dict" in node:
        return {k: _decode(child, read, build_model) for k, child in node["dict"].items()}
    if "model" in node:
        return build_model(node["model"]["dict"], read)
    decoded = {k: _decode(child, read, build_model) for k, child in node["fields"].items()}
    decoded |= {name: decoded[name].int() for name in INT32_FIELDS.get(node["class"], ()) if name in decoded}
    kind = class_of(node["class"])
    return kind(**decoded) if is_dataclass(kind) else kind()


def _build_full_model(parts: dict[str, Any], read: TensorReader) -> Model:
    spec, sizes, seed, moments, weights = (_decode(parts[name], read, _build_full_model) for name in MODEL_PARTS)
    model: Model = spec.build(seed)
    model.grow(*sizes)
    _load_weights(model, weights)
    if isinstance(model, TrainedModel):
        model.moments = moments
        model.eval()
    return model


def _build_serving_model(parts: dict[str, Any], read: TensorReader) -> Model:
    spec, sizes, seed = (_decode(parts[name], read, _build_serving_model) for name in MODEL_PARTS[:3])
    model: Model = spec.build(seed)
    names = parts["weights"]["dict"]
    tables = embedding_tables(model) if isinstance(model, TrainedModel) else {}
    for name, table in tables.items():  # allocates the weights only, without values
        n_rows = len(read(names[f"{name}.steps_R"]["tensor"]))
        table.packed, table.steps_R = torch.empty(n_rows, table.n_dims), torch.zeros(n_rows)
    model.grow(*sizes)
    for name, table in tables.items():
        table.packed = read(names[f"{name}.packed"]["tensor"], table.n_dims)
    own = {f"{name}.packed": table.packed for name, table in tables.items()}
    others = {name: _decode(child, read, _build_serving_model) for name, child in names.items() if name not in own}
    _load_weights(model, own | others)
    if isinstance(model, TrainedModel):
        model.eval()
    return model
