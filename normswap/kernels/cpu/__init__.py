"""Norms on the CPU: a C kernel where there is a compiler (`norm`), few passes of torch where not (`few_passes`)."""

from normswap.kernels.cpu.few_passes import few_passes
from normswap.kernels.cpu.library import Variant, available
from normswap.kernels.cpu.norm import norm, rejects

__all__ = ["Variant", "available", "few_passes", "norm", "rejects"]
