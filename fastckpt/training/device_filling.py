"""Brings verified chunks to a device: decoded into slabs of pinned memory, and copied from there on a stream of their own."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.storage import UntypedStorage

from fastckpt.kernels.transform import MAX_RAW_BYTES
from fastckpt.snapshot.pool import Slab, SlabPool
from fastckpt.snapshot.side_stream import SideStream, wait_for


class _Room(NamedTuple):
    """A part of a slab, for one chunk."""

    tensor: torch.Tensor
    array: np.ndarray[Any, np.dtype[np.uint8]]
    pinned: bool


class DeviceFilling:
    """The way to one device, as a context manager: at its end all copies have been made. Made by the thread that trains, on whose current
    stream the storages may be used until then; afterwards `hold_back` makes them usable there.
    """

    def __init__(self, device: torch.device, rooms: int) -> None:
        """rooms: how many chunks may be on their way, of up to 4 MiB each."""
        self._side = SideStream(device)
        self._side.begin()
        self._pool = SlabPool(rooms * MAX_RAW_BYTES)
        self._slabs: list[Slab] = []
        self._free: queue.SimpleQueue[tuple[_Room, torch.Event | None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        for _ in range(rooms):
            slab = self._pool.take(MAX_RAW_BYTES, for_device=True)
            assert slab is not None
            self._slabs.append(slab)
            self._free.put((_Room(slab.tensor, slab.array, slab.pinned), None))

    def sink(self, storage: UntypedStorage) -> DeviceSink:
        """What takes the bytes of a storage of the device."""
        with torch.no_grad():
            flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))
        return DeviceSink(self, flat)

    @contextlib.contextmanager
    def room(self, target: torch.Tensor, position: int, n_bytes: int) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
        """See `Sink.room`. Any thread."""
        room, event = self._free.get()
        try:
            if event is not None:
                wait_for(event)
                event = None
            yield room.array[:n_bytes]
            with self._lock, self._side.stream, torch.no_grad():
                target[position : position + n_bytes].copy_(room.tensor[:n_bytes], non_blocking=room.pinned)
                event = self._side.mark()
        finally:
            self._free.put((room, event))

    def hold_back(self) -> None:
        """Make the current stream of the calling thread wait for the copies."""
        self._side.hold_back(self._side.mark())

    def __enter__(self) -> DeviceFilling:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            wait_for(self._side.mark())
        except BaseException:
            self._pool.forget(self._slabs)  # a failed device may still read them
            if error is None:
                raise
            return
        self._pool.give_back(self._slabs)
        self._pool.drop_free()


class DeviceSink(NamedTuple):
    """A `Sink` for one storage."""

    filling: DeviceFilling
    target: torch.Tensor

    def room(
        self, position: int, n_bytes: int
    ) -> contextlib.AbstractContextManager[np.ndarray[Any, np.dtype[np.uint8]]]:
        return self.filling.room(self.target, position, n_bytes)
