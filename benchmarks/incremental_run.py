"""A long run of benchmarks/incremental.py: real training goes on from a cached state, and saves after every step, with retention.

training process   step ─→ save_now, retention ─→ bytes added, size of the store ─→ the store's clock goes on beyond the grace
                     │ every tenth save: "restore it", and the digest of what must come back
reading process    restore ─→ digest, bytes read, CPU, memory ─→ the same state saved in full elsewhere, and restored from there

python -m benchmarks.incremental_run ABOUT '{"task": …}' OUT
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import fastckpt
from benchmarks import ROOT
from benchmarks import incremental_states as states
from benchmarks.processes import answer
from benchmarks.storage_contenders.base import tensors_of
from benchmarks.workloads import changing
from fastckpt.repository.collector import Collector
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import GRACE_S
from fastckpt.store.base import ObjectInfo, Store
from fastckpt.store.local import LocalStore
from fastckpt.store.wrap import Wrapper

KEEP = 3


class Clocked(Wrapper):
    """A store whose clock is moved by hand: objects are as old as it says."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._now_s = 1.8e9
        self._written_s: dict[str, float] = {}

    def pass_time(self, seconds: float) -> None:
        self._now_s += seconds

    def put(self, key: str, data: Any) -> None:
        super().put(key, data)
        self._written_s[key] = self._now_s

    def put_if_absent(self, key: str, data: Any) -> None:
        super().put_if_absent(key, data)
        self._written_s[key] = self._now_s

    def replace_if_match(self, key: str, data: Any, version: str) -> None:
        super().replace_if_match(key, data, version)
        self._written_s[key] = self._now_s

    def head(self, key: str) -> ObjectInfo:
        return self._dated(super().head(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return map(self._dated, super().list(prefix))

    def _dated(self, info: ObjectInfo) -> ObjectInfo:
        return dataclasses.replace(info, modified_s=self._written_s.get(info.key, self._now_s))


class Reading:
    """The other process, which answers a line of JSON for each that it is asked."""

    def __init__(self, given: dict[str, Any], root: Path) -> None:
        asked = {**given, "root": str(root), "full": str(root.with_name("full"))}
        command = [sys.executable, "-m", "benchmarks.incremental_reader", json.dumps(asked)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )  # what it says of errors goes where this process's goes

    def ask(self, step: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"step": step}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the reading process ended with {self._process.wait()} at step {step}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def digest(state: states.State) -> str:
    """Of all bits of all tensors."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors_of(state):
        found.update(name.encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def begin(given: dict[str, Any]) -> changing.Run:
    """The training, where its first cached state left it."""
    task, precision = given["task"], changing.PRECISIONS[given["form"]]
    run = changing.Run(changing.TASKS[task](Path(given["cache"]), given["quick"]), precision)
    run.task.batch = max(2, run.task.batch // 4)  # the time goes to saves and checks
    run.resume(torch.load(Path(given["states"]) / "0.pt"), changing.first_step(task, precision, given["quick"]))
    return run


def living_bytes(store: Store) -> int:
    """Bytes of the packs that living checkpoints need: what is left once the grace of all others is over, and a pass has gone by."""
    view = Collector(Repository(store)).look()
    own = {key for commit in view.living.values() for key in view.packs[commit.save]}
    return sum(store.head(key).n_bytes for key in own | set(view.needed or ()))


def long_run(given: dict[str, Any]) -> dict[str, Any]:
    """All saves, and the checks between them."""
    run, form, root = begin(given), given["form"], Path(given["work"]) / "run"
    store = Clocked(LocalStore(root))
    saves: list[dict[str, Any]] = []
    checks: list[dict[str, Any]] = []
    reading = Reading(given, root)
    keep = fastckpt.Keep(last=KEEP)
    with fastckpt.Checkpointer(store, run.objects(form), every=None, spot=None, keep=keep) as checkpointer:
        checkpointer.restore()
        end_s = time.monotonic() + given["run_s"]
        for number in range(1, given["saves"] + 1):
            if time.monotonic() > end_s and checks:
                break
            began = time.perf_counter()
            run.step()
            stepped = time.perf_counter()
            before, cpu = states.files(root), time.process_time()
            checkpointer.save_now(number).wait()
            found = {"cpu_s": time.process_time() - cpu, **states.added(before, states.files(root))}
            store.pass_time(GRACE_S + 60)
            checkpointer.wait()
            found |= {"store_bytes": sum(states.files(root).values()), "step_s": stepped - began}
            found |= {"living_bytes": living_bytes(store)}
            saves.append({**found, "save_s": time.perf_counter() - stepped})
            if number % given["check"] == 0:
                state = run.state(form)
                check = reading.ask(number)
                if check["digest"] != digest(state):
                    raise RuntimeError(f"WRONG: save {number} of {given['task']}, {form} came back with other bits")
                checks.append({"save": number, **check})
    reading.close()
    return {"form": form, "raw_bytes": states.raw_bytes(run.state(form)), "saves": saves, "checks": checks}


def main(about: str, text: str, out: str) -> None:
    """about: for messages; text: what is asked, as JSON."""
    before = os.getloadavg()[0]
    given = json.loads(text)
    torch.set_num_threads(given["threads"])
    answer(long_run(given), before, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
