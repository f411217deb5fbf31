"""The `repr` of counting models. Trained models have that of `nn.Module`."""

from freshrec.types import Model


def model_text(model: Model) -> str:
    """Return the class, the options and the sizes of a model in one line."""
    return f"{type(model).__name__}({model.spec}, {model.n_users:,} users, {model.n_items:,} items)"
