"""A model's weights by name: copy them, load them, or let the forward pass use a function of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from freshrec.nn.embedding_table import embedding_tables, set_categories
from freshrec.types import Batch, Forward, TrainedModel

# (name, ids, weights) -> the weights that the forward pass uses instead
Parametrization = Callable[[str, Tensor | None, Tensor], Tensor]
Weights = dict[str, Tensor]  # name -> table (rows, D) with the padding first, or dense weight


def grow_model(model: TrainedModel, n_users: int, n_items: int, categories_I: Tensor | None) -> None:
    """Add rows for new users and items. Set the items' categories in models that use them (item 0 first, 0 = none)."""
    model.grow(n_users, n_items)
    for table in embedding_tables(model).values():
        set_categories(table, categories_I)


def copy_weights(model: TrainedModel) -> Weights:
    """Return a copy of all weights that the model learns by gradients."""
    weights = {name: table.weights.clone() for name, table in embedding_tables(model).items()}
    return weights | {name: weight.detach().clone() for name, weight in model.named_parameters()}


def load_weights(model: TrainedModel, weights: Weights) -> None:
    """Overwrite the model's weights with others of the same shapes. Optimisers keep their state.

    The padding row of a table stays 0.
    """
    for name, table in embedding_tables(model).items():
        table.weights[1:] = weights[name][1:]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weights[name])


def snapshot(model: TrainedModel) -> Callable[[], None]:
    """Return a function that restores the current weights and optimiser state in place."""
    assert isinstance(model, nn.Module)
    tensors, moments = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.moments

    def restore() -> None:
        model.load_state_dict(tensors)
        model.moments = moments

    return restore


@contextmanager
def apply_parametrization(
    model: TrainedModel, parametrization: Parametrization | None
) -> Iterator[Callable[[Batch], Forward]]:
    """Yield the model's forward pass with `parametrization(name, ids, weights)` in place of the weights.

    For a table, it gets the distinct ids of a batch (N,) and their rows (N, D). For a dense weight, it gets no ids and
    the whole weight. Gradients flow through the function. It must detach weights that should not be trained.
    """
    if parametrization is None:
        yield model
        return
    assert isinstance(model, nn.Module)
    tables = embedding_tables(model)
    previous = [table.parametrization for table in tables.values()]  # for nested calls
    for name, table in tables.items():
        table.parametrization = partial(parametrization, name)

    def forward(batch: Batch) -> Forward:
        seen = {name: parametrization(name, None, weight) for name, weight in model.named_parameters()}
        result: Forward = functional_call(model, seen, (batch,))
        return result

    try:
        yield forward
    finally:
        for table, old in zip(tables.values(), previous):
            table.parametrization = old
