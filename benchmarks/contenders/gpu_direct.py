"""The paths that move bytes between disk and GPU memory (GPUDirect Storage: fastsafetensors, and tensorizer's device
path). They have nothing to do without a GPU; the row keeps the table honest about what was not compared."""

from __future__ import annotations

from benchmarks.contenders.base import Contender


class GpuDirect(Contender):
    note = "GPUDirect Storage (fastsafetensors), tensorizer"

    def version(self) -> str:
        return ""

    def unavailable(self) -> str:
        return "needs a GPU: not run"
