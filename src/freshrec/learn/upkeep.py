"""What stored interests may cost: unused ones are retired, the closest ones merged under a budget, vectors halved."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.config import CountOrNone, Weight, check_options
from freshrec.data.batches import in_parts, interests_where, owners
from freshrec.learn.interests import costs_of
from freshrec.types import Interests, State

AT_ONCE = 8192  # users whose pairs of interests are compared at a time


@dataclass(frozen=True)
class Upkeep:
    """What is done to all stored interests after an update; nothing unless asked for.

    Interests only ever grow in number: the paper drops new ones, never old ones. `retire` drops those that have been no
    new event's closest one for so many spans, counted from the last span in which the user was seen: who stays away
    loses nothing. `megabytes` merges the most similar pairs within a user until all interests together fit, but leaves
    everybody one. `half` stores numbers of 16 bits; whatever is computed with them has 32.
    """

    retire: CountOrNone = 0  # spans; 0: never
    megabytes: Weight = 0.0  # 0: no limit
    half: bool = False

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(self, state: State) -> State:
        """`state` with its users' interests so kept."""
        users, ordered = state.users, state.model.ordered
        assert users is not None
        if self.retire:
            users = retired(users, self.retire, ordered)
        if self.megabytes:
            each = (2 if self.half else 4) * users.vectors_SD.shape[1] + users.born_S.itemsize + users.used_S.itemsize
            users = merged(users, int(self.megabytes * 1e6 / each), ordered)
        if self.half:
            users = replace(users, vectors_SD=users.vectors_SD.half())
        return replace(state, users=users, costs=state.costs | costs_of(users))


def retired(users: Interests, n_spans: int, ordered: bool) -> Interests:
    """`users` without the interests last used `n_spans` or more before their user's latest used one.

    `ordered` ones go only from the end: see `InterestModel.ordered`.
    """
    owner_S = owners(users)
    latest_U = torch.zeros(users.n_users + 1, dtype=torch.int16)
    latest_U.scatter_reduce_(0, owner_S, users.used_S, "amax")
    stays_S = latest_U[owner_S] - users.used_S < n_spans
    if ordered:
        rows_S = torch.arange(len(owner_S))
        last_U = torch.zeros(users.n_users + 1, dtype=torch.int64)
        last_U.scatter_reduce_(0, owner_S[stays_S], rows_S[stays_S], "amax")
        stays_S = rows_S <= last_U[owner_S]
    return interests_where(users, stays_S)


def merged(users: Interests, n_most: int, ordered: bool) -> Interests:
    """`users` with the most similar pairs of one user's interests averaged, until `n_most` are left or one each.

    An average is as old as its older part and was used when either was. Of `ordered` ones the last goes into another.
    """
    while (n_over := len(users.vectors_SD) - n_most) > 0:
        several_N = (users.offsets_U.diff() > 1).nonzero()[:, 0]
        if not len(several_N):
            break
        pairs = [_closest_pairs(users, some_N, ordered) for some_N in in_parts(several_N, AT_ONCE)]
        into_N, from_N, cosine_N = (torch.cat(columns) for columns in zip(*pairs))
        most_N = cosine_N.argsort(descending=True, stable=True)[:n_over]
        into_N, from_N = into_N[most_N], from_N[most_N]
        vectors_SD, born_S, used_S = users.vectors_SD.clone(), users.born_S.clone(), users.used_S.clone()
        vectors_SD[into_N] = (vectors_SD[into_N] + vectors_SD[from_N]) / 2
        born_S[into_N] = torch.minimum(born_S[into_N], born_S[from_N])
        used_S[into_N] = torch.maximum(used_S[into_N], used_S[from_N])
        stays_S = torch.ones(len(born_S), dtype=torch.bool)
        stays_S[from_N] = False
        users = interests_where(Interests(vectors_SD, users.offsets_U, born_S, used_S), stays_S)
    return users


def _closest_pairs(users: Interests, users_N: Tensor, ordered: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The rows (N,) and (N,) of each user's two most similar interests, the later one second, and their cosine."""
    start_N = users.offsets_U[users_N]
    n_N = users.offsets_U[users_N + 1] - start_N
    slot_K = torch.arange(int(n_N.max()))
    alive_NK = slot_K < n_N[:, None]
    vectors_NKD = users.vectors_SD[torch.where(alive_NK, start_N[:, None] + slot_K, start_N[:, None])]
    vectors_NKD = F.normalize(vectors_NKD.float(), dim=2)
    cosine_NKK = torch.bmm(vectors_NKD, vectors_NKD.transpose(1, 2))
    pairs_NKK = (slot_K[:, None] < slot_K) & alive_NK[:, None]
    if ordered:
        pairs_NKK = pairs_NKK & (slot_K == n_N[:, None, None] - 1)
    best = cosine_NKK.masked_fill(~pairs_NKK, -torch.inf).flatten(1).max(1)
    n_slots = len(slot_K)
    return start_N + best.indices // n_slots, start_N + best.indices % n_slots, best.values
