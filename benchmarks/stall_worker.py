"""One measurement of stall.py in a process of its own: a training loop with one contender, its peak memory, or who it is.

Started by stall.py; writes one JSON object to the file named last.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, savers
from benchmarks.processes import answer
from benchmarks.savers.base import EVERY, Saver
from benchmarks.workloads import gpt

THREADS = 2  # of torch
# Step numbers. 10 is the warm-up save: first buffers, imports, threads, compiled kernels. Of the steps that count the third
# saves, so that seven follow the last save: what it does in the background falls into the loop.
WARM_UP = range(9, 13)
FIRST = 18
MEMORY_SAVES = (10, 20, 30)
QUIET_AFTER_S = 0.5  # behind durable: contenders tidy up


class Hooks:
    """The time between the first and the last hook before the optimizer's step: those of the contender lie between."""

    def __init__(self, training: gpt.Training, saver: Saver, directory: Path) -> None:
        self._saver = saver
        self.seconds = 0.0
        self._started = 0.0
        training.optimizer.register_step_pre_hook(self._start)
        saver.open(training, directory)
        training.optimizer.register_step_pre_hook(self._stop)

    def _start(self, *_: object) -> None:
        self._started = time.perf_counter()

    def _stop(self, *_: object) -> None:
        self._saver.before_update()
        self.seconds = time.perf_counter() - self._started


def load(size: str, state: Path) -> gpt.Training:
    training = gpt.Training(size)
    training.load(torch.load(state))
    return training


def one_step(training: gpt.Training, saver: Saver, hooks: Hooks, number: int) -> dict[str, float]:
    started = time.perf_counter()
    training.step()
    trained = time.perf_counter()
    saver.after_step(number)
    ended = time.perf_counter()
    return {
        "step": number,
        "at": started,
        "wall": ended - started,
        "call": ended - trained,
        "fence": hooks.seconds,
    }


def loop(saver: Saver, size: str, n_steps: int, state: Path, directory: Path) -> dict[str, Any]:
    training = load(size, state)
    hooks = Hooks(training, saver, directory)
    warm_up = [one_step(training, saver, hooks, number) for number in WARM_UP]
    saver.drain()
    os.sync()  # somebody else's dirty pages, and the warm-up's, are not this loop's
    cpu, started = time.process_time(), time.perf_counter()
    steps = [one_step(training, saver, hooks, number) for number in range(FIRST, FIRST + n_steps)]
    total, cpu = time.perf_counter() - started, time.process_time() - cpu
    saver.drain()
    return {
        "total": total,
        "cpu": cpu,
        "steps": steps,
        "warm_up": warm_up,
        "durable": saver.durable,
        "saves": saves(steps, saver),
        "counters": saver.counters(),
        "quiet_steps": quiet_steps(steps, saver),
        "bytes": measure.size(directory) if directory.exists() else 0,
        "first_save": {"blocked": sum(s["call"] + s["fence"] for s in warm_up), **saver.durable.get(EVERY, {})},
    }


def saves(steps: list[dict[str, float]], saver: Saver) -> list[dict[str, float]]:
    """For each save the seconds that the caller was blocked, in the call and in all fences and calls until the next save."""
    found: list[dict[str, float]] = []
    for step in steps:
        number = int(step["step"])
        if found:
            found[-1]["fence"] += step["fence"]
        if number in saver.durable:
            found.append(
                {"step": number, "call": step["call"], "fence": 0.0, "durable": saver.durable[number]["seconds"]}
            )
        elif found:
            found[-1]["call"] += step["call"]
    due = [int(step["step"]) for step in steps if step["step"] % EVERY == 0]
    if saver.name != "none" and len(found) != len(due):
        raise RuntimeError(f"saves were due at steps {due}, durable are {[s['step'] for s in found]}")
    return found


def quiet_steps(steps: list[dict[str, float]], saver: Saver) -> list[float]:
    """Wall times of the steps of this process during which nothing was saved: the baseline that no other process can shift."""
    found = []
    busy = [(d["at"] - d["seconds"], d["at"] + QUIET_AFTER_S) for d in saver.durable.values()]
    for step in steps:
        begin, end = step["at"], step["at"] + step["wall"]
        if all(end < start or begin > stop for start, stop in busy):
            found.append(step["wall"])
    return found


def peak_memory(saver: Saver, size: str, state: Path, directory: Path) -> dict[str, Any]:
    """Saves without training: activations and gradients are not what a save costs, and vary more than it does.

    The optimizer's step without gradients calls the hooks and changes nothing, and needs no memory.
    """
    training = load(size, state)
    rehearse(saver.name, training, directory)
    hooks = Hooks(training, saver, directory)
    training.optimizer.zero_grad(set_to_none=True)
    training.optimizer.step()
    span = measure.Span()
    peaks, calls, fences = [], [], []
    for number in MEMORY_SAVES:
        started = time.perf_counter()
        saver.after_step(number)
        calls.append(time.perf_counter() - started)
        training.optimizer.step()
        fences.append(hooks.seconds)
        saver.drain()
        peaks.append(span.peak())
        change(training)
    return {
        "peak": peaks[-1],
        "peaks": peaks,
        "calls": calls,
        "fences": fences,
        "durable": [saver.durable[n]["seconds"] for n in MEMORY_SAVES],
    }


@torch.no_grad()
def change(training: gpt.Training) -> None:
    """In place and without memory: a contender that stores differences is not to find that there are none."""
    for tensor in measure.tensors([training.model.state_dict(), training.optimizer.state_dict()]):
        if tensor.is_floating_point():
            tensor.mul_(1.001)


def rehearse(name: str, training: gpt.Training, directory: Path) -> None:
    """Imports, thread pools, process groups: with a few bytes, before memory counts. Models of the smallest size have them all."""
    tiny = gpt.Training("tiny", 1)
    tiny.step()
    other = savers.make(name)
    place = directory.with_name(directory.name + "-rehearsal")
    place.mkdir()
    hooks = Hooks(tiny, other, place)
    for number in (9, EVERY, 11):
        one_step(tiny, other, hooks, number)
    other.drain()


def main(mode: str, name: str, size: str, amount: str, state: str, directory: str, out: str) -> None:
    """amount: how many steps, or the budget in bytes (0: the contender's default)."""
    torch.set_num_threads(THREADS)
    place = Path(directory)
    before = os.getloadavg()[0]
    saver = savers.make(name, int(amount) if mode == "memory" else 0)
    result: dict[str, Any]
    if mode == "describe":
        bytes_of_state = sum(m.nbytes for m in measure.memories(torch.load(state, mmap=True)))
        result = {
            "version": saver.version(),
            "settings": saver.settings,
            "note": saver.note,
            "threads": torch.get_num_threads(),
            "state_bytes": bytes_of_state,
        }
    elif mode == "memory":
        result = peak_memory(saver, size, Path(state), place)
    else:
        result = loop(saver, size, int(amount), Path(state), place)
    answer(result, before, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
