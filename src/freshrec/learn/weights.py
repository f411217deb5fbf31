"""A model's weights by name: copied, put back, and seen by the forward pass through a function of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from freshrec.nn.embedding_table import embedding_tables, set_categories
from freshrec.types import Batch, Forward, TrainedModel

# (name, ids, weights) -> what the forward pass sees instead
Parametrization = Callable[[str, Tensor | None, Tensor], Tensor]
Weights = dict[str, Tensor]  # by name: tables (rows, D), padding first, and dense weights


def grow_model(model: TrainedModel, n_users: int, n_items: int, categories_I: Tensor | None) -> None:
    """Make room for new users and items; set the items' categories (from item 0; 0: none) in models that use them."""
    model.grow(n_users, n_items)
    for table in embedding_tables(model).values():
        set_categories(table, categories_I)


def copy_weights(model: TrainedModel) -> Weights:
    """A copy of all that the model learns by gradients."""
    weights = {name: table.weights.clone() for name, table in embedding_tables(model).items()}
    return weights | {name: weight.detach().clone() for name, weight in model.named_parameters()}


def load_weights(model: TrainedModel, weights: Weights) -> None:
    """Overwrite the model's weights with others of the same shapes; what its optimisers remember stays.

    The padding row of a table stays 0.
    """
    for name, table in embedding_tables(model).items():
        table.weights[1:] = weights[name][1:]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weights[name])


def snapshot(model: TrainedModel) -> Callable[[], None]:
    """What puts the model back, in place, to how it is now: its weights, and what its optimisers remember."""
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
    """The model's forward pass with `parametrization(name, ids, weights)` in place of the weights.

    For a table: (N,) the ids of a batch, each once, and their (N, D) rows. For a dense weight: no ids, and all of it.
    Gradients flow through the function; one that is to leave the model's own weights alone detaches them.
    """
    if parametrization is None:
        yield model
        return
    assert isinstance(model, nn.Module)
    tables = embedding_tables(model)
    previous = [table.parametrization for table in tables.values()]  # one may be applied while another is
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
