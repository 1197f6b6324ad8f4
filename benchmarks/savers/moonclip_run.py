"""moonclip, one CheckpointManager for the run. After the first save it writes deltas where they are shorter: its default."""

from __future__ import annotations

import functools
import threading
import time
from pathlib import Path
from typing import Any

import moonclip
from moonclip import CheckpointManager

from benchmarks.contenders.base import fsync_tree
from benchmarks.savers.base import EVERY, Saver
from benchmarks.workloads.gpt import Training


class Moonclip(Saver):
    # The topology only keeps it from asking the environment.
    options: dict[str, Any] = {"world_size": 1, "rank": 0}
    settings = {
        "save": "CheckpointManager(directory), async: its default; zstd level 3, fsync on, base kept in memory, deltas: its defaults",
        "contract": "save returns when the tensors are copied, and waits inside for the save before: nothing to wait for before a step",
        "durable": "flush() on a thread of its own (it releases the GIL), then fsync of the directories",
    }

    def version(self) -> str:
        return str(moonclip.__version__)

    def open(self, training: Training, directory: Path) -> None:
        self._training, self._directory = training, directory
        self._manager = CheckpointManager(str(directory), **self.options)
        self._watchers: list[threading.Thread] = []
        self._queue_wait = 0.0

    def after_step(self, number: int) -> None:
        if number % EVERY:
            return
        called = time.perf_counter()
        t, state = self._training, self._training.state()
        extra = {"progress": state["progress"], "rng": state["rng"]}
        self._manager.save(number, t.model, t.optimizer, t.scheduler, extra=extra)
        self._queue_wait += self._manager.last_queue_wait()
        watcher = threading.Thread(target=functools.partial(self._watch, number, called))
        watcher.start()
        self._watchers.append(watcher)

    def _watch(self, number: int, called: float) -> None:
        self._manager.flush()
        fsync_tree(self._directory)
        self.note_durable(number, called)

    def drain(self) -> None:
        for watcher in self._watchers:
            watcher.join()
        self._watchers.clear()

    def counters(self) -> dict[str, float]:
        return {"queue_wait_s": self._queue_wait}


class MoonclipLean(Moonclip):
    options = {**Moonclip.options, "keep_base_in_memory": False}
    settings = {**Moonclip.settings, "options": "keep_base_in_memory=False: one copy of the state less in memory"}
