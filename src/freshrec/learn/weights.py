"""A model's weights by name: copied, put back, and seen by the forward pass through a function of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from freshrec.models.tables import know, tables_of
from freshrec.types import Batch, Forward, TrainedModel

View = Callable[[str, Tensor | None, Tensor], Tensor]  # (name, ids, weights) -> what the forward pass sees instead
Weights = dict[str, Tensor]  # by name: tables (rows, D), padding first, and dense weights


def grow(model: TrainedModel, n_users: int, n_items: int, kinds_I: Tensor | None) -> None:
    """Room for new users and items, whose categories (from item 0; 0: none) a model that looks at them is told."""
    model.grow(n_users, n_items)
    for table in tables_of(model).values():
        know(table, kinds_I)


def weights_of(model: TrainedModel) -> Weights:
    """A copy of all that the model learns by gradients."""
    weights = {name: table.weights.clone() for name, table in tables_of(model).items()}
    return weights | {name: weight.detach().clone() for name, weight in model.named_parameters()}


def put(model: TrainedModel, weights: Weights) -> None:
    """Overwrite the model's weights with others of the same shapes; what its optimisers remember stays.

    The padding row of a table stays 0.
    """
    for name, table in tables_of(model).items():
        table.weights[1:] = weights[name][1:]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weights[name])


def snapshot(model: TrainedModel) -> Callable[[], None]:
    """What puts the model back, in place, to how it is now: its weights, and what its optimisers remember."""
    assert isinstance(model, nn.Module)
    tensors, moments = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.moments

    def back() -> None:
        model.load_state_dict(tensors)
        model.moments = moments

    return back


@contextmanager
def seen_through(model: TrainedModel, view: View | None) -> Iterator[Callable[[Batch], Forward]]:
    """The model's forward pass with `view(name, ids, weights)` in place of the weights.

    For a table: (N,) the ids of a batch, each once, and their (N, D) rows. For a dense weight: no ids, and all of it.
    Gradients flow through the view; one that is to leave the model's own weights alone detaches them.
    """
    if view is None:
        yield model
        return
    assert isinstance(model, nn.Module)
    tables = tables_of(model)
    before = [table.view for table in tables.values()]  # one view may be taken while another is on
    for name, table in tables.items():
        table.view = partial(view, name)

    def forward(batch: Batch) -> Forward:
        seen = {name: view(name, None, weight) for name, weight in model.named_parameters()}
        result: Forward = functional_call(model, seen, (batch,))
        return result

    try:
        yield forward
    finally:
        for table, old in zip(tables.values(), before):
            table.view = old
