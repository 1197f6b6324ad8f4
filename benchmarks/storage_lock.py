"""Rows, and the worker, of how long this project's threads hold the interpreter's lock.

Another process looks into the memory of the one that saves, some ten thousand times a second, whether the lock is held there:

    held = looks that found it held ÷ all looks × seconds

Nobody in that process wants the lock but its own work, so nothing is added by looking: a thread that asked for the lock all the time
would measure how long threads take to wake up. All threads count, the calling one and its `save_now` or `restore` included. Of known
work, pure Python of 0.2 s, the same look finds what the table calls the check.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import sys
import time
from typing import Any

from benchmarks.processes import answer
from benchmarks.storage_lab import Lab, null
from benchmarks.storage_rows import Row, errors, figures, middle, missing, row

BAR_MS = 0.02
MEASURED = ("save", "restore")
WHO = "Checkpointer"
REPEATS = 3
LOOK_EVERY_S = 20e-6  # and what the kernel adds to so short a sleep
CHECK_S = 0.2
LIMIT_S = 300.0
_PHASES = ("nothing", "idle", "check", *MEASURED, "end")
_MARK_US = 4321
_HELD_AT = 16
"""Bytes from the lock's switch interval to whether it is held (CPython's struct _gil_runtime_state, 3.10 to 3.14)."""
_RUNTIME_BYTES = 1 << 20


def count(lab: Lab) -> int:
    return lab.rounds


def measure(lab: Lab) -> list[Row]:
    for number in range(lab.rounds):
        with null(keep=True) as (at, _):
            place = {"root": f"s3://{at.bucket}/lock-{number}", "size": lab.size, "endpoint": at.url}
            asked = {"place": place, "state": str(lab.state())}
            lab.keep("lock", WHO, lab.process("benchmarks.storage_lock", "interpreter's lock", asked, at=at))
    return rows(lab)


def rows(lab: Lab) -> list[Row]:
    samples = lab.of("lock", WHO)
    found = []
    for what in MEASURED:
        name, asked = f"interpreter's lock: held by our threads, per MiB {what}d", f"≤ {BAR_MS} ms"
        values = figures(samples, f"{what}_ms_per_mib")
        if not values:
            found.append(missing("lock", name, asked, errors(samples)))
            continue
        parts = {key: middle(figures(samples, key)) for key in (f"{what}_ms", f"{what}_own_ms", "idle_ms", "check_ms")}
        note = (
            f"{parts[f'{what}_ms']:.1f} ms in all, processor time of the calling thread {parts[f'{what}_own_ms']:.1f} ms; idle "
            f"{parts['idle_ms']:.2f} ms a second; check: {parts['check_ms']:.0f} ms of {1e3 * CHECK_S:.0f}"
        )
        found.append(row("lock", name, asked, values, unit="ms/MiB", bar=BAR_MS, note=note))
    return found


def lock_address() -> int:
    """Where this process's interpreter keeps whether its lock is held. RuntimeError if that is not found.

    The switch interval stands beside it: a value of our own marks the place.
    """
    start = ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, "_PyRuntime"))
    before = sys.getswitchinterval()
    sys.setswitchinterval(_MARK_US / 1e6)
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        data = os.pread(memory, _RUNTIME_BYTES, start)
    finally:
        os.close(memory)
        sys.setswitchinterval(before)
    mark = (_MARK_US).to_bytes(8, "little")
    at = data.find(mark)
    if at < 0 or data.find(mark, at + 1) >= 0:
        raise RuntimeError("the interpreter's lock was not found in its memory")
    return start + at + _HELD_AT


def look(pid: int, address: int, phase: Any) -> dict[str, float]:
    """Share of looks that found the lock held, by phase, until the last one."""
    held, looks = [0] * len(_PHASES), [0] * len(_PHASES)
    end = len(_PHASES) - 1
    end_s = time.monotonic() + LIMIT_S
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        while (now := phase.value) != end and time.monotonic() < end_s:
            held[now] += os.pread(memory, 1, address) != b"\0"
            looks[now] += 1
            time.sleep(LOOK_EVERY_S)
    finally:
        os.close(memory)
    return {name: held[n] / max(1, looks[n]) for n, name in enumerate(_PHASES)}


def _busy(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def work(given: dict[str, Any], phase: Any, pipe: Any) -> None:
    """The process that is looked into: saves and restores, and tells which phase it is in. Sends seconds of each phase."""
    import torch

    from benchmarks.storage_contenders import make
    from benchmarks.storage_contenders.base import Place, flat

    state = torch.load(given["state"])
    n_bytes = sum(tensor.nbytes for tensor in flat(state).values())
    contender, place = make(WHO), Place(**given["place"])
    contender.prepare(place, state)
    contender.save()
    pipe.send(lock_address())
    pipe.recv()
    found: dict[str, float] = {"bytes": n_bytes}

    def during(name: str, call: Any, repeats: int = 1) -> None:
        began, own = time.perf_counter(), time.thread_time()
        phase.value = _PHASES.index(name)
        for _ in range(repeats):
            call()
        phase.value = 0
        found[f"{name}_s"] = (time.perf_counter() - began) / repeats
        found[f"{name}_own_ms"] = 1e3 * (time.thread_time() - own) / repeats

    during("idle", lambda: time.sleep(0.5))
    during("check", lambda: _busy(CHECK_S))
    during("save", contender.save, REPEATS)
    contender.close()
    contender.prepare(place, None)
    contender.restore()  # the first one imports
    contender.close()
    contender.prepare(place, None)
    during("restore", contender.restore)
    contender.close()
    phase.value = len(_PHASES) - 1
    pipe.send(found)


def main(_: str, text: str, out: str) -> None:
    before = os.getloadavg()[0]
    context = multiprocessing.get_context("spawn")
    phase, (here, there) = context.Value("i", 0, lock=False), context.Pipe()
    child = context.Process(target=work, args=(json.loads(text), phase, there))
    child.start()
    address = here.recv()
    here.send("go")
    assert child.pid is not None
    shares = look(child.pid, address, phase)
    found = here.recv()
    child.join()
    mib = found["bytes"] / 2**20
    for name in MEASURED:
        found[f"{name}_ms"] = 1e3 * shares[name] * found[f"{name}_s"]
        found[f"{name}_ms_per_mib"] = found[f"{name}_ms"] / mib
    found["idle_ms"] = 1e3 * shares["idle"]
    found["check_ms"] = 1e3 * shares["check"] * found["check_s"]
    answer({**found, "seconds": found["save_s"]}, before, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
