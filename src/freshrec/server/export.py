"""Export a version for other programs: ids, vectors, an index, the user tower as ONNX, or else lists."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from freshrec.errors import IncompatibleError, OptionError
from freshrec.nn.scoring import item_vectors, user_vectors
from freshrec.recommender.list_request import check_k
from freshrec.recommender.lists import user_vector_batches
from freshrec.recommender.search import build_index
from freshrec.server.export_lists import write_lists
from freshrec.server.handlers import LoadedVersion
from freshrec.types import Batch, InterestModel, VectorModel

LIST_LENGTH = 20  # items per list and neighbours per item


def export_version(
    version: LoadedVersion, folder: Path, with_onnx: bool = False, with_lists: bool = False, k: int = LIST_LENGTH
) -> dict[str, Any]:
    """Write a version into a new folder. Returns the content of about.json.

    A model with vectors:

    - items.parquet, users.parquet: ids and rows. users.parquet also has the first vector of each user and their number.
    - item_vectors.npy: shape (items, D). user_vectors.npy: shape (vectors, D).
    - items.faiss: an inverted file. Its numbers are item rows, from 1.
    - user_tower.onnx, with `with_onnx`: the network that computes user vectors.

    Any other model, and with `with_lists` also a model with vectors:

    - lists.parquet: the k best items of each user that the user has not seen. popular.parquet: those of a new user.
    - neighbours.parquet: the k most similar items of each item, if the model or an expert of the blend knows them.

    Raises OptionError if the folder is not empty, IncompatibleError for ONNX of a model without vectors.
    """
    model, name = version.served.state.model, version.bundle.names[0]
    has_vectors = isinstance(model, VectorModel)
    if with_onnx and not has_vectors:
        raise IncompatibleError(
            f"Model {name} has no network that computes user vectors. Leave out --onnx, or use a model such as "
            "comirec-dr."
        )
    check_k(k)
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise OptionError(f"{folder} is not empty. Choose a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {
        "version": version.number,
        "model": name,
        "items": model.n_items,
        "users": len(version.served.users),
        "files": [],
    }
    if has_vectors:
        _write_vectors(version, folder, summary)
    if with_onnx:
        inputs = write_user_tower(version, folder / "user_tower.onnx")
        summary["files"].append("user_tower.onnx")
        summary["user_tower"] = {"inputs": inputs, "outputs": ["vectors"], "history": model.spec.length}
    if with_lists or not has_vectors:
        summary["files"] += write_lists(version.served, name, k, folder)
        summary["k"] = k
    (folder / "about.json").write_text(json.dumps(summary, indent=1))
    return summary


def _write_vectors(version: LoadedVersion, folder: Path, summary: dict[str, Any]) -> None:
    """Write ids, vectors and the index, and add them to the content of about.json."""
    served = version.served
    model = served.state.model
    items_ID = np.ascontiguousarray(item_vectors(model)[1:].numpy())
    np.save(folder / "item_vectors.npy", items_ID)
    item_ids = served.items.frame[: model.n_items].select("id", row=pl.int_range(1, pl.len() + 1))
    item_ids.write_parquet(folder / "items.parquet")
    vectors_SD, first_U, n_U = vectors_of_all_users(version)
    np.save(folder / "user_vectors.npy", vectors_SD)
    ids = served.users.frame.select("id", row=pl.int_range(1, pl.len() + 1))
    ids.with_columns(first=pl.Series(first_U), vectors=pl.Series(n_U)).write_parquet(folder / "users.parquet")
    _write_index(build_index(item_vectors(model)), folder / "items.faiss")
    summary["dimensions"], summary["user_vectors"] = items_ID.shape[1], len(vectors_SD)
    summary["score"] = "the largest inner product of an item vector with one of the user's vectors"
    summary["files"] += ["items.parquet", "item_vectors.npy", "users.parquet", "user_vectors.npy", "items.faiss"]


def vectors_of_all_users(version: LoadedVersion) -> tuple[np.ndarray, list[int], list[int]]:
    """Return the current vectors of all users, the index of each user's first vector, and their numbers."""
    users_N = torch.arange(1, len(version.served.users) + 1)
    found: dict[int, Tensor] = {}
    for index, batch, vectors_BKD in user_vector_batches(version.served, users_N):
        n_B = [vectors_BKD.shape[1]] * len(index) if batch.alive_BK is None else batch.alive_BK.sum(1).tolist()
        for row, user in enumerate(index.tolist()):
            found[user] = vectors_BKD[row, : n_B[row]]
    n_U = [len(found[user]) for user in range(len(users_N))]
    first_U = [0, *np.cumsum(n_U)[:-1].tolist()] if n_U else []
    return torch.cat([found[user] for user in range(len(users_N))]).numpy(), first_U, n_U


class UserTower(nn.Module):
    """The user vectors of a model as a function of tensors only, for ONNX."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.has_interests = isinstance(model, InterestModel)

    def forward(self, users_B: Tensor, history_BT: Tensor, stored_BKD: Tensor) -> Tensor:
        """User vectors, shape (B, K, D). `stored_BKD` holds the stored interests, which only interest models use."""
        if self.has_interests:
            return user_vectors(self.model, Batch(users_B, history_BT, interests_BKD=stored_BKD))
        return user_vectors(self.model, Batch(users_B, history_BT))


def write_user_tower(version: LoadedVersion, path: Path) -> list[str]:
    """Write the user tower as ONNX, for any number of users. Returns the names of its inputs.

    A history has the model's full length, padded with 0 on the left. Raises OptionError without the ONNX libraries.
    """
    model = version.served.state.model
    length, n = model.spec.length, 2
    k = 2 if isinstance(model, InterestModel) else 1
    d = item_vectors(model).shape[1]
    example = (torch.ones(n, dtype=torch.int64), torch.ones(n, length, dtype=torch.int64), torch.zeros(n, k, d))
    names = ["users", "history", "stored"]
    batch = torch.export.Dim("users_", min=1, max=4096)
    stored: dict[int, Any] = {0: batch}
    if isinstance(model, InterestModel):
        stored[1] = torch.export.Dim("interests_", min=1, max=model.spec.k_max)
    try:
        import onnxscript  # noqa: F401
    except ImportError as missing:
        raise OptionError(
            f'ONNX needs the library {missing.name}. Install it with pip install "freshrec[onnx]".'
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter of PyTorch warns about itself
        program = torch.onnx.export(
            UserTower(model).eval(),
            example,
            dynamo=True,
            input_names=names,
            output_names=["vectors"],
            verbose=False,
            dynamic_shapes=({0: batch}, {0: batch}, stored),
            external_data=False,
        )
    assert program is not None
    program.save(str(path))
    return [value.name for value in program.model.graph.inputs if value.name is not None]


def _write_index(index: Any, path: Path) -> None:
    """Write a faiss index to a file."""
    import faiss

    faiss.write_index(index, str(path))
