"""Clocks, memory, page cache: everything that is the same for all contenders."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import platform
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

libc = ctypes.CDLL(None, use_errno=True)


class Span:
    """Seconds, CPU seconds of all threads of this process, and peak memory above what was resident at the start.

    Memory is the kernel's own high-water mark (VmHWM), set back by writing 5 to /proc/self/clear_refs: exact, where a
    sampling thread would miss short peaks and take CPU time on a two-core machine. It counts resident pages of mapped
    files, too: a contender that maps its file shows the file's pages here although the kernel may drop them.
    """

    def __init__(self, trim: bool = True) -> None:
        gc.collect()
        if trim:
            libc.malloc_trim(0)  # or memory freed earlier would be reused and not show
        Path("/proc/self/clear_refs").write_text("5")
        self.baseline = memory("VmRSS")
        self.cpu_start = time.process_time()
        self.start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def cpu(self) -> float:
        return time.process_time() - self.cpu_start

    def peak(self) -> int:
        return memory("VmHWM") - self.baseline


def memory(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found, field
    return int(found[1]) * 1024


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def memories(value: Any) -> Iterator[torch.Tensor]:
    """Each tensor's bytes, once for all tensors that share them."""
    seen = set()
    for tensor in tensors(value):
        if tensor.numel() and (tensor.data_ptr(), tensor.nbytes) not in seen:
            seen.add((tensor.data_ptr(), tensor.nbytes))
            yield tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def touch(value: Any) -> int:
    """Sum of all bytes of all tensors, taken as 8-byte words: 10 GB/s, so that it does not hide the load itself
    (torch's own sum over bytes runs at less than 2 GB/s). Returns the number of bytes."""
    total, count = 0, 0
    for data in memories(value):
        b = data.numpy()
        whole = b.size - b.size % 8
        total += int(b[:whole].view(np.int64).sum()) + int(b[whole:].sum())
        count += b.size
    return count if total is not None else 0


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in files(directory))


def warm(directory: Path) -> None:
    """Reads every file once, so that a contender that bypasses the page cache when it writes starts equal."""
    for path in files(directory):
        with open(path, "rb", buffering=0) as f:
            while f.read(1 << 20):
                pass


def evict(directory: Path) -> None:
    """Drops the files from the page cache. Only clean pages go, hence the fsync."""
    for path in files(directory):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def resident(directory: Path) -> float:
    """Share of the files' pages in the page cache, from mincore(2)."""
    pages = cached = 0
    for path in files(directory):
        length = path.stat().st_size
        if length == 0:
            continue
        with open(path, "rb") as f, mmap.mmap(f.fileno(), length, prot=mmap.PROT_READ) as m:
            view = np.frombuffer(m, np.uint8)
            flags = np.zeros(-(-length // mmap.PAGESIZE), np.uint8)
            address, out = ctypes.c_void_p(view.ctypes.data), ctypes.c_void_p(flags.ctypes.data)
            failed = libc.mincore(address, ctypes.c_size_t(length), out)
            del view
        if failed:
            return float("nan")
        pages += flags.size
        cached += int((flags & 1).sum())
    return cached / pages if pages else 0.0


def filesystem(directory: Path) -> str:
    """Type of the filesystem: the longest mount point that leads to the directory."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    path = directory.resolve()
    above = [m for m in mounts if path == Path(m[1]) or Path(m[1]) in path.parents]
    return max(above, key=lambda m: len(m[1]))[2]


def machine(directory: Path) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    total = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(total[1]) * 1024 if total else 0,
        "kernel": platform.release(),
        "filesystem": filesystem(directory),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
