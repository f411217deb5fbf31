"""Scores and vectors of any model: what all vector models share is written here once, over `encode` and `items`."""

from typing import Any, cast

import torch
from torch import Tensor

from freshrec.errors import TrainingError
from freshrec.nn.embedding_table import EmbeddingTable, embed, embedding_matrix
from freshrec.nn.layers import max_inner_product
from freshrec.types import Batch, HistorySpec, Model, ScoringModel, UserVectorModel, VectorModel

LENGTH = 50  # events kept of each user, where the model's options do not say


def score_items(model: Model, batch: Batch, items: Tensor) -> Tensor:
    """Scores (B, N) of `items`, shared (N,) or each row's own (B, N); higher is better.

    Of a vector model max_k h_k e_i, the best inner product of an item's vector with one of the user's.
    """
    if isinstance(model, ScoringModel):
        scores_BN = model.score(batch, items)
        if scores_BN.shape != (len(batch), items.shape[-1]) or not scores_BN.is_floating_point():
            raise _wrong_tensor(model, "score", scores_BN, f"({len(batch)}, {items.shape[-1]})")
        return scores_BN
    vector_model = cast(VectorModel, model)
    return max_inner_product(user_vectors(vector_model, batch), embed(item_table(vector_model), items))


def user_vectors(model: VectorModel, batch: Batch) -> Tensor:
    """(B, K, D) the users' vectors, without gradients: the model's own, or those it encodes from the item vectors."""
    table = item_table(model)
    if isinstance(model, UserVectorModel):
        vectors_BKD, method = model.user_vectors(batch), "user_vectors"
    else:
        with torch.no_grad():
            vectors_BKD, method = model.encode(embed(table, batch.history_BT), batch), "encode"
    if torch.compiler.is_exporting():  # a comparison of sizes would make the exported network one for this many users
        return vectors_BKD
    if vectors_BKD.ndim != 3 or vectors_BKD.shape[::2] != (len(batch), table.n_dims):
        raise _wrong_tensor(model, method, vectors_BKD, f"({len(batch)}, K, {table.n_dims})")
    return vectors_BKD


def _wrong_tensor(model: Model, method: str, found: Tensor, shape: str) -> TrainingError:
    return TrainingError(
        f"{type(model).__name__}.{method} returned a tensor of shape {tuple(found.shape)} and {found.dtype}; it must "
        f"be of shape {shape} and of floats."
    )


def item_vectors(model: VectorModel) -> Tensor:
    """(n_items + 1, D) the vectors of all items; row 0 is padding."""
    return embedding_matrix(item_table(model))


def item_table(model: VectorModel) -> EmbeddingTable:
    """The table of the item vectors.

    It is not a member of the protocols: from Python 3.12 on, `isinstance` does not see the parts of an `nn.Module`.
    """
    table: EmbeddingTable = cast(Any, model).items
    return table


def history_length(model: Model) -> int:
    """How many of a user's last events are kept for the model to read."""
    return model.spec.length if isinstance(model.spec, HistorySpec) else LENGTH
