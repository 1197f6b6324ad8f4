"""torch.save and torch.load. torch.save does not fsync; that is added, because a checkpoint that a power cut can empty
is not the thing that the others write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.contenders.base import Contender, State, fsync_tree, nothing_to_wait_for


class TorchSave(Contender):
    # A path, not a Python file object: torch then writes in C++ and without the GIL, its fastest way.
    settings = {"save": "torch.save(state, path), then fsync", "load": "torch.load(path), weights_only=True"}
    mmap = False

    def version(self) -> str:
        return str(torch.__version__)

    def begin(self, state: State, directory: Path) -> Callable[[], None]:
        torch.save(state, directory / "state.pt")
        fsync_tree(directory)
        return nothing_to_wait_for

    def load(self, directory: Path) -> State:
        state: State = torch.load(directory / "state.pt", mmap=self.mmap)
        return state


class TorchSaveMmap(TorchSave):
    settings = {"save": "torch.save(state, path), then fsync", "load": "torch.load(path, mmap=True)"}
    note = "same file as torch; tensors stay mapped to it, without a copy and without CRC checks"
    mmap = True
