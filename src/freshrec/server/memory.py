"""Memory that the C library keeps, given back to the system."""

from __future__ import annotations

import ctypes
import gc
import platform

M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def release_memory() -> None:
    """Give what a former version took back to the system; what stays is not searched for garbage again, for 100 ms."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    _call_glibc("malloc_trim", 0)


def tune_memory() -> None:
    """Look for garbage seldom; let what is freed go back to the system at once where it is large, which glibc would
    learn to keep."""
    gc.set_threshold(50_000, 20, 100)
    _call_glibc("mallopt", M_MMAP_THRESHOLD, 1 << 20)


def _call_glibc(name: str, *numbers: int) -> None:
    """Call a function that only glibc has; elsewhere nothing happens."""
    if platform.libc_ver()[0] == "glibc":
        getattr(ctypes.CDLL(None), name)(*numbers)
