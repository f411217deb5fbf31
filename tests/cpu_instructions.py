"""Make every processor use the same vector instructions. Import this before torch, which chooses them only once.

Sums with AVX512 and AVX2 differ in their last bits, because vectors of different widths change the order of additions.
"""

import os
import platform

# torch's own kernels. An existing value is kept. Tests then compare only results that do not depend on it.
os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
# MKL multiplies and decomposes matrices. Only this mode promises the same bits on processors of all manufacturers.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")


def machine() -> str:
    """Return what the last bits of training depend on, with one thread and without oneDNN."""
    import torch

    version, instructions = torch.__version__.partition("+")[0], torch.backends.cpu.get_cpu_capability()
    return f"torch {version}, {instructions}, MKL {os.environ['MKL_CBWR']}, {platform.machine()}"
