"""Where tensors lie, and random numbers.

Within `use_device("cuda")` every new tensor lies on the GPU, and so does all that is made of it. Random numbers are
drawn on the CPU and moved, so that a seed means the same order of events and the same negatives on every device.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from freshrec.errors import OptionError

CPU = torch.device("cpu")


def use_device(device: str) -> AbstractContextManager[object]:
    """Within it, new tensors lie on `device`. OptionError where there is none of that name."""
    try:
        resolved = torch.device(device)
        is_available = resolved.type == "cpu" or bool(torch.get_device_module(resolved).is_available())
    except RuntimeError:
        is_available = False
    if not is_available:
        raise OptionError(f'there is no device "{device[:60]}" here; use cpu, or cuda where PyTorch finds a GPU.')
    return nullcontext() if resolved.type == "cpu" else torch.device(resolved)


def default_device() -> torch.device:
    """Where new tensors lie."""
    return torch.get_default_device()


def prefers_blocks(tensor: Tensor) -> bool:
    """Whether work in blocks that fit a processor's cache is faster than all at once: not on a GPU."""
    return tensor.device.type == "cpu"


def permutation(n: int, rng: torch.Generator) -> Tensor:
    """(n,) 0 .. n - 1 in random order."""
    return torch.randperm(n, generator=rng, device=CPU).to(default_device())


def integers(low: int, high: int, n: int, rng: torch.Generator) -> Tensor:
    """(n,) each one of low .. high - 1."""
    return torch.randint(low, high, (n,), generator=rng, device=CPU).to(default_device())


def uniform(shape: tuple[int, ...], rng: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers in [0, 1)."""
    return torch.rand(shape, generator=rng, dtype=dtype, device=CPU).to(default_device())


def normal(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Numbers with mean 0 and variance 1."""
    return torch.randn(shape, generator=rng, device=CPU).to(default_device())
