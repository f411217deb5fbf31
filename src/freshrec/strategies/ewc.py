"""EWC: fine-tuning with a penalty on leaving the previous weights, in proportion to their Fisher information.

Symbols of the paper: F_i -> fisher, theta -> weights, theta*_A -> anchor (the previous model), lambda -> weight.
"""

import time
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from freshrec.config import Count, Weight, check_options
from freshrec.data.batches import Targets, due_targets, split_chunks
from freshrec.data.stored_interests import StoredInterests, stored_interests_of
from freshrec.device import permutation
from freshrec.learn.exemplars import exemplar_batch, trainable_targets
from freshrec.learn.fit import CostMeter, FitConfig, finish_update, fit_base_block, fit_model, grown_copy
from freshrec.learn.reservoir import TrainingSamples, copy_samples, sample_history_length
from freshrec.learn.weights import Weights, copy_weights
from freshrec.nn.embedding_table import embed, embedding_tables
from freshrec.nn.layers import max_inner_product
from freshrec.nn.scoring import item_table, item_vectors, user_vectors
from freshrec.random_streams import stream
from freshrec.types import Batch, EncodingModel, Forward, LossTerm, Span, State

SAMPLE_BLOCK = 32  # samples whose gradients are in memory at the same time


def penalty(weights: Tensor, anchor: Tensor, fisher: Tensor, weight: float) -> Tensor:
    """sum_i lambda / 2 F_i (theta_i - theta*_i)^2 [EWC eq. 3]."""
    return weight / 2 * (fisher * (weights - anchor) ** 2).sum()


def penalty_term(model: EncodingModel, anchor: EncodingModel, fisher: Weights, weight: float) -> LossTerm:
    """Return the loss term that keeps `model` near `anchor`.

    It covers all dense weights, and the table rows that the step changes. Rows without Fisher information are free.
    """
    tables, dense = embedding_tables(model), dict(model.named_parameters())
    anchor_tables, anchor_dense = embedding_tables(anchor), {n: w.detach() for n, w in anchor.named_parameters()}

    def term(batch: Batch, forward: Forward) -> Tensor:
        total = torch.zeros(())
        for name, weights in dense.items():
            total = total + penalty(weights, anchor_dense[name], fisher[name], weight)
        for name, table in tables.items():
            ids_N, rows_ND = table.step_rows()
            old_N = (ids_N < len(fisher[name])).nonzero()[:, 0]
            ids_N, rows_ND = ids_N[old_N], rows_ND[old_N]
            total = total + penalty(rows_ND, anchor_tables[name].weights[ids_N], fisher[name][ids_N], weight)
        return total

    return term


def empirical_fisher(
    model: EncodingModel, samples: TrainingSamples, stored_interests: StoredInterests | None
) -> Weights:
    """F_j = mean over samples of (d -ln p(y | x) / d theta_j)^2 for true targets y: the empirical Fisher diagonal.

    p is the softmax of the scores of all known items. j runs over all dense weights and all rows of the tables.
    """
    squares_by_name = {name: torch.zeros_like(weights) for name, weights in copy_weights(model).items()}
    n_interests_N = torch.ones(len(samples), dtype=torch.int64)
    if stored_interests is not None:
        n_interests_N = stored_interests.interest_counts(samples.users_N)
    for k in n_interests_N.unique():  # all users of a batch have equally many interests
        for index in split_chunks((n_interests_N == k).nonzero()[:, 0], SAMPLE_BLOCK):
            batch = exemplar_batch(samples, index, model, stored_interests)
            batch = Batch(batch.users_B, batch.history_BT, samples.items_N[index][:, None], None, batch.interests_BKD)
            _add_squared_gradients(squares_by_name, model, batch)
    return {name: squares / max(len(samples), 1) for name, squares in squares_by_name.items()}


def _add_squared_gradients(total: Weights, model: EncodingModel, batch: Batch) -> None:
    """Add each sample's squared gradients to `total`. B samples, I items without the padding.

    The gradient of an item row has two parts: (p - y) v from its score, and one from its positions in the history. So
    no tensor of shape (B, I, D) is needed.
    """
    assert batch.targets_BT is not None
    items_ID, item_B1 = item_vectors(model)[1 : model.n_items + 1], batch.targets_BT - 1
    vectors_BKD = user_vectors(model, batch)
    score_BKI = vectors_BKD @ items_ID.t()
    score_BI, best_BI = score_BKI.max(1)
    error_BI = torch.softmax(score_BI, 1).scatter_add_(1, item_B1, torch.full(item_B1.shape, -1.0))
    is_best_BKI = best_BI[:, None] == torch.arange(vectors_BKD.shape[1])[:, None]
    squares_BKI = error_BI.square()[:, None] * is_best_BKI
    total["items"][1 : model.n_items + 1] += squares_BKI.flatten(0, 1).t() @ vectors_BKD.square().flatten(0, 1)

    dense: Weights = {}
    if model.batch_format == "pair":  # the user's vector is a row of a table
        total["users"].index_add_(0, batch.users_B, (error_BI @ items_ID).square())
        history_BTD = torch.zeros(*batch.history_BT.shape, items_ID.shape[1])
    else:
        dense, history_BTD = _per_sample_gradients(model, batch)
    if "items.common" in total:
        error_BKI = error_BI[:, None] * is_best_BKI
        total["items.common"] += _category_squared_gradients(
            model, batch.history_BT, history_BTD, error_BKI, vectors_BKD
        )
    for name, gradient in dense.items():
        total[name] += gradient.square().sum(0)
    rows, places = (batch.history_BT > 0).nonzero(as_tuple=True)
    pair_P, nth_P = torch.unique(rows * (model.n_items + 1) + batch.history_BT[rows, places], return_inverse=True)
    inner_PD = torch.zeros(len(pair_P), items_ID.shape[1]).index_add_(0, nth_P, history_BTD[rows, places])
    user_P, item_P = pair_P // (model.n_items + 1), pair_P % (model.n_items + 1)
    outer_PD = error_BI[user_P, item_P - 1, None] * vectors_BKD[user_P, best_BI[user_P, item_P - 1]]
    total["items"].index_add_(0, item_P, inner_PD * (inner_PD + 2 * outer_PD))  # (a + b)^2 = a^2 + b (b + 2 a)


def _category_squared_gradients(
    model: EncodingModel, history_BT: Tensor, history_BTD: Tensor, error_BKI: Tensor, vectors_BKD: Tensor
) -> Tensor:
    """Sum over samples of the squared gradients of each category's vector, shape (C, D)."""
    items = item_table(model)
    assert items.common is not None
    categories_R = items.kinds_R
    by_category_BKC = torch.zeros(*error_BKI.shape[:2], len(items.common.packed))
    by_category_BKC.index_add_(2, categories_R[1 : model.n_items + 1], error_BKI)
    gradient_BCD = by_category_BKC.transpose(1, 2) @ vectors_BKD
    places = torch.arange(len(history_BT))[:, None].expand_as(history_BT), categories_R[history_BT]
    gradient_BCD.index_put_(places, history_BTD, accumulate=True)
    squares_CD: Tensor = gradient_BCD.square().sum(0)
    squares_CD[0] = 0.0
    return squares_CD


class EncoderModule(nn.Module):
    """A module whose forward pass is the `encode` of a model, so that it can be called with other weights."""

    def __init__(self, model: EncodingModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, items_BTD: Tensor, batch: Batch) -> Tensor:
        """User vectors, shape (B, K, D)."""
        return self.model.encode(items_BTD, batch)


def _per_sample_gradients(model: EncodingModel, batch: Batch) -> tuple[Weights, Tensor]:
    """Gradients of each sample's -ln p: by each dense weight (B, ...), and by the vectors of its history (B, T, D)."""
    assert batch.targets_BT is not None
    items_ID, encoder = item_vectors(model)[1 : model.n_items + 1], EncoderModule(model)
    dense = {f"model.{name}": weights.detach() for name, weights in model.named_parameters()}

    def loss(
        dense: Weights, items_TD: Tensor, user: Tensor, history_T: Tensor, interests_KD: Tensor | None, item_1: Tensor
    ) -> Tensor:
        stored_1KD = None if interests_KD is None else interests_KD[None]
        single_batch = Batch(user[None], history_T[None], interests_BKD=stored_1KD)
        vectors_1KD = functional_call(encoder, dense, (items_TD[None], single_batch))
        score_I = max_inner_product(vectors_1KD, items_ID)[0]
        return torch.logsumexp(score_I, 0) - score_I.gather(0, item_1 - 1)[0]

    interests_dim = None if batch.interests_BKD is None else 0
    per_sample_gradient = vmap(partial(grad(loss, (0, 1)), dense), in_dims=(0, 0, 0, interests_dim, 0))
    history_BTD = embed(item_table(model), batch.history_BT)
    with sdpa_kernel(SDPBackend.MATH):  # fused kernels do not support vmap
        by_dense, by_items_BTD = per_sample_gradient(
            history_BTD, batch.users_B, batch.history_BT, batch.interests_BKD, batch.targets_BT
        )
    return {name.removeprefix("model."): gradient for name, gradient in by_dense.items()}, by_items_BTD


@dataclass(frozen=True)
class EWC:
    """Fine-tuning with a quadratic penalty on leaving the previous weights. The only anchor is the previous model.

    The Fisher information is a mean over samples, so `weight` has to be large. Differs from ADER's comparison: the
    samples are drawn from the span's targets, because EWC keeps no exemplars.
    """

    weight: Weight = 1000.0  # Weight of the penalty. 0 = fine-tuning.
    samples: Count = 1000  # Number of targets that the Fisher information is estimated from.
    fit: FitConfig = FitConfig()  # Training options of the model.

    def __post_init__(self) -> None:
        check_options(self)

    def update(self, state: State, span: Span) -> State:
        """Train with the penalty, then estimate the Fisher information of the new model."""
        targets = due_targets(state.histories, self.fit.history)
        if state.spans_seen == 0:
            return self._update_fisher(fit_base_block(state, span, self.fit), targets, None, span.index)
        model = grown_copy(state, span)
        assert isinstance(model, EncodingModel)
        stored_interests = stored_interests_of(model, state.interests, span.index)
        meter = CostMeter({"rows_read": float(len(targets))})
        terms = [penalty_term(model, state.model, state.memory, self.weight)] if self.weight else []
        fit_model(
            model, targets, self.fit, (state.seed, span.index), meter, stored_interests=stored_interests, terms=terms
        )
        after = finish_update(state, model, stored_interests, self.fit.history, meter)
        return self._update_fisher(after, targets, state.memory, span.index)

    def _update_fisher(self, after: State, targets: Targets, before: Weights | None, span: int) -> State:
        """Return `after` with the Fisher information of its model. Without targets, the previous one is kept."""
        started_at, meter = time.process_time(), CostMeter(dict(after.costs))
        length = sample_history_length(after.model)
        targets = trainable_targets(targets, length)
        drawn_N = permutation(len(targets), stream(after.seed, "fisher sample", span))[: self.samples]
        stored_interests = stored_interests_of(after.model, after.interests, after.spans_seen)
        fisher = before
        if len(targets) or before is None:
            fisher = empirical_fisher(after.model, copy_samples(targets[drawn_N], length), stored_interests)
        meter.add_time("fisher_cpu_s", started_at)
        return replace(after, memory=fisher, costs=dict(meter.costs))
