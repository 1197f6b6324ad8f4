"""safetensors holds named tensors and nothing else, so the state is flattened and what is no tensor is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file

from benchmarks.contenders.base import Contender, State, fsync_tree, nothing_to_wait_for


def tensors_of(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors_of(item, f"{name}/{key}" if name else str(key))


class Safetensors(Contender):
    tensors_only = True
    settings = {"save": "safetensors.torch.save_file, then fsync", "load": "safetensors.torch.load_file (mapped)"}
    note = "tensors only: no structure, no optimizer or scheduler scalars, no Python RNG, no sharing; no checksums"

    def version(self) -> str:
        return str(safetensors.__version__)

    def begin(self, state: State, directory: Path) -> Callable[[], None]:
        flat: dict[str, torch.Tensor] = {}
        seen: set[tuple[int, int]] = set()
        for name, tensor in tensors_of(state):
            memory = (tensor.data_ptr(), tensor.numel())
            if memory not in seen:  # save_file refuses two names for one memory
                flat[name] = tensor
                seen.add(memory)
        save_file(flat, directory / "state.safetensors")
        fsync_tree(directory)
        return nothing_to_wait_for

    def load(self, directory: Path) -> State:
        return dict(load_file(directory / "state.safetensors"))
