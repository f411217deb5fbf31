"""Each user's stored interests, attached to the batches of a multi-interest model."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from freshrec.types import Batch, InterestModel, Interests, Model

NOT_YET_BORN = torch.iinfo(torch.int32).max  # span of creation of interests that no update has stored yet


def pad_interests(interests: Interests, users_B: Tensor, initial_KD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the interests of some users: vectors (B, K, D), alive (B, K) and span of creation (B, K).

    K is the largest number of interests in the batch. New users get `initial_KD`, created in span NOT_YET_BORN.
    """
    known_B = torch.where(users_B <= interests.n_users, users_B, 0)
    start_B = interests.offsets_U[known_B]
    n_B = interests.offsets_U[known_B + 1] - start_B
    is_new_B = n_B == 0
    n_B = torch.where(is_new_B, len(initial_KD), n_B)
    index_K = torch.arange(int(n_B.max()) if len(n_B) else 1)
    alive_BK = index_K < n_B[:, None]
    stored_BK = alive_BK & ~is_new_B[:, None]
    row_BK = torch.where(stored_BK, start_B[:, None] + index_K, 0)
    vectors_BKD = torch.zeros(*alive_BK.shape, initial_KD.shape[1])
    born_BK = torch.full(alive_BK.shape, NOT_YET_BORN, dtype=torch.int32)
    if len(interests.vectors_SD):
        vectors_BKD = interests.vectors_SD[row_BK].float() * stored_BK[..., None]
        born_BK = torch.where(stored_BK, interests.born_S[row_BK], born_BK)
    if bool(is_new_B.any()):
        vectors_BKD[is_new_B, : len(initial_KD)] = initial_KD
    return vectors_BKD, alive_BK, born_BK


@dataclass(frozen=True)
class StoredInterests:
    """Additional input of a multi-interest model: stored interests, initial interests of new users, current span."""

    interests: Interests
    initial_KD: Tensor
    span: int

    def attach(self, batch: Batch) -> Batch:
        """Add the interests of each user to `batch`: vectors, which are alive, which are older than this span."""
        vectors_BKD, alive_BK, born_BK = pad_interests(self.interests, batch.users_B, self.initial_KD)
        return replace(batch, interests_BKD=vectors_BKD, alive_BK=alive_BK, old_BK=born_BK < self.span)

    def interest_counts(self, users_N: Tensor) -> Tensor:
        """Number of interests of each user, shape (N,)."""
        known_N = torch.where(users_N <= self.interests.n_users, users_N, 0)
        n_N = self.interests.offsets_U[known_N + 1] - self.interests.offsets_U[known_N]
        return torch.where(n_N == 0, len(self.initial_KD), n_N)


def stored_interests_of(model: Model, interests: Interests | None, span: int) -> StoredInterests | None:
    """Return the stored interests for batches of a multi-interest model; None for other models."""
    if not isinstance(model, InterestModel):
        return None
    interests = Interests.empty(model.spec.d) if interests is None else interests
    return StoredInterests(interests, model.initial_interests(model.spec.k), span)
