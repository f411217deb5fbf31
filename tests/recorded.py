"""The record of a run: numbers with 6 digits, and hashes of states that do not change when names do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import cpu_instructions
import polars as pl
from torch import Tensor

from freshrec.types import Model, State, TrainedModel

DIGITS = 6
CLOSE = 1e-6
LINE = 140  # characters; a shorter part stays on one line


@dataclass(frozen=True)
class Record:
    """The results of one run. `values` are equal on all machines, `trained` and `hashes` where `machine()` is equal."""

    values: dict[str, Any]
    trained: dict[str, Any]  # numbers that depend on the last bits of weights, such as scores
    hashes: dict[str, str]


def state_hash(*states: Any) -> str:
    """SHA-256 of all tensors, numbers and texts in `states`, independent of their names and order.

    The hash reads dtype, shape and bytes of each tensor, and each number and text. It sorts them, so classes, fields,
    keys, columns and modules can be renamed, and fields can be reordered. A changed dtype, shape or bit changes the
    hash, and so does a new field that is not None. The hash ignores None and the measurements of the last update,
    because times differ. It also ignores the options of models: they determine what is computed, and their texts may
    be renamed.
    """
    leaves = sorted(leaf for state in states for leaf in _leaves(state))
    return hashlib.sha256("\n".join(leaves).encode()).hexdigest()


def _leaves(node: Any) -> Iterator[str]:
    """Yield a line for each tensor, number or text below `node`."""
    if isinstance(node, Tensor):
        tensor = node.detach().contiguous()
        digest = hashlib.sha256(tensor.view(-1).numpy().tobytes()).hexdigest()
        yield f"tensor {tensor.dtype} {list(tensor.shape)} {digest}"
    elif isinstance(node, bool | int | float | str):
        yield f"value {node!r}"
    elif isinstance(node, pl.Series):
        digest = hashlib.sha256(json.dumps(node.to_list()).encode()).hexdigest()
        yield f"column {node.dtype} {len(node)} {digest}"
    else:
        for part in _parts(node):
            yield from _leaves(part)


def _parts(node: Any) -> list[Any]:
    """The parts of `node`."""
    if node is None:
        return []
    if isinstance(node, dict):
        return list(node.values())
    if isinstance(node, tuple | list):
        return list(node)
    if isinstance(node, pl.DataFrame):
        return node.get_columns()
    if isinstance(node, Model):
        moments = node.moments if isinstance(node, TrainedModel) else {}
        return [node.n_users, node.n_items, dict(node.state_dict()), moments]
    assert is_dataclass(node), f"{type(node).__name__} in a state"
    whole = replace(node, costs={}, shared_base=None) if isinstance(node, State) else node
    return [getattr(whole, field.name) for field in fields(whole)]


def rounded(node: Any) -> Any:
    """`node` with numbers rounded to 6 digits, as JSON stores it. nan and infinity become texts."""
    if isinstance(node, dict):
        return {str(key): rounded(part) for key, part in node.items()}
    if isinstance(node, tuple | list):
        return [rounded(part) for part in node]
    if isinstance(node, float):
        return round(node, DIGITS) if abs(node) < float("inf") else str(node)
    return node


def differences(gold: Any, found: Any, path: str = "") -> Iterator[str]:
    """Yield a line for each value that differs from the recorded one. Numbers may differ by 1e-6."""
    if isinstance(gold, dict) and isinstance(found, dict):
        for key in sorted(gold.keys() | found.keys()):
            yield from differences(gold.get(key, "nothing"), found.get(key, "nothing"), f"{path} / {key}")
    elif isinstance(gold, list) and isinstance(found, list) and len(gold) == len(found):
        for i, (gold_part, found_part) in enumerate(zip(gold, found)):
            yield from differences(gold_part, found_part, f"{path} / {i}")
    elif isinstance(gold, float) and isinstance(found, float | int):
        if abs(gold - found) > CLOSE * 1.5:  # both are rounded
            yield f"{path}: recorded {gold}, found {found}"
    elif gold != found:
        yield f"{path}: recorded {gold}, found {found}"


def write(record: Record, path: Path) -> None:
    """Write a record as readable JSON, with one line for each small part."""
    whole = {"machine": cpu_instructions.machine()} | rounded(vars(record))
    path.write_text(_text(whole, " ") + "\n")


def _text(node: Any, pad: str) -> str:
    line = json.dumps(node)
    if not isinstance(node, dict) or len(pad) + len(line) < LINE:
        return line
    lines = [f"{pad}{json.dumps(key)}: {_text(part, pad + ' ')}" for key, part in node.items()]
    return "{\n" + ",\n".join(lines) + f"\n{pad[1:]}}}"
