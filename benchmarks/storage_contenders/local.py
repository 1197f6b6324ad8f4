"""Contenders that keep a checkpoint in a directory, and load it from there."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any

import safetensors
import torch

from benchmarks.storage_contenders.base import Contender, Place, State, flat, live


class TorchFile(Contender):
    settings = {
        "restore": "torch.load(path), weights_only=True",
        "restore in place": "torch.load(path), then load_state_dict of model, optimizer and scheduler",
    }

    def version(self) -> str:
        return str(torch.__version__)

    def prepare(self, place: Place, state: State | None) -> None:
        Path(place.root).mkdir(parents=True, exist_ok=True)
        self._path, self._state = Path(place.root) / "state.pt", state
        self._training = live(place.size) if self.in_place else None

    def save(self) -> None:
        torch.save(self._state, self._path)
        os.sync()

    def restore(self) -> Any:
        found = torch.load(self._path)
        if self._training is None:
            return found
        self._training.load(found)
        return self._training.state()


class SafetensorsMapped(Contender):
    tensors_only = True
    settings = {"restore": "safetensors.torch.load_file (mapped); each byte is then read once, as in all rows"}

    def version(self) -> str:
        return str(safetensors.__version__)

    def prepare(self, place: Place, state: State | None) -> None:
        Path(place.root).mkdir(parents=True, exist_ok=True)
        self._path, self._state = Path(place.root) / "state.safetensors", state

    def save(self) -> None:
        from safetensors.torch import save_file

        assert self._state is not None
        save_file(flat(self._state), self._path)
        os.sync()

    def restore(self) -> Any:
        from safetensors.torch import load_file

        return dict(load_file(self._path))


class TorchCheckpointing(Contender):
    """Direct I/O is left out for warm loads: all read from the page cache. What wants a GPU is switched off."""

    in_place = True
    settings = {"restore": "CheckpointManager.load(path, into=live state dicts); use_direct_io=False"}

    def version(self) -> str:
        return importlib.metadata.version("torch_checkpointing")

    def prepare(self, place: Place, state: State | None) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.config import SyncCheckpointSaverConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager(
            CheckpointManager.Config(storage_config=storage, save=SyncCheckpointSaverConfig())
        )
        self._path, self._state = place.root, state
        self.training = live(place.size)
        t = self.training
        self._into = {"model": t.model.state_dict(), "optimizer": t.optimizer.state_dict()}

    def save(self) -> None:
        assert self._state is not None
        self._manager.save(self._path, {part: self._state[part] for part in ("model", "optimizer")})
        os.sync()

    def restore(self) -> Any:
        found = self._manager.load(self._path, into=self._into)
        return {**self.training.state(), **found}  # learning rates are no tensors: they are in what it returns

    def close(self) -> None:
        self._manager.close()
