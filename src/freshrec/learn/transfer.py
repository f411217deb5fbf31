"""Transfer networks: the weights before a span and those adapted to it -> the weights to go on with, row by row.

Symbols: w_{t-1} -> before_ND, w^ -> after_ND, f_Theta -> Transfer. All are row-wise, so looking rows up and mapping
them commute. A specification (LinearTransfer, MLPTransfer, CNNTransfer) says how a tower looks; a tower maps rows of
one width; a `Transfer` has a tower for each table and for each dense weight of a model.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freshrec.config import Count, CountOrZero, Weight, check_options
from freshrec.errors import OptionError
from freshrec.learn.weights import Parametrization, Weights, copy_weights
from freshrec.nn.embedding_table import embedding_tables
from freshrec.random_streams import global_stream
from freshrec.types import TrainedModel

CHUNK_ROWS = 4096  # mapped at once where a whole table is


@dataclass(frozen=True)
class LinearTransfer:
    """alpha w_{t-1} + (1 - alpha) w^."""

    alpha: Weight = 0.5  # 0 is fine-tuning, 1 never learns
    learned: bool = False  # alpha = sigmoid(rho), which starts at `alpha`

    def __post_init__(self) -> None:
        check_options(self)
        if not (0 < self.alpha < 1 if self.learned else self.alpha <= 1):
            raise OptionError(f"alpha is {self.alpha:g}; it lies between 0 and 1, and is neither where it is learned.")

    def build_tower(self, width: int) -> nn.Module:
        """One scalar, whatever the width."""
        return LinearTower(self.alpha, self.learned)


@dataclass(frozen=True)
class MLPTransfer:
    """MLP([w_{t-1}; w^]): 2 D -> hidden -> D, tanh between."""

    hidden: CountOrZero = 128  # 0 = one linear map without bias
    residual: bool = True  # w^ + MLP, whose last layer starts at 0; see CNNTransfer

    def __post_init__(self) -> None:
        check_options(self)

    def build_tower(self, width: int) -> nn.Module:
        """Rows of this width."""
        layers: list[nn.Module] = [nn.Linear(2 * width, width, bias=False)]
        if self.hidden:
            layers = [nn.Linear(2 * width, self.hidden), nn.Tanh(), nn.Linear(self.hidden, width)]
        return MLPTower(layers, self.residual)


@dataclass(frozen=True)
class CNNTransfer:
    """The method's own: convolutions over the picture of a row, then two fully connected layers.

    The paper's 3x1 kernel never mixes coordinates. 5x5 is what IMSR reports for its comparison, read here as a padded
    5x5 kernel and a 3x1 one above it; neighbouring coordinates of an embedding have no order, so it is for parity only.
    Differs from the paper: `residual`. The paper's network starts at random and needs 20 spans until it maps weights to
    anything that ranks; with 4, all that the model knew is lost.
    """

    filters: CountOrZero = 10  # of the first layer; 0 = no convolutions
    filters2: Count = 5
    hidden: CountOrZero = 512  # 0 = no fully connected layers: a last 1x1 convolution instead
    kernel: Literal["3x1", "5x5"] = "3x1"
    bias: bool = True  # of the convolutions
    detach: bool = True  # no gradient through the product row
    residual: bool = True  # w^ + what comes out, whose last layer starts at 0: untrained, it is fine-tuning

    def __post_init__(self) -> None:
        check_options(self)
        if not self.filters and not self.hidden:
            raise OptionError("a transfer without filters and without hidden units is none; set one of them.")

    def build_tower(self, width: int) -> nn.Module:
        """Rows of this width."""
        return CNNTower(self, width)


class LinearTower(nn.Module):
    """The module of LinearTransfer."""

    def __init__(self, alpha: float, learned: bool) -> None:
        super().__init__()
        self.fixed = alpha
        self.rho = nn.Parameter(torch.tensor(math.log(alpha / (1 - alpha)))) if learned else None

    def forward(self, before_ND: Tensor, after_ND: Tensor) -> Tensor:
        """alpha w_{t-1} + (1 - alpha) w^, (N, D) [SML eq. linear]."""
        alpha = self.fixed if self.rho is None else torch.sigmoid(self.rho)
        return alpha * before_ND + (1 - alpha) * after_ND


class MLPTower(nn.Module):
    """Layers on both rows side by side."""

    def __init__(self, layers: list[nn.Module], residual: bool) -> None:
        super().__init__()
        self.layers, self.residual = nn.Sequential(*layers), residual
        if residual:
            _zero_parameters(layers[-1])

    def forward(self, before_ND: Tensor, after_ND: Tensor) -> Tensor:
        """(N, D)"""
        out_ND: Tensor = self.layers(torch.cat([before_ND, after_ND], 1))
        return after_ND + out_ND if self.residual else out_ND


def stack_row_image(before_ND: Tensor, after_ND: Tensor, detach: bool = True) -> Tensor:
    """(N, 3, D): w_{t-1}, w^, and w_{t-1} . w^ / ||w_{t-1}|| coordinate by coordinate [SML eq. picture].

    Where detached, no gradient reaches w^ through the product. Differs from the authors' code: the product of a row
    of zeros is 0, not nan.
    """
    other_ND = after_ND.detach() if detach else after_ND
    norm_N1 = before_ND.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return torch.stack([before_ND, after_ND, before_ND * other_ND / norm_N1], 1)


class CNNTower(nn.Module):
    """The module of CNNTransfer: GELU (the exact one) after each layer but the last.

    A 3x1 kernel and the 1x1 one above it are the same small dense layers at every coordinate, and are computed so: it
    takes half the time. What the fully connected layers see is ordered by coordinate, then channel.
    """

    def __init__(self, spec: CNNTransfer, width: int) -> None:
        super().__init__()
        self.spec = spec
        n_first, n_second, n_seen = spec.filters, spec.filters2, 3
        if n_first:
            n_seen = n_second
            is_5x5 = spec.kernel == "5x5"
            self.first = nn.Conv2d(1, n_first, 5, padding=2) if is_5x5 else nn.Linear(3, n_first, spec.bias)
            self.second = nn.Conv2d(n_first, n_second, (3, 1)) if is_5x5 else nn.Linear(n_first, n_second, spec.bias)
        if spec.hidden:
            self.third, self.last = nn.Linear(width * n_seen, spec.hidden), nn.Linear(spec.hidden, width)
        else:
            self.last = nn.Linear(n_second, 1, spec.bias)
        if spec.residual:
            _zero_parameters(self.last)

    def forward(self, before_ND: Tensor, after_ND: Tensor) -> Tensor:
        """W2 GELU(W1 [GELU(conv2(GELU(conv1(picture))))]), (N, D) [SML eq. cnn]."""
        seen_NDC = self._columns(stack_row_image(before_ND, after_ND, self.spec.detach))
        hidden = F.gelu(self.third(seen_NDC.flatten(1))) if self.spec.hidden else seen_NDC
        out_ND: Tensor = self.last(hidden).view_as(after_ND)
        return after_ND + out_ND if self.spec.residual else out_ND

    def _columns(self, picture_N3D: Tensor) -> Tensor:
        """(N, D, C): what the convolutions make of each coordinate."""
        if not self.spec.filters:
            return picture_N3D.transpose(1, 2)
        if self.spec.kernel == "5x5":
            return F.gelu(self.second(F.gelu(self.first(picture_N3D[:, None]))))[:, :, 0].transpose(1, 2)
        return F.gelu(self.second(F.gelu(self.first(picture_N3D.transpose(1, 2)))))


def _zero_parameters(layer: nn.Module) -> None:
    with torch.no_grad():
        for weight in layer.parameters():
            weight.zero_()


TransferSpec = LinearTransfer | MLPTransfer | CNNTransfer


class Transfer(nn.Module):
    """f_Theta: a tower for each table, shared by its rows, and one for each dense weight, cut in rows as wide.

    Weights that are not cut into such rows without a rest (scalars, short biases) are taken as adapted.
    """

    def __init__(self, spec: TransferSpec, width: int, names: Iterable[str], seed: int) -> None:
        super().__init__()
        self.width, self.moments = width, dict[str, Tensor]()
        with global_stream(seed, "transfer network"):
            self.towers = nn.ModuleDict({_module_name(name): spec.build_tower(width) for name in names})

    @staticmethod
    def for_model(spec: TransferSpec, model: TrainedModel, seed: int) -> "Transfer":
        """An untrained network for a model's weights."""
        tables, weights = embedding_tables(model), copy_weights(model)
        width = max(table.n_dims for table in tables.values())
        names = [n for n, w in weights.items() if (w.shape[1] if n in tables else w.numel()) % width == 0]
        return Transfer(spec, width, names, seed)

    @property
    def is_trainable(self) -> bool:
        """Whether there is anything to train."""
        return any(True for _ in self.parameters())

    def forward(self, name: str, before: Tensor, after: Tensor) -> Tensor:
        """The rows, or the dense weight, called `name`, in the shape of `after`."""
        if _module_name(name) not in self.towers:
            return after
        tower = self.towers[_module_name(name)]
        rows_ND: Tensor = tower(before.reshape(-1, self.width), after.reshape(-1, self.width))
        return rows_ND.view_as(after)


def _module_name(name: str) -> str:
    return "of/" + name.replace(".", "/")  # a module has no dots in its name, and is not called "items"


def adaptation_parametrization(transfer: Transfer, before: Weights) -> Parametrization:
    """What step 1 sees: f_Theta(W_{t-1}, w), with gradients to both."""

    def view(name: str, ids: Tensor | None, now: Tensor) -> Tensor:
        old = before[name] if ids is None else before[name].index_select(0, ids)
        seen: Tensor = transfer(name, old, now)
        return seen

    return view


def transfer_parametrization(transfer: Transfer, before: Weights, rows: str = "all") -> Parametrization:
    """What step 2 sees: f_Theta(W_{t-1}, w^) with w^ standing still; rows="touched" as in `transfer_weights`."""

    def view(name: str, ids: Tensor | None, now: Tensor) -> Tensor:
        old = before[name] if ids is None else before[name].index_select(0, ids)
        return _transfer_rows(transfer, name, old, now.detach(), rows)

    return view


def transfer_weights(transfer: Transfer, model: TrainedModel, before: Weights, rows: str = "all") -> Weights:
    """f_Theta(W_{t-1}, w^) of all weights, w^ those of the model; padding stays 0.

    rows="touched" leaves the rows that w^ did not change as they are.
    """
    mapped, tables = {}, embedding_tables(model)
    with torch.no_grad():
        for name, now in copy_weights(model).items():
            if name not in tables:
                mapped[name] = _transfer_rows(transfer, name, before[name], now, rows)
                continue
            parts = [
                _transfer_rows(transfer, name, *part, rows)
                for part in zip(before[name].split(CHUNK_ROWS), now.split(CHUNK_ROWS))
            ]
            mapped[name] = torch.cat(parts)
            mapped[name][0] = 0
    return mapped


def _transfer_rows(transfer: Transfer, name: str, before: Tensor, after: Tensor, rows: str) -> Tensor:
    transferred: Tensor = transfer(name, before, after)
    if rows == "all" or not after.dim():
        return transferred
    return torch.where((before != after).any(-1, keepdim=True), transferred, after)
