"""Reads storages of a checkpoint straight into the memory of live objects, on the host and on devices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.storage import UntypedStorage

from fastckpt.kernels.transform import MAX_RAW_BYTES
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.fill import fill
from fastckpt.reading.window import Sink
from fastckpt.training.device_filling import DeviceFilling

_ROOMS_FOR_EACH_THREAD = 2
_MOST_ROOMS = 32  # 128 MiB
_GROUP_BYTES = 256 << 20  # read between two looks at whether to stop


class Stopped(Exception):
    """A reading was stopped before its end."""


class StraightFill:
    """One reading. Made by the thread that trains, whose work on the memory has been given out by then; `run` may be called by another
    thread.
    """

    def __init__(self, reader: Reader, storages: Mapping[int, UntypedStorage], options: Options) -> None:
        """storages: number of a storage → the memory for it, as long as the storage. options: how many read and decode at once."""
        self._reader, self._storages, self._options = reader, storages, options
        devices = {storage.device for storage in storages.values() if storage.device.type != "cpu"}
        n_bytes = sum(storage.nbytes() for storage in storages.values())
        threads = max(options.load_threads, options.connections)
        rooms = min(_MOST_ROOMS, _ROOMS_FOR_EACH_THREAD * threads, 1 + n_bytes // MAX_RAW_BYTES)
        self._devices = {device: DeviceFilling(device, rooms) for device in devices}

    def run(self, stops: Callable[[], bool] | None = None) -> None:
        """Read, verify, decode and copy. Errors as those of `fill`, and those of a device; some of the memory may have been written.

        stops: asked now and then whether to end with `Stopped`; None: never.
        """
        with contextlib.ExitStack() as opened:
            for device in self._devices.values():
                opened.enter_context(device)
            for numbers in [list(self._storages)] if stops is None else self._groups():
                if stops is not None and stops():
                    raise Stopped("the process ends, or another restore begins")
                fill(self._reader, {number: self._place(self._storages[number]) for number in numbers}, self._options)

    def _groups(self) -> Iterator[list[int]]:
        group: list[int] = []
        n_bytes = 0
        for number, storage in self._storages.items():
            group.append(number)
            n_bytes += storage.nbytes()
            if n_bytes >= _GROUP_BYTES:
                yield group
                group, n_bytes = [], 0
        if group:
            yield group

    def hold_back(self) -> None:
        """Make the current streams of the calling thread wait for the copies. To be called when `run` has returned."""
        for device in self._devices.values():
            device.hold_back()

    def _place(self, storage: UntypedStorage) -> np.ndarray[Any, np.dtype[np.uint8]] | Sink:
        if storage.device.type != "cpu":
            return self._devices[storage.device].sink(storage)
        with torch.no_grad():
            flat = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage, 0, (storage.nbytes(),), (1,))
        place: np.ndarray[Any, np.dtype[np.uint8]] = flat.numpy()
        return place


def count_as_written(tensors: Iterable[torch.Tensor]) -> None:
    """Tell autograd of writes that it has not seen, as torch's own functions that write in place do."""
    torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])
