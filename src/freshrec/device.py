"""Devices of tensors, and random numbers.

Within `use_device("cuda")`, all new tensors are on the GPU. Random numbers are drawn on the CPU and then moved, so a
seed gives the same order of events and the same negatives on every device.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from freshrec.errors import OptionError

CPU = torch.device("cpu")


def use_device(device: str) -> AbstractContextManager[object]:
    """Return a context in which new tensors are on `device`. Raises OptionError for an unknown device."""
    try:
        resolved = torch.device(device)
        is_available = resolved.type == "cpu" or bool(torch.get_device_module(resolved).is_available())
    except RuntimeError:
        is_available = False
    if not is_available:
        raise OptionError(f'There is no device "{device[:60]}" here. Use cpu, or cuda if PyTorch finds a GPU.')
    return nullcontext() if resolved.type == "cpu" else torch.device(resolved)


def default_device() -> torch.device:
    """The device of new tensors."""
    return torch.get_default_device()


def prefers_blocks(tensor: Tensor) -> bool:
    """Whether work in blocks that fit into the cache is faster than all at once: true on a CPU, not on a GPU."""
    return tensor.device.type == "cpu"


def permutation(n: int, rng: torch.Generator) -> Tensor:
    """The numbers 0 .. n - 1 in random order, shape (n,)."""
    return torch.randperm(n, generator=rng, device=CPU).to(default_device())


def integers(low: int, high: int, n: int, rng: torch.Generator) -> Tensor:
    """Random integers from low .. high - 1, shape (n,)."""
    return torch.randint(low, high, (n,), generator=rng, device=CPU).to(default_device())


def uniform(shape: tuple[int, ...], rng: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers, uniform in [0, 1)."""
    return torch.rand(shape, generator=rng, dtype=dtype, device=CPU).to(default_device())


def normal(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Random numbers, normal with mean 0 and variance 1."""
    return torch.randn(shape, generator=rng, device=CPU).to(default_device())
