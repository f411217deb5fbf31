"""Record the origin of the results in a folder, in a form that survives renamed classes and options.

made-of.json holds the run, or the settings and the fingerprint of the log, by the names of `disk_names`. Version 0.1.0
wrote made-of.txt instead, with the `repr` of the same dataclasses. It is parsed as a Python expression.
"""

from __future__ import annotations

import ast
import json
import math
from dataclasses import astuple, is_dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from freshrec.disk_names import tag_of
from freshrec.errors import StateError
from freshrec.files import write_text_atomically
from freshrec.former_names import FORMER
from freshrec.replay.cell import Cell, ReplaySettings
from freshrec.store.checkpoint import decode_options, encode_options
from freshrec.types import State

FILE, FORMER_FILE = "made-of.json", "made-of.txt"
TAGS = {place.rpartition(":")[2]: tag for place, tag in FORMER.items()}  # by the name of the class in its `repr`
NUMBERS = {"inf": math.inf, "nan": math.nan}

Provenance = Cell | tuple[ReplaySettings, str]  # of a run's folder; of the replay's folder, with the log's fingerprint


def matches_provenance(folder: Path, source: Provenance) -> bool:
    """Whether a folder is empty or holds results of `source`."""
    try:
        if (folder / FILE).exists():
            stored = json.loads((folder / FILE).read_text())
        elif (folder / FORMER_FILE).exists():
            stored = _former_encoded((folder / FORMER_FILE).read_text(), source)
        else:
            return True
        # the second comparison is for options that were renamed or added since
        return stored == _encoded(source) or _encoded(decode_options(stored)) == _encoded(source)
    except (StateError, ValueError):
        return False


def write_provenance(folder: Path, source: Provenance) -> None:
    """Record the origin of the results in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(json.dumps(_encoded(source)), folder / FILE)


def is_spec_of(state: State, cell: Cell) -> bool:
    """Whether the model of a state has the same options as the model of a run."""
    return _encoded(state.model.spec) == _encoded(cell.model_spec)


def _encoded(source: Any) -> dict[str, Any]:
    """The source as JSON, after a round trip; the `repr` of objects that cannot be encoded, such as custom classes."""
    try:
        found: dict[str, Any] = json.loads(json.dumps(encode_options(source)))
    except StateError:
        found = {"value": repr(source)}
    return found


def base_file(cell: Cell, fit_options: tuple[float, ...], out: Path) -> Path:
    """Path of the state after the base block, which runs with the same model, seed and training options share.

    The file name depends on the values of the options, not on their names. A folder from 0.1.0 may hold a file with the
    old name, a checksum of the options' `repr`. The caller must check that the stored model has the same options.
    """
    stem = f"{cell.model_name.replace(':', '_')}--{cell.seed}"
    former = _former_options(out / cell.folder_name / FORMER_FILE)
    if former is not None:
        path = _with_checksum(out, stem, repr((_Text(former), *fit_options)))
        if path.exists():
            return path
    spec: Any = astuple(cell.model_spec) if is_dataclass(cell.model_spec) else repr(cell.model_spec)
    options = json.dumps([tag_of(type(cell.model_spec)), spec, fit_options], default=str)
    return _with_checksum(out, stem, options)


def _with_checksum(out: Path, stem: str, options: str) -> Path:
    return out / "bases" / f"{stem}--{crc32(options.encode()):08x}.safetensors"


class _Text:
    """An object with a given `repr`."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _former_options(path: Path) -> str | None:
    """The `repr` of the model's options in the made-of.txt of a run; None without such a file."""
    try:
        text = path.read_text()
        call = ast.parse(text, mode="eval").body
    except (OSError, ValueError, SyntaxError):
        return None
    keywords = call.keywords if isinstance(call, ast.Call) else []
    return next((ast.get_source_segment(text, keyword.value) for keyword in keywords if keyword.arg == "spec"), None)


def _former_encoded(text: str, source: Provenance) -> dict[str, Any]:
    """Convert the text that 0.1.0 wrote to the form of `_encoded`. Raises ValueError if it describes something else.

    For a class outside this package the text holds only the name. Then it is compared with the text that 0.1.0 would
    write for `source`.
    """
    settings, _, log = (text, "", "") if isinstance(source, Cell) else text.rpartition(", log ")
    try:
        found = _encoded_repr(ast.parse(settings, mode="eval").body)
    except (SyntaxError, ValueError):
        if text != (repr(source) if isinstance(source, Cell) else f"{source[0]}, log {source[1]}"):
            raise ValueError("The text describes something else.") from None
        return _encoded(source)
    return found if isinstance(source, Cell) else {"tuple": [found, {"value": log}]}


def _encoded_repr(node: ast.expr) -> dict[str, Any]:
    """Convert the `repr` of a tree of dataclasses to the form of `encode_options`. Raises ValueError for other text."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in TAGS and not node.args:
        return {
            "class": TAGS[node.func.id],
            "fields": {str(keyword.arg): _encoded_repr(keyword.value) for keyword in node.keywords},
        }
    if isinstance(node, ast.Tuple):
        return {"tuple": [_encoded_repr(child) for child in node.elts]}
    if isinstance(node, ast.List):
        return {"list": [_encoded_repr(child) for child in node.elts]}
    if isinstance(node, ast.Name) and node.id in NUMBERS:
        return {"value": NUMBERS[node.id]}
    return {"value": ast.literal_eval(node)}
