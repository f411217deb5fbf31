"""Scores and vectors of any model. Vector models need only `encode` and `items`; the rest is computed here."""

from typing import Any, cast

import torch
from torch import Tensor

from freshrec.errors import TrainingError
from freshrec.nn.embedding_table import EmbeddingTable, embed, embedding_matrix
from freshrec.nn.layers import max_inner_product
from freshrec.types import Batch, HistorySpec, Model, ScoringModel, UserVectorModel, VectorModel

LENGTH = 50  # events that are kept per user, if the model's options have no `length`


def score_items(model: Model, batch: Batch, items: Tensor) -> Tensor:
    """Return the scores (B, N) of `items`, which are shared by all rows (N,) or given per row (B, N).

    Higher is better. The score of a vector model is max_k h_k e_i, the largest inner product of the item's vector and a
    vector of the user. Raises TrainingError if the model's own scores have a wrong shape or type.
    """
    if isinstance(model, ScoringModel):
        scores_BN = model.score(batch, items)
        if scores_BN.shape != (len(batch), items.shape[-1]) or not scores_BN.is_floating_point():
            raise _wrong_tensor(model, "score", scores_BN, f"({len(batch)}, {items.shape[-1]})")
        return scores_BN
    vector_model = cast(VectorModel, model)
    return max_inner_product(user_vectors(vector_model, batch), embed(item_table(vector_model), items))


def user_vectors(model: VectorModel, batch: Batch) -> Tensor:
    """Return the user vectors (B, K, D), without gradients, by the model's `user_vectors` or else by its `encode`.

    Raises TrainingError if they have a wrong shape.
    """
    table = item_table(model)
    if isinstance(model, UserVectorModel):
        vectors_BKD, method = model.user_vectors(batch), "user_vectors"
    else:
        with torch.no_grad():
            vectors_BKD, method = model.encode(embed(table, batch.history_BT), batch), "encode"
    if torch.compiler.is_exporting():  # a check of the shape would fix the number of users in the exported network
        return vectors_BKD
    if vectors_BKD.ndim != 3 or vectors_BKD.shape[::2] != (len(batch), table.n_dims):
        raise _wrong_tensor(model, method, vectors_BKD, f"({len(batch)}, K, {table.n_dims})")
    return vectors_BKD


def _wrong_tensor(model: Model, method: str, found: Tensor, shape: str) -> TrainingError:
    return TrainingError(
        f"{type(model).__name__}.{method} returned a tensor of shape {tuple(found.shape)} and type {found.dtype}. "
        f"Return floats of shape {shape}."
    )


def item_vectors(model: VectorModel) -> Tensor:
    """Return the vectors of all items, shape (n_items + 1, D). Row 0 is padding."""
    return embedding_matrix(item_table(model))


def item_table(model: VectorModel) -> EmbeddingTable:
    """Return the table of the item vectors.

    The protocols do not contain it: from Python 3.12 on, `isinstance` does not see the parts of an `nn.Module`.
    """
    table: EmbeddingTable = cast(Any, model).items
    return table


def history_length(model: Model) -> int:
    """Return the number of most recent events per user that are kept for the model."""
    return model.spec.length if isinstance(model.spec, HistorySpec) else LENGTH
