"""A pretend device, to test without a GPU what runs on one.

Its tensors lie on the CPU but say that they lie on "pretend". Like those of a GPU they refuse to meet tensors of the
CPU that have a dimension, to be filled by a random generator of the CPU, and to become numpy arrays.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
MOVES = ("_to_copy", "copy_", "_copy_from", "_local_scalar")  # what is allowed to go from one device to another


class Pretend(Tensor):
    """A tensor of the pretend device; `held` is what it holds."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Pretend":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
            requires_grad=held.requires_grad,
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return called(func, args, kwargs or {})


class Devices(TorchDispatchMode):
    """Within it, tensors can be made on the pretend device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return called(func, args, kwargs or {})


def called(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`func` of what the tensors hold. RuntimeError for what a GPU would refuse."""
    leaves = tree_leaves((args, kwargs))
    theirs = [x for x in leaves if isinstance(x, Pretend)]
    others = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Pretend) and x.dim() > 0]
    device = kwargs.get("device")
    is_theirs = bool(theirs) if device is None else torch.device(device).type == NAME
    if theirs and others and not func.__name__.startswith(MOVES):
        raise RuntimeError(f"{func}: tensors on two devices")
    if is_theirs and any(isinstance(x, torch.Generator) for x in leaves):
        raise RuntimeError(f"{func}: a generator of another device")

    def bare(x: Any) -> Any:
        if isinstance(x, torch.device):
            return torch.device("cpu")
        return x.held if isinstance(x, Pretend) else x

    def dressed(x: Any) -> Any:
        return Pretend(x) if isinstance(x, Tensor) and not isinstance(x, Pretend) else x

    out = func(*tree_map(bare, args), **tree_map(bare, kwargs))
    if not is_theirs:
        return out
    out = tree_map(dressed, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if theirs else out


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **options: Any) -> Tensor:
    return Pretend(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _copy(self: Pretend, other: Tensor, non_blocking: bool = False) -> Tensor:
    self.held.copy_(other.held if isinstance(other, Pretend) else other)
    return self


_setup_privateuseone_for_python_backend(NAME)
LIBRARY = torch.library.Library("aten", "IMPL")  # of what PyTorch calls below the modes, to make a tensor of a list
LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
LIBRARY.impl("copy_", _copy, "PrivateUse1")
