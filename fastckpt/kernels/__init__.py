"""The loops that run over every byte; each has three implementations with the same results.

`reference` (NumPy) is the definition, `native` (csrc/) is what normally runs, `numba_cpu` is the fallback for installations without a
compiler. `select` chooses. All release the GIL on large buffers and may be called from any thread.
"""

from fastckpt.kernels.reference import ROW_WORDS, WHOLE_BELOW, Estimate, lines_bytes
from fastckpt.kernels.select import Kernels, kernels, warm_up

__all__ = ["ROW_WORDS", "WHOLE_BELOW", "Estimate", "Kernels", "kernels", "lines_bytes", "warm_up"]
