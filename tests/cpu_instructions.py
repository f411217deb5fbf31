"""Every processor computes with the same vector instructions. Import this before torch: the choice is made only once.

Sums of AVX512 and of AVX2 differ in their last bits, because vectors of another width are added in another order.
"""

import os
import platform

# torch's own kernels. A value that is set already is kept: then only what does not depend on it is compared.
os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
# MKL multiplies and decomposes matrices. Of its modes only this one promises the same bits on processors of all makers.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")


def machine() -> str:
    """What the last bits of training depend on, where one thread trains and oneDNN is off."""
    import torch

    version, instructions = torch.__version__.partition("+")[0], torch.backends.cpu.get_cpu_capability()
    return f"torch {version}, {instructions}, MKL {os.environ['MKL_CBWR']}, {platform.machine()}"
