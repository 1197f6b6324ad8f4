"""States that tests save, and whether what comes back is the same."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import torch

from fastckpt.format.sealed_state import SealedState
from fastckpt.state import Captured, capture
from fastckpt.state.sealing import seal


def small_state(value: float) -> dict[str, Any]:
    """A small state that says which save it is: some chunks of different kinds."""
    generator = torch.Generator().manual_seed(int(value * 1000))
    return {
        "value": value,
        "weight": torch.randn(300, generator=generator),
        "count": torch.full((40,), int(value)),
        "noise": torch.randint(0, 255, (500,), generator=generator, dtype=torch.uint8),
    }


def rich_state(seed: int, n: int = 300_000) -> dict[str, Any]:
    """Big and small tensors, a view, an array, a newer element type, Python state: 1.9 MB for the default n."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, generator=generator)
    return {
        "model": {"weight": weight, "bias": torch.randn(7, generator=generator), "view": weight[10:20]},
        "optim": {"state": {0: {"step": torch.tensor(float(seed)), "exp_avg": torch.zeros(n)}}, "lr": 0.1},
        "ids": torch.arange(seed, seed + 11),
        "array": np.arange(20_000, dtype=np.float64) + seed,
        "wide": torch.arange(5, dtype=torch.int32).to(torch.uint16),
        "empty": torch.empty(0, 3),
        "note": f"seed {seed}",
    }


def captured(obj: Any) -> Captured:
    """As a save finds it."""
    return capture(obj, pickle, 2)


def sealed(obj: Any) -> SealedState:
    """As an upload takes it."""
    return seal(captured(obj))


def same(a: Any, b: Any) -> bool:
    """Bit for bit, shapes, types and structure too."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        if (a.shape, a.dtype, a.stride()) != (b.shape, b.dtype, b.stride()):
            return False
        return a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and bool(a == b)
