"""Networks that generate a model's weights from those of its predecessors: a recurrent one and a weighted mean.

Each tensor of a model is viewed as a matrix (N, P) of N rows and P slots. Each slot has its own small network, which
all rows share. A table has one slot per dimension. A small dense tensor has one row and one slot per scalar. A large
dense tensor is cut like a table, along its last axis.

Dimension letters: N rows, P slots, H hidden units, G = 3 H gates, M models. Computations have the rows last, which is 5
times faster than having the hidden units last.

Symbols of the paper: theta -> theta_PN, h_i -> h_PHN, alpha_i -> softmax of logits_PM, lambda_i -> loss_weights.
W_z, W_r and W_h are split into u_PG, which acts on theta, and W_PGH, which acts on h.
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

CHUNK_ROWS = 8192  # table rows generated at the same time


def gru_step(theta_PN: Tensor, h_PHN: Tensor, u_PG: Tensor, W_PGH: Tensor) -> Tensor:
    """h' = (1 - z) h + z tanh(W_h [r h, theta]), z = sigma(W_z [h, theta]), r = sigma(W_r [h, theta]) [ASMG eq. gru].

    This is not `torch.nn.GRUCell`: it has no biases, r acts before the product, and z weights the new state.
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

    Each logit belongs to a position, with the newest model last. Fewer models use the last logits.
    """
    alpha_PM = torch.softmax(logits_PM[:, -len(models) :], 1)
    return (torch.stack(list(models), 2) * alpha_PM).sum(2)


def loss_weights(n: int, form: Literal["linear", "uniform", "last", "exponential"]) -> list[float]:
    """lambda_j = j / sum_j' j', j = 1..n: the weights of n loss terms [ASMG eq. lambda].

    "linear" is the printed form. "uniform" gives 1 / n to each term, "last" uses the newest one alone, and
    "exponential" is proportional to e^j.
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
    """The recurrent networks of one tensor, one per slot."""

    u_PG: Tensor  # gate z, gate r and the new state, concatenated
    W_PGH: Tensor
    v_PH: Tensor
    b_P: Tensor
    residual: bool  # add the newest model's weights to the output

    @property
    def n_slots(self) -> int:
        """Number of slots, P."""
        return len(self.b_P)

    @staticmethod
    def initial(n_slots: int, h: int, residual: bool, rng: torch.Generator) -> "GRUGenerator":
        """Draw weights from U(+-sqrt(6 / (P (fan_in + fan_out)))), as the authors' framework does for 3-D tensors.

        A residual generator starts with v = b = 0, so it returns the newest model.
        """

        def glorot(*shape: int, fans: int) -> Tensor:
            return (2 * uniform(shape, rng) - 1) * math.sqrt(6 / (n_slots * fans))

        u_PG, W_PGH = glorot(n_slots, 3 * h, fans=1 + h), glorot(n_slots, 3 * h, h, fans=2 * h)
        v_PH, b_P = glorot(n_slots, h, fans=h + 1), glorot(n_slots, fans=2)
        output_scale = 0.0 if residual else 1.0
        return GRUGenerator(u_PG, W_PGH, v_PH * output_scale, b_P * output_scale, residual)

    def __call__(self, models: Sequence[Tensor], hidden_NPH: Tensor | None) -> Tensor:
        """Generate weights (N, P) from those of the models, oldest first. The hidden state starts at 0 by default."""
        out_NP = readout(self.hidden_state(models, hidden_NPH), self.v_PH, self.b_P).t()
        return models[-1] + out_NP if self.residual else out_NP

    def hidden_state(self, models: Sequence[Tensor], hidden_NPH: Tensor | None) -> Tensor:
        """Hidden state after the models, shape (P, H, N)."""
        if hidden_NPH is None:
            h_PHN = torch.zeros(*self.v_PH.shape, len(models[0]))
        else:
            h_PHN = hidden_NPH.permute(1, 2, 0).contiguous()
        for theta_NP in models:
            h_PHN = gru_step(theta_NP.t().contiguous(), h_PHN, self.u_PG, self.W_PGH)
        return h_PHN

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> "GRUGenerator":
        """Return a copy with `change` applied to every tensor."""
        return GRUGenerator(change(self.u_PG), change(self.W_PGH), change(self.v_PH), change(self.b_P), self.residual)


@dataclass(frozen=True)
class MeanGenerator:
    """The weighted means of one tensor, one per slot."""

    logits_PM: Tensor

    @property
    def n_slots(self) -> int:
        """Number of slots, P."""
        return len(self.logits_PM)

    def __call__(self, models: Sequence[Tensor], hidden_NPH: Tensor | None) -> Tensor:
        """Generate weights (N, P) from those of the models, oldest first. There is no hidden state."""
        return weighted_mean(models, self.logits_PM)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> "MeanGenerator":
        """Return a copy with `change` applied to every tensor."""
        return MeanGenerator(change(self.logits_PM))


@dataclass(frozen=True)
class ModelWindow:
    """The input of a generator: consecutive models, oldest first, and the hidden state before the first one."""

    models: tuple[Weights, ...] = ()
    hidden: dict[str, Tensor] | None = None  # (N, P, H) each; None = 0

    def grow(self, start: Weights) -> "ModelWindow":
        """Add the rows that only `start` has to each model, with the values of `start` and a hidden state of 0.

        If these rows had existed from the first model on, their hidden state would be that of rows that never change.
        The difference disappears once the window has moved on.
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
    """The networks of all tensors of a model, with their optimiser state."""

    networks: dict[str, GRUGenerator | MeanGenerator]
    moments: dict[str, Tensor]

    def __call__(self, window: ModelWindow, name: str, ids_N: Tensor | None = None, n: int | None = None) -> Tensor:
        """Generate a tensor, or its rows `ids_N` (N, P), from the first `n` models of the window (default: all)."""
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
        """Return the generated model as the forward pass sees it, from the first `n` models. Padding stays 0."""

        def generated(name: str, ids_N: Tensor | None, weights: Tensor) -> Tensor:
            tensor = self(window, name, ids_N, n)
            return tensor if ids_N is None else tensor * (ids_N > 0)[:, None]

        return generated

    @torch.no_grad()
    def generate(self, window: ModelWindow) -> Weights:
        """Generate all weights from the window. The padding row of a table is not set to 0."""
        generated = {}
        for name, tensor in window.models[-1].items():
            parts = [self(window, name, ids_N) for ids_N in self._row_chunks(name, tensor)]
            generated[name] = torch.cat(parts).reshape(tensor.shape)
        return generated

    @torch.no_grad()
    def hidden_after_first(self, window: ModelWindow) -> dict[str, Tensor] | None:
        """Return the hidden state after the first model, (N, P, H) per tensor, or None for a weighted mean."""
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
        """Yield the trainable weights of a generator made by `trainable_copy`."""
        for name, network in self.networks.items():
            for part, weight in vars(network).items():
                if isinstance(weight, nn.Parameter):
                    yield f"{name}.{part}", weight

    def trainable_copy(self) -> "ModelGenerator":
        """Return a copy whose weights an optimiser may change."""
        return self._map_tensors(lambda weight: nn.Parameter(weight.clone()))

    def detached_copy(self) -> "ModelGenerator":
        """Return a copy with plain tensors."""
        return self._map_tensors(lambda weight: weight.detach())

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> "ModelGenerator":
        return ModelGenerator(
            {name: network.map_tensors(change) for name, network in self.networks.items()}, dict(self.moments)
        )


def new_generator(
    model: TrainedModel, make: Callable[[int, torch.Generator], GRUGenerator | MeanGenerator], largest: int, seed: int
) -> ModelGenerator:
    """Return an untrained generator for models like this one. `make` builds the networks of a number of slots.

    A dense tensor of more than `largest` scalars is cut into rows along its last axis.
    """
    slots = {name: table.n_dims for name, table in embedding_tables(model).items()}
    for name, weight in model.named_parameters():
        slots[name] = weight.numel() if weight.numel() <= largest else weight.shape[-1]
    rngs = [stream(seed, "generator network", i) for i in range(len(slots))]
    return ModelGenerator({name: make(n, rng) for (name, n), rng in zip(slots.items(), rngs)}, {})
