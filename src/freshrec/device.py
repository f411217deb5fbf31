"""Where tensors lie, and random numbers.

Within `on("cuda")` every new tensor lies on the GPU, and so does all that is made of it. Random numbers are drawn on
the CPU and moved, so that a seed means the same order of events and the same negatives on every device.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from freshrec.errors import OptionError

CPU = torch.device("cpu")


def on(device: str) -> AbstractContextManager[object]:
    """Within it, new tensors lie on `device`. OptionError where there is none of that name."""
    try:
        kind = torch.device(device)
        found = kind.type == "cpu" or bool(torch.get_device_module(kind).is_available())
    except RuntimeError:
        found = False
    if not found:
        raise OptionError(f'there is no device "{device[:60]}" here; use cpu, or cuda where PyTorch finds a GPU.')
    return nullcontext() if kind.type == "cpu" else torch.device(kind)


def here() -> torch.device:
    """Where new tensors lie."""
    return torch.get_default_device()


def blocks_pay(tensor: Tensor) -> bool:
    """Whether work in blocks that fit a processor's cache is faster than all at once: not on a GPU."""
    return tensor.device.type == "cpu"


def permutation(n: int, source: torch.Generator) -> Tensor:
    """(n,) 0 .. n - 1 in random order."""
    return torch.randperm(n, generator=source, device=CPU).to(here())


def integers(low: int, high: int, n: int, source: torch.Generator) -> Tensor:
    """(n,) each one of low .. high - 1."""
    return torch.randint(low, high, (n,), generator=source, device=CPU).to(here())


def uniform(shape: tuple[int, ...], source: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers in [0, 1)."""
    return torch.rand(shape, generator=source, dtype=dtype, device=CPU).to(here())


def normal(shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    """Numbers with mean 0 and variance 1."""
    return torch.randn(shape, generator=source, device=CPU).to(here())
