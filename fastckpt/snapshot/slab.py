"""A stretch of host memory in which a snapshot's chunks lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastckpt._types import U8


@dataclass(frozen=True, eq=False)
class Slab:
    """See the module: `array` and `tensor` are the same bytes."""

    n_bytes: int
    tensor: torch.Tensor
    array: U8
    for_device: bool
    """It was requested for copies from a device."""
    pinned: bool
    """It could be pinned, so copies into it do not block."""
