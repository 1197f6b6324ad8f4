"""fastckpt with its defaults. It syncs file and directory itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fastckpt
from benchmarks.contenders.base import Contender, State, nothing_to_wait_for


class Fastckpt(Contender):
    settings = {"save": "fastckpt.save(state, path)", "load": "fastckpt.load(path), weights_only=True"}

    def version(self) -> str:
        return str(fastckpt.__version__)

    def begin(self, state: State, directory: Path) -> Callable[[], None]:
        fastckpt.save(state, directory / "state.fckpt")
        return nothing_to_wait_for

    def load(self, directory: Path) -> State:
        state: State = fastckpt.load(directory / "state.fckpt")
        return state


class FastckptAsync(Fastckpt):
    asynchronous = True
    # The stall ends when .staged is done: the first moment at which the caller may change its tensors.
    settings = {"save": "fastckpt.save_async(state, path); stalled until .staged"}

    def begin(self, state: State, directory: Path) -> Callable[[], None]:
        handle = fastckpt.save_async(state, directory / "state.fckpt")
        handle.staged.result()

        def wait() -> None:
            handle.wait()

        return wait
