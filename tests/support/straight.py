"""Restores that read into live tensors, however small these are; and stores that count, fail or hold back what is read of packs."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastckpt.errors import StoreError
from fastckpt.format import keys
from fastckpt.format.tensor_names import dotted
from fastckpt.repository.commit import open_vote
from fastckpt.store.memory import MemoryStore
from tests.support.repositories import living
from tests.support.stores import HELD_S


def all_straight(patch: pytest.MonkeyPatch) -> None:
    """From now on no storage is small."""
    patch.setattr("fastckpt.training.straight.BUNDLE_BYTES", 0)
    patch.setattr("fastckpt.training.straight.MOST_SMALL_BYTES", 0)


class ReadStore(MemoryStore):
    """Reads of packs are counted; they fail from the nth on, or wait, as the test wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.read_bytes = 0, 0
        self.fails_at: int | None = None
        self.open = threading.Event()
        self.open.set()
        self.waits: Callable[[], bool] = lambda: False
        """Whether a read waits for `open`."""

    def get_into(self, key: str, offset: int, out: Any) -> None:
        if key.startswith(keys.DATA):
            if self.waits():
                assert self.open.wait(HELD_S)
            self.reads += 1
            self.read_bytes += memoryview(out).nbytes
            if self.fails_at is not None and self.reads >= self.fails_at:
                raise StoreError("as the test wants it")
        super().get_into(key, offset, out)


def addresses(state: dict[str, Any]) -> dict[str, int]:
    """Where the tensors of a model and the state of its optimizer lie."""
    found = {f"m.{name}": tensor.data_ptr() for name, tensor in state["m"].state_dict().items()}
    for number, one in state["o"].state_dict()["state"].items():
        found |= {f"o.{number}.{key}": t.data_ptr() for key, t in one.items() if isinstance(t, torch.Tensor)}
    return found


def plain(value: Any) -> Any:
    """What can be compared: of a tensor, all but its place."""
    if isinstance(value, torch.Tensor):
        strides = tuple(value.stride()) if value.layout is torch.strided else value.layout
        kind = type(value).__name__, str(value.dtype), strides, value.requires_grad
        value = value.to_dense() if value.layout is not torch.strided else value
        data = (
            value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b""
        )
        return (*kind, hashlib.sha256(data).hexdigest() if any(data) else "zeros")
    if callable(getattr(value, "state_dict", None)):
        return plain(value.state_dict())
    if isinstance(value, dict):
        return {key: plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(child) for child in value]
    return sorted(map(plain, value)) if isinstance(value, set) else value


def place_of(store: MemoryStore, step: int, name: str) -> tuple[str, int]:
    """A pack, and a byte in it that a tensor needs."""
    commit = next(c for name, c in living(store).items() if name.step == step)
    reader = open_vote(store, commit.vote(0))
    entry = next(e for e in reader.directory.tensors if dotted(e.name) == name)
    record = reader.records[next(reader.pieces(entry.storage)).chunk]
    return reader.files[int(record["file"]) - 1].key, int(record["offset"]) + int(record["stored_bytes"]) // 2
