"""fastckpt: a Checkpointer, and the calls that take a path or URL."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import fastckpt
from benchmarks.storage_contenders.base import Contender, Place, State, live


class OwnCheckpointer(Contender):
    in_place = True
    verifies = "each byte"
    settings = {
        "save": "Checkpointer.save_now(step).wait(), the Checkpointer being open",
        "restore": "a Checkpointer is made, and restores into a model and an optimizer that live",
    }

    def version(self) -> str:
        return str(fastckpt.__version__)

    def prepare(self, place: Place, state: State | None) -> None:
        self._place, self._step = place, 0
        self.training = live(place.size, place.device)
        self._open: fastckpt.Checkpointer | None = None
        if state is not None:
            self.training.load(state)
            self._open = self._make()

    def _make(self) -> fastckpt.Checkpointer:
        t = self.training
        objects = {"model": t.model, "optimizer": t.optimizer, "scheduler": t.scheduler, "progress": t.progress}
        return fastckpt.Checkpointer(self._place.root, objects, every=None, spot=None, keep=None)

    def save(self) -> None:
        assert self._open is not None
        self._step += 1
        self._open.save_now(self._step).wait()

    def restore(self) -> Any:
        began = time.perf_counter()
        self._open = self._make()
        self.opened_s = time.perf_counter() - began
        self._open.restore(**({"overlap": True} if self.overlap else {}))
        return self.training.state()

    def settle(self, found: Any) -> Any:
        assert self._open is not None
        if self.overlap:
            self._open.fence()
        return self.training.state()

    def one(self, name: str) -> Any:
        with fastckpt.open(self._place.root) as reader:
            return reader[name.replace("/", ".")]

    def close(self) -> None:
        if self._open is not None:
            self._open.close()


class OwnFile(Contender):
    verifies = "each byte"
    settings = {"save": "fastckpt.save(state, path or URL)", "restore": "fastckpt.load(path or URL), into new memory"}

    def version(self) -> str:
        return str(fastckpt.__version__)

    def prepare(self, place: Place, state: State | None) -> None:
        self._url, self._state = f"{place.root}/state.fckpt", state
        if not place.endpoint:
            Path(place.root).mkdir(parents=True, exist_ok=True)

    def save(self) -> None:
        assert self._state is not None
        fastckpt.save(self._state, self._url)

    def restore(self) -> Any:
        return fastckpt.load(self._url)

    def one(self, name: str) -> Any:
        with fastckpt.open(self._url) as reader:
            return reader[name.replace("/", ".")]
