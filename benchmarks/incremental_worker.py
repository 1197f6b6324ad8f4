"""One contender of benchmarks/incremental.py, in a process of its own: a first save of a state, then one of each state some steps later.

    fastckpt     for each gap the first state in full, then the one `gap` steps later, which so has the first one as its base
    moonclip     its deltas are always against the last full snapshot, which is the first state
    torch.save   each state, whole

Runs in the environment of its contender. Costs are those of the second save alone: bytes of new and grown files, and processor seconds of
all threads of the process, from the call until it is durable and retention has ended.

    python -m benchmarks.incremental_worker ABOUT '{"contender": …}' OUT
"""

from __future__ import annotations

import abc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import incremental_states as states
from benchmarks.processes import answer
from benchmarks.storage_contenders.base import flat

State = dict[str, Any]
THREADS = 1
"""Of torch: the threads of a second one would spin after each change of the state, and be counted with the save behind it."""


class Contender(abc.ABC):
    settings: dict[str, object] = {}
    begins_anew = False
    """Whether the first state is saved again before each gap, so that it is the base."""

    @abc.abstractmethod
    def version(self) -> str: ...

    @abc.abstractmethod
    def open(self, folder: Path, state: State) -> None:
        """Begin anew, with this live state."""

    @abc.abstractmethod
    def save(self, step: int, full: bool) -> None:
        """Save what the state is now, durably. full: without a base."""

    def close(self) -> None:  # noqa: B027 - most have nothing to let go of
        """End what `open` began."""


class Fastckpt(Contender):
    settings = {
        "save": "Checkpointer(directory, state, every=None, spot=None).save_now(step), all options their defaults; keep=3",
        "first state": "save_now(step, full=True)",
    }
    begins_anew = True

    def version(self) -> str:
        import fastckpt

        return str(fastckpt.__version__)

    def open(self, folder: Path, state: State) -> None:
        import fastckpt

        self._checkpointer = fastckpt.Checkpointer(folder, state, every=None, spot=None)
        self._checkpointer.restore()

    def save(self, step: int, full: bool) -> None:
        self._checkpointer.save_now(step, full=full).wait()
        self._checkpointer.wait()

    def close(self) -> None:
        self._checkpointer.close()


class Moonclip(Contender):
    settings = {
        "save": "CheckpointManager(directory).save_raw, then flush: zstd level 3, the base kept in memory, XOR deltas against the "
        "last full snapshot where they are smaller: its defaults"
    }

    def version(self) -> str:
        import moonclip

        return str(moonclip.__version__)

    def open(self, folder: Path, state: State) -> None:
        from moonclip import CheckpointManager

        self._manager = CheckpointManager(str(folder), world_size=1, rank=0)
        self._state = state

    def save(self, step: int, full: bool) -> None:
        self._manager.save_raw(step, flat(self._state))
        self._manager.flush()


class TorchSave(Contender):
    def version(self) -> str:
        return str(torch.__version__)

    def open(self, folder: Path, state: State) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._state = folder, state

    def save(self, step: int, full: bool) -> None:
        with open(self._folder / f"{step}.pt", "wb") as file:
            torch.save(self._state, file)
            file.flush()
            os.fsync(file.fileno())


CONTENDERS: dict[str, type[Contender]] = {"fastckpt": Fastckpt, "moonclip": Moonclip, "torch.save": TorchSave}


def measured(contender: Contender, folder: Path, step: int, full: bool = False) -> dict[str, Any]:
    """One save, and what it has cost."""
    before = states.files(folder)
    states.settle()
    cpu, began = time.process_time(), time.perf_counter()
    contender.save(step, full)
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    return {"cpu_s": cpu_s, "seconds": seconds, **states.added(before, states.files(folder))}


def one_form(given: dict[str, Any], form: str, work: Path) -> dict[str, Any]:
    """The saves of one form of a task's states. The first pair of saves warms up: it finds memory, threads and the speed of the disk."""
    folder, task = Path(given["states"][form]), given["task"]
    live = states.read(folder, 0, form, task)
    contender = CONTENDERS[given["contender"]]()
    contender.open(work / form, live)
    first, found = [], {}
    for step, gap in enumerate([given["gaps"][-1], *given["gaps"]]):
        if step == 0 or contender.begins_anew:
            states.change(live, states.read(folder, 0, form, task))
            first.append(measured(contender, work / form, 2 * step + 1, full=True))
        states.change(live, states.read(folder, gap, form, task))
        found[str(gap)] = measured(contender, work / form, 2 * step + 2)
    contender.close()
    return {"raw_bytes": states.raw_bytes(live), "first": first[1:] or first, "gaps": found}


def rehearse(name: str, work: Path) -> None:
    """Imports, threads and buffers: twice, with a small state, before anything counts."""
    state = {"model": {"w": torch.randn(1 << 20), "b": torch.randn(1 << 10)}}
    contender = CONTENDERS[name]()
    contender.open(work / "rehearsal", state)
    for step in (1, 2):
        contender.save(step, step == 1)
        state["model"]["w"].mul_(1.0001)
    contender.close()


def main(about: str, text: str, out: str) -> None:
    """about: for messages; text: what is asked, as JSON."""
    torch.set_num_threads(THREADS)
    before = os.getloadavg()[0]
    given = json.loads(text)
    contender = CONTENDERS[given["contender"]]
    rehearse(given["contender"], Path(given["work"]))
    forms = {form: one_form(given, form, Path(given["work"])) for form in given["forms"]}
    described = {"version": contender().version(), "settings": contender.settings}
    answer({**described, "forms": forms, "threads": torch.get_num_threads()}, before, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
