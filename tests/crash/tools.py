"""What the crash tests share: states, a stand-in for `os` inside what writes files, forked children."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fastckpt
from fastckpt.host import direct_writer, files
from fastckpt.writing import sinks

torch.set_num_threads(1)  # a fork keeps only the calling thread: torch must not wait for others

# Whatever these modules may call that the kernel sees. Anything else goes to the real os untouched.
OPERATIONS = [
    "open",
    "stat",
    "fstat",
    "lstat",
    "fchmod",
    "chmod",
    "write",
    "pwrite",
    "writev",
    "fsync",
    "fdatasync",
    "link",
    "rename",
    "replace",
    "unlink",
    "remove",
    "close",
    "ftruncate",
]

Hook = Callable[[str, tuple[Any, ...]], None]
AfterHook = Callable[[str, tuple[Any, ...], Any], None]


def state(number: int, rows: int = 120) -> dict[str, Any]:
    """A state that depends on its number in every tensor."""
    generator = torch.Generator().manual_seed(number)
    return {
        "step": number,
        "model": {"weight": torch.randn(rows, 100, generator=generator), "bias": torch.full((50,), float(number))},
        "optimizer": {"state": {0: {"exp_avg": torch.randn(rows, 100, generator=generator)}}},
    }


def check_state(found: Any, rows: int = 120) -> int:
    """The number of the state that this is, bit for bit; AssertionError if it is none."""
    number = found["step"]
    expected = state(number, rows)
    assert found.keys() == expected.keys()
    assert found["model"].keys() == expected["model"].keys()
    for name, tensor in expected["model"].items():
        assert torch.equal(found["model"][name], tensor), name
    assert torch.equal(found["optimizer"]["state"][0]["exp_avg"], expected["optimizer"]["state"][0]["exp_avg"])
    return int(number)


def loaded(path: Path, rows: int = 120) -> int:
    """Load the file with load and with open; the number of the state that both give."""
    number = check_state(fastckpt.load(path), rows)
    with fastckpt.open(path) as reader:
        weight = state(number, rows)["model"]["weight"]
        assert any(tensor.shape == weight.shape and torch.equal(tensor, weight) for _, tensor in reader.items())
    return number


def debris(path: Path) -> list[str]:
    """What lies next to the file."""
    return sorted(set(os.listdir(path.parent)) - {path.name})


def open_fds() -> dict[int, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists the folder
            found[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
    return found


class WatchedOs:
    """Stands in for the module `os` in fastckpt.host.files and its neighbours: calls `before` and `after` around each operation."""

    def __init__(self, before: Hook | None, after: AfterHook | None, *, tmpfile: bool) -> None:
        self._before, self._after, self._tmpfile = before, after, tmpfile

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in OPERATIONS:
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._before:
                self._before(name, args)
            if name == "open" and not self._tmpfile and args[1] & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), args[0])
            result = real(*args, **kwargs)
            if self._after:
                self._after(name, args, result)
            return result

        return call


@contextlib.contextmanager
def watched(
    before: Hook | None = None, after: AfterHook | None = None, *, tmpfile: bool = True, write_bytes: int = 8 << 10
) -> Iterator[None]:
    """Watch every operation on files. `write_bytes` makes small states take several writes, direct ones on a thread first."""
    watcher = WatchedOs(before, after, tmpfile=tmpfile)

    class WatchedPath:
        def __init__(self, name: str) -> None:
            self._name = name

        def unlink(self, missing_ok: bool = False) -> None:
            try:
                watcher.unlink(self._name)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    with contextlib.ExitStack() as put_back:
        for module, name, value in [
            *((module, "os", watcher) for module in (files, direct_writer, sinks)),
            (files, "Path", WatchedPath),
            (direct_writer, "_WRITE_BYTES", write_bytes),
            (direct_writer, "_DIRECT_BYTES", min(write_bytes, direct_writer._DIRECT_BYTES)),
        ]:
            put_back.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield


class Counter:
    """Calls `act` at the n-th operation (from 0) and remembers all names."""

    def __init__(self, at: int, act: Callable[[], None]) -> None:
        self.at, self._act = at, act
        self.seen: list[str] = []

    def __call__(self, name: str, *_: Any) -> None:
        self.seen.append(name)
        if len(self.seen) - 1 == self.at:
            self._act()

    @property
    def reached(self) -> bool:
        return len(self.seen) > self.at


def operations(path: Path, *, tmpfile: bool = True) -> list[str]:
    """The names of the operations of a whole save to this path, in order."""
    counter = Counter(-1, lambda: None)
    with watched(counter, tmpfile=tmpfile):
        fastckpt.save(state(0), path)
    return counter.seen


def fork(run: Callable[[], None]) -> int:
    """Start a child that does nothing but `run`; returns its process number. Exits 0, or 1 after a traceback."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # From Python 3.12 on: the child uses no lock of another thread of ours.
        warnings.filterwarnings("ignore", message=".*multi-threaded.*", category=DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def exit_status(pid: int) -> int:
    """Exit code of the child, or minus its signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fastckpt")]
