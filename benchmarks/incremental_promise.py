"""What could be had, of benchmarks/incremental.py: `fastckpt analyze`'s promise, an entropy, the bytes that changed, XOR with zstd.

python -m benchmarks.incremental_promise ABOUT '{"task": …}' OUT
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import incremental_states as states
from benchmarks.processes import answer
from benchmarks.storage_contenders.base import tensors_of
from fastckpt.state import capture
from fastckpt.upkeep.analyze import analyze

SAMPLE = 8
"""Every so many lanes count for an entropy."""


def promise(new: states.State, old: states.State) -> dict[str, float]:
    """Of one pair of states."""
    groups = analyze(capture(new, pickle, 2), capture(old, pickle, 2))
    promised = sum((group.delta or group.alone).stored_bytes for group in groups)
    found: dict[str, float] = {"promised": promised, "changed": states.changed_bytes(new, old)}
    found["entropy_mb"] = floor(new, old) / 1e6
    return found


def floor(new: states.State, old: states.State) -> float:
    """Bytes that an ideal coder of single bytes needs, for each tensor alone or as a difference, whichever is less; a copy needs none."""
    before, total = dict(tensors_of(old)), 0.0
    masters = {name.partition("/")[2] for name, _ in tensors_of(new) if name.startswith("master/")}
    for name, tensor in tensors_of(new):
        kind, _, rest = name.partition("/")
        copied = kind == "model" and rest in masters
        if copied or states.same(tensor, before[name]) or not tensor.is_floating_point():
            continue
        here, there = lanes(tensor), lanes(before[name])
        total += min(entropy(rotated(here)), entropy(difference(here, there)))
    return total


def lanes(tensor: torch.Tensor) -> Any:
    words = {2: torch.uint16, 4: torch.uint32}[tensor.element_size()]
    return tensor.detach().reshape(-1).view(words).numpy()


def rotated(x: Any) -> Any:
    return (x << x.dtype.type(1)) | (x >> x.dtype.type(8 * x.itemsize - 1))


def difference(x: Any, y: Any) -> Any:
    """As the codec's SUB: of the numbers in their order, zigzag."""
    top = x.dtype.type(1 << (8 * x.itemsize - 1))
    ordered = [np.where(v & top, ~v, v | top) for v in (x, y)]
    d = ordered[0] - ordered[1]
    return np.where(d & top, ~(d << x.dtype.type(1)), d << x.dtype.type(1))


def entropy(x: Any) -> float:
    """Bytes, of the planes of these lanes; from a part of them where there are many."""
    part = x[:: SAMPLE if x.size >= 1 << 18 else 1]
    total = 0.0
    for plane in np.ascontiguousarray(part).view(np.uint8).reshape(-1, x.itemsize).T:
        counts = np.bincount(plane, minlength=256)
        shares = counts[counts > 0] / part.size
        total -= float((shares * np.log2(shares)).sum())
    return float(total * x.size / 8)


def xor_zstd(new: states.State, old: states.State) -> float:
    """Planes of XOR with the older tensor, each tensor by zstd -1: as BitX and moonclip do."""
    import zstandard

    before, total = dict(tensors_of(old)), 0
    for name, tensor in tensors_of(new):
        changed = lanes(tensor) ^ lanes(before[name])
        planes = np.ascontiguousarray(changed.view(np.uint8).reshape(-1, changed.itemsize).T)
        total += len(zstandard.ZstdCompressor(level=1).compress(planes.data))
    return float(total)


def main(about: str, text: str, out: str) -> None:
    """about: for messages; text: what is asked, as JSON."""
    torch.set_num_threads(1)
    before = os.getloadavg()[0]
    given = json.loads(text)
    forms: dict[str, Any] = {}
    for form, folder in given["states"].items():
        old = states.read(Path(folder), 0, form, given["task"])
        forms[form] = {"gaps": {}}
        for gap in given["gaps"]:
            new = states.read(Path(folder), gap, form, given["task"])
            found = forms[form]["gaps"][str(gap)] = promise(new, old)
            if form == "weights":
                found["xor_zstd"] = xor_zstd(new, old)
    answer({"forms": forms}, before, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
