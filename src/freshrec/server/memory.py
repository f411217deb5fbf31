"""Return unused memory to the operating system."""

from __future__ import annotations

import ctypes
import gc
import platform

M_MMAP_THRESHOLD = -3  # parameter of glibc's mallopt


def release_memory() -> None:
    """Return the memory of an old version to the system.

    What remains is frozen: the garbage collector does not search it again, which takes 100 ms.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    _call_glibc("malloc_trim", 0)


def tune_memory() -> None:
    """Collect garbage less often, and return large freed blocks to the system at once.

    Without this, glibc raises its threshold over time and keeps them.
    """
    gc.set_threshold(50_000, 20, 100)
    _call_glibc("mallopt", M_MMAP_THRESHOLD, 1 << 20)


def _call_glibc(name: str, *numbers: int) -> None:
    """Call a function of glibc; do nothing on other systems."""
    if platform.libc_ver()[0] == "glibc":
        getattr(ctypes.CDLL(None), name)(*numbers)
