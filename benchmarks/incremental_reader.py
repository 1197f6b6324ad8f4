"""The reading process of a long run of benchmarks/incremental.py: restores what it is asked for, and the same state from a full save.

Each restore is made twice, and the lesser processor seconds count: what else the machine does only adds to them.

    python -m benchmarks.incremental_reader '{"task": …, "root": …, "full": …}'
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

import fastckpt
from benchmarks import incremental_states as states
from benchmarks import measure
from benchmarks.incremental_run import digest
from fastckpt.store.base import Store
from fastckpt.store.local import LocalStore
from fastckpt.store.wrap import Wrapper

TRIES = 5


class Counted(Wrapper):
    """Counts the bytes that are read, but for those of files that are mapped or opened by name."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.has_files = False  # or packs are read without asking the store
        self._lock = threading.Lock()
        self.n_bytes = 0

    def get(self, key: str) -> bytes:
        found = super().get(key)
        self._add(len(found))
        return found

    def get_version(self, key: str) -> tuple[bytes, str]:
        found = super().get_version(key)
        self._add(len(found[0]))
        return found

    def get_into(self, key: str, offset: int, out: Any) -> None:
        super().get_into(key, offset, out)
        self._add(memoryview(out).nbytes)

    def _add(self, n_bytes: int) -> None:
        with self._lock:
            self.n_bytes += n_bytes


def restore(root: str, step: int, live: states.State) -> dict[str, float]:
    """One restore into tensors that live."""
    store = Counted(LocalStore(root))
    span = measure.Span()
    with fastckpt.Checkpointer(store, live, read_only=True) as checkpointer:
        checkpointer.restore(step)
    return {"cpu_s": span.cpu(), "seconds": span.seconds(), "memory": span.peak(), "read": store.n_bytes}


def least(tries: list[dict[str, float]]) -> dict[str, float]:
    return {key: min(one[key] for one in tries) for key in tries[0]}


def in_full(root: str, step: int, live: states.State) -> None:
    """Save the same state without a base."""
    shutil.rmtree(root, ignore_errors=True)
    with fastckpt.Checkpointer(root, live, every=None, spot=None, options=without_deltas()) as checkpointer:
        checkpointer.restore()
        checkpointer.save_now(step).wait()


def without_deltas() -> fastckpt.Options:
    """The defaults, but that every save is whole."""
    return dataclasses.replace(fastckpt.Options.from_env(), deltas=False)


def answer_one(given: dict[str, Any], step: int, live: states.State) -> dict[str, Any]:
    ours = [restore(given["root"], step, live)]
    found = digest(live)
    in_full(given["full"], step, live)
    full = [restore(given["full"], step, live)]
    for _ in range(1, TRIES):
        ours.append(restore(given["root"], step, live))
        full.append(restore(given["full"], step, live))
    stored = sum(states.files(Path(given["full"])).values())
    return {"digest": found, "ours": least(ours), "full": {**least(full), "stored": stored}}


def main(text: str) -> None:
    """text: what the long run is about, as JSON. Then a line for each checkpoint."""
    given = json.loads(text)
    torch.set_num_threads(1)
    live = states.read(Path(given["states"]), 0, given["form"], given["task"])
    in_full(given["full"], 1, live)
    restore(given["full"], 1, live)  # imports, threads and buffers
    for line in sys.stdin:
        began = time.perf_counter()
        found = answer_one(given, json.loads(line)["step"], live)
        print(json.dumps({**found, "check_s": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
