"""Export lists and neighbours of a version as Parquet, for programs that look them up instead of computing them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl
import torch

from freshrec.models.blend.model import Blend
from freshrec.models.item_knn import ItemKNN
from freshrec.progress import report_progress
from freshrec.recommender.ids import column_tensor, resolve_request
from freshrec.recommender.list_request import ListRequest
from freshrec.recommender.lists import similar_items, top_items
from freshrec.recommender.served_state import ServedState
from freshrec.types import Model, VectorModel

USERS_PER_CHUNK = 4096  # users whose lists are computed at once
NEIGHBOUR_EXPERTS = ("item-knn", "markov")  # experts of the blend that score an item by another item


def write_lists(served: ServedState, name: str, k: int, folder: Path) -> list[str]:
    """Write the lists of all users, of an unknown user, and of all items into a folder. Returns the names of the files.

    Lists are those of `freshrec recommend`: the k best items that the user has not seen. Neighbours are those of
    `freshrec similar`. `name` is that of the model.
    """
    frames = {"lists.parquet": _lists_of_users(served, k), "popular.parquet": _list_of_unknown_user(served, k)}
    neighbours = [
        _neighbours(served, model, k).select(pl.lit(part).alias("model"), pl.all())
        for part, model in parts_with_neighbours(served.state.model, name).items()
    ]
    if neighbours:
        frames["neighbours.parquet"] = pl.concat(neighbours)
    for file, frame in frames.items():
        frame.write_parquet(folder / file)
    return list(frames)


def parts_with_neighbours(model: Model, name: str) -> dict[str, Model]:
    """Return the models that know which items are similar, by name: two experts of a blend, or the model itself."""
    if isinstance(model, Blend):
        return {expert: model.experts.counters[expert] for expert in NEIGHBOUR_EXPERTS}
    return {name: model} if isinstance(model, ItemKNN | VectorModel) else {}


def _lists_of_users(served: ServedState, k: int) -> pl.DataFrame:
    """Return one row per user and item: user_id, item_id, rank, score, fallback."""
    request = resolve_request(served, ListRequest(k=k))
    chunks = torch.arange(1, len(served.users) + 1).split(USERS_PER_CHUNK)
    frames = []
    for n, users_N in enumerate(chunks, 1):
        found = top_items(served, users_N, request)
        users = served.users.ids(users_N[column_tensor(found, "nth")]).alias("user_id")
        items = served.items.ids(column_tensor(found)).alias("item_id")
        frames.append(found.select(users, items, "rank", "score", "fallback"))
        report_progress("computing lists", n, len(chunks), f"part {n} of {len(chunks)}")
    return pl.concat(frames)


def _list_of_unknown_user(served: ServedState, k: int) -> pl.DataFrame:
    found = top_items(served, torch.zeros(1, dtype=torch.int64), resolve_request(served, ListRequest(k=k)))
    return found.select(served.items.ids(column_tensor(found)).alias("item_id"), "rank", "score")


def _neighbours(served: ServedState, model: Model, k: int) -> pl.DataFrame:
    """Return one row per pair of items: item_id, similar_id, rank, score."""
    rows_N = torch.arange(1, len(served.items) + 1)
    found = similar_items(replace(served, state=replace(served.state, model=model)), rows_N, k)
    items = served.items.ids(rows_N[column_tensor(found, "nth")]).alias("item_id")
    return found.select(items, served.items.ids(column_tensor(found)).alias("similar_id"), "rank", "score")
