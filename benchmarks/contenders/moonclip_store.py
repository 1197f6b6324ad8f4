"""moonclip, full snapshots: its deltas need a series of checkpoints, and each save here is the first of its store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import moonclip
from moonclip import CheckpointManager

from benchmarks.contenders.base import Contender, State, fsync_tree, nothing_to_wait_for

# keep_base_in_memory only serves the next delta; without one it would cost moonclip a copy of the state for nothing.
OPTIONS: dict[str, Any] = {"keep_base_in_memory": False, "world_size": 1, "rank": 0}


class _Holder:
    """CheckpointManager.save asks a model for its state_dict()."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state


class Moonclip(Contender):
    level = 3  # its default
    settings = {"options": OPTIONS, "level": "3, its default", "fsync": "its default: on", "store": "new for each save"}

    def version(self) -> str:
        return str(moonclip.__version__)

    def begin(self, state: State, directory: Path) -> Callable[[], None]:
        manager = CheckpointManager(
            str(directory), async_save=self.asynchronous, compression_level=self.level, **OPTIONS
        )
        extra = {part: value for part, value in state.items() if part not in ("model", "optimizer", "scheduler")}
        manager.save(1, _Holder(state["model"]), state["optimizer"], state["scheduler"], extra=extra)
        if not self.asynchronous:
            fsync_tree(directory)
            return nothing_to_wait_for

        def wait() -> None:
            manager.flush()
            fsync_tree(directory)

        return wait

    def load(self, directory: Path) -> State:
        _, parts = CheckpointManager(str(directory), async_save=False, **OPTIONS).load_latest()
        return {name.removeprefix("extra/"): value for name, value in parts.items()}


class MoonclipAsync(Moonclip):
    asynchronous = True


class MoonclipAsyncLevel1(MoonclipAsync):
    """Durable after 1.4 s instead of 2.2 s for 505 MB, and the file 0.03 % larger: its fastest that compresses.

    Level 0 does not (505 MB, durable after 0.9 s) and is not measured. Medians of three, in one process.
    """

    level = 1
    settings = {**Moonclip.settings, "level": 1}
