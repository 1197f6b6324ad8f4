"""Object → skeleton, storages, names. What is read here is read on the calling thread; bytes are fetched later."""

from __future__ import annotations

import copyreg
import functools
import io
import pickle
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch.storage import TypedStorage, UntypedStorage

from fastckpt._types import U8
from fastckpt.errors import SaveError
from fastckpt.format.directory import Share, TensorEntry
from fastckpt.format.element_types import NUMPY_PREFIX, element_type
from fastckpt.format.shares import stretch_of
from fastckpt.format.tensor_names import Name
from fastckpt.host import cycle_collector
from fastckpt.host.torch_names import class_of, identity, skips_data, untyped_of
from fastckpt.kernels import kernels
from fastckpt.state.naming import Named, Reduction, named_tensors

# Smaller arrays stay in the pickle: a record, a storage entry and a range read cost more than they save.
_ARRAY_BYTES = 64 * 1024


_NEVER_PERSISTENT = frozenset(
    (
        type(None),
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        tuple,
        list,
        dict,
        OrderedDict,
        torch.Tensor,
        torch.nn.Parameter,
        types.FunctionType,
    )
)
# Their items are what is pickled, and torch's are many.
_STANDARD = (OrderedDict, defaultdict, Counter, deque, TypedStorage, UntypedStorage, torch.Size)


@dataclass(slots=True)
class CapturedStorage:
    """What one storage of the state is. Where its bytes are is the business of `Captured`."""

    dtype: str
    n_bytes: int
    location: str
    has_data: bool
    """False for meta storages."""
    device: torch.device | None = None
    """The accelerator that has the bytes; None: they lie in host memory."""


@dataclass
class Captured:
    """A state, ready to be cut and written. `tensors` refer to `storages` by position, and so do the other lists.

    Lists side by side, not objects: a state may have 100,000 storages, and Python's collector walks every object.
    """

    skeleton: bytes
    storages: list[CapturedStorage] = field(default_factory=list)
    tensors: list[TensorEntry] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    """Where the bytes lie, on the host or on a device; 0 where there are none."""
    owners: list[Any] = field(default_factory=list)
    """Storages and arrays, kept alive until `release`."""
    wholes: dict[int, torch.Tensor] = field(default_factory=dict)
    """See `whole`: cheaper than making one."""
    form: object = field(default_factory=object)
    """The same object for two states that differ in nothing but bytes, addresses and what stands in the skeleton."""
    rank: int = 0  # whose state this is: matters for `shares` alone
    shares: dict[int, tuple[Share, ...]] = field(default_factory=dict)
    """By a storage's number, who writes which stretch of it; where nothing stands, this rank all. Each has a first name of its own."""
    prints: dict[int, str] = field(default_factory=dict)
    """By the number of a storage with shares, what its vote says of all of its bytes: see `format.directory.StorageEntry.print`."""
    _bytes: dict[int, torch.Tensor] = field(default_factory=dict)
    """All bytes of storages on devices, as far as they were asked for."""

    def release(self) -> None:
        """The bytes are not needed any more."""
        self.owners, self.wholes, self._bytes = [], {}, {}

    def device_bytes(self, number: int, offset: int, n_bytes: int) -> torch.Tensor:
        """A stretch of a storage's bytes on its device. SaveError if it is not there any more.

        The first one of a storage may be made by `set_`, which counts as a write: ask for it before another stream reads the storage.
        """
        self._require(number)
        found = self._bytes.get(number)
        if found is None:
            found = self._bytes[number] = self._all_bytes(number)
        return found[offset : offset + n_bytes]

    def _all_bytes(self, number: int) -> torch.Tensor:
        device = self.storages[number].device
        assert device is not None, "these bytes lie in host memory"
        known = self.whole(number)
        if known is not None:
            with torch.no_grad():
                return known.view(-1).view(torch.uint8)
        empty = torch.empty(0, dtype=torch.uint8, device=device)
        return empty.set_(self.owners[number], 0, (self.storages[number].n_bytes,), (1,))

    def whole(self, number: int) -> torch.Tensor | None:
        """A contiguous tensor that spans the whole storage; None if none is known.

        It belongs to the training code, which may since have pointed it at other memory: so `data_ptr` is compared.
        """
        tensor = self.wholes.get(number)
        return tensor if tensor is not None and tensor.data_ptr() == self.addresses[number] else None

    def _require(self, number: int) -> None:
        """SaveError if a storage was resized since it was captured: its memory is gone."""
        assert self.owners, "nobody holds these bytes any more"
        owner = self.owners[number]
        if isinstance(owner, UntypedStorage) and (
            owner.data_ptr() != self.addresses[number] or owner.nbytes() < self.storages[number].n_bytes
        ):
            raise SaveError(
                "a tensor's storage was resized before it had been copied. Nothing was committed. Call ckpt.fence() before that"
            )

    def read(self, pieces: Sequence[tuple[int, int, int]], out: U8) -> None:
        """Join stretches of storages, given as number, offset and bytes, in host memory. Any thread; blocks until they are there."""
        if any(self.storages[number].device is not None for number, _, _ in pieces):
            at = 0
            for number, offset, n_bytes in pieces:
                self._read_one(number, offset, out[at : at + n_bytes])
                at += n_bytes
            return
        self._gather(pieces, out)

    def _gather(self, pieces: Sequence[tuple[int, int, int]], out: U8) -> None:
        addresses = self.addresses
        for number, _, _ in pieces:
            self._require(number)
        kernels().gather(
            np.array([addresses[number] + offset for number, offset, _ in pieces], np.uint64),
            np.array([n_bytes for _, _, n_bytes in pieces], np.uint64),
            out,
        )

    def _read_one(self, number: int, offset: int, out: U8) -> None:
        if self.storages[number].device is not None:
            torch.from_numpy(out).copy_(self.device_bytes(number, offset, out.size))
        else:
            self._gather([(number, offset, out.size)], out)

    @property
    def n_bytes(self) -> int:
        """Raw bytes of all storages that have data."""
        return sum(storage.n_bytes for storage in self.storages if storage.has_data)

    @property
    def own_bytes(self) -> int:
        """Those of them that this rank writes."""
        shared = ((self.storages[number], self.stretch(number)[1]) for number in self.shares)
        return self.n_bytes - sum(storage.n_bytes - own for storage, own in shared if storage.has_data)

    def stretch(self, number: int) -> tuple[int, int]:
        """First byte and length of what this rank writes of a storage."""
        return stretch_of(self.shares.get(number, ()), self.rank, self.storages[number].n_bytes)


def is_plain_array(value: object) -> bool:
    """Whether a value is a NumPy array that is stored as tensors are. All others are pickled with their bytes.

    `dtype.str`, shape and order must describe the array in full.
    """
    if type(value) is not np.ndarray or value.nbytes <= _ARRAY_BYTES:
        return False
    dtype = value.dtype
    if not dtype.isnative:  # NumPy's own pickle turns these into native ones; ours must not depend on the array's size
        return False
    if dtype.hasobject or dtype.fields is not None or dtype.metadata or dtype.subdtype is not None:
        return False
    return np.dtype(dtype.str) == dtype and element_type(NUMPY_PREFIX + dtype.str) is not None


class StorageNumbers:
    """The `persistent_id` of one save: gives numbers to the storages that pickling meets."""

    def __init__(self) -> None:
        self.storages: list[CapturedStorage] = []
        self.addresses: list[int] = []
        self.owners: list[Any] = []
        self.wholes: dict[int, torch.Tensor] = {}
        self.number_of_storage: dict[int, int] = {}  # StorageImpl address → number
        self.number_of_array: dict[int, int] = {}  # id(array) → number
        self.reductions: dict[int, Reduction] = {}
        self._has_a_say: dict[type, bool] = {}
        self._kind_of: dict[torch.dtype, Any] = {}
        self._dtype_at: dict[int, torch.dtype] = {}  # data address → dtype, as torch.save checks it

    def reduce(self, obj: Any, pickle_protocol: int) -> Any:
        """The `reducer_override` of the pickler: asks what it would ask, once, and notes the answer."""
        kind = type(obj)
        has_a_say = self._has_a_say.get(kind)
        if has_a_say is None:
            has_a_say = self._has_a_say[kind] = _has_a_say(kind)
        if not has_a_say:
            return NotImplemented
        reduced = obj.__reduce_ex__(pickle_protocol)
        if isinstance(reduced, tuple) and len(reduced) >= 2:
            _, arguments, state, elements, items, *_ = (*reduced, None, None, None)
            if isinstance(arguments, tuple):
                self.reductions[id(obj)] = Reduction(obj, arguments, state, elements is not None, items is not None)
        return reduced

    def persistent_id(self, obj: object) -> tuple[Any, ...] | None:
        if isinstance(obj, (TypedStorage, UntypedStorage)):
            return self._storage_id(obj)
        if is_plain_array(obj):
            return self._array_id(obj)  # type: ignore[arg-type]
        return None

    def _storage_id(self, obj: TypedStorage | UntypedStorage) -> tuple[Any, ...]:
        if isinstance(obj, TypedStorage):
            storage, dtype = untyped_of(obj), obj.dtype
            kind = self._kind_of.get(dtype)
            if kind is None:
                kind = self._kind_of[dtype] = class_of(obj)
        else:
            storage, dtype = obj, torch.uint8
            kind = torch.serialization.normalize_storage_type(type(obj))
        numel = storage.nbytes() // dtype.itemsize
        address = 0 if storage.device.type == "meta" else storage.data_ptr()
        if address and self._dtype_at.setdefault(address, dtype) != dtype:
            # torch's own text: people search for it.
            raise RuntimeError("Cannot save multiple tensors or storages that view the same data as different types")
        location = torch.serialization.location_tag(storage)
        number = self.number_of_storage.get(identity(storage))
        if number is None:
            n_bytes = numel * dtype.itemsize
            info = _storage_info(storage, dtype, n_bytes, location)
            number = self.number_of_storage[identity(storage)] = self._enter(info, address if n_bytes else 0, storage)
        return ("storage", kind, str(number), location, numel)

    def _enter(self, info: CapturedStorage, address: int, owner: Any) -> int:
        """The number of a storage that is met for the first time."""
        self.storages.append(info)
        self.addresses.append(address)
        self.owners.append(owner)
        return len(self.storages) - 1

    def _array_id(self, array: np.ndarray[Any, Any]) -> tuple[Any, ...]:
        order = _order(array)
        number = self.number_of_array.get(id(array))
        if number is None:
            flat = np.asarray(array, order=order).reshape(-1, order=order)
            info = CapturedStorage(NUMPY_PREFIX + array.dtype.str, array.nbytes, "cpu", True)
            number = self.number_of_array[id(array)] = self._enter(info, flat.ctypes.data, (array, flat))
        shape = tuple(int(n) for n in array.shape)
        return ("storage", UntypedStorage, str(number), "cpu", array.nbytes, "ndarray", array.dtype.str, shape, order)


@functools.cache
def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _storage_info(storage: UntypedStorage, dtype: torch.dtype, n_bytes: int, location: str) -> CapturedStorage:
    name = _name_of(dtype)
    if element_type(name) is None:
        raise SaveError(f"a storage of element type {name} cannot be saved: format version 1 has no such type")
    device = storage.device
    on_accelerator = device.type not in ("cpu", "meta")
    return CapturedStorage(name, n_bytes, location, device.type != "meta", device if on_accelerator else None)


def capture(obj: object, pickle_module: Any, pickle_protocol: int) -> Captured:
    """Pickle `obj` with its storages taken out. Raises what torch.save would raise for the same object.

    Storages are held, not copied: their owner leaves them alone until the save is done.
    """
    refuse_skipping_data()
    numbers = StorageNumbers()
    with cycle_collector.held_off():
        skeleton = pickled(obj, numbers, pickle_module, pickle_protocol)
        tensors = entries(obj, numbers)
    return Captured(skeleton, numbers.storages, tensors, numbers.addresses, numbers.owners, numbers.wholes)


def refuse_skipping_data() -> None:
    """SaveError inside torch.serialization.skip_data."""
    if skips_data():
        raise SaveError("torch.serialization.skip_data is not supported: fastckpt saves data or fails")


def pickled(obj: object, numbers: StorageNumbers, pickle_module: Any, pickle_protocol: int) -> bytes:
    """The pickle stream of an object, its storages replaced by numbers."""
    buffer = io.BytesIO()
    persistent_id, never = numbers.persistent_id, _NEVER_PERSISTENT

    class Pickler(pickle_module.Pickler):  # type: ignore[misc]
        def persistent_id(self, obj: object) -> tuple[Any, ...] | None:
            # Called for every object, a number included: a call more makes the save of 50,000 small tensors a fifth longer.
            return None if type(obj) in never else persistent_id(obj)

    if pickle_module is pickle:  # others may have a `reducer_override` of their own
        Pickler.reducer_override = lambda self, obj: numbers.reduce(obj, pickle_protocol)
    Pickler(buffer, protocol=pickle_protocol).dump(obj)
    return buffer.getvalue()


def entries(obj: object, numbers: StorageNumbers, prefix: Name = ()) -> list[TensorEntry]:
    """What the directory says of the tensors in an object that has been pickled."""
    found = (_entry(named, numbers) for named in named_tensors(obj, prefix, numbers.reductions))
    return [entry for entry in found if entry is not None]


def _has_a_say(kind: type) -> bool:
    """Whether objects of this class decide how they are pickled, so that their attributes need not be what is."""
    if issubclass(kind, (type, torch.Tensor, np.ndarray, np.generic, *_STANDARD)) or kind in copyreg.dispatch_table:
        return False
    of_object = getattr(object, "__getstate__", None)  # Python 3.11
    return (
        kind.__reduce_ex__ is not object.__reduce_ex__
        or kind.__reduce__ is not object.__reduce__
        or getattr(kind, "__getstate__", None) is not of_object
    )


def _entry(named: Named, state: StorageNumbers) -> TensorEntry | None:
    name, value, kind, place, _ = named
    if isinstance(value, np.ndarray):
        number = state.number_of_array.get(id(value))
        if number is None:  # a small array: it is in the pickle
            return None
        order = _order(value)
        dtype = NUMPY_PREFIX + value.dtype.str
        return TensorEntry(name, dtype, value.shape, _strides(value.shape, order), 0, number, kind, False)
    number = state.number_of_storage.get(identity(value.untyped_storage()))
    if number is None:  # reached by name only: pickling went another way
        return None
    dtype = _name_of(value.dtype)
    storage = state.storages[number]
    if storage.dtype == "uint8" and dtype != "uint8":
        element = element_type(dtype)
        if element is not None and storage.n_bytes % element.n_bytes == 0:
            storage.dtype = (
                dtype  # torch writes its newer types through untyped storages; their width matters for the cuts
            )
    if storage.device is not None and covers(value, storage.n_bytes):
        state.wholes[number] = value
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


def covers(tensor: torch.Tensor, n_bytes: int) -> bool:
    """Whether a tensor is all of its storage's bytes, in order, so that it can stand for them."""
    return (
        tensor.nbytes == n_bytes
        and not tensor.storage_offset()
        and not tensor.is_nested
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not tensor.is_quantized
        and not tensor.is_complex()
        and not tensor.is_neg()
        and tensor.is_contiguous()
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
