"""Functions that several models share: squash, label-aware attention, losses, and inner products."""

import torch
import torch.nn.functional as F
from torch import Tensor

from freshrec.types import Batch

MASKED = -1e9  # logit that the softmax turns into 0


def squash(s: Tensor) -> Tensor:
    """s ||s|| / (1 + ||s||^2): same direction, norm below 1, finite gradient at 0."""
    n2 = (s * s).sum(-1, keepdim=True)
    return s * (n2 / (1 + n2) / (n2 + 1e-9).sqrt())


def has_vector(items_BTD: Tensor, history_BT: Tensor) -> Tensor:
    """Whether each position of the history has an item with a nonzero vector, shape (B, T)."""
    return (history_BT > 0) & (items_BTD != 0).any(2)


def attend(vectors_BKD: Tensor, target_BD: Tensor, alive_BK: Tensor | None, mode: str, power: float = 1.0) -> Tensor:
    """v = sum_k beta_k h_k, with beta = softmax of e_a h_k over the interests of a user [IMSR eq. 5].

    `mode`: "soft" is the equation, with sign(x) |x|^power instead of each logit x (p in MIND). "hard" returns the
    interest closest to the target.
    """
    logits_BK = torch.bmm(vectors_BKD, target_BD[..., None])[..., 0]
    if alive_BK is not None:
        logits_BK = logits_BK.masked_fill(~alive_BK, MASKED)
    if mode == "hard":
        closest_B1D = logits_BK.argmax(1)[:, None, None].expand(-1, 1, vectors_BKD.shape[2])
        return vectors_BKD.gather(1, closest_B1D)[:, 0]
    if power != 1.0:
        logits_BK = torch.where(logits_BK > MASKED, logits_BK.sign() * logits_BK.abs() ** power, logits_BK)
    return torch.bmm(torch.softmax(logits_BK, -1)[:, None], vectors_BKD)[:, 0]


def sampled_logits(
    user_BD: Tensor, target_BD: Tensor, negatives_ND: Tensor, target_B: Tensor, negative_N: Tensor
) -> Tensor:
    """v e_a of the target, then v e_i of the negatives, (B, 1 + N). A negative that is the target is MASKED."""
    negative_BN = (user_BD @ negatives_ND.t()).masked_fill_(target_B[:, None] == negative_N[None], MASKED)
    positive_B1 = (user_BD * target_BD).sum(-1, keepdim=True)
    return torch.cat([positive_B1, negative_BN], 1)


def sampled_softmax_loss(logits_BN: Tensor) -> Tensor:
    """-log softmax of the first logit, mean over the batch [IMSR eq. 6].

    Differs from the paper: it has a minus sign, and the target is in the denominator. Otherwise the loss has no lower
    bound.
    """
    return F.cross_entropy(logits_BN, torch.zeros(len(logits_BN), dtype=torch.int64))


def bce_loss(logits_BN: Tensor) -> Tensor:
    """Mean of -ln sigma(z) of the first logit, plus mean of -ln(1 - sigma(z)) of the others that are not MASKED."""
    n_others = (logits_BN[:, 1:] > MASKED).sum().clamp(min=1)
    return F.softplus(-logits_BN[:, 0]).mean() + F.softplus(logits_BN[:, 1:]).sum() / n_others


def max_inner_product(vectors_BKD: Tensor, items_ND: Tensor) -> Tensor:
    """max_k h_k e_i, shape (B, N), of items (N, D), shared by all rows, or (B, N, D)."""
    if items_ND.dim() == 3:
        return torch.bmm(vectors_BKD, items_ND.transpose(1, 2)).amax(1)
    n_users, n_interests, _ = vectors_BKD.shape
    return (vectors_BKD.flatten(0, 1) @ items_ND.t()).view(n_users, n_interests, -1).amax(1)


def labelled_candidates(batch: Batch, n_items: int) -> tuple[Tensor, Tensor]:
    """Return the items and labels (B, N) that a click model is trained on.

    With labels in the log, each row has its target only. Without labels, it has the target as 1 and a random item as 0.
    """
    assert batch.targets_BT is not None and batch.negatives_N is not None
    target_B1 = batch.targets_BT[:, :1]
    if batch.labels_B is not None:
        return target_B1, batch.labels_B[:, None]
    negative_B1 = batch.negatives_N[torch.arange(len(batch)) % len(batch.negatives_N), None]
    alternative_B1 = negative_B1 % n_items + 1  # the next item, if the random one is the target
    negative_B1 = torch.where(negative_B1 == target_B1, alternative_B1, negative_B1)
    return torch.cat([target_B1, negative_B1], 1), torch.tensor([1.0, 0.0]).expand(len(batch), 2)
