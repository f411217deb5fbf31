"""Reasons for the score of an item: experts of a blend, interests of a user, and past events."""

import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.models.blend.model import Blend, Reason
from freshrec.models.item_knn import ItemKNN
from freshrec.nn.scoring import item_vectors, score_items, user_vectors
from freshrec.recommender.lists import user_batch
from freshrec.recommender.served_state import ServedState
from freshrec.types import Batch, Model, TrainedModel, VectorModel


def explain_item(served: ServedState, users_1: Tensor, item: int) -> pl.DataFrame:
    """Return the reasons for the score of an item row as a frame: source, place, points, because (a row, 0 = unknown).

    `Recommender.explain` describes the columns.
    """
    found = find_reasons(served.current_state.model, user_batch(served, users_1), item)
    schema = {"source": pl.String, "place": pl.Int64, "points": pl.Float64, "because": pl.Int64}
    return pl.DataFrame([tuple(vars(reason).values()) for reason in found], schema, orient="row")


def find_reasons(model: Model, batch: Batch, item: int) -> list[Reason]:
    """Return the reasons for the score of an item, largest contribution first, for a batch of one user.

    An item without a score has no reasons.
    """
    if isinstance(model, Blend):
        return model.explain(batch, item)
    if item > model.n_items:
        return []  # the model has not learned it yet
    if isinstance(model, VectorModel):
        return explain_by_vectors(model, batch, item)
    scores_I = score_items(model, batch, torch.arange(1, model.n_items + 1))[0]
    score = float(scores_I[item - 1])
    if score <= 0 and not isinstance(model, TrainedModel):
        return []  # a counting model has no opinion of it
    rank = 1 + int((scores_I > score).sum())
    if isinstance(model, ItemKNN):
        return [Reason("pairs", rank, score, model.most_influential_item(batch, item))]
    return [Reason("score", rank, score, 0)]


def explain_by_vectors(model: VectorModel, batch: Batch, item: int) -> list[Reason]:
    """h_k e_i for each vector k of the user, with the item's rank by it among all items. The largest is the score.

    Each past item belongs to its nearest user vector. `history_item` is the one most similar to the item among those
    of vector k. Both comparisons use the cosine.
    """
    vectors_KD, vectors_ID = user_vectors(model, batch)[0], item_vectors(model)
    if batch.alive_BK is not None:
        vectors_KD = vectors_KD[batch.alive_BK[0]]
    points_KI = vectors_KD @ vectors_ID[1:].T
    points_K = points_KI[:, item - 1]
    places_K = 1 + (points_KI > points_K[:, None]).sum(1)
    history_T = batch.history_BT[0]
    history_T = history_T[(history_T > 0) & (history_T <= model.n_items)]
    history_TD = F.normalize(vectors_ID[history_T], dim=1)
    similarity_KT = (history_TD @ F.normalize(vectors_ID[item], dim=0)).expand(len(vectors_KD), -1)
    nearest_T = (history_TD @ F.normalize(vectors_KD, dim=1).T).argmax(1)
    similarity_KT = similarity_KT.masked_fill(nearest_T != torch.arange(len(vectors_KD))[:, None], -torch.inf)
    found = []
    for k, (place, points) in enumerate(zip(places_K.tolist(), points_K.tolist())):
        source = "vector" if len(vectors_KD) == 1 else f"interest {k + 1} of {len(vectors_KD)}"
        is_any = bool((nearest_T == k).any())
        found.append(Reason(source, place, points, int(history_T[similarity_KT[k].argmax()]) if is_any else 0))
    return sorted(found, key=lambda reason: -reason.contribution)
