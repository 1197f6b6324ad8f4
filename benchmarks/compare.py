"""Is the loaded state the saved one, bit for bit? What is not is said in a few words, for the table's notes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch


def compare(saved: Any, loaded: Any) -> list[str]:
    """Differences, counted by kind; empty if equal in bytes, structure, types and shared memory."""
    found: Counter[str] = Counter()
    _compare(saved, loaded, found)
    if sharing(saved) != sharing(loaded) and not any("lost" in text for text in found):
        found["shared tensors are separate after the load"] += 1
    return [text if n == 1 else f"{text} ({n} times)" for text, n in sorted(found.items())]


def _compare(a: Any, b: Any, found: Counter[str]) -> None:
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor):
            found[f"tensor became {type(b).__name__}"] += 1
        elif (a.dtype, a.shape, a.stride()) != (b.dtype, b.shape, b.stride()):
            found["WRONG: dtype, shape or stride of a tensor"] += 1
        elif not equal_bytes(a, b):
            found["WRONG: bytes of a tensor"] += 1
        return
    if isinstance(a, dict) and isinstance(b, dict):
        if type(a) is not type(b):
            found[f"{type(a).__name__} became {type(b).__name__}"] += 1
        same = {key: key for key in b}
        texts = {str(key): key for key in b}
        for key, value in a.items():
            if key in same:
                _compare(value, b[key], found)
            elif str(key) in texts:
                found[f"{type(key).__name__} keys became {type(texts[str(key)]).__name__}"] += 1
                _compare(value, b[texts[str(key)]], found)
            else:
                found["entries lost"] += 1
        return
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if type(a) is not type(b):
            found[f"{type(a).__name__} became {type(b).__name__}"] += 1
        if len(a) != len(b):
            found["entries lost"] += 1
        for x, y in zip(a, b, strict=False):
            _compare(x, y, found)
        return
    if type(a) is not type(b) or repr(a) != repr(b):
        found[f"WRONG: a value of type {type(a).__name__}"] += 1


def compare_tensors(saved: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]) -> list[str]:
    """For contenders of tensors only: those that are there must have the right bytes."""
    wrong = [name for name in loaded if name not in saved or not equal_bytes(saved[name], loaded[name])]
    return [f"WRONG: {len(wrong)} tensors"] if wrong else []


def equal_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    x, y = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(x, y)


def sharing(state: Any) -> list[list[int]]:
    """Which tensors, by their place in the walk, share one memory."""
    from benchmarks.measure import tensors

    groups: dict[int, list[int]] = {}
    for i, tensor in enumerate(tensors(state)):
        groups.setdefault(tensor.untyped_storage().data_ptr(), []).append(i)
    return sorted(group for group in groups.values() if len(group) > 1)
