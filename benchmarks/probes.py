"""The machine's own limits for the same bytes, taken in the same rounds."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import fastckpt
from benchmarks import measure
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.sources import PathSource

PIECE = 4 << 20
# A limit is what the machine can do at its best: on a virtual machine the first write into memory that the host has not
# given out yet takes twice the time of the next (0.23 s and 0.10 s for 53 MB).
TRIES = 3


def probe(state: Path, directory: Path) -> dict[str, float]:
    """The bytes are those of the workload's own file: a disk or a hypervisor that compresses gets no zeros."""
    source = torch.from_numpy(np.fromfile(state, np.uint8))
    file = directory / "state.fckpt"
    fastckpt.save(torch.load(state), file)
    tries = [{**_one(source, directory), **floor(source, file)} for _ in range(TRIES)]
    best = {key: min(t[key] for t in tries) for key in tries[0]}
    best["resident_before_cold"] = max(t["resident_before_cold"] for t in tries)
    return {"bytes": source.numel(), **best}


def _one(source: torch.Tensor, directory: Path) -> dict[str, float]:
    result: dict[str, float] = {}
    target = torch.ones_like(source)  # touched, so that the copy pays for no page faults
    threads = torch.get_num_threads()
    for name, n in (("memcpy_one_thread", 1), ("memcpy_all_threads", threads)):
        torch.set_num_threads(n)
        start = time.perf_counter()
        target.copy_(source)
        result[name] = time.perf_counter() - start
    del target
    start = time.perf_counter()
    fresh = source.clone()
    result["memcpy_into_new_memory"] = time.perf_counter() - start
    del fresh

    path, data = directory / "probe", source.numpy().data
    path.unlink(missing_ok=True)
    os.sync()
    start = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    for at in range(0, len(data), PIECE):
        os.write(fd, data[at : at + PIECE])
    result["write"] = time.perf_counter() - start
    os.fsync(fd)
    result["write_fsync"] = time.perf_counter() - start
    os.close(fd)

    buffer = bytearray(PIECE)
    for name in ("read_warm", "read_cold"):
        if name == "read_cold":
            measure.evict(directory)
            result["resident_before_cold"] = measure.resident(directory)
        start = time.perf_counter()
        with open(path, "rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
        result[name] = time.perf_counter() - start
    return result


def floor(source: torch.Tensor, file: Path) -> dict[str, float]:
    """What a verified load cannot do without: memory, the file's chunks through the decoder, one look at every byte."""
    n, page = source.numel(), mmap.PAGESIZE
    fresh = np.frombuffer(mmap.mmap(-1, n, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)

    def touch(part: int, parts: int) -> None:
        fresh[part * n // parts : (part + 1) * n // parts : page] = 1

    result = {"new_memory_all_threads": _all_threads(touch)}
    measure.warm(file.parent)
    reader = Reader.open(PathSource(os.fsencode(file)), alone=True)
    ends = np.cumsum(reader.records["raw_bytes"], dtype=np.int64)
    there = np.ones(
        int(ends[-1]), np.uint8
    )  # as large as the state: a room in the processor's cache would be filled faster

    def decode(part: int, parts: int) -> None:
        for number in range(part, len(reader.records), parts):
            end = int(ends[number])
            assert reader.read_chunk(number, there[end - int(reader.records["raw_bytes"][number]) : end]) is None

    _all_threads(decode)  # the threads' own buffers
    result["decode_all_threads"] = _all_threads(decode)
    start = time.perf_counter()
    measure.touch(source)
    result["touch"] = time.perf_counter() - start
    reader.source.close()
    result["load_floor"] = sum(result.values())
    return result


def _all_threads(work: Callable[[int, int], None]) -> float:
    parts = torch.get_num_threads()
    threads = [threading.Thread(target=work, args=(part, parts)) for part in range(parts)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start
