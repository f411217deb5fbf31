"""Why a user is offered an item: by which expert of a blend, by which interest, for which past event."""

import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.errors import IncompatibleError
from freshrec.models.blend.model import Blend, Reason
from freshrec.models.item_knn import ItemKNN
from freshrec.nn.scoring import item_vectors, score_items, user_vectors
from freshrec.recommender.lists import user_batch
from freshrec.recommender.served_state import ServedState
from freshrec.types import Batch, VectorModel


def explain_item(served: ServedState, users_1: Tensor, item: int) -> pl.DataFrame:
    """Why one user is offered an item, rows both: source, place, points, because (a row, 0: not known)."""
    model, batch = served.current_state.model, user_batch(served, users_1)
    if isinstance(model, Blend):
        found = model.explain(batch, item)
    elif item > model.n_items:
        found = []  # so new that it has not been learnt yet
    elif isinstance(model, VectorModel):
        found = explain_by_vectors(model, batch, item)
    elif isinstance(model, ItemKNN):
        found = _explain_by_item_knn(model, batch, item)
    else:
        raise IncompatibleError("this model cannot explain itself; use the blend, item-knn, or a model with vectors.")
    schema = {"source": pl.String, "place": pl.Int64, "points": pl.Float64, "because": pl.Int64}
    return pl.DataFrame([tuple(vars(reason).values()) for reason in found], schema, orient="row")


def explain_by_vectors(model: VectorModel, batch: Batch, item: int) -> list[Reason]:
    """What each vector of a user says for an item: h_k e_i, and its place among all items; the largest is the score.

    `because` is, of the past items that are nearest to this vector of all the user's, the one most like the item, all
    by cosine.
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


def _explain_by_item_knn(model: ItemKNN, batch: Batch, item: int) -> list[Reason]:
    """The one reason of a pair counter; none where it has nothing to say for the item."""
    scores_I = score_items(model, batch, torch.arange(1, model.n_items + 1))[0]
    points = float(scores_I[item - 1])
    place = 1 + int((scores_I > points).sum())
    return [Reason("pairs", place, points, model.most_influential_item(batch, item))] if points > 0 else []
