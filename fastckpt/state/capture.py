"""Object → skeleton, storages, names. Everything here runs on the calling thread; the bytes of storages are read later."""

from __future__ import annotations

import copyreg
import io
import pickle
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.storage import TypedStorage, UntypedStorage

from fastckpt._types import U8
from fastckpt.errors import SaveError
from fastckpt.format.directory import Share, TensorEntry
from fastckpt.format.element_types import NUMPY_PREFIX, element_type
from fastckpt.format.shares import GroupClaim, stretch_of
from fastckpt.format.tensor_names import Name
from fastckpt.host import cycle_collector
from fastckpt.host.torch_names import class_of, identity, skips_data, untyped_of
from fastckpt.kernels import kernels
from fastckpt.state.naming import Reduction
from fastckpt.state.rows import entries, name_of, order_of
from fastckpt.state.shards import Shard

# Smaller arrays stay in the pickle: a record, a storage entry and a ranged read would cost more than they save.
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
# These are pickled by their items, and torch's classes occur many times: no need to ask how each one is pickled.
_STANDARD = (OrderedDict, defaultdict, Counter, deque, TypedStorage, UntypedStorage, torch.Size)


@dataclass(slots=True)
class CapturedStorage:
    """One storage of the state. `Captured` knows where its bytes are."""

    dtype: str
    n_bytes: int
    location: str
    has_data: bool
    """False for storages on the meta device."""
    device: torch.device | None = None
    """The accelerator that holds the bytes; None: they are in host memory."""


@dataclass
class Captured:
    """A state, ready to be cut and written. `tensors` and the other lists refer to `storages` by position.

    Parallel lists instead of one object for each storage: a state may have 100,000 storages, and Python's cycle collector walks every
    object.
    """

    skeleton: bytes
    storages: list[CapturedStorage] = field(default_factory=list)
    tensors: list[TensorEntry] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    """Addresses of the bytes, on the host or on a device; 0 for storages without bytes."""
    owners: list[Any] = field(default_factory=list)
    """Storages and arrays, kept alive until `release`."""
    wholes: dict[int, torch.Tensor] = field(default_factory=dict)
    """See `whole`: cheaper than making one."""
    shards: dict[Name, Shard] = field(default_factory=dict)
    """Of each name that stands for a DTensor."""
    form: object = field(default_factory=object)
    """The same object for two states that differ in nothing but bytes, addresses and what stands in the skeleton."""
    rank: int = 0  # whose state this is: matters for `shares` alone
    shares: dict[int, tuple[Share, ...]] = field(default_factory=dict)
    """By a storage's number, who writes which stretch of it; where nothing stands, this rank all. Each has a first name of its own."""
    groups: tuple[GroupClaim, ...] = ()
    """What this rank holds alike with others, all of it."""
    prints: dict[int, str] = field(default_factory=dict)
    """By the number of a storage with shares, what its vote says of all of its bytes: see `format.directory.StorageEntry.print`."""
    _bytes: dict[int, torch.Tensor] = field(default_factory=dict)
    """Byte tensors over whole storages on devices, made when they are first asked for."""

    def release(self) -> None:
        """Release the storages: their bytes are not needed any more."""
        self.owners, self.wholes, self._bytes = [], {}, {}

    def device_bytes(self, number: int, offset: int, n_bytes: int) -> torch.Tensor:
        """A stretch of a storage's bytes on its device. SaveError if its memory is gone.

        The first call for a storage may use `set_`, which torch counts as a write: make it before another stream reads the storage.
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
        """SaveError if a storage was resized after it was captured: its memory is gone."""
        if not self.is_there(number):
            raise SaveError(
                "a tensor's storage was resized before it had been copied. Nothing was committed. Call ckpt.fence() before that"
            )

    def is_there(self, number: int) -> bool:
        """Whether a storage's memory is still where it was captured."""
        assert self.owners, "nobody holds these bytes any more"
        owner = self.owners[number]
        return not isinstance(owner, UntypedStorage) or (
            owner.data_ptr() == self.addresses[number] and owner.nbytes() >= self.storages[number].n_bytes
        )

    def read(self, pieces: Sequence[tuple[int, int, int]], out: U8) -> None:
        """Join stretches of storages (number, offset, bytes) in host memory. Any thread; blocks until the bytes are there."""
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
    """Whether a value is a NumPy array that is stored like a tensor. Other arrays are pickled together with their bytes.

    True only if `dtype.str`, shape and order describe the array completely.
    """
    if type(value) is not np.ndarray or value.nbytes <= _ARRAY_BYTES:
        return False
    dtype = value.dtype
    if (
        not dtype.isnative
    ):  # NumPy's own pickle converts these to native byte order; the result must not depend on the array's size
        return False
    if dtype.hasobject or dtype.fields is not None or dtype.metadata or dtype.subdtype is not None:
        return False
    return np.dtype(dtype.str) == dtype and element_type(NUMPY_PREFIX + dtype.str) is not None


class StorageNumbers:
    """The `persistent_id` of one save: numbers the storages that pickling meets."""

    def __init__(self, dtensors: Mapping[int, Any] | None = None) -> None:
        """dtensors: those of a `LocalState`."""
        self.dtensors = dtensors or {}
        self.shards: dict[Name, Shard] = {}
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
        """The `reducer_override` of the pickler: calls what the pickler would call, once, and notes the answer."""
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
            # torch's own text, because people search for it.
            raise RuntimeError("Cannot save multiple tensors or storages that view the same data as different types")
        location = torch.serialization.location_tag(storage)
        number = self.number_of_storage.get(identity(storage))
        if number is None:
            n_bytes = numel * dtype.itemsize
            info = _storage_info(storage, dtype, n_bytes, location)
            number = self.number_of_storage[identity(storage)] = self._enter(info, address if n_bytes else 0, storage)
        return ("storage", kind, str(number), location, numel)

    def _enter(self, info: CapturedStorage, address: int, owner: Any) -> int:
        """Give a number to a storage that is met for the first time."""
        self.storages.append(info)
        self.addresses.append(address)
        self.owners.append(owner)
        return len(self.storages) - 1

    def _array_id(self, array: np.ndarray[Any, Any]) -> tuple[Any, ...]:
        order = order_of(array)
        number = self.number_of_array.get(id(array))
        if number is None:
            flat = np.asarray(array, order=order).reshape(-1, order=order)
            info = CapturedStorage(NUMPY_PREFIX + array.dtype.str, array.nbytes, "cpu", True)
            number = self.number_of_array[id(array)] = self._enter(info, flat.ctypes.data, (array, flat))
        shape = tuple(int(n) for n in array.shape)
        return ("storage", UntypedStorage, str(number), "cpu", array.nbytes, "ndarray", array.dtype.str, shape, order)


def _storage_info(storage: UntypedStorage, dtype: torch.dtype, n_bytes: int, location: str) -> CapturedStorage:
    name = name_of(dtype)
    if element_type(name) is None:
        raise SaveError(f"a storage of element type {name} cannot be saved: format version 1 has no such type")
    device = storage.device
    on_accelerator = device.type not in ("cpu", "meta")
    return CapturedStorage(name, n_bytes, location, device.type != "meta", device if on_accelerator else None)


def capture(obj: object, pickle_module: Any, pickle_protocol: int) -> Captured:
    """Pickle `obj` with its storages taken out. Raises the same errors as torch.save.

    Storages are referenced, not copied: their owner must not change them until the save is done.
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
            # Called for every object, even for numbers: one more call here makes the save of 50,000 small tensors a fifth longer.
            return None if type(obj) in never else persistent_id(obj)

    if pickle_module is pickle:  # other pickle modules may have their own `reducer_override`
        Pickler.reducer_override = lambda self, obj: numbers.reduce(obj, pickle_protocol)
    Pickler(buffer, protocol=pickle_protocol).dump(obj)
    return buffer.getvalue()


def _has_a_say(kind: type) -> bool:
    """Whether a class controls how its objects are pickled, so that the pickle may differ from their attributes."""
    if issubclass(kind, (type, torch.Tensor, np.ndarray, np.generic, *_STANDARD)) or kind in copyreg.dispatch_table:
        return False
    of_object = getattr(object, "__getstate__", None)  # Python 3.11
    return (
        kind.__reduce_ex__ is not object.__reduce_ex__
        or kind.__reduce__ is not object.__reduce__
        or getattr(kind, "__getstate__", None) is not of_object
    )
