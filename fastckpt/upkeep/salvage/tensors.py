"""Tensors of a damaged index: finds those that can be saved, and writes them to a container.

No whole tensor is ever in memory. The pickled object holds shells: tensors of the right form over memory that is reserved but never
touched. The bytes come chunk by chunk from the stored chunks (`SalvagedChunks`).
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.storage import UntypedStorage

from fastckpt.errors import Damage
from fastckpt.format.directory import TensorEntry
from fastckpt.format.element_types import NUMPY_PREFIX
from fastckpt.format.tensor_names import dotted
from fastckpt.host.files import AtomicFile
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.storage_loader import check_size
from fastckpt.state import capture
from fastckpt.state.capture import is_plain_array
from fastckpt.state.chunks import cuts_of
from fastckpt.state.sealing import seal
from fastckpt.upkeep.salvage.chunks import SalvagedChunks, StoredBytes
from fastckpt.upkeep.salvage.report import LostTensor, SalvagedRank
from fastckpt.writing.background import write_now


def sort_out(
    reader: Reader, bad: Mapping[int, Damage], missing: Mapping[int, Sequence[Damage]], result: SalvagedRank
) -> list[TensorEntry]:
    """Enter in `result` what is lost. Returns the tensors that can be written.

    bad: the damage of every damaged chunk, by number. missing: by the number of a storage, which shares of other ranks it lacks.
    """
    problems = _problems(reader, bad, missing)
    good = []
    for entry in reader.directory.tensors:
        why = problems.get(entry.storage) or _cannot_write(reader, entry)
        if why:
            result.lost.append(LostTensor(entry.name, entry.dtype, entry.shape, why, place=entry.place))
        else:
            good.append(entry)
    nameless = problems.keys() - {entry.storage for entry in reader.directory.tensors}
    if nameless:
        result.object_whole = False
        result.notes.append(f"{len(nameless)} storages that belong to no named tensor are damaged")
    return good


def _problems(
    reader: Reader, bad: Mapping[int, Damage], missing: Mapping[int, Sequence[Damage]]
) -> dict[int, tuple[str, ...]]:
    """Storage → what is wrong with its chunks."""
    found = {}
    for number in range(len(reader.directory.storages)):
        wrong = [bad[record] for record, *_ in reader.pieces(number) if record in bad] if bad else []
        wrong += missing.get(number, ())
        if wrong:
            texts = [f"{d.place}: expected {d.expected}, found {d.found}" for d in wrong]
            found[number] = tuple(dict.fromkeys(texts))
    return found


def _cannot_write(reader: Reader, entry: TensorEntry) -> tuple[str, ...]:
    """Reasons why a tensor with undamaged bytes cannot be written as a tensor."""
    if entry.kind == "quantized":
        return ("its bytes are right, but its scales are in the pickled object: load that with fastckpt restore",)
    storage = reader.directory.storages[entry.storage]
    if _is_array(entry):
        n_bytes = int(np.prod(entry.shape, dtype=object)) * _array_type(entry).itemsize
        if entry.offset or n_bytes != storage.n_bytes or _order(entry) is None:
            return ("its bytes are right, but no writer of fastckpt lays out an array like this",)
        return ()
    try:
        torch.empty_strided(entry.shape, entry.stride, dtype=getattr(torch, entry.dtype), device="meta")
    except (RuntimeError, ValueError, OverflowError, AttributeError, TypeError) as error:
        return (f"its bytes are right, but torch cannot make it: {error}",)
    return ()


def _is_array(entry: TensorEntry) -> bool:
    return entry.dtype.startswith(NUMPY_PREFIX)


def _array_type(entry: TensorEntry) -> np.dtype[Any]:
    return np.dtype(entry.dtype.removeprefix(NUMPY_PREFIX))


def _order(entry: TensorEntry) -> str | None:
    """ "C" or "F" if the array is contiguous, else None."""
    for order in ("C", "F"):
        sizes = entry.shape if order == "F" else entry.shape[::-1]
        expected, step = [], 1
        for size in sizes:
            expected.append(step)
            step *= max(size, 1)
        if list(entry.stride if order == "F" else entry.stride[::-1]) == expected:
            return order
    return None


def write_tensors(
    reader: Reader, good: Sequence[TensorEntry], path: str, result: SalvagedRank, options: Options
) -> None:
    """Write {dotted name: tensor} as a container, and note it in `result`.

    CorruptCheckpointError: a chunk has become damaged; TooLargeError, StoreError, OSError, SaveError.
    """
    storages = {entry.storage for entry in good}
    n_bytes = sum(reader.directory.storages[n].n_bytes for n in storages if _has_data(reader, n))
    check_size(reader, n_bytes, options.max_load_bytes)
    stored = StoredBytes(reader)
    shells = _Shells(reader, stored)
    state: dict[str, Any] = {}
    stored_at: dict[str, int] = {}
    for entry in good:
        key = _unused(dotted(entry.name), state)
        state[key], stored_at[key] = shells.make(entry), entry.storage
    captured = capture(state, pickle, 2)
    stored_as = {tensor.storage: stored_at[str(tensor.name[0])] for tensor in captured.tensors}
    source = SalvagedChunks(cuts_of(captured), stored, stored_as)
    write_now(seal(captured, source), AtomicFile(path), path, options, 0.0)
    result.file, result.saved, result.saved_bytes = path, list(state), captured.n_bytes


def _has_data(reader: Reader, number: int) -> bool:
    return reader.directory.storages[number].extents is not None


def _unused(name: str, taken: Mapping[str, Any]) -> str:
    """The name; with #2, #3, … if the name of another tensor looks the same."""
    unused, n = name, 2
    while unused in taken:
        unused, n = f"{name}#{n}", n + 1
    return unused


class _Shells:
    """Makes tensors and arrays of the right form over memory that is reserved but never touched, so that it occupies nothing."""

    def __init__(self, reader: Reader, stored: StoredBytes) -> None:
        self._reader = reader
        self._stored = stored
        self._storages: dict[tuple[int, str], UntypedStorage] = {}

    def make(self, entry: TensorEntry) -> Any:
        """The shell of one tensor. Shells of one storage and element type share their memory, as the tensors did."""
        if _is_array(entry):
            return self._array(entry)
        dtype = getattr(torch, entry.dtype)
        if not _has_data(self._reader, entry.storage):
            return torch.empty_strided(entry.shape, entry.stride, dtype=dtype, device="meta")
        # One for each element type: pickling refuses several views of the same memory with different types.
        storage = self._storages.get((entry.storage, entry.dtype))
        if storage is None:
            storage = self._storages[entry.storage, entry.dtype] = self._reserve(entry.storage)
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, entry.offset, entry.shape, entry.stride)

    def _reserve(self, number: int) -> UntypedStorage:
        n_bytes = self._reader.directory.storages[number].n_bytes
        if not n_bytes:
            return UntypedStorage(0)
        return torch.from_numpy(np.empty(n_bytes, np.uint8)).untyped_storage()

    def _array(self, entry: TensorEntry) -> Any:
        array = np.empty(entry.shape, _array_type(entry), "F" if _order(entry) == "F" else "C")
        if not is_plain_array(array):  # it is pickled with its bytes, so the bytes must be there
            self._stored.read_into(entry.storage, 0, array.reshape(-1, order="A").view(np.uint8))
        return array
