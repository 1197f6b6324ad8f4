"""moonclip with a bucket: it saves into a local directory, and mirrors that."""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from typing import Any

from moonclip import CheckpointManager

from benchmarks.storage_contenders.base import Contender, Place, State


class _Holder:
    """CheckpointManager.save asks a model for its state_dict()."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state


class Moonclip(Contender):
    level = 1  # its fastest that compresses
    settings = {
        "save": "CheckpointManager(compression_level=1, keep_base_in_memory=False).save, flush, sync_now",
        "restore": "a new local directory; restore_from_remote, load_latest",
    }

    def version(self) -> str:
        return importlib.metadata.version("moonclip")

    def prepare(self, place: Place, state: State | None) -> None:
        self._place, self._state = place, state
        self._folder = tempfile.mkdtemp(prefix="moonclip-")
        self._manager = self._make()

    def _make(self) -> Any:
        return CheckpointManager(
            self._folder,
            compression_level=self.level,
            keep_base_in_memory=False,
            world_size=1,
            rank=0,
            s3_bucket=self._place.bucket,
            s3_prefix=self._place.prefix,
            s3_endpoint=self._place.endpoint,
            s3_path_style=True,
            s3_region="us-east-1",
            sync_every_n_saves=1,
        )

    def save(self) -> None:
        state = self._state
        assert state is not None
        extra = {part: value for part, value in state.items() if part not in ("model", "optimizer", "scheduler")}
        self._manager.save(1, _Holder(state["model"]), state["optimizer"], state["scheduler"], extra=extra)
        self._manager.flush()
        self._manager.sync_now()

    def restore(self) -> Any:
        assert self._manager.restore_from_remote()
        _, parts = self._manager.load_latest()
        return {name.removeprefix("extra/"): value for name, value in parts.items()}

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


class MoonclipRaw(Moonclip):
    level = 0
    settings = {**Moonclip.settings, "save": f"{Moonclip.settings['save']}, with level 0: it does not compress"}
