"""Every processor computes with the same vector instructions. Import this before torch: the choice is made only once.

Sums of AVX512 and of AVX2 differ in their last bits, because vectors of another width are added in another order.
"""

import os
import platform

# torch's own kernels. What somebody has set already is kept: then hashes of recorded states are not compared.
os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
# MKL multiplies matrices and decomposes them. STRICT: the same bits whatever the processor, alignment and threads.
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
# oneDNN convolves.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")


def machine() -> str:
    """What the last bits of training depend on."""
    import torch

    names = ("MKL_CBWR", "ONEDNN_MAX_CPU_ISA")
    parts = [f"torch {torch.__version__.partition('+')[0]}", torch.backends.cpu.get_cpu_capability()]
    return ", ".join([*parts, *(f"{name}={os.environ[name]}" for name in names), platform.machine()])
