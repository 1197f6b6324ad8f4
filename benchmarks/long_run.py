"""Whether a run's age costs anything: thousands of saves, and what a save, its retention and a fresh reader take as they add up.

    python benchmarks/long_run.py [--saves 2000] [--window 10] [--latency-ms 20] [--quick] [--out DIR] [--json] [--plot FILE.json]

A Checkpointer saves a small state again and again, each time with its retention (`Keep(last=3)`, the default grace of two hours). Twice:

    a save every 10 minutes   the default; tombstones and retired bytes come to their end
    a save every 3 s          all that was ever retired is still within its grace: what that costs is the slope in docs/guarantees.md

Honest and not: the objects live in another process, in memory; the store's clock is moved by hand. Each request is charged `--latency-ms`,
which nobody waits for, a LIST for each 1,000 keys, requests one after another. CPU is real, of all threads of the process, and has the
pipe to the other process in it. Bytes are those of bodies; an entry of a LIST counts 300 and its key, as S3's XML has it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import fastckpt
from benchmarks import ROOT, long_run_report, measure, output
from benchmarks.progress import bar
from fastckpt.cli import ls, prune
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import GRACE_S, Keep
from fastckpt.store.base import ObjectInfo, Store
from fastckpt.store.memory import MemoryStore
from fastckpt.store.wrap import Wrapper
from fastckpt.training.checkpointer import Checkpointer

KEYS_A_PAGE = 1000
BYTES_AN_ENTRY = 300
KEEP = Keep(last=3)
RUNS = {"a save every 10 minutes": 600.0, "a save every 3 s": 3.0}
READERS = ("open", "restore", "ls", "prune")
SAMPLES = (10, 30, 100, 300, 1000, 2000)
RETENTION = "fastckpt-retention"
"""The thread that a Checkpointer retires with."""


class Objects(MemoryStore):
    """The store in its own process, with a clock that is moved."""

    def __init__(self) -> None:
        self._now_s = 1.8e9
        super().__init__(clock=lambda: self._now_s, name="long-run")

    def pass_time(self, seconds: float) -> None:
        self._now_s += seconds

    def listed(self, prefix: str) -> list[ObjectInfo]:
        return list(self.list(prefix))

    def part(self, key: str, offset: int, n_bytes: int) -> bytes:
        out = bytearray(n_bytes)
        self.get_into(key, offset, out)
        return bytes(out)

    def copy(self) -> Objects:
        """Another store with the same objects and time, for whoever changes something."""
        found = Objects()
        found._now_s, found._objects = self._now_s, dict(self._objects)
        return found


class Server(BaseManager):
    """The process of the stores."""


def _itself(objects: Objects) -> Objects:
    return objects


_VERBS = ("put", "put_if_absent", "get", "part", "head", "listed", "delete", "pass_time", "copy")
Server.register("Objects", Objects, exposed=_VERBS, method_to_typeid={"copy": "Copy"})
Server.register("Copy", _itself, exposed=_VERBS)


class Remote(Store):
    """A store in the other process."""

    url = "memory://long-run"

    def __init__(self, objects: Any) -> None:
        self._objects = objects

    def put(self, key: str, data: Any) -> None:
        self._objects.put(key, bytes(data))

    def put_if_absent(self, key: str, data: Any) -> None:
        self._objects.put_if_absent(key, bytes(data))

    def get(self, key: str) -> bytes:
        return bytes(self._objects.get(key))

    def get_into(self, key: str, offset: int, out: Any) -> None:
        view = memoryview(out).cast("B")
        view[:] = self._objects.part(key, offset, view.nbytes)

    def head(self, key: str) -> ObjectInfo:
        found: ObjectInfo = self._objects.head(key)
        return found

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(self._objects.listed(prefix))

    def delete(self, key: str) -> None:
        self._objects.delete(key)


@dataclass
class Cost:
    """Of some work: requests and bytes of bodies, both ways; seconds of CPU."""

    requests: int = 0
    n_bytes: int = 0
    cpu_s: float = 0.0

    def add(self, other: Cost) -> None:
        self.requests += other.requests
        self.n_bytes += other.n_bytes
        self.cpu_s += other.cpu_s


class Counted(Wrapper):
    """Counts what an object store would charge; retention's apart."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self._costs = {True: Cost(), False: Cost()}

    def put(self, key: str, data: Any) -> None:
        super().put(key, data)
        self._count(0, memoryview(data).nbytes)

    def put_if_absent(self, key: str, data: Any) -> None:
        super().put_if_absent(key, data)
        self._count(0, memoryview(data).nbytes)

    def get_into(self, key: str, offset: int, out: Any) -> None:
        super().get_into(key, offset, out)
        self._count(0, memoryview(out).nbytes)

    def _call(self, verb: str, key: str, operation: Callable[[], Any]) -> Any:
        found: Any = None
        try:
            found = operation()
            return found
        finally:
            n_bytes = len(found) if isinstance(found, bytes) else 0
            n_requests = 1
            if verb == "list" and found is not None:
                n_bytes = sum(BYTES_AN_ENTRY + len(info.key) for info in found)
                n_requests = max(1, -(-len(found) // KEYS_A_PAGE))
            self._count(n_requests, n_bytes)

    def _count(self, n_requests: int, n_bytes: int) -> None:
        with self._lock:
            self._costs[threading.current_thread().name == RETENTION].add(Cost(n_requests, n_bytes))

    def take(self) -> tuple[Cost, Cost]:
        """What came together since the last call: retention's, and all else."""
        with self._lock:
            found, self._costs = self._costs, {True: Cost(), False: Cost()}
        return found[True], found[False]


def one_run(server: Server, seconds_a_save: float, options: argparse.Namespace, told: Callable[[int], None]) -> Any:
    """Samples of one run: medians of the `window` saves up to each, and what a fresh reader takes there."""
    objects = server.Objects()  # type: ignore[attr-defined]
    store = Counted(Remote(objects))
    state = {"w": torch.zeros(1 << 14), "step": {"n": 0}}
    wanted = [n for n in SAMPLES if n <= options.saves]
    samples = []
    saves: list[Cost] = []
    retentions: list[Cost] = []
    with Checkpointer(store, state, every=None, spot=None, keep=KEEP, grace_s=GRACE_S) as ckpt:
        ckpt.restore()
        for step in range(1, wanted[-1] + 1):
            state["w"].uniform_()  # type: ignore[attr-defined]
            ckpt.wait()
            store.take()
            began = time.process_time()
            ckpt.save_now(step).wait()
            saved = time.process_time()
            ckpt.wait()
            done = time.process_time()
            of_retention, as_save_error = store.take()
            as_save_error.cpu_s, of_retention.cpu_s = saved - began, done - saved
            saves, retentions = (
                [*saves, as_save_error][-options.window :],
                [*retentions, of_retention][-options.window :],
            )
            objects.pass_time(seconds_a_save)
            if step in wanted:
                sample = {"save": middle(saves), "retention": middle(retentions), **readers(objects)}
                rows = {name: asdict(cost) for name, cost in sample.items()}
                gc.collect()
                measure.libc.malloc_trim(0)
                there = objects.listed("")
                samples.append(
                    {
                        "saves": step,
                        "memory_bytes": measure.memory("VmRSS"),
                        "objects": len(there),
                        "tombstones_and_commits": sum(info.key.startswith("commits/") for info in there),
                        "costs": rows,
                    }
                )
            told(step)
    return samples


def middle(costs: list[Cost]) -> Cost:
    """Medians, each by itself."""
    return Cost(
        int(statistics.median(c.requests for c in costs)),
        int(statistics.median(c.n_bytes for c in costs)),
        statistics.median(c.cpu_s for c in costs),
    )


def readers(objects: Any) -> dict[str, Cost]:
    """What somebody who comes fresh takes, each three times; prune, which changes something, in copies of the store."""
    found: dict[str, list[Cost]] = {name: [] for name in READERS}
    for _ in range(3):
        store = Counted(Remote(objects))
        target = {"w": torch.zeros(1 << 14), "step": {"n": 0}}
        with timed(store, found["open"]):
            evaluation = Checkpointer(store, target, read_only=True)
        with timed(store, found["restore"]):
            evaluation.restore()
        evaluation.close()
        with timed(store, found["ls"]):
            ls.list_repository(Repository(store))
        copy = Counted(Remote(objects.copy()))
        with timed(copy, found["prune"]), contextlib.redirect_stdout(io.StringIO()):
            prune.prune(Repository(copy), PRUNE)
    return {name: middle(costs) for name, costs in found.items()}


def _prune_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    prune.add_arguments(parser)
    asked = parser.parse_args(["url", "--keep-last=3", "--grace=0", "--run-is-stopped", "--yes"])
    asked.json = True  # every command has it, from the parser above it
    return asked


PRUNE = _prune_arguments()
"""As `fastckpt prune --keep-last 3 --run-is-stopped --yes --json`."""


@contextlib.contextmanager
def timed(store: Counted, into: list[Cost]) -> Iterator[None]:
    store.take()
    began = time.process_time()
    yield
    of_retention, of_rest = store.take()
    of_rest.add(of_retention)
    of_rest.cpu_s = time.process_time() - began
    into.append(of_rest)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=2000, help="of each run (default 2000)")
    parser.add_argument(
        "--window", type=int, default=10, help="saves up to a sample that it is the median of (default 10)"
    )
    parser.add_argument("--latency-ms", type=float, default=20.0, help="that each request is charged (default 20)")
    parser.add_argument("--quick", action="store_true", help="100 saves; no result")
    parser.add_argument("--plot", type=Path, metavar="FILE.json", help="draw an old result again, and measure nothing")
    output.add_options(parser)
    options = parser.parse_args()
    if options.plot is not None:
        output.write_beside(options.plot, long_run_report.markdown, long_run_report.plot)
        return 0
    options.saves = min(options.saves, 100) if options.quick else options.saves
    if options.saves < SAMPLES[0] or options.window < 1:
        parser.error(f"--saves must be {SAMPLES[0]} or more, --window 1 or more")
    runs = {}
    with Server(ctx=multiprocessing.get_context("spawn")) as server:
        for number, (name, seconds) in enumerate(RUNS.items()):

            def told(step: int, before: int = number * options.saves, name: str = name) -> None:
                if sys.stderr.isatty():
                    bar(before + step, len(RUNS) * options.saves, f"{name}: save {step}")

            runs[name] = {"seconds_a_save": seconds, "samples": one_run(server, seconds, options, told)}
    result = {
        **output.head("long-run", measure.machine(ROOT)),
        "versions": {"fastckpt": fastckpt.__version__, "torch": str(torch.__version__)},
        "settings": {
            "saves": options.saves,
            "window": options.window,
            "latency_s": options.latency_ms / 1e3,
            "grace_s": GRACE_S,
            "keys_a_page": KEYS_A_PAGE,
            "bytes_an_entry": BYTES_AN_ENTRY,
        },
        "runs": runs,
    }
    output.publish(
        result, options, lambda path: output.write_beside(path, long_run_report.markdown, long_run_report.plot)
    )
    return output.exit_code(long_run_report.uneven(result))


if __name__ == "__main__":
    sys.exit(main())
