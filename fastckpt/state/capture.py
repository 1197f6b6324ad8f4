"""Object → skeleton, storages, names. What is read here is read on the calling thread; bytes are fetched later."""

from __future__ import annotations

import ctypes
import io
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.storage import TypedStorage, UntypedStorage

from fastckpt.errors import SaveError
from fastckpt.format.directory import TensorEntry
from fastckpt.format.element_types import NUMPY_PREFIX, element_type
from fastckpt.state.naming import Named, named_tensors

# Smaller arrays stay in the pickle: a record, a storage entry and a range read cost more than they save.
_ARRAY_BYTES = 64 * 1024

U8 = npt.NDArray[np.uint8]


def host_view(storage: UntypedStorage) -> U8:
    """The bytes of a CPU storage, without a copy. The caller keeps the storage alive.

    By address, not through a tensor: no dispatch mode, default device or subclass can get in between.
    """
    n_bytes = storage.nbytes()
    if not n_bytes:
        return np.empty(0, np.uint8)
    return np.frombuffer(memoryview((ctypes.c_ubyte * n_bytes).from_address(storage.data_ptr())), np.uint8)


@dataclass
class CapturedStorage:
    """One storage of the state. Holds it (or the array) alive."""

    dtype: str
    n_bytes: int
    location: str
    has_data: bool
    """False for meta storages."""
    _host: U8 | None = None
    _device: torch.Tensor | None = None
    _owner: Any = None

    @property
    def device(self) -> torch.device | None:
        """The accelerator that has the bytes; None: they lie in host memory."""
        return None if self._device is None else self._device.device

    @property
    def address(self) -> int:
        """Where the bytes lie, on the host or on a device; 0 if there are none."""
        if self._device is not None:
            return self._device.data_ptr()
        return 0 if self._host is None or not self._host.size else self._host.ctypes.data

    def let_go(self) -> None:
        """The bytes are not needed any more."""
        self._host = self._device = self._owner = None

    def device_bytes(self, offset: int, n_bytes: int) -> torch.Tensor:
        """A stretch of the bytes on their device."""
        assert self._device is not None, "these bytes lie in host memory"
        return self._device[offset : offset + n_bytes]

    def read_into(self, offset: int, out: U8) -> None:
        """Copy bytes from `offset` on into host memory. Any thread; blocks until they are there."""
        if self._host is not None:
            np.copyto(out, self._host[offset : offset + out.size])
        elif self._device is not None:
            torch.from_numpy(out).copy_(self._device[offset : offset + out.size])


@dataclass
class Captured:
    """A state, ready to be cut and written. `tensors` refer to `storages` by position."""

    skeleton: bytes
    storages: list[CapturedStorage] = field(default_factory=list)
    tensors: list[TensorEntry] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        """Raw bytes of all storages that have data."""
        return sum(storage.n_bytes for storage in self.storages if storage.has_data)


def _plain_array(value: object) -> bool:
    """A NumPy array that `dtype.str`, shape and order describe in full."""
    if type(value) is not np.ndarray or value.nbytes <= _ARRAY_BYTES:
        return False
    dtype = value.dtype
    if not dtype.isnative:  # NumPy's own pickle turns these into native ones; ours must not depend on the array's size
        return False
    if dtype.hasobject or dtype.fields is not None or dtype.metadata or dtype.subdtype is not None:
        return False
    return np.dtype(dtype.str) == dtype and element_type(NUMPY_PREFIX + dtype.str) is not None


class _Capture:
    """The `persistent_id` of one save."""

    def __init__(self) -> None:
        self.storages: list[CapturedStorage] = []
        self.number_of_storage: dict[int, int] = {}  # StorageImpl address → number
        self.number_of_array: dict[int, int] = {}  # id(array) → number
        self._dtype_at: dict[int, torch.dtype] = {}  # data address → dtype, as torch.save checks it

    def persistent_id(self, obj: object) -> tuple[Any, ...] | None:
        if isinstance(obj, (TypedStorage, UntypedStorage)):
            return self._storage_id(obj)
        if _plain_array(obj):
            return self._array_id(obj)  # type: ignore[arg-type]
        return None

    def _storage_id(self, obj: TypedStorage | UntypedStorage) -> tuple[Any, ...]:
        if isinstance(obj, TypedStorage):
            storage, dtype = obj._untyped_storage, obj.dtype
            kind = getattr(torch, obj._pickle_storage_type())
            numel = obj._size()
        else:
            storage, dtype = obj, torch.uint8
            kind = torch.serialization.normalize_storage_type(type(obj))
            numel = storage.nbytes()
        has_memory = storage.device.type != "meta" and storage.data_ptr() != 0
        if has_memory and self._dtype_at.setdefault(storage.data_ptr(), dtype) != dtype:
            # torch's own text: people search for it.
            raise RuntimeError("Cannot save multiple tensors or storages that view the same data as different types")
        location = torch.serialization.location_tag(storage)
        number = self.number_of_storage.get(storage._cdata)
        if number is None:
            number = self.number_of_storage[storage._cdata] = len(self.storages)
            self.storages.append(_captured(storage, dtype, numel * torch._utils._element_size(dtype), location))
        return ("storage", kind, str(number), location, numel)

    def _array_id(self, array: np.ndarray[Any, Any]) -> tuple[Any, ...]:
        order = _order(array)
        number = self.number_of_array.get(id(array))
        if number is None:
            number = self.number_of_array[id(array)] = len(self.storages)
            flat = np.asarray(array, order=order).reshape(-1, order=order)
            self.storages.append(
                CapturedStorage(
                    NUMPY_PREFIX + array.dtype.str, array.nbytes, "cpu", True, flat.view(np.uint8), _owner=(array, flat)
                )
            )
        shape = tuple(int(n) for n in array.shape)
        return ("storage", UntypedStorage, str(number), "cpu", array.nbytes, "ndarray", array.dtype.str, shape, order)


def _captured(storage: UntypedStorage, dtype: torch.dtype, n_bytes: int, location: str) -> CapturedStorage:
    name = str(dtype).removeprefix("torch.")
    if element_type(name) is None:
        raise SaveError(f"a storage of element type {name} cannot be saved: format version 1 has no such type")
    captured = CapturedStorage(name, n_bytes, location, storage.device.type != "meta", _owner=storage)
    if storage.device.type == "cpu":
        captured._host = host_view(storage)[:n_bytes]
    elif storage.device.type != "meta":
        bytes_of = torch.empty(0, dtype=torch.uint8, device=storage.device)
        captured._device = bytes_of.set_(storage, 0, (n_bytes,), (1,))
    return captured


def capture(obj: object, pickle_module: Any, pickle_protocol: int) -> Captured:
    """Pickle `obj` with its storages taken out. Raises what torch.save would raise for the same object.

    Storages are held, not copied: their owner leaves them alone until the save is done.
    """
    if torch.serialization._serialization_tls.skip_data:
        raise SaveError("torch.serialization.skip_data is not supported: fastckpt saves data or fails")
    state = _Capture()
    buffer = io.BytesIO()

    class Pickler(pickle_module.Pickler):  # type: ignore[misc]
        def persistent_id(self, obj: object) -> tuple[Any, ...] | None:
            return state.persistent_id(obj)

    Pickler(buffer, protocol=pickle_protocol).dump(obj)
    captured = Captured(buffer.getvalue(), state.storages)
    for named in named_tensors(obj):
        entry = _entry(named, state)
        if entry is not None:
            captured.tensors.append(entry)
    return captured


def _entry(named: Named, state: _Capture) -> TensorEntry | None:
    name, value, kind, place = named
    if isinstance(value, np.ndarray):
        number = state.number_of_array.get(id(value))
        if number is None:  # a small array: it is in the pickle
            return None
        order = _order(value)
        dtype = NUMPY_PREFIX + value.dtype.str
        return TensorEntry(name, dtype, value.shape, _strides(value.shape, order), 0, number, kind, False)
    number = state.number_of_storage.get(value.untyped_storage()._cdata)
    if number is None:  # reached by name only: pickling went another way
        return None
    dtype = str(value.dtype).removeprefix("torch.")
    storage = state.storages[number]
    element = element_type(dtype)
    if storage.dtype == "uint8" and element is not None and storage.n_bytes % element.n_bytes == 0:
        storage.dtype = dtype  # torch writes its newer types through untyped storages; their width matters for the cuts
    return TensorEntry(
        name,
        dtype,
        tuple(value.shape),
        tuple(value.stride()),
        int(value.storage_offset()),
        number,
        kind,
        value.requires_grad,
        place,
    )


def _order(array: np.ndarray[Any, Any]) -> Literal["C", "F"]:
    """The order that pickling an array keeps."""
    return "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"


def _strides(shape: tuple[int, ...], order: str) -> tuple[int, ...]:
    """Element strides of a contiguous array."""
    strides, step = [], 1
    for size in shape if order == "F" else reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(strides if order == "F" else reversed(strides))
