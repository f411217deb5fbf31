"""What travels with the batches of an interest model: each user's stored interests."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from freshrec.types import Batch, InterestModel, Interests, Model


def pad_interests(interests: Interests, users_B: Tensor, initial_KD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stored interests of some users: (B, K, D) vectors, (B, K) alive, (B, K) birth span; newcomers get `initial_KD`.

    K is the largest number of interests in the batch. A newcomer's interests count as born in span 32767: not yet.
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
    born_BK = torch.full(alive_BK.shape, 32767, dtype=torch.int16)
    if len(interests.vectors_SD):
        vectors_BKD = interests.vectors_SD[row_BK].float() * stored_BK[..., None]
        born_BK = torch.where(stored_BK, interests.born_S[row_BK], born_BK)
    if bool(is_new_B.any()):
        vectors_BKD[is_new_B, : len(initial_KD)] = initial_KD
    return vectors_BKD, alive_BK, born_BK


@dataclass(frozen=True)
class StoredInterests:
    """What travels with a batch of an interest model: stored interests, those of newcomers, the span being learnt."""

    interests: Interests
    initial_KD: Tensor
    span: int

    def attach(self, batch: Batch) -> Batch:
        """`batch` with each user's interests: which are alive, which are older than this span."""
        vectors_BKD, alive_BK, born_BK = pad_interests(self.interests, batch.users_B, self.initial_KD)
        return replace(batch, interests_BKD=vectors_BKD, alive_BK=alive_BK, old_BK=born_BK < self.span)

    def interest_counts(self, users_N: Tensor) -> Tensor:
        """How many interests each user has (N,)."""
        known_N = torch.where(users_N <= self.interests.n_users, users_N, 0)
        n_N = self.interests.offsets_U[known_N + 1] - self.interests.offsets_U[known_N]
        return torch.where(n_N == 0, len(self.initial_KD), n_N)


def stored_interests_of(model: Model, interests: Interests | None, span: int) -> StoredInterests | None:
    """What travels with the batches of an interest model; None for other models."""
    if not isinstance(model, InterestModel):
        return None
    interests = Interests.empty(model.spec.d) if interests is None else interests
    return StoredInterests(interests, model.initial_interests(model.spec.k), span)
