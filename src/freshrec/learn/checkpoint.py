"""The one save format: a state as a single safetensors file, written whole or not at all. No pickle.

The tensors lie in the file by path ("model.items.packed"); what is not a tensor lies in its metadata as JSON. Only
dataclasses of this package, or of modules that are already imported, are rebuilt.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import polars as pl
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from freshrec.device import here
from freshrec.errors import StateError
from freshrec.types import Model, OfferingModel, State, TrainedModel

FORMAT = 1


def save_state(state: State, path: Path) -> None:
    """Write `state` to `path`, whole or not at all."""
    save_tree(state, path)


def load_state(path: Path) -> State:
    """The state in `path`. Raises StateError where there is none, or it is damaged or of another format."""
    state = load_tree(path)
    if not isinstance(state, State):
        raise StateError(f"{path} holds something else than a state; use another file.")
    return state


def save_tree(tree: Any, path: Path) -> None:
    """Write tensors, numbers, texts, models and dataclasses, in tuples, lists and dicts of any depth."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps({"format": FORMAT, "state": _encode(tree, "state", tensors)})
    write_whole(path, lambda aside: save_file(tensors, aside, metadata={"freshrec": text}))


def save_text(text: str, path: Path) -> None:
    """Write a text, whole or not at all."""
    write_whole(path, lambda aside: aside.write_text(text))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`write` writes a file beside `path`, which then takes its name: whole or not at all.

    OSError where the system refuses, whatever the library that writes makes of it.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.touch()
        mode = aside.stat().st_mode  # safetensors lets nobody else read: whoever serves may be another user
        write(aside)
        aside.chmod(mode)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except (SafetensorError, pl.exceptions.PolarsError) as problem:
        raise OSError(str(problem)) from problem
    finally:
        aside.unlink(missing_ok=True)  # of a full disk nothing is taken by what is of no use


def load_tree(path: Path) -> Any:
    """What `save_tree` wrote. Raises StateError where there is nothing, or it is damaged or of another format."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # copies lie in memory as new tensors do: sums over those that do not differ in their last bits
            tensors = {name: file.get_tensor(name).to(here(), copy=True) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as problem:
        raise StateError(f"{path} holds no readable state ({problem}); use an earlier version or fit again.") from None
    try:
        tree = json.loads(metadata["freshrec"])
        if tree["format"] != FORMAT:
            raise StateError(
                f"{path} has state format {tree['format']}, this freshrec reads {FORMAT}; upgrade freshrec."
            )
        return _decode(tree["state"], tensors)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as problem:
        raise StateError(f"{path} is not a whole state ({problem}); use an earlier version or fit again.") from None


def _encode(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for `node`; its tensors go into `tensors` by path."""
    if node is None or isinstance(node, bool | int | float | str):
        return {"value": node}
    if isinstance(node, Tensor):
        tensors[path] = node.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(node, tuple | list):
        parts = [_encode(child, f"{path}.{i}", tensors) for i, child in enumerate(node)]
        return {"tuple" if isinstance(node, tuple) else "list": parts}
    if isinstance(node, dict):
        return {"dict": {k: _encode(child, f"{path}.{k}", tensors) for k, child in node.items()}}
    if isinstance(node, Model):
        return {"model": _encode(_parts_of(node), path, tensors)}
    if is_dataclass(node):
        kind = type(node)
        parts_of = {f.name: _encode(getattr(node, f.name), f"{path}.{f.name}", tensors) for f in fields(node)}
        return {"class": f"{kind.__module__}:{kind.__qualname__}", "fields": parts_of}
    raise StateError(
        f"a {type(node).__name__} at {path} cannot be saved: keep tensors, numbers and dataclasses in states."
    )


def _parts_of(model: Model) -> dict[str, Any]:
    return {
        "spec": model.spec,
        "sizes": (model.n_users, model.n_items),
        "seed": model.seed if isinstance(model, TrainedModel | OfferingModel) else 0,  # counters draw nothing
        "moments": model.moments if isinstance(model, TrainedModel) else {},
        "weights": dict(model.state_dict()),
    }


def _decode(node: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    if "value" in node:
        return node["value"]
    if "tensor" in node:
        return tensors[node["tensor"]]
    if "tuple" in node or "list" in node:
        children = [_decode(child, tensors) for child in node.get("tuple", node.get("list", []))]
        return tuple(children) if "tuple" in node else children
    if "dict" in node:
        return {k: _decode(child, tensors) for k, child in node["dict"].items()}
    if "model" in node:
        return _model(_decode(node["model"], tensors))
    module, _, name = node["class"].partition(":")
    if module not in sys.modules:
        raise StateError(f"the state needs {module}, which is not imported; import it before loading.")
    kind = vars(sys.modules[module]).get(name)
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise StateError(f"the state needs the dataclass {module}:{name}, which this freshrec lacks; upgrade freshrec.")
    return kind(**{k: _decode(child, tensors) for k, child in node["fields"].items()})


def _model(parts: dict[str, Any]) -> Model:
    model: Model = parts["spec"].build(parts["seed"])
    model.grow(*parts["sizes"])
    model.load_state_dict(parts["weights"])
    if isinstance(model, TrainedModel):
        model.moments = parts["moments"]
        model.eval()
    return model
