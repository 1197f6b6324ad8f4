"""States that live, and are changed in place as training changes them: what the workers of benchmarks/incremental.py save."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.storage_contenders.base import tensors_of
from benchmarks.workloads import changing

State = dict[str, Any]


def read(folder: Path, gap: int, form: str, task: str) -> State:
    """The state `gap` steps after the first one."""
    return changing.formed(torch.load(folder / f"{gap}.pt"), form, changing.trains(task))


@torch.no_grad()
def change(live: Any, new: Any) -> None:
    """Give `live` the values of `new`. Tensors that hold them already are left alone, as training leaves them."""
    for key, value in new.items() if isinstance(new, dict) else enumerate(new):
        mine = live[key]
        if isinstance(value, torch.Tensor):
            if not same(mine, value):
                mine.copy_(value)
        elif isinstance(value, (dict, list)):
            change(mine, value)
        elif not isinstance(live, tuple):
            live[key] = value


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether all bits are the same."""
    return torch.equal(one.detach().reshape(-1).view(torch.uint8), other.detach().reshape(-1).view(torch.uint8))


def raw_bytes(state: State) -> int:
    return sum(tensor.nbytes for _, tensor in tensors_of(state))


def changed_bytes(new: State, old: State) -> int:
    """Raw bytes of the tensors that are not as they were."""
    before = dict(tensors_of(old))
    return sum(t.nbytes for name, t in tensors_of(new) if name not in before or not same(t, before[name]))


def files(folder: Path) -> dict[str, int]:
    """Objects of a local store with their sizes."""
    return {str(path.relative_to(folder)): size for path, size in _files(folder)}


def _files(folder: Path) -> Iterator[tuple[Path, int]]:
    for root, _, names in os.walk(folder):  # what retention deletes meanwhile is left out
        for name in sorted(names):
            path = Path(root) / name
            with contextlib.suppress(FileNotFoundError):
                yield path, path.stat().st_size


def added(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """Bytes of new objects, and of those that have grown: all of them, and those that are no packs."""
    new = {key: size - before.get(key, 0) for key, size in after.items() if size > before.get(key, 0)}
    return {"bytes": sum(new.values()), "index": sum(size for key, size in new.items() if not _is_pack(key))}


def _is_pack(key: str) -> bool:
    return key.endswith(".pack")


def settle() -> None:
    """Somebody else's dirty pages are not the next save's."""
    os.sync()
