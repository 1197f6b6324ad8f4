"""State → private copy in host memory, while training goes on where that is safe.

Storages that only an optimizer's next step changes are *fenced*: threads copy them during the next forward and backward, and the step waits
for them. Everything else is copied before `Staging` returns. A fenced tensor that changed before its copy was done is a
TornSnapshotError, never a value: torch counts the in-place changes of every tensor.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future

import numpy as np
import torch

from fastckpt.errors import TornSnapshotError
from fastckpt.format.tensor_names import dotted
from fastckpt.state import Captured
from fastckpt.state.capture import U8, CapturedStorage
from fastckpt.workers import WorkerPool

_PIECE_BYTES = 32 << 20  # large enough that Python costs nothing, small enough that all threads end together

Fenced = Mapping[int, Sequence[tuple[torch.Tensor, int]]]
"""Address of a CPU storage's bytes → the tensors over it with their versions at the call of save."""


def fenced_tensors(optimizers: Iterable[torch.optim.Optimizer]) -> Fenced:
    """The CPU parameters and states of optimizers, which nothing but a step changes. Takes about a microsecond a tensor."""
    found: dict[int, list[tuple[torch.Tensor, int]]] = {}
    for tensor in _owned(optimizers):
        # Tensors made under inference_mode count no versions, those of a subclass may hide several storages: both are copied first.
        if (
            tensor.device.type == "cpu"
            and tensor.layout is torch.strided
            and not tensor.is_inference()
            and _plain(tensor)
        ):
            found.setdefault(tensor.untyped_storage().data_ptr(), []).append((tensor, tensor._version))
    found.pop(0, None)
    return found


def _plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _owned(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[torch.Tensor]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


class HostMemory:
    """The buffers of staged states, within one budget, used again from save to save: fresh pages cost as much as the copy."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._used_bytes = 0
        self._free: dict[int, list[U8]] = {}
        self._free_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes that staged states hold now."""
        return self._used_bytes

    def take(self, sizes: Sequence[int]) -> list[U8] | None:
        """A buffer of each size, or None if all of them together do not fit the budget now. Any thread."""
        total = sum(sizes)
        with self._lock:
            if self._used_bytes + total > self.budget_bytes:
                return None
            buffers: list[U8 | None] = []
            for size in sizes:
                kept = self._free.get(size)
                buffers.append(kept.pop() if kept else None)
                self._free_bytes -= size if buffers[-1] is not None else 0
            self._used_bytes += total
            if self._used_bytes + self._free_bytes > self.budget_bytes:
                self._free, self._free_bytes = {}, 0
        return [np.empty(size, np.uint8) if b is None else b for b, size in zip(buffers, sizes, strict=True)]

    def give_back(self, buffers: Iterable[U8]) -> None:
        """The buffers are free again. Any thread."""
        with self._lock:
            for buffer in buffers:
                self._used_bytes -= buffer.size
                self._free.setdefault(buffer.size, []).append(buffer)
                self._free_bytes += buffer.size
            if self._used_bytes + self._free_bytes > self.budget_bytes:
                self._free, self._free_bytes = {}, 0


class Staging:
    """One state on its way into host memory. Made and waited for by the training thread; `done` may be waited for by any."""

    def __init__(self, captured: Captured, buffers: Sequence[U8], fenced: Fenced, threads: int) -> None:
        """buffers: one for each storage that has data, of its size. On return, all that is not fenced has been copied.

        What fails in the unfenced part is raised; what fails later reaches `done`.
        """
        self.done: Future[None] = Future()
        self._captured = captured
        self._names: dict[int, str] = {}
        self._lock = threading.Lock()
        later: list[tuple[CapturedStorage, U8, Sequence[tuple[torch.Tensor, int]]]] = []
        now: list[tuple[CapturedStorage, U8]] = []
        with_data = [storage for storage in captured.storages if storage.has_data]
        for storage, buffer in zip(with_data, buffers, strict=True):
            versions = fenced.get(storage.address)
            if versions is None:
                now.append((storage, buffer))
            else:
                later.append((storage, buffer, versions))
        self._pool = WorkerPool(threads, "fastckpt-stage") if later else None
        self._left = 0
        self._error: BaseException | None = None
        # The fenced ones are queued first: their threads copy while this one copies the rest.
        pieces = [(s, b, v, at) for s, b, v in later for at in range(0, s.n_bytes, _PIECE_BYTES)]
        self._left = len(pieces)
        self._later = later
        try:
            if self._pool is not None:
                for storage, buffer, versions, at in pieces:
                    self._pool.submit(functools.partial(self._copy, storage, buffer, versions, at))
                self._pool.drain()
            for storage, buffer in now:
                storage.read_into(0, buffer)
                storage.replace(buffer)
        except BaseException:
            self._end()
            raise
        if not pieces:
            self._end()
            self.done.set_result(None)

    def _copy(
        self, storage: CapturedStorage, buffer: U8, versions: Sequence[tuple[torch.Tensor, int]], at: int
    ) -> None:
        try:
            if self._error is None:
                storage.read_into(at, buffer[at : at + _PIECE_BYTES][: storage.n_bytes - at])
                # After the copy: a change that came later has not hurt it.
                if any(tensor._version != version for tensor, version in versions):
                    raise TornSnapshotError(
                        f"{self._name(storage)} changed while it was copied, outside of an optimizer's step(). Nothing was committed. "
                        "Call ckpt.fence() before changing parameters or optimizer state by other means"
                    )
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._finish()

    def _finish(self) -> None:
        """On the thread that copied the last piece."""
        if self._error is not None:
            self.done.set_exception(self._error)
            return
        for storage, buffer, _ in self._later:
            storage.replace(buffer)
        self.done.set_result(None)

    def _name(self, storage: CapturedStorage) -> str:
        number = self._captured.storages.index(storage)
        return next((dotted(t.name) for t in self._captured.tensors if t.storage == number), f"storage {number}")

    def fence(self) -> None:
        """Wait until every copy has been made: from here on the state may change. Does not raise what went wrong: `done` has it."""
        if not self.done.done():
            self.done.exception()
        self._end()

    def _end(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()
        self._later = []
