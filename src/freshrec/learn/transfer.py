"""Transfer networks: they merge the weights before a span with the weights adapted to it, row by row.

Symbols: w_{t-1} -> before_ND, w^ -> after_ND, f_Theta -> Transfer. All networks work on single rows, so the rows of a
batch can be looked up first and mapped then.

LinearTransfer, MLPTransfer and CNNTransfer are the options of a tower. A tower maps rows of one width. A `Transfer`
has one tower for each table and for each dense weight of a model.
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

CHUNK_ROWS = 4096  # table rows mapped at the same time


@dataclass(frozen=True)
class LinearTransfer:
    """A weighted mean, alpha w_{t-1} + (1 - alpha) w^."""

    alpha: Weight = 0.5  # Weight of the previous weights. 0 = fine-tuning, 1 = no update.
    learned: bool = False  # Learn alpha, starting from the given value.

    def __post_init__(self) -> None:
        check_options(self)
        if not (0 < self.alpha < 1 if self.learned else self.alpha <= 1):
            bounds = "above 0 and below 1 with learned=true" if self.learned else "at least 0 and at most 1"
            raise OptionError(f"transfer.alpha is {self.alpha:g}. It must be {bounds}.")

    def build_tower(self, width: int) -> nn.Module:
        """Build the module. It has one scalar for rows of any width."""
        return LinearTower(self.alpha, self.learned)


@dataclass(frozen=True)
class MLPTransfer:
    """A multilayer perceptron on [w_{t-1}; w^], with layers 2 D -> hidden -> D and tanh between them."""

    hidden: CountOrZero = 128  # Number of hidden units. 0 = one linear map without bias.
    residual: bool = True  # Add the output to w^, starting at 0. Untrained, this is fine-tuning.

    def __post_init__(self) -> None:
        check_options(self)

    def build_tower(self, width: int) -> nn.Module:
        """Build the module for rows of this width."""
        layers: list[nn.Module] = [nn.Linear(2 * width, width, bias=False)]
        if self.hidden:
            layers = [nn.Linear(2 * width, self.hidden), nn.Tanh(), nn.Linear(self.hidden, width)]
        return MLPTower(layers, self.residual)


@dataclass(frozen=True)
class CNNTransfer:
    """The network of the paper: convolutions over the image of a row, then two fully connected layers.

    The paper's 3x1 kernel never mixes coordinates. IMSR reports a 5x5 kernel in its comparison. It is read here as a
    padded 5x5 kernel followed by a 3x1 one. Coordinates of an embedding have no order, so it is for comparison only.

    Differs from the paper: `residual`. The paper's network starts at random and needs 20 spans before its weights rank
    well. With 4 spans, everything that the model knew is lost.
    """

    filters: CountOrZero = 10  # Filters of the first convolution. 0 = no convolutions.
    filters2: Count = 5  # Filters of the second convolution.
    hidden: CountOrZero = 512  # Units of the fully connected layer. 0 = a 1x1 convolution instead.
    kernel: Literal["3x1", "5x5"] = "3x1"  # Kernel of the first convolution.
    bias: bool = True  # Whether convolutions have biases.
    detach: bool = True  # Stop gradients through the row of products.
    residual: bool = True  # Add the output to w^, starting at 0. Untrained, this is fine-tuning.

    def __post_init__(self) -> None:
        check_options(self)
        if not self.filters and not self.hidden:
            raise OptionError("A transfer network needs layers. Set transfer.filters or transfer.hidden above 0.")

    def build_tower(self, width: int) -> nn.Module:
        """Build the module for rows of this width."""
        return CNNTower(self, width)


class LinearTower(nn.Module):
    """The module built by LinearTransfer."""

    def __init__(self, alpha: float, learned: bool) -> None:
        super().__init__()
        self.fixed = alpha
        self.rho = nn.Parameter(torch.tensor(math.log(alpha / (1 - alpha)))) if learned else None

    def forward(self, before_ND: Tensor, after_ND: Tensor) -> Tensor:
        """alpha w_{t-1} + (1 - alpha) w^, shape (N, D) [SML eq. linear]."""
        alpha = self.fixed if self.rho is None else torch.sigmoid(self.rho)
        return alpha * before_ND + (1 - alpha) * after_ND


class MLPTower(nn.Module):
    """The module built by MLPTransfer: layers on both rows, concatenated."""

    def __init__(self, layers: list[nn.Module], residual: bool) -> None:
        super().__init__()
        self.layers, self.residual = nn.Sequential(*layers), residual
        if residual:
            _zero_parameters(layers[-1])

    def forward(self, before_ND: Tensor, after_ND: Tensor) -> Tensor:
        """Merged rows, shape (N, D)."""
        out_ND: Tensor = self.layers(torch.cat([before_ND, after_ND], 1))
        return after_ND + out_ND if self.residual else out_ND


def stack_row_image(before_ND: Tensor, after_ND: Tensor, detach: bool = True) -> Tensor:
    """[w_{t-1}, w^, w_{t-1} . w^ / ||w_{t-1}||] with coordinate-wise products, shape (N, 3, D) [SML eq. picture].

    With `detach`, no gradient reaches w^ through the product. Differs from the authors' code: the product of a row of
    zeros is 0, not nan.
    """
    other_ND = after_ND.detach() if detach else after_ND
    norm_N1 = before_ND.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return torch.stack([before_ND, after_ND, before_ND * other_ND / norm_N1], 1)


class CNNTower(nn.Module):
    """The module built by CNNTransfer, with the exact GELU after each layer but the last.

    A 3x1 kernel and the 1x1 kernel after it are the same small dense layers at every coordinate. Computing them as such
    takes half the time. The input of the fully connected layers is ordered by coordinate, then channel.
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
        """W2 GELU(W1 [GELU(conv2(GELU(conv1(picture))))]), shape (N, D) [SML eq. cnn]."""
        seen_NDC = self._columns(stack_row_image(before_ND, after_ND, self.spec.detach))
        hidden = F.gelu(self.third(seen_NDC.flatten(1))) if self.spec.hidden else seen_NDC
        out_ND: Tensor = self.last(hidden).view_as(after_ND)
        return after_ND + out_ND if self.spec.residual else out_ND

    def _columns(self, picture_N3D: Tensor) -> Tensor:
        """Output of the convolutions at each coordinate, shape (N, D, C)."""
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
    """f_Theta: a tower for each table, shared by its rows, and one for each dense weight, cut into rows of that width.

    Weights that cannot be cut evenly, such as scalars and short biases, keep their adapted values.
    """

    def __init__(self, spec: TransferSpec, width: int, names: Iterable[str], seed: int) -> None:
        super().__init__()
        self.width, self.moments = width, dict[str, Tensor]()
        with global_stream(seed, "transfer network"):
            self.towers = nn.ModuleDict({_module_name(name): spec.build_tower(width) for name in names})

    @staticmethod
    def for_model(spec: TransferSpec, model: TrainedModel, seed: int) -> "Transfer":
        """Return an untrained network for a model's weights."""
        tables, weights = embedding_tables(model), copy_weights(model)
        width = max(table.n_dims for table in tables.values())
        names = [n for n, w in weights.items() if (w.shape[1] if n in tables else w.numel()) % width == 0]
        return Transfer(spec, width, names, seed)

    @property
    def is_trainable(self) -> bool:
        """Whether the network has weights to train."""
        return any(True for _ in self.parameters())

    def forward(self, name: str, before: Tensor, after: Tensor) -> Tensor:
        """Merge the rows, or the dense weight, called `name`. The result has the shape of `after`."""
        if _module_name(name) not in self.towers:
            return after
        tower = self.towers[_module_name(name)]
        rows_ND: Tensor = tower(before.reshape(-1, self.width), after.reshape(-1, self.width))
        return rows_ND.view_as(after)


def _module_name(name: str) -> str:
    return "of/" + name.replace(".", "/")  # a module's name has no dots, and "items" is taken


def adaptation_parametrization(transfer: Transfer, before: Weights) -> Parametrization:
    """Return the weights that step 1 sees: f_Theta(W_{t-1}, w), with gradients to Theta and w."""

    def view(name: str, ids: Tensor | None, now: Tensor) -> Tensor:
        old = before[name] if ids is None else before[name].index_select(0, ids)
        seen: Tensor = transfer(name, old, now)
        return seen

    return view


def transfer_parametrization(transfer: Transfer, before: Weights, rows: str = "all") -> Parametrization:
    """Return the weights that step 2 sees: f_Theta(W_{t-1}, w^) with w^ fixed. For `rows`, see `transfer_weights`."""

    def view(name: str, ids: Tensor | None, now: Tensor) -> Tensor:
        old = before[name] if ids is None else before[name].index_select(0, ids)
        return _transfer_rows(transfer, name, old, now.detach(), rows)

    return view


def transfer_weights(transfer: Transfer, model: TrainedModel, before: Weights, rows: str = "all") -> Weights:
    """f_Theta(W_{t-1}, w^) of all weights, with w^ the model's weights. Padding stays 0.

    With rows="touched", only rows that differ between W_{t-1} and w^ are mapped.
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
