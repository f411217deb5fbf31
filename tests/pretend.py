"""A pretend device, which tests code for GPUs without a GPU.

Its tensors are stored on the CPU but report the device "pretend". They raise errors where tensors of a GPU would.
They cannot be combined with CPU tensors that have a dimension, filled by a CPU random generator, or converted to numpy
arrays.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
MOVES = ("_to_copy", "copy_", "_copy_from", "_local_scalar")  # operations that may use tensors of two devices


class Pretend(Tensor):
    """A tensor of the pretend device. `cpu_tensor` holds its values."""

    cpu_tensor: Tensor

    @staticmethod
    def __new__(cls, cpu_tensor: Tensor) -> "Pretend":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            cpu_tensor.size(),
            strides=cpu_tensor.stride(),
            storage_offset=cpu_tensor.storage_offset(),
            dtype=cpu_tensor.dtype,
            device=torch.device(NAME, 0),
            requires_grad=cpu_tensor.requires_grad,
        )

    def __init__(self, cpu_tensor: Tensor) -> None:
        self.cpu_tensor = cpu_tensor

    def tolist(self) -> Any:
        return self.cpu_tensor.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return apply_on_cpu(func, args, kwargs or {})


class Devices(TorchDispatchMode):
    """A context in which tensors can be created on the pretend device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return apply_on_cpu(func, args, kwargs or {})


def apply_on_cpu(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Apply `func` to the CPU tensors behind pretend tensors. Raises RuntimeError where a GPU would raise one."""
    leaves = tree_leaves((args, kwargs))
    pretend_tensors = [x for x in leaves if isinstance(x, Pretend)]
    cpu_tensors = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Pretend) and x.dim() > 0]
    device = kwargs.get("device")
    is_pretend = bool(pretend_tensors) if device is None else torch.device(device).type == NAME
    if pretend_tensors and cpu_tensors and not func.__name__.startswith(MOVES):
        raise RuntimeError(f"{func}: tensors on two devices")
    if is_pretend and any(isinstance(x, torch.Generator) for x in leaves):
        raise RuntimeError(f"{func}: a generator of another device")

    def unwrap(x: Any) -> Any:
        if isinstance(x, torch.device):
            return torch.device("cpu")
        return x.cpu_tensor if isinstance(x, Pretend) else x

    def wrap(x: Any) -> Any:
        return Pretend(x) if isinstance(x, Tensor) and not isinstance(x, Pretend) else x

    out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if not is_pretend:
        return out
    out = tree_map(wrap, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if pretend_tensors else out


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **options: Any) -> Tensor:
    return Pretend(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _copy(self: Pretend, other: Tensor, non_blocking: bool = False) -> Tensor:
    self.cpu_tensor.copy_(other.cpu_tensor if isinstance(other, Pretend) else other)
    return self


_setup_privateuseone_for_python_backend(NAME)
# PyTorch calls these two below the dispatch modes to create a tensor from a list.
LIBRARY = torch.library.Library("aten", "IMPL")
LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
LIBRARY.impl("copy_", _copy, "PrivateUse1")
