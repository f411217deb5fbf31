"""Networks that make a model's weights out of the weights of its predecessors: a recurrent one and a weighted mean.

Each tensor of a model is seen as a matrix (N, P): P slots, each with a small network of its own that its N rows share.
A table has a slot per dimension. A small dense tensor has a slot per scalar and one row; a large one is cut like a
table, along its last axis. Dimension letters here: N rows, P slots, H hidden, G = 3 H gates, M models. Rows come last
in flight: 5 x faster than the hidden units last.
Symbols of the paper: theta -> theta_PN, h_i -> h_PHN, W_z, W_r, W_h -> u_PG (what they do to theta) and W_PGH (what
they do to h), alpha_i -> softmax of logits_PM, lambda_i -> shares.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from freshrec.device import uniform
from freshrec.learn.weights import Parametrization, Weights
from freshrec.nn.embedding_table import embedding_tables
from freshrec.random_streams import stream
from freshrec.types import TrainedModel

CHUNK_ROWS = 8192  # rows of a table generated at a time


def gru_step(theta_PN: Tensor, h_PHN: Tensor, u_PG: Tensor, W_PGH: Tensor) -> Tensor:
    """h' = (1 - z) h + z tanh(W_h [r h, theta]), z = sigma(W_z [h, theta]), r = sigma(W_r [h, theta]) [ASMG eq. gru].

    No biases; r acts before the product and z weighs the new state, so `torch.nn.GRUCell` is another function.
    """
    n = h_PHN.shape[1]
    input_PGN = theta_PN[:, None] * u_PG[..., None]
    gates = torch.sigmoid(torch.baddbmm(input_PGN[:, : 2 * n], W_PGH[:, : 2 * n], h_PHN))
    z_PHN, r_PHN = gates.split(n, 1)
    new_PHN = torch.tanh(torch.baddbmm(input_PGN[:, 2 * n :], W_PGH[:, 2 * n :], r_PHN * h_PHN))
    return torch.lerp(h_PHN, new_PHN, z_PHN)


def readout(h_PHN: Tensor, v_PH: Tensor, b_P: Tensor) -> Tensor:
    """theta* = W h + b, (P, N) [ASMG eq. output]."""
    return torch.baddbmm(b_P[:, None, None], v_PH[:, None], h_PHN)[:, 0]


def weighted_mean(models: Sequence[Tensor], logits_PM: Tensor) -> Tensor:
    """Theta* = sum_i alpha_i Theta_i over (N, P) matrices, alpha = softmax over the models [ASMG eq. linear].

    The logits belong to positions, the newest model last; fewer models take the last ones.
    """
    alpha_PM = torch.softmax(logits_PM[:, -len(models) :], 1)
    return (torch.stack(list(models), 2) * alpha_PM).sum(2)


def loss_weights(n: int, form: Literal["linear", "uniform", "last", "exponential"]) -> list[float]:
    """lambda_j = j / sum_j' j', j = 1..n: how much each of n terms of the loss counts [ASMG eq. lambda].

    `form`: "linear" as printed; "uniform", 1 / n each; "last", the newest alone; "exponential", e^j.
    """
    unnormalized = {
        "linear": [float(j) for j in range(1, n + 1)],
        "uniform": [1.0] * n,
        "last": [0.0] * (n - 1) + [1.0],
        "exponential": [math.exp(j - n) for j in range(1, n + 1)],
    }[form]
    return [x / sum(unnormalized) for x in unnormalized]


@dataclass(frozen=True)
class GRUGenerator:
    """The recurrent network of each slot of one tensor."""

    u_PG: Tensor  # gates z, r, and the new state side by side
    W_PGH: Tensor
    v_PH: Tensor
    b_P: Tensor
    residual: bool  # add the newest model's own weights

    @property
    def n_slots(self) -> int:
        """P"""
        return len(self.b_P)

    @staticmethod
    def initial(n_slots: int, h: int, residual: bool, rng: torch.Generator) -> "GRUGenerator":
        """Uniform in +-sqrt(6 / (P (fan_in + fan_out))), as the authors' framework starts 3-D tensors.

        A residual one starts with v = b = 0: it returns the newest model.
        """

        def glorot(*shape: int, fans: int) -> Tensor:
            return (2 * uniform(shape, rng) - 1) * math.sqrt(6 / (n_slots * fans))

        u_PG, W_PGH = glorot(n_slots, 3 * h, fans=1 + h), glorot(n_slots, 3 * h, h, fans=2 * h)
        v_PH, b_P = glorot(n_slots, h, fans=h + 1), glorot(n_slots, fans=2)
        output_scale = 0.0 if residual else 1.0
        return GRUGenerator(u_PG, W_PGH, v_PH * output_scale, b_P * output_scale, residual)

    def __call__(self, models: Sequence[Tensor], hidden_NPH: Tensor | None) -> Tensor:
        """(N, P) weights from those of the models, the oldest first; the state before them is 0 unless given."""
        out_NP = readout(self.hidden_state(models, hidden_NPH), self.v_PH, self.b_P).t()
        return models[-1] + out_NP if self.residual else out_NP

    def hidden_state(self, models: Sequence[Tensor], hidden_NPH: Tensor | None) -> Tensor:
        """(P, H, N) the state after the models."""
        if hidden_NPH is None:
            h_PHN = torch.zeros(*self.v_PH.shape, len(models[0]))
        else:
            h_PHN = hidden_NPH.permute(1, 2, 0).contiguous()
        for theta_NP in models:
            h_PHN = gru_step(theta_NP.t().contiguous(), h_PHN, self.u_PG, self.W_PGH)
        return h_PHN

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> "GRUGenerator":
        """With every tensor changed."""
        return GRUGenerator(change(self.u_PG), change(self.W_PGH), change(self.v_PH), change(self.b_P), self.residual)


@dataclass(frozen=True)
class MeanGenerator:
    """The weighted mean of each slot of one tensor."""

    logits_PM: Tensor

    @property
    def n_slots(self) -> int:
        """P"""
        return len(self.logits_PM)

    def __call__(self, models: Sequence[Tensor], hidden_NPH: Tensor | None) -> Tensor:
        """(N, P) weights from those of the models, the oldest first; it has no state."""
        return weighted_mean(models, self.logits_PM)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> "MeanGenerator":
        """With every tensor changed."""
        return MeanGenerator(change(self.logits_PM))


@dataclass(frozen=True)
class ModelWindow:
    """What a generator reads: models in a row, the oldest first, and the state before the first of them."""

    models: tuple[Weights, ...] = ()
    hidden: dict[str, Tensor] | None = None  # (N, P, H) each; None: 0

    def grow(self, start: Weights) -> "ModelWindow":
        """With the rows that `start` has more: in each model as they start, without a state.

        Had these rows been there from the first model on, their state would be what the generator makes of rows that do
        not move. The difference is gone once the window has passed.
        """
        models = tuple({name: _append_new_rows(model[name], start[name]) for name in start} for model in self.models)
        if self.hidden is None:
            return ModelWindow(models)
        hidden = {}
        for name, h_NPH in self.hidden.items():
            n_rows, per_row = start[name].numel() // h_NPH.shape[1], h_NPH.shape[1:]
            hidden[name] = _append_new_rows(h_NPH, h_NPH.new_zeros(n_rows, *per_row))
        return ModelWindow(models, hidden)


def _append_new_rows(old: Tensor, new: Tensor) -> Tensor:
    return old if old.shape == new.shape else torch.cat([old, new[len(old) :]])


@dataclass
class ModelGenerator:
    """A network for each tensor of a model, and what the optimiser remembers of each of its weights."""

    networks: dict[str, GRUGenerator | MeanGenerator]
    moments: dict[str, Tensor]

    def __call__(self, window: ModelWindow, name: str, ids_N: Tensor | None = None, n: int | None = None) -> Tensor:
        """A tensor made from the first `n` models of the window (all): its rows `ids_N` (N, P), or the whole of it."""
        rows_NP = self.networks[name](*self._select_rows(window, name, ids_N, n))
        return rows_NP if ids_N is not None else rows_NP.reshape(window.models[-1][name].shape)

    def _select_rows(
        self, window: ModelWindow, name: str, ids_N: Tensor | None, n: int | None
    ) -> tuple[list[Tensor], Tensor | None]:
        models = [model[name].reshape(-1, self.networks[name].n_slots) for model in window.models[:n]]
        hidden_NPH = None if window.hidden is None else window.hidden[name]
        if ids_N is None:
            return models, hidden_NPH
        hidden_NPH = None if hidden_NPH is None else hidden_NPH.index_select(0, ids_N)
        return [x_NP.index_select(0, ids_N) for x_NP in models], hidden_NPH

    def parametrization(self, window: ModelWindow, n: int | None = None) -> Parametrization:
        """The model made from the first `n` models of the window, as the forward pass sees it; padding stays 0."""

        def generated(name: str, ids_N: Tensor | None, weights: Tensor) -> Tensor:
            tensor = self(window, name, ids_N, n)
            return tensor if ids_N is None else tensor * (ids_N > 0)[:, None]

        return generated

    @torch.no_grad()
    def generate(self, window: ModelWindow) -> Weights:
        """The model made from the window; padding, row 0 of a table, is whatever comes out."""
        generated = {}
        for name, tensor in window.models[-1].items():
            parts = [self(window, name, ids_N) for ids_N in self._row_chunks(name, tensor)]
            generated[name] = torch.cat(parts).reshape(tensor.shape)
        return generated

    @torch.no_grad()
    def hidden_after_first(self, window: ModelWindow) -> dict[str, Tensor] | None:
        """The state after the first model of the window, (N, P, H) each; None where the generator has none."""
        hidden = {}
        for name, tensor in window.models[0].items():
            network, parts = self.networks[name], []
            if not isinstance(network, GRUGenerator):
                return None
            for ids_N in self._row_chunks(name, tensor):
                parts.append(network.hidden_state(*self._select_rows(window, name, ids_N, 1)).permute(2, 0, 1))
            hidden[name] = torch.cat(parts)
        return hidden

    def _row_chunks(self, name: str, tensor: Tensor) -> list[Tensor]:
        return list(torch.arange(tensor.numel() // self.networks[name].n_slots).split(CHUNK_ROWS))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is learnt, of a generator that `trainable_copy` made."""
        for name, network in self.networks.items():
            for part, weight in vars(network).items():
                if isinstance(weight, nn.Parameter):
                    yield f"{name}.{part}", weight

    def trainable_copy(self) -> "ModelGenerator":
        """A copy whose weights an optimiser may change."""
        return self._map_tensors(lambda weight: nn.Parameter(weight.clone()))

    def detached_copy(self) -> "ModelGenerator":
        """The same, with plain tensors again."""
        return self._map_tensors(lambda weight: weight.detach())

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> "ModelGenerator":
        return ModelGenerator(
            {name: network.map_tensors(change) for name, network in self.networks.items()}, dict(self.moments)
        )


def new_generator(
    model: TrainedModel, make: Callable[[int, torch.Generator], GRUGenerator | MeanGenerator], largest: int, seed: int
) -> ModelGenerator:
    """A generator of such models; `make` gets a number of slots.

    A dense tensor of more than `largest` scalars is cut into rows along its last axis.
    """
    slots = {name: table.n_dims for name, table in embedding_tables(model).items()}
    for name, weight in model.named_parameters():
        slots[name] = weight.numel() if weight.numel() <= largest else weight.shape[-1]
    rngs = [stream(seed, "generator network", i) for i in range(len(slots))]
    return ModelGenerator({name: make(n, rng) for (name, n), rng in zip(slots.items(), rngs)}, {})
